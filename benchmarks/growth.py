"""How the cost of an update and of a draw grows with their sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alm_torchrl.training.stepper import ALMOptimizationStepper
from benchmarks.problem import Problem
from benchmarks.timing import Clock, Contender, interleave

AXES = {
    "horizon": "horizon K",
    "batch_size": "batch size",
    "latent_dim": "latent size",
    "hidden_dim": "units per hidden layer",
    "rows": "transitions in the replay",
}
"""What varies, and its label: ``hidden_dim`` scales all hidden layers, ``rows`` is of
the draw alone."""

HORIZONS = (1, 2, 3, 5, 8)
FACTORS = (0.25, 0.5, 1.0, 2.0)
ROWS = (1000, 10_000, 100_000, 1_000_000)


def measure_growth(
    problem: Problem, rounds: int, clock: Clock, rows: Sequence[int] = ROWS
) -> list[dict[str, Any]]:
    """Times updates with one size changed at a time, and draws from fuller replays.

    Updates run in the stepper's default mode on one batch, without its draw.

    Returns:
        list of dict: for each point ``axis``, ``value`` and its times.
    """
    points: list[tuple[str, int]] = []
    contenders = []
    for axis in ("horizon", "batch_size", "latent_dim", "hidden_dim"):
        for value, changed in _changed(problem, axis):
            points.append((axis, value))
            contenders.append(Contender(f"{axis} {value}", _update(changed)))
    for value in rows:
        points.append(("rows", value))
        contenders.append(Contender(f"rows {value}", problem.make_draw(value)))
    return [
        {"axis": axis, "value": value, **timing}
        for (axis, value), timing in zip(
            points, interleave(contenders, rounds, clock), strict=True
        )
    ]


def _changed(problem: Problem, axis: str) -> list[tuple[int, Problem]]:
    """The values of an axis, and the problem with each of them."""
    if axis == "horizon":
        return [(k, problem.changed(horizon=k)) for k in HORIZONS]
    names = [axis, "model_hidden_dim"] if axis == "hidden_dim" else [axis]
    result = []
    for factor in FACTORS:
        sizes = {n: max(1, round(factor * getattr(problem.config, n))) for n in names}
        result.append((sizes[axis], problem.changed(**sizes)))
    return result


def _update(problem: Problem) -> Callable[[], Any]:
    stepper = ALMOptimizationStepper(problem.make_loss())
    batch = problem.make_draw(10 * problem.config.horizon)()
    return lambda: stepper.step(None, batch)


def plot_growth(points: Sequence[Mapping[str, Any]], title: str, output: Path) -> None:
    """Draws medians and quartiles over each axis, all axes logarithmic.

    Args:
        points: what :func:`measure_growth` returns.
        title: what was measured, and where.
        output: picture to write; its ending chooses the format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    figure = Figure(figsize=(15, 3.6), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(AXES))
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        shown = [point for point in points if point["axis"] == axis]
        median = [1e3 * point["median"] for point in shown]
        low = [1e3 * (point["median"] - point["q1"]) for point in shown]
        high = [1e3 * (point["q3"] - point["median"]) for point in shown]
        values = [point["value"] for point in shown]
        panel.errorbar(values, median, (low, high), marker="o", capsize=3)
        panel.set_xscale("log")
        panel.set_yscale("log")
        if axis != "rows":
            panel.set_xticks(values, [f"{value:,}" for value in values])
            panel.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.set_xlabel(label)
        panel.set_ylabel(f"milliseconds per {'draw' if axis == 'rows' else 'update'}")
        panel.grid(alpha=0.3, which="both")
    figure.suptitle(title)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
