"""Runs on Ray equal local ones, whatever is killed meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch

from alm_torchrl.experiments.display import is_complete
from alm_torchrl.experiments.engine_local import run_locally
from alm_torchrl.experiments.engine_ray import run_on_ray
from alm_torchrl.experiments.execution import make_runs
from alm_torchrl.training.files import read_state
from tests.experiments.tiny import tiny, worker_that_has_saved
from tests.runs.small_runs import contents, rows_of, same_end, steps_saved

pytestmark = pytest.mark.timeout(1500)
STEPS = 100


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # By default, Ray's workers let all other processes go first.
        patch.setenv("RAY_worker_niceness", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        yield cluster
        cluster.shutdown()


def made_locally(folder, seeds):
    configs = [tiny(folder, seed, total_steps=STEPS) for seed in seeds]
    assert make_runs(configs, partial(run_locally, jobs=1))[1] == {}
    return configs


def parent(process):
    """The process that started another one, or None where that is gone."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return None
    return int(status.rpartition(")")[2].split()[1])


def workers(configs):
    """The processes of runs in mid-training that have saved."""
    found = [worker_that_has_saved(config, STEPS) for config in configs]
    return [one for one in found if one is not None and parent(one) is not None]


def kill_in_mid_training(configs, raylet, killed):
    """Kills a worker of another raylet, then this raylet while it has one."""

    def watch():
        while not (others := [w for w in workers(configs) if parent(w) != raylet.pid]):
            time.sleep(0.02)
        os.kill(others[0], signal.SIGKILL)
        killed.append("worker")
        while not any(parent(w) == raylet.pid for w in workers(configs)):
            time.sleep(0.02)
        raylet.kill()
        # Its workers end once it is gone; as a zombie, it would not be.
        raylet.wait()
        killed.append("raylet")

    threading.Thread(target=watch, daemon=True).start()


def assert_same_checkpoint(config, other):
    """The last checkpoints of two runs; their manifests have times."""
    ends = [
        sorted((one.run_path / "checkpoints").glob("checkpoint-*"))[-1] / "components"
        for one in (config, other)
    ]
    files = [contents(end) for end in ends]
    assert files[0].keys() == files[1].keys()
    differ = {path.as_posix() for path in files[0] if files[0][path] != files[1][path]}
    # A random name, and generators that no training uses.
    assert differ <= {"0002-replay_buffer/replay.npz", "0003-rng/state.npz"}
    for file in differ:
        states = [read_state(end / file) for end in ends]
        kept = [
            {k: v for k, v in state.items() if k not in ("id", "python", "numpy")}
            for state in states
        ]
        assert str(kept[0]) == str(kept[1])
        if "torch_cpu" in kept[0]:
            assert torch.equal(kept[0]["torch_cpu"], kept[1]["torch_cpu"])


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param(3, marks=pytest.mark.slow),
        pytest.param(8, marks=pytest.mark.exhaustive),
    ],
)
def test_lost_workers_and_nodes_change_nothing(runs, cluster, tmp_path):
    local = made_locally(tmp_path / "local", range(runs))
    node = cluster.add_node(num_cpus=1)
    (raylet,) = node.all_processes["raylet"]
    configs = [tiny(tmp_path, seed, total_steps=STEPS) for seed in range(runs)]
    killed = []
    kill_in_mid_training(configs, raylet.process, killed)
    made, failures = make_runs(configs, partial(run_on_ray, address=cluster.address))
    assert failures == {}
    assert killed == ["worker", "raylet"]
    for one, other in zip(configs, local, strict=True):
        metrics = [config.run_path / "metrics.csv" for config in (one, other)]
        assert rows_of(metrics[0]) == rows_of(metrics[1])
        assert_same_checkpoint(one, other)
    logs = [(run.path / "train.log").read_text() for run in made]
    assert sum("Continues from" in log for log in logs) >= 2


@pytest.mark.slow
def test_a_signal_saves_and_the_next_sweep_continues(cluster, tmp_path):
    (local,) = made_locally(tmp_path / "local", [0])
    config = tiny(tmp_path, 0, total_steps=STEPS)

    def stop():
        while not workers([config]):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    engine = partial(run_on_ray, address=cluster.address)
    with pytest.raises(KeyboardInterrupt, match="15"):
        make_runs([config], engine)
    assert not is_complete(config)
    log = (config.run_path / "train.log").read_text()
    assert f"Saved in {config.run_path / 'checkpoints'}" in log
    assert make_runs([config], engine)[1] == {}
    assert same_end(config.run_path, local.run_path)
    assert steps_saved(config.run_path)[-1] == 20 + STEPS


@pytest.mark.slow
def test_a_run_that_a_signal_stops_begins_again(cluster, tmp_path):
    config = tiny(tmp_path, 0, total_steps=STEPS)

    def stop():
        while not (found := workers([config])):
            time.sleep(0.02)
        os.kill(found[0], signal.SIGUSR1)

    threading.Thread(target=stop, daemon=True).start()
    assert make_runs([config], partial(run_on_ray, address=cluster.address))[1] == {}
    log = (config.run_path / "train.log").read_text()
    assert "Interrupted. Saved in" in log
    assert "Continues from" in log


@pytest.mark.slow
@pytest.mark.parametrize("from_environment", [False, True])
def test_a_wrong_address_is_named(from_environment, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    if from_environment:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    runs = run_on_ray(
        [tiny(tmp_path, 0)], address=None if from_environment else "127.0.0.1:1"
    )
    with pytest.raises(ValueError, match=r"got '127.0.0.1:1': .*refused"):
        next(runs)


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(cluster, tmp_path):
    good = tiny(tmp_path, 0, total_steps=2)
    bad = tiny(tmp_path, 0, total_steps=2, task="Missing-v0")
    with closing(run_on_ray([bad, good], address=cluster.address)) as outcomes:
        reasons = {config.task: reason for config, reason in outcomes}
    assert "Missing" in reasons["Missing-v0"]
    assert reasons["Pendulum-v1"] == ""
