"""What ends a run, or should not: signals, errors, endless tasks, a lost folder."""

from __future__ import annotations

import os
import signal
import time

import pytest

from alm_torchrl.runs.folder import read_metrics
from tests.runs.scripted_env import Scripted, scripted_task
from tests.runs.small_runs import (
    command,
    contents,
    refused,
    rows_of,
    run,
    same_end,
    steps_saved,
)

SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"]
TRAIN, EVALUATE = 0, 1  # instances of the environment
FAR = {"max_episode_steps": 10**6}


def send(number, times=1):
    def act():
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    return act


def fail(message="the simulator died", error=RuntimeError):
    def act():
        raise error(message)

    return act


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six training steps of the scripted task that went through."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with scripted_task(**FAR) as task:
        assert run(folder, task=[task]) == 0
    return folder


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_save_and_stop_with_their_own_exit_code(tmp_path, whole, name, capsys):
    folder, number = tmp_path / "run", getattr(signal, name)
    times = 1 if name == "SIGINT" else 3
    before = signal.getsignal(number)
    with scripted_task({(TRAIN, 22): send(number, times)}, **FAR) as task:
        assert run(folder, task=[task]) == 128 + number
        assert signal.getsignal(number) is before
        assert steps_saved(folder)[-1] == 23
        assert f"Saved in {folder / 'checkpoints'}" in capsys.readouterr().out
        Scripted.script = {}
        assert command("train", "--resume", folder) == 0
    assert same_end(folder, whole)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_the_handlers_of_a_scheduler_stay(tmp_path, handler):
    previous = signal.signal(signal.SIGUSR1, handler)
    try:
        with scripted_task({(TRAIN, 22): send(signal.SIGUSR1)}, **FAR) as task:
            assert run(tmp_path / "run", task=[task]) == 0
        assert signal.getsignal(signal.SIGUSR1) is handler
    finally:
        signal.signal(signal.SIGUSR1, previous)


@pytest.mark.parametrize("step", [2, 7, 12])
def test_a_stop_is_obeyed_in_an_evaluation_which_is_made_up_for(tmp_path, whole, step):
    folder = tmp_path / "run"
    with scripted_task({(EVALUATE, step): send(signal.SIGTERM)}, **FAR) as task:
        assert run(folder, task=[task]) == 143
        assert Scripted.made == 2
        evaluations = step // 5
        metrics = read_metrics(folder / "metrics.csv")
        assert len(metrics) == evaluations
        Scripted.script = {}
        assert command("train", "--resume", folder) == 0
    assert same_end(folder, whole)


@pytest.mark.parametrize("instance", [TRAIN, EVALUATE])
@pytest.mark.parametrize("error", [RuntimeError, ConnectionError, ValueError])
def test_an_environment_that_raises_is_saved_first(
    tmp_path, whole, capsys, instance, error
):
    folder = tmp_path / "run"
    at = 23 if instance == TRAIN else 7
    with scripted_task({(instance, at): fail(error=error)}, **FAR) as task:
        message = refused(capsys, run, folder, task=[task])
        assert "the simulator died" in message
        assert f"alm-torchrl train --resume {folder}" in message
        assert steps_saved(folder)[-1] == 23
        Scripted.script = {}
        assert command("train", "--resume", folder) == 0
    if instance == EVALUATE:
        assert same_end(folder, whole)
    assert rows_of(folder / "metrics.csv").keys() == {20, 23, 26}


def test_an_error_in_the_middle_of_a_reset_saves_nothing(tmp_path, capsys, monkeypatch):
    folder, reset = tmp_path / "run", Scripted.reset

    def fail_once(env, **kwargs):
        if (env.number, env.count) == (TRAIN, 25):
            raise RuntimeError("the simulator died")
        return reset(env, **kwargs)

    with scripted_task(**FAR) as task:
        with monkeypatch.context() as patch:
            patch.setattr(Scripted, "reset", fail_once)
            message = refused(capsys, run, folder, task=[task])
        assert "the simulator died" in message
        assert steps_saved(folder)[-1] == 24
        assert command("train", "--resume", folder) == 0
    assert steps_saved(folder)[-1] == 26


def test_a_close_that_raises_costs_nothing(tmp_path, whole, monkeypatch, capsys):
    folder = tmp_path / "run"
    with scripted_task(**FAR) as task:
        monkeypatch.setattr(Scripted, "close", lambda env: fail("it hangs")())
        with pytest.warns(UserWarning, match="closing the environment raised.*hangs"):
            assert run(folder, task=[task]) == 0
    assert "trained agent" in capsys.readouterr().out
    assert (folder / "learning_curve.png").is_file()
    assert same_end(folder, whole)


def test_a_return_that_is_not_finite_ends_the_run(tmp_path, capsys):
    folder = tmp_path / "run"
    with scripted_task({(EVALUATE, 8): lambda: float("nan")}, **FAR) as task:
        message = refused(capsys, run, folder, task=[task])
    assert "training diverged: the return of evaluation episode 1 was not" in message
    assert "in training step 3" in message
    assert list(rows_of(folder / "metrics.csv")) == [20]
    assert steps_saved(folder)[-1] == 22
    assert (folder / "checkpoints" / "best").is_dir()


