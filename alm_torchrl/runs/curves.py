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

# They say how a run is made and kept, not what is trained.
_NOT_TRAINED = CHANGEABLE | {"compile", "cudagraph"}


@dataclass(frozen=True)
class Curve:
    """Mean return over the seeds of one setting."""

    label: str
    """Its text in the legend."""
    steps: NDArray[np.int64]
    """Training steps at which every seed was evaluated, shape [N]."""
    mean: NDArray[np.float64]
    """Mean over seeds of the mean return, shape [N]."""
    std: NDArray[np.float64] | None
    """Standard deviation over seeds (n - 1), shape [N]; None for one seed."""


def curve_of(label: str, runs: Sequence[Run]) -> Curve:
    """The curve of runs of one setting, over the steps that all were evaluated at.

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


def curves_of(runs: Sequence[Run]) -> list[Curve]:
    """One curve for each task, agent, preset and set of changed settings.

    Runs that differ only in the seed, or in where and how they ran (steps, logs,
    checkpoints, compiled or not), share a curve. Curves stand in the order in which
    their settings first appear.

    Raises:
        ValueError: if a run has no evaluation, a seed appears twice in a group, or
            the runs of a group share no training step.
    """
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if not run.metrics:
            raise ValueError(f"{run.path} has no evaluation yet")
        config = run.config
        changes = [(k, v) for k, v in config.changes.items() if k not in _NOT_TRAINED]
        key = (config.task, config.agent, config.preset, repr(sorted(changes)))
        groups.setdefault(key, []).append(run)
    curves = []
    for members in groups.values():
        seeds = sorted(run.config.seed for run in members)
        last = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"
        label = ", ".join([*_distinction(members[0], runs), last])
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"runs: a seed of '{label}' appears twice: {seeds}")
        curves.append(curve_of(label, members))
    return curves


def _distinction(run: Run, runs: Sequence[Run]) -> list[str]:
    """The preset, and the settings in which a run differs from the others."""
    config, others = run.config, [other.config for other in runs]
    named: list[str] = [config.preset]
    if len({other.agent for other in others} | {"alm"}) > 1:
        named.insert(0, config.agent)
    if len({other.task for other in others}) > 1:
        named.insert(0, config.task)
    differing = {
        name
        for other in others
        if other.preset == config.preset
        for name in {*other.changes, *config.changes} - _NOT_TRAINED
        if getattr(other, name) != getattr(config, name)
    }
    return [*named, *(f"{name}={getattr(config, name)}" for name in sorted(differing))]


def reference_curve(path: Path) -> Curve:
    """A published learning curve in the format of the authors' ``scores/*.csv``.

    One column for each seed and, if there is one, a first column ``Step`` with the
    training steps; without it, row i is training step 5,000 i.

    Raises:
        ValueError: if it has another format.
    """
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    has_steps = header[:1] == ["Step"]
    seeds = len(header) - has_steps
    if not seeds or not rows:
        raise ValueError(
            f"{path}: expected a column Step, if any, and a column of returns for each "
            f"seed, got the columns {header} and {len(rows)} rows"
        )
    try:
        table = np.array(rows, dtype=np.float64).reshape(len(rows), len(header))
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a header, then rows of {len(header)} numbers: {error}"
        ) from error
    steps = table[:, 0] if has_steps else 5000 * np.arange(len(rows))
    returns = table[:, has_steps:]
    label = f"published {path.stem}, " + (f"{seeds} seeds" if seeds > 1 else "a seed")
    std = returns.std(axis=1, ddof=1) if seeds > 1 else None
    return Curve(label, steps.astype(np.int64), returns.mean(axis=1), std)


def plot_runs(
    runs: Sequence[Run], output: Path, references: Sequence[Curve] = ()
) -> Path:
    """Draws return against training steps, the mean over seeds with its deviation.

    The ending of ``output`` chooses the format. Published curves are dashed, and shown
    as far as the runs reach.

    Raises:
        ImportError: if Matplotlib is missing.
        ValueError: see :func:`curves_of`; also for an unknown ending.
    """
    curves = curves_of(runs)
    height = 3.8 + 0.22 * (len(curves) + len(references))
    figure, (axes,) = panels(1, 1, size=(6.4, height))
    draw_curves(axes, curves, references)
    title = ", ".join(sorted({run.config.task for run in runs}))
    if any(curve.std is not None for curve in [*curves, *references]):
        title += ", mean and standard deviation over seeds"
    axes.set_title(title)
    # Below the panel: long labels would lie on the curves.
    figure.legend(loc="outside lower left", frameon=False)
    return save(figure, output)


def panels(
    rows: int, columns: int, *, size: tuple[float, float]
) -> tuple[Figure, list[Axes]]:
    """An empty figure, its size in inches, and its panels, row by row.

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
    """Draws curves with their deviation into a panel, and labels its axes."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    last = max(curve.steps[-1] for curve in curves)
    grays = ("0.3", "0.5", "0.7")
    for index, curve in enumerate(references):
        shown = curve.steps <= last
        std = None if curve.std is None else curve.std[shown]
        within = Curve(curve.label, curve.steps[shown], curve.mean[shown], std)
        _draw(axes, within, color=grays[index % len(grays)], linestyle="--")
    for curve in curves:
        _draw(axes, curve, marker="o" if len(curve.steps) <= 12 else None)
    axes.set_xlabel("training steps")
    axes.set_ylabel("return of an episode, no action noise")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.grid(alpha=0.3)


def _draw(axes: Axes, curve: Curve, **style: Any) -> None:
    (line,) = axes.plot(
        curve.steps, curve.mean, label=curve.label, markersize=4, **style
    )
    if curve.std is not None:
        low, high = curve.mean - curve.std, curve.mean + curve.std
        axes.fill_between(
            curve.steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0
        )


def save(figure: Figure, output: Path) -> Path:
    """Writes a figure, and makes its folder if it is missing."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return output
