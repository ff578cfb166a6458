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

from alm_torchrl import make_alm_loss, make_env
from alm_torchrl.analysis import (
    bias_summary,
    bound_bias,
    calibration_error,
    latent_rollout,
    latent_statistics,
    normalised_bias,
    participation_ratio,
    record_transitions,
    reliability,
)
from alm_torchrl.objectives.variants import Logarithms
from tests.line_agent import (
    GAMMA,
    QVALUE,
    VALUE,
    Line,
    make_line,
    make_line_baseline,
    make_line_loss,
)


def assert_close(actual, expected):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_exact_values_are_consistent():
    """The agent's Q is a fixed point, so it can serve as the oracle below."""
    value = QVALUE[0] + QVALUE[1] * 0.3
    assert value == pytest.approx(VALUE)
    assert value == pytest.approx(1.6 + GAMMA * VALUE * 0.8)


# The bias of the bound


@pytest.mark.parametrize("horizon", [1, 3])
def test_exact_estimates_differ_from_returns_by_what_the_time_limit_cut(horizon):
    found = bound_bias(
        make_line(limit=12), make_line_loss(), horizon=horizon, pairs=20, cutoff=8
    )
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
    wrong = make_line_loss(reward_bias=0.25, logits=[0.1, 0.5])
    found = bound_bias(make_line(limit=9), wrong, horizon=3, pairs=9)
    assert torch.equal(found["monte_carlo"], exact["monte_carlo"])
    assert torch.equal(found["qvalue"], exact["qvalue"])
    added = (0.25 + 0.5 * 0.4) * (1 + GAMMA + GAMMA**2)
    assert_close(found["bound"], exact["bound"] + added)


def test_estimates_draw_their_latents():
    env, loss = make_line(limit=5), make_line_loss(scale=0.5)
    loss.actor_params["module", "weight"].data.zero_()
    first, other = (bound_bias(env, loss, pairs=5, seed=seed) for seed in (0, 1))
    assert torch.equal(first["monte_carlo"], other["monte_carlo"])
    for name in ("bound", "qvalue"):
        assert (first[name] != other[name]).all()


def test_termination_ends_the_return_and_nothing_is_missing():
    env = make_line(lengths=(2, 5, 3))
    found = bound_bias(env, make_line_loss(), pairs=8, cutoff=4)
    assert found["step"].tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 2]
    assert found["missing"].tolist() == [0.0] * 9
    last_but_one = 1.6 * (1 + 0.8 * GAMMA)
    assert_close(found["monte_carlo"][:2], [last_but_one, 1.6 * 0.8])
    # The fifth step of the second episode counts although it is cut off.
    assert_close(found["monte_carlo"][5], 2 * 0.8**3 * last_but_one)


@pytest.mark.parametrize(
    ("agent", "error"), [("td3", -0.5), ("sac", -0.5), ("redq", 0.25)]
)
def test_critics_of_baselines_next_to_the_same_returns(agent, error):
    loss = make_line_baseline(agent, [1.0, -0.5])
    seen = modes_of(loss.qvalue_network)
    found = bound_bias(make_line(limit=12), loss, pairs=20, cutoff=8)
    assert set(seen) == {False}
    assert loss.qvalue_network.training
    exact = bound_bias(make_line(limit=12), make_line_loss(), pairs=20, cutoff=8)
    for name in ("monte_carlo", "missing", "episode", "step"):
        assert_close(found[name], exact[name].tolist())
    assert_close(found["qvalue"], exact["qvalue"] + error)
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
    assert_close(summary["qvalue", "overall", "std"], np.std([-4.0, 0.0, -12.0]) / 8)


@pytest.mark.parametrize("horizon", [1, 3])
def test_a_bound_of_logarithms_stands_in_units_of_the_return(horizon):
    loss = make_line_loss(logarithms=Logarithms("bound"))
    found = bound_bias(make_line(limit=6), loss, horizon=horizon, pairs=6)
    for bound, step in zip(found["bound"].tolist(), range(6), strict=True):
        x = 0.8 ** np.arange(step, step + horizon + 1)
        logs = (1 - GAMMA) * np.log(1.6 * x[:-1]) @ GAMMA ** np.arange(horizon)
        logs += GAMMA**horizon * np.log((1 - GAMMA) * VALUE * x[-1])
        assert bound == pytest.approx(np.exp(logs) / (1 - GAMMA), rel=1e-5)
    assert (found["bound"] < found["qvalue"]).all()
    exact = bound_bias(make_line(limit=6), make_line_loss(), pairs=6)
    for name in ("monte_carlo", "qvalue"):
        assert torch.equal(found[name], exact[name])


def test_returns_are_of_the_rewards_that_the_agent_learns():
    loss = make_line_loss(reward_transform=lambda reward: 3 * reward - 1)
    found = bound_bias(make_line(limit=2), loss, pairs=2)["monte_carlo"]
    assert_close(found, [3.8 + GAMMA * (3 * 1.28 - 1), 3 * 1.28 - 1])


# Open-loop rollouts


