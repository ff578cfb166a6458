"""A run that is stopped or killed and continued equals one that never was."""

from __future__ import annotations

import functools
import random
import shutil
import time

import gymnasium
import pytest
import torch

from alm_torchrl.cli import main
from alm_torchrl.envs import TASKS
from alm_torchrl.runs.folder import read_metrics
from tests.training.resume_runs import (
    CAPACITY,
    HALF,
    LIMIT,
    PLUS,
    TOTAL,
    WARMUP,
    final,
    finish,
    in_process,
    keep_final_state,
    kill_at,
    logged,
    make_run,
    parts_of_plus,
    train,
)
from tests.training.test_episode import Curriculum
from tests.training.trainer_runs import differing

MANY = [task.id for task in TASKS if task.id != "Pendulum-v1"]
SAVES_OFTEN = {"checkpoint_interval": 6}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run that went through, for each task."""

    @functools.cache
    def run(task):
        folder = tmp_path_factory.mktemp("uninterrupted")
        finish(train, folder, task)
        return folder

    return run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped half-way, for each task."""

    @functools.cache
    def run(task):
        folder = tmp_path_factory.mktemp("stopped")
        finish(train, folder, task, stop=HALF)
        return folder

    return run


@pytest.mark.parametrize(
    "task",
    ["Pendulum-v1", *(pytest.param(task, marks=pytest.mark.slow) for task in MANY)],
)
def test_stopped_and_continued_equals_uninterrupted(
    task, uninterrupted, stopped, tmp_path
):
    shutil.copytree(stopped(task), tmp_path, dirs_exist_ok=True)
    middle = final(tmp_path)
    at = int(middle["/counts/0"])
    assert WARMUP + LIMIT < HALF <= at < CAPACITY
    finish(train, tmp_path, task)
    whole, end = final(uninterrupted(task)), final(tmp_path)
    assert differing(end, whole) == []
    assert logged(tmp_path / "log.txt") == logged(uninterrupted(task) / "log.txt")

    # In the middle of an episode; then came an end, an evaluation and a wrap.
    row = at - 1
    assert not middle["/replay/next/done"][row]
    ids = end["/replay/collector/traj_ids"]
    assert ids[row].equal(ids[(row + 1) % CAPACITY])
    assert len(ids[row:].unique()) > 1
    assert CAPACITY < TOTAL
    steps = {step for step, name in logged(tmp_path / "log.txt") if name == "row"}
    assert [step > at for step in sorted(steps)].count(True) >= 2
    assert LIMIT < HALF


def test_a_run_with_the_parts_of_plus_continues_exactly(tmp_path):
    task, whole, stopped = "Pendulum-v1", tmp_path / "whole", tmp_path / "stopped"
    options = {"parts": parts_of_plus, **PLUS}
    finish(train, whole, task, **options)
    finish(train, stopped, task, stop=HALF, **options)
    finish(train, stopped, task, **options)
    end = final(stopped)
    assert differing(end, final(whole)) == []
    # Every step was observed, and the target encoder sees by the same statistics.
    scale = end["/loss/reward_transform.statistics"]
    assert scale[1] == TOTAL
    means = [
        v for k, v in end.items() if k.endswith(("_params.module.0.module.0.mean",))
    ]
    assert len(means) == 2
    assert means[0].abs().sum() > 0
    assert torch.equal(*means)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_compiled_run_continues_exactly(tmp_path):
    task, whole, stopped = "Pendulum-v1", tmp_path / "whole", tmp_path / "stopped"
    finish(train, whole, task, compile=True)
    finish(train, stopped, task, stop=HALF, compile=True)
    assert WARMUP + LIMIT < final(stopped)["/counts/0"] < TOTAL
    finish(train, stopped, task, compile=True)
    assert differing(final(stopped), final(whole)) == []
    assert logged(stopped / "log.txt") == logged(whole / "log.txt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "left_out",
    [
        "episode",
        "traj_pool",
        "rng",
        "trainer_module.episode_log",
        "trainer_module.optimization_stepper",
    ],
)
def test_the_comparison_notices_what_is_left_out(
    left_out, uninterrupted, stopped, tmp_path
):
    task = "Pendulum-v1"
    (newest,) = (stopped(task) / "checkpoints").glob("checkpoint-*")

    def forgetful(folder):
        trainer = make_run(folder, task)
        checkpoint = trainer.checkpoint
        collector = checkpoint.components["collector"]
        collector.fresh_episode = left_out == "episode"
        checkpoint.load(newest, components=set(checkpoint.components) - {left_out})
        if left_out == "traj_pool":
            state = collector.state_dict()
            state["traj_pool"]["traj_id"] += 1
            collector.load_state_dict(state)
        keep_final_state(trainer, folder)
        trainer.train()

    finish(forgetful, tmp_path)
    end, whole = final(tmp_path), final(uninterrupted(task))
    assert (
        end.keys() != whole.keys()
        or differing(end, whole)
        or not logged(tmp_path / "log.txt").items()
        <= logged(uninterrupted(task) / "log.txt").items()
    )


