"""Gymnasium tasks as TorchRL environments."""

from __future__ import annotations

import difflib
import importlib
import warnings
from typing import Any, Literal, SupportsFloat

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from gymnasium.wrappers import FlattenObservation, RescaleAction
from torchrl.envs import GymWrapper, TransformedEnv

from alm_torchrl.checks import (
    check_choice,
    check_device,
    check_integer,
    check_number,
)
from alm_torchrl.envs.dynamics_noise import DynamicsNoise

__all__ = ["make_env"]

_MAX_SEED = 2**32 - 1
_HINT = "`alm-torchrl tasks` lists the paper's tasks"


def make_env(
    task: str,
    *,
    action_bounds: Literal["clamp", "rescale"] = "clamp",
    dynamics_noise: float = 0.0,
    device: torch.device | str | None = None,
    seed: int | None = None,
    **gym_kwargs: Any,
) -> TransformedEnv:
    """Makes a TorchRL environment from a Gymnasium task.

    Observations, actions and rewards are float32 whatever the task's own precision.
    Observations that are dictionaries or tuples of numbers become one vector, in
    Gymnasium's order (``gymnasium.spaces.flatten``); a warning says which entries.
    The task gets copies of actions, clipped to its own bounds, and what it returns is
    copied: it may write into both. The environment has no transforms yet: append what
    you need.

    Args:
        task: Gymnasium id with its version, such as ``"HalfCheetah-v5"``. Prefix it
            with ``"module:"`` if a module has to be imported first.

    Keyword Args:
        action_bounds: ``"clamp"`` (the paper's way) leaves the task's bounds in the
            action spec, for the actor to clamp to; ``"rescale"`` maps -1 and 1
            linearly onto them. Default: ``"clamp"``.
        dynamics_noise: standard deviation of the noise on the joint velocities of a
            MuJoCo task, in radians or metres per second (:class:`DynamicsNoise`).
            Default: ``0.0``, the task as it is.
        device: device of the tensors; the simulation runs on the CPU. Default:
            ``None``, the CPU, too, but a step takes a third less time than with
            ``"cpu"``, where TorchRL checks the device of every tensor.
        seed: seed of the environment's own generator. Random actions
            (``env.rand_action``) come from PyTorch's, which is not seeded. Default:
            ``None``, the operating system's choice.
        **gym_kwargs: arguments of ``gymnasium.make``, for example
            ``render_mode="rgb_array"`` or ``max_episode_steps=100``.

    Returns:
        The environment: ``"observation"`` ``[observation_dim]``, ``"action"``
        ``[action_dim]``, ``("next", "reward")`` ``[1]``, and the usual done flags.

    Raises:
        ValueError: if the task is unknown, has observations other than vectors of
            numbers or dictionaries and tuples of such, actions other than vectors of
            floats with bounds that differ, or cannot have the noise; or if another
            argument is out of range or unknown to the task.
        ImportError: if the task cannot be built here, as MuJoCo tasks of version 2.

    Warns:
        UserWarning: if observations are flattened; if bounds to clamp to exceed +-1,
            which only noise can reach, as the actor's mean lies in (-1, 1).

    Example:
        >>> env = make_env("Pendulum-v1", action_bounds="rescale", seed=0)
        >>> env.action_spec.space.high
        tensor([1.])
        >>> env.rollout(3)["next", "reward"].shape
        torch.Size([3, 1])
    """
    check_choice("action_bounds", action_bounds, ("clamp", "rescale"))
    if device is not None:
        device = check_device("device", device)
    if seed is not None:
        seed = check_integer("seed", seed, 0, _MAX_SEED)
    dynamics_noise = check_number("dynamics_noise", dynamics_noise)
    plain = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in gym_kwargs.items()
    }
    gym_env = _make_gym_env(task, plain)
    try:
        if dynamics_noise:
            gym_env = DynamicsNoise(gym_env, dynamics_noise)
        if _holds_vectors(gym_env.observation_space):
            warnings.warn(
                f"task: the observations of {task}, {gym_env.observation_space}, are "
                "flattened to one vector in this order.",
                UserWarning,
                stacklevel=2,
            )
            gym_env = FlattenObservation(gym_env)
        _check_spaces(task, gym_env.observation_space, gym_env.action_space)
    except ValueError:
        gym_env.close()
        raise
    gym_env = _Float32Copies(gym_env)
    if action_bounds == "rescale":
        gym_env = RescaleAction(gym_env, np.float32(-1.0), np.float32(1.0))
    else:
        low, high = gym_env.action_space.low, gym_env.action_space.high  # type: ignore[attr-defined]
        if (low < -1).any() or (high > 1).any():
            warnings.warn(
                f"task: the actions of {task} lie between {low.min():g} and "
                f"{high.max():g}, but the actor's mean between -1 and 1: only noise "
                "reaches beyond. action_bounds='rescale' (--action-bounds rescale) "
                "maps +-1 to these bounds.",
                UserWarning,
                stacklevel=2,
            )
    env = TransformedEnv(GymWrapper(gym_env, device=device))
    if seed is not None:
        env.set_seed(seed)
    return env


