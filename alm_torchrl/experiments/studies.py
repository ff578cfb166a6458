"""What an experiment measures of its trained agents, beyond their returns."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from alm_torchrl.analysis.bias import ESTIMATES, bias_summary, bound_bias
from alm_torchrl.analysis.rollouts import latent_rollout
from alm_torchrl.envs import make_env
from alm_torchrl.experiments.catalogue import SCALES, ScaleName
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.runs.folder import Run
from alm_torchrl.runs.loading import (
    checkpoint_metadata,
    load_loss,
    usable_checkpoints,
)

__all__ = [
    "BIAS_FIELDS",
    "ROLLOUT_FIELDS",
    "bias_rows",
    "over_seeds",
    "rollout_rows",
    "write_rows",
]

BIAS_FIELDS = ("task", "variant", "seed", "training_step", "estimate", "mean", "std")
"""Columns of :func:`bias_rows`: bias over |mean return|, of ``bound`` or ``qvalue``.

Baselines have no ``bound``."""

ROLLOUT_FIELDS = ("task", "variant", "seed", "steps", "error")
"""Columns of :func:`rollout_rows`: median error over the latents' deviation."""

Row = dict[str, Any]
Group = tuple[str, str, Sequence[Run]]


def bias_rows(groups: Iterable[Group], scale: ScaleName) -> list[Row]:
    """Normalised bias of the bound and of Q at each checkpoint that the runs kept.

    Args:
        groups: label, task and runs of each variant.
        scale: says how many pairs to measure it on.

    Returns:
        list: rows with the columns :data:`BIAS_FIELDS`.
    """
    rows = []
    for label, task, runs in groups:
        for run in runs:
            settings = run.config.to_dict()
            env = _env(settings)
            for checkpoint in _checkpoints(run.path):
                pairs = bound_bias(
                    env,
                    load_loss(checkpoint),
                    horizon=settings["horizon"],
                    pairs=SCALES[scale].pairs,
                    seed=run.config.seed,
                )
                summary = bias_summary(pairs)
                rows += [
                    dict(
                        task=task,
                        variant=label,
                        seed=run.config.seed,
                        training_step=_training_step(checkpoint),
                        estimate=estimate,
                        mean=summary[estimate, "overall", "mean"].item(),
                        std=summary[estimate, "overall", "std"].item(),
                    )
                    for estimate in ESTIMATES
                    if estimate in summary
                ]
            env.close()
    return rows


def rollout_rows(groups: Iterable[Group], scale: ScaleName) -> list[Row]:
    """Error of open-loop latent predictions of the last checkpoints, by their length.

    Args:
        groups: label, task and runs of each variant.
        scale: says how far to predict.

    Returns:
        list: rows with the columns :data:`ROLLOUT_FIELDS`.
    """
    rows = []
    for label, task, runs in groups:
        for run in runs:
            env = _env(run.config.to_dict())
            # Only ALM's agents have a latent model: the baselines have no such study.
            loss = cast(ALMLoss, load_loss(run.path))
            found = latent_rollout(
                env, loss, steps=SCALES[scale].rollout, seed=run.config.seed
            )
            env.close()
            median = found["normalised_error"].quantile(0.5, 0).tolist()
            rows += [
                dict(
                    task=task,
                    variant=label,
                    seed=run.config.seed,
                    steps=steps,
                    error=error,
                )
                for steps, error in enumerate(median)
            ]
    return rows


def write_rows(rows: Sequence[Row], fields: Sequence[str], path: Path) -> Path:
    """Writes rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def over_seeds(
    rows: Iterable[Row], x: str, y: str
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean and sample deviation of ``y`` over the seeds, at each ``x`` of all of them.

    Returns:
        tuple: ``x``, mean and deviation (0 for one seed), ``[N]`` each.
    """
    columns: dict[float, list[float]] = {}
    for row in rows:
        columns.setdefault(row[x], []).append(row[y])
    seeds = max(map(len, columns.values()))
    kept = {key: values for key, values in columns.items() if len(values) == seeds}
    table = np.array([kept[key] for key in sorted(kept)])
    std = table.std(axis=1, ddof=1) if seeds > 1 else np.zeros(len(table))
    return np.array(sorted(kept), dtype=np.float64), table.mean(axis=1), std


def _env(settings: dict[str, Any]) -> Any:  # noqa: ANN401
    names = ("action_bounds", "dynamics_noise")
    return make_env(settings["task"], **{name: settings[name] for name in names})


def _checkpoints(path: Path) -> list[Path]:
    """One for each training step; those of the warm-up are alike."""
    kept = usable_checkpoints(path / "checkpoints", ("loss_module",))
    by_step = {_training_step(checkpoint): checkpoint for checkpoint in kept}
    return [by_step[step] for step in sorted(by_step)]


def _training_step(checkpoint: Path) -> int:
    metadata = checkpoint_metadata(checkpoint)
    warmup: int = metadata["settings"]["warmup_steps"]
    return int(max(0, metadata["collected_frames"] - warmup))
