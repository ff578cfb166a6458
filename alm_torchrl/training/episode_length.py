"""Whether the episodes of a task are long enough to train on, and ever end."""

from __future__ import annotations

import math

import gymnasium
from gymnasium.wrappers import TimeLimit
from tensordict import TensorDictBase
from torchrl.data import ReplayBuffer
from torchrl.envs import EnvBase, GymWrapper, StepCounter, TransformedEnv

from alm_torchrl.compat import gymnasium_env
from alm_torchrl.envs.lockstep import LockstepEnv
from alm_torchrl.training.hooks import Hook

__all__ = ["EpisodeLengthCheck", "EpisodeLengthError", "time_limit"]


class EpisodeLengthError(ValueError):
    """The episodes of a task are too short, or too long, for what was asked for."""


class EpisodeLengthCheck(Hook):
    """Looks at the end of the warm-up whether its episodes can be trained on.

    Args:
        buffer (ReplayBuffer): holds the steps of the warm-up.

    Keyword Args:
        horizon (int): length of the slices.
        eval_env (EnvBase, optional): environment of the evaluations.

    Raises:
        EpisodeLengthError: while training, if no episode is as long as ``horizon``,
            or if none ended and the task of ``eval_env`` names no time limit.
    """

    stage = "post_steps_log"

    def __init__(
        self,
        buffer: ReplayBuffer,
        *,
        horizon: int,
        eval_env: EnvBase | None,
    ) -> None:
        self.buffer = buffer
        self.horizon = horizon
        self.eval_env = eval_env

    def __call__(self, batch: TensorDictBase) -> None:
        """Looks once the warm-up has ended."""
        warmup_steps = self.trainer.pace.warmup_steps
        if self.trainer.collected_frames != warmup_steps:
            return
        rows = self.buffer[:]
        _, lengths = rows["collector", "traj_ids"].unique(return_counts=True)
        longest = int(lengths.max())
        if longest < self.horizon:
            raise EpisodeLengthError(
                f"horizon: expected at most {longest}, the length of the longest "
                f"episode in {warmup_steps} random steps, got {self.horizon} "
                f"(the command takes --horizon {longest})"
            )
        endless = self.eval_env is not None and time_limit(self.eval_env) is None
        if endless and not rows["next", "done"].any():
            raise EpisodeLengthError(
                f"max_episode_steps: no episode ended in {warmup_steps} random "
                "steps, and the task names no time limit, so that an evaluation might "
                "never end; give make_env a limit, such as max_episode_steps=1000 "
                "(the command takes --max-episode-steps 1000)"
            )


def time_limit(env: EnvBase) -> float | None:
    """The most steps that an episode can have, as far as the environment says.

    Args:
        env (EnvBase): the environment.

    Returns:
        float, optional: the limit of a ``StepCounter`` or of Gymnasium; infinity where
        neither can be looked for; ``None`` for a Gymnasium task without one.

    Examples:
        >>> from alm_torchrl import make_env
        >>> time_limit(make_env("Pendulum-v1", action_bounds="rescale"))
        200
    """
    if isinstance(env, LockstepEnv):
        env = env.envs[0]
    while isinstance(env, TransformedEnv):
        transforms = getattr(env.transform, "transforms", [env.transform])
        for transform in transforms:
            if isinstance(transform, StepCounter) and transform.max_steps is not None:
                return int(transform.max_steps)
        env = env.base_env
    if not isinstance(env, GymWrapper):
        return math.inf
    layer = gymnasium_env(env)
    while isinstance(layer, gymnasium.Wrapper):
        if isinstance(layer, TimeLimit):
            return layer.spec.max_episode_steps if layer.spec else math.inf
        layer = layer.env
    return None
