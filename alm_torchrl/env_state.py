"""The complete state of an environment in mid-episode, to go on exactly.

Most Gymnasium environments need nothing for it: see :func:`environment_state` for what
is read off them. An environment that keeps state elsewhere (in C, in another process,
in objects of its own) offers two methods, either on the ``gymnasium.Env`` (or on a
wrapper) or on the TorchRL ``EnvBase``:

``checkpoint_state() -> dict[str, Any]``
    Everything that later steps and resets depend on, the random generators
    (``self.np_random``) included: numbers, strings, bools, ``None``, NumPy arrays,
    torch tensors, random generators, and lists, tuples, deques and dictionaries of
    such. Arrays are copied, so that there is no need to do so.
``load_checkpoint_state(state: dict[str, Any]) -> None``
    Takes what the other method returned, in an environment made in the same way.

The two replace what would be read off that environment; the wrappers around it are
still looked after.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import gymnasium
from gymnasium.wrappers import RecordEpisodeStatistics
from torchrl.envs import EnvBase, GymWrapper, TransformedEnv

from alm_torchrl.plain_state import (
    CONSTANT,
    EnvironmentStateError,
    Reader,
    Writer,
    is_drawing,
)

__all__ = ["EnvironmentStateError", "environment_state", "load_environment_state"]

_FORMAT = 1
_PROTOCOL = ("checkpoint_state", "load_checkpoint_state")
# What an environment was made with, and how it is looked at.
_NOT_STATE = (
    *("env", "spec", "_cached_spec", "metadata", "_metadata", "render_mode"),
    *("_saved_kwargs", "_ezpickle_args", "_ezpickle_kwargs"),
)
# Where the file of a model lies does not matter: the models themselves are compared.
_NOT_COMPARED = (
    *("xml_file", "render_mode", "width", "height", "camera_id", "camera_name"),
)


def environment_state(env: EnvBase) -> dict[str, Any]:
    """Takes the complete state of an environment, in mid-episode too.

    Below TorchRL's transforms (whose state travels in TensorDicts), these are kept for
    the Gymnasium environment and each wrapper around it: attributes that are numbers,
    strings, arrays, tensors, lists, tuples, dictionaries or deques of such, running
    moments, NumPy's and Python's random generators, those of the spaces, and MuJoCo
    simulations. Functions, specs, models and renderers are taken as constant; state
    that a function keeps for itself is not seen, nor are changes to class attributes.
    An attribute of any other type is an error, which the two methods described in
    :mod:`alm_torchrl.env_state` remedy.

    Args:
        env: An environment without batch dimensions: a ``GymWrapper`` or ``GymEnv``,
            or an ``EnvBase`` with ``checkpoint_state`` and ``load_checkpoint_state``;
            transformed or not. It is left as it is.

    Returns:
        Nested dictionaries with string keys and lists of numbers, bools, strings,
        ``None``, arrays and tensors; nothing in it is shared with ``env``. Integers
        may have 128 bits.

    Raises:
        EnvironmentStateError: If the environment has state that cannot be read. The
            message names the environment and the attribute.

    Example:
        >>> from alm_torchrl.envs import make_env
        >>> env = make_env("Hopper-v5", seed=0)
        >>> first_steps = env.rollout(5)
        >>> state = environment_state(env)
        >>> other = make_env("Hopper-v5", seed=1)
        >>> load_environment_state(other, state)
        >>> step = env.rand_action(env.reset().empty())
        >>> load_environment_state(env, state)
        >>> a, b = env.step(step.clone()), other.step(step.clone())
        >>> bool((a["next", "observation"] == b["next", "observation"]).all())
        True
    """
    base, layers = _layers(env)
    writer = Writer(layers)
    return {
        "format": _FORMAT,
        "env": _class(base),
        "layers": [
            {**_description(layer), **_write(writer, index, layer)}
            for index, layer in enumerate(layers)
        ],
    }


def load_environment_state(env: EnvBase, state: Mapping[str, Any]) -> None:
    """Puts an environment into a state, from which it goes on bit for bit.

    Args:
        env: An environment made in the same way as the one whose state it is; it may
            have been seeded, reset and stepped, or nothing of this. How it is rendered
            stays as it is. If loading fails, its own state is undefined.
        state: What :func:`environment_state` returned.

    Raises:
        ValueError: If ``state`` was taken from another environment: other wrappers,
            another task, other constructor arguments or another MuJoCo model (an
            environment that changes its model needs the two methods).
        EnvironmentStateError: If ``env`` cannot take the state.

    Example:
        >>> from alm_torchrl.envs import make_env
        >>> env = make_env("Pendulum-v1", action_bounds="rescale", seed=0)
        >>> _ = env.rollout(5)
        >>> state = environment_state(env)
        >>> step = env.rand_action(env.reset().empty())
        >>> rewards = []
        >>> for _ in range(2):
        ...     load_environment_state(env, state)
        ...     rewards.append(env.step(step.clone())["next", "reward"])
        >>> bool(rewards[0] == rewards[1])
        True
    """
    base, layers = _layers(env)
    if state.get("format") != _FORMAT:
        raise ValueError(
            f"state must be an environment's state of format {_FORMAT}, got format "
            f"{state.get('format')!r}"
        )
    here = [_class(base), *map(_class, layers)]
    there = [state["env"], *(saved["class"] for saved in state["layers"])]
    if here != there:
        raise ValueError(
            f"state must come from an environment of the same classes, {here}, got "
            f"one of {there}"
        )
    for layer, saved in zip(layers, state["layers"], strict=True):
        for name, value in _description(layer).items():
            if value != saved[name]:
                raise ValueError(
                    f"state must come from a {type(layer).__name__} with the same "
                    f"{name}, {value!r}, got {saved[name]!r}"
                )
    reader = Reader(layers)
    for index, (layer, saved) in enumerate(zip(layers, state["layers"], strict=True)):
        _read(reader, index, layer, saved)


def _layers(env: EnvBase) -> tuple[EnvBase, tuple[Any, ...]]:
    """The environment under the transforms, and those that have the state."""
    base = env
    while isinstance(base, TransformedEnv):
        base = base.base_env
    name = type(base).__name__
    if base.batch_size:
        raise EnvironmentStateError(
            f"only an environment without batch dimensions can give its state, but "
            f"{name} has batch size {list(base.batch_size)}"
        )
    if _has_protocol(base):
        return base, (base,)
    if not isinstance(base, GymWrapper) or not _class(base).startswith("torchrl."):
        raise EnvironmentStateError(
            f"{name} is not a GymWrapper, so that its state cannot be read off it: "
            f"give it the methods {' and '.join(_PROTOCOL)}"
        )
    layer = base._env
    if not isinstance(layer, gymnasium.Env):
        raise EnvironmentStateError(
            f"{name} wraps a {_class(layer)}, not a gymnasium.Env: its state cannot "
            "be read off it"
        )
    layers = [layer]
    while isinstance(layer, gymnasium.Wrapper):
        layer = layer.env
        layers.append(layer)
    for layer in layers:
        _check_readable(layer)
    return base, tuple(layers)


def _has_protocol(layer: object) -> bool:
    # On the class: environments forward unknown attributes to those they wrap.
    offered = [name for name in _PROTOCOL if hasattr(type(layer), name)]
    if len(offered) == 1:
        raise EnvironmentStateError(
            f"{type(layer).__name__} has {offered[0]}, but needs both of "
            f"{' and '.join(_PROTOCOL)}"
        )
    return bool(offered)


def _check_readable(layer: object) -> None:
    """Refuses instances that hold more than their dictionary of attributes."""
    kind = type(layer)
    pointers = (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
    plain = object.__basicsize__ + pointers * tuple.__itemsize__
    if kind.__basicsize__ > plain and not _has_protocol(layer):
        raise EnvironmentStateError(
            f"{kind.__name__} keeps state outside of its attributes (in C or in "
            f"slots): give it the methods {' and '.join(_PROTOCOL)}"
        )


def _class(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _description(layer: Any) -> dict[str, Any]:  # noqa: ANN401
    """What must agree between the giver of a state and its taker."""
    spec = vars(layer).get("spec")
    arguments = {**(spec.kwargs if spec is not None else {})}
    arguments.update(vars(layer).get("_saved_kwargs", {}))
    return {
        "class": _class(layer),
        "task": None if spec is None else spec.id,
        "arguments": {
            name: value
            for name, value in arguments.items()
            if name not in _NOT_COMPARED
            and isinstance(value, bool | int | float | str | None)
        },
    }


def _write(writer: Writer, index: int, layer: Any) -> dict[str, Any]:  # noqa: ANN401
    if _has_protocol(layer):
        own = writer.write(layer.checkpoint_state(), f"{index}.checkpoint_state()")
        return {"own": own}
    attributes, constants = {}, []
    # Sorted: values that two attributes share are where the first of them is read.
    for name, value in sorted(vars(layer).items()):
        if name in _NOT_STATE:
            continue
        if _is_clock(layer, name):
            value = value - time.perf_counter()
        written = writer.write(value, f"{index}.{name}")
        if written is CONSTANT:
            constants.append(name)
        else:
            attributes[name] = written
    return {"attributes": attributes, "constants": constants}


def _read(reader: Reader, index: int, layer: Any, saved: Mapping[str, Any]) -> None:  # noqa: ANN401
    if "own" in saved:
        own = reader.read(saved["own"], f"{index}.checkpoint_state()")
        layer.load_checkpoint_state(own)
        return
    attributes = vars(layer)
    known = {*_NOT_STATE, *saved["attributes"], *saved["constants"]}
    for name in [name for name in attributes if name not in known]:
        unknown = Writer(reader.layers).write(attributes[name], f"{index}.{name}")
        if unknown is not CONSTANT:
            del attributes[name]
    for name, written in sorted(saved["attributes"].items()):
        current = attributes.get(name)
        value = reader.read(written, f"{index}.{name}", current)
        if _is_clock(layer, name):
            value = value + time.perf_counter()
        if not is_drawing(current):
            attributes[name] = value


def _is_clock(layer: object, name: str) -> bool:
    """Whether an attribute counts from an origin that no other process shares."""
    return isinstance(layer, RecordEpisodeStatistics) and name == "episode_start_time"