@pytest.mark.parametrize("model", [(0.5, 1.0, 0.0), (0.6, 1.1, 0.05)])
def test_the_error_of_a_model_is_that_of_a_loop(model):
    loss = make_line_loss(model=model[:2], shift=model[2])
    found = latent_rollout(make_line(limit=30), loss, steps=12, starts=3)
    x = 0.8 ** np.arange(31)
    assert found["step"][:, 0].tolist() == [0, 9, 18]
    for row, start in enumerate((0, 9, 18)):
        steps = [*range(start, start + 13)]
        guess = [x[start]]
        for step in steps[:-1]:
            inputs = (guess[-1], 0.3 * x[step], 1.0)
            guess.append(np.dot(model, inputs))
        error = np.abs(guess - x[steps])
        assert found["step"][row].tolist() == steps
        assert_close(found["latent"][row, :, 0], x[steps])
        assert_close(found["predicted"][row, :, 0], guess)
        assert_close(found["error"][row], error)
        assert_close(found["normalised_error"][row], error / x.std())


@pytest.mark.parametrize(("steps", "starts"), [(5, 1), (3, 3), (9, 1)])
def test_short_episodes_give_what_they_have(steps, starts):
    env = make_line(lengths=(5,))
    found = latent_rollout(env, make_line_loss(), steps=steps, starts=20)
    assert found.shape == (starts, min(steps, 5) + 1)
    assert found["step"].max() == 5


# Statistics


def test_kl_and_spread_of_the_latents():
    # This model does not read the latent, so that its mean has no noise.
    env, loss = make_line(limit=10), make_line_loss(scale=0.5, model=(0.0, 1.0))
    batch = record_transitions(env, loss, transitions=30)
    found = latent_statistics(loss, batch.reshape(15, 2))
    x = batch["observation"].double()
    expected = (0.5 * x).square().mean() / (2 * 0.5**2)
    assert found["kl"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert found["latent_noise"].item() == pytest.approx(0.5)
    assert found["latent_deviation"].item() == pytest.approx(x.std(correction=0).item())
    assert found["effective_dim"].item() == found["latent_dim"].item() == 1
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
    assert participation_ratio(torch.ones(3, 2)).isnan()
    with pytest.raises(ValueError, match=r"two points.*\[1, 2\]"):
        participation_ratio(torch.ones(1, 2))


def test_calibrated_logits_have_no_error():
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(200_000, generator=generator)
    real = torch.rand(200_000, generator=generator) < probability
    logits = torch.stack([(1 - probability).log(), probability.log()], -1)
    assert calibration_error(reliability(logits, real)) < 0.005
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
    with pytest.raises(ValueError, match=r"\[5, 2\].*got \[4, 2\]"):
        reliability(logits[:4], real)
    with pytest.raises(ValueError, match=r"bins.*got 0"):
        reliability(logits, real, bins=0)


# What is shared

ANALYSES = {
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


@pytest.mark.parametrize("name", ANALYSES)
def test_no_trace_is_left_and_only_the_seed_matters(name):
    # Seeds do not change this task, only the latents that the agent draws.
    env, loss = make_line(limit=15), make_line_loss(scale=0.5, logits=[0.1, 0.5])
    run = ANALYSES[name]
    before = generator_states()
    first = run(env, loss, seed=3)
    assert generator_states() == before
    torch.rand(5)
    with set_exploration_type(ExplorationType.MEAN):
        again = run(env, loss, seed=3)
    assert (first == again).all()
    assert not (first == run(env, loss, seed=4)).all()
    assert not any(value.requires_grad for value in first.values(True, True))
    assert torch.is_grad_enabled()


def modes_of(*networks):
    """A list that each call of a network adds its mode to: training or not."""
    seen = []
    for network in networks:
        network.register_forward_pre_hook(lambda net, args: seen.append(net.training))
    return seen


def tiny_agent():
    env = make_env("Pendulum-v1", action_bounds="rescale", max_episode_steps=15)
    return env, make_alm_loss(env, latent_dim=4, hidden_dim=8, model_hidden_dim=8)


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_networks_are_in_evaluation_mode_and_back_in_training():
    env, loss = tiny_agent()
    parts = ("encoder", "model", "actor", "qvalue", "reward", "classifier")
    networks = [getattr(loss, part) for part in parts]
    seen = [modes_of(*network.modules()) for network in networks]
    bound_bias(env, loss, pairs=1)
    assert all(set(modes) == {False} for modes in seen)
    assert all(network.training for network in networks)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ANALYSES)
def test_networks_on_a_gpu(name):
    env, loss = tiny_agent()
    expected = ANALYSES[name](env, loss)
    found = ANALYSES[name](env, loss.to("cuda"))
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
    terminated = batch["next", "terminated"].flatten().tolist()
    assert terminated == [False, False, False, True, False, False]


@pytest.mark.parametrize(
    ("function", "changed", "error", "message"),
    [
        (bound_bias, {"loss": torch.nn.Linear(1, 1)}, TypeError, "loss.*got Linear"),
        (bound_bias, {"cutoff": 0}, ValueError, "cutoff.*got 0"),
        (bound_bias, {"env": SerialEnv(2, make_line)}, ValueError, r"env.*\[2\]"),
        (latent_rollout, {"env": Line()}, TypeError, "env.*got Line"),
        (
            latent_rollout,
            {"loss": make_line_baseline("sac", [0.0, 0.0])},
            TypeError,
            "loss: expected ALMLoss, got SACBaseline",
        ),
        (latent_rollout, {"starts": 0}, ValueError, "starts.*got 0"),
        (record_transitions, {"transitions": 0}, ValueError, "transitions.*got 0"),
        (record_transitions, {"seed": -1}, ValueError, "seed.*got -1"),
    ],
)
def test_errors_say_what_was_expected_and_given(function, changed, error, message):
    arguments = {"env": make_line(lengths=(4,)), "loss": make_line_loss()} | changed
    with pytest.raises(error, match=message):
        function(**arguments)
