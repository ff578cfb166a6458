"""Parts of the objective of encoder and model, against formulas by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close
from torchrl.modules import IndependentNormal

from alm_torchrl import (
    ALMOptimizationStepper,
    functional,
    make_decoder,
    make_identity_encoder,
)
from alm_torchrl.objectives import Logarithms, Reconstruction, ValuePrediction
from alm_torchrl.testing import ROUTES, check_loss
from tests.helpers import (
    HIDDEN,
    LATENT,
    OBSERVATION,
    B,
    K,
    assert_equal,
    gradients,
    make_batch,
    make_loss,
    make_rows,
    part_of,
    probabilistic,
    variant,
)
from tests.objectives.model_rows import assert_same_model_loss, discounted, live
from tests.objectives.reference import elu_net


def reconstruction(coef=1.0):
    return Reconstruction(
        make_decoder(OBSERVATION, latent_dim=LATENT, hidden_dim=HIDDEN), coef=coef
    )


def likelihood_loss():
    return make_loss(model_terms=[reconstruction()], reward_coef=0.0, value_coef=0.0)


def decoder_params(loss):
    return list(loss.model_terms[0].decoder.module.parameters())


def value_loss(where, coef=1.0, **kwargs):
    return make_loss(model_terms=[ValuePrediction(where, coef=coef)], **kwargs)


def differing(values, expected):
    """The keys of entries that are not the same."""
    return {key for key, value in values.items() if value != expected[key]}


class TestLikelihood:
    @pytest.mark.parametrize(
        ("coef", "reward_coef", "value_coef", "discount"),
        [(1.0, 0.0, 0.0, False), (0.5, 2.0, 1.0, True)],
    )
    def test_adds_the_reconstruction(self, coef, reward_coef, value_coef, discount):
        loss = make_loss(
            deterministic=True,
            model_terms=[reconstruction(coef)],
            reward_coef=reward_coef,
            value_coef=value_coef,
            discount_model_loss=discount,
        )
        gamma = loss.gamma.item() if discount else 1.0

        def objective(terms):
            errors = [
                0.5 * ((elu_net(z, decoder_params(loss)) - s) ** 2).sum()
                for z, s in zip(terms["latent"], terms["observed"], strict=True)
            ]
            bound = discounted(terms["kl"], gamma) + coef * discounted(errors, gamma)
            bound = bound - reward_coef * discounted(terms["reward"], gamma)
            return bound - value_coef * gamma**K * terms["end"][0]

        assert_same_model_loss(loss, make_rows(B, K), objective)

    def test_its_metric_replaces_those_of_the_bound(self):
        loss = likelihood_loss()
        assert not {"model_reward", "terminal_value"} & set(loss.out_keys)
        assert "reconstruction" in loss.out_keys
        without = make_loss(model_terms=[reconstruction(0.0)])
        assert "reconstruction" not in without.out_keys
        assert not any("decoder" in name for name, _ in without.named_parameters())

    def test_decoder_is_saved_copied_and_reset(self):
        loss = likelihood_loss()
        other, twin = likelihood_loss(), copy.deepcopy(loss)
        other.load_state_dict(loss.state_dict())
        for same in (other, twin):
            assert_close(decoder_params(same), decoder_params(loss), rtol=0, atol=0)
        loss.reset_parameters_recursive()
        assert (decoder_params(loss)[0] != decoder_params(twin)[0]).any()


def identity_loss(encoder=None, **kwargs):
    """A loss whose encoder is the identity."""
    encoder = make_identity_encoder(OBSERVATION) if encoder is None else encoder
    loss = make_loss(latent_dim=OBSERVATION, encoder=encoder, **kwargs)
    # The target of the scale was moved with all other targets.
    for scale in loss.target_encoder_params.values(True, True):
        scale.data.fill_(0.1)
    return loss


class Plain(nn.Module):
    """The identity again, without so much as a buffer."""

    def forward(self, observation):
        return observation, torch.full_like(observation, 0.1)


class TestIdentityEncoder:
    def test_objective(self):
        loss = identity_loss(deterministic=True)

        def objective(terms):
            return sum(terms["kl"]) - sum(terms["reward"]) - terms["end"][0]

        assert_same_model_loss(loss, make_rows(B, K), objective)

    def test_kl_is_the_squared_error(self):
        for bad in ({"scale": 0.0}, {"observation_dim": 0}):
            with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected"):
                make_identity_encoder(**{"observation_dim": 2, **bad})
        encoder = make_identity_encoder(2, scale=0.5)
        loc, std = torch.tensor([1.0, -2.0]), torch.full((2,), 0.5)
        q = encoder.get_dist(TensorDict(observation=torch.zeros(2)))
        p = IndependentNormal(loc, std)
        kl = torch.distributions.kl_divergence(p.base_dist, q.base_dist).sum()
        assert_close(kl, loc.square().sum() / (2 * 0.5**2))

    @pytest.mark.parametrize("buffer", [True, False])
    def test_has_no_parameters_and_the_loss_copes(self, buffer):
        plain = probabilistic(Plain(), ["observation"], "latent")
        loss = identity_loss(None if buffer else plain)
        assert list(loss.encoder_params.parameters()) == []
        routes = {**ROUTES, "loss_model": ("model",)}
        check_loss(copy.deepcopy(loss), make_rows(B, K), routes)
        stepper = ALMOptimizationStepper(loss)
        observed = make_rows(4)
        for _ in range(2):
            stepper.step(None, make_batch())
            dist = loss.latents.encode(observed, "target")
            assert_close(dist.mean, observed["observation"], rtol=0, atol=0)
            assert_close(dist.stddev, torch.full_like(dist.mean, 0.1), rtol=0, atol=0)
        double = loss.double()
        rows = make_rows(B, K).apply(
            lambda x: x.double() if x.is_floating_point() else x
        )
        assert double(rows)["loss_model"].dtype == torch.float64


class TestValuePrediction:
    @pytest.mark.parametrize("steps", ["encoder", "model"])
    @pytest.mark.parametrize("discount", [False, True])
    def test_objective(self, steps, discount):
        loss = value_loss(steps, 0.3, deterministic=True, discount_model_loss=discount)
        weight = loss.gamma.item() if discount else 1.0

        def objective(terms):
            pairs = zip(terms["qvalue"], terms["td_target"], strict=True)
            errors = [(value - target[0]) ** 2 for value, target in pairs]
            errors = errors[:1] if steps == "encoder" else errors
            bound = discounted(terms["kl"], weight)
            bound = bound - discounted(terms["reward"], weight)
            bound = bound - weight**K * terms["end"][0]
            return bound + 0.3 * discounted(errors, weight)

        slices = make_rows(B, K)
        terminated = slices["next", "terminated"]
        assert terminated.any()
        assert not terminated.all()
        assert_same_model_loss(loss, slices, objective)

    @pytest.mark.parametrize("steps", ["encoder", "model"])
    def test_alone_trains_what_it_is_named_after(self, steps):
        batch = make_batch()
        loss = value_loss(steps, kl_coef=0.0, reward_coef=0.0, value_coef=0.0)
        value, metadata = loss.model_loss(batch)
        grads = gradients(value, loss)
        trained = {part_of(name) for name, grad in grads.items() if grad.any()}
        assert trained == {"encoder", steps}
        count = K if steps == "model" else 1
        assert_close(value.detach(), count * metadata["value_prediction"])

    def test_target_is_the_critics(self):
        """Of the slice's recorded reward, transformed as the critics learn it."""
        batch = make_batch()
        loss = value_loss("model", deterministic=True)
        terms = [ValuePrediction("model")]
        other = variant(
            loss, model_terms=terms, reward_transform=functional.floored_log
        )
        changed = batch.clone()
        reward = changed["slice", "next", "reward"]
        reward.copy_(reward.clamp(min=0.01).log())
        assert_close(other.model_loss(batch), loss.model_loss(changed), rtol=0, atol=0)
        assert loss.model_loss(batch)[0] != loss.model_loss(changed)[0]


