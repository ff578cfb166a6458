"""Runs in processes of this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from alm_torchrl.experiments.worker import Outcomes, make_run
from alm_torchrl.runs.folder import available_cores
from alm_torchrl.runs.settings import TrainConfig
from alm_torchrl.runs.signals import interrupt_on_signal

__all__ = ["run_locally"]


def run_locally(configs: Sequence[TrainConfig], *, jobs: int) -> Outcomes:
    """Makes runs, each in a process of its own; gives them as they end.

    Closed before the end, or interrupted, it has the runs in progress saved.

    Args:
        configs: settings of the runs, each with a folder.

    Keyword Args:
        jobs: runs at once; with one, this process makes them.

    Yields:
        tuple: the settings, and why the run failed, or ``""``.

    Raises:
        KeyboardInterrupt: after SIGINT, SIGTERM or SIGHUP, with its number.
    """
    if jobs == 1:
        for config in configs:
            code, why = make_run(config)
            if code > 1:
                raise KeyboardInterrupt(code - 128)
            yield config, why
        return
    at_once = max(1, min(jobs, len(configs)))
    threads = max(1, available_cores() // at_once)
    waiting = [
        replace(config, threads=min(config.threads or threads, threads))
        for config in reversed(configs)
    ]
    # A process that has used PyTorch's threads cannot be forked.
    context = get_context("spawn")
    running: dict[Any, tuple[Any, TrainConfig]] = {}
    try:
        with interrupt_on_signal():
            while waiting or running:
                while waiting and len(running) < at_once:
                    config = waiting.pop()
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(
                        target=_send_outcome, args=(make_run, config, sender)
                    )
                    process.start()
                    sender.close()
                    running[receiver] = process, config
                ready: list[Any] = list(wait(list(running)))
                for receiver in ready:
                    process, config = running[receiver]
                    try:
                        _, reason = receiver.recv()
                    except EOFError:
                        reason = "its process was killed, perhaps for lack of memory"
                    process.join()
                    del running[receiver]
                    yield config, reason
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _send_outcome(
    make: Callable[[TrainConfig], tuple[int, str]],
    config: TrainConfig,
    sender: Connection,
) -> None:
    with suppress(KeyboardInterrupt):
        sender.send(make(config))
