"""Makes the runs of an experiment: several at once, behind one progress bar."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import (
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from alm_torchrl.runs.folder import (
    Run,
    available_cores,
    holds_run,
    read_metrics,
    read_run,
)
from alm_torchrl.runs.settings import TrainConfig, UserError

__all__ = ["is_complete", "make_runs"]


def is_complete(config: TrainConfig) -> bool:
    """Whether the run of these settings exists and was evaluated at its end."""
    return _steps_done(config) >= config.total_steps


def make_runs(
    configs: Sequence[TrainConfig], *, jobs: int
) -> tuple[list[Run], dict[Path, str]]:
    """Makes the runs that are not complete; those begun continue where they stopped.

    What they print goes to ``train.log`` in their folders. One bar shows them all.

    Args:
        configs: settings of the runs, each with a folder (``run_path``) of its own.

    Keyword Args:
        jobs: runs at once, each in a process; with one, this process makes them.

    Returns:
        tuple: the complete runs, in the order given, and the folders of those that
        failed with the reasons.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the runs have been saved.
    """
    missing = [config for config in configs if not is_complete(config)]
    with _progress_bar(configs) if missing else nullcontext():
        outcomes = {config.run_path: why for config, why in _outcomes(missing, jobs)}
    made = [read_run(config.run_path) for config in configs if is_complete(config)]
    return made, {path: reason for path, reason in outcomes.items() if reason}


def _outcomes(
    configs: Sequence[TrainConfig], jobs: int
) -> Iterator[tuple[TrainConfig, str]]:
    """Trains, and gives for each run the reason why it failed, or ""."""
    if jobs == 1:
        yield from ((config, _train(config)) for config in configs)
        return
    at_once = max(1, min(jobs, len(configs)))
    threads = max(1, available_cores() // at_once)
    with ThreadPoolExecutor(at_once) as pool:
        futures = {}
        for config in configs:
            limited = replace(config, threads=min(config.threads or threads, threads))
            futures[pool.submit(_train_alone, limited)] = config
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except KeyboardInterrupt:
            # The runs in progress got the signal too, and save themselves.
            pool.shutdown(cancel_futures=True)
            raise


def _train_alone(config: TrainConfig) -> str:
    """Trains in a process of its own: one that is killed takes no other with it."""
    # A process that has used PyTorch's threads cannot be forked.
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            return process.submit(_train, config).result()
        except BrokenProcessPool:
            return "its process was killed, perhaps for lack of memory"


def _train(config: TrainConfig) -> str:
    """Why a run failed, or ""; a KeyboardInterrupt where it was interrupted."""
    from alm_torchrl.runs.train import train

    config.run_path.mkdir(parents=True, exist_ok=True)
    with (
        (config.run_path / "train.log").open("a", encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        try:
            code = train(config)
        except UserError as error:
            return str(error)
        except Exception as error:
            # A fault of one run is no reason to lose the others.
            traceback.print_exc()
            return f"{type(error).__name__}: {error} (see {log.name})"
    if code:
        raise KeyboardInterrupt
    return ""


def _steps_done(config: TrainConfig) -> int:
    metrics = config.run_path / "metrics.csv"
    if not holds_run(config.run_path) or not metrics.is_file():
        return 0
    rows = read_metrics(metrics)
    return rows[-1]["training_step"] if rows else 0


@contextmanager
def _progress_bar(configs: Sequence[TrainConfig]) -> Iterator[None]:
    """A bar over the training steps of all runs, read from their folders."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "the progress bar needs tqdm: pip install 'alm_torchrl[cli]'"
        ) from error
    # The file is given: a run in this process redirects sys.stderr.
    total = sum(config.total_steps for config in configs)
    bar = tqdm(total=total, unit="step", file=sys.stderr)
    done = threading.Event()

    def refresh() -> None:
        steps = [min(_steps_done(config), config.total_steps) for config in configs]
        pairs = zip(steps, configs, strict=True)
        complete = sum(step == config.total_steps for step, config in pairs)
        bar.n = sum(steps)
        bar.set_postfix_str(f"{complete} of {len(configs)} runs complete")

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