class TestLogarithms:
    def test_floored_log(self):
        values = torch.tensor([-5.0, 0.0, 0.02, 0.5, 20.0], requires_grad=True)
        logs = functional.floored_log(values)
        low = math.log(0.01)
        expected = [low, low, math.log(0.02), math.log(0.5), math.log(20)]
        assert_close(logs, torch.tensor(expected))
        (slope,) = torch.autograd.grad(logs.sum(), values)
        assert_close(slope, torch.tensor([0.0, 0.0, 50.0, 2.0, 0.05]))

    @pytest.mark.parametrize("offset", [20.0, 10_000.0])
    def test_shifted_log(self, offset):
        reward = torch.linspace(-16, 16, 33)
        exact = reward.double()
        exact = offset * ((exact + offset).log() - math.log(offset))
        shifted = functional.shifted_log(reward, offset)
        assert_close(shifted, exact.float(), rtol=1e-5, atol=1e-5)
        if offset > 1000:
            assert_close(shifted, reward, rtol=1e-3, atol=0)
        assert (shifted <= reward).all()

    def test_reaches_reward_model_and_critics_only(self):
        loss = make_loss(deterministic=True)
        other = variant(loss, reward_transform=functional.floored_log)
        batch = make_batch()
        changed = batch.clone()
        for part in ("slice", "transition"):
            reward = changed[part, "next", "reward"]
            reward.copy_(reward.clamp(min=0.01).log())
        assert_equal(other(batch), loss(changed))
        expected = {"loss_reward", "loss_qvalue", "target_value", "td_error"}
        assert differing(other(batch), loss(batch)) == expected

    def test_model_objective_takes_the_log_of_the_predicted_reward(self):
        loss = make_loss(deterministic=True, logarithms=Logarithms("model"))
        with torch.no_grad():
            # Some rewards are below the floor, some above.
            live(loss, "reward")[-1].add_(0.3)
        seen = []

        def objective(terms):
            seen.extend(terms["reward"])
            gains = [r.log() if r > 0.01 else r.new_tensor(0.01).log() for r in seen]
            return sum(terms["kl"]) - sum(gains[-K:]) - terms["end"][0]

        slices = make_rows(B, K)
        assert_same_model_loss(loss, slices, objective)
        assert {bool(reward > 0.01) for reward in seen} == {True, False}
        batch = make_batch()
        plain = variant(loss, logarithms=None)
        assert differing(loss(batch), plain(batch)) == {"loss_model"}
