"""Runs of an experiment as tables: scores with intervals, curves, and their means."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alm_torchrl.evaluation import isolated_rng
from alm_torchrl.runs.curves import Curve
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
    """Complete runs, at least one, with the same last training step."""


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
    """The rows of :func:`score_rows` as text, 80 columns wide at most."""
    lines = [
        f"{'task':15} {'variant':20} seeds {'mean +- std':>15}  IQM [95% interval]"
    ]
    for row in rows:
        spread = f"{row['mean']:.0f} +- {row['std']:.0f}"
        lines.append(
            f"{row['task'][:15]:15} {row['variant'][:20]:20} {row['seeds']:5} "
            f"{spread:>15}  {row['iqm']:.0f} [{row['low']:.0f}, {row['high']:.0f}]"
        )
    return "\n".join(lines)


def metric_rows(runs: Sequence[Run]) -> list[Row]:
    """The evaluations of some runs: the columns of ``metrics.csv`` and ``commit``."""
    return [
        {**row, "commit": read_record(run.path)["commit"]}
        for run in runs
        for row in run.metrics
    ]


def over_seeds(label: str, rows: Iterable[Row], x: str, y: str) -> Curve:
    """Mean and sample deviation of ``y`` over seeds, at each ``x`` that all have."""
    columns: dict[int, list[float]] = {}
    for row in rows:
        columns.setdefault(row[x], []).append(row[y])
    seeds = max(map(len, columns.values()))
    kept = sorted(key for key, values in columns.items() if len(values) == seeds)
    table = np.array([columns[key] for key in kept])
    std = table.std(axis=1, ddof=1) if seeds > 1 else None
    return Curve(label, np.array(kept), table.mean(axis=1), std)


def write_rows(rows: Sequence[Row], path: Path) -> Path:
    """Writes rows with the same entries as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path
