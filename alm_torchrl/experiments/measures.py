"""What an experiment measures of its trained agents, beyond their returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alm_torchrl.analysis.bias import ESTIMATES, bias_summary, bound_bias
from alm_torchrl.analysis.rollouts import latent_rollout
from alm_torchrl.envs import make_env
from alm_torchrl.experiments.tables import Group, Row
from alm_torchrl.runs.folder import Run
from alm_torchrl.runs.loading import checkpoint_metadata, load_loss, usable_checkpoints

__all__ = ["bias_rows", "rollout_rows"]


def bias_rows(groups: Sequence[Group], *, pairs: int) -> list[Row]:
    """Normalised bias of the bound and of Q at each checkpoint that the runs kept.

    Args:
        groups: the runs.

    Keyword Args:
        pairs: state-action pairs on which it is measured.

    Returns:
        list: rows with ``task``, ``variant``, ``seed``, ``training_step``,
        ``estimate`` (``bound``, absent for baselines, or ``qvalue``), and ``mean`` and
        ``std`` of the bias over the absolute mean return.
    """
    rows = []
    for group, run, env in _runs(groups):
        for step, checkpoint in _checkpoints(run.path).items():
            found = bound_bias(
                env,
                load_loss(checkpoint, baselines=True),
                horizon=run.config.horizon,
                pairs=pairs,
                seed=run.config.seed,
            )
            summary = bias_summary(found)
            rows += [
                {
                    "task": group.task,
                    "variant": group.label,
                    "seed": run.config.seed,
                    "training_step": step,
                    "estimate": estimate,
                    "mean": summary[estimate, "overall", "mean"].item(),
                    "std": summary[estimate, "overall", "std"].item(),
                }
                for estimate in ESTIMATES
                if estimate in summary
            ]
    return rows


def rollout_rows(groups: Sequence[Group], *, steps: int) -> list[Row]:
    """Error of open-loop latent predictions of the last checkpoints, by their length.

    Args:
        groups: the runs, of ALM only.

    Keyword Args:
        steps: length of the longest prediction.

    Returns:
        list: rows with ``task``, ``variant``, ``seed``, ``steps`` and ``error``, the
        median over the starts, in standard deviations of the latents.
    """
    rows = []
    for group, run, env in _runs(groups):
        seed = run.config.seed
        found = latent_rollout(env, load_loss(run.path), steps=steps, seed=seed)
        median = found["normalised_error"].quantile(0.5, 0).tolist()
        rows += [
            {
                "task": group.task,
                "variant": group.label,
                "seed": seed,
                "steps": predicted,
                "error": error,
            }
            for predicted, error in enumerate(median)
        ]
    return rows


def _runs(groups: Sequence[Group]) -> Iterator[tuple[Group, Run, Any]]:
    """All runs with their groups and environments."""
    for group in groups:
        for run in group.runs:
            env = make_env(
                run.config.task,
                action_bounds=run.config.action_bounds,
                dynamics_noise=run.config.dynamics_noise,
            )
            yield group, run, env
            env.close()


def _checkpoints(run: Path) -> dict[int, Path]:
    """By training step, the oldest first; those of the warm-up are alike."""
    found = {}
    for path in usable_checkpoints(run / "checkpoints", ("loss_module",)):
        metadata = checkpoint_metadata(path)
        warmup = metadata["settings"]["warmup_steps"]
        found[max(0, metadata["collected_frames"] - warmup)] = path
    return dict(sorted(found.items()))
