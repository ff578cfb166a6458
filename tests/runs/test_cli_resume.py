"""``alm-torchrl train`` on a folder that already holds a run."""

from __future__ import annotations

import json
import shutil
from unittest import mock

import gymnasium
import pytest
import torch

from alm_torchrl.cli import main
from alm_torchrl.runs.folder import read_metrics
from alm_torchrl.training.alm_trainer import ALMTrainer
from alm_torchrl.training.files import read_state
from tests.walk_env import Walk

# Episodes of five steps; a run of six training steps stops within its third.
TASK = "Walk-v0"
TINY = [
    *("--warmup-steps", "8", "--batch-size", "4", "--latent-dim", "4"),
    *("--hidden-dim", "8", "--model-hidden-dim", "8", "--eval-episodes", "1"),
    *("--device", "cpu", "--threads", "1", "--logger", "none"),
    *("--eval-interval", "3", "--checkpoint-interval", "4"),
]


def run(folder, *arguments, steps=6):
    words = ["train", TASK, *TINY, "--total-steps", steps, "--run-dir", folder]
    return main([str(word) for word in (*words, *arguments)])


def fails(capsys, *arguments, command=main):
    with pytest.raises(SystemExit) as stop:
        command([str(word) for word in arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def fails_to_run(capsys, folder, *arguments, steps=6):
    return fails(
        capsys, *arguments, command=lambda words: run(folder, *words, steps=steps)
    )


def newest(folder):
    return max((folder / "checkpoints").glob("checkpoint-*"))


def parameters(folder):
    (component,) = newest(folder).glob("components/*-loss_module")
    return read_state(component / "state.npz")


def same(one, other):
    assert one.keys() == other.keys()
    tensors = {k for k, v in one.items() if isinstance(v, torch.Tensor)}
    return all(torch.equal(one[key], other[key]) for key in tensors)


def without_time(folder):
    rows = read_metrics(folder / "metrics.csv")
    return [{k: v for k, v in row.items() if k != "wall_time"} for row in rows]


@pytest.fixture(scope="module", autouse=True)
def _task():
    """Registers the task; draws no learning curves, which other tests look at."""
    gymnasium.register(TASK, entry_point=Walk, max_episode_steps=5)
    with mock.patch("alm_torchrl.runs.train.plot_runs"):
        yield
    del gymnasium.registry[TASK]


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """A run of six training steps."""
    folder = tmp_path_factory.mktemp("runs") / "six"
    assert run(folder) == 0
    return folder


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """A run of twelve training steps that went through."""
    folder = tmp_path_factory.mktemp("runs") / "twelve"
    assert run(folder, steps=12) == 0
    return folder


@pytest.fixture
def copy(six, tmp_path):
    return shutil.copytree(six, tmp_path / "copy")


def test_a_longer_run_equals_one_that_went_through(copy, twelve, capsys):
    assert main(["train", "--resume", str(copy), "--total-steps", "12"]) == 0
    assert "Continues from" in capsys.readouterr().out
    assert same(parameters(copy), parameters(twelve))
    assert without_time(copy) == without_time(twelve)
    times = [row["wall_time"] for row in read_metrics(copy / "metrics.csv")]
    assert times == sorted(times)
    record = json.loads((copy / "config.json").read_text())
    (entry,) = record["continued"]
    assert entry["environment_step"] == 14
    assert entry["changes"]["total_steps"] == [6, 12]
    assert record["settings"]["total_steps"] == 12


@pytest.mark.parametrize("source", ["run", "first checkpoint"])
def test_a_run_continues_elsewhere_and_stays_as_it_is(source, six, twelve, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in six.rglob("*")}
    first = min((six / "checkpoints").glob("checkpoint-*"))
    start = six if source == "run" else first
    arguments = ["--resume", start, "--run-dir", tmp_path / "new", "--total-steps", 12]
    assert main(["train", *map(str, arguments)]) == 0
    assert same(parameters(tmp_path / "new"), parameters(twelve))
    assert without_time(tmp_path / "new") == without_time(twelve)
    assert {path: path.stat().st_mtime_ns for path in six.rglob("*")} == before


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(
    copy, twelve, recwarn
):
    (file,) = newest(copy).glob("components/*-loss_module/state.npz")
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-100])
    assert run(copy, steps=12) == 0
    messages = [str(warning.message) for warning in recwarn]
    assert any(str(file) in m and "is damaged" in m for m in messages)
    assert same(parameters(copy), parameters(twelve))
    assert without_time(copy) == without_time(twelve)


