"""Runs of seconds through the command, and what they left."""

from __future__ import annotations

import pytest
import torch

from alm_torchrl.cli import main
from alm_torchrl.runs.folder import read_metrics
from alm_torchrl.training.files import read_state
from alm_torchrl.training.rotation import numbered_checkpoints

TINY = [
    *("--warmup-steps", "20", "--batch-size", "4", "--latent-dim", "4"),
    *("--hidden-dim", "8", "--model-hidden-dim", "8", "--eval-episodes", "1"),
    *("--device", "cpu", "--threads", "1", "--logger", "none"),
    *("--checkpoint-interval", "2", "--eval-interval", "3", "--compile", "off"),
]
# Short episodes, for quick evaluations.
PENDULUM = [
    *("Pendulum-v1", "--action-bounds", "rescale", "--max-episode-steps", "20"),
]


def command(*words):
    return main([str(word) for word in words])


def run(folder, *words, task=PENDULUM, steps=6):
    return command(
        *("train", *task, *TINY, "--total-steps", steps, "--run-dir", folder), *words
    )


def refused(capsys, function, *words, **options):
    """The line with which a command refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*words, **options)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1]


def steps_saved(folder):
    return [number for number, _ in numbered_checkpoints(folder / "checkpoints")]


def rows_of(*files):
    """The rows of files by step, without their times."""
    rows = [row for file in files for row in read_metrics(file)]
    return {row["environment_step"]: row["mean_return"] for row in rows}


def parameters(folder):
    _, newest = numbered_checkpoints(folder / "checkpoints")[-1]
    (component,) = newest.glob("components/*-loss_module")
    return read_state(component / "state.npz")


def same_end(folder, other):
    """Whether two runs ended with the same networks and the same rows."""
    one, two = parameters(folder), parameters(other)
    tensors = {key for key, value in one.items() if isinstance(value, torch.Tensor)}
    return (
        one.keys() == two.keys()
        and all(torch.equal(one[key], two[key]) for key in tensors)
        and rows_of(folder / "metrics.csv") == rows_of(other / "metrics.csv")
    )


def contents(folder):
    """Each file but the lock, with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder): path.read_bytes()
        for path in files
        if path.name != ".lock"
    }
