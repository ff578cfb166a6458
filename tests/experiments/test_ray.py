"""Runs on Ray equal local ones, whatever is killed meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import closing
from functools import partial

import pytest

from alm_torchrl.experiments.display import is_complete
from alm_torchrl.experiments.engine_local import run_locally
from alm_torchrl.experiments.engine_ray import run_on_ray
from alm_torchrl.experiments.execution import make_runs
from tests.experiments.tiny import tiny, worker_that_has_saved
from tests.runs.small_runs import same_end, steps_saved

pytestmark = pytest.mark.slow
SEEDS = range(4)
STEPS = 300


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    configs = [tiny(folder, seed, total_steps=STEPS) for seed in SEEDS]
    assert make_runs(configs, partial(run_locally, jobs=1))[1] == {}
    return configs


def once_saved(configs, act, killed):
    """Acts on the process of the first run that has saved in mid-training."""

    def watch():
        while not killed:
            for config in configs:
                process = worker_that_has_saved(config, STEPS)
                if process is not None and not killed:
                    killed.append(process)
                    act(process)
            time.sleep(0.02)

    threading.Thread(target=watch, daemon=True).start()


def test_lost_workers_and_nodes_change_nothing(cluster, local, tmp_path):
    node = cluster.add_node(num_cpus=1)
    (raylet,) = node.all_processes["raylet"]
    configs = [tiny(tmp_path, seed, total_steps=STEPS) for seed in SEEDS]
    lost = []

    def kill(process):
        os.kill(process, signal.SIGKILL)
        os.kill(raylet.process.pid, signal.SIGKILL)

    once_saved(configs, kill, lost)
    runs, failures = make_runs(configs, partial(run_on_ray, address=cluster.address))
    assert failures == {}
    assert len(lost) == 1
    for one, other in zip(configs, local, strict=True):
        assert same_end(one.run_path, other.run_path)
    logs = [(run.path / "train.log").read_text() for run in runs]
    assert any("Continues from" in log for log in logs)


def test_a_signal_saves_and_the_next_sweep_continues(cluster, local, tmp_path):
    config = tiny(tmp_path, 0, total_steps=STEPS)
    once_saved([config], lambda _: os.kill(os.getpid(), signal.SIGTERM), [])
    engine = partial(run_on_ray, address=cluster.address)
    with pytest.raises(KeyboardInterrupt, match="15"):
        make_runs([config], engine)
    assert not is_complete(config)
    log = (config.run_path / "train.log").read_text()
    assert f"Saved in {config.run_path / 'checkpoints'}" in log
    assert make_runs([config], engine)[1] == {}
    assert same_end(config.run_path, local[0].run_path)
    assert steps_saved(config.run_path)[-1] == 20 + STEPS


def test_a_run_that_fails_is_named_and_the_others_go_on(cluster, tmp_path):
    good = tiny(tmp_path, 0, total_steps=2)
    bad = tiny(tmp_path, 0, total_steps=2, task="Missing-v0")
    with closing(run_on_ray([bad, good], address=cluster.address)) as outcomes:
        reasons = {config.task: reason for config, reason in outcomes}
    assert "Missing" in reasons["Missing-v0"]
    assert reasons["Pendulum-v1"] == ""
