from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.envs import SerialEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from alm_torchrl import make_alm_loss, make_env
from alm_torchrl.analysis.bias import bias_summary, bound_bias, normalised_bias
from alm_torchrl.analysis.recording import record_transitions
from alm_torchrl.analysis.rollouts import latent_rollout
from alm_torchrl.analysis.statistics import (
    calibration_error,
    latent_statistics,
    participation_ratio,
    reliability,
)
from tests.line_agent import (
    GAMMA,
    QVALUE,
    VALUE,
    make_line,
    make_line_baseline,
    make_line_loss,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def assert_close(actual, expected):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, **CLOSE)


def geometric(count):
    return sum(GAMMA**t for t in range(count))


# The bias of the bound


@pytest.mark.parametrize("horizon", [1, 3])
def test_exact_estimates_differ_from_returns_by_what_the_time_limit_cut(horizon):
    found = bound_bias(
        make_line(limit=12), make_line_loss(), horizon=horizon, pairs=20, cutoff=8
    )
    assert found.shape == (24,)
    assert found["episode"].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert found["step"].tolist() == [*range(8)] * 3
    start = (found["episode"] + 1) * 0.8 ** found["step"]
    left = 12 - found["step"]
    assert_close(found["missing"], GAMMA**left)
    returns = [
        sum(GAMMA**t * 1.6 * 0.8**t * x for t in range(n))
        for x, n in zip(start.tolist(), left.tolist(), strict=True)
    ]
    assert_close(found["monte_carlo"], returns)
    cut = found["missing"] * VALUE * 0.8**left * start
    for name in ("bound", "qvalue"):
        assert_close(found[name] - found["monte_carlo"], cut)


def test_known_errors_of_the_networks_appear_in_the_bias():
    exact = bound_bias(make_line(limit=9), make_line_loss(), pairs=9)
    wrong = make_line_loss(reward_bias=0.25, logits=[0.1, 0.5], scale=0.0)
    found = bound_bias(make_line(limit=9), wrong, horizon=3, pairs=9)
    assert torch.equal(found["monte_carlo"], exact["monte_carlo"])
    assert torch.equal(found["qvalue"], exact["qvalue"])
    added = (0.25 + 0.5 * 0.4) * geometric(3)
    assert_close(found["bound"], exact["bound"] + added)


def test_termination_ends_the_return_and_nothing_is_missing():
    env = make_line(lengths=(2, 5, 3))
    found = bound_bias(env, make_line_loss(), pairs=8, cutoff=4)
    assert found["step"].tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2]
    assert found["missing"].tolist() == [0.0] * 9
    last_but_one = 1.6 * (1 + 0.8 * GAMMA)
    assert_close(found["monte_carlo"][:2], [last_but_one, 1.6 * 0.8])
    # The fifth step of the second episode counts although it is cut off.
    assert_close(found["monte_carlo"][5], 2 * 0.8**3 * last_but_one)


def test_the_whole_episode_counts_beyond_the_cutoff():
    found = bound_bias(make_line(limit=200), make_line_loss(), pairs=1, cutoff=1)
    assert_close(found["monte_carlo"], [VALUE])
    assert found["missing"].item() == pytest.approx(GAMMA**200)


@pytest.mark.parametrize(
    ("agent", "error"), [("td3", -0.5), ("sac", -0.5), ("redq", 0.25)]
)
def test_critics_of_baselines_next_to_the_same_returns(agent, error):
    loss = make_line_baseline(agent, [1.0, -0.5])
    states, seen = torch.get_rng_state(), []
    loss.qvalue_network.register_forward_pre_hook(
        lambda module, args: seen.append(module.training)
    )
    found = bound_bias(make_line(limit=12), loss, pairs=20, cutoff=8)
    assert torch.equal(torch.get_rng_state(), states)
    assert seen
    assert not any(seen)
    assert loss.qvalue_network.training
    exact = bound_bias(make_line(limit=12), make_line_loss(), pairs=20, cutoff=8)
    for name in ("monte_carlo", "missing", "episode", "step"):
        assert_close(found[name], exact[name].tolist())
    assert_close(found["qvalue"], exact["qvalue"] + error)
    assert "bound" not in found
    assert set(normalised_bias(found).keys()) == {"qvalue"}
    summary, mean = bias_summary(found), found["monte_carlo"].mean()
    assert set(summary.keys()) == {"qvalue"}
    expected = (found["qvalue"].mean() - mean) / mean
    assert_close(summary["qvalue", "overall", "mean"], expected)