def test_episodes_shorter_than_the_horizon_name_the_flag(tmp_path, capsys):
    with scripted_task(kwargs={"length": 2}, **FAR) as task:
        folder = tmp_path / "run"
        message = refused(capsys, run, folder, task=[task])
        assert "horizon: expected at most 2" in message
        assert "--horizon 2" in message
        assert run(folder, "--fresh", "--horizon", 2, task=[task], steps=2) == 0


def test_a_task_that_never_ends_names_the_flag(tmp_path, capsys):
    with scripted_task(kwargs={"length": 10**9}) as task:
        folder = tmp_path / "run"
        message = refused(capsys, run, folder, task=[task])
        assert "no episode ended in 20 random steps" in message
        assert "--max-episode-steps" in message
        words = ["--fresh", "--max-episode-steps", 30]
        assert run(folder, *words, task=[task], steps=2) == 0
    rows = read_metrics(folder / "metrics.csv")
    assert {row["mean_length"] for row in rows} == {30.0}


def test_a_task_without_a_limit_whose_episodes_end_is_trained_on(tmp_path, capsys):
    with scripted_task() as task:
        assert run(tmp_path / "run", task=[task], steps=2) == 0
    text = capsys.readouterr().out
    assert "trained agent" in text
    assert "standing still" not in text


@pytest.mark.parametrize("act", ["rename", "delete", "replace"])
@pytest.mark.parametrize(("instance", "step"), [(TRAIN, 21), (EVALUATE, 6)])
def test_a_folder_that_goes_in_mid_run_ends_it(tmp_path, capsys, act, instance, step):
    import shutil

    folder, other = tmp_path / "run", tmp_path / "other"

    def go():
        if act == "delete":
            shutil.rmtree(folder)
        else:
            folder.rename(other)
        if act == "replace":
            folder.mkdir()

    with scripted_task({(instance, step): go}, **FAR) as task:
        message = refused(capsys, run, folder, task=[task])
        assert f"{folder} was renamed or deleted" in message
        if act == "replace":
            assert list(folder.iterdir()) == []
        else:
            assert not folder.exists()
        if act != "delete":
            Scripted.script = {}
            assert command("train", "--resume", other) == 0
            assert rows_of(other / "metrics.csv").keys() == {20, 23, 26}


def test_a_folder_that_goes_under_tensorboard_ends_it(tmp_path, capsys):
    folder, other = tmp_path / "run", tmp_path / "other"
    words = ["--logger", "tensorboard", "--log-interval", 1]
    act = {(TRAIN, 21): lambda: folder.rename(other)}
    with scripted_task(act, **FAR) as task:
        message = refused(capsys, run, folder, *words, task=[task])
    assert f"{folder} was renamed or deleted" in message
    assert not folder.exists()


def test_checkpoints_deleted_in_mid_run_are_written_again(tmp_path, whole):
    import shutil

    folder = tmp_path / "run"
    act = {(TRAIN, 22): lambda: shutil.rmtree(folder / "checkpoints")}
    with scripted_task(act, **FAR) as task:
        assert run(folder, task=[task]) == 0
    assert same_end(folder, whole)
    assert command("verify", folder) == 0


def test_verify_names_each_file(tmp_path, whole, capsys):
    import shutil

    folder = shutil.copytree(whole, tmp_path / "run")
    assert command("verify", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    files = {path for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    assert {line.rpartition(": ")[0] for line in lines[:-1]} == set(map(str, files))
    (broken,) = (folder / "checkpoints" / "best").glob("components/*/state.npz")
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    before = contents(folder)
    assert command("verify", folder) == 1
    lines = capsys.readouterr().out.splitlines()
    bad = [line for line in lines[:-1] if not line.endswith(": ok")]
    assert len(bad) == 1
    assert bad[0].startswith(f"{broken}: ")
    assert contents(folder) == before
    assert "neither a checkpoint" in refused(capsys, command, "verify", tmp_path)


MODULE = """
import gymnasium, pathlib
from tests.runs.scripted_env import Scripted
pathlib.Path("imported").touch()
gymnasium.register("Trusted-v0", Scripted, max_episode_steps=5)
"""


def test_a_module_that_a_folder_names_is_not_imported_unasked(
    tmp_path, capsys, monkeypatch
):
    import sys

    import gymnasium

    monkeypatch.chdir(tmp_path)
    (tmp_path / "trusted_tasks.py").write_text(MODULE)
    task, marker = "trusted_tasks:Trusted-v0", tmp_path / "imported"
    assert run("run", task=[task], steps=2) == 0

    def forget():
        marker.unlink()
        del sys.modules["trusted_tasks"]
        del gymnasium.registry["Trusted-v0"]

    forget()
    words = {
        "evaluate": ["run", "--episodes", 1],
        "render": ["run"],
        "diagnose": ["run", "--which", "statistics", "--output", "looked"],
        "train": ["--resume", "run", "--total-steps", 4],
    }
    for name, given in words.items():
        message = refused(capsys, command, name, *given)
        assert "--trust" in message
        assert task in message
        assert not marker.exists()
    for name in ("evaluate", "train"):
        assert command(name, *words[name], "--trust") == 0
        forget()
    given = ["--resume", "run", "--total-steps", 5]
    assert command("train", task, *given) == 0
    assert f"evaluate {tmp_path / 'run'} --trust" in capsys.readouterr().out.replace(
        " run --trust", f" {tmp_path / 'run'} --trust"
    )
    forget()
