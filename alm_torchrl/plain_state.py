"""Attributes of environments as plain data, and back.

Plain data are nested dictionaries with string keys and lists of numbers, bools,
strings, ``None``, NumPy arrays and torch tensors: what JSON and an array file can
hold. Everything else is a dictionary with one key that says what it was, such as
``{"tuple": [...]}``. Objects that two attributes share are written once, so that they
are shared again afterwards.
"""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from gymnasium import Env, spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers.utils import RunningMeanStd

from alm_torchrl.mujoco_state import load_simulator_state, simulator_state

__all__ = ["CONSTANT", "EnvironmentStateError", "Reader", "Writer", "is_drawing"]

_PLAIN = (type(None), bool, int, float, str)
_NUMBERS = "biufc"
_BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
_CONSTANTS = (
    Env,
    EnvSpec,
    type,
    types.ModuleType,
    types.FunctionType,
    types.GenericAlias,
    np.ufunc,
    type(np.mean),
    np.dtype,
    torch.dtype,
    torch.device,
)


class EnvironmentStateError(RuntimeError):
    """An environment cannot give its state, or cannot take the one it is given.

    Example:
        >>> from alm_torchrl import environment_state, make_env
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> env.base_env._env.unwrapped.memory = object()
        >>> environment_state(env)
        Traceback (most recent call last):
        alm_torchrl.plain_state.EnvironmentStateError: ...
    """


class _Constant:
    """The type of :data:`CONSTANT`."""


CONSTANT: Final = _Constant()
"""What :meth:`Writer.write` returns for what steps and resets do not change."""


def is_drawing(value: object) -> bool:
    """Whether ``value`` serves pictures only: no step or observation reads it."""
    module, name = type(value).__module__, type(value).__qualname__
    library = module.partition(".")[0]
    return (
        library in ("pygame", "glfw")
        or module == "gymnasium.envs.mujoco.mujoco_rendering"
        or (library == "mujoco" and name.startswith(("Mjv", "Mjr", "Renderer")))
    )


def _is_mujoco(value: object, name: str) -> bool:
    kind = type(value)
    return kind.__module__.partition(".")[0] == "mujoco" and kind.__qualname__ == name


