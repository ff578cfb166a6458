"""One run of a sweep in the process that makes it, on whatever engine."""

from __future__ import annotations

import os
import signal
import socket
import traceback
from collections.abc import Generator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from threading import Event

from alm_torchrl.runs.settings import TrainConfig, UserError
from alm_torchrl.training.rotation import numbered_checkpoints

__all__ = ["Outcomes", "Retries", "make_run", "where_it_runs"]

Outcomes = Generator[tuple[TrainConfig, str], None, None]
"""Runs as they end, and why each failed, or ``""``."""

LOCK_TIMEOUT = 60.0
"""Seconds for which the process of a lost node may go on and hold the lock."""

_NOTE = ".worker"


def make_run(config: TrainConfig, stop: Event | None = None) -> tuple[int, str]:
    """Trains in a run folder, and continues the run that is in it.

    What it prints goes to ``train.log`` in the folder.

    Args:
        config: the settings, with the folder.
        stop: once set, stops the training, which is saved. Default: ``None``.

    Returns:
        tuple: the number that :func:`~alm_torchrl.runs.train.train` returned, or 1;
        and why the run is not complete, or ``""``.
    """
    from alm_torchrl.runs.train import train

    config.run_path.mkdir(parents=True, exist_ok=True)
    note = config.run_path / _NOTE
    note.write_text(f"{socket.gethostname()}:{os.getpid()}", encoding="utf-8")
    with (
        (config.run_path / "train.log").open("a", encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        try:
            code = train(config, stop=stop, lock_timeout=LOCK_TIMEOUT)
        except UserError as error:
            return 1, str(error)
        except Exception as error:
            # A fault of one run is no reason to lose the others.
            traceback.print_exc()
            return 1, f"{type(error).__name__}: {error} (see {log.name})"
        finally:
            note.unlink(missing_ok=True)
    return code, f"stopped by {signal.Signals(code - 128).name}" if code else ""


def where_it_runs(folder: Path) -> str:
    """Host and process that make the run of a folder, or ``""``.

    A process that was killed is named until the run begins again.
    """
    try:
        return (folder / _NOTE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


class Retries:
    """Says whether a run whose process or node was lost begins again.

    Args:
        limit: losses in a row without a new checkpoint after which it does not.
            Default: ``3``.
    """

    def __init__(self, limit: int = 3) -> None:
        self.limit = limit
        self._lost: dict[Path, tuple[int, int]] = {}

    def again(self, config: TrainConfig) -> bool:
        """Counts a loss."""
        saved = numbered_checkpoints(config.run_path / "checkpoints")
        step = saved[-1][0] if saved else -1
        before, times = self._lost.get(config.run_path, (step, 0))
        times = times + 1 if step == before else 1
        self._lost[config.run_path] = (step, times)
        return times <= self.limit
