"""The moments of Gymnasium's normalising wrappers."""

from __future__ import annotations

import copy

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import NormalizeObservation, NormalizeReward
from torchrl.envs import GymWrapper, TransformedEnv

from alm_torchrl.envs import Normalizers, make_env
from alm_torchrl.evaluation import evaluate_policy, random_policy


def normalized(task="Pendulum-v1"):
    env = NormalizeReward(NormalizeObservation(gymnasium.make(task)))
    return TransformedEnv(GymWrapper(env))


def same(one, other):
    return all(
        np.array_equal(value, other[wrapper][name])
        for wrapper, moments in one.items()
        for name, value in moments.items()
    )


def test_moments_travel_from_one_environment_to_another():
    one, other = normalized(), normalized()
    one.rollout(20)
    saved = Normalizers(one).state_dict()
    assert list(saved) == ["0.NormalizeReward", "1.NormalizeObservation"]
    assert not same(saved, Normalizers(other).state_dict())
    Normalizers(other).load_state_dict(saved)
    assert same(saved, Normalizers(other).state_dict())
    kept = copy.deepcopy(saved)
    other.rollout(20)
    assert same(kept, saved)
    for env in (one, other):
        Normalizers(env).load_state_dict(saved)
        env.set_seed(0)
    with Normalizers(one).frozen(), Normalizers(other).frozen():
        first, second = one.reset(), other.reset()
    assert torch.equal(first["observation"], second["observation"])


def test_an_evaluation_moves_no_moments():
    env = normalized()
    env.rollout(20)
    before = Normalizers(env).state_dict()
    scores = [evaluate_policy(env, random_policy(env), episodes=1) for _ in "ab"]
    assert same(before, Normalizers(env).state_dict())
    assert torch.equal(scores[0]["return"], scores[1]["return"])
    env.reset()
    assert not same(before, Normalizers(env).state_dict())


def test_state_that_does_not_fit_changes_nothing():
    env = normalized()
    before = Normalizers(env).state_dict()
    larger = normalized("HalfCheetah-v5")
    larger.rollout(3)
    for state, message in (
        (
            Normalizers(larger).state_dict(),
            r"mean of NormalizeObs.*\(3,\), got \(17,\)",
        ),
        ({"0.NormalizeReward": {}}, "expected the normalising wrappers"),
        ({name: {} for name in before}, "mean of NormalizeReward: .*got None"),
        (Normalizers(make_env("Hopper-v5")).state_dict(), "expected the normal"),
    ):
        with pytest.raises(ValueError, match=message):
            Normalizers(env).load_state_dict(state)
        assert same(before, Normalizers(env).state_dict())
