"""Noise in the dynamics: where it enters, how strong it is, and that it repeats."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from alm_torchrl.envs import DynamicsNoise, make_env

TASKS = ["T-Ant-v5", "Hopper-v5"]


class Spy(gymnasium.Wrapper):
    """Remembers the velocities that a step starts from, and what it returned."""

    def step(self, action):
        self.started = self.unwrapped.data.qvel.copy()
        self.returned = self.env.step(action)
        return self.returned


def course(env, steps):
    """All numbers of an episode's first steps."""
    generator = torch.Generator().manual_seed(0)
    rows = [env.reset()["observation"]]
    for _ in range(steps):
        action = 0.8 * torch.rand(env.action_spec.shape, generator=generator) - 0.4
        after = env.step(TensorDict(action=action))["next"]
        rows += [after["observation"], after["reward"], after["terminated"].float()]
    return torch.cat(rows)


@pytest.mark.parametrize("task", TASKS)
def test_noise_follows_its_seed_and_spares_the_reset(task):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    plain, least, first, same, other = (
        course(make_env(task, dynamics_noise=noise, seed=seed), 5)
        # So little noise is lost in the rounding.
        for noise, seed in ((0.0, 0), (1e-300, 0), (0.1, 0), (0.1, 0), (0.1, 1))
    )
    size = make_env(task).observation_spec["observation"].shape[0]
    assert torch.equal(plain, least)
    assert torch.equal(plain[:size], first[:size])
    assert not torch.equal(plain, first)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    # Global generators are left alone.
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002


def test_make_env_adds_noise_of_the_given_strength():
    noisy = DynamicsNoise(gymnasium.make("Hopper-v5"), 0.1)
    noisy.reset(seed=0)
    noisy.reset()
    action = np.full(3, 0.5, np.float32)
    expected, *_ = noisy.step(action)
    env = make_env("Hopper-v5", dynamics_noise=0.1, seed=0)
    after = env.step(env.reset().set("action", torch.from_numpy(action)))["next"]
    np.testing.assert_array_equal(after["observation"], expected.astype(np.float32))


@pytest.mark.parametrize("strength", [0.02, 0.5])
def test_each_velocity_is_disturbed_by_the_strength(strength):
    spy = Spy(gymnasium.make("HalfCheetah-v5"))
    env = DynamicsNoise(spy, strength)
    env.reset(seed=0)
    noise = []
    for _ in range(800):
        before = env.unwrapped.data.qvel.copy()
        returned = env.step(np.zeros(6, np.float32))
        noise.append(spy.started - before)
        # The task's own answer to the disturbed state, untouched.
        assert returned is spy.returned
    noise = np.stack(noise) / strength
    assert noise.shape == (800, 9)
    np.testing.assert_allclose(noise.mean(0), 0, atol=4 / np.sqrt(800))
    np.testing.assert_allclose(noise.std(0), 1, atol=4 / np.sqrt(1600))
    correlation = np.corrcoef(noise.T) - np.eye(9)
    assert np.abs(correlation).max() < 5 / np.sqrt(800)
    following = (noise[1:] * noise[:-1]).mean(0)
    assert np.abs(following).max() < 4 / np.sqrt(800)


def test_the_noise_moves_the_simulation_and_the_reward():
    """A step from disturbed velocities is a plain step from those velocities."""
    spy = Spy(gymnasium.make("HalfCheetah-v5"))
    noisy, plain = DynamicsNoise(spy, 0.3), gymnasium.make("HalfCheetah-v5")
    noisy.reset(seed=0)
    plain.reset(seed=1)
    position = noisy.unwrapped.data.qpos.copy()
    action = np.full(6, 0.3, np.float32)
    observation, reward, *_ = noisy.step(action)
    plain.unwrapped.set_state(position, spy.started)
    plain.unwrapped.data.qacc_warmstart[:] = 0
    expected, expected_reward, *_ = plain.step(action)
    np.testing.assert_allclose(observation, expected, atol=1e-5)
    assert reward == pytest.approx(expected_reward, abs=1e-5)
