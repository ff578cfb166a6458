"""What is known of each run while a sweep goes on, read from the run folders."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from alm_torchrl.experiments.worker import where_it_runs
from alm_torchrl.runs.folder import holds_run, read_metrics
from alm_torchrl.runs.settings import TrainConfig

__all__ = ["is_complete", "show_progress"]

SECONDS = 2.0
"""Time between two looks at the folders."""


def is_complete(config: TrainConfig) -> bool:
    """Whether the run of these settings exists and was evaluated at its end."""
    return _steps(_evaluations(config)) >= config.total_steps


@contextmanager
def show_progress(
    configs: Sequence[TrainConfig], failures: Mapping[Path, str]
) -> Iterator[None]:
    """Shows the runs on standard error until the block ends.

    On a terminal, a table that stays in its place; elsewhere a line for each change.

    Args:
        configs: settings of the runs, each with a folder.
        failures: why runs failed, by folder; it may grow.
    """
    # A run in this process redirects sys.stderr.
    show = _Table(sys.stderr) if sys.stderr.isatty() else _Lines(sys.stderr)
    done = threading.Event()

    def refresh() -> None:
        show([_row(config, failures.get(config.run_path, "")) for config in configs])

    def watch() -> None:
        while not done.wait(SECONDS):
            refresh()

    refresh()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        refresh()


class _Lines:
    """Writes the rows that are new."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._shown: set[tuple[str, ...]] = set()

    def __call__(self, rows: Sequence[tuple[str, ...]]) -> None:
        # The time left changes all the time.
        new = [row for row in rows if row[:4] not in self._shown]
        self._shown.update(row[:4] for row in new)
        self._file.writelines(f"{line}\n" for line in _align(new))
        self._file.flush()


class _Table:
    """Writes the rows over those before, the ones in progress or failed first."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._lines = 0

    def __call__(self, rows: Sequence[tuple[str, ...]]) -> None:
        width, height = shutil.get_terminal_size()
        rest = [row for row in rows if row[3] in ("waiting", "complete")]
        first = [row for row in rows if row not in rest]
        complete = sum(row[3] == "complete" for row in rows)
        lines = _align([*first, *rest])[: height - 2]
        lines.append(f"{complete} of {len(rows)} runs complete")
        up = f"\x1b[{self._lines}F" if self._lines else ""
        text = "".join(f"{line[: width - 1]}\n" for line in lines)
        self._file.write(f"{up}\x1b[J{text}")
        self._file.flush()
        self._lines = len(lines)


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ("<", ">", ">", "<", "<")
    return [
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _row(config: TrainConfig, failure: str) -> tuple[str, ...]:
    """Name, steps, last return, state or where it runs, and the time left."""
    evaluations = _evaluations(config)
    steps, left = _steps(evaluations), ""
    score = f"return {evaluations[-1]['mean_return']:.1f}" if evaluations else ""
    if steps >= config.total_steps:
        state = "complete"
    elif failure:
        state = f"failed: {' '.join(failure.split())}"
    elif where := where_it_runs(config.run_path):
        state, left = where, _time_left(config, evaluations)
    else:
        state = "waiting"
    return (
        config.run_path.name,
        f"{steps:,}/{config.total_steps:,} steps",
        score,
        state,
        left,
    )


def _time_left(config: TrainConfig, evaluations: Sequence[Mapping[str, float]]) -> str:
    """At the pace between the first and the last evaluation."""
    if len(evaluations) < 2:
        return ""
    first, last = evaluations[0], evaluations[-1]
    made = last["training_step"] - first["training_step"]
    pace = (last["wall_time"] - first["wall_time"]) / made
    since = time.time() - (config.run_path / "metrics.csv").stat().st_mtime
    left = max(0.0, pace * (config.total_steps - last["training_step"]) - since)
    if left >= 5400:
        return f"{left / 3600:.1f} h left"
    return f"{left / 60:.0f} min left" if left >= 90 else f"{left:.0f} s left"


def _evaluations(config: TrainConfig) -> list[dict[str, float]]:
    """Rows of a run so far; of a damaged one none, which its training will say."""
    metrics = config.run_path / "metrics.csv"
    if not holds_run(config.run_path) or not metrics.is_file():
        return []
    try:
        return read_metrics(metrics)
    except ValueError:
        return []


def _steps(evaluations: Sequence[Mapping[str, float]]) -> int:
    return int(evaluations[-1]["training_step"]) if evaluations else 0
