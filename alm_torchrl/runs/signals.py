"""Signals that stop a training, which is saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from alm_torchrl.training.alm_trainer import ALMTrainer

__all__ = ["stop_on_signal"]

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


@contextmanager
def stop_on_signal(trainer: ALMTrainer) -> Iterator[list[int]]:
    """Lets signals stop a trainer after its current step, which it saves.

    An exception inside a step would leave parameters half updated. A second SIGINT
    does not wait. Yields the list of the signal that came first. Only the main thread
    can handle signals; elsewhere, and where a scheduler handles one, nothing changes.
    """
    signals: list[int] = []
    previous: dict[int, Any] = {}

    def request_stop(number: int, frame: FrameType | None) -> None:
        signals[:] = signals or [number]
        trainer.request_stop(signal.Signals(number).name)
        signal.signal(signal.SIGINT, previous.get(signal.SIGINT, signal.SIG_DFL))
        # The signal may have come in the middle of a print(), which cannot be nested,
        # or because the terminal is gone.
        with suppress(OSError):
            os.write(2, b"\nStopping after this step; Ctrl-C again stops at once.\n")

    if threading.current_thread() is threading.main_thread():
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and _is_free(number):
                previous[number] = signal.signal(number, request_stop)
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_free(number: int) -> bool:
    """Whether a signal has no other handler."""
    free = [signal.SIG_DFL, signal.default_int_handler]
    if number == signal.SIGINT:
        # Ignored by those that start runs in the background.
        free.append(signal.SIG_IGN)
    return signal.getsignal(number) in free
