"""``alm-torchrl reproduce``: the runs of an experiment, then its table and figure."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from alm_torchrl.checks import check_integer
from alm_torchrl.experiments.catalogue import (
    EXPERIMENTS,
    SCALES,
    Experiment,
    Planned,
    ScaleName,
    plan,
)
from alm_torchrl.experiments.figures import plot_bias, plot_curves, plot_rollouts
from alm_torchrl.experiments.running import is_complete, make_runs
from alm_torchrl.experiments.studies import (
    BIAS_FIELDS,
    ROLLOUT_FIELDS,
    bias_rows,
    rollout_rows,
    write_rows,
)
from alm_torchrl.experiments.tables import (
    format_scores,
    iqm_interval,
    scores,
    write_curves,
    write_scores,
)
from alm_torchrl.runs.curves import reference_curve
from alm_torchrl.runs.folder import Run

__all__ = ["ReproduceOptions", "describe_experiments", "reproduce"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class ReproduceOptions:
    """Rerun an experiment of the paper: its runs, then its table and figure.

    Raises:
        ValueError: if a number is out of range.
    """

    scale: ScaleName = "small"
    """Seconds, minutes per run with reduced networks and steps, or the paper's."""
    seeds: int | None = None
    """Number of seeds; None: 2, 3 and 5 at the three scales."""
    steps: int | None = None
    """Training steps of each run; None: those of the scale."""
    tasks: tuple[str, ...] = ()
    """Some of the tasks; by default all."""
    jobs: int | None = None
    """Runs at once; None: as many as there are cores, one on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of networks and updates; auto takes a GPU where there is one."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the hidden layers of ALM's agents; the baselines keep fp32."""
    runs: Path = Path("runs")
    """Folder of the run folders; runs that are complete in it are not made again."""
    output: Path = Path("results")
    """Folder for the learning curves (CSV), the table (CSV) and the figure (PNG)."""
    reference: tuple[Path, ...] = ()
    """Published learning curves (the authors' scores/*.csv) to draw as well."""

    def __post_init__(self) -> None:
        """Check what no other part checks."""
        for name in ("seeds", "steps", "jobs"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))


def describe_experiments() -> str:
    """All experiments as text: name, source, question, variants, what was published."""
    blocks = []
    for one in EXPERIMENTS.values():
        variants = ", ".join(variant.label for variant in one.variants)
        lines = (f"{one.question}", f"Runs: {variants}.", f"Paper: {one.published}.")
        texts = [
            textwrap.fill(
                line,
                80,
                initial_indent=f"{one.name:8}{one.source}: " if index == 0 else " " * 8,
                subsequent_indent=" " * 8,
            )
            for index, line in enumerate(lines)
        ]
        blocks.append("\n".join(texts))
    return "\n".join(blocks)


def reproduce(name: str, options: ReproduceOptions, say: Say) -> int:
    """Makes the missing runs of an experiment, then its table and figure.

    Args:
        name: of the experiment.
        options: how much of it, and where.
        say: receives lines for the user.

    Returns:
        int: 0, or 1 if a run failed.

    Raises:
        ValueError: if there is no such experiment or task, or no run succeeded.
        ImportError: if a package for tables, figures or progress is missing.
    """
    if name not in EXPERIMENTS:
        raise ValueError(
            f"expected one of {', '.join(EXPERIMENTS)}, got {name!r}; see --list"
        )
    experiment, note = EXPERIMENTS[name], SCALES[options.scale].note
    references = [reference_curve(path) for path in options.reference]
    _check_packages()
    planned = _planned(experiment, options)
    done = sum(is_complete(one.config) for one in planned)
    jobs = options.jobs or _default_jobs(options)
    say(textwrap.fill(f"{experiment.source}: {experiment.question}", 80))
    say(f"Scale: {options.scale} ({note})")
    say(f"Runs: {len(planned)}, {done} of them complete, {jobs} at once")
    runs, failures = make_runs(planned, jobs=jobs)
    for failure in failures:
        say(f"Failed: {failure.path}: {failure.reason}")
    if not runs:
        raise ValueError("no run succeeded, so there is nothing to draw")
    written = _write(experiment, options, planned, runs, references, say)
    say("\nWritten\n" + "\n".join(f"  {path}" for path in written))
    return 1 if failures else 0


def _check_packages() -> None:
    import numpy as np

    iqm_interval(np.ones(2))


def _default_jobs(options: ReproduceOptions) -> int:
    from alm_torchrl.runs.train import find_device

    return 1 if find_device(options.device) == "cuda" else os.cpu_count() or 1


def _planned(experiment: Experiment, options: ReproduceOptions) -> list[Planned]:
    planned = plan(
        experiment,
        options.scale,
        seeds=options.seeds,
        steps=options.steps,
        tasks=options.tasks,
        settings={"device": options.device},
    )
    found = []
    for one in planned:
        config = one.config
        if config.agent == "alm":
            config = replace(config, precision=options.precision)
        folder = options.runs / config.run_name
        found.append(Planned(one.variant, replace(config, run_dir=folder)))
    return found


def _write(
    experiment: Experiment,
    options: ReproduceOptions,
    planned: Sequence[Planned],
    runs: Sequence[Run],
    references: Sequence[Any],
    say: Say,
) -> list[Path]:
    by_path = {run.path: run for run in runs}
    groups: dict[str, dict[str, list[Run]]] = {}
    files: dict[tuple[str, str], str] = {}
    for one in planned:
        run = by_path.get(one.config.run_path)
        if run is not None:
            variants = groups.setdefault(one.config.task, {})
            variants.setdefault(one.variant.label, []).append(run)
            files[one.config.task, one.variant.label] = one.variant.name
    suffix = "" if options.scale == "paper" else f"-{options.scale}"
    flat = [
        (label, task, members)
        for task, variants in groups.items()
        for label, members in variants.items()
    ]
    written = [
        write_curves(
            members, options.output / task / f"{files[task, label]}{suffix}.csv"
        )
        for label, task, members in flat
    ]
    note = SCALES[options.scale].note
    stem = options.output / f"{experiment.name}{suffix}"
    picture = stem.with_name(f"{stem.name}.png")
    table = scores(flat)
    say(f"\nLast evaluation, {note}\n{format_scores(table)}")
    written.append(write_scores(table, stem.with_name(f"{stem.name}.csv")))
    detail = stem.with_name(f"{stem.name}-{experiment.kind}.csv")
    if experiment.kind == "bias":
        rows = bias_rows(flat, options.scale)
        written.append(write_rows(rows, BIAS_FIELDS, detail))
        written.append(plot_bias(experiment, note, rows, picture))
    elif experiment.kind == "rollout":
        rows = rollout_rows(flat, options.scale)
        written.append(write_rows(rows, ROLLOUT_FIELDS, detail))
        written.append(plot_rollouts(experiment, note, rows, picture))
    else:
        written.append(plot_curves(experiment, note, groups, picture, references))
    return written
