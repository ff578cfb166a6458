"""Settings reach the environment, the networks and the loss."""

from __future__ import annotations

import pytest
import torch

from alm_torchrl.runs.agents import build_env, build_loss, describe_spaces

SPACES = {"observation_dim": 3, "action_low": [-1.0, -2.0], "action_high": [1.0, 2.0]}
SMALL = {"latent_dim": 7, "hidden_dim": 11, "model_hidden_dim": 13}


def build(**settings):
    return build_loss({**SMALL, **settings}, SPACES)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        *(({name: 0.5}, {name: 0.5}) for name in ("gamma", "lmbda", "noise_clip")),
        *(({name: 0.5}, {name: 0.5}) for name in ("kl_coef", "value_coef")),
        ({"classifier_coef": 0.5}, {"classifier_coef": 0.5}),
        ({"discount_model_loss": True}, {"discount_model_loss": True}),
        ({"model_objective": "likelihood"}, {"value_coef": 0.0, "reward_coef": 0.0}),
        ({}, {"value_coef": 1.0, "reward_coef": 1.0, "discount_model_loss": False}),
    ],
)
def test_coefficients_are_those_of_the_settings(settings, expected):
    loss = build(**settings)
    assert {name: getattr(loss, name) for name in expected} == expected


def shapes(loss):
    """The shapes of each part's parameters, in order."""
    found = {}
    for name, value in loss.named_parameters():
        found.setdefault(name.split("_params")[0], []).append(tuple(value.shape))
    return found


def test_networks_have_the_sizes_of_the_settings():
    found = shapes(build())
    first = {part: sizes[0] for part, sizes in found.items()}
    assert first == {
        "encoder": (11, 3),
        "model": (13, 7 + 2),
        "actor": (11, 7),
        "qvalue": (11, 7 + 2),
        "reward": (11, 7 + 2),
        "classifier": (11, 7 + 2 + 7),
    }
    assert found["model"][-1] == (2 * 7,)
    assert shapes(build(classifier="linear"))["classifier"] == [(2, 7 + 2 + 7), (2,)]
    identity = shapes(build(encoder="identity"))
    assert "encoder" not in identity
    assert identity["actor"][0] == (11, 3)


@pytest.mark.parametrize("agent", ["alm", "td3"])
def test_noise_follows_the_settings(agent):
    settings = {"noise_initial": 0.7, "noise_final": 0.2, "noise_steps": 9}
    schedule = build(agent=agent, **settings).noise_schedule
    assert (schedule.initial, schedule.final, schedule.steps) == (0.7, 0.2, 9)


def test_a_learned_noise_has_no_schedule():
    assert build(entropy=True).noise_schedule is None


@pytest.mark.parametrize("agent", ["td3", "sac", "redq"])
def test_baselines_take_what_they_know(agent):
    loss = build(agent=agent, gamma=0.5)
    assert loss.agent == agent
    assert loss.value_estimator.gamma == 0.5
    sizes = {size for p in loss.parameters() for size in p.shape}
    assert 11 in sizes
    assert not sizes & {7, 13}


def test_the_environment_follows_the_settings():
    settings = {"task": "Pendulum-v1", "action_bounds": "rescale"}
    assert describe_spaces(build_env(settings))["action_high"] == [1.0]
    settings["dynamics_noise"] = 0.5
    with pytest.raises(ValueError, match="dynamics_noise: expected a MuJoCo task"):
        build_env(settings)
    settings["dynamics_noise"] = 0.0
    with pytest.raises(ValueError, match="speed"):
        build_env({**settings, "speed": 1})
    first, second = (
        build_env(settings, seed=seed).reset()["observation"] for seed in (0, 1)
    )
    assert not torch.equal(first, second)
