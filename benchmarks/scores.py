"""The table of an agent on five MuJoCo tasks: ``python -m benchmarks.scores --help``.

It reads run folders or their collected CSV files, and prints mean and sample deviation
of each task, and the interquartile mean of the normalised scores over tasks and seeds.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray

from alm_torchrl.evaluation import isolated_rng
from alm_torchrl.runs.folder import METRICS_FIELDS, read_record, read_run

# Return of a random policy and of TD3 after a million steps, as SimbaV2's source has
# them (github.com/DAVIAN-Robotics/SimbaV2).
RANDOM_AND_TD3 = {
    "HalfCheetah-v4": (-289.415, 10574.0),
    "Hopper-v4": (18.791, 3226.0),
    "Walker2d-v4": (2.791, 3946.0),
    "Ant-v4": (-70.288, 3942.0),
    "Humanoid-v4": (120.423, 5165.0),
}
FIELDS = (*METRICS_FIELDS, "commit")

# (task, seed) -> environment steps and returns, in order
Curves = dict[tuple[str, int], tuple[list[float], list[float]]]


@dataclass(frozen=True)
class Options:
    """Collect runs into CSV files, and print their table."""

    sources: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, or CSV files written by this script."""
    steps: tuple[int, ...] = (50_000, 100_000, 150_000, 200_000)
    """Environment steps of the rows; returns between evaluations are interpolated."""
    collect: Path | None = None
    """Folder for one CSV file per task, with all rows of the sources."""
    name: str = "plus"
    """Name of the agent in the files, TASK-NAME.csv."""
    peers: Path | None = None
    """CSV of others' curves: method, task, seed, environment_step, return."""


def read_rows(source: Path) -> list[dict[str, str]]:
    """The evaluations of a run folder or of a collected file, with ``FIELDS``."""
    if source.is_file():
        with source.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    commit = read_record(source)["commit"]
    rows = [row | {"commit": commit} for row in read_run(source).metrics]
    return [{key: str(row[key]) for key in FIELDS} for row in rows]


def collect(rows: Iterable[dict[str, str]], folder: Path, name: str) -> None:
    """Writes one file per task, ordered by seed and step."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    for task, found in tasks.items():
        found.sort(key=lambda row: (int(row["seed"]), int(row["environment_step"])))
        path = folder / f"{task}-{name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)


def curves_of(rows: Iterable[dict[str, str]], value: str = "mean_return") -> Curves:
    """The curve of each task and seed."""
    curves: Curves = {}
    for row in rows:
        steps, returns = curves.setdefault((row["task"], int(row["seed"])), ([], []))
        steps.append(float(row["environment_step"]))
        returns.append(float(row[value]))
    return curves


def returns_at(curves: Curves, task: str, step: int) -> NDArray[np.float64]:
    """Interpolated returns of the seeds of a task that have come so far, ``[N]``."""
    return np.array(
        [
            np.interp(step, steps, returns)
            for (of, _), (steps, returns) in sorted(curves.items())
            if of == task and steps[-1] >= step
        ]
    )


def interquartile_mean(
    curves: Curves, step: int
) -> tuple[float, float, float, int] | None:
    """Mean, ends of its 95% interval, and number of seeds; ``None`` if a task lacks."""
    from rliable import library, metrics

    columns = []
    for task, (low, high) in RANDOM_AND_TD3.items():
        columns.append((returns_at(curves, task, step) - low) / (high - low))
    seeds = min(map(len, columns))
    if seeds == 0:
        return None
    scores = np.stack([column[:seeds] for column in columns], 1)
    with isolated_rng(seed=0):
        points, intervals = library.get_interval_estimates(
            {"": scores},
            lambda table: np.array([metrics.aggregate_iqm(table)]),
            reps=2000,
        )
    low, high = intervals[""][:, 0]
    return float(points[""][0]), float(low), float(high), seeds


def table(curves: Curves, steps: Sequence[int], label: str) -> list[str]:
    """Rows of a Markdown table, one for each step."""
    rows = []
    for step in steps:
        cells = []
        for task in RANDOM_AND_TD3:
            found = returns_at(curves, task, step)
            spread = f" +- {found.std(ddof=1):.0f}" if len(found) > 1 else ""
            cells.append(f"{found.mean():.0f}{spread}" if len(found) else "")
        total = interquartile_mean(curves, step)
        cells.append(
            "" if total is None else "{:.2f} [{:.2f}, {:.2f}] ({})".format(*total)
        )
        rows.append(f"| {label} | {step:,} | {' | '.join(cells)} |")
    return rows


def main(options: Options) -> None:
    """Collects and prints."""
    rows = [row for source in options.sources for row in read_rows(source)]
    if options.collect is not None:
        collect(rows, options.collect, options.name)
    print(f"| agent | step | {' | '.join(RANDOM_AND_TD3)} | IQM (seeds) |")
    print("|---" * (len(RANDOM_AND_TD3) + 3) + "|")
    print("\n".join(table(curves_of(rows), options.steps, options.name)))
    if options.peers is not None:
        peers = read_rows(options.peers)
        for method in sorted({row["method"] for row in peers}):
            of = [row for row in peers if row["method"] == method]
            print("\n".join(table(curves_of(of, "return"), options.steps, method)))


if __name__ == "__main__":
    main(tyro.cli(Options))
