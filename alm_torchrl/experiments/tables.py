"""Runs of an experiment as tables: scores with intervals, curves, and their means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alm_torchrl.evaluation import isolated_rng
from alm_torchrl.runs.curves import Curve, mean_curve
from alm_torchrl.runs.diagnose import write_columns
from alm_torchrl.runs.folder import Run, read_record

__all__ = [
    "Group",
    "Row",
    "format_scores",
    "iqm_interval",
    "metric_rows",
    "over_seeds",
    "score_rows",
    "write_rows",
]

Row = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """The runs of one variant on one task, one for each seed."""

    task: str
    """Gymnasium task."""
    name: str
    """Name of the variant, used in file names."""
    label: str
    """Label of the variant, used in legends and tables."""
    runs: list[Run]
    """Complete runs, at least one."""


def iqm_interval(
    returns: NDArray[np.float64], *, seed: int = 0
) -> tuple[float, float, float]:
    """Interquartile mean with a 95% stratified bootstrap interval, by rliable.

    Args:
        returns: one for each run, ``[N]``.

    Keyword Args:
        seed: of the bootstrap; NumPy's global generator is left as it was.
            Default: ``0``.

    Returns:
        tuple: the mean and the ends of the interval (NaN for one run).

    Raises:
        ImportError: if rliable is missing.

    Examples:
        >>> iqm, low, high = iqm_interval(np.array([1.0, 2.0, 3.0, 10.0]))
        >>> iqm, bool(low <= iqm <= high)
        (2.5, True)
    """
    try:
        from rliable import library, metrics
    except ImportError as error:
        raise ImportError(
            "the interquartile mean needs rliable: pip install 'alm_torchrl[stats]'"
        ) from error
    if len(returns) == 1:
        return float(returns[0]), np.nan, np.nan
    # rliable draws from the global generator, whatever random state it is given.
    with isolated_rng(seed=seed):
        points, intervals = library.get_interval_estimates(
            {"runs": returns[:, None]},
            lambda table: np.array([metrics.aggregate_iqm(table)]),
            reps=2000,
        )
    low, high = intervals["runs"][:, 0]
    return float(points["runs"][0]), float(low), float(high)


def score_rows(groups: Sequence[Group]) -> list[Row]:
    """The last evaluations of each group.

    Returns:
        list: rows with ``task``, ``variant``, ``seeds`` (their number),
        ``training_step``; ``mean`` and ``std`` of the mean returns (NaN for one seed);
        ``iqm``, ``low`` and ``high`` of :func:`iqm_interval`; and ``minutes``, the mean
        wall time of a run.

    Raises:
        ImportError: if rliable is missing.
    """
    rows = []
    for group in groups:
        last = [run.metrics[-1] for run in group.runs]
        returns = np.array([row["mean_return"] for row in last])
        iqm, low, high = iqm_interval(returns)
        rows.append(
            {
                "task": group.task,
                "variant": group.label,
                "seeds": len(returns),
                "training_step": last[0]["training_step"],
                "mean": float(returns.mean()),
                "std": float(returns.std(ddof=1)) if len(returns) > 1 else np.nan,
                "iqm": iqm,
                "low": low,
                "high": high,
                "minutes": float(np.mean([row["wall_time"] for row in last])) / 60,
            }
        )
    return rows


def format_scores(rows: Sequence[Row]) -> str:
    """The rows of :func:`score_rows` as text."""
    cells = [("task", "variant", "seeds", "mean +- std", "IQM [95% interval]")]
    for row in rows:
        spread = f"{row['mean']:.0f} +- {row['std']:.0f}"
        interval = f"{row['iqm']:.0f} [{row['low']:.0f}, {row['high']:.0f}]"
        cells.append((row["task"], row["variant"], str(row["seeds"]), spread, interval))
    columns = zip(*cells, strict=True)
    task, variant, seeds, score, _ = (max(map(len, column)) for column in columns)
    return "\n".join(
        f"{a:{task}}  {b:{variant}}  {c:>{seeds}}  {d:>{score}}  {e}"
        for a, b, c, d, e in cells
    )


def metric_rows(runs: Sequence[Run]) -> list[Row]:
    """The evaluations of some runs: the columns of ``metrics.csv`` and ``commit``."""
    return [
        {**row, "commit": read_record(run.path)["commit"]}
        for run in runs
        for row in run.metrics
    ]


def over_seeds(label: str, rows: Iterable[Row], x: str, y: str) -> Curve:
    """The curve of ``y`` over ``x``, with the rows of each ``seed``."""
    seeds: dict[int, dict[int, float]] = {}
    for row in rows:
        seeds.setdefault(row["seed"], {})[row[x]] = row[y]
    return mean_curve(label, list(seeds.values()))


def write_rows(rows: Sequence[Row], path: Path) -> Path:
    """Writes rows with the same entries as CSV."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return write_columns(columns, path)
