"""The figures of the experiments: one panel for each task, one line per variant.

Each function takes the title and what to draw, and writes the picture ``output``, whose
ending chooses the format. It returns ``output``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alm_torchrl.analysis.figures import panels, save
from alm_torchrl.experiments.tables import Group, Row, over_seeds
from alm_torchrl.runs.curves import Curve, curve_of, draw_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_bias", "plot_curves", "plot_rollouts"]


def plot_curves(
    title: str,
    groups: Sequence[Group],
    output: Path,
    references: Sequence[Curve] = (),
    timed: bool = False,
) -> Path:
    """Draws learning curves, over wall time too where they are ``timed``.

    Published curves (``references``) are dashed and stand in each panel.
    """
    tasks = list(dict.fromkeys(group.task for group in groups))
    figure, axes = _figure(title, len(tasks), rows=1 + timed)
    for column, task in enumerate(tasks):
        shown = [group for group in groups if group.task == task]
        curves = [curve_of(group.label, group.runs) for group in shown]
        draw_curves(axes[column], curves, references)
        axes[column].set_title(task)
        axes[column].set_ylabel("return, mean and deviation" if column == 0 else "")
        if timed:
            _draw_over_time(axes[len(tasks) + column], shown, curves)
    return _finish(figure, axes[0], output)


def plot_bias(title: str, rows: Sequence[Row], output: Path) -> Path:
    """Draws mean and deviation of the bias in training, the ``rows`` of bias_rows."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = _figure(title, len(tasks), rows=2)
    bounded = {row["variant"] for row in rows if row["estimate"] == "bound"}
    labelled = [row | {"line": _line(row, bounded)} for row in rows]
    for index, panel in enumerate(axes):
        statistic, column = ("mean", "std")[index // len(tasks)], index % len(tasks)
        _draw_rows(panel, labelled, tasks[column], "line", "training_step", statistic)
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.set_title(tasks[column] if statistic == "mean" else "")
        label = f"{statistic} of the bias / |mean return|"
        panel.set_ylabel("" if column else label)
    return _finish(figure, axes[0], output)


def plot_rollouts(title: str, rows: Sequence[Row], output: Path) -> Path:
    """Draws the error of latent predictions by length, the ``rows`` of rollout_rows."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = _figure(title, len(tasks))
    for panel, task in zip(axes, tasks, strict=True):
        _draw_rows(panel, rows, task, "variant", "steps", "error")
        panel.axhline(1, color="0.6", linewidth=0.8, linestyle=":")
        panel.annotate("constant guess", (0, 1.02), fontsize=8, color="0.4")
        panel.set_title(task)
        panel.set_xlabel("predicted steps")
        panel.set_ylabel("error / deviation of the latents")
        panel.set_ylim(bottom=0)
    return _finish(figure, axes[0], output)


def _draw_rows(
    panel: Axes, rows: Sequence[Row], task: str, line: str, x: str, y: str
) -> None:
    """One curve over seeds for each value of the entry ``line``."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row["task"] == task:
            lines.setdefault(row[line], []).append(row)
    draw_curves(panel, [over_seeds(label, r, x, y) for label, r in lines.items()])


def _line(row: Row, bounded: Collection[str]) -> str:
    """A label; a baseline's value is the smallest or the mean of its critics."""
    if row["estimate"] == "bound":
        return f"{row['variant']} bound"
    return f"{row['variant']} {'min Q' if row['variant'] in bounded else 'Q'}"


def _figure(title: str, columns: int, rows: int = 1) -> tuple[Any, list[Axes]]:
    size = (max(6.4, 3.6 * columns), 1.2 + 2.9 * rows)
    figure, axes = panels(rows, columns, size)
    figure.suptitle(textwrap.fill(title, int(12 * size[0])), fontsize=10)
    return figure, axes


def _draw_over_time(
    panel: Axes, groups: Sequence[Group], curves: Sequence[Curve]
) -> None:
    """The curves of the groups over the mean wall time of their runs."""
    timed = []
    for group, curve in zip(groups, curves, strict=True):
        seconds = curve_of(group.label, group.runs, "wall_time").mean
        timed.append(replace(curve, steps=seconds / 60, std=None))
    draw_curves(panel, timed)
    panel.set_xlabel("minutes of a run")
    panel.set_ylabel("mean return")


def _finish(figure: Any, panel: Axes, output: Path) -> Path:  # noqa: ANN401
    """Adds the legend of a panel, and writes the figure."""
    handles, labels = panel.get_legend_handles_labels()
    style: dict[str, Any] = {"ncols": min(4, len(labels)), "frameon": False}
    figure.legend(handles, labels, loc="outside lower center", fontsize=9, **style)
    return save(figure, output)
