"""The figures of the experiments: one panel for each task, one line per variant."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alm_torchrl.experiments.catalogue import Experiment
from alm_torchrl.experiments.studies import Row, over_seeds
from alm_torchrl.runs.curves import Curve, curve_of, draw_curves, panels, save
from alm_torchrl.runs.folder import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_bias", "plot_curves", "plot_rollouts"]

Groups = Mapping[str, Mapping[str, Sequence[Run]]]
"""Runs by task and label of the variant."""


def plot_curves(
    experiment: Experiment,
    note: str,
    groups: Groups,
    output: Path,
    references: Sequence[Curve] = (),
) -> Path:
    """Draws learning curves, those of Fig. 3 over wall time too.

    Args:
        experiment: what the figure is about.
        note: what it says about its scale.
        groups: runs by task and label.
        output: picture to write; its ending chooses the format.
        references: published curves to draw, dashed, into each panel. Default: ``()``.

    Returns:
        Path: ``output``.
    """
    timed = experiment.name == "fig3"
    figure, axes = _figure(experiment, note, groups, rows=2 if timed else 1)
    for column, (task, variants) in enumerate(groups.items()):
        panel = axes[column]
        curves = [curve_of(label, runs) for label, runs in variants.items()]
        draw_curves(panel, curves, references)
        panel.set_title(task)
        panel.set_ylabel("return, mean and deviation" if column == 0 else "")
        if timed:
            _draw_over_time(axes[len(groups) + column], variants)
    _legend(figure, axes[0])
    return save(figure, output)


def plot_bias(
    experiment: Experiment, note: str, rows: Sequence[Row], output: Path
) -> Path:
    """Draws mean and deviation of the normalised bias of each estimate in training.

    Args:
        experiment: what the figure is about.
        note: what it says about its scale.
        rows: of :func:`~alm_torchrl.experiments.studies.bias_rows`.
        output: picture to write.

    Returns:
        Path: ``output``.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = _figure(experiment, note, tasks, rows=2)
    lines = list(dict.fromkeys((row["variant"], row["estimate"]) for row in rows))
    for index, name in enumerate(("mean", "std")):
        for column, task in enumerate(tasks):
            panel = axes[index * len(tasks) + column]
            for variant, estimate in lines:
                chosen = [
                    row
                    for row in rows
                    if (row["task"], row["variant"], row["estimate"])
                    == (task, variant, estimate)
                ]
                # A baseline's only estimate: the smallest or the mean of its critics.
                q = "min Q" if (variant, "bound") in lines else "Q"
                label = f"{variant} {'bound' if estimate == 'bound' else q}"
                if chosen:
                    _band(panel, over_seeds(chosen, "training_step", name), label)
            panel.axhline(0, color="0.6", linewidth=0.8)
            panel.set_title(task if index == 0 else "")
            panel.set_xlabel("training steps")
            if column == 0:
                panel.set_ylabel(f"{name} of the bias / |mean return|")
    _legend(figure, axes[0])
    return save(figure, output)


def plot_rollouts(
    experiment: Experiment, note: str, rows: Sequence[Row], output: Path
) -> Path:
    """Draws the error of open-loop latent predictions against their length.

    Args:
        experiment: what the figure is about.
        note: what it says about its scale.
        rows: of :func:`~alm_torchrl.experiments.studies.rollout_rows`.
        output: picture to write.

    Returns:
        Path: ``output``.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = _figure(experiment, note, tasks)
    for panel, task in zip(axes, tasks, strict=False):
        for label in dict.fromkeys(row["variant"] for row in rows):
            chosen = [
                row for row in rows if row["task"] == task and row["variant"] == label
            ]
            if chosen:
                _band(panel, over_seeds(chosen, "steps", "error"), label)
        panel.axhline(1, color="0.6", linewidth=0.8, linestyle=":")
        panel.annotate("constant guess", (0, 1.02), fontsize=8, color="0.4")
        panel.set_title(task)
        panel.set_xlabel("predicted steps")
        panel.set_ylabel("error / deviation of the latents")
        panel.set_ylim(bottom=0)
    _legend(figure, axes[0])
    return save(figure, output)


def _figure(
    experiment: Experiment, note: str, tasks: Sequence[str] | Groups, rows: int = 1
) -> tuple[Any, list[Axes]]:
    columns = len(tasks)
    size = (max(6.4, 3.6 * columns), 1.2 + 2.9 * rows)
    figure, axes = panels(rows, columns, size=size)
    text = f"{experiment.source}: {experiment.question} ({note})"
    figure.suptitle(textwrap.fill(text, int(12 * size[0])), fontsize=10)
    for panel in axes:
        panel.grid(alpha=0.3)
    return figure, axes


def _draw_over_time(panel: Axes, variants: Mapping[str, Sequence[Run]]) -> None:
    for label, runs in variants.items():
        curve = curve_of(label, runs)
        times = [
            {row["training_step"]: row["wall_time"] for row in run.metrics}
            for run in runs
        ]
        minutes = [np.mean([t[step] for t in times]) / 60 for step in curve.steps]
        panel.plot(minutes, curve.mean, label=label)
    panel.set_xlabel("minutes of a run")
    panel.set_ylabel("mean return")


def _band(panel: Axes, values: tuple[Any, Any, Any], label: str) -> None:
    x, mean, std = values
    (line,) = panel.plot(x, mean, label=label, marker="o" if len(x) <= 12 else None)
    panel.fill_between(
        x, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0
    )


def _legend(figure: Any, panel: Axes) -> None:  # noqa: ANN401
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(4, len(labels)),
        frameon=False,
        fontsize=9,
    )
