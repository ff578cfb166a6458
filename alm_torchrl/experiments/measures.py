"""What an experiment measures of its trained agents, beyond their returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from alm_torchrl.analysis.bias import bias_summary, bound_bias
from alm_torchrl.analysis.rollouts import latent_rollout
from alm_torchrl.envs import make_env
from alm_torchrl.experiments.tables import Group, Row
from alm_torchrl.objectives import ALMLoss
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

    Raises:
        FileNotFoundError: if no run has a usable checkpoint.
    """
    rows = []
    for run, env, entries in _runs(groups):
        for step, checkpoint in _checkpoints(run.path).items():
            found = bound_bias(
                env,
                load_loss(checkpoint),
                horizon=run.config.horizon,
                pairs=pairs,
                seed=run.config.seed,
            )
            for estimate, kinds in bias_summary(found).items():
                bias = {name: kinds["overall", name].item() for name in ("mean", "std")}
                own = {"training_step": step, "estimate": estimate, **bias}
                rows.append({**entries, **own})
    if not rows:
        raise FileNotFoundError("expected runs with a usable checkpoint, got none")
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
    for run, env, entries in _runs(groups):
        loss = cast(ALMLoss, load_loss(run.path))
        found = latent_rollout(env, loss, steps=steps, seed=run.config.seed)
        median = found["normalised_error"].quantile(0.5, 0).tolist()
        for predicted, error in enumerate(median):
            rows.append({**entries, "steps": predicted, "error": error})
    return rows


def _runs(groups: Sequence[Group]) -> Iterator[tuple[Run, Any, Row]]:
    """All runs, with their environments and the first entries of their rows."""
    for group in groups:
        for run in group.runs:
            config = run.config
            env = make_env(
                config.task,
                action_bounds=config.action_bounds,
                dynamics_noise=config.dynamics_noise,
            )
            yield (
                run,
                env,
                {"task": group.task, "variant": group.label, "seed": config.seed},
            )
            env.close()


def _checkpoints(run: Path) -> dict[int, Path]:
    """By training step, the oldest first; those of the warm-up are alike."""
    found = {}
    for path in usable_checkpoints(run / "checkpoints", ("loss_module",)):
        metadata = checkpoint_metadata(path)
        warmup = metadata["settings"]["warmup_steps"]
        found[max(0, metadata["collected_frames"] - warmup)] = path
    return dict(sorted(found.items()))
