"""An environment that does what a test asks for at a certain step."""

from __future__ import annotations

from contextlib import contextmanager
from typing import ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces


class Scripted(gymnasium.Env):
    """Episodes of ``length`` steps; ``script`` maps (instance, step) to a function.

    Instances and their steps count from 0. The function may raise; the reward is what
    it returns. The command trains in instance 0 and evaluates in instance 1.
    """

    script: ClassVar[dict] = {}
    made: ClassVar[int] = 0

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, length=5):
        self.length, self.count, self.number = length, 0, Scripted.made
        Scripted.made += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start = self.count
        self.position = self.np_random.normal(size=2).astype(np.float32)
        return self.position.copy(), {}

    def step(self, action):
        action_now = Scripted.script.get((self.number, self.count), lambda: None)
        self.count += 1
        reward = action_now()
        self.position = self.position + action[0]
        if reward is None:
            reward = float(-abs(self.position[0]))
        ended = self.count - self.start == self.length
        return self.position.copy(), reward, ended, False, {}


@contextmanager
def scripted_task(script=None, **options):
    """The name of a task that follows a script, while the context lasts."""
    Scripted.script, Scripted.made = script or {}, 0
    gymnasium.register("Scripted-v0", Scripted, **options)
    try:
        yield "Scripted-v0"
    finally:
        del gymnasium.registry["Scripted-v0"]
        Scripted.script = {}
