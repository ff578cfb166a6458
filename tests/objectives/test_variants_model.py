"""Variants of encoder and model against formulas written out by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close
from torchrl.modules import IndependentNormal

from alm_torchrl import ALMOptimizationStepper, functional, make_identity_encoder
from alm_torchrl.runs.agents import build_loss
from alm_torchrl.runs.settings import preset_config
from alm_torchrl.testing import ROUTES, check_loss
from tests.helpers import (
    ACTION,
    HIDDEN,
    LATENT,
    METHODS,
    OBSERVATION,
    TRAINS,
    B,
    Concatenated,
    K,
    assert_equal,
    gradients,
    make_batch,
    make_loss,
    make_rows,
    network,
    part_of,
    probabilistic,
    variant,
)
from tests.objectives.model_rows import discounted, live, mean_over_slices
from tests.objectives.reference import elu_net

LIKELIHOOD = {"reconstruction_coef": 1.0, "reward_coef": 0.0, "value_coef": 0.0}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def calls(loss, method, batch):
    """How often a method of the loss runs each network."""
    counts, hooks = {}, []
    for part in ("encoder", "model", "actor", "qvalue", "reward", "decoder"):
        if getattr(loss, part) is not None:
            counts[part] = 0

            def count(*_, part=part):
                counts[part] += 1

            hooks.append(network(loss, part).register_forward_hook(count))
    getattr(loss, method)(batch)
    for hook in hooks:
        hook.remove()
    return counts


def assert_same_model_loss(loss, slices, objective):
    """Value and gradients of ``model_loss`` are those of the formula."""
    expected = mean_over_slices(loss, slices, objective)
    value, _ = loss.model_loss(slices)
    assert_close(value, expected)
    ours, theirs = gradients(value, loss), gradients(expected, loss)
    assert set(ours) >= set(theirs)
    assert all(not grad.any() for name, grad in ours.items() if name not in theirs)
    same = {name: ours[name] for name in theirs}
    assert_close(same, theirs, rtol=1e-5, atol=1e-5)


def differing(values, expected):
    """The keys of entries that are not the same."""
    return {key for key, value in values.items() if value != expected[key]}


def from_settings(**changes):
    """The loss that ``train`` builds with some flags, small."""
    sizes = {"hidden_dim": HIDDEN, "model_hidden_dim": HIDDEN, "latent_dim": LATENT}
    config = preset_config("quick", **sizes, **changes)
    spaces = {
        "observation_dim": OBSERVATION,
        "action_low": [-1.0] * ACTION,
        "action_high": [1.0] * ACTION,
    }
    return build_loss(config.to_dict(), spaces)


def assert_resumes(**changes):
    """A loss and stepper built anew continue from the state of others."""
    loss = from_settings(**changes)
    stepper = ALMOptimizationStepper(loss)
    stepper.step(None, make_batch())
    again = from_settings(**changes)
    restored = ALMOptimizationStepper(again)
    again.load_state_dict(loss.state_dict())
    restored.load_state_dict(copy.deepcopy(stepper.state_dict()))
    batch = make_batch()
    results = []
    for one in (stepper, restored):
        torch.manual_seed(1)
        results.append(one.step(None, batch))
    assert results[0].keys() == results[1].keys()
    assert (results[0] == results[1]).all()
    return results[0]


class TestLikelihood:
    @pytest.mark.parametrize("discount", [False, True])
    def test_is_kl_and_reconstruction(self, discount):
        loss = make_loss(deterministic=True, discount_model_loss=discount, **LIKELIHOOD)
        gamma = loss.gamma.item() if discount else 1.0

        def objective(terms):
            errors = [
                0.5 * ((elu_net(z, live(loss, "decoder")) - s) ** 2).sum()
                for z, s in zip(terms["latent"], terms["observed"], strict=True)
            ]
            return discounted(terms["kl"], gamma) + discounted(errors, gamma)

        assert_same_model_loss(loss, make_rows(B, K), objective)

    def test_joins_the_bound_with_its_coefficient(self):
        loss = make_loss(deterministic=True, reconstruction_coef=0.5, reward_coef=2.0)

        def objective(terms):
            decoded = [elu_net(z, live(loss, "decoder")) for z in terms["latent"]]
            errors = [
                0.5 * ((loc - s) ** 2).sum()
                for loc, s in zip(decoded, terms["observed"], strict=True)
            ]
            bound = sum(terms["kl"]) - 2 * sum(terms["reward"]) - terms["end"][0]
            return bound + 0.5 * sum(errors)

        assert_same_model_loss(loss, make_rows(B, K), objective)

    def test_trains_encoder_model_and_decoder_and_runs_nothing_else(self):
        loss, batch = make_loss(**LIKELIHOOD), make_batch()
        used = calls(loss, "model_loss", batch)
        assert used == {
            "encoder": 2,
            "model": K,
            "actor": 0,
            "qvalue": 0,
            "reward": 0,
            "decoder": 1,
        }
        for term, method in METHODS.items():
            grads = gradients(getattr(loss, method)(batch)[0].sum(), loss)
            reached = {part_of(name) for name, grad in grads.items() if grad.any()}
            own = {"decoder"} if term == "loss_model" else set()
            assert reached == TRAINS[term] | own

    def test_keeps_the_contract_of_the_loss(self):
        routes = {**ROUTES, "loss_model": ("encoder", "model", "decoder")}
        loss = make_loss(**LIKELIHOOD)
        check_loss(loss, make_rows(B, K), routes)
        assert not {"model_reward", "terminal_value"} & set(loss.out_keys)
        assert "reconstruction" in loss.out_keys

    def test_without_a_coefficient_there_is_no_decoder(self):
        loss = make_loss(decoder=make_loss(**LIKELIHOOD).decoder)
        assert loss.decoder is None
        assert "reconstruction" not in loss.out_keys
        assert "decoder" not in repr(loss)

    def test_is_trained_and_resumed(self):
        metrics = assert_resumes(model_objective="likelihood")
        assert {"reconstruction", "kl"} <= set(metrics.keys())
        loss = from_settings(model_objective="likelihood")
        before = [p.clone() for p in loss.decoder_params.parameters()]
        ALMOptimizationStepper(loss).step(None, make_batch())
        after = loss.decoder_params.parameters()
        assert all((p != q).any() for p, q in zip(before, after, strict=True))

    def test_errors(self):
        with pytest.raises(ValueError, match="decoder may be None only with"):
            make_loss(decoder=None, reconstruction_coef=1.0)
        with pytest.raises(ValueError, match="expected one that is not 0"):
            make_loss(kl_coef=0.0, reward_coef=0.0, value_coef=0.0)
        wrong = TensorDictModule(
            Concatenated(LATENT, OBSERVATION + 1), ["latent"], ["reconstruction"]
        )
        loss = make_loss(decoder=wrong, reconstruction_coef=1.0)
        with pytest.raises(ValueError, match=r"decoder: expected the shape .* got"):
            loss.model_loss(make_batch())


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
        encoder = make_identity_encoder(2, scale=0.5)
        loc, std = torch.tensor([1.0, -2.0]), torch.full((2,), 0.5)
        q = encoder.get_dist(TensorDict(observation=torch.zeros(2)))
        p = IndependentNormal(loc, std)
        kl = torch.distributions.kl_divergence(p.base_dist, q.base_dist).sum()
        assert_close(kl, loc.square().sum() / (2 * 0.5**2))

    def test_acts_on_the_observation(self):
        loss = identity_loss()
        rows = TensorDict(observation=torch.randn(5000, OBSERVATION), batch_size=[5000])
        latent = loss.encoder(rows.copy())["latent"]
        error = latent - rows["observation"]
        assert_close(error.std(), torch.tensor(0.1), rtol=0.03, atol=0)
        assert error.mean().abs() < 0.01
        assert loss.acting_policy()(rows)["action"].shape == (5000, ACTION)

    @pytest.mark.parametrize("buffer", [True, False])
    def test_has_no_parameters_and_the_loss_copes(self, buffer):
        plain = probabilistic(Plain(), ["observation"], "latent")
        loss = identity_loss(None if buffer else plain)
        assert list(loss.encoder_params.parameters()) == []
        routes = {**ROUTES, "loss_model": ("model",)}
        for copied in (loss, copy.deepcopy(loss)):
            check_loss(copied, make_rows(B, K), routes)
        stepper = ALMOptimizationStepper(loss)
        observed = make_rows(4)
        for _ in range(2):
            stepper.step(None, make_batch())
            dist = loss.encode(observed, "target")
            assert_close(dist.mean, observed["observation"], rtol=0, atol=0)
            assert_close(dist.stddev, torch.full_like(dist.mean, 0.1), rtol=0, atol=0)
        double = loss.double()
        rows = make_rows(B, K).apply(
            lambda x: x.double() if x.is_floating_point() else x
        )
        assert double(rows)["loss_model"].dtype == torch.float64

    def test_is_trained_and_resumed(self):
        assert "kl" in assert_resumes(encoder="identity")
        loss = from_settings(encoder="identity")
        latent = loss.acting_policy()[0](make_rows(4))["latent"]
        assert latent.shape == (4, OBSERVATION)

    def test_errors(self):
        with pytest.raises(ValueError, match="scale: expected a number > 0, got 0"):
            make_identity_encoder(3, scale=0.0)
        with pytest.raises(ValueError, match="observation_dim: expected an integer"):
            make_identity_encoder(0)
        loss = make_loss(encoder=make_identity_encoder(OBSERVATION + 1))
        with pytest.raises(ValueError, match="encoder: expected a network for"):
            loss.model_loss(make_batch())


class TestValuePrediction:
    @pytest.mark.parametrize("steps", ["encoder", "model"])
    @pytest.mark.parametrize("discount", [False, True])
    def test_objective(self, steps, discount):
        loss = make_loss(
            deterministic=True,
            value_prediction=steps,
            value_prediction_coef=0.3,
            discount_model_loss=discount,
        )
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
        loss = make_loss(
            value_prediction=steps, kl_coef=0.0, reward_coef=0.0, value_coef=0.0
        )
        value, metadata = loss.model_loss(batch)
        grads = gradients(value, loss)
        trained = {part_of(name) for name, grad in grads.items() if grad.any()}
        assert trained == {"encoder", steps}
        count = K if steps == "model" else 1
        assert_close(value.detach(), count * metadata["value_prediction"])

    @pytest.mark.parametrize("steps", ["encoder", "model"])
    def test_keeps_the_contract_of_the_loss(self, steps):
        loss = make_loss(value_prediction=steps)
        assert "value_prediction" in loss.out_keys
        for batch in (make_rows(B, K), make_batch()):
            check_loss(loss, batch)

    def test_target_is_the_critics(self):
        """Of the slice's recorded reward, transformed as the critics learn it."""
        batch = make_batch()
        loss = make_loss(deterministic=True, value_prediction="model")
        other = variant(
            loss, value_prediction="model", reward_transform=functional.floored_log
        )
        changed = batch.clone()
        reward = changed["slice", "next", "reward"]
        reward.copy_(reward.clamp(min=0.01).log())
        assert_close(other.model_loss(batch), loss.model_loss(changed), rtol=0, atol=0)
        assert loss.model_loss(batch)[0] != loss.model_loss(changed)[0]

    def test_without_weight_it_costs_nothing(self):
        batch = make_batch()
        plain = calls(make_loss(), "model_loss", batch)
        loss = make_loss(value_prediction="model", value_prediction_coef=0.0)
        assert calls(loss, "model_loss", batch) == plain
        assert "value_prediction" not in loss.out_keys
        assert calls(make_loss(value_prediction="model"), "model_loss", batch) != plain

    @pytest.mark.parametrize("steps", ["encoder", "model"])
    def test_is_trained_and_resumed(self, steps):
        assert "value_prediction" in assert_resumes(value_prediction=steps)

    def test_errors(self):
        with pytest.raises(ValueError, match="value_prediction: expected 'none' or"):
            make_loss(value_prediction="critic")
        with pytest.raises(ValueError, match="value_prediction_coef: expected a numb"):
            make_loss(value_prediction_coef=-1.0)


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
        loss = make_loss(deterministic=True, log_terms="model")
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
        plain = variant(loss, log_terms="none")
        assert differing(loss(batch), plain(batch)) == {"loss_model"}

    @pytest.mark.parametrize("log_reward", ["model", "plain", "shifted", "bound"])
    def test_is_trained_and_resumed(self, log_reward):
        metrics = assert_resumes(log_reward=log_reward)
        assert all(value.isfinite() for value in metrics.values())

    def test_settings(self):
        assert from_settings(log_reward="none").reward_transform is None
        for name, function in (
            ("plain", functional.floored_log),
            ("shifted", functional.shifted_log),
        ):
            loss = from_settings(log_reward=name)
            assert (loss.reward_transform, loss.log_terms) == (function, "none")
        for name in ("model", "bound"):
            loss = from_settings(log_reward=name)
            assert (loss.reward_transform, loss.log_terms) == (None, name)

    def test_representation_names_what_is_not_the_default(self):
        assert repr(make_loss()).endswith("discount_model_loss=False\n)")
        loss = make_loss(reward_transform=functional.shifted_log, log_terms="model")
        assert repr(loss).endswith(", reward_transform=shifted_log, log_terms=model\n)")

    def test_errors(self):
        with pytest.raises(TypeError, match="reward_transform: expected a function"):
            make_loss(reward_transform=2.0)
        with pytest.raises(ValueError, match="log_terms: expected 'none' or 'model'"):
            make_loss(log_terms="all")
