"""The benchmark: timing by turns, what is compared, and the command."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch._dynamo.exc import TorchDynamoException
from torchrl.envs.utils import ExplorationType

from alm_torchrl import ALMOptimizationStepper
from alm_torchrl.cli import main
from alm_torchrl.runs.settings import preset_config
from benchmarks import report as bench_report
from benchmarks.authors import authors_update
from benchmarks.loop import PARTS, Meter
from benchmarks.measures import count_flop
from benchmarks.plain import PlainALM, PlainReplay
from benchmarks.report import BenchSettings, loop_section, rows_of
from benchmarks.sizes import Sizes
from benchmarks.timing import Contender, interleave
from benchmarks.updates import Mode, our_updates

SIZES = Sizes(
    observation_dim=5,
    action_low=(-1.0, -0.5),
    action_high=(1.0, 0.5),
    batch_size=6,
    horizon=3,
    latent_dim=4,
    hidden_dim=8,
    model_hidden_dim=12,
)
TINY = [
    *("--preset", "quick", "--batch-size", "16", "--latent-dim", "4"),
    *("--hidden-dim", "16", "--model-hidden-dim", "16", "--device", "cpu"),
    *("--threads", "1", "--repeats", "2", "--loop-steps", "2", "--loop-rounds", "2"),
    *("--modes", "eager", "bf16", "graph"),
    *("--growth-repeats", "1", "--buffer-sizes", "100", "200"),
]
TIMES = {"median", "q1", "q3", "minimum", "rounds"}


class FakeWork:
    """Contenders that take the time they are told to, on a clock of their own."""

    def __init__(self, **durations):
        self.time = 0.0
        self.calls = []
        self.durations = {name: iter(values) for name, values in durations.items()}

    def clock(self):
        return self.time

    def contender(self, name, **settings):
        return Contender(name, lambda: self.work(name), **settings)

    def work(self, name):
        self.calls.append(name)
        self.time += next(self.durations[name])


def test_rounds_take_turns_and_begin_with_another_contender():
    work = FakeWork(a=[1.0] * 4, b=[1.0] * 4, c=[1.0] * 4)
    contenders = [work.contender(name) for name in "abc"]
    interleave(contenders, rounds=3, warmup=1, clock=work.clock)
    assert "".join(work.calls) == "abc" + "bca" + "cab" + "abc"


def test_medians_and_quartiles_leave_the_warm_up_out():
    work = FakeWork(fast=[90, 1, 5, 3, 2, 4], slow=[90, 20, 60, 40, 20, 40])
    contenders = [work.contender("fast"), work.contender("slow", per=10)]
    fast, slow = interleave(contenders, rounds=5, warmup=1, clock=work.clock)
    assert fast.seconds == (1, 5, 3, 2, 4)
    assert (fast.median, fast.quartiles) == (3, (2, 4))
    assert slow.seconds == (2, 6, 4, 2, 4)
    assert slow.to_dict() == {
        "name": "slow",
        "median": 4,
        "q1": 2,
        "q3": 4,
        "minimum": 2,
        "rounds": 5,
    }


def test_waiting_for_the_device_counts():
    work = FakeWork(a=[1.0])
    waits = iter([100.0, 7.0])

    def wait():
        work.time += next(waits)

    (timing,) = interleave(
        [work.contender("a")], rounds=1, warmup=0, clock=work.clock, synchronize=wait
    )
    assert timing.seconds == (8.0,)


def test_nothing_to_time_is_refused():
    with pytest.raises(ValueError, match="contenders: expected at least one"):
        interleave([], rounds=1)
    with pytest.raises(ValueError, match="rounds"):
        interleave([Contender("a", lambda: None)], rounds=0)


def test_rows_compare_updates_and_give_the_share_of_the_matrix_rate():
    work = FakeWork(ours=[2.0], theirs=[3.0], bf16=[1.0], gemm=[1.0], draw=[1.0])
    contenders = [
        work.contender("ours", flop=40),
        work.contender("theirs", flop=50),
        work.contender("bf16", flop=40, precision="bf16"),
        work.contender("gemm", flop=25, kind="matrix product"),
        work.contender("draw", kind="draw"),
    ]
    timings = interleave(contenders, rounds=1, warmup=0, clock=work.clock)
    rows = {row["name"]: row for row in rows_of(contenders, timings, "theirs")}
    assert rows["ours"]["speed"] == 1.5
    assert rows["ours"]["share_of_matrix_rate"] == (40 / 2) / 25
    assert rows["bf16"]["share_of_matrix_rate"] is None
    assert [rows[name]["speed"] for name in ("gemm", "draw")] == [None, None]


def test_meter_adds_up_only_while_active():
    time = SimpleNamespace(now=0.0)

    def work():
        time.now += 2

    meter = Meter(clock=lambda: time.now)
    timed = meter.timed("work", work)
    timed()
    assert meter.seconds == {}
    meter.active = True
    timed()
    timed()
    assert meter.seconds == {"work": 4}


def _two_draws(plain_batch):
    """A batch of ``PlainReplay`` as the loss takes it."""
    b, k = plain_batch["slice_action"].shape[:2]
    no_rewards = torch.zeros(b, k, 1)
    return TensorDict(
        {
            "slice": TensorDict(
                {
                    "observation": plain_batch["slice_observation"],
                    "action": plain_batch["slice_action"],
                    "next": {
                        "observation": plain_batch["slice_next_observation"],
                        "reward": no_rewards,
                        "terminated": no_rewards.bool(),
                    },
                },
                batch_size=[b, k],
            ),
            "transition": TensorDict(
                {
                    "observation": plain_batch["observation"],
                    "action": plain_batch["action"],
                    "next": {
                        "observation": plain_batch["next_observation"],
                        "reward": plain_batch["reward"].unsqueeze(-1),
                        "terminated": plain_batch["terminated"].unsqueeze(-1).bool(),
                    },
                },
                batch_size=[b],
            ),
        },
        batch_size=[b],
    )


def _filled_replay(steps=40, capacity=60, episode=7):
    generator = np.random.default_rng(0)
    replay = PlainReplay(capacity, SIZES)
    for step in range(steps):
        replay.add(
            step % episode == episode - 1,
            observation=np.full(5, step) + generator.random(5),
            action=generator.uniform(-1, 1, 2),
            next_observation=np.full(5, step + 1),
            reward=float(step),
            terminated=float(step % episode == episode - 1),
        )
    return replay


@pytest.fixture
def pair():
    """Our loss and a hand-written copy with equal networks."""
    config = preset_config("quick", noise_clip=0.2)
    loss = SIZES.make_loss("cpu")
    plain = PlainALM(SIZES, config, "cpu")
    parts = {
        "encoder": plain.encoder,
        "model": plain.model,
        "actor": plain.actor,
        "qvalue": plain.critics,
        "reward": plain.reward,
        "classifier": plain.classifier,
    }
    for name, net in parts.items():
        ours = list(getattr(loss, name).parameters())
        for mine, theirs in zip(net.parameters(), ours, strict=True):
            mine.data.copy_(theirs.data)
    for slow, fast in (
        (plain.target_encoder, plain.encoder),
        (plain.target_critics, plain.critics),
    ):
        slow.load_state_dict(fast.state_dict())
    stepper = ALMOptimizationStepper(
        loss, lr=config.lr, clip_norm=config.clip_norm, tau=config.tau
    )
    return loss, stepper, plain, parts


def test_hand_written_update_is_ours(pair, monkeypatch):
    loss, stepper, plain, parts = pair
    batch = _filled_replay().sample("cpu")
    loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    order = torch.linspace(1, 0, SIZES.batch_size)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: order)
    for _ in range(2):
        theirs = plain.update(batch, std=1.0)
        ours = stepper.step(None, _two_draws(batch))
        for name, value in {
            "model": ours["loss_model"],
            "reward": ours["loss_reward"] + ours["loss_classifier"],
            "qvalue": ours["loss_qvalue"],
            "actor": ours["loss_actor"],
        }.items():
            torch.testing.assert_close(theirs[name], value, msg=name)
    for name, net in parts.items():
        for mine, our in zip(
            net.parameters(), getattr(loss, name).parameters(), strict=True
        ):
            torch.testing.assert_close(mine, our, rtol=1e-4, atol=1e-5)


def test_hand_written_update_multiplies_as_much_as_ours(pair):
    _, stepper, plain, _ = pair
    batch = _filled_replay().sample("cpu")
    theirs = count_flop(lambda: plain.update(batch, std=1.0))
    ours = count_flop(lambda: stepper.step(None, _two_draws(batch)))
    assert theirs == pytest.approx(ours, rel=0.1)


@pytest.mark.parametrize("steps", [40, 60, 61, 95])
def test_hand_written_windows_stay_within_an_episode(steps):
    replay = _filled_replay(steps)
    starts = set()
    for _ in range(600):
        batch = replay.sample("cpu")
        time = batch["slice_observation"][..., 0].floor()
        assert (time.diff(dim=1) == 1).all()
        assert (time[:, 0] // 7 == time[:, -1] // 7).all()
        assert time.min() >= max(0, steps - 60)
        starts |= set(time[:, 0].int().tolist())
    expected = {t for t in range(max(0, steps - 60), steps - 2) if t % 7 <= 4}
    assert starts == expected


def test_a_refused_mode_is_left_out_with_the_reason():
    modes = [Mode("eager", {}), Mode("other", {"precision": "fp3"})]
    contenders, left_out = our_updates(SIZES, modes, device="cpu", rows=50)
    assert [row.name for row in contenders] == ["alm, eager", "alm: draw of the batch"]
    assert left_out[0].name == "alm, other"
    assert "fp3" in left_out[0].reason
    assert contenders[0].flop > 0
    assert contenders[0].memory > 0
    with pytest.raises(ValueError, match=r"alm, other cannot be measured.*fp3"):
        our_updates(SIZES, modes[1:], device="cpu", rows=50)


AGENT = """
import gym
import wandb
from gym.envs.mujoco import mujoco_env
import utils
from models import SIZE

