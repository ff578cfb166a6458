"""The benchmark: what it prints is what was measured."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from alm_torchrl.baselines.builders import make_sac_loss
from alm_torchrl.runs.settings import preset_config
from benchmarks import __main__ as command
from benchmarks import growth, timing
from benchmarks.authors import authors_update
from benchmarks.loop import Meter, compare_loops
from benchmarks.peers import peer_updates
from benchmarks.problem import Problem
from benchmarks.timing import Contender, compare, count_flop, interleave, make_clock
from benchmarks.updates import example_update, our_updates


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Each contender is called as seldom as possible."""
    monkeypatch.setattr(timing, "ROUND_SECONDS", 0)


@pytest.fixture
def problem():
    return Problem(
        preset_config(
            "quick",
            task="Pendulum-v1",
            action_bounds="rescale",
            batch_size=16,
            latent_dim=4,
            hidden_dim=8,
            model_hidden_dim=12,
        )
    )


class FakeWork:
    """Contenders that take the time they are told to, on a clock of their own."""

    def __init__(self):
        self.time = 0.0
        self.calls = []

    def clock(self):
        return self.time

    def contender(self, name, seconds, **settings):
        durations = itertools.cycle(seconds)

        def call():
            self.calls.append(name)
            self.time += next(durations)

        return Contender(name, call, **settings)


def test_rounds_take_turns_and_give_quartiles():
    work = FakeWork()
    interleave([work.contender(name, [1.0]) for name in "abc"], 3, work.clock)
    # The first of two calls warms up.
    assert "".join(work.calls) == "aabbcc" + "bbccaa" + "ccaabb"
    seconds = [90.0, 10.0, 90.0, 50.0, 90.0, 30.0, 90.0, 20.0, 90.0, 40.0]
    (timed,) = interleave([work.contender("d", seconds, per=10)], 5, work.clock)
    assert timed == {"median": 3, "q1": 2, "q3": 4, "rounds": 5}


def test_updates_are_compared_and_give_the_share_of_the_matrix_rate():
    work = FakeWork()
    contenders = [
        work.contender("ours", [2.0], flop=40),
        work.contender("theirs", [3.0], flop=50),
        work.contender("bf16", [1.0], flop=40, precision="bf16"),
        work.contender("gemm", [1.0], flop=25, kind="matrix product"),
    ]
    compared = compare(contenders, "theirs", 1, work.clock)
    rows = {row["name"]: row for row in compared}
    assert [rows[name]["speed"] for name in ("ours", "theirs", "bf16")] == [1.5, 1, 3]
    assert rows["ours"]["flop_per_second"] == 20
    assert rows["ours"]["share_of_matrix_rate"] == 20 / 25
    assert rows["bf16"]["share_of_matrix_rate"] is None
    assert rows["gemm"]["speed"] is None
    lines = command.rows_table(compared, "theirs").splitlines()
    assert lines[1].split() == [
        *("ours", "2000.00", "2000.00", "2000.00"),
        *("1.50", "0.00", "0.00", "0.80", "-"),
    ]


def test_operations_are_those_of_the_matrix_products():
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    forward = 2 * 7 * (3 * 5 + 5 * 2)
    # Each weight once more, and the input of all layers but the first.
    backward = forward + 2 * 7 * 5 * 2
    assert count_flop(lambda: net(torch.ones(7, 3))) == forward
    both = count_flop(lambda: net(torch.ones(7, 3)).sum().backward())
    assert both == forward + backward


def test_contenders_do_the_work_they_stand_for(problem):
    (ours,), left_out = our_updates(problem, ["eager", "graph"])
    assert left_out == {"alm, graph": "needs a CUDA device"}
    assert ours.flop == count_flop(ours.call) == example_update(problem).flop
    with pytest.raises(ValueError, match="modes: expected at least one that runs"):
        our_updates(problem, ["graph"])


def test_peers_do_the_work_they_stand_for(problem, monkeypatch):
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    monkeypatch.setattr("benchmarks.peers.OWN_SIZE", 32)
    contenders, left_out = peer_updates(problem)
    assert list(left_out) == ["Stable-Baselines3"]
    peers = {peer.name: peer for peer in contenders}
    flop = {name: peer.flop for name, peer in peers.items()}
    assert list(flop) == [
        f"{name} of TorchRL, {sizes}"
        for name in ("SAC", "TD3", "REDQ")
        for sizes in ("equal", "own")
    ]
    # Twenty updates of ten critics, against one of two and an actor.
    assert flop["REDQ of TorchRL, equal"] > 20 * flop["SAC of TorchRL, equal"]
    td3 = peers["TD3 of TorchRL, equal"]
    assert td3.per == 2
    assert count_flop(td3.call) == 2 * td3.flop
    for peer in peer_updates(problem.changed(batch_size=32, hidden_dim=32))[0]:
        assert peer.flop == flop[peer.name.replace("equal", "own")]


def test_peers_of_stable_baselines3_do_the_same_work(problem, monkeypatch):
    pytest.importorskip("stable_baselines3")
    monkeypatch.setattr("benchmarks.peers.TORCHRL", {"SAC": make_sac_loss})
    same = problem.changed(batch_size=256, hidden_dim=256)
    contenders, left_out = peer_updates(same)
    assert left_out == {}
    flop = {peer.name: peer.flop for peer in contenders}
    assert list(flop)[2:] == [
        f"{name} of Stable-Baselines3, {sizes}"
        for name in ("SAC", "TD3")
        for sizes in ("equal", "own")
    ]
    sac = flop["SAC of Stable-Baselines3, own"]
    assert sac == flop["SAC of Stable-Baselines3, equal"]
    # Its actor's loss also gives gradients of the weights of both critics.
    gradients = 2 * 2 * 256 * (4 * 256 + 256 * 256 + 256)
    assert sac == flop["SAC of TorchRL, equal"] + gradients
    # Its layers are wider.
    assert (
        flop["TD3 of Stable-Baselines3, own"] > flop["TD3 of Stable-Baselines3, equal"]
    )


