"""Learning curves of runs as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alm_torchrl.runs import Run

__all__ = ["Curve", "curves_of", "plot_runs"]


@dataclass(frozen=True)
class Curve:
    """Mean return over the seeds of one setting."""

    label: str
    """What the legend says."""
    steps: NDArray[np.int64]
    """Training steps at which every seed was evaluated, shape [N]."""
    mean: NDArray[np.float64]
    """Mean over seeds of the mean return, shape [N]."""
    std: NDArray[np.float64] | None
    """Standard deviation over seeds (n - 1), shape [N]; None for one seed."""


def curves_of(runs: Sequence[Run]) -> list[Curve]:
    """One curve for each task, agent, preset and set of changed settings.

    Runs that differ in nothing but the seed (and in where they ran) share a curve,
    which covers the training steps that all of them were evaluated at.

    Args:
        runs: runs with at least one evaluation each, in any order.

    Returns:
        list[Curve]: in the order in which the settings first appear.

    Raises:
        ValueError: if a run has no evaluation, if a seed appears twice in a
            group, or if the runs of a group share no training step.
    """
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if not run.metrics:
            raise ValueError(f"{run.path} has no evaluation yet")
        config = run.config
        changes = repr(sorted(config.changes.items()))
        key = (config.task, config.agent, config.preset, changes)
        groups.setdefault(key, []).append(run)
    curves = []
    for members in groups.values():
        seeds = sorted(run.config.seed for run in members)
        label = ", ".join(
            [
                *_distinction(members[0], runs),
                f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds",
            ]
        )
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"runs: a seed of '{label}' appears twice: {seeds}")
        curves.append(_curve(label, members))
    return curves


def plot_runs(runs: Sequence[Run], output: Path) -> Path:
    """Draw return against training steps, the mean over seeds with its deviation.

    Args:
        runs: see :func:`curves_of`.
        output: the picture to write; its ending chooses the format (PNG, PDF, ...).

    Returns:
        Path: ``output``.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: see :func:`curves_of`; also for an unknown ending.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter
    except ImportError as error:
        raise ImportError(
            "plots need Matplotlib: pip install 'alm_torchrl[cli]'"
        ) from error
    curves = curves_of(runs)
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in curves:
        marker = "o" if len(curve.steps) <= 12 else None
        (line,) = axes.plot(
            curve.steps, curve.mean, label=curve.label, marker=marker, markersize=4
        )
        if curve.std is not None:
            low, high = curve.mean - curve.std, curve.mean + curve.std
            axes.fill_between(
                curve.steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0
            )
    tasks = sorted({run.config.task for run in runs})
    spread = ", mean and standard deviation over seeds"
    title = ", ".join(tasks)
    axes.set_title(title + (spread if any(c.std is not None for c in curves) else ""))
    axes.set_xlabel("training steps")
    axes.set_ylabel("return of an episode, no action noise")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return output


def _distinction(run: Run, runs: Sequence[Run]) -> list[str]:
    """What tells a run's settings from those of the others, the preset in any case."""
    differing = {
        name
        for other in runs
        if other.config.preset == run.config.preset
        for name in {*other.config.changes, *run.config.changes}
        if getattr(other.config, name) != getattr(run.config, name)
    }
    named = [
        value
        for value, all_values in (
            (run.config.task, {other.config.task for other in runs}),
            (run.config.agent, {other.config.agent for other in runs} | {"alm"}),
        )
        if len(all_values) > 1
    ]
    changed = [f"{name}={getattr(run.config, name)}" for name in sorted(differing)]
    return [*named, run.config.preset, *changed]


def _curve(label: str, runs: Sequence[Run]) -> Curve:
    returns = [
        {row["training_step"]: row["mean_return"] for row in run.metrics}
        for run in runs
    ]
    steps = sorted(set.intersection(*(set(values) for values in returns)))
    if not steps:
        raise ValueError(f"runs: those of '{label}' share no training step")
    table = np.array([[values[step] for step in steps] for values in returns])
    std = table.std(axis=0, ddof=1) if len(runs) > 1 else None
    return Curve(label, np.array(steps), table.mean(axis=0), std)