def test_normalised_in_both_ways():
    pairs = TensorDict(
        monte_carlo=torch.tensor([-40.0, 4.0, 12.0]),
        bound=torch.tensor([-30.0, 5.0, 12.0]),
        qvalue=torch.tensor([-44.0, 4.0, 0.0]),
        batch_size=[3],
    )
    found = normalised_bias(pairs)
    assert_close(found["bound", "bias"], [10.0, 1.0, 0.0])
    assert_close(found["bound", "per_pair"], [0.25, 0.1, 0.0])
    assert_close(found["bound", "overall"], [10 / 8, 1 / 8, 0.0])
    assert_close(found["qvalue", "per_pair"], [-0.1, 0.0, -1.0])
    summary = bias_summary(pairs)
    assert_close(summary["qvalue", "bias", "mean"], -16 / 3)
    expected = np.std([-4.0, 0.0, -12.0])
    assert_close(summary["qvalue", "bias", "std"], expected)
    assert_close(summary["qvalue", "overall", "std"], expected / 8)


# Open-loop rollouts


def test_a_perfect_model_makes_no_error():
    found = latent_rollout(
        make_line(limit=30), make_line_loss(scale=0.3), steps=10, starts=4
    )
    assert found.shape == (4, 11)
    assert found["step"][:, 0].tolist() == [0, 6, 13, 20]
    assert_close(found["error"], torch.zeros(4, 11))
    assert found["latent"].var() > 0.01


def test_the_error_of_a_wrong_model_is_that_of_a_loop():
    loss = make_line_loss(model=(0.6, 1.1), shift=0.05)
    found = latent_rollout(make_line(limit=30), loss, steps=12, starts=3)
    x = [0.8**t for t in range(31)]
    deviation = np.std(x)
    for row, start in enumerate([0, 9, 18]):
        guess, error = x[start], []
        for t in range(12):
            error.append(abs(guess - x[start + t]))
            guess = 0.6 * guess + 1.1 * 0.3 * x[start + t] + 0.05
        error.append(abs(guess - x[start + 12]))
        assert_close(found["error"][row], error)
        assert_close(found["normalised_error"][row], np.divide(error, deviation))
        assert found["step"][row].tolist() == [*range(start, start + 13)]
        assert found["predicted"][row, -1].item() == pytest.approx(guess, abs=1e-5)


@pytest.mark.parametrize(("steps", "starts"), [(5, 1), (4, 2), (3, 3)])
def test_short_episodes_give_what_they_have(steps, starts):
    env = make_line(lengths=(5,))
    found = latent_rollout(env, make_line_loss(), steps=steps, starts=20)
    assert found.shape == (starts, steps + 1)
    assert found["step"].max() == 5
    longer = latent_rollout(env, make_line_loss(), steps=9, starts=20)
    assert longer.shape == (1, 6)


# Statistics


def deterministic(loss):
    loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    return loss


def test_kl_and_spread_of_the_latents():
    env = make_line(limit=10)
    loss = deterministic(make_line_loss(scale=0.5, shift=0.2))
    batch = record_transitions(env, loss, transitions=30)
    found = latent_statistics(loss, batch.reshape(15, 2))
    assert found["kl"].item() == pytest.approx(0.2**2 / (2 * 0.5**2), rel=1e-4)
    assert found["latent_noise"].item() == pytest.approx(0.5)
    x = batch["observation"].double()
    assert found["latent_deviation"].item() == pytest.approx(x.std(correction=0).item())
    assert found["effective_dim"].item() == 1.0
    assert "classifier_accuracy" not in found


