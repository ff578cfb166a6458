"""Noise in the dynamics of a MuJoCo task (Fig. 17)."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium
from gymnasium.utils import RecordConstructorArgs

from alm_torchrl.checks import check_number

__all__ = ["DynamicsNoise"]


class DynamicsNoise(gymnasium.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """Adds Gaussian noise to the joint velocities before each control step.

    Between the observation and the simulation of the action, every number of MuJoCo's
    ``qvel``, those of a free root included, gets independent noise. All that follows
    comes from the simulation of the disturbed state: the next observation, the reward,
    the termination. So the noise is part of the transition: the next state still
    depends on the state before and the action only. Resets are not disturbed.

    The paper says neither where its noise enters nor how strong it is. (Its Fig. 17
    is of ``HalfCheetah-v2``, whose joint velocities in a trained gait are of the order
    of 1 to 10.)

    The numbers come from the task's own generator (``np_random``), which
    ``reset(seed)`` seeds.

    Args:
        env: a Gymnasium environment with a MuJoCo simulation as ``data``.
        strength: standard deviation of the noise, in radians or metres per second;
            above 0.

    Raises:
        ValueError: if ``env`` has no MuJoCo simulation, or ``strength`` is not above 0.

    Example:
        >>> env = DynamicsNoise(gymnasium.make("HalfCheetah-v5"), strength=0.1)
        >>> observation, _ = env.reset(seed=0)
        >>> first, *_ = env.step(env.action_space.low)
        >>> observation, _ = env.reset(seed=0)
        >>> again, *_ = env.step(env.action_space.low)
        >>> bool((first == again).all())
        True
    """

    def __init__(self, env: gymnasium.Env[Any, Any], strength: float) -> None:
        import mujoco

        RecordConstructorArgs.__init__(self, strength=strength)
        gymnasium.Wrapper.__init__(self, env)
        if not isinstance(getattr(env.unwrapped, "data", None), mujoco.MjData):
            raise ValueError(
                "dynamics_noise: expected a MuJoCo task, whose joint velocities it can "
                f"disturb, got {env}"
            )
        self.strength = check_number("dynamics_noise", strength, 0, open_low=True)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict]:  # noqa: ANN401
        """Disturbs the velocities, then steps the environment."""
        velocity = self.unwrapped.data.qvel  # type: ignore[attr-defined]
        velocity += self.strength * self.np_random.standard_normal(velocity.shape)
        return self.env.step(action)
