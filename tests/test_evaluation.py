from __future__ import annotations

import contextlib
import random

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import (
    EnvBase,
    ExplorationType,
    GymWrapper,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import exploration_type, set_exploration_type

from alm_torchrl.envs import LockstepEnv, make_env
from alm_torchrl.evaluation import evaluate_policy, random_policy, zero_policy


class Countdown(gymnasium.Env):
    """Starts at a random count; pays count + action; terminates at zero."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = int(self.np_random.integers(1, 30))
        return np.array([self.count], np.float32), {}

    def step(self, action):
        reward = self.count + float(action[0])
        self.count -= 1
        observation = np.array([self.count], np.float32)
        return observation, reward, self.count == 0, False, {}


class Shared(EnvBase):
    """A TorchRL environment of three steps that draws from every global generator.

    Its random numbers are in the reward; its seeding seeds PyTorch itself.
    """

    def __init__(self):
        super().__init__()
        self.observation_spec = Composite(observation=Unbounded(1))
        self.action_spec = Bounded(-1.0, 1.0, (1,))
        self.reward_spec = Unbounded(1)

    def _set_seed(self, seed):
        torch.manual_seed(seed)

    def _reset(self, tensordict):
        self.steps = 0
        return TensorDict(observation=torch.rand(1))

    def _step(self, tensordict):
        self.steps += 1
        noise = random.random() + np.random.rand() + torch.rand(1)  # noqa: NPY002
        return TensorDict(
            observation=torch.rand(1),
            reward=noise.float(),
            done=torch.tensor([self.steps == 3]),
        )


def countdown(limit=None):
    env = Countdown()
    if limit is not None:
        env = gymnasium.wrappers.TimeLimit(env, limit)
    return GymWrapper(env)


def constant(value):
    return TensorDictModule(
        lambda observation: torch.full_like(observation, value),
        in_keys=["observation"],
        out_keys=["action"],
    )


def gaussian(dropout=0.0, inputs=1, actions=1):
    """A stochastic policy whose mean is a network of the observation."""
    layers = nn.Linear(inputs, 8), nn.Dropout(dropout), nn.Linear(8, actions)
    net = nn.Sequential(*layers)
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc"]),
        TensorDictModule(torch.ones_like, in_keys=["loc"], out_keys=["scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=torch.distributions.Normal,
            default_interaction_type=InteractionType.RANDOM,
        ),
    )


def generator_states():
    _, numbers, position, *_ = np.random.get_state()  # noqa: NPY002
    torch_state = torch.get_rng_state().tolist()
    return torch_state, numbers.tolist(), position, random.getstate()


def starts(seed, episodes):
    """The counts that the episodes of an evaluation start from."""
    env = Countdown()
    env.reset(seed=seed)
    return [int(env.reset()[0][0]) for _ in range(episodes)]


@pytest.mark.parametrize("limited", [None, "gymnasium", "torchrl"])
def test_returns_and_lengths_of_whole_episodes(limited):
    env, limit = countdown(), 99 if limited is None else 10
    if limited == "gymnasium":
        env = countdown(limit)
    elif limited == "torchrl":
        env = TransformedEnv(env, StepCounter(max_steps=limit))
    scores = evaluate_policy(env, constant(0.5), episodes=10, seed=3)
    counts = starts(3, 10)
    assert min(counts) < 10 < max(counts)
    lengths = [min(n, limit) for n in counts]
    assert scores["length"].tolist() == lengths
    pairs = zip(counts, lengths, strict=True)
    expected = [sum(range(n - k + 1, n + 1)) + 0.5 * k for n, k in pairs]
    assert scores["return"].tolist() == expected
    assert (scores["return"].dtype, scores["length"].dtype) == (
        torch.float32,
        torch.int64,
    )


def jerking(tensordict):
    """A policy that gives each row the same bits, whatever rows are beside it."""
    observation = tensordict["observation"]
    action = torch.remainder(1000 * observation[..., :1], 2) - 1
    actions = 3 if observation.shape[-1] == 11 else 1  # Hopper's, or Pendulum's
    return tensordict.set("action", action.expand(*action.shape[:-1], actions))


HOPPER = {"task": "Hopper-v5"}
PENDULUM = {"task": "Pendulum-v1", "action_bounds": "rescale", "max_episode_steps": 30}


def one_after_another(env, policy, episodes, seed):
    """Scores as a plain loop over a single environment finds them."""
    scores = []
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        env.set_seed(seed)
        for _ in range(episodes):
            steps = env.rollout(1000, policy)
            scores.append((steps["next", "reward"].double().sum().item(), len(steps)))
    return scores


@pytest.mark.parametrize("kwargs", [HOPPER, PENDULUM])
@pytest.mark.parametrize(("num_envs", "episodes"), [(1, 3), (3, 3), (4, 3), (3, 8)])
def test_side_by_side_is_as_one_after_another(kwargs, num_envs, episodes):
    expected = one_after_another(make_env(**kwargs), jerking, episodes, seed=5)
    env = LockstepEnv([make_env(**kwargs) for _ in range(num_envs)])
    for _ in range(2):
        scores = evaluate_policy(env, jerking, episodes=episodes, seed=5)
        assert scores["length"].tolist() == [length for _, length in expected]
        assert scores["return"].tolist() == pytest.approx(
            [total for total, _ in expected], rel=1e-6
        )
    assert kwargs is PENDULUM or len({length for _, length in expected}) > 2


@pytest.mark.parametrize(("num_envs", "episodes"), [(2, 7), (3, 3), (5, 3)])
def test_each_environment_has_its_share_of_the_episodes(num_envs, episodes):
    env = SerialEnv(num_envs, countdown)
    scores = evaluate_policy(env, constant(0.5), episodes=episodes, seed=4)
    counts, worker_seed = [], 4
    for _ in range(num_envs):
        counts.append(starts(worker_seed, episodes))
        worker_seed = countdown().set_seed(worker_seed)
    own = [counts[i % num_envs][i // num_envs] for i in range(episodes)]
    assert scores["length"].tolist() == own
    assert scores["return"].tolist() == [n * (n + 1) / 2 + 0.5 * n for n in own]


def test_ended_episodes_are_not_stepped(monkeypatch):
    steps = []

    def step(self, action, _step=Countdown.step):
        assert self.count > 0
        steps.append(1)
        return _step(self, action)

    monkeypatch.setattr(Countdown, "step", step)
    envs = [TransformedEnv(countdown()) for _ in range(3)]
    for env in LockstepEnv(envs), SerialEnv(3, countdown):
        steps.clear()
        scores = evaluate_policy(env, constant(0.0), episodes=5)
        assert len(steps) == scores["length"].sum()


@pytest.mark.parametrize("make", [countdown, Shared])
@pytest.mark.parametrize(
    "kind", [ExplorationType.DETERMINISTIC, ExplorationType.RANDOM]
)
def test_same_seed_same_scores_whatever_ran_before(make, kind):
    env, policy = make(), gaussian(dropout=0.5)

    def scores(seed):
        return evaluate_policy(
            env, policy, episodes=4, seed=seed, exploration_type=kind
        )

    first, other = scores(1), scores(2)
    torch.rand(7), np.random.rand(7), random.random()  # noqa: NPY002
    env.rollout(2, policy)
    again = scores(1)
    assert (first == again).all()
    assert not torch.equal(first["return"], other["return"])
    assert first["return"].unique().numel() > 1


def test_the_policy_draws_from_streams_with_the_seed():
    def first_draws(seed):
        draws = []

        def policy(tensordict):
            numpy_draw = np.random.rand()  # noqa: NPY002
            draws.append((torch.rand(()).item(), numpy_draw, random.random()))
            return constant(0.0)(tensordict)

        evaluate_policy(countdown(), policy, episodes=1, seed=seed)
        return draws[0]

    zero, one = first_draws(0), first_draws(1)
    assert first_draws(1) == one
    assert all(a != b for a, b in zip(zero, one, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_generators_modes_and_gradients_are_restored(fails):
    env, policy = Shared(), gaussian(dropout=0.5)
    policy[0].module[0].eval()
    seen = []

    def watch(module, inputs, output):
        seen.append((module.training, torch.is_grad_enabled()))
        if fails:
            raise RuntimeError("on purpose")

    policy[0].module[1].register_forward_hook(watch)

    def state():
        modes = [module.training for module in policy.modules()]
        return generator_states(), modes, torch.is_grad_enabled(), exploration_type()

    before = state()
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        evaluate_policy(env, policy, exploration_type=ExplorationType.RANDOM, seed=9)
    assert state() == before
    assert set(before[1]) == {True, False}
    assert set(seen) == {(False, False)}


def test_exploration_type():
    env, policy = countdown(), gaussian()
    mean = TensorDictModule(policy[0].module, ["observation"], ["action"])
    expected = evaluate_policy(env, mean, episodes=3)["return"]
    with set_exploration_type(ExplorationType.RANDOM):
        modes = evaluate_policy(env, policy, episodes=3)["return"]
    draws = evaluate_policy(
        env, policy, episodes=3, exploration_type=ExplorationType.RANDOM
    )["return"]
    assert torch.equal(modes, expected)
    assert (draws != expected).all()


def test_zero_policy_stands_still():
    env = countdown()
    scores = evaluate_policy(env, zero_policy(env), episodes=3, seed=1)
    assert scores["return"].tolist() == [n * (n + 1) / 2 for n in starts(1, 3)]
    first, second = (zero_policy(env)(env.reset())["action"] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    env = Shared()
    env.action_spec = Bounded(0.25, 1.0, (1,))
    assert zero_policy(env)(env.reset())["action"].tolist() == [0.25]


def test_random_policy_fills_the_bounds():
    env = make_env("Humanoid-v5")
    policy, start = random_policy(env), env.reset()
    actions = torch.stack([policy(start.copy())["action"] for _ in range(200)])
    assert actions.shape == (200, 17)
    assert 0.39 < actions.max() <= 0.4
    assert -0.4 <= actions.min() < -0.39


@pytest.mark.gpu
@pytest.mark.parametrize("env_device", [None, "cpu", "cuda"])
def test_policy_on_a_gpu(env_device):
    env = make_env("Hopper-v5", device=env_device)
    policy = gaussian(inputs=11, actions=3).to("cuda")
    before = torch.cuda.get_rng_state()
    first, again = (
        evaluate_policy(
            env, policy, episodes=2, exploration_type=ExplorationType.RANDOM
        )
        for _ in range(2)
    )
    torch.testing.assert_close(again, first)
    assert first.device is None or first.device.type == "cpu"
    assert torch.equal(before, torch.cuda.get_rng_state())


def two_rewards():
    env = Shared()
    env.reward_spec = Unbounded(2)
    return env


@pytest.mark.parametrize(
    ("env", "error", "message"),
    [
        (object, TypeError, "env: expected EnvBase, got object"),
        (
            lambda: SerialEnv(2, lambda: SerialEnv(3, Shared)),
            ValueError,
            r"env: .*at most one.*\[2, 3\]",
        ),
        (two_rewards, ValueError, r"one reward of one number.*\[2\]"),
    ],
)
def test_environments_that_cannot_be_scored_are_refused(env, error, message):
    with pytest.raises(error, match=message):
        evaluate_policy(env(), constant(0.0))
