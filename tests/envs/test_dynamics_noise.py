"""Noise in the dynamics: where it enters, how strong it is, and that it repeats."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from alm_torchrl import make_env
from alm_torchrl.envs.dynamics_noise import DynamicsNoise
from alm_torchrl.runs.folder import harmful_differences
from alm_torchrl.runs.settings import TrainConfig, preset_config

TASKS = ["HalfCheetah-v5", "T-Ant-v5", "Hopper-v5"]


class Spy(gymnasium.Wrapper):
    """Remembers the velocities that each step starts from, and what it returned."""

    def __init__(self, env):
        super().__init__(env)
        self.started, self.returned = [], []

    def step(self, action):
        self.started.append(self.unwrapped.data.qvel.copy())
        self.returned.append(self.env.step(action))
        return self.returned[-1]


def actions(env, count):
    generator = torch.Generator().manual_seed(0)
    size = env.action_spec.shape[0]
    return 0.8 * torch.rand(count, size, generator=generator) - 0.4


def course(env, steps=20, start=True):
    """All numbers of an episode's first steps, a reset at its end included."""
    rows = [env.reset()["observation"]] if start else []
    for action in actions(env, steps):
        after = env.step(TensorDict(action=action))["next"]
        rows += [after["observation"], after["reward"], after["terminated"].float()]
        if after["done"].item():
            rows.append(env.reset()["observation"])
    return torch.cat(rows)


@pytest.mark.parametrize("task", TASKS)
def test_no_noise_is_the_task_as_it_is(task):
    plain = course(make_env(task, seed=0, max_episode_steps=8))
    zero = make_env(task, dynamics_noise=0.0, seed=0, max_episode_steps=8)
    assert torch.equal(course(zero), plain)
    # So little noise is lost in the rounding; the reset after it draws other numbers.
    least = make_env(task, dynamics_noise=1e-300, seed=0)
    noisy = make_env(task, dynamics_noise=0.1, seed=0)
    first = course(make_env(task, seed=0), 3)
    assert torch.equal(course(least, 3), first)
    different = course(noisy, 3)
    size = make_env(task).observation_spec["observation"].shape[0]
    assert torch.equal(different[:size], first[:size])
    assert not torch.equal(different, first)


@pytest.mark.parametrize("strength", [0.02, 0.5])
def test_each_velocity_is_disturbed_by_the_strength(strength):
    spy = Spy(gymnasium.make("HalfCheetah-v5"))
    env = DynamicsNoise(spy, strength)
    env.reset(seed=0)
    noise = []
    for _ in range(800):
        before = env.unwrapped.data.qvel.copy()
        returned = env.step(np.zeros(6, np.float32))
        noise.append(spy.started[-1] - before)
        # The task's own answer to the disturbed state, untouched.
        assert returned is spy.returned[-1]
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
    plain.unwrapped.set_state(position, spy.started[0])
    plain.unwrapped.data.qacc_warmstart[:] = 0
    expected, expected_reward, *_ = plain.step(action)
    np.testing.assert_allclose(observation, expected, atol=1e-5)
    assert reward == pytest.approx(expected_reward, abs=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides_the_noise(task):
    first, same, other = (
        course(make_env(task, dynamics_noise=0.1, seed=seed), 5) for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_global_generators_are_left_alone():
    env = make_env("HalfCheetah-v5", dynamics_noise=0.1, seed=0)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    course(env, 3)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("strength", [-0.1, float("nan"), "much"])
def test_strengths_out_of_range(strength):
    with pytest.raises(ValueError, match="dynamics_noise: expected a number >= 0, got"):
        make_env("HalfCheetah-v5", dynamics_noise=strength)
    with pytest.raises(ValueError, match="dynamics_noise: expected a number >= 0, got"):
        preset_config("quick", dynamics_noise=strength)


def test_other_tasks_have_no_velocities_to_disturb():
    with pytest.raises(
        ValueError, match=r"dynamics_noise: expected a MuJoCo task.*Pen"
    ):
        make_env("Pendulum-v1", dynamics_noise=0.1, action_bounds="rescale")


def test_runs_of_before_had_no_noise():
    config = preset_config("quick")
    settings = json.loads(json.dumps(config.to_dict()))
    del settings["dynamics_noise"]
    assert TrainConfig.from_dict(settings) == config
    assert harmful_differences(settings, config) == {}
    noisy = preset_config("quick", dynamics_noise=0.1)
    assert harmful_differences(settings, noisy) == {"dynamics_noise": (0.0, 0.1)}
    assert noisy.run_name.startswith(f"{config.run_name}-")
