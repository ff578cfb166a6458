"""A sweep: runs of several tasks, variants and seeds, then their table and figure."""

from __future__ import annotations

import logging
import signal
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torchrl import torchrl_logger

from alm_torchrl.checks import check_output
from alm_torchrl.experiments.catalogue import Kind, Variant
from alm_torchrl.experiments.display import is_complete
from alm_torchrl.experiments.execution import choose_engine, make_runs
from alm_torchrl.experiments.figures import plot_bias, plot_curves, plot_rollouts
from alm_torchrl.experiments.measures import bias_rows, rollout_rows
from alm_torchrl.experiments.tables import (
    Group,
    format_scores,
    iqm_interval,
    metric_rows,
    score_rows,
    write_rows,
)
from alm_torchrl.runs.curves import Curve, reference_curve
from alm_torchrl.runs.folder import Run
from alm_torchrl.runs.options import ExecutionOptions
from alm_torchrl.runs.settings import TrainConfig

__all__ = ["Sweep", "make_sweep"]

Say = Callable[[str], None]
Planned = tuple[Variant, TrainConfig]


@dataclass(frozen=True)
class Sweep:
    """Runs to make, and what to draw of them."""

    name: str
    """Of the table and the figure."""
    title: str
    """What it compares."""
    note: str
    """Part of every output."""
    runs: Sequence[Planned]
    """The line of the figure that each run belongs to, and its settings."""
    suffix: str = ""
    """Of the names of all files."""
    kind: Kind = "curves"
    """Learning curves; or bias, or latent rollouts, of the trained agents."""
    timed: bool = False
    """Whether its learning curves are drawn over wall time, too."""
    pairs: int = 1000
    """State-action pairs on which a bias is measured."""
    rollout: int = 50
    """Steps that the latent model predicts."""


def make_sweep(sweep: Sweep, options: ExecutionOptions, say: Say) -> int:
    """Makes the missing runs of a sweep, then its table and figure.

    A run that fails is named, and missing in the table.

    Args:
        sweep: the runs.
        options: how they are made, and where.
        say: receives lines for the user.

    Returns:
        int: 0, 1 if a run failed, or 128 and the number of the signal that stopped it.

    Raises:
        ValueError: if two runs have the same folder, or no run succeeded.
        ImportError: if a package for the engine, tables or figures is missing.
    """
    torchrl_logger.setLevel(logging.WARNING)
    check_output("output", options.output)
    references = [reference_curve(path) for path in options.reference]
    # Fails before the training where a package is missing.
    iqm_interval(np.ones(1))
    # A process elsewhere may have another working directory.
    folder = options.runs.resolve()
    planned = [
        (variant, replace(config, run_dir=folder / config.run_name))
        for variant, config in sweep.runs
    ]
    configs = [config for _, config in planned]
    _check_distinct(configs)
    engine, how = choose_engine(options)
    done = sum(map(is_complete, configs))
    say(textwrap.fill(sweep.title, 80))
    say(textwrap.fill(f"Scale: {sweep.note}", 80))
    say(f"Runs: {len(planned)}, {done} of them complete, {how}")
    try:
        runs, failures = make_runs(configs, engine)
    except KeyboardInterrupt as stop:
        say("\nInterrupted; the runs are saved. The same command continues them.")
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    for path, reason in failures.items():
        say(f"Failed: {path}: {reason}")
    if not runs:
        raise ValueError("no run succeeded, so there is nothing to draw")
    groups = _grouped(planned, runs)
    written = _write(sweep, options.output, groups, references, say)
    say("\nWritten\n" + "\n".join(f"  {path}" for path in written))
    return 1 if failures else 0


def _check_distinct(configs: Sequence[TrainConfig]) -> None:
    paths = [config.run_path for config in configs]
    if double := sorted({path.name for path in paths if paths.count(path) > 1}):
        raise ValueError(
            f"expected runs that differ, got {double[0]} more than once: a value is "
            "given twice, or its setting changes no result"
        )


def _grouped(planned: Sequence[Planned], runs: Sequence[Run]) -> list[Group]:
    by_path = {run.path: run for run in runs}
    groups: dict[tuple[str, str], Group] = {}
    for variant, config in planned:
        if run := by_path.get(config.run_path):
            new = Group(config.task, variant.name, variant.label, [])
            groups.setdefault((config.task, variant.name), new).runs.append(run)
    return list(groups.values())


def _write(
    sweep: Sweep,
    folder: Path,
    groups: Sequence[Group],
    references: Sequence[Curve],
    say: Say,
) -> list[Path]:
    """Writes curves, table, what else was measured, and the figure."""
    stem, kind = f"{sweep.name}{sweep.suffix}", sweep.kind
    title = f"{sweep.title} ({sweep.note})"
    written = [
        write_rows(
            metric_rows(group.runs),
            folder / group.task / f"{group.name}{sweep.suffix}.csv",
        )
        for group in groups
    ]
    table = score_rows(groups)
    heading = textwrap.fill(f"Last evaluation, {sweep.note}", 80)
    say(f"\n{heading}\n{format_scores(table)}")
    written.append(write_rows(table, folder / f"{stem}.csv"))
    picture = folder / f"{stem}.png"
    if kind == "curves":
        plot_curves(title, groups, picture, references, sweep.timed)
    else:
        if kind == "bias":
            rows, draw = bias_rows(groups, pairs=sweep.pairs), plot_bias
        else:
            rows, draw = rollout_rows(groups, steps=sweep.rollout), plot_rollouts
        written.append(write_rows(rows, folder / f"{stem}-{kind}.csv"))
        draw(title, rows, picture)
    return [*written, picture]
