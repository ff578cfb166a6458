"""``alm-torchrl reproduce``: the runs of an experiment, then its table and figure."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from alm_torchrl.experiments.catalogue import (
    EXPERIMENTS,
    SCALES,
    Experiment,
    Variant,
    plan,
)
from alm_torchrl.experiments.execution import (
    is_complete,
    make_runs,
)
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
from alm_torchrl.runs.folder import Run, available_cores
from alm_torchrl.runs.options import ReproduceOptions
from alm_torchrl.runs.settings import TrainConfig

__all__ = ["describe_experiments", "reproduce"]

Say = Callable[[str], None]
Planned = tuple[Variant, TrainConfig]


def describe_experiments() -> str:
    """All experiments as text: name, source, question, variants, what was published."""
    indent = " " * 8
    lines = []
    for one in EXPERIMENTS.values():
        runs = f"Runs: {', '.join(variant.label for variant in one.variants)}."
        for first, text in (
            (f"{one.name:8}{one.source}: ", one.question),
            (indent, runs),
            (indent, f"Paper: {one.published}."),
        ):
            lines.append(
                textwrap.fill(text, 80, initial_indent=first, subsequent_indent=indent)
            )
    return "\n".join(lines)


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
    # Fails before the training where a package is missing.
    iqm_interval(np.ones(1))
    planned = _planned(experiment, options)
    done = sum(is_complete(config) for _, config in planned)
    jobs = options.jobs or _default_jobs(options)
    say(textwrap.fill(f"{experiment.source}: {experiment.question}", 80))
    say(f"Scale: {options.scale} ({note})")
    say(f"Runs: {len(planned)}, {done} of them complete, {jobs} at once")
    runs, failures = make_runs([config for _, config in planned], jobs=jobs)
    for path, reason in failures.items():
        say(f"Failed: {path}: {reason}")
    if not runs:
        raise ValueError("no run succeeded, so there is nothing to draw")
    written = _write(experiment, options, _grouped(planned, runs), references, say)
    say("\nWritten\n" + "\n".join(f"  {path}" for path in written))
    return 1 if failures else 0


def _planned(experiment: Experiment, options: ReproduceOptions) -> list[Planned]:
    planned = []
    for variant, config in plan(
        experiment,
        options.scale,
        seeds=options.seeds,
        steps=options.steps,
        tasks=options.tasks,
        device=options.device,
    ):
        # The baselines keep fp32.
        precision = options.precision if config.agent == "alm" else config.precision
        config = replace(config, precision=precision)
        folder = options.runs / config.run_name
        planned.append((variant, replace(config, run_dir=folder)))
    return planned


def _default_jobs(options: ReproduceOptions) -> int:
    from alm_torchrl.runs.train import find_device

    return 1 if find_device(options.device) == "cuda" else available_cores()


def _grouped(planned: Sequence[Planned], runs: Sequence[Run]) -> list[Group]:
    by_path = {run.path: run for run in runs}
    groups: dict[tuple[str, str], Group] = {}
    for variant, config in planned:
        if run := by_path.get(config.run_path):
            new = Group(config.task, variant.name, variant.label, [])
            groups.setdefault((config.task, variant.name), new).runs.append(run)
    return list(groups.values())


def _write(
    experiment: Experiment,
    options: ReproduceOptions,
    groups: Sequence[Group],
    references: Sequence[Curve],
    say: Say,
) -> list[Path]:
    """Writes curves, table, what else was measured, and the figure."""
    scale, folder = SCALES[options.scale], options.output
    suffix = "" if options.scale == "paper" else f"-{options.scale}"
    stem, kind = f"{experiment.name}{suffix}", experiment.kind
    written = [
        write_rows(
            metric_rows(group.runs), folder / group.task / f"{group.name}{suffix}.csv"
        )
        for group in groups
    ]
    table = score_rows(groups)
    say(f"\nLast evaluation, {scale.note}\n{format_scores(table)}")
    written.append(write_rows(table, folder / f"{stem}.csv"))
    picture = folder / f"{stem}.png"
    if kind == "curves":
        plot_curves(experiment, scale.note, groups, picture, references)
    else:
        if kind == "bias":
            rows, draw = bias_rows(groups, pairs=scale.pairs), plot_bias
        else:
            rows, draw = rollout_rows(groups, steps=scale.rollout), plot_rollouts
        written.append(write_rows(rows, folder / f"{stem}-{kind}.csv"))
        draw(experiment, scale.note, rows, picture)
    return [*written, picture]
