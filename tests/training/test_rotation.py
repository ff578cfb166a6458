"""Which checkpoints stay, and what ends up in ``best``."""

from __future__ import annotations

import json
import math

import pytest

from alm_torchrl import make_trainer
from alm_torchrl.training.episode_length import EpisodeLengthError
from alm_torchrl.training.rotation import numbered_checkpoints
from tests.runs.scripted_env import scripted_task
from tests.training.trainer_runs import tiny_loss

WARMUP, TOTAL = 10, 24  # environment steps


def build(folder, task, **options):
    from alm_torchrl import make_env

    env = make_env(task)
    settings = {
        **{"total_steps": TOTAL - WARMUP, "warmup_steps": WARMUP, "batch_size": 4},
        **{"checkpoint_dir": folder, "checkpoint_interval": 4, "keep_checkpoints": 1},
    }
    return make_trainer(env, tiny_loss(env), **{**settings, **options})


def saved(folder):
    return [number for number, _ in numbered_checkpoints(folder)]


@pytest.fixture
def task():
    with scripted_task(max_episode_steps=10**6) as name:
        yield name


def test_milestones_stay_for_good(tmp_path, task):
    build(tmp_path, task, keep_every=6).train()
    assert saved(tmp_path) == [6, 12, 18, 24]
    # Those of an earlier setting stay too.
    trainer = build(tmp_path, task, total_steps=TOTAL - WARMUP + 6)
    trainer.load_from_file(numbered_checkpoints(tmp_path)[-1][1])
    trainer.train()
    assert saved(tmp_path) == [6, 12, 18, 24, 30]
    with pytest.raises(ValueError, match="keep_every: expected an integer >= 1"):
        build(tmp_path, task, keep_every=0)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_trainer_sets_aside_what_is_newer_than_its_start(tmp_path, task, fresh):
    build(tmp_path, task, keep_checkpoints=9).train()
    trainer = build(tmp_path, task)
    if not fresh:
        trainer.load_from_file(numbered_checkpoints(tmp_path)[1][1])
    start = 0 if fresh else 8
    with pytest.warns(UserWarning, match=f"saved after environment step {start} is"):
        trainer.train()
    (aside,) = tmp_path.glob("set-aside-*")
    moved = [step for step in (4, 8, 12, 16, 20, 24) if step > start]
    assert saved(aside) == moved
    assert saved(tmp_path) == [24]
    assert trainer.checkpoint_rotation.saved == numbered_checkpoints(tmp_path)[-1][1]


@pytest.mark.parametrize("bad", [[0], [2], [0, 1, 3]])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_best_is_the_best_finite_score(tmp_path, bad, value):
    from alm_torchrl import make_env

    scores = [3.0, 5.0, 9.0, 7.0, 8.0]  # at steps 0, 4, 8, 12, 14
    script = {
        (0, 5 * number): lambda number=number: (
            value if number in bad else scores[number] * 100
        )
        for number in range(len(scores))
    }
    rows = []
    with scripted_task(script, max_episode_steps=10**6) as task:
        trainer = build(
            tmp_path,
            task,
            **{"eval_env": make_env(task), "eval_interval": 4, "eval_episodes": 1},
            on_evaluation=rows.append,
        )
        # Only the messages of the evaluations count.
        with pytest.warns(UserWarning, match="in episode 1 of 1"):
            trainer.train()
    assert [row.get("nonfinite_episode") for row in rows] == [
        1 if number in bad else None for number in range(len(scores))
    ]
    steps = [row["training_step"] for row in rows]
    expected = max(set(range(len(scores))) - set(bad), key=lambda n: scores[n])
    manifest = json.loads((tmp_path / "best" / "manifest.json").read_text())
    assert manifest["metadata"]["training_step"] == steps[expected]


def test_the_library_is_told_of_episodes_that_are_too_short(tmp_path):
    with (
        scripted_task(kwargs={"length": 2}, max_episode_steps=9) as task,
        pytest.raises(EpisodeLengthError, match=r"horizon: .* most 2, .* got 3"),
    ):
        build(tmp_path, task).train()


def test_an_endless_task_is_trained_on_without_evaluations(tmp_path):
    with scripted_task(kwargs={"length": 10**9}) as task:
        build(tmp_path, task).train()
    assert saved(tmp_path) == [TOTAL]
