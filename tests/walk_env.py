"""A small environment whose attributes a test chooses."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium import spaces
from torchrl.envs import GymWrapper, TransformedEnv


def wrap(env):
    return TransformedEnv(GymWrapper(env))


class Walk(gymnasium.Env):
    """A random walk in one dimension."""

    def __init__(self):
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.np_random.normal(size=1)
        return self.position.copy(), {}

    def step(self, action):
        self.position += action + self.np_random.normal(size=1)
        return self.position.copy(), float(action[0]), False, False, {}