def test_kl_is_averaged_over_sampled_latents():
    env, loss = make_line(limit=50), make_line_loss(scale=0.5)
    batch = record_transitions(env, loss, transitions=10)
    found = latent_statistics(loss, batch.expand(1000, 10))
    # The model's mean is off by 0.5 times the noise of z.
    assert found["kl"].item() == pytest.approx(0.5**2 / 2, rel=0.1)


def test_a_constant_classifier_is_right_by_half():
    env, loss = make_line(limit=10), make_line_loss(logits=[0.1, 0.5], scale=0.5)
    batch = record_transitions(env, loss, transitions=10)
    found = latent_statistics(loss, batch)
    probability = 1 / (1 + np.exp(-0.4))
    assert found["classifier_accuracy"].item() == 0.5
    assert found["calibration_error"].item() == pytest.approx(probability - 0.5)
    table = found["reliability"]
    assert table["count"].tolist() == [0, 0, 0, 0, 0, 20, 0, 0, 0, 0]
    assert table["confidence"][5].item() == pytest.approx(probability)


def test_real_latents_are_the_encoders():
    env, loss = make_line(limit=10), make_line_loss(shift=8.0, logits=[0.0, 0.0])
    loss.classifier_params["module", "weight"].data[1, 2] = -50.0
    loss.classifier_params["module", "bias"].data[1] = 50 * 5.0
    found = latent_statistics(loss, record_transitions(env, loss, transitions=10))
    assert found["classifier_accuracy"].item() == 1.0
    assert found["calibration_error"].item() < 1e-3


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=5), st.integers(0, 99))
def test_participation_ratio_of_known_variances(deviations, seed):
    scale = torch.tensor(deviations, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    size = len(deviations)
    turn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    axes = torch.diag(scale) @ torch.linalg.qr(turn).Q
    points = torch.cat([axes, -axes]) + 3.0
    variance = scale.square()
    expected = variance.sum().square() / variance.square().sum()
    torch.testing.assert_close(participation_ratio(points), expected)


def test_participation_ratio_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000, 6, generator=generator)
    assert participation_ratio(noise).item() == pytest.approx(6, rel=0.01)
    line = noise[:, :1] * torch.arange(1.0, 7.0) - 4
    assert participation_ratio(line).item() == pytest.approx(1)
    assert participation_ratio(torch.ones(3, 2)).isnan()
    with pytest.raises(ValueError, match=r"at least two points.*\[1, 2\]"):
        participation_ratio(torch.ones(1, 2))


def test_calibrated_logits_have_no_error():
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(200_000, generator=generator)
    real = torch.rand(200_000, generator=generator) < probability
    logits = torch.stack([(1 - probability).log(), probability.log()], -1)
    table = reliability(logits, real)
    assert table["count"].sum() == 200_000
    assert calibration_error(table) < 0.005
    torch.testing.assert_close(
        table["confidence"], table["frequency"], rtol=0, atol=0.02
    )
    assert calibration_error(reliability(3 * logits, real)) > 0.1


def test_reliability_bins():
    probability = torch.tensor([0.0, 0.24, 0.26, 0.74, 1.0])
    logits = torch.stack([(1 - probability).log(), probability.log()], -1)
    real = torch.tensor([False, True, True, False, True])
    table = reliability(logits, real, bins=4)
    assert table["count"].tolist() == [2, 1, 1, 1]
    assert table["frequency"].tolist() == [0.5, 1.0, 0.0, 1.0]
    assert_close(table["confidence"], [0.12, 0.26, 0.74, 1.0])
    expected = (2 * 0.38 + 0.74 + 0.74 + 0) / 5
    assert calibration_error(table).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"\[5, 2\], got \[4, 2\]"):
        reliability(logits[:4], real)


# What is shared


def pendulum():
    env = make_env("Pendulum-v1", action_bounds="rescale", max_episode_steps=15)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = make_alm_loss(env, latent_dim=4, hidden_dim=8, model_hidden_dim=8)
    SoftUpdate(loss, tau=0.5)
    return env, loss