def _killed_and_continued(task, folder, size, delay):
    """Kills a run once its log has a size, continues it, and says if it was killed."""
    log = folder / "log.txt"
    process = in_process(train, folder, task, **SAVES_OFTEN)
    while process.is_alive() and not (log.exists() and log.stat().st_size >= size):
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    killed = process.exitcode == -9
    finish(train, folder, task, **SAVES_OFTEN)
    return killed


@pytest.mark.parametrize(
    ("task", "count"),
    [
        ("Pendulum-v1", 1),
        pytest.param("HalfCheetah-v5", 3, marks=pytest.mark.slow),
        pytest.param(
            "Pendulum-v1", 30, marks=[pytest.mark.slow, pytest.mark.timeout(900)]
        ),
    ],
)
def test_killed_at_random_moments(task, count, uninterrupted, tmp_path):
    moments = random.Random(count)
    killed = 0
    whole = uninterrupted(task)
    size = (whole / "log.txt").stat().st_size
    for number in range(count):
        folder = tmp_path / str(number)
        # Anywhere in the run, and anywhere in a step or a save.
        moment = size * 0.95 * moments.random(), 0.03 * moments.random()
        killed += _killed_and_continued(task, folder, *moment)
        assert differing(final(folder), final(whole)) == []
        assert logged(folder / "log.txt") == logged(whole / "log.txt")
        left = {
            path.name.partition("-")[0] for path in (folder / "checkpoints").iterdir()
        }
        # Of a best that is newer than the newest checkpoint.
        assert left - {"set"} == {"checkpoint", "best"}
    assert killed >= max(1, count * 2 // 3)


@pytest.mark.parametrize(
    "call", [18, *(pytest.param(call, marks=pytest.mark.slow) for call in (2, 31, 44))]
)
def test_killed_in_a_save(call, uninterrupted, tmp_path):
    process = in_process(
        kill_at, call, train, tmp_path, "Pendulum-v1", checkpoint_interval=20
    )
    process.join()
    assert process.exitcode == -9
    finish(train, tmp_path, "Pendulum-v1", checkpoint_interval=20)
    assert differing(final(tmp_path), final(uninterrupted("Pendulum-v1"))) == []


def test_the_command_asks_for_a_fresh_episode(tmp_path, capsys, monkeypatch):
    name = "Curriculum-v0"
    gymnasium.register(name, entry_point=Curriculum, max_episode_steps=7)
    words = [
        *("train", name, "--run-dir", str(tmp_path), "--device", "cpu"),
        *("--warmup-steps", "30", "--batch-size", "4", "--latent-dim", "4"),
        *("--hidden-dim", "8", "--model-hidden-dim", "8", "--eval-episodes", "1"),
        *("--eval-interval", "50", "--threads", "1", "--logger", "none"),
    ]
    # Learning curves take a second each.
    monkeypatch.setattr("alm_torchrl.runs.train.plot_runs", lambda *_: None)
    try:
        assert main([*words, "--total-steps", "2"]) == 0
        with pytest.raises(SystemExit) as stop:
            main([*words, "--total-steps", "4"])
        assert stop.value.code == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert "--fresh-episode" in message
        assert "checkpoint_state" in message
        with pytest.warns(UserWarning, match="fresh episode, as asked for"):
            assert main([*words, "--total-steps", "4", "--fresh-episode"]) == 0
    finally:
        del gymnasium.registry[name]
    assert read_metrics(tmp_path / "metrics.csv")[-1]["training_step"] == 4
