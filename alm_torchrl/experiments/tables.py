"""Scores of an experiment's runs as a table: mean, deviation, IQM with its interval."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alm_torchrl.runs.folder import METRICS_FIELDS, Run, read_record

__all__ = [
    "Score",
    "format_scores",
    "iqm_interval",
    "scores",
    "write_curves",
    "write_scores",
]


@dataclass(frozen=True)
class Score:
    """The last evaluation of the seeds of one variant on one task."""

    task: str
    """Gymnasium task."""
    variant: str
    """Label of the variant."""
    seeds: int
    """Number of runs."""
    training_step: int
    """When it was measured."""
    mean: float
    """Mean over seeds of the mean return."""
    std: float
    """Sample standard deviation over seeds; NaN for one."""
    iqm: float
    """Interquartile mean."""
    low: float
    """Lower end of its 95% bootstrap interval; NaN for one seed."""
    high: float
    """Upper end of it."""
    minutes: float
    """Mean wall time of a run."""


def iqm_interval(
    returns: NDArray[np.float64], *, seed: int = 0
) -> tuple[float, float, float]:
    """Interquartile mean with a 95% stratified bootstrap interval, by rliable.

    Args:
        returns: one for each run, ``[N]``.

    Keyword Args:
        seed: of the bootstrap. Default: ``0``.

    Returns:
        tuple: the mean and the ends of the interval (NaN for one run).

    Raises:
        ImportError: if rliable is missing.

    Examples:
        >>> import numpy as np
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
    # The package ignores its own random state.
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        points, intervals = library.get_interval_estimates(
            {"runs": returns[:, None]},
            lambda table: np.array([metrics.aggregate_iqm(table)]),
            reps=2000,
        )
    finally:
        np.random.set_state(before)  # noqa: NPY002
    low, high = intervals["runs"][:, 0]
    return float(points["runs"][0]), float(low), float(high)


def scores(groups: Sequence[tuple[str, str, Sequence[Run]]]) -> list[Score]:
    """One row for each variant and task.

    Args:
        groups: label of the variant, task and its runs, at least one, all with the same
            last training step.

    Raises:
        ImportError: if rliable is missing.
    """
    rows = []
    for label, task, runs in groups:
        last = [run.metrics[-1] for run in runs]
        returns = np.array([row["mean_return"] for row in last])
        iqm, low, high = iqm_interval(returns)
        rows.append(
            Score(
                task,
                label,
                len(runs),
                last[0]["training_step"],
                float(returns.mean()),
                float(returns.std(ddof=1)) if len(runs) > 1 else np.nan,
                iqm,
                low,
                high,
                float(np.mean([row["wall_time"] for row in last])) / 60,
            )
        )
    return rows


def format_scores(rows: Sequence[Score]) -> str:
    """The table as text, 80 columns wide at most."""
    lines = [
        f"{'task':15} {'variant':20} seeds {'mean +- std':>15}  IQM [95% interval]"
    ]
    for row in rows:
        spread = f"{row.mean:.0f} +- {row.std:.0f}"
        interval = f"{row.iqm:.0f} [{row.low:.0f}, {row.high:.0f}]"
        lines.append(
            f"{row.task[:15]:15} {row.variant[:20]:20} {row.seeds:5} {spread:>15}  "
            f"{interval}"
        )
    return "\n".join(lines)


def write_scores(rows: Sequence[Score], path: Path) -> Path:
    """Writes the table as CSV, with the names of :class:`Score` as columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, [field.name for field in fields(Score)], lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return path


def write_curves(runs: Sequence[Run], path: Path) -> Path:
    """Writes the evaluations of some runs as CSV: their columns, and the commit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*METRICS_FIELDS, "commit"], lineterminator="\n")
        writer.writeheader()
        for run in runs:
            commit = read_record(run.path)["commit"]
            writer.writerows({**row, "commit": commit} for row in run.metrics)
    return path
