"""Learning curves of runs as a picture."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alm_torchrl.analysis.figures import panels, save, steps_axis
from alm_torchrl.runs.folder import CHANGEABLE, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Curve",
    "curve_of",
    "curves_of",
    "draw_curves",
    "mean_curve",
    "plot_runs",
    "reference_curve",
]

# They say how a run is made and kept, not what is trained.
_NOT_TRAINED = CHANGEABLE | {"compile", "cudagraph"}


@dataclass(frozen=True)
class Curve:
    """Mean return over the seeds of one setting."""

    label: str
    """Its text in the legend."""
    steps: NDArray[np.int64 | np.float64]
    """Training steps at which a seed was evaluated, shape [N]."""
    mean: NDArray[np.float64]
    """Mean over the seeds that have a step, shape [N]."""
    std: NDArray[np.float64] | None
    """Their standard deviation (n - 1; NaN for one), shape [N]; None for one seed."""


def mean_curve(label: str, seeds: Sequence[Mapping[int, float]]) -> Curve:
    """Mean and deviation over seeds, at each step over those that have it.

    Args:
        label: its text in the legend, which also tells numbers of seeds that differ.
        seeds: of each seed the value by step.

    Examples:
        >>> curve = mean_curve("ALM", [{0: 1.0, 5: 2.0}, {0: 3.0}])
        >>> curve.label, curve.steps.tolist(), curve.mean.tolist()
        ('ALM (1 to 2 seeds at each step)', [0, 5], [2.0, 2.0])
    """
    steps = sorted(set().union(*seeds))
    table = np.array([[seed.get(step, np.nan) for step in steps] for seed in seeds])
    has = np.array([[step in seed for step in steps] for seed in seeds])
    counts, std = has.sum(axis=0), None
    if counts.min() < counts.max():
        label += f" ({counts.min()} to {counts.max()} seeds at each step)"
    if len(seeds) > 1:
        std, several = np.full(len(steps), np.nan), counts > 1
        std[several] = table[:, several].std(axis=0, ddof=1, where=has[:, several])
    return Curve(label, np.array(steps), table.mean(axis=0, where=has), std)


def curve_of(label: str, runs: Sequence[Run], column: str = "mean_return") -> Curve:
    """The curve of runs of one setting, of a column of their metrics."""
    return mean_curve(
        label,
        [{row["training_step"]: row[column] for row in run.metrics} for run in runs],
    )


def curves_of(runs: Sequence[Run]) -> list[Curve]:
    """One curve for each task, agent, preset and set of changed settings.

    Runs that differ only in the seed, or in where and how they ran (steps, logs,
    checkpoints, compiled or not), share a curve. Curves stand in the order in which
    their settings first appear.

    Raises:
        ValueError: if a run has no evaluation, or a seed appears twice in a group.
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
    figure, (axes,) = panels(1, 1, (6.4, height))
    draw_curves(axes, curves, references)
    title = ", ".join(sorted({run.config.task for run in runs}))
    if any(curve.std is not None for curve in [*curves, *references]):
        title += ", mean and standard deviation over seeds"
    axes.set_title(title)
    # Below the panel: long labels would lie on the curves.
    figure.legend(loc="outside lower left", frameon=False)
    return save(figure, output)


def draw_curves(
    axes: Axes, curves: Sequence[Curve], references: Sequence[Curve] = ()
) -> None:
    """Draws curves with their deviation into a panel, and labels its axes."""
    from matplotlib.ticker import StrMethodFormatter

    last = max(curve.steps[-1] for curve in curves)
    grays = ("0.3", "0.5", "0.7")
    for index, curve in enumerate(references):
        shown = curve.steps <= last
        std = None if curve.std is None else curve.std[shown]
        within = Curve(curve.label, curve.steps[shown], curve.mean[shown], std)
        _draw(axes, within, color=grays[index % len(grays)], linestyle="--")
    for curve in curves:
        _draw(axes, curve, marker="o" if len(curve.steps) <= 12 else None)
    steps_axis(axes, "training steps")
    axes.set_ylabel("return of an episode, no action noise")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))


def _draw(axes: Axes, curve: Curve, **style: Any) -> None:
    style |= {"label": curve.label, "markersize": 4}
    (line,) = axes.plot(curve.steps, curve.mean, **style)
    if curve.std is not None:
        low, high = curve.mean - curve.std, curve.mean + curve.std
        band: dict[str, Any] = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
        axes.fill_between(curve.steps, low, high, **band)
