"""An environment may write into all it was given and all it returned."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrl.envs import GymWrapper, SerialEnv

from alm_torchrl import make_alm_loss, make_env, make_trainer
from alm_torchrl.evaluation import evaluate_policy, random_policy

LIMIT = 7


class Scribbler(gymnasium.Env):
    """Counts steps and echoes actions; overwrites what it got and what it gave."""

    def __init__(self, dtype=np.float32, share=True):
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), dtype)
        self.action_space = spaces.Box(-1, 1, (1,), dtype)
        self.share = share
        self.given = [
            np.zeros(2, dtype),
            *(np.zeros(1, kind) for kind in (np.float32, np.bool_, np.bool_)),
        ]

    def _give(self, *values):
        if not self.share:
            self.given = [array.copy() for array in self.given]
        for array, value in zip(self.given, values, strict=True):
            array[...] = value
        return tuple(array if array.size > 1 else array[0:1] for array in self.given)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._give([0, 0], 0, False, False)[0], {}

    def step(self, action):
        for array in self.given:
            array[...] = 1 if array.dtype == np.bool_ else 77
        self.time += 1
        last = self.time == LIMIT
        given = self._give([self.time, action[0]], self.time, False, last)
        action[...] = 55
        return *given, {}


@pytest.fixture(scope="module", autouse=True)
def task():
    gymnasium.register("Scribbler-v0", Scribbler)
    yield
    del gymnasium.registry["Scribbler-v0"]


def check(rows):
    """Asserts that rows [T], in the order of time, are what happened."""
    time = torch.arange(len(rows)) % LIMIT
    following = rows["next", "observation"]
    assert rows["observation"][:, 0].tolist() == time.tolist()
    assert following[:, 0].tolist() == (time + 1).tolist()
    assert torch.equal(following[:, 1:], rows["action"])
    assert rows["next", "reward"].flatten().tolist() == (time + 1).tolist()
    assert rows["next", "done"].flatten().tolist() == (time == LIMIT - 1).tolist()


@settings(max_examples=12)
@given(
    dtype=st.sampled_from([np.float32, np.float64]),
    share=st.booleans(),
    action_bounds=st.sampled_from(["clamp", "rescale"]),
    steps=st.integers(1, 3 * LIMIT),
)
def test_make_env(dtype, share, action_bounds, steps):
    env = make_env(
        "Scribbler-v0", action_bounds=action_bounds, dtype=dtype, share=share
    )
    check(env.rollout(steps, break_when_any_done=False))


def test_several_environments():
    env = SerialEnv(2, lambda: make_env("Scribbler-v0"))
    for rows in env.rollout(2 * LIMIT, break_when_any_done=False):
        check(rows)


@pytest.mark.parametrize("own", [False, True])
def test_the_trainer(own):
    """With ``own``, an environment that makes no copies itself."""
    env = GymWrapper(Scribbler()) if own else make_env("Scribbler-v0")
    loss = make_alm_loss(env, hidden_dim=8, model_hidden_dim=8)
    steps = {"total_steps": 2 * LIMIT, "warmup_steps": 2 * LIMIT}
    trainer = make_trainer(env, loss, batch_size=4, **steps)
    trainer.train()
    check(trainer.replay_buffer[:])


def test_the_acting_policy_and_evaluations():
    env = make_env("Scribbler-v0")
    scores = evaluate_policy(env, random_policy(env), episodes=2)
    assert scores["return"].tolist() == [LIMIT * (LIMIT + 1) / 2] * 2
    policy = make_alm_loss(env, hidden_dim=8, model_hidden_dim=8).acting_policy()
    check(env.rollout(LIMIT, policy))
