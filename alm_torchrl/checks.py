"""Checks of arguments. Each names the argument, what was expected and what was got."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# Larger numbers overflow somewhere inside PyTorch.
LARGEST = 2**63 - 1
LARGEST_SIZE = 2**16  # Of a layer; two such layers have 17 gigabytes of weights.
LARGEST_FLOAT = (2 - 2**-23) * 2.0**127  # Of float32.


def check_integer(name: str, value: object, low: int = 1, high: float = LARGEST) -> int:
    """Returns an integer in ``[low, high]``; NumPy integers pass, booleans do not.

    >>> check_integer("horizon", 0)
    Traceback (most recent call last):
    ValueError: horizon: expected an integer >= 1, got 0.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not low <= int(value) <= min(high, LARGEST):  # type: ignore[call-overload]
        upper = f" and <= {high}" if high < LARGEST else ""
        raise ValueError(f"{name}: expected an integer >= {low}{upper}, got {value!r}.")
    return int(value)  # type: ignore[call-overload]


def check_number(
    name: str,
    value: object,
    low: float = 0.0,
    high: float = LARGEST_FLOAT,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Returns a finite number in the range, without a limit that is open.

    >>> check_number("gamma", 1.0, 0, 1, open_high=True)
    Traceback (most recent call last):
    ValueError: gamma: expected a number >= 0 and < 1, got 1.0.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    given = float(value) if number else math.nan  # type: ignore[arg-type]
    above = given > low if open_low else given >= low
    below = given < high if open_high else given <= high
    if not (abs(given) <= LARGEST_FLOAT and above and below):
        expected = f"a number {'>' if open_low else '>='} {low:g}"
        if high < LARGEST_FLOAT:
            expected += f" and {'<' if open_high else '<='} {high:g}"
        raise ValueError(f"{name}: expected {expected}, got {value!r}.")
    return given


def check_discount(name: str, value: object) -> float:
    """Returns a discount or trace decay in [0, 1]; ``gamma`` is below 1.

    >>> check_discount("gamma", 1.0)
    Traceback (most recent call last):
    ValueError: gamma: expected a number >= 0 and < 1, got 1.0.
    """
    return check_number(name, value, 0, 1, open_high=name == "gamma")


def check_choice(name: str, value: T, choices: Iterable[object]) -> T:
    """Returns a value that equals one of the choices and has its type.

    >>> check_choice("precision", "fp16", ("fp32", "bf16"))
    Traceback (most recent call last):
    ValueError: precision: expected 'fp32' or 'bf16', got 'fp16'.
    """
    options = list(choices)
    if not any(type(value) is type(option) and value == option for option in options):
        expected = " or ".join(repr(option) for option in options)
        raise ValueError(f"{name}: expected {expected}, got {value!r}.")
    return value


def check_type(
    name: str, value: T, expected: type | tuple[type, ...], hint: str = ""
) -> T:
    """Returns an instance of the type, or of one of the types.

    >>> check_type("schedule", 0.3, dict)
    Traceback (most recent call last):
    TypeError: schedule: expected dict, got float.
    """
    if not isinstance(value, expected):
        types = expected if isinstance(expected, tuple) else (expected,)
        names = " or ".join(one.__name__ for one in types)
        got = f"{type(value).__name__}{hint and f' ({hint})'}"
        raise TypeError(f"{name}: expected {names}, got {got}.")
    return value


def check_steps(
    *, warmup_steps: int, capacity: int, batch_size: int, horizon: int
) -> tuple[int, int, int, int]:
    """Returns the numbers if the warm-up fills a batch and fits into the replay.

    >>> check_steps(warmup_steps=10, capacity=100, batch_size=16, horizon=3)
    Traceback (most recent call last):
    ValueError: batch_size: expected at most warmup_steps=10, got 16.
    """
    warmup_steps = check_integer("warmup_steps", warmup_steps)
    capacity = check_integer("capacity", capacity)
    batch_size = check_integer("batch_size", batch_size)
    horizon = check_integer("horizon", horizon)
    for name, value, fits, expected in (
        ("warmup_steps", warmup_steps, warmup_steps >= horizon, f"least {horizon=}"),
        ("batch_size", batch_size, batch_size <= warmup_steps, f"most {warmup_steps=}"),
        ("capacity", capacity, capacity >= warmup_steps, f"least {warmup_steps=}"),
    ):
        if not fits:
            raise ValueError(f"{name}: expected at {expected}, got {value}.")
    return warmup_steps, capacity, batch_size, horizon


def check_device(name: str, value: object) -> torch.device:
    """Returns a device that this machine has.

    >>> check_device("device", "cpu")
    device(type='cpu')
    """
    import torch

    try:
        device = torch.device(value)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name}: expected the name of a PyTorch device, got {value!r}."
        ) from error
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise ValueError(
            f"{name}: expected 'cpu' or one of the {found} CUDA devices that PyTorch "
            f"finds here, got {str(device)!r}."
        )
    return device


def check_output(name: str, path: Path) -> None:
    """Checks that a file or folder can be written, before a long computation."""
    path = path.absolute()
    place = next(place for place in path.parents if place.exists())
    if not place.is_dir():
        raise NotADirectoryError(
            f"{name}: expected a path that can be made, got {str(path)!r}, but "
            f"{str(place)!r} is a file."
        )
    if not os.access(path if path.exists() else place, os.W_OK):
        raise PermissionError(
            f"{name}: expected a place that can be written to, got {str(path)!r} "
            "(no permission)."
        )
