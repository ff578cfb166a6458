"""Saved state compared with a component's own, before anything is loaded."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = ["check_adam", "check_names", "check_state", "check_stepper"]


def check_state(saved: Any, own: Any, place: str) -> None:  # noqa: ANN401
    """Compares names, types, sizes, shapes and dtypes.

    What is empty in the component's own state can be anything in the saved one: it has
    nothing to be compared with. ``None`` stands for a number that is not known yet.

    Args:
        saved: the saved state.
        own: the component's own state.
        place: what the states are of, for the message.

    Raises:
        ValueError: where they differ first.

    Examples:
        >>> own = {"weight": torch.zeros(2, 3), "steps": 0}
        >>> check_state({"weight": torch.ones(2, 3), "steps": 7}, own, "net")
        >>> check_state({"weight": torch.ones(2, 4), "steps": 7}, own, "net")
        Traceback (most recent call last):
        ...
        ValueError: net.weight: expected torch.float32 [2, 3], got torch.float32 [2, 4]
    """
    if is_lazy(own):
        return
    expected, got = _kind(own), _kind(saved)
    optional = {expected, got} in ({"None", "int"}, {"None", "float"})
    if expected != got and not optional and (expected, got) != ("float", "int"):
        raise ValueError(f"{place}: expected {expected}, got {got}")
    if isinstance(own, Mapping) and own:
        check_names(saved, own, place)
        for name in own:
            check_state(saved[name], own[name], f"{place}.{name}")
    elif isinstance(own, list | tuple) and own:
        if len(saved) != len(own):
            raise ValueError(f"{place}: expected {len(own)} values, got {len(saved)}")
        for number, (value, like) in enumerate(zip(saved, own, strict=True)):
            check_state(value, like, f"{place}.{number}")


def check_names(saved: Mapping[Any, Any], own: Mapping[Any, Any], place: str) -> None:
    """Compares the names of two mappings.

    Raises:
        ValueError: if they differ.
    """
    if saved.keys() != own.keys():
        missing = sorted(map(str, own.keys() - saved.keys()))
        foreign = sorted(map(str, saved.keys() - own.keys()))
        raise ValueError(
            f"{place}: expected other names, missing are {missing[:5]}, not expected "
            f"are {foreign[:5]}"
        )


def check_stepper(saved: Any, stepper: Any) -> None:  # noqa: ANN401
    """Compares the saved state of a stepper with its optimizers and its loss.

    Raises:
        ValueError: naming the first entry or parameter that does not fit.
    """
    own, optimizers = stepper.state_dict(), stepper.optimizers
    own["optimizers"] = {name: {} for name in optimizers}
    check_state(saved, {**own, "metrics": {}} if "metrics" in own else own, "stepper")
    if type(saved["count"]) is not int or saved["count"] < 0:
        raise ValueError(
            f"stepper.count: expected an integer >= 0, got {saved['count']!r}"
        )
    names: dict[Tensor, str] = {p: name for name, p in stepper.loss.named_parameters()}
    for name, optimizer in optimizers.items():
        check_adam(saved["optimizers"][name], optimizer, f"optimizers.{name}", names)
    for name, value in saved.get("metrics", {}).items():
        if not isinstance(value, Tensor) or value.ndim:
            raise ValueError(f"stepper.metrics.{name}: expected a scalar tensor")
    if "failure" in saved and saved["failure"][1] not in range(len(saved["terms"]) + 1):
        raise ValueError("stepper.failure: expected the position of one of the terms")


def check_adam(
    saved: Any,  # noqa: ANN401
    optimizer: torch.optim.Adam,
    place: str,
    names: Mapping[Tensor, str] | None = None,
) -> None:
    """Compares the saved state of an Adam with its parameters.

    Other shapes or dtypes would have the fused Adam write outside of its tensors.

    Args:
        saved: the saved state.
        optimizer: the optimizer.
        place: its name, for the message.
        names: the names of its parameters. Default: ``None``, their numbers.

    Raises:
        ValueError: naming the first parameter whose state does not fit.
    """
    own = optimizer.state_dict()
    groups = own["param_groups"]
    check_state(saved, {"state": {}, "param_groups": [{}] * len(groups)}, place)
    for group, options in zip(saved["param_groups"], groups, strict=True):
        # A scheduler may have added options.
        known = {name: group[name] for name in options.keys() & group.keys()}
        check_state(known, _as_floats(options), f"{place}.param_groups")
        if group["params"] != options["params"]:
            raise ValueError(f"{place}.param_groups: expected other parameters")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, entries in saved["state"].items():
        if number not in range(len(parameters)):
            raise ValueError(f"{place}: expected no parameter {number!r}")
        parameter = parameters[number]
        group = next(g for g in groups if number in g["params"])
        is_fused = saved["param_groups"][groups.index(group)]["fused"]
        dtype = torch.float32 if is_fused else torch.get_default_dtype()
        expected = dict.fromkeys(("exp_avg", "exp_avg_sq"), parameter)
        if group["amsgrad"]:
            expected["max_exp_avg_sq"] = parameter
        expected["step"] = torch.zeros((), dtype=dtype)
        name = (names or {}).get(parameter, f"parameter {number}")
        check_state(entries, expected, f"{place}: {name}")


def _as_floats(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in which a number may be a float where the default is an integer."""
    return {
        name: float(value) if type(value) is int else value
        for name, value in options.items()
    }


def _kind(value: Any) -> str:  # noqa: ANN401
    """What must be equal in saved and own state."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]  # Gymnasium's moments become scalars.
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, np.ndarray):
        # Of any precision: that of Gymnasium's moments grows.
        return f"an array of kind {value.dtype.kind!r} {list(value.shape)}"
    for kinds, name in (
        ((bool, np.bool_), "bool"),
        (numbers.Integral, "int"),
        (numbers.Real, "float"),
        (Mapping, "a mapping"),
        (list, "a list"),
        (tuple, "a tuple"),
    ):
        if isinstance(value, kinds):
            return name
    return "None" if value is None else type(value).__name__
