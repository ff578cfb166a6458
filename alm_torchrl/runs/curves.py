"""Learning curves of runs as a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alm_torchrl.runs.folder import CHANGEABLE, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Curve",
    "curve_of",
    "curves_of",
    "draw_curves",
    "panels",
    "plot_runs",
    "reference_curve",
    "save",
]


_WAYS = CHANGEABLE | {"compile", "cudagraph"}
"""Settings of how a run is made and kept, not of what is trained."""


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

    Runs that differ in nothing but the seed (and in where and how they ran: steps,
    logs, checkpoints, compiled or not) share a curve, which covers the training steps
    that all of them were evaluated at.

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
        changes = repr(
            sorted(item for item in config.changes.items() if item[0] not in _WAYS)
        )
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
        curves.append(curve_of(label, members))
    return curves


def reference_curve(path: Path) -> Curve:
    """A published learning curve in the format of the authors' ``scores/*.csv``.

    One column for each seed and, if there is one, a first column ``Step`` with the
    training steps; without it, row i is training step 5,000 i.

    Args:
        path: the file.

    Returns:
        Curve: named after the file.

    Raises:
        ValueError: if it has another format.
    """
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    has_steps = header[:1] == ["Step"]
    seeds = len(header) - has_steps
    try:
        table = np.array(rows, dtype=np.float64).reshape(len(rows), len(header))
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a header, then rows of {len(header)} numbers: {error}"
        ) from error
    if not seeds or not rows:
        raise ValueError(
            f"{path}: expected a column Step, if any, and a column of returns for each "
            f"seed, got the columns {header} and {len(rows)} rows"
        )
    steps = table[:, 0] if has_steps else 5000 * np.arange(len(rows))
    returns = table[:, 1:] if has_steps else table
    label = f"published {path.stem}, " + (f"{seeds} seeds" if seeds > 1 else "a seed")
    std = returns.std(axis=1, ddof=1) if seeds > 1 else None
    return Curve(label, steps.astype(np.int64), returns.mean(axis=1), std)


def plot_runs(
    runs: Sequence[Run], output: Path, references: Sequence[Curve] = ()
) -> Path:
    """Draw return against training steps, the mean over seeds with its deviation.

    Args:
        runs: see :func:`curves_of`.
        output: the picture to write; its ending chooses the format (PNG, PDF, ...).
        references: published curves to draw too, dashed, as far as the runs reach.
            Default: ``()``.

    Returns:
        Path: ``output``.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: see :func:`curves_of`; also for an unknown ending.
    """
    curves = curves_of(runs)
    tasks = sorted({run.config.task for run in runs})
    height = 3.8 + 0.22 * (len(curves) + len(references))
    figure, (axes,) = panels(1, 1, size=(6.4, height))
    draw_curves(axes, curves, references)
    spread = any(curve.std is not None for curve in [*curves, *references])
    title = ", ".join(tasks)
    axes.set_title(
        title + (", mean and standard deviation over seeds" if spread else "")
    )
    # Below the panel: long labels would lie on the curves.
    figure.legend(loc="outside lower left", frameon=False)
    return save(figure, output)


def panels(
    rows: int, columns: int, *, size: tuple[float, float]
) -> tuple[Figure, list[Axes]]:
    """An empty figure and its panels, row by row.

    Args:
        rows: of panels.
        columns: of panels.

    Keyword Args:
        size: of the figure in inches.

    Raises:
        ImportError: if Matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need Matplotlib: pip install 'alm_torchrl[cli]'"
        ) from error
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def draw_curves(
    axes: Axes, curves: Sequence[Curve], references: Sequence[Curve] = ()
) -> None:
    """Draw curves with their deviation, and what the axes mean, into a panel.

    Args:
        axes: the panel.
        curves: the curves.
        references: published ones, dashed, as far as the others reach. Default: ``()``.
    """
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    last = max(curve.steps[-1] for curve in curves)
    grays = ("0.3", "0.5", "0.7")
    for index, curve in enumerate(references):
        shown = curve.steps <= last
        color = grays[index % len(grays)]
        std = None if curve.std is None else curve.std[shown]
        band = Curve(curve.label, curve.steps[shown], curve.mean[shown], std)
        _draw(axes, band, color=color, linestyle="--")
    for curve in curves:
        _draw(axes, curve, marker="o" if len(curve.steps) <= 12 else None)
    axes.set_xlabel("training steps")
    axes.set_ylabel("return of an episode, no action noise")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.grid(alpha=0.3)


def save(figure: Figure, output: Path) -> Path:
    """Write a figure, and its folder if need be.

    Raises:
        ValueError: for an unknown ending.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return output


def _draw(axes: Axes, curve: Curve, **style: Any) -> None:
    (line,) = axes.plot(
        curve.steps, curve.mean, label=curve.label, markersize=4, **style
    )
    if curve.std is not None:
        low, high = curve.mean - curve.std, curve.mean + curve.std
        axes.fill_between(
            curve.steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0
        )


def _distinction(run: Run, runs: Sequence[Run]) -> list[str]:
    """What tells a run's settings from those of the others, the preset in any case."""
    differing = {
        name
        for other in runs
        if other.config.preset == run.config.preset
        for name in {*other.config.changes, *run.config.changes} - _WAYS
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


def curve_of(label: str, runs: Sequence[Run]) -> Curve:
    """The curve of some runs, over the training steps that all were evaluated at.

    Args:
        label: what the legend says.
        runs: runs of one setting, with different seeds.

    Raises:
        ValueError: if they share no training step.
    """
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
