"""Signals that stop a training, which is saved, or what waits for several."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from alm_torchrl.training.alm_trainer import ALMTrainer

__all__ = ["interrupt_on_signal", "stop_on_signal"]

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def stop_on_signal(trainer: ALMTrainer) -> Iterator[list[int]]:
    """Lets signals stop a trainer after its current step, which it saves.

    An exception inside a step would leave parameters half updated. A second SIGINT
    does not wait. Yields the list of the signal that came first. Only the main thread
    can handle signals; elsewhere, and where a scheduler handles one, nothing changes.
    """
    signals: list[int] = []

    def request_stop(number: int, frame: FrameType | None) -> None:
        signals[:] = signals or [number]
        trainer.request_stop(signal.Signals(number).name)
        signal.signal(signal.SIGINT, previous.get(signal.SIGINT, signal.SIG_DFL))
        # The signal may have come in the middle of a print(), which cannot be nested,
        # or because the terminal is gone.
        with suppress(OSError):
            os.write(2, b"\nStopping after this step; Ctrl-C again stops at once.\n")

    free = [name for name in _SIGNALS if _is_free(name)]
    with _handling(free, request_stop) as previous:
        yield signals


@contextmanager
def interrupt_on_signal() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP do what Ctrl-C does, in the main thread.

    :class:`KeyboardInterrupt` leaves the block with the number of the signal.
    """
    signals: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        raise KeyboardInterrupt(number)

    # nohup ignores SIGHUP.
    names = [
        name
        for name in ("SIGTERM", "SIGHUP")
        if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN
    ]
    with _handling(names, interrupt):
        try:
            yield
        except KeyboardInterrupt as error:
            # A library may have raised another one in its place.
            raise KeyboardInterrupt((signals or [signal.SIGINT])[0]) from error


@contextmanager
def _handling(names: Sequence[str], handler: Handler) -> Iterator[dict[int, Any]]:
    """Handles signals, in the main thread only; yields the handlers before."""
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in names:
            number = getattr(signal, name)
            previous[number] = signal.signal(number, handler)
    try:
        yield previous
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _is_free(name: str) -> bool:
    """Whether a signal exists and has no other handler."""
    number = getattr(signal, name, None)
    free = [signal.SIG_DFL, signal.default_int_handler]
    if name == "SIGINT":
        # Ignored by those that start runs in the background.
        free.append(signal.SIG_IGN)
    return number is not None and signal.getsignal(number) in free