class Writer:
    """Writes the attributes of one environment's layers as plain data.

    Args:
        layers: The environment and its wrappers. An attribute's place is the index
            of its layer, a dot and its name: ``"0._elapsed_steps"``.
    """

    def __init__(self, layers: tuple[object, ...]) -> None:
        self.layers = layers
        # Keeps what it has seen alive, so that no id is given out twice.
        self._seen: dict[int, tuple[object, Any]] = {}
        self._memory: dict[int, list[tuple[object, str]]] = {}

    def write(self, value: object, place: str) -> Any:  # noqa: ANN401
        """Returns ``value`` as plain data, or :data:`CONSTANT`.

        Args:
            value: Any attribute, or a part of one.
            place: Where it stands.

        Raises:
            EnvironmentStateError: If ``value`` is of an unknown type, or shares
                memory with another attribute in a way that cannot be made again.
        """
        if type(value) in _PLAIN:
            return value
        if isinstance(value, np.generic) and value.dtype.kind in _NUMBERS:
            return {"scalar": np.asarray(value)}
        if self._is_constant(value):
            return CONSTANT
        if type(value) is tuple:
            return self._items("tuple", value, place)
        if id(value) in self._seen:
            again = self._seen[id(value)][1]
            if again is None:
                raise self.error(place, "refers to itself")
            return again
        self._seen[id(value)] = (value, None)
        written = self._write_object(value, place)
        again = CONSTANT if written is CONSTANT else {"same": place}
        self._seen[id(value)] = (value, again)
        return written

    def error(self, place: str, reason: str) -> EnvironmentStateError:
        """An error that names the attribute at ``place`` and its layer."""
        return EnvironmentStateError(f"{_name(place, self.layers)} {reason}")

    def _is_constant(self, value: object) -> bool:
        if isinstance(value, types.MethodType | types.BuiltinMethodType):
            # A method of another object would hide that object's state.
            owner = value.__self__
            return isinstance(owner, type | types.ModuleType | None) or any(
                owner is layer for layer in self.layers
            )
        return (
            isinstance(value, _CONSTANTS)
            or _is_mujoco(value, "MjModel")
            or _is_mujoco(value, "MjSpec")
            or is_drawing(value)
        )

    def _write_object(self, value: Any, place: str) -> Any:  # noqa: ANN401
        if type(value) is np.ndarray and value.dtype.kind in _NUMBERS:
            return self._array(value, place)
        if type(value) is torch.Tensor:
            self._claim(value.untyped_storage().data_ptr(), value, place)
            return value.detach().clone()
        if type(value) is list:
            return self._items("list", value, place)
        if type(value) is deque:
            items = self._items("deque", value, place)
            if items is CONSTANT:
                return CONSTANT
            return {"deque": {"items": items["deque"], "size": value.maxlen}}
        if type(value) is dict:
            items = self._items("dict", value.values(), place, list(value))
            if items is CONSTANT:
                return CONSTANT
            keys = [self._key(key, place) for key in value]
            return {"dict": {"items": items["dict"], "keys": keys}}
        if isinstance(value, spaces.Space):
            generators = [space._np_random for space in _with_parts(value)]
            return self._items("space", generators, place)
        if type(value) is RunningMeanStd:
            moments = vars(value)
            return self._items("moments", moments.values(), place, list(moments))
        if _is_mujoco(value, "MjData"):
            try:
                return {"simulator": simulator_state(value)}
            except ValueError as error:
                raise self.error(place, f"cannot be saved: {error}") from error
        return self._generator(value, place)

    def _generator(self, value: object, place: str) -> dict[str, Any]:
        if type(value) is np.random.Generator:
            kind = type(value.bit_generator).__name__
            if kind in _BIT_GENERATORS:
                state = self.write(value.bit_generator.state, f"{place} state")
                return {"generator": {"kind": kind, "state": state}}
        if type(value) is np.random.RandomState:
            state = self.write(value.get_state(legacy=False), f"{place} state")
            return {"random_state": state}
        if type(value) is random.Random:
            return {"random": self.write(value.getstate(), f"{place} state")}
        raise self.error(place, f"is a {_type(value)}, whose state cannot be saved")

    def _key(self, key: object, place: str) -> Any:  # noqa: ANN401
        if type(key) not in (*_PLAIN, tuple):
            raise self.error(place, f"has a key that is a {_type(key)}")
        return self.write(key, f"{place} key")

    def _items(
        self,
        kind: str,
        items: Collection[object],
        place: str,
        names: list[Any] | None = None,
    ) -> Any:  # noqa: ANN401
        names = list(range(len(items))) if names is None else names
        written = [
            self.write(item, f"{place}[{name!r}]")
            for name, item in zip(names, items, strict=True)
        ]
        constant = [item is CONSTANT for item in written]
        if written and all(constant):
            return CONSTANT
        if any(constant):
            raise self.error(
                f"{place}[{names[constant.index(True)]!r}]",
                "is a constant among values; keep the two apart",
            )
        return {kind: written}

    def _array(self, value: np.ndarray, place: str) -> Any:  # noqa: ANN401
        root = _root(value)
        if _is_foreign(value):
            return {"view": value.copy()}
        self._claim(root.__array_interface__["data"][0], value, place)
        return value.copy()

    def _claim(
        self, address: int, value: np.ndarray | torch.Tensor, place: str
    ) -> None:
        """Refuses two attributes that overlap without being the same object."""
        if address == 0:
            return
        for other, first in self._memory.setdefault(address, []):
            apart = (
                isinstance(other, np.ndarray)
                and isinstance(value, np.ndarray)
                and not np.shares_memory(other, value)
            )
            if not apart:
                name = _name(first, self.layers)
                raise self.error(place, f"shares memory with {name}")
        self._memory[address].append((value, place))


