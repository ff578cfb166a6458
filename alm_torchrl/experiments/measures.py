"""What an experiment measures of its trained agents, beyond their returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

from torchrl.envs import EnvBase

from alm_torchrl.analysis.rollouts import latent_rollout
from alm_torchrl.experiments.tables import Group, Row
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.runs.agents import build_env
from alm_torchrl.runs.diagnose import bias_history
from alm_torchrl.runs.folder import Run
from alm_torchrl.runs.loading import load_loss, use_moments

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
        measured: dict[str, Any] = {"pairs": pairs, "seed": run.config.seed}
        measured["horizon"] = run.config.horizon
        for step, summary in bias_history(run.path, env, **measured):
            for estimate, kinds in summary.items():
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


def _runs(groups: Sequence[Group]) -> Iterator[tuple[Run, EnvBase, Row]]:
    """All runs, with their environments and the first entries of their rows."""
    for group in groups:
        for run in group.runs:
            # TorchRL closes it once it is collected: an error there costs no rows.
            env = build_env(run.config.to_dict())
            use_moments(env, run.path)
            seed = run.config.seed
            entries = {"task": group.task, "variant": group.label, "seed": seed}
            yield run, env, entries
