"""Jobs of submitit's local executor equal local runs, also where they end early."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import closing

import pytest

from alm_torchrl.experiments.engine_slurm import run_on_slurm
from alm_torchrl.experiments.worker import make_run
from tests.experiments.tiny import tiny, worker_that_has_saved
from tests.runs.small_runs import same_end

pytestmark = pytest.mark.slow
STEPS = 100


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    pytest.importorskip("submitit")
    config = tiny(tmp_path_factory.mktemp("local"), 0, total_steps=STEPS)
    assert make_run(config) == (0, "")
    return config


def send_once_saved(number, config, process=None):
    """Sends a signal to a process, by default that of the run, once it has saved."""

    def watch():
        while (worker := worker_that_has_saved(config, STEPS)) is None:
            time.sleep(0.02)
        os.kill(process or worker, number)

    threading.Thread(target=watch, daemon=True).start()


def test_failures_are_named(tmp_path, local):
    good = tiny(tmp_path, 0, total_steps=2)
    bad = tiny(tmp_path, 0, total_steps=2, task="Missing-v0")
    engine = run_on_slurm([bad, good], folder=tmp_path / ".submitit", cluster="local")
    with closing(engine) as outcomes:
        reasons = {config.task: reason for config, reason in outcomes}
    assert "Missing" in reasons["Missing-v0"]
    assert reasons["Pendulum-v1"] == ""


# Time limit or preemption; preemption without a warning; a process that is killed.
@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM", "SIGKILL"])
def test_a_job_that_ends_early_continues(name, tmp_path, local):
    config = tiny(tmp_path, 0, total_steps=STEPS)
    send_once_saved(getattr(signal, name), config)
    engine = run_on_slurm([config], folder=tmp_path / ".submitit", cluster="local")
    with closing(engine) as outcomes:
        assert [reason for _, reason in outcomes] == [""]
    log = (config.run_path / "train.log").read_text()
    assert "Continues from" in log
    assert ("Interrupted. Saved in" in log) == (name != "SIGKILL")
    assert same_end(config.run_path, local.run_path)


def test_closing_the_sweep_saves(tmp_path, local, monkeypatch):
    from submitit import LocalJob

    # What scancel sends. The local executor would kill the job after a second.
    monkeypatch.setattr(
        LocalJob, "cancel", lambda job, check: os.kill(int(job.job_id), signal.SIGTERM)
    )
    config = tiny(tmp_path, 0, total_steps=STEPS)
    send_once_saved(signal.SIGTERM, config, os.getpid())
    engine = run_on_slurm([config], folder=tmp_path / ".submitit", cluster="local")
    with pytest.raises(KeyboardInterrupt), closing(engine) as outcomes:
        list(outcomes)
    assert "Interrupted. Saved in" in (config.run_path / "train.log").read_text()
