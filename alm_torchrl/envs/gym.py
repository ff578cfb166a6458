"""Gymnasium tasks as TorchRL environments, and the paper's tasks by name.

Importing this module registers the paper's two truncated tasks, ``T-Ant-v5`` and
``T-Humanoid-v5``, with Gymnasium: ``gymnasium.make("T-Ant-v5")`` works afterwards.
"""

from __future__ import annotations

import difflib
import importlib
import warnings
from dataclasses import dataclass
from typing import Any, Literal, SupportsFloat

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import WrapperSpec
from gymnasium.utils import RecordConstructorArgs
from gymnasium.wrappers import RescaleAction, TransformAction, TransformObservation
from torchrl.envs import GymWrapper, TransformedEnv

from alm_torchrl.checks import (
    check_choice,
    check_device,
    check_integer,
    check_number,
)
from alm_torchrl.envs.dynamics_noise import DynamicsNoise

__all__ = ["TASKS", "Task", "TerminalSurvivalReward", "make_env"]


@dataclass(frozen=True)
class Task:
    """One task that this library is measured on.

    Args:
        id: The Gymnasium id.
        observation_dim: Length of the observation vector.
        action_dim: Length of the action vector.
        max_episode_steps: Steps after which an episode is truncated.
        note: What a reader of results should know about it.

    Example:
        >>> TASKS[0].id, TASKS[0].observation_dim, TASKS[0].action_dim
        ('HalfCheetah-v5', 17, 6)
    """

    id: str
    observation_dim: int
    action_dim: int
    max_episode_steps: int
    note: str


_MAX_SEED = 2**32 - 1

_UNPAID = "no survival reward on the terminal step (v4 and older pay it)"

TASKS: tuple[Task, ...] = (
    Task("HalfCheetah-v5", 17, 6, 1000, "never terminates; unchanged since v2"),
    Task("Hopper-v5", 11, 3, 1000, _UNPAID),
    Task("Walker2d-v5", 17, 6, 1000, f"{_UNPAID}; other foot friction than v4"),
    Task("Ant-v5", 105, 8, 1000, _UNPAID),
    Task("Humanoid-v5", 348, 17, 1000, f"{_UNPAID}; actions within +-0.4"),
    Task("T-Ant-v5", 27, 8, 1000, "the paper's Ant without contact forces"),
    Task("T-Humanoid-v5", 45, 17, 1000, "the paper's Humanoid, joints only"),
    Task("Pendulum-v1", 3, 1, 200, "the shortest try; rescale its actions (+-2)"),
)
"""The paper's tasks, and the smallest one that shows learning."""


class TerminalSurvivalReward(
    gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs
):
    """Pays the survival reward on the terminal step of a MuJoCo task, too.

    Gymnasium's v5 tasks leave it out there; the definitions that the paper used pay
    it on every step. ``info["reward_survive"]`` is corrected along with the reward.

    Args:
        env: A Gymnasium MuJoCo environment (v4 or v5 style) with a
            ``healthy_reward`` and ``reward_survive`` in its ``info``.

    Raises:
        ValueError: If ``env`` has no survival reward.

    Example:
        >>> env = TerminalSurvivalReward(gymnasium.make("Hopper-v5"))
        >>> observation, info = env.reset(seed=0)
        >>> terminated = False
        >>> while not terminated:
        ...     action = np.ones(3, dtype=np.float32)
        ...     observation, reward, terminated, _, info = env.step(action)
        >>> info["reward_survive"]
        1.0
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gymnasium.Wrapper.__init__(self, env)
        try:
            self._healthy_reward = float(env.get_wrapper_attr("_healthy_reward"))
        except AttributeError as error:
            raise ValueError(
                f"env must be a MuJoCo task with a survival (healthy) reward, got {env}"
            ) from error

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict]:  # noqa: ANN401
        """Steps the environment; adds the survival reward where it was left out."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated:
            unpaid = self._healthy_reward - float(info["reward_survive"])
            reward = float(reward) + unpaid
            info["reward_survive"] = self._healthy_reward
        return observation, reward, terminated, truncated, info


def _register() -> None:
    wrapper = WrapperSpec(
        "TerminalSurvivalReward", f"{__name__}:TerminalSurvivalReward", kwargs={}
    )
    observed = {
        "T-Ant-v5": ("ant_v5:AntEnv", ("cfrc_ext",)),
        "T-Humanoid-v5": (
            "humanoid_v5:HumanoidEnv",
            ("cinert", "cvel", "qfrc_actuator", "cfrc_ext"),
        ),
    }
    for task, (entry_point, left_out) in observed.items():
        if task not in gymnasium.registry:
            gymnasium.register(
                task,
                entry_point=f"gymnasium.envs.mujoco.{entry_point}",
                max_episode_steps=1000,
                kwargs={f"include_{name}_in_observation": False for name in left_out},
                additional_wrappers=(wrapper,),
            )


