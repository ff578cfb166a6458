"""Checks of arguments, with errors that name what was expected and what was given."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path

import torch

__all__ = [
    "check_choice",
    "check_device",
    "check_integer",
    "check_number",
    "check_output",
    "check_steps",
    "check_type",
]


# What tensors hold: more overflows somewhere inside PyTorch.
LARGEST = 2**63 - 1
LARGEST_FLOAT = torch.finfo(torch.float32).max


def check_integer(name: str, value: object, low: int = 1, high: float = LARGEST) -> int:
    """Checks a whole number against its range.

    Args:
        name (str): what the error calls it.
        value (object): what was given; a NumPy integer will do, a bool will not.
        low (int): smallest value allowed. Default: ``1``.
        high (float): largest value allowed. Default: ``LARGEST``, what 64 bits hold.

    Returns:
        int: the value.

    Raises:
        ValueError: if it is no integer or outside the range.

    Examples:
        >>> check_integer("horizon", 3)
        3
        >>> check_integer("horizon", 0)
        Traceback (most recent call last):
        ValueError: horizon: expected an integer >= 1, got 0.
    """
    if (
        not isinstance(value, Integral)
        or isinstance(value, bool)
        or not low <= int(value) <= min(high, LARGEST)
    ):
        upper = f" and <= {high}" if high < LARGEST else ""
        raise ValueError(f"{name}: expected an integer >= {low}{upper}, got {value!r}.")
    return int(value)


def check_number(
    name: str,
    value: object,
    low: float = 0.0,
    high: float = LARGEST_FLOAT,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Checks a number against its range; infinity and NaN are outside of any.

    Args:
        name (str): what the error calls it.
        value (object): what was given; a NumPy number will do, a bool will not.
        low (float): lower limit. Default: ``0.0``.
        high (float): upper limit. Default: ``LARGEST_FLOAT``, what float32 holds.

    Keyword Args:
        open_low (bool): whether the lower limit itself is outside.
            Default: ``False``.
        open_high (bool): whether the upper limit itself is outside.
            Default: ``False``.

    Returns:
        float: the value.

    Raises:
        ValueError: if it is no number or outside the range.

    Examples:
        >>> check_number("gamma", 1.0, 0, 1, open_high=True)
        Traceback (most recent call last):
        ValueError: gamma: expected a number >= 0 and < 1, got 1.0.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    given = float(value) if number else math.nan  # type: ignore[arg-type]
    if (
        not abs(given) <= LARGEST_FLOAT
        or not (low < given if open_low else low <= given)
        or not (given < high if open_high else given <= high)
    ):
        expected = f"a number {'>' if open_low else '>='} {low:g}"
        if high < LARGEST_FLOAT:
            expected += f" and {'<' if open_high else '<='} {high:g}"
        raise ValueError(f"{name}: expected {expected}, got {value!r}.")
    return given


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Checks that a value is one of a few.

    Args:
        name (str): what the error calls it.
        value (object): what was given.
        choices (iterable): what is allowed.

    Raises:
        ValueError: if it is none of them.

    Examples:
        >>> check_choice("precision", "fp16", ("fp32", "bf16"))
        Traceback (most recent call last):
        ValueError: precision: expected 'fp32' or 'bf16', got 'fp16'.
    """
    options = list(choices)
    if not any(type(value) is type(option) and value == option for option in options):
        expected = " or ".join(repr(option) for option in options)
        raise ValueError(f"{name}: expected {expected}, got {value!r}.")


def check_type(
    name: str, value: object, expected: type | tuple[type, ...], hint: str = ""
) -> None:
    """Checks that a value is of a type, or of one of several.

    Args:
        name (str): what the error calls it.
        value (object): what was given.
        expected (type or tuple of type): what it must be an instance of.
        hint (str): how to get one, for the end of the message. Default: ``""``.

    Raises:
        TypeError: if it is not.

    Examples:
        >>> check_type("schedule", 0.3, dict)
        Traceback (most recent call last):
        TypeError: schedule: expected dict, got float.
    """
    if not isinstance(value, expected):
        types = expected if isinstance(expected, tuple) else (expected,)
        names = " or ".join(one.__name__ for one in types)
        raise TypeError(
            f"{name}: expected {names}, got {type(value).__name__}"
            f"{hint and f' ({hint})'}."
        )


def check_steps(
    *, warmup_steps: int, capacity: int, batch_size: int, horizon: int
) -> None:
    """Checks that the warm-up leaves enough to draw from, and that the replay holds it.

    Keyword Args:
        warmup_steps (int): environment steps before the first update.
        capacity (int): transitions that the replay holds.
        batch_size (int): slices, and transitions, of an update.
        horizon (int): steps of a slice.

    Raises:
        ValueError: if one is no positive integer, ``warmup_steps`` is below ``horizon``
            or ``batch_size``, or ``capacity`` below ``warmup_steps``.

    Examples:
        >>> check_steps(warmup_steps=10, capacity=100, batch_size=16, horizon=3)
        Traceback (most recent call last):
        ValueError: batch_size: expected at most warmup_steps=10, got 16.
    """
    check_integer("warmup_steps", warmup_steps)
    check_integer("capacity", capacity)
    check_integer("batch_size", batch_size)
    check_integer("horizon", horizon)
    if warmup_steps < horizon:
        raise ValueError(
            f"warmup_steps: expected at least horizon={horizon}, got {warmup_steps}."
        )
    if batch_size > warmup_steps:
        raise ValueError(
            f"batch_size: expected at most warmup_steps={warmup_steps}, got "
            f"{batch_size}."
        )
    if capacity < warmup_steps:
        raise ValueError(
            f"capacity: expected at least warmup_steps={warmup_steps}, got {capacity}."
        )


def check_device(name: str, value: object) -> torch.device:
    """Checks that a device exists on this machine.

    Args:
        name (str): what the error calls it.
        value (torch.device or str): what was given.

    Returns:
        torch.device: the device.

    Raises:
        ValueError: if it is no device, or a CUDA device that is not there.

    Examples:
        >>> check_device("device", "cpu")
        device(type='cpu')
    """
    try:
        device = torch.device(value)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name}: expected the name of a PyTorch device, got {value!r}."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{name}: expected 'cpu' or one of the {torch.cuda.device_count()} CUDA "
            f"devices that PyTorch finds here, got {str(device)!r}."
        )
    return device


def check_output(name: str, path: Path) -> None:
    """Checks that a file or folder can be written, before a long computation.

    Args:
        name (str): what the error calls it.
        path (Path): where it will be; folders that are missing can be made.

    Raises:
        PermissionError: if nothing can be written there.
        NotADirectoryError: if a part of the path is a file.

    Examples:
        >>> import tempfile
        >>> check_output("output", Path(tempfile.gettempdir()) / "new" / "film.gif")
    """
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
