"""The commands ``reproduce`` and ``sweep``: their flags and what they print.

This module imports no PyTorch: ``--help`` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from alm_torchrl.runs.options import ReproduceOptions, SweepOptions
from alm_torchrl.runs.settings import user_errors

__all__ = ["Curves", "Reproduce", "SweepCommand", "sweep_defaults"]

Curves = Annotated[
    tuple[Path, ...],
    tyro.conf.arg(metavar="CSV...", help_behavior_hint="(default: none)"),
]

_say = partial(print, flush=True)


@dataclass(frozen=True)
class Reproduce(ReproduceOptions):
    """Rerun an experiment of the paper: its runs, then its table and figure."""

    name: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="[NAME]", help_behavior_hint="(see --list)"),
    ] = ""
    """Experiment to rerun; runs that are complete are not made again."""
    tasks: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="TASK...", help_behavior_hint="(default: all)"),
    ] = ()
    """Some of the experiment's tasks."""
    reference: Curves = ()
    """Published learning curves (the authors' scores/*.csv) to draw as well."""
    list: bool = False
    """List the experiments, what the paper found, and stop."""

    def run(self) -> int:
        """Reproduces."""
        from alm_torchrl.experiments.reproduce import (
            describe_experiments,
            plan_experiment,
        )
        from alm_torchrl.experiments.sweep import make_sweep

        if self.list:
            _say(describe_experiments())
            return 0
        with user_errors():
            return make_sweep(plan_experiment(self.name, self), self, _say)


@dataclass(frozen=True)
class SweepCommand(SweepOptions):
    """Train for each combination of tasks, agents, settings and seeds.

    Then write the table and the figure of all.
    """

    tasks: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(
            metavar="[TASK ...]", help_behavior_hint="(default: HalfCheetah-v5)"
        ),
    ] = ()
    """Gymnasium tasks; by default that of the preset."""
    set: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(
            metavar="NAME=VALUE[,VALUE...]", help_behavior_hint="(default: none)"
        ),
    ] = ()
    """Setting of train and its values, such as lr=1e-4,3e-4. May be repeated."""
    reference: Curves = ()
    """Published learning curves (the authors' scores/*.csv) to draw as well."""
    file: Path | None = None
    """TOML file whose keys are these flags, with a table of settings named set."""

    def run(self) -> int:
        """Sweeps."""
        from alm_torchrl.experiments.grid import plan_grid
        from alm_torchrl.experiments.sweep import make_sweep

        name = "sweep" if self.file is None else self.file.stem
        with user_errors():
            return make_sweep(plan_grid(self, name), self, _say)


def sweep_defaults(file: Path) -> SweepCommand:
    """The defaults of the flags of ``sweep`` that a TOML file gives."""
    from alm_torchrl.experiments.grid import sweep_options

    with user_errors():
        return SweepCommand(**sweep_options(file), file=file)
