"""How the losses draw: with a gradient, as the current exploration type says."""

from __future__ import annotations

import pytest
import torch
from tensordict.nn.distributions import Delta as TensorDictDelta
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import Actor, Delta, IndependentNormal, TanhNormal

from alm_torchrl import ClampedNormal
from alm_torchrl.distributions import PointNormal, draw, is_random
from tests.helpers import ACTION, LATENT, gradients, make_batch, make_loss, seeded

FIXED = [kind for kind in ExplorationType if kind is not ExplorationType.RANDOM]
STATISTICS = [ExplorationType.DETERMINISTIC, ExplorationType.MEAN, ExplorationType.MODE]


@pytest.fixture
def loc():
    torch.manual_seed(0)
    return torch.randn(4, 3, requires_grad=True)


@pytest.mark.parametrize("kind", [None, ExplorationType.RANDOM])
def test_random_draws_are_reparameterised_samples(loc, kind):
    dist = Normal(loc, 0.5)
    with set_exploration_type(kind):
        assert is_random()
        assert torch.equal(seeded(draw, dist), seeded(dist.rsample))
    assert torch.autograd.grad(draw(dist).sum(), loc)[0].eq(1).all()


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize(
    "make",
    [
        lambda loc: Normal(loc, 0.5),
        lambda loc: Independent(Normal(loc, 0.5), 1),
        lambda loc: IndependentNormal(loc, torch.full_like(loc, 0.5)),
        Delta,
        TensorDictDelta,
    ],
)
def test_statistics_of_any_distribution(loc, make, kind):
    with set_exploration_type(kind):
        assert not is_random()
        drawn = draw(make(loc))
    assert torch.equal(drawn, loc)
    assert torch.autograd.grad(drawn.sum(), loc)[0].eq(1).all()


@pytest.mark.parametrize("kind", FIXED)
def test_statistics_of_a_clamped_normal_are_clamped(loc, kind):
    with set_exploration_type(kind):
        drawn = draw(ClampedNormal(loc, torch.ones_like(loc), low=-0.5, high=0.5), 0.3)
    assert torch.allclose(drawn, loc.clamp(-0.5, 0.5), atol=1e-5)
    assert drawn.requires_grad


def test_noise_is_clipped_on_request(loc):
    dist = ClampedNormal(loc, torch.ones_like(loc), low=-9.0, high=9.0)
    assert ((draw(dist, 0.1) - loc).abs() <= 0.1 + 1e-6).all()
    assert ((draw(dist) - loc).abs() > 0.1 + 1e-6).any()


def test_a_statistic_that_is_missing_is_named(loc):
    dist = Normal(loc, 0.5)
    with (
        set_exploration_type(ExplorationType.MEDIAN),
        pytest.raises(NotImplementedError, match=r"with a median, .* got Normal"),
    ):
        draw(dist)


@pytest.mark.parametrize("kind", STATISTICS)
def test_every_statistic_makes_the_losses_deterministic(kind):
    loss = make_loss()
    loss.deterministic_sampling_mode = kind
    batch = make_batch()
    first, second = (seeded(loss, batch, seed=seed) for seed in (0, 1))
    for name in ("loss_model", "loss_qvalue", "loss_actor"):
        assert torch.equal(first[name], second[name])


def test_an_actor_of_torchrl_is_trained():
    network = nn.Sequential(nn.Linear(LATENT, ACTION), nn.Tanh())
    loss = make_loss(actor=Actor(network, in_keys=["latent"], out_keys=["action"]))
    found = gradients(loss.actor_loss(make_batch())[0], loss)
    assert found
    assert all(name.startswith("actor_params") for name in found)
    assert any(gradient.any() for gradient in found.values())


def test_a_squashed_normal_has_its_deterministic_sample(loc):
    dist = TanhNormal(loc, torch.ones_like(loc))
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert torch.equal(draw(dist), dist.deterministic_sample)


def test_samples_of_a_point_normal_are_its_mean(loc):
    dist = PointNormal(loc, torch.full_like(loc, 0.5))
    state = torch.get_rng_state()
    for drawn in (draw(dist), dist.rsample(), dist.rsample((2,))[1]):
        assert torch.equal(drawn, loc)
        assert torch.autograd.grad(drawn.sum(), loc)[0].eq(1).all()
    assert not dist.sample().requires_grad
    assert torch.equal(dist.sample((2, 5))[1, 2], loc)
    assert torch.equal(torch.get_rng_state(), state)
    other = PointNormal(loc + 1, torch.full_like(loc, 0.5))
    expected = torch.full((4,), 3 / (2 * 0.5**2))
    assert torch.allclose(kl_divergence(dist, other), expected)
