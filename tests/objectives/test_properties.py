"""Properties of the mathematics, the action noise and the loss, on generated input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives.value.functional import td_lambda_return_estimate

from alm_torchrl import ClampedNormal, NoiseSchedule, functional
from alm_torchrl.testing import (
    make_loss,
    make_two_draw_batch,
    problem_sizes,
)

FEW = st.integers(1, 6)
UNIT = st.floats(0, 1)
SEEDS = st.integers(0, 2**31)
MODEST = st.floats(-10, 10)
few = settings(max_examples=30)


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gaussians(seed, *shape):
    loc_p, log_p, loc_q, log_q = normal(seed, 4, *shape)
    return loc_p, log_p.exp(), loc_q, log_q.exp()


def double(batch):
    return batch.apply(lambda x: x.double() if x.is_floating_point() else x)


def same(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **tolerance)


# -- KL ------------------------------------------------------------------------------


@few
@given(SEEDS, FEW, FEW)
def test_kl_equals_a_loop_and_torch(seed, rows, size):
    loc_p, scale_p, loc_q, scale_q = gaussians(seed, rows, size)
    actual = functional.gaussian_kl(loc_p, scale_p, loc_q, scale_q)
    library = kl_divergence(Normal(loc_p, scale_p), Normal(loc_q, scale_q)).sum(-1)
    loop = []
    for row in range(rows):
        total = 0.0
        for i in range(size):
            m, s = loc_p[row, i].item(), scale_p[row, i].item()
            n, r = loc_q[row, i].item(), scale_q[row, i].item()
            total += math.log(r / s) + (s**2 + (m - n) ** 2) / (2 * r**2) - 0.5
        loop.append(total)
    same(actual, torch.tensor(loop, dtype=torch.float64))
    same(actual, library)


@few
@given(SEEDS, FEW)
def test_kl_is_positive_between_two_and_zero_on_itself(seed, size):
    loc_p, scale_p, loc_q, scale_q = gaussians(seed, 8, size)
    assert (functional.gaussian_kl(loc_p, scale_p, loc_q, scale_q) > 0).all()
    itself = functional.gaussian_kl(loc_p, scale_p, loc_p, scale_p)
    assert torch.equal(itself, torch.zeros(8, dtype=torch.float64))


@few
@given(SEEDS, FEW, MODEST, st.floats(0.1, 10))
def test_kl_does_not_change_with_the_origin_or_the_unit(seed, size, shift, unit):
    loc_p, scale_p, loc_q, scale_q = gaussians(seed, 4, size)
    moved = functional.gaussian_kl(
        unit * loc_p + shift, unit * scale_p, unit * loc_q + shift, unit * scale_q
    )
    expected = functional.gaussian_kl(loc_p, scale_p, loc_q, scale_q)
    same(moved, expected, rtol=1e-6, atol=1e-6)


# -- returns -------------------------------------------------------------------------


def lambda_return_loop(reward, value, gamma, lmbda):
    """Definition: lambda-weighted average of the n-step returns from each t."""
    horizon, returns = len(reward), []
    for t in range(horizon):
        steps, rewards, discount = [], 0.0, 1.0
        for k in range(t, horizon):
            rewards += discount * reward[k]
            discount *= gamma
            steps.append(rewards + discount * value[k])
        total = lmbda ** (len(steps) - 1) * steps[-1]
        for n, step in enumerate(steps[:-1]):
            total += (1 - lmbda) * lmbda**n * step
        returns.append(total)
    return returns


@few
@given(SEEDS, FEW, FEW, UNIT, UNIT)
def test_lambda_return_is_the_average_of_all_horizons(
    seed, rows, horizon, gamma, lmbda
):
    """And what TorchRL computes."""
    reward, value = normal(seed, 2, rows, horizon)
    expected = [
        lambda_return_loop(*pair, gamma, lmbda)
        for pair in zip(reward.tolist(), value.tolist(), strict=True)
    ]
    actual = functional.lambda_return(reward, value, gamma, lmbda)
    same(actual, torch.tensor(expected, dtype=torch.float64))
    done = torch.zeros(rows, horizon, 1, dtype=torch.bool)
    library = td_lambda_return_estimate(
        gamma, lmbda, value.unsqueeze(-1), reward.unsqueeze(-1), done, done
    )
    same(actual, library.squeeze(-1))


@few
@given(SEEDS, FEW, FEW, UNIT)
def test_lambda_zero_is_one_step_and_lambda_one_the_whole_horizon(
    seed, rows, horizon, gamma
):
    reward, value = normal(seed, 2, rows, horizon)
    one_step = functional.lambda_return(reward, value, gamma, 0.0)
    same(one_step, reward + gamma * value)
    whole = functional.lambda_return(reward, value, gamma, 1.0)
    for t in range(horizon):
        bound = functional.k_step_bound(reward[:, t:], value[:, -1], gamma)
        same(whole[:, t], bound)


@few
@given(SEEDS, FEW, FEW, UNIT)
def test_sums_over_the_horizon_equal_a_loop(seed, rows, horizon, gamma):
    reward, terminal = normal(seed, rows, horizon), normal(seed + 1, rows)
    sums = [sum(gamma**t * r for t, r in enumerate(row)) for row in reward.tolist()]
    sums = torch.tensor(sums, dtype=torch.float64)
    bound = functional.k_step_bound(reward, terminal, gamma)
    same(bound, sums + gamma**horizon * terminal)
    same(functional.discounted_mean(reward, gamma), sums / horizon)


@few
@given(SEEDS, FEW, FEW, UNIT, UNIT, MODEST)
def test_a_constant_on_all_rewards_shifts_the_returns(
    seed, rows, horizon, gamma, lmbda, shift
):
    """By shift * sum_{i<K-t} (gamma lmbda)^i."""
    reward, value = normal(seed, 2, rows, horizon)
    before = functional.lambda_return(reward, value, gamma, lmbda)
    after = functional.lambda_return(reward + shift, value, gamma, lmbda)
    for t in range(horizon):
        moved = shift * sum((gamma * lmbda) ** i for i in range(horizon - t))
        same(after[:, t], before[:, t] + moved)


@few
@given(SEEDS, FEW, UNIT, UNIT, MODEST)
def test_a_constant_value_and_fitting_rewards_are_a_fixed_point(
    seed, horizon, gamma, lmbda, level
):
    value = torch.full((3, horizon), level, dtype=torch.float64)
    reward = (1 - gamma) * value
    same(functional.lambda_return(reward, value, gamma, lmbda), value)
    same(functional.k_step_bound(reward, value[:, 0], gamma), value[:, 0])


@few
@given(SEEDS, FEW, FEW, UNIT)
def test_model_objective_equals_a_loop_with_both_discountings(
    seed, rows, horizon, gamma
):
    (kl, reward), terminal = normal(seed, 2, rows, horizon), normal(seed + 1, rows)

    def loop(gamma):
        totals = []
        for row in range(rows):
            total = -(gamma**horizon) * terminal[row].item()
            for t in range(horizon):
                total += gamma**t * (kl[row, t].item() - reward[row, t].item())
            totals.append(total)
        return torch.tensor(totals, dtype=torch.float64)

    same(functional.model_objective(kl, reward, terminal), loop(1.0))
    same(functional.model_objective(kl, reward, terminal, gamma), loop(gamma))


# -- bounds of the Gaussian heads ----------------------------------------------------

SORTED = st.lists(st.floats(-100, 100), min_size=2, max_size=20).map(
    lambda values: torch.tensor(sorted(values), dtype=torch.float64)
)


@few
@given(SORTED, st.floats(0.5, 50))
def test_bound_loc_is_odd_increasing_and_bounded(raw, limit):
    bounded = functional.bound_loc(raw, limit)
    assert (bounded.diff() >= -1e-9).all()
    assert (bounded.abs() <= limit).all()
    assert (bounded.abs() <= raw.abs() + 1e-9).all()
    same(functional.bound_loc(-raw, limit), -bounded)
    near = raw * limit * 1e-6
    same(functional.bound_loc(near, limit), near, rtol=1e-6, atol=0)


@few
@given(SORTED, st.floats(0.01, 1), st.floats(2, 20))
def test_bound_scale_increases_between_its_bounds(raw, low, high):
    bounded = functional.bound_scale(raw, low, high)
    excess = math.log1p(math.exp(low - high))
    assert (bounded.diff() >= -1e-8).all()
    assert (bounded >= low).all()
    assert (bounded <= high + excess + 1e-8).all()
    ends = torch.tensor([-1e3, 1e3], dtype=torch.float64)
    expected = torch.tensor([low, high + excess], dtype=torch.float64)
    same(functional.bound_scale(ends, low, high), expected)


# -- the action distribution ---------------------------------------------------------

LOC = st.floats(-3, 3)
SCALE = st.floats(0.01, 3)
BOUND = st.floats(0.1, 2)
CLIP = st.none() | st.floats(0.0, 1.0)


def clamped_normal(loc, scale, bound, size=64):
    loc = torch.full((size,), loc, dtype=torch.float64, requires_grad=True)
    scale = torch.full((size,), scale, dtype=torch.float64, requires_grad=True)
    return ClampedNormal(loc, scale, -bound, bound)


@few
@given(SEEDS, LOC, SCALE, BOUND, CLIP)
def test_samples_stay_inside_the_bounds(seed, loc, scale, bound, clip):
    torch.manual_seed(seed)
    dist = clamped_normal(loc, scale, bound)
    for sample in (dist.rsample((3,), noise_clip=clip), dist.sample((3,))):
        assert sample.shape == (3, 64)
        assert (sample.abs() < bound).all()


@few
@given(SEEDS, LOC, SCALE, BOUND, CLIP)
def test_the_gradient_ignores_the_clamp(seed, loc, scale, bound, clip):
    """d/d loc is one; d/d scale is eps, or zero where the noise is clipped."""
    torch.manual_seed(seed)
    dist = clamped_normal(loc, scale, bound)
    dist.rsample(noise_clip=clip).sum().backward()
    assert torch.equal(dist.loc.grad, torch.ones_like(dist.loc))
    torch.manual_seed(seed)
    eps = torch.randn(64, dtype=torch.float64)
    if clip is not None:
        eps = torch.where((scale * eps).abs() > clip, 0.0, eps)
    same(dist.scale.grad, eps)


@few
@given(SEEDS, st.floats(-0.5, 0.5), SCALE, st.floats(0.0, 0.4))
def test_noise_clip_bounds_the_distance_to_the_mean(seed, loc, scale, clip):
    torch.manual_seed(seed)
    sample = clamped_normal(loc, scale, 1.0, 256).rsample(noise_clip=clip)
    distance = (sample - loc).abs()
    assert distance.max() <= clip + 1e-12
    if clip < scale:
        assert (distance >= clip - 1e-12).any()


@few
@given(LOC, SCALE, BOUND)
def test_without_noise_a_sample_is_the_clamped_mean_and_the_mode_is_not(
    loc, scale, bound
):
    dist = clamped_normal(loc, scale, bound)
    expected = min(max(loc, -bound + 1e-6), bound - 1e-6)
    clamped = torch.full((64,), expected, dtype=torch.float64)
    same(dist.rsample(noise_clip=0.0).detach(), clamped, rtol=0, atol=1e-12)
    for mean in (dist.mean, dist.mode, dist.deterministic_sample):
        assert torch.equal(mean, dist.loc)


@settings(max_examples=10)
@given(SEEDS, st.floats(-2, 2), st.floats(0.1, 1))
def test_far_from_the_bounds_it_is_a_normal(seed, loc, scale):
    torch.manual_seed(seed)
    count = 20_000
    dist = clamped_normal(loc, scale, 100.0, 1)
    sample = dist.sample((count,)).flatten()
    assert abs(sample.mean() - loc) < 5 * scale / count**0.5
    assert abs(sample.std() / scale - 1) < 5 / (2 * count) ** 0.5
    # Kolmogorov-Smirnov: the bound is passed with probability 2 exp(-2 * 2.5^2).
    ranks = Normal(loc, scale).cdf(sample.sort().values)
    steps = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    assert (ranks - steps).abs().max() < 2.5 / count**0.5
    reference = Normal(dist.loc.detach(), dist.scale.detach())
    assert torch.equal(dist.log_prob(sample).detach(), reference.log_prob(sample))


# -- the noise schedule --------------------------------------------------------------


@few
@given(st.floats(0, 2), st.floats(0, 2), st.integers(1, 50), st.integers(0, 60))
def test_the_schedule_is_linear_and_then_constant(initial, final, steps, n):
    at_once, one_by_one = (NoiseSchedule(initial, final, steps) for _ in range(2))
    at_once.step(n)
    for _ in range(n):
        one_by_one.step()
    assert torch.equal(at_once.std, one_by_one.std)
    assert torch.equal(at_once.count, one_by_one.count)
    expected = final + (1 - min(n / steps, 1)) * (initial - final)
    assert at_once.std.item() == pytest.approx(expected, abs=1e-6)


# -- the loss ------------------------------------------------------------------------


@settings(max_examples=8)
@given(problem_sizes(), SEEDS)
def test_rollouts_have_the_documented_shapes(sizes, seed):
    loss, batch = make_loss(sizes), make_two_draw_batch(sizes, seed=seed)
    rows, horizon = sizes.batch, sizes.horizon
    latents = (rows, horizon + 1, sizes.latent_dim)
    rollout = loss.model_rollout(batch["slice"])
    assert rollout["latent"].shape == latents
    assert rollout["kl"].shape == rollout["reward"].shape == (rows, horizon)
    assert rollout["terminal_value"].shape == (rows,)
    imagined = loss.imagine(torch.zeros(rows, sizes.latent_dim), horizon)
    assert imagined["latent"].shape == latents
    assert imagined["action"].shape == (rows, horizon + 1, sizes.action_dim)
    for name in ("reward", "log_ratio", "value", "lambda_return"):
        assert imagined[name].shape == (rows, horizon), name
    assert loss.td_target(batch["transition"]).shape == (rows,)
    assert loss.lower_bound(batch["transition"], horizon).shape == (rows,)


@settings(max_examples=8)
@given(problem_sizes(), SEEDS)
def test_the_td_target_equals_a_loop(sizes, seed):
    """A termination stops the value, a time limit does not."""
    sizes = replace(sizes, batch=6)
    loss = make_loss(sizes, seed=seed).double()
    loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    batch = double(make_two_draw_batch(sizes, seed=seed)["transition"])
    ends = batch["next", "terminated"], batch["next", "truncated"]
    for end, rows in zip(ends, ([0, 1], [2, 3]), strict=True):
        end.zero_()
        end[rows] = True
    latent = loss.latents.encode(batch["next"]).deterministic_sample
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        action = loss.latents.act(latent)
    values = loss.latents.state_action_value(latent, action, "target")
    gamma, expected = loss.gamma.item(), []
    for row in range(6):
        value = min(values[row].tolist())
        live = 0.0 if row < 2 else 1.0
        expected.append(batch["next", "reward"][row].item() + gamma * live * value)
    same(loss.td_target(batch), torch.tensor(expected, dtype=torch.float64))
