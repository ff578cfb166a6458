"""Runs as tasks of a Ray cluster whose nodes share a file system."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from alm_torchrl.experiments.worker import Outcomes, Retries, make_run
from alm_torchrl.runs.settings import TrainConfig
from alm_torchrl.runs.signals import interrupt_on_signal

__all__ = ["run_on_ray"]

SAVING = 60.0
"""Seconds that interrupted runs have to save themselves."""


def run_on_ray(
    configs: Sequence[TrainConfig],
    *,
    address: str | None = None,
    jobs: int | None = None,
    gpus: float = 0.0,
) -> Outcomes:
    """Makes runs as Ray tasks, each in a process of its own; gives them as they end.

    All that a run needs is in its folder: where its process or node is lost, another
    one continues from its last checkpoint. Closed before the end, or interrupted, it
    has the runs in progress saved. A run has ``threads`` cores, or one.

    Args:
        configs: settings of the runs, each with a folder that all nodes can reach.

    Keyword Args:
        address: of the cluster, as :func:`ray.init` takes it; not used where Ray is
            connected already. Default: ``None``, the one that ``RAY_ADDRESS`` names,
            or one that runs here, or else one that is started.
        jobs: runs at once. Default: ``None``, as many as the cluster can take.
        gpus: share of a GPU that each run has. Default: ``0.0``.

    Yields:
        tuple: the settings, and why the run failed, or ``""``.

    Raises:
        ImportError: if Ray is missing.
        ValueError: if there is no cluster at the address.
        KeyboardInterrupt: after SIGINT, SIGTERM or SIGHUP.
    """
    try:
        import ray
        from ray import exceptions
    except ImportError as error:
        raise ImportError(
            "the engine ray needs Ray: pip install 'alm_torchrl[ray]'"
        ) from error
    losses = (
        exceptions.WorkerCrashedError,
        exceptions.NodeDiedError,
        exceptions.LocalRayletDiedError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,
    )
    retries, waiting = Retries(), list(reversed(configs))
    pending: dict[Any, TrainConfig] = {}
    with ExitStack() as stack:
        if not ray.is_initialized():
            _connect(address)
            stack.callback(ray.shutdown)
        # A fresh process: no memory, thread or random number is left from another run.
        task = ray.remote(max_calls=1, max_retries=0)(make_run)
        stack.callback(_cancel, pending)
        # After Ray, which handles SIGTERM too.
        stack.enter_context(interrupt_on_signal())
        while waiting or pending:
            while waiting and (jobs is None or len(pending) < jobs):
                config = waiting.pop()
                config = replace(config, threads=config.threads or 1)
                options: dict[str, Any] = {"num_cpus": config.threads, "num_gpus": gpus}
                options |= {"name": config.run_path.name}
                spread = task.options(scheduling_strategy="SPREAD", **options)
                pending[spread.remote(config)] = config
            ready, _ = ray.wait(list(pending), num_returns=1, timeout=1.0)
            for reference in ready:
                config = pending.pop(reference)
                lost = False
                try:
                    code, reason = ray.get(reference)
                    lost = code > 1
                except losses as error:
                    lost, reason = True, f"lost too often: {_line(error)}"
                except exceptions.RayError as error:
                    reason = _line(error)
                if lost and retries.again(config):
                    waiting.append(config)
                else:
                    yield config, reason


def _connect(address: str | None) -> None:
    import ray

    given = address or os.environ.get("RAY_ADDRESS", "")
    host, _, port = given.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():
            # Ray itself would try for minutes.
            socket.create_connection((host.strip("[]"), int(port)), 10).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except OSError as error:
        raise ValueError(
            f"--address: expected that of a Ray cluster, got {given!r}: {error}"
        ) from error


def _cancel(pending: dict[Any, TrainConfig]) -> None:
    """Interrupts tasks, which then save, and waits for them."""
    import ray

    for reference in pending:
        ray.cancel(reference)
    if pending:
        ray.wait(list(pending), num_returns=len(pending), timeout=SAVING)


def _line(error: Exception) -> str:
    """The kind of an error of Ray and the last line of its text."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"