def _make_gym_env(task: str, gym_kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    module, colon, name = str(task).rpartition(":")
    if colon:  # gymnasium.spec does not import the module
        try:
            importlib.import_module(module)
        except (ModuleNotFoundError, TypeError, ValueError) as error:
            raise ValueError(
                "task: expected a module that can be imported before the colon, got "
                f"{task!r} ({error}); {_HINT}."
            ) from error
    try:
        gymnasium.spec(name)
    except (gymnasium.error.Error, ModuleNotFoundError, TypeError) as error:
        near = " or ".join(difflib.get_close_matches(str(task), gymnasium.registry))
        raise ValueError(
            "task: expected the id of a registered Gymnasium task with its version"
            f"{near and f', such as {near}'}, got {task!r} ({error}); {_HINT}."
        ) from error
    try:
        return gymnasium.make(task, **{"disable_env_checker": True, **gym_kwargs})
    except TypeError as error:
        if not gym_kwargs:
            raise
        raise ValueError(
            f"gym_kwargs: expected arguments of task {task!r}, got {gym_kwargs} "
            f"({error})."
        ) from error
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise ImportError(
            f"task: expected one that can be built here, got {task!r} ({error}); "
            f"{_HINT}."
        ) from error


class _Float32Copies(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Shares no memory with a task, whose observations and actions become float32."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gymnasium.Wrapper.__init__(self, env)
        self._own: spaces.Box = env.action_space  # type: ignore[assignment]
        self.observation_space = _as_float32(env.observation_space)
        self.action_space = _as_float32(env.action_space)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        observation, info = self.env.reset(**kwargs)
        return np.array(observation, np.float32), info

    def step(
        self, action: np.ndarray
    ) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        own = self._own
        # Rounding to float32 may have moved the action across a bound.
        clipped = np.clip(action.astype(own.dtype), own.low, own.high)
        observation, reward, terminated, truncated, info = self.env.step(clipped)
        if reward is None:  # TorchRL would make it 0
            raise TypeError("reward: expected a number from the task, got None.")
        copied = np.array(observation, np.float32)
        return copied, reward, terminated, truncated, info


def _check_spaces(
    task: str, observations: spaces.Space[Any], actions: spaces.Space[Any]
) -> None:
    if not _is_vector(observations, np.number, np.bool_):
        raise ValueError(
            "task: expected observations that are vectors of numbers (a Box space with "
            f"one dimension), got {observations} from {task}. "
            "gymnasium.wrappers.FlattenObservation makes vectors of discrete spaces; "
            "images need an encoder for images."
        )
    if not _is_vector(actions, np.floating):
        raise ValueError(
            "task: expected actions that are vectors of floats (a Box space with one "
            f"dimension), got {actions} from {task}."
        )
    bounds = _as_float32(actions)
    with np.errstate(over="ignore", invalid="ignore"):
        width = bounds.high - bounds.low
    if not (np.isfinite(width) & (width > 0)).all():
        raise ValueError(
            "task: expected actions with a range that is finite and above 0 in "
            f"float32, got {actions} from {task}."
        )


def _holds_vectors(space: spaces.Space[Any]) -> bool:
    """Whether it is a dictionary or tuple, nested or not, of vectors of numbers."""
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        return False
    parts = space.spaces.values() if isinstance(space, spaces.Dict) else space.spaces
    return all(
        _holds_vectors(part) or _is_vector(part, np.number, np.bool_) for part in parts
    )


def _is_vector(space: spaces.Space[Any], *kinds: type) -> bool:
    return (
        isinstance(space, spaces.Box)
        and len(space.shape) == 1
        and space.shape[0] > 0
        and any(np.issubdtype(space.dtype, kind) for kind in kinds)
    )


def _as_float32(space: spaces.Space[Any]) -> spaces.Box:
    with np.errstate(over="ignore"):
        low, high = (
            np.asarray(bound).astype(np.float32)
            for bound in (space.low, space.high)  # type: ignore[attr-defined]
        )
    return spaces.Box(low, high, dtype=np.float32)
