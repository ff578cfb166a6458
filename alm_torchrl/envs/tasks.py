"""The paper's tasks.

Importing this module registers the paper's two truncated tasks, ``T-Ant-v5`` and
``T-Humanoid-v5``, with Gymnasium.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, SupportsFloat

import gymnasium
from gymnasium.envs.registration import WrapperSpec
from gymnasium.utils import RecordConstructorArgs

__all__ = ["TASKS", "Task", "TerminalSurvivalReward"]


@dataclass(frozen=True)
class Task:
    """A task that this library is measured on.

    Args:
        id: Gymnasium id.
        observation_dim: length of the observation vector.
        action_dim: length of the action vector.
        max_episode_steps: steps after which an episode is truncated.
        note: what a reader of results should know about it.

    Example:
        >>> TASKS[0].id, TASKS[0].observation_dim, TASKS[0].action_dim
        ('HalfCheetah-v5', 17, 6)
    """

    id: str
    observation_dim: int
    action_dim: int
    max_episode_steps: int
    note: str


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
    """Pays the survival reward of a MuJoCo task on the terminal step, too.

    Gymnasium's v5 tasks do not; the paper's definitions pay it on every step.
    ``info["reward_survive"]`` is corrected along with the reward.

    Args:
        env: a MuJoCo task with a ``healthy_reward`` and with ``reward_survive`` in its
            ``info``.

    Raises:
        ValueError: if ``env`` has no survival reward.

    Example:
        >>> env = TerminalSurvivalReward(gymnasium.make("Hopper-v5"))
        >>> observation, info = env.reset(seed=0)
        >>> terminated = False
        >>> while not terminated:
        ...     _, reward, terminated, _, info = env.step(env.action_space.high)
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
                f"env: expected a MuJoCo task with a survival reward, got {env}."
            ) from error

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict]:  # noqa: ANN401
        """Steps the environment; adds the survival reward that was left out."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated:
            unpaid = self._healthy_reward - float(info["reward_survive"])
            reward = float(reward) + unpaid
            info["reward_survive"] = self._healthy_reward
        return observation, reward, terminated, truncated, info


def _register(task: str, entry_point: str, *left_out: str) -> None:
    if task not in gymnasium.registry:
        wrapper = TerminalSurvivalReward.__name__
        gymnasium.register(
            task,
            entry_point=f"gymnasium.envs.mujoco.{entry_point}",
            max_episode_steps=1000,
            kwargs={f"include_{name}_in_observation": False for name in left_out},
            additional_wrappers=(
                WrapperSpec(wrapper, f"{__name__}:{wrapper}", kwargs={}),
            ),
        )


_register("T-Ant-v5", "ant_v5:AntEnv", "cfrc_ext")
_register(
    "T-Humanoid-v5",
    "humanoid_v5:HumanoidEnv",
    *("cinert", "cvel", "qfrc_actuator", "cfrc_ext"),
)