_register()


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

    Observations, actions and rewards are float32 whatever the task's own precision
    (converted on the NumPy side, which costs less than a transform). The result has
    no transforms yet: append what you need.

    Args:
        task: A Gymnasium id with its version, such as ``"HalfCheetah-v5"``; prefix
            it with ``"module:"`` if a module has to be imported first.

    Keyword Args:
        action_bounds: What to do about action bounds. ``"clamp"`` (the paper's way)
            leaves the task's bounds in the action spec, for the actor to clamp to.
            ``"rescale"`` shows bounds of -1 and 1 and maps them linearly onto the
            task's own. Default: ``"clamp"``.
        dynamics_noise: Standard deviation of the noise that disturbs the joint
            velocities of a MuJoCo task before each step, in radians or metres per
            second (:class:`~alm_torchrl.envs.dynamics_noise.DynamicsNoise`). Default:
            ``0.0``, the task as it is.
        device: Where the tensors lie; the simulation runs on the CPU.
            Default: ``None``, which also means the CPU; a step then takes a third
            less time than with ``"cpu"``, where TorchRL checks the device of every
            tensor.
        seed: Seed of the environment's own random generator. The global generators
            of PyTorch, NumPy and Python are neither seeded nor drawn from; random
            *actions* (``env.rand_action``) come from PyTorch's. Default: ``None``,
            the operating system's choice.
        **gym_kwargs: Passed to ``gymnasium.make``, for example
            ``render_mode="rgb_array"`` or ``max_episode_steps=100``.

    Returns:
        The environment: ``"observation"`` ``[observation_dim]``, ``"action"``
        ``[action_dim]``, ``("next", "reward")`` ``[1]``, and the usual done flags.

    Raises:
        ValueError: If ``task`` is unknown, its observations are not flat vectors of
            floats, its actions are not continuous vectors with finite bounds, or
            ``action_bounds`` is neither of the two, the device is not there, ``seed``
            or ``dynamics_noise`` is out of range, the noise is for a task without
            MuJoCo, or the task does not know an argument in ``gym_kwargs``.
        ImportError: If ``task`` is registered but cannot be built here, as the
            MuJoCo tasks of version 2 and 3.

    Warns:
        UserWarning: With ``action_bounds="clamp"``, if the bounds exceed +-1: the
            actor's mean lies in (-1, 1), so that only noise reaches the rest.

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
    gym_env = _make_gym_env(task, gym_kwargs)
    try:
        if dynamics_noise:
            gym_env = DynamicsNoise(gym_env, dynamics_noise)
        gym_env = _float32_observations(task, gym_env)
        gym_env = _float32_actions(task, gym_env)
    except ValueError:
        gym_env.close()
        raise
    if action_bounds == "rescale":
        gym_env = RescaleAction(gym_env, np.float32(-1.0), np.float32(1.0))
    else:
        low, high = gym_env.action_space.low, gym_env.action_space.high  # type: ignore[attr-defined]
        if (low < -1).any() or (high > 1).any():
            warnings.warn(
                f"the actions of {task} lie between {low.min():g} and "
                f"{high.max():g}, but the actor's mean between -1 and 1: only noise "
                "reaches beyond. action_bounds='rescale' maps +-1 to these bounds",
                UserWarning,
                stacklevel=2,
            )
    env = TransformedEnv(GymWrapper(gym_env, device=device))
    if seed is not None:
        env.set_seed(seed)
    return env


def _make_gym_env(task: str, gym_kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    hint = "`alm-torchrl tasks` lists the paper's tasks"
    module, colon, name = str(task).rpartition(":")
    if colon:  # gymnasium.spec does not import the module
        try:
            importlib.import_module(module)
        except (ModuleNotFoundError, TypeError, ValueError) as error:
            raise ValueError(
                "task: expected a module that can be imported before the colon, got "
                f"{task!r} ({error}); {hint}"
            ) from error
    try:
        gymnasium.spec(name)
    except (gymnasium.error.Error, ModuleNotFoundError, TypeError) as error:
        near = " or ".join(difflib.get_close_matches(str(task), gymnasium.registry))
        raise ValueError(
            f"task: expected the id of a registered Gymnasium task with its version"
            f"{near and f', such as {near}'}, got {task!r} "
            f"({error}); {hint}"
        ) from error
    try:
        return gymnasium.make(task, **{"disable_env_checker": True, **gym_kwargs})
    except TypeError as error:
        if not gym_kwargs:
            raise
        raise ValueError(
            f"gym_kwargs: expected arguments of task {task!r}, got {gym_kwargs} "
            f"({error})"
        ) from error
    except (ImportError, gymnasium.error.DependencyNotInstalled) as error:
        raise ImportError(
            f"task {task!r} cannot be built here ({error}); {hint}"
        ) from error


def _float32_observations(
    task: str, env: gymnasium.Env[Any, Any]
) -> gymnasium.Env[Any, Any]:
    """Casts observations to float32, or says why that is not possible."""
    space = env.observation_space
    if (
        not isinstance(space, spaces.Box)
        or len(space.shape) != 1
        or not np.issubdtype(space.dtype, np.floating)
    ):
        raise ValueError(
            "supported observations are flat vectors of floats (a Box space with one "
            f"dimension), but those of {task} are {space}. "
            "gymnasium.wrappers.FlattenObservation turns dictionaries, tuples and "
            "discrete spaces into vectors; images need an encoder for images"
        )
    if space.dtype == np.float32:
        return env
    return TransformObservation(env, _to_float32, _as_float32(space))


def _float32_actions(
    task: str, env: gymnasium.Env[Any, Any]
) -> gymnasium.Env[Any, Any]:
    """Lets float32 actions in, or says why that is not possible."""
    space = env.action_space
    if (
        not isinstance(space, spaces.Box)
        or len(space.shape) != 1
        or not np.issubdtype(space.dtype, np.floating)
    ):
        raise ValueError(
            "supported actions are continuous vectors (a Box space of floats with "
            f"one dimension), but those of {task} are {space}"
        )
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise ValueError(
            f"supported actions have finite bounds, but those of {task} are {space}"
        )
    if space.dtype == np.float32:
        return env
    dtype = space.dtype
    return TransformAction(env, lambda action: action.astype(dtype), _as_float32(space))


def _to_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32)


def _as_float32(space: spaces.Box) -> spaces.Box:
    low, high = _to_float32(space.low), _to_float32(space.high)
    return spaces.Box(low, high, dtype=np.float32)
