"""Timing of several contenders side by side, and the records it returns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from alm_torchrl.checks import check_integer

__all__ = ["Contender", "LeftOut", "Timing", "interleave", "synchronizer"]

Clock = Callable[[], float]


@dataclass(frozen=True)
class Contender:
    """Something to time."""

    name: str
    """What the table calls it."""
    call: Callable[[], Any]
    """Does the work once."""
    per: int = 1
    """Units of work in one call; times are given for one unit."""
    flop: int | None = None
    """Operations of one unit in matrix products, where they were counted."""
    memory: int | None = None
    """Bytes of one call at their peak, above what it found, where measured."""
    kind: Literal["update", "draw", "matrix product"] = "update"
    """What it does: only updates are compared with each other."""
    precision: str = "fp32"
    """Type of the matrix products: ``"fp32"``, ``"tf32"`` or ``"bf16"``."""


@dataclass(frozen=True)
class LeftOut:
    """A row that could not be measured."""

    name: str
    """What the table would call it."""
    reason: str
    """Why it is missing."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one unit of work, one for each round.

    Args:
        name: what was timed.
        seconds: the times in the order of the rounds.

    Examples:
        >>> timing = Timing("walk", (3.0, 1.0, 2.0, 5.0, 4.0))
        >>> timing.median, timing.quartiles
        (3.0, (2.0, 4.0))
    """

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the rounds."""
        low, high = np.percentile(self.seconds, [25, 75])
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """Name, ``median``, ``q1``, ``q3`` and ``minimum`` in seconds, ``rounds``."""
        low, high = self.quartiles
        return {
            "name": self.name,
            "median": self.median,
            "q1": low,
            "q3": high,
            "minimum": min(self.seconds),
            "rounds": len(self.seconds),
        }


def interleave(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    warmup: int = 1,
    clock: Clock = time.perf_counter,
    synchronize: Callable[[], None] | None = None,
) -> list[Timing]:
    """Times contenders in turn, so that all meet the same disturbances.

    Each round calls every contender once. The next round begins with the next
    contender, so that none always follows the same one.

    Args:
        contenders: what to time, at least one.

    Keyword Args:
        rounds: timed calls of each.
        warmup: rounds before them that are not timed. Default: ``1``.
        clock: gives seconds. Default: ``time.perf_counter``.
        synchronize: waits for the device; its time counts as the contender's.
            Default: ``None``.

    Returns:
        list[Timing]: in the order of the contenders.

    Raises:
        ValueError: if there is no contender, or a number is out of range.

    Examples:
        >>> pair = [Contender("a", lambda: None), Contender("b", lambda: None)]
        >>> [timing.name for timing in interleave(pair, rounds=3)]
        ['a', 'b']
    """
    if not contenders:
        raise ValueError("contenders: expected at least one, got none.")
    check_integer("rounds", rounds)
    check_integer("warmup", warmup, 0)
    wait = synchronize or (lambda: None)
    seconds: list[list[float]] = [[] for _ in contenders]
    for turn in range(warmup + rounds):
        for place in range(len(contenders)):
            index = (turn + place) % len(contenders)
            contender = contenders[index]
            wait()
            began = clock()
            contender.call()
            wait()
            elapsed = clock() - began
            if turn >= warmup:
                seconds[index].append(elapsed / contender.per)
    return [
        Timing(contender.name, tuple(times))
        for contender, times in zip(contenders, seconds, strict=True)
    ]


def synchronizer(device: torch.device | str) -> Callable[[], None] | None:
    """What waits for a device: nothing for the CPU.

    Examples:
        >>> synchronizer("cpu") is None
        True
    """
    return torch.cuda.synchronize if torch.device(device).type == "cuda" else None