class Env(mujoco_env.MujocoEnv, gym.utils.EzPickle):
    pass

class Buffer:
    def __init__(self):
        self.rows, self.draws = [], []
    def push(self, row):
        self.rows.append(row)
    def sample_seq(self, length, batch):
        self.draws.append((length, batch))
    def sample(self, batch):
        self.draws.append(batch)

class AlmAgent:
    last = None
    def __init__(self, **settings):
        print("noise")
        self.settings, self.env_buffer, self.steps = settings, Buffer(), []
        type(self).last = self
    def update(self, step):
        self.steps.append(step + SIZE - utils.ONE)
"""


def test_a_loop_that_cannot_be_compiled_is_left_out(monkeypatch):
    def compare(config, *, mode, **_):
        if mode == "compiled":
            raise TorchDynamoException("no compiler\nand more")
        return SimpleNamespace(to_dict=lambda: {"mode": mode})

    monkeypatch.setattr(bench_report, "compare_loops", compare)
    config = preset_config("quick")

    def loops(*modes):
        settings = BenchSettings("cpu", modes, repeats=1, loop_steps=1, loop_rounds=1)
        return loop_section(config, settings)

    section = loops("eager", "compiled")
    assert section["loops"] == [{"mode": "eager"}]
    reason = "cannot be compiled here: no compiler"
    assert section["left_out"] == [{"name": "loop, compiled", "reason": reason}]
    with pytest.raises(ValueError, match=f"loop, compiled: {reason}"):
        loops("compiled", "eager")


@pytest.fixture
def checkout(tmp_path):
    """Something that is laid out as the authors' repository."""
    for name, text in {
        "agents/alm.py": AGENT,
        "agents/__init__.py": "",
        "utils/__init__.py": "ONE = 1",
        "models.py": "SIZE = 1",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_authors_update_runs_from_a_checkout(checkout, capsys):
    path, modules = list(sys.path), set(sys.modules)
    update, draw = authors_update(checkout, SIZES, device="cpu", rows=20)
    assert sys.path == path
    left = {name.partition(".")[0] for name in set(sys.modules) - modules}
    assert not left & {"agents", "models", "utils", "wandb", "gym"}
    assert capsys.readouterr().out == ""
    update.call()
    draw.call()
    agent = update.call.__closure__[0].cell_contents
    assert agent.steps == list(range(1, len(agent.steps) + 1))
    assert agent.env_buffer.draws == [(3, 6), 6]
    assert agent.settings["num_states"] == 5
    assert agent.settings["model_hidden_dims"] == 12
    state, action, reward, after, done = agent.env_buffer.rows[0]
    assert len(agent.env_buffer.rows) == 20
    assert (state.shape, action.shape, after.shape) == ((5,), (2,), (5,))
    assert (reward.shape, done.shape) == ((), ())


def test_authors_without_a_checkout_is_explained(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *TINY, "--authors", str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "--authors: expected a checkout of github.com/RajGhugare19/alm" in error
    assert f"{tmp_path}, which has no agents/alm.py" in error


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What the command prints and writes, all sections at tiny sizes."""
    folder = tmp_path_factory.mktemp("bench")
    files = [
        "--json",
        str(folder / "a" / "bench.json"),
        "--plot",
        str(folder / "g.png"),
    ]
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        assert main(["bench", *TINY, *files]) == 0
    record = json.loads((folder / "a" / "bench.json").read_text())
    return SimpleNamespace(text="\n".join(printed), record=record, folder=folder)


def test_command_prints_tables(report):
    for words in (
        "threads on",
        "wall time",
        "HalfCheetah-v5, quick sizes (batch_size=16, ",
        ": one update",
        "alm, eager",
        "alm, bf16",
        "matrix product, fp32",
        "SAC, batch 16",
        "SAC, batch 256",
        "TD3, batch 100",
        "REDQ, batch 256",
        "steps/s, hand-written",
        "horizon                8",
        "buffer_size          200",
    ):
        assert words in report.text
    assert "left out: authors' code: no --authors PATH" in report.text
    assert "left out: alm, graph: needs a CUDA device" in report.text
    assert "left out: loop, graph: needs a CUDA device" in report.text


def test_record_has_the_documented_fields(report):
    record = report.record
    assert record["options"]["batch_size"] == 16
    assert {"versions", "commit", "hardware"} < set(record["machine"])
    assert record["machine"]["hardware"]["threads"] == 1
    (task,) = record["tasks"]
    for section in ("updates", "peers"):
        names = [row["name"] for row in task[section]["rows"]]
        assert task[section]["reference"] == names[0] == "alm, eager"
        for row in task[section]["rows"]:
            assert set(row) == TIMES | {
                *("name", "kind", "precision", "flop", "flop_per_second"),
                *("share_of_matrix_rate", "memory", "speed"),
            }
            assert 0 < row["minimum"] <= row["q1"] <= row["median"] <= row["q3"]
            assert row["rounds"] == 2
    rows = {row["name"]: row for row in task["peers"]["rows"]}
    # Twenty updates with ten critics: more than 20 * 10 / 2 of SAC's with its two.
    assert rows["REDQ, batch 16"]["flop"] > 20 * rows["SAC, batch 16"]["flop"]
    assert rows["REDQ, batch 256"]["flop"] == 16 * rows["REDQ, batch 16"]["flop"]
    assert task["updates"]["left_out"][-1]["name"] == "authors' code"


def test_record_of_the_loop_adds_up(report):
    loop = report.record["tasks"][0]["loop"]["loops"][0]
    assert loop["mode"] == "eager"
    ours, plain = loop["ours"], loop["hand_written"]
    assert tuple(ours["parts"]) == PARTS
    assert tuple(plain["parts"]) == tuple(p for p in PARTS if p != "collector")
    for side in (ours, plain):
        assert min(side["parts"].values()) > 0
        assert sum(side["shares"].values()) == pytest.approx(1)
        assert side["steps_per_second"] == pytest.approx(1 / side["median"])
    speed = ours["steps_per_second"] / plain["steps_per_second"]
    assert loop["speed"] == pytest.approx(speed)


def test_growth_is_recorded_and_drawn(report):
    points = report.record["growth"]["points"]
    values = {}
    for point in points:
        values.setdefault(point["axis"], []).append(point["value"])
    assert values == {
        "horizon": [1, 2, 3, 5, 8],
        "batch_size": [4, 8, 16, 32],
        "latent_dim": [1, 2, 4, 8],
        "width": [4, 8, 16, 32],
        "buffer_size": [100, 200],
    }
    assert (report.folder / "g.png").read_bytes().startswith(b"\x89PNG")


def test_sections_can_be_left_out(capsys):
    assert main(["bench", *TINY, "--sections", "updates", "--modes", "eager"]) == 0
    text = capsys.readouterr().out
    assert "one update" in text
    assert "training loop" not in text
    assert "growth" not in text


def test_cpu_clock_is_for_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit):
        main(["bench", "--device", "cuda", "--clock", "cpu"])
    assert "clock: expected 'wall' on a cuda device" in capsys.readouterr().err