def test_parts_of_a_loop_add_up_to_it():
    work = FakeWork()
    meter = Meter(work.clock)
    names = ("simulator", "policy")
    parts = {name: work.contender(name, [2.0]).call for name in names}
    timed = {name: meter.timed(name, call) for name, call in parts.items()}
    env = meter.timed("env", timed["simulator"])
    collect = meter.timed("collector", lambda: (env(), timed["policy"]()))
    collect()
    assert meter.seconds == {}
    meter.active = True
    collect()
    work.time += 1.0
    assert meter.parts(5.0, steps=2) == {
        "simulator": 1.0,
        "env": 0.0,
        "policy": 1.0,
        "collector": 0.0,
        "rest": 0.5,
    }
    assert meter.seconds == {}


def test_loops_are_compared(problem):
    clock = make_clock("wall", "cpu")
    loop = compare_loops(problem, {}, steps=2, rounds=3, clock=clock)
    ours, plain = loop["ours"], loop["hand_written"]
    assert set(ours["parts"]) == {*plain["parts"], "collector"}
    assert min(*ours["parts"].values(), *plain["parts"].values()) > 0
    assert ours["rounds"] == plain["rounds"] == 3
    assert loop["speed"] == pytest.approx(
        ours["steps_per_second"] / plain["steps_per_second"]
    )
    assert f"ratio {loop['speed']:.2f}" in command.loop_table(loop)


def test_growth_changes_one_size_at_a_time(problem, tmp_path, monkeypatch):
    def called_once(contenders, rounds, clock):
        for contender in contenders:
            contender.call()
        return [{"median": 2.0, "q1": 1.0, "q3": 4.0}] * len(contenders)

    monkeypatch.setattr(growth, "interleave", called_once)
    points = growth.measure_growth(problem, 1, make_clock("wall", "cpu"), [100, 200])
    values = {}
    for point in points:
        values.setdefault(point["axis"], []).append(point["value"])
    assert values == {
        "horizon": [1, 2, 3, 5, 8],
        "batch_size": [4, 8, 16, 32],
        "latent_dim": [1, 2, 4, 8],
        "hidden_dim": [2, 4, 8, 16],
        "rows": [100, 200],
    }
    growth.plot_growth(points, "title", tmp_path / "a" / "growth.png")
    assert (tmp_path / "a" / "growth.png").read_bytes().startswith(b"\x89PNG")


AGENT = """
import gym
import wandb
from gym.envs.mujoco import mujoco_env
import utils
from models import SIZE

class Env(mujoco_env.MujocoEnv, gym.utils.EzPickle):
    pass

class AlmAgent:
    def __init__(self, **settings):
        print("noise")
        self.settings, self.rows, self.steps = settings, [], []
        self.env_buffer = self
    def push(self, row):
        self.rows.append(row)
    def update(self, step):
        self.steps.append(step + SIZE - utils.ONE)
        return self
"""


def test_authors_update_runs_from_a_checkout(problem, tmp_path, capsys):
    for name, text in {
        "agents/alm.py": AGENT,
        "agents/__init__.py": "",
        "utils/__init__.py": "ONE = 1",
        "models.py": "SIZE = 1",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    path, modules = list(sys.path), set(sys.modules)
    agent = authors_update(tmp_path, problem, rows=20).call()
    assert sys.path == path
    left = {name.partition(".")[0] for name in set(sys.modules) - modules}
    assert not left & {"agents", "models", "utils", "wandb", "gym"}
    assert capsys.readouterr().out == ""
    assert agent.steps == [1, 2, 3]
    assert agent.settings["num_states"] == 3
    assert agent.settings["model_hidden_dims"] == 12
    assert len(agent.rows) == 20
    assert [value.shape for value in agent.rows[0]] == [(3,), (1,), (), (3,), ()]


def test_command_prints_what_it_records(tmp_path, capsys):
    options = command.Options(
        preset="quick",
        sections=("updates",),
        modes=("eager", "graph"),
        repeats=1,
        json=tmp_path / "a" / "bench.json",
    )
    command.run(options)
    record = json.loads(options.json.read_text())
    printed = capsys.readouterr().out.splitlines()
    rows = record["tasks"][0]["updates"]["rows"]
    assert [row["kind"] for row in rows].count("update") == 2
    for row in rows:
        (line,) = (text for text in printed if text.startswith(row["name"] + "  "))
        assert f"{1e3 * row['median']:8.2f}" in line
    assert printed[-1] == "left out: alm, graph: needs a CUDA device"
    assert record["options"]["preset"] == "quick"
    assert {"versions", "commit", "hardware"} <= set(record["machine"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clock": "cpu", "device": "cuda"}, "clock: expected 'wall' on a cuda"),
        ({"modes": ("graph",)}, "modes: expected at least one for cpu"),
        ({"authors": Path("nowhere")}, "--authors: expected a checkout"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        command.run(command.Options(**settings))
