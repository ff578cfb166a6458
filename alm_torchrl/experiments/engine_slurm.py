"""Runs as a job array of Slurm, by submitit."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from alm_torchrl.experiments.worker import Outcomes, Retries, make_run
from alm_torchrl.runs.settings import TrainConfig
from alm_torchrl.runs.signals import interrupt_on_signal

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

__all__ = ["run_on_slurm"]

MINUTES = 24 * 60
"""Time limit of a job, after which it is queued again."""
SAVING = 60.0
"""Seconds that cancelled runs have to save themselves."""


def run_on_slurm(
    configs: Sequence[TrainConfig],
    *,
    folder: Path,
    jobs: int | None = None,
    gpus: float = 0.0,
    cluster: str = "slurm",
) -> Outcomes:
    """Makes runs as jobs of a Slurm array; gives them as they end.

    All that a run needs is in its folder. At its time limit a job saves and is queued
    again; where it is preempted or lost, another one continues from its last
    checkpoint. Closed before the end, or interrupted, it has the jobs cancelled, which
    save first. A run has ``threads`` cores, or one. Slurm reads partition, account and
    the like from the environment: ``SBATCH_PARTITION``, ``SBATCH_ACCOUNT``.

    Args:
        configs: settings of the runs, each with a folder that all nodes can reach.

    Keyword Args:
        folder: of submitit, for scripts and logs.
        jobs: runs at once. Default: ``None``, as many as Slurm allows.
        gpus: GPUs of each run, a whole number. Default: ``0.0``.
        cluster: submitit's name of the scheduler; ``"local"`` makes processes here.
            Default: ``"slurm"``.

    Yields:
        tuple: the settings, and why the run failed, or ``""``.

    Raises:
        ImportError: if submitit is missing.
        ValueError: if ``gpus`` is not a whole number.
        RuntimeError: if there is no Slurm here.
        KeyboardInterrupt: after SIGINT, SIGTERM or SIGHUP.
    """
    try:
        import submitit
    except ImportError as error:
        raise ImportError(
            "the engine slurm needs submitit: pip install 'alm_torchrl[slurm]'"
        ) from error
    if gpus != int(gpus):
        raise ValueError(f"--gpus: expected a whole number with slurm, got {gpus}")
    executor = submitit.AutoExecutor(folder, cluster=cluster)
    executor.update_parameters(name="alm-torchrl", timeout_min=MINUTES)
    executor.update_parameters(gpus_per_node=int(gpus))
    if jobs is not None:
        executor.update_parameters(slurm_array_parallelism=jobs)
    retries = Retries()
    pending: dict[Any, TrainConfig] = {}

    def submit(some: Sequence[TrainConfig]) -> None:
        threads = max(config.threads or 1 for config in some)
        executor.update_parameters(cpus_per_task=threads)
        with executor.batch():
            made = [executor.submit(_Job(config)) for config in some]
        pending.update(zip(made, some, strict=True))

    with ExitStack() as stack:
        stack.callback(_cancel, pending)
        stack.enter_context(interrupt_on_signal())
        submit([replace(one, threads=one.threads or 1) for one in configs])
        while pending:
            for job in [job for job in pending if job.done()]:
                config = pending.pop(job)
                lost = False
                try:
                    code, reason = job.result()
                    lost = code > 1
                except submitit.core.utils.FailedJobError as error:
                    reason = str(error).strip().splitlines()[-1]
                except submitit.core.utils.UncompletedJobError as error:
                    lost, reason = True, str(error).strip().splitlines()[0]
                if lost and retries.again(config):
                    submit([config])
                else:
                    yield config, reason
            time.sleep(0.5)


class _Job:
    """A run as submitit calls it, which handles the signals of the main thread."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def __call__(self) -> tuple[int, str]:
        self._stop = Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._stop.set())
        with ThreadPoolExecutor(1) as pool:
            self._run: Future[tuple[int, str]] = pool.submit(
                make_run, self.config, self._stop
            )
            return self._run.result()

    def checkpoint(self) -> DelayedSubmission:
        """Saves; called by submitit before the job is queued again."""
        from submitit.helpers import DelayedSubmission

        self._stop.set()
        wait([self._run])
        return DelayedSubmission(_Job(self.config))


def _cancel(pending: dict[Any, TrainConfig]) -> None:
    """Cancels jobs, which then save, and waits for them."""
    for job in pending:
        job.cancel(check=False)
    deadline = time.monotonic() + SAVING
    while time.monotonic() < deadline and not all(job.done() for job in pending):
        time.sleep(0.1)
