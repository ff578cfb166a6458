"""Makes the runs of an experiment: several at once, behind one progress bar."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import (
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

from alm_torchrl.experiments.catalogue import Planned
from alm_torchrl.runs.folder import Run, holds_run, read_metrics, read_run
from alm_torchrl.runs.settings import TrainConfig, UserError

__all__ = ["Failure", "is_complete", "make_runs"]

LOG = "train.log"
"""File in a run folder with what the training printed."""


@dataclass(frozen=True)
class Failure:
    """A run that did not reach its end."""

    path: Path
    """Its folder."""
    reason: str
    """Why."""


def is_complete(config: TrainConfig) -> bool:
    """Whether the run of these settings was made, and evaluated at its end."""
    return _steps_done(config) >= config.total_steps


def make_runs(
    planned: Sequence[Planned], *, jobs: int
) -> tuple[list[Run], list[Failure]]:
    """Makes the runs that are not complete, those begun from where they stopped.

    What they print goes to ``train.log`` in their folders; one bar shows them all.

    Args:
        planned: the runs, each with a folder (``config.run_path``) of its own.

    Keyword Args:
        jobs: runs at once; one is made in this process.

    Returns:
        tuple: the complete ones, in the order given, and those that failed.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the runs have been saved.
    """
    configs = [one.config for one in planned]
    missing = [config for config in configs if not is_complete(config)]
    failures: list[Failure] = []
    with _display(configs) if missing else nullcontext():
        for config, reason in _outcomes(missing, jobs):
            if reason:
                failures.append(Failure(config.run_path, reason))
    made = [read_run(config.run_path) for config in configs if is_complete(config)]
    return made, failures


def _outcomes(
    configs: Sequence[TrainConfig], jobs: int
) -> Iterator[tuple[TrainConfig, str]]:
    """Trains, and says of each run why it failed, or nothing."""
    if jobs == 1 or len(configs) <= 1:
        for config in configs:
            yield config, _checked(_train(config))
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # A process that has used PyTorch's threads cannot be forked.
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _ignore_interrupts) as pool:
        futures: dict[Future[str | None], TrainConfig] = {}
        for config in configs:
            limited = replace(config, threads=min(config.threads or threads, threads))
            futures[pool.submit(_train, limited)] = config
        try:
            for future in as_completed(futures):
                yield futures[future], _checked(future.result())
        except KeyboardInterrupt:
            # The runs in progress got the signal too, and save themselves.
            pool.shutdown(cancel_futures=True)
            raise


def _ignore_interrupts() -> None:
    """Between two runs; a run in progress handles the signal, and saves itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _checked(outcome: str | None) -> str:
    if outcome is None:
        raise KeyboardInterrupt
    return outcome


def _train(config: TrainConfig) -> str | None:
    """Why a run failed, "" if it did not, None if it was interrupted."""
    from alm_torchrl.runs.train import train

    path = config.run_path
    path.mkdir(parents=True, exist_ok=True)
    with (
        (path / LOG).open("a", encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        try:
            code = train(config)
        except UserError as error:
            return str(error)
    return None if code else ""


def _steps_done(config: TrainConfig) -> int:
    path = config.run_path
    if not holds_run(path) or not (path / "metrics.csv").is_file():
        return 0
    rows = read_metrics(path / "metrics.csv")
    return rows[-1]["training_step"] if rows else 0


@contextmanager
def _display(configs: Sequence[TrainConfig]) -> Iterator[None]:
    """A bar over the training steps of all runs, read from their folders."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "the progress bar needs tqdm: pip install 'alm_torchrl[cli]'"
        ) from error
    total = {config.run_path: config.total_steps for config in configs}
    # Where another stream is put in place of stderr, the bar stays on the terminal.
    bar = tqdm(total=sum(total.values()), unit="step", file=sys.stderr)
    done = threading.Event()

    def refresh() -> None:
        steps = _progress(configs)
        bar.n = sum(min(steps[path], total[path]) for path in total)
        complete = sum(steps[path] >= total[path] for path in total)
        bar.set_postfix_str(f"{complete} of {len(total)} runs complete")

    def watch() -> None:
        while not done.wait(2.0):
            refresh()

    refresh()
    bar.initial = bar.n
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        refresh()
        bar.close()


def _progress(configs: Sequence[TrainConfig]) -> Mapping[Path, int]:
    return {config.run_path: _steps_done(config) for config in configs}
