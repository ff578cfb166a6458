"""The growth of the cost as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.growth import AXES

__all__ = ["plot_growth"]

LABELS = {
    "horizon": "horizon K",
    "batch_size": "batch size",
    "latent_dim": "latent size",
    "width": "units per hidden layer",
    "buffer_size": "transitions in the replay",
}


def plot_growth(points: Sequence[Mapping[str, Any]], title: str, output: Path) -> Path:
    """Draws medians and quartiles over each axis, all axes logarithmic.

    Args:
        points: what ``measure_growth`` returns.
        title: what was measured, and where.
        output: picture to write; its ending chooses the format.

    Returns:
        Path: ``output``.

    Raises:
        ImportError: if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, StrMethodFormatter
    except ImportError as error:
        raise ImportError(
            "--plot needs matplotlib: pip install 'alm_torchrl[cli]'"
        ) from error
    figure = Figure(figsize=(15, 3.6), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(AXES))
    for panel, axis in zip(panels, AXES, strict=True):
        shown = [point for point in points if point["axis"] == axis]
        median = [1e3 * point["median"] for point in shown]
        low = [1e3 * (point["median"] - point["q1"]) for point in shown]
        high = [1e3 * (point["q3"] - point["median"]) for point in shown]
        values = [point["value"] for point in shown]
        panel.errorbar(values, median, (low, high), marker="o", capsize=3)
        panel.set_xscale("log")
        panel.set_yscale("log")
        if axis != "buffer_size":
            panel.set_xticks(values, [f"{value:,}" for value in values])
            panel.minorticks_off()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.set_xlabel(LABELS[axis])
        what = "draw" if axis == "buffer_size" else "update"
        panel.set_ylabel(f"milliseconds per {what}")
        panel.grid(alpha=0.3, which="both")
    figure.suptitle(title)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return output