DIAGNOSTICS = {
    "bias": lambda env, loss, **kw: bound_bias(env, loss, pairs=20, **kw),
    "rollout": lambda env, loss, **kw: latent_rollout(env, loss, steps=4, **kw),
    "record": lambda env, loss, **kw: record_transitions(
        env, loss, transitions=20, **kw
    ),
    "statistics": lambda env, loss, **kw: latent_statistics(
        loss, record_transitions(env, loss, transitions=20), **kw
    ).exclude("reliability"),
}


def generator_states():
    states = torch.get_rng_state().tolist(), random.getstate()
    return (*states, np.random.get_state()[1].tolist())  # noqa: NPY002


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_no_trace_is_left_and_nothing_around_matters(name):
    env, loss = pendulum()
    run = DIAGNOSTICS[name]
    before = generator_states()
    first = run(env, loss, seed=3)
    assert generator_states() == before
    torch.rand(5)
    with set_exploration_type(ExplorationType.RANDOM):
        again = run(env, loss, seed=3)
    assert (first == again).all()
    other = run(env, loss, seed=4)
    assert not (first == other).all()
    assert not any(value.requires_grad for value in first.values(True, True))
    assert torch.is_grad_enabled()


def test_networks_are_in_evaluation_mode_and_back_in_training():
    env, loss = pendulum()
    seen = []
    for part in ("encoder", "model", "actor", "qvalue", "reward", "classifier"):
        getattr(loss, part).register_forward_pre_hook(
            lambda module, args: seen.append(module.training)
        )
    bound_bias(env, loss, pairs=1)
    assert len(seen) > 5
    assert not any(seen)
    assert loss.encoder.training
    assert loss.qvalue.training


@pytest.mark.gpu
@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_networks_on_a_gpu(name):
    env, loss = pendulum()
    expected = DIAGNOSTICS[name](env, loss)
    found = DIAGNOSTICS[name](env, loss.to("cuda"))
    devices = {value.device.type for value in found.values(True, True)}
    assert devices == {"cuda" if name in ("record", "statistics") else "cpu"}
    assert found.shape == expected.shape
    assert all(value.isfinite().all() for value in found.values(True, True))


def test_recorded_transitions_are_the_agents():
    env, loss = make_line(lengths=(4,)), make_line_loss()
    batch = record_transitions(env, loss, transitions=6)
    x = [1, 0.8, 0.64, 0.512, 2, 1.6]
    assert_close(batch["observation"][:, 0], x)
    assert_close(batch["action"][:, 0], np.multiply(0.3, x))
    assert_close(batch["next", "reward"][:, 0], np.multiply(1.6, x))
    assert batch["next", "terminated"].flatten().tolist() == [
        *(False, False, False, True, False, False)
    ]


def test_errors():
    env, loss = make_line(lengths=(4,)), make_line_loss()
    with pytest.raises(TypeError, match="ALMLoss or BaselineLoss, got Linear"):
        bound_bias(env, torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="loss: expected ALMLoss, got SACBaseline"):
        latent_rollout(env, make_line_baseline("sac", [0.0, 0.0]))
    with pytest.raises(TypeError, match="env: expected EnvBase, got Line"):
        latent_rollout(env._env, loss)
    with pytest.raises(ValueError, match="cutoff: expected an integer >= 1, got 0"):
        bound_bias(env, loss, cutoff=0)
    with pytest.raises(ValueError, match="starts: expected an integer >= 1, got 0"):
        latent_rollout(env, loss, starts=0)
    with pytest.raises(ValueError, match="transitions: expected an integer >= 1"):
        record_transitions(env, loss, transitions=0)
    with pytest.raises(ValueError, match="bins: expected an integer >= 1, got 0"):
        latent_statistics(loss, env.rollout(3), bins=0)
    with pytest.raises(ValueError, match="no batch dimensions"):
        bound_bias(SerialEnv(2, make_line), loss)


def test_the_exact_values_are_consistent():
    """The agent's Q is a fixed point, so that the oracle above is one."""
    x = 1.7
    value = QVALUE[0] * x + QVALUE[1] * 0.3 * x
    assert value == pytest.approx(VALUE * x)
    assert value == pytest.approx(1.6 * x + GAMMA * VALUE * 0.8 * x)
