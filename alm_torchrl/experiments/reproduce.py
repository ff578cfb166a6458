"""``alm-torchrl reproduce``: an experiment of the paper as a sweep."""

from __future__ import annotations

import textwrap
from dataclasses import replace

from alm_torchrl.experiments.catalogue import EXPERIMENTS, SCALES, plan
from alm_torchrl.experiments.sweep import Sweep
from alm_torchrl.runs.options import ReproduceOptions

__all__ = ["describe_experiments", "plan_experiment"]


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


def plan_experiment(name: str, options: ReproduceOptions) -> Sweep:
    """An experiment of the catalogue as a sweep.

    Args:
        name: of the experiment.
        options: how much of it.

    Raises:
        ValueError: if there is no such experiment or task.
    """
    if name not in EXPERIMENTS:
        raise ValueError(
            f"expected one of {', '.join(EXPERIMENTS)}, got {name!r}; see --list"
        )
    experiment, scale = EXPERIMENTS[name], SCALES[options.scale]
    planned = plan(
        experiment,
        options.scale,
        seeds=options.seeds,
        steps=options.steps,
        tasks=options.tasks,
        device=options.device,
    )
    return Sweep(
        name,
        f"{experiment.source}: {experiment.question}",
        scale.note,
        [
            # The baselines keep fp32.
            (
                line,
                replace(run, precision=options.precision)
                if run.agent == "alm"
                else run,
            )
            for line, run in planned
        ],
        suffix="" if options.scale == "paper" else f"-{options.scale}",
        kind=experiment.kind,
        timed=experiment.timed,
        pairs=scale.pairs,
        rollout=scale.rollout,
    )
