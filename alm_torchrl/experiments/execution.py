"""Makes the runs of a sweep on an engine, behind one display."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from alm_torchrl.experiments.display import is_complete, show_progress
from alm_torchrl.experiments.engine_local import run_locally
from alm_torchrl.experiments.engine_ray import run_on_ray
from alm_torchrl.experiments.engine_slurm import run_on_slurm
from alm_torchrl.experiments.worker import Outcomes
from alm_torchrl.runs.folder import Run, available_cores, read_run
from alm_torchrl.runs.options import ExecutionOptions
from alm_torchrl.runs.settings import TrainConfig

__all__ = ["Engine", "choose_engine", "make_runs"]

Engine = Callable[[Sequence[TrainConfig]], Outcomes]
"""Makes runs."""


def choose_engine(options: ExecutionOptions) -> tuple[Engine, str]:
    """The engine that is asked for, and what it does in words."""
    gpus = float(options.device == "cuda") if options.gpus is None else options.gpus
    shared: dict[str, Any] = {"jobs": options.jobs, "gpus": gpus}
    if options.engine == "ray":
        return partial(run_on_ray, address=options.address, **shared), "as Ray tasks"
    if options.engine == "slurm":
        folder = options.runs / ".submitit"
        return partial(run_on_slurm, folder=folder, **shared), "as Slurm jobs"
    jobs = options.jobs or _default_jobs(options)
    return partial(run_locally, jobs=jobs), f"{jobs} at once"


def _default_jobs(options: ExecutionOptions) -> int:
    from alm_torchrl.runs.train import find_device

    return 1 if find_device(options.device) == "cuda" else available_cores()


def make_runs(
    configs: Sequence[TrainConfig], engine: Engine
) -> tuple[list[Run], dict[Path, str]]:
    """Makes the runs that are not complete; those begun continue where they stopped.

    Args:
        configs: settings of the runs, each with a folder (``run_path``) of its own.
        engine: what makes them.

    Returns:
        tuple: the complete runs, in the order given, and the folders of those that
        failed with the reasons.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the runs have been saved.
    """
    missing = [config for config in configs if not is_complete(config)]
    failures: dict[Path, str] = {}
    with ExitStack() as stack:
        if missing:
            stack.enter_context(show_progress(configs, failures))
            outcomes = engine(missing)
            # What is in progress is saved before the display ends.
            stack.callback(outcomes.close)
            for config, reason in outcomes:
                if reason:
                    failures[config.run_path] = reason
    made = [read_run(config.run_path) for config in configs if is_complete(config)]
    return made, failures