def test_without_a_usable_checkpoint_nothing_is_lost(copy, capsys):
    for path in (copy / "checkpoints").glob("checkpoint-*"):
        (path / "manifest.json").write_text("{")
    with pytest.warns(UserWarning, match="no readable|Invalid"):
        message = fails_to_run(capsys, copy, steps=12)
    assert "no checkpoint in" in message
    assert "--fresh" in message
    assert read_metrics(copy / "metrics.csv")


def test_fresh_moves_the_run_aside(copy, six, capsys):
    assert run(copy, "--fresh", "--seed", 1) == 0
    assert not same(parameters(copy), parameters(six))
    (aside,) = copy.parent.glob("copy-replaced-*")
    assert str(aside) in capsys.readouterr().out
    assert same(parameters(aside), parameters(six))
    assert without_time(aside) == without_time(six)


def test_other_settings_are_refused_with_the_differences(copy, capsys):
    new = copy.parent / "new"
    fails(capsys, "train", "--resume", copy, "--run-dir", new, "--lr", 0.5)
    assert not new.exists()
    message = fails_to_run(capsys, copy, "--lr", 0.5, "--gamma", 0.9)
    assert "lr: 0.001 in the run, 0.5 now" in message
    assert "gamma: 0.99 in the run, 0.9 now" in message
    assert "tau" not in message
    message = fails(capsys, "train", "Pendulum-v1", "--resume", copy)
    assert "task: 'Walk-v0' in the run, 'Pendulum-v1' now" in message


def test_folders_that_cannot_be_continued(copy, six, tmp_path, capsys):
    message = fails(capsys, "train", "--resume", six, "--run-dir", copy)
    assert f"{copy} already holds a run" in message
    (copy / "config.json").write_text("{")
    message = fails(capsys, "train", "--resume", copy)
    assert "is not the config.json of a run" in message
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.csv").write_text("mine")
    assert "no config.json" in fails_to_run(capsys, tmp_path / "other")
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in fails_to_run(capsys, tmp_path / "file")
    assert (tmp_path / "other" / "metrics.csv").read_text() == "mine"


def test_a_full_disk_says_how_to_continue(copy, twelve, capsys, monkeypatch):
    import errno

    from alm_torchrl.training import checkpoint

    flush = checkpoint.flush_to_disk

    def full(path):
        if "stage" in str(path) and path.name == "state.npz":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "flush_to_disk", full)
        message = fails_to_run(capsys, copy, steps=12)
    assert "No space left on device" in message
    assert f"alm-torchrl train --resume {copy}" in message
    left = {path.name.partition("-")[0] for path in (copy / "checkpoints").iterdir()}
    assert left == {"checkpoint", "best"}
    assert run(copy, steps=12) == 0
    assert same(parameters(copy), parameters(twelve))


def test_a_run_interrupted_before_its_first_checkpoint_starts_again(
    capsys, tmp_path, monkeypatch
):
    def interrupted(trainer):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ALMTrainer, "train", interrupted)
        assert run(tmp_path) == 130
    text = capsys.readouterr().out
    assert "There is no checkpoint yet.\nStart again with the same command\n" in text
    assert "--resume" not in text
    assert run(tmp_path) == 0
    assert read_metrics(tmp_path / "metrics.csv")[-1]["training_step"] == 6


def test_no_film_is_suggested_of_a_task_that_draws_no_pictures(six, tmp_path, capsys):
    message = fails(capsys, "render", six, "--output", tmp_path / "a.gif")
    assert f"{TASK} cannot be filmed" in message
    assert main(["train", "--resume", str(six)]) == 0
    text = capsys.readouterr().out
    assert f"alm-torchrl evaluate {six}" in text
    assert "render" not in text