class Reader:
    """Makes values again from the plain data of a :class:`Writer`.

    Args:
        layers: As in :class:`Writer`, of the environment that takes the state.
    """

    def __init__(self, layers: tuple[object, ...]) -> None:
        self.layers = layers
        self._made: dict[str, object] = {}

    def read(self, written: Any, place: str, current: object = None) -> Any:  # noqa: ANN401
        """Returns the value that ``written`` stands for.

        Spaces, simulators and views of a simulator's memory are changed in place.

        Args:
            written: What the writer returned.
            place: Where it stood.
            current: What stands there now. Default: ``None``, nothing.

        Raises:
            EnvironmentStateError: If ``current`` cannot take the state.
        """
        if isinstance(written, np.ndarray):
            value: object = written.copy()
        elif isinstance(written, torch.Tensor):
            value = written.clone()
        elif isinstance(written, Mapping):
            ((kind, content),) = written.items()
            if kind == "same":
                return self._made[content]
            value = self._read_object(kind, content, place, current)
        else:
            value = written
        self._made[place] = value
        return value

    def error(self, place: str, reason: str) -> EnvironmentStateError:
        """An error that names the attribute at ``place`` and its layer."""
        return EnvironmentStateError(f"{_name(place, self.layers)} {reason}")

    def _read_object(
        self,
        kind: str,
        content: Any,  # noqa: ANN401
        place: str,
        current: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        match kind:
            case "scalar":
                return content[()]
            case "view":
                return self._fill(content, place, current)
            case "tuple":
                return tuple(self._items(content, place, current))
            case "list":
                return self._items(content, place, current)
            case "deque":
                items = self._items(content["items"], place, current)
                return deque(items, content["size"])
            case "dict":
                keys = [self.read(key, f"{place} key") for key in content["keys"]]
                now = [current.get(k) for k in keys] if type(current) is dict else None
                items = self._items(content["items"], place, now, keys)
                return dict(zip(keys, items, strict=True))
            case "moments":
                self._expect(type(current) is RunningMeanStd, place, "RunningMeanStd")
                names = list(vars(current))
                items = self._items(content, place, None, names)
                vars(current).update(zip(names, items, strict=True))
                return current
            case "space":
                self._expect(isinstance(current, spaces.Space), place, "space")
                parts = list(_with_parts(current))
                self._expect(len(parts) == len(content), place, "space of such parts")
                generators = self._items(content, place, None)
                for part, generator in zip(parts, generators, strict=True):
                    part._np_random = generator
                return current
            case "simulator":
                self._expect(_is_mujoco(current, "MjData"), place, "MjData")
                try:
                    load_simulator_state(current, content)
                except ValueError as error:
                    name = _name(place, self.layers)
                    raise ValueError(
                        f"{name} does not fit the state: {error}"
                    ) from error
                return current
            case "generator":
                bits = getattr(np.random, content["kind"])()
                bits.state = self.read(content["state"], f"{place} state")
                return np.random.Generator(bits)
            case "random_state":
                generator = np.random.RandomState()
                generator.set_state(self.read(content, f"{place} state"))
                return generator
            case "random":
                generator = random.Random()
                generator.setstate(self.read(content, f"{place} state"))
                return generator
        raise ValueError(f"state has an entry of unknown kind {kind!r} at {place!r}")

    def _fill(
        self,
        content: np.ndarray,
        place: str,
        current: Any,  # noqa: ANN401
    ) -> np.ndarray:
        fits = (
            isinstance(current, np.ndarray)
            and current.shape == content.shape
            and current.dtype == content.dtype
            and _is_foreign(current)
        )
        self._expect(fits, place, "view of foreign memory")
        current[...] = content
        return current

    def _expect(self, fits: bool, place: str, kind: str) -> None:
        if not fits:
            raise self.error(
                place,
                f"was a {kind} when the state was taken, and is not one that fits "
                "now; reset the environment once before loading",
            )

    def _items(
        self,
        written: Sequence[Any],
        place: str,
        current: Any,  # noqa: ANN401
        names: list[Any] | None = None,
    ) -> list[Any]:
        if not isinstance(current, list | tuple | deque) or len(current) != len(
            written
        ):
            current = [None] * len(written)
        return [
            self.read(item, f"{place}[{name!r}]", now)
            for name, item, now in zip(
                names or range(len(written)), written, current, strict=True
            )
        ]


def _root(array: np.ndarray) -> np.ndarray:
    """The array that a view is a view of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _is_foreign(array: np.ndarray) -> bool:
    """Whether ``array`` shows memory of something else, such as a simulator."""
    base = _root(array).base
    # What torch hands out as an array belongs to nobody else: an action, usually.
    return array.flags.writeable and not isinstance(base, torch.Tensor | None)


def _with_parts(space: spaces.Space[Any]) -> Iterator[spaces.Space[Any]]:
    """A space and the spaces it is made of; each has a generator of its own."""
    yield space
    for value in vars(space).values():
        parts = value.values() if isinstance(value, dict) else value
        for part in parts if isinstance(value, dict | list | tuple) else (value,):
            if isinstance(part, spaces.Space):
                yield from _with_parts(part)


def _type(value: object) -> str:
    kind = type(value)
    if isinstance(value, np.ndarray | np.generic):
        return f"{kind.__module__}.{kind.__qualname__} of {value.dtype}"
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


def _name(place: str, layers: tuple[object, ...]) -> str:
    index, _, path = place.partition(".")
    return f"attribute {path!r} of {type(layers[int(index)]).__name__}"
