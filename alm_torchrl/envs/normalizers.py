"""The running moments of Gymnasium's normalising wrappers inside a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import NormalizeObservation, NormalizeReward
from torchrl.envs import EnvBase, GymWrapper, TransformedEnv

from alm_torchrl.compat import gymnasium_env
from alm_torchrl.envs.lockstep import LockstepEnv

__all__ = [
    "Normalizers",
    "check_moments",
    "env_layers",
    "load_moments",
    "moments_of",
]


class Normalizers:
    """Gymnasium's ``NormalizeObservation`` and ``NormalizeReward`` in an environment.

    Their moments are part of what an agent was trained with. As a checkpoint component
    they let it act and be scored with the same ones.

    Args:
        env (EnvBase): a single environment, or a :class:`LockstepEnv` of such, which
            have the same moments; any other than one around a Gymnasium task has none
            of these wrappers.

    Example:
        >>> from gymnasium.wrappers import NormalizeObservation
        >>> one, other = (
        ...     GymWrapper(NormalizeObservation(gymnasium.make("Pendulum-v1")))
        ...     for _ in range(2)
        ... )
        >>> _ = one.rollout(10)
        >>> Normalizers(other).load_state_dict(Normalizers(one).state_dict())
        >>> Normalizers(other).state_dict()["0.NormalizeObservation"]["count"]
        11.0001
    """

    def __init__(self, env: EnvBase) -> None:
        each = env.envs if isinstance(env, LockstepEnv) else [env]
        found = zip(*map(_normalizing_wrappers, each), strict=True)
        self._wrappers = {
            f"{number}.{type(wrappers[0]).__name__}": wrappers
            for number, wrappers in enumerate(found)
        }

    @property
    def names(self) -> list[str]:
        """Names of the wrappers, the outermost first."""
        return list(self._wrappers)

    def state_dict(self) -> dict[str, Any]:
        """The moments of each wrapper."""
        return {name: moments_of(each[0]) for name, each in self._wrappers.items()}

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Checks a state without loading it.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: if it is of other wrappers or of observations of another shape.
        """
        if list(state_dict) != self.names:
            raise ValueError(
                f"env: expected the normalising wrappers {list(state_dict)}, got "
                f"{self.names}"
            )
        for name, wrappers in self._wrappers.items():
            check_moments(wrappers[0], state_dict[name])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Sets the moments of each wrapper.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: as :meth:`check_state_dict`; nothing has changed then.
        """
        self.check_state_dict(state_dict)
        for name, wrappers in self._wrappers.items():
            for wrapper in wrappers:
                load_moments(wrapper, state_dict[name])

    def freeze(self) -> None:
        """Has the moments stay as they are."""
        for wrapper in chain.from_iterable(self._wrappers.values()):
            wrapper.update_running_mean = False

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Inside, no moments move; afterwards the wrappers are as they were."""
        state = self.state_dict()
        wrappers = list(chain.from_iterable(self._wrappers.values()))
        moving = [wrapper.update_running_mean for wrapper in wrappers]
        try:
            self.freeze()
            yield
        finally:
            for wrapper, moves in zip(wrappers, moving, strict=True):
                wrapper.update_running_mean = moves
            self.load_state_dict(state)


def env_layers(env: EnvBase) -> Iterator[Any]:
    """The environment under its transforms, then Gymnasium's wrappers and task."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    yield env
    if isinstance(env, GymWrapper):
        layer = gymnasium_env(env)
        yield layer
        while isinstance(layer, gymnasium.Wrapper):
            layer = layer.env
            yield layer


def _normalizing_wrappers(
    env: EnvBase,
) -> list[NormalizeObservation | NormalizeReward]:
    return [
        layer
        for layer in env_layers(env)
        if isinstance(layer, NormalizeObservation | NormalizeReward)
    ]


def moments_of(wrapper: NormalizeObservation | NormalizeReward) -> dict[str, Any]:
    """Mean, variance and count of a wrapper, and the discounted reward so far."""
    running = _running(wrapper)
    state = {
        "mean": np.array(running.mean),
        "var": np.array(running.var),
        "count": float(running.count),
    }
    if isinstance(wrapper, NormalizeReward):
        state["discounted_reward"] = np.array(wrapper.discounted_reward)
    return state


def check_moments(
    wrapper: NormalizeObservation | NormalizeReward, state: Mapping[str, Any]
) -> None:
    """Raises a ValueError unless a wrapper can take the state."""
    for name, value in moments_of(wrapper).items():
        found = np.shape(state[name]) if name in state else None
        if found != np.shape(value):
            raise ValueError(
                f"{name} of {type(wrapper).__name__}: expected shape "
                f"{np.shape(value)}, got {found}"
            )


def load_moments(
    wrapper: NormalizeObservation | NormalizeReward, state: Mapping[str, Any]
) -> None:
    """Sets what :func:`moments_of` returned."""
    running = _running(wrapper)
    running.mean, running.var = np.array(state["mean"]), np.array(state["var"])
    running.count = state["count"]
    if isinstance(wrapper, NormalizeReward):
        wrapper.discounted_reward = np.array(state["discounted_reward"])


def _running(wrapper: NormalizeObservation | NormalizeReward) -> Any:  # noqa: ANN401
    if isinstance(wrapper, NormalizeObservation):
        return wrapper.obs_rms
    return wrapper.return_rms
