"""Latents without noise, the terms that train them, and normalised observations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from alm_torchrl import ALMOptimizationStepper, functional, make_alm_loss
from alm_torchrl.distributions import PointNormal
from alm_torchrl.networks import RunningNorm
from alm_torchrl.objectives import Consistency, InfoNCE, RewardFidelity
from alm_torchrl.testing import check_loss
from tests.helpers import (
    ACTION,
    HIDDEN,
    OBSERVATION,
    B,
    K,
    gradients,
    make_batch,
    make_loss,
    make_rows,
    part_of,
)
from tests.objectives.model_rows import (
    assert_same_model_loss,
    discounted,
    encoded,
)
from tests.objectives.model_rows import target as target_params

WIDE = 16
ALONE = {"kl_coef": 0.0, "reward_coef": 0.0, "value_coef": 0.0}
EVERYTHING = {
    "latent_dim": WIDE,
    "latent": "simnorm",
    "normalize": True,
    "layer_norm": True,
    "kl_coef": 0.0,
    "reward_coef": 0.1,
}


def all_parts(**kwargs):
    """A loss with every part of this file."""
    terms = [Consistency(coef=20.0), RewardFidelity(coef=0.5), InfoNCE()]
    loss = make_alm_loss(
        observation_dim=OBSERVATION,
        action_low=[-1.0] * ACTION,
        action_high=[1.0] * ACTION,
        hidden_dim=HIDDEN,
        model_hidden_dim=HIDDEN,
        **{**EVERYTHING, "model_terms": terms, **kwargs},
    )
    SoftUpdate(loss, tau=0.005)
    return loss


def norm_of(loss):
    [norm] = [m for m in loss.encoder.modules() if isinstance(m, RunningNorm)]
    return norm


def statistics(loss):
    """Mean, variance and count by the names of the networks that hold them."""
    names = ("mean", "var", "count")
    held = {"encoder": loss.encoder_params, "target": loss.target_encoder_params}
    return {
        network: {n: params["module", "0", "module", "0", n].clone() for n in names}
        for network, params in held.items()
    }


class TestConsistency:
    @pytest.mark.parametrize("discount", [False, True])
    def test_objective(self, discount):
        loss = make_loss(
            deterministic=True,
            model_terms=[Consistency(coef=0.3)],
            kl_coef=0.0,
            discount_model_loss=discount,
        )
        gamma = loss.gamma.item() if discount else 1.0

        def objective(terms):
            encoder, observed = target_params(loss, "encoder"), terms["observed"][1:]
            errors = [
                ((z - encoded(encoder, s)[0]) ** 2).mean()
                for z, s in zip(terms["latent"][1:], observed, strict=True)
            ]
            bound = 0.3 * discounted(errors, gamma) - discounted(terms["reward"], gamma)
            return bound - gamma**K * terms["end"][0]

        assert_same_model_loss(loss, make_rows(B, K), objective)

    @pytest.mark.parametrize("latent", ["rms", "simnorm", "layernorm"])
    def test_is_the_kl_of_latents_without_noise(self, latent):
        """Up to the factor that its docstring names."""
        kinds = {"latent": latent, "latent_dim": WIDE, "reward_coef": 0.0}
        kinds |= {"value_coef": 0.0}
        loss = make_loss(**kinds, model_terms=[Consistency(coef=50.0 * WIDE)])
        # Noise on the targets moved that of the scale as well.
        for key, value in loss.target_encoder_params.items(True, True):
            if key[-1] == "scale":
                value.data.fill_(0.1)
        value, metadata = loss.model_loss(make_batch())
        assert metadata["kl"] > 0.1
        assert_close(50 * WIDE * metadata["consistency"], metadata["kl"])
        assert_close(value, 2 * K * metadata["kl"])

    def test_is_zero_where_the_model_is_right(self):
        """The latent of the model and the target encoder's are both constant."""
        loss = make_loss(**ALONE, model_terms=[Consistency()], deterministic=True)
        for params in (loss.model_params, loss.target_encoder_params):
            for value in params.values(True, True):
                value.data.zero_()
        value, metadata = loss.model_loss(make_batch())
        assert value == metadata["consistency"] == 0

    def test_trains_encoder_and_model(self):
        loss = make_loss(**ALONE, model_terms=[Consistency()])
        grads = gradients(loss.model_loss(make_batch())[0], loss)
        trained = {part_of(name) for name, grad in grads.items() if grad.any()}
        assert trained == {"encoder", "model"}


class TestInfoNCE:
    def test_of_rows_by_hand(self):
        predicted, actual = torch.randn(2, B, K, 5)
        mask = torch.rand(B, K) < 0.7
        mask[0] = True
        found = functional.info_nce(predicted, actual, 0.3, mask)
        for i in range(B):
            for t in range(K):
                if not mask[i, t]:
                    continue
                rows = [j for j in range(B) if mask[j, t]]
                cosines = [
                    predicted[i, t]
                    @ actual[j, t]
                    / (predicted[i, t].norm() * actual[j, t].norm())
                    for j in rows
                ]
                scores = torch.stack(cosines) / 0.3
                expected = scores.exp().sum().log() - scores[rows.index(i)]
                assert_close(found[i, t], expected)
        assert found.isfinite().all()
        every = torch.ones(B, K, dtype=torch.bool)
        assert_close(
            functional.info_nce(predicted, actual, 0.3),
            functional.info_nce(predicted, actual, 0.3, every),
        )

    def test_limits(self):
        alike, one = torch.ones(B, K, 5), torch.randn(1, K, 5)
        expected = torch.full((B, K), math.log(B))
        assert_close(functional.info_nce(alike, alike, 0.1), expected)
        assert_close(functional.info_nce(one, -one, 0.1), torch.zeros(1, K))
        apart = torch.eye(B).unsqueeze(1)
        assert_close(functional.info_nce(apart, 3 * apart, 0.01), torch.zeros(B, 1))

    def test_objective_and_route(self):
        """Of the model's latents and the target encoder's, none of them the same."""
        loss = make_loss(**ALONE, model_terms=[InfoNCE(coef=0.5)], deterministic=True)
        batch = make_batch()
        value, metadata = loss.model_loss(batch)
        latent = loss.model_rollout(batch["slice"])["latent"]
        with torch.no_grad():
            after = loss.latents.encode(batch["slice", "next"]).mean
        expected = 0.5 * functional.info_nce(latent[:, 1:], after, 0.1).sum(1).mean()
        assert_close(value, expected)
        assert_close(metadata["info_nce"], value.detach() / (0.5 * K))
        grads = gradients(value, loss)
        assert_close(grads, gradients(expected, loss))
        trained = {part_of(name) for name, grad in grads.items() if grad.any()}
        assert trained == {"encoder", "model"}

    def test_masked_steps_are_no_candidates(self):
        """A slice with one is dropped; the others are a batch of their own."""
        loss = make_loss(**ALONE, model_terms=[InfoNCE()], deterministic=True)
        loss.loss_mask_key = "valid"
        slices = make_rows(B, K)
        masked = slices.clone().set("valid", torch.ones(B, K, dtype=torch.bool))
        masked["valid"][2] = False
        masked["next", "observation"][2] = math.nan
        rest = slices[[0, 1, 3, 4, 5]]
        value, other = loss.model_loss(masked)[0], loss.model_loss(rest)[0]
        assert_close(value, other)
        assert_close(gradients(value, loss), gradients(other, loss))


class TestRewardFidelity:
    def test_objective(self):
        transform = torch.tanh
        loss = make_loss(
            deterministic=True,
            model_terms=[RewardFidelity(coef=0.3)],
            reward_transform=transform,
        )
        slices = make_rows(B, K)
        rewards = iter(transform(slices["next", "reward"]).squeeze(-1))

        def objective(terms):
            pairs = zip(terms["reward"], next(rewards), strict=True)
            errors = [(predicted - recorded) ** 2 for predicted, recorded in pairs]
            bound = sum(terms["kl"]) - sum(terms["reward"]) - terms["end"][0]
            return bound + 0.3 * sum(errors)

        assert_same_model_loss(loss, slices, objective)

    @pytest.mark.parametrize(("horizon", "parts"), [(1, {"encoder"}), (K, None)])
    def test_trains_what_the_latents_come_from(self, horizon, parts):
        """The reward of the first step depends on the encoder alone."""
        loss = make_loss(**ALONE, model_terms=[RewardFidelity()])
        grads = gradients(loss.model_loss(make_batch(horizon=horizon))[0], loss)
        trained = {part_of(name) for name, grad in grads.items() if grad.any()}
        assert trained == (parts or {"encoder", "model"})

    def test_is_the_error_that_the_reward_model_learns(self):
        """At the first step, where both encoders are the same."""
        loss = make_loss(**ALONE, model_terms=[RewardFidelity()], deterministic=True)
        loss.target_encoder_params.data.update_(loss.encoder_params.data)
        rows = make_rows(B, 1)
        value, metadata = loss.model_loss(rows)
        assert_close(value, loss.reward_loss(rows)[0])
        assert_close(metadata["reward_fidelity"], value.detach())


def test_coefficients_are_checked():
    for term in (Consistency, InfoNCE, RewardFidelity):
        with pytest.raises(ValueError, match="coef: expected a number >= 0"):
            term(coef=-1.0)
        loss = make_loss(model_terms=[term(coef=0.0)])
        assert term.name not in loss.out_keys
    with pytest.raises(ValueError, match="temperature: expected a number > 0"):
        InfoNCE(temperature=0.0)


class TestLatentsWithoutNoise:
    def test_the_contract_holds_for_all_parts_together(self):
        loss = all_parts()
        loss.observe(make_batch())
        check_loss(loss, make_batch())
        check_loss(loss, make_rows(B, K))

    @pytest.mark.parametrize("latent", ["rms", "simnorm", "layernorm"])
    def test_nothing_is_drawn_but_the_action(self, latent):
        loss = make_loss(latent=latent, latent_dim=WIDE, noise=0.0, classifier_coef=0.0)
        batch = make_batch()
        first, second = loss(batch), loss(batch)
        assert_close(first, second, rtol=0, atol=0)
        policy, state = loss.acting_policy(), TensorDict(observation=torch.ones(3))
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            one, two = (policy(state.clone())["action"] for _ in range(2))
        assert torch.equal(one, two)

    def test_encoding_two_halves_at_once_keeps_their_kind(self):
        loss = make_loss(latent="rms", latent_dim=WIDE)
        rows = make_rows(B)
        encoding = loss.encode_transitions(rows)
        halves = (rows.select("observation"), rows["next"].select("observation"))
        for dist, half in zip(encoding, halves, strict=True):
            expected = loss.latents.encode(half)
            assert type(dist) is type(expected) is PointNormal
            assert_close((dist.mean, dist.stddev), (expected.mean, expected.stddev))
        some = torch.tensor([4, 1])
        drawn = loss.latents.sample(encoding.next, some)
        assert_close(drawn, encoding.next.mean[some], rtol=0, atol=0)


class TestObserve:
    def test_sees_the_transitions_of_either_batch(self):
        loss, batch = all_parts(), make_batch()
        state = torch.get_rng_state()
        before = batch.clone()
        loss.observe(batch)
        assert torch.equal(torch.get_rng_state(), state)
        assert_close(batch, before, rtol=0, atol=0)
        norm, seen = norm_of(loss), batch["transition", "observation"]
        assert_close(norm.mean, seen.double().mean(0))
        assert_close(norm.var, seen.double().var(0, correction=0))
        slices = make_rows(B, K)
        loss.observe(slices)
        seen = torch.cat([seen, slices["observation"].flatten(0, 1)])
        assert_close(norm.mean, seen.double().mean(0))
        assert_close(norm.var, seen.double().var(0, correction=0))
        assert norm.count == B + B * K

    def test_target_encoder_has_the_same_statistics(self):
        loss = all_parts()
        stepper = ALMOptimizationStepper(loss, lr=1e-2, tau=0.1)
        for _ in range(3):
            stepper.step(None, make_batch())
            held = statistics(loss)
            assert_close(held["target"], held["encoder"], rtol=0, atol=0)
        assert held["target"]["count"] == 3 * B

    @pytest.mark.parametrize("shape", [(B,), (B, K)])
    def test_masked_rows_do_not_count(self, shape):
        loss, rows = all_parts(), make_rows(*shape)
        mask = torch.rand(shape) < 0.5
        seen = rows["observation"][mask]
        rows["observation"][~mask] = math.nan
        loss.loss_mask_key = "valid"
        loss.observe(rows.set("valid", mask))
        assert_close(norm_of(loss).mean, seen.double().mean(0))
        assert norm_of(loss).count == mask.sum()

    def test_skips_and_refuses(self):
        loss, batch = all_parts(), make_batch()
        loss.observe(batch)
        before = statistics(loss)
        loss.observe(make_batch(), skip=torch.tensor(True))
        batch["transition", "observation"][2, 1] = math.nan
        loss.observe(batch)
        assert_close(statistics(loss), before, rtol=0, atol=0)
        loss.observe(make_batch(), skip=torch.tensor(False))
        assert statistics(loss)["encoder"]["count"] == 2 * B

    def test_statistics_travel_with_state_and_copies(self):
        loss, other = all_parts(), all_parts()
        loss.observe(make_batch())
        twin = copy.deepcopy(loss)
        other.load_state_dict(loss.state_dict())
        held = statistics(loss)
        states = TensorDict(observation=3 + torch.randn(5, OBSERVATION), batch_size=[5])
        expected = loss.latents.encode(states).mean
        for same in (other, twin):
            assert_close(statistics(same), held, rtol=0, atol=0)
            assert_close(same.latents.encode(states).mean, expected)
            same.observe(make_batch())
            assert norm_of(same).count == 2 * B
        assert norm_of(loss).count == B
        double = loss.double()
        rows = make_rows(B).apply(
            lambda x: x.double() if x.dtype.is_floating_point else x
        )
        double.observe(rows)
        held = statistics(double)
        assert held["encoder"]["mean"].dtype == torch.float64
        assert held["target"]["count"] == held["encoder"]["count"] == 2 * B
        double.reset_parameters_recursive()
        assert statistics(double)["target"]["count"] == 0

    def test_a_recorded_graph_follows_the_statistics(self):
        loss, other = all_parts(), all_parts()

        def observe(observation):
            loss.observe(make_rows(B).set("observation", observation))
            return norm_of(loss).mean + 0

        graph = make_fx(observe)(torch.randn(B, OBSERVATION))
        norm_of(loss).reset_parameters()
        for _ in range(2):
            rows = make_rows(B)
            other.observe(rows)
            assert_close(graph(rows["observation"]), norm_of(other).mean)
        assert_close(statistics(loss), statistics(other))

    def test_acting_policy_follows(self):
        loss = all_parts()
        policy = loss.acting_policy()
        states = TensorDict(
            observation=5 + torch.randn(50, OBSERVATION), batch_size=[50]
        )
        acted = []
        for _ in range(2):
            with set_exploration_type(ExplorationType.DETERMINISTIC):
                acted.append(policy(states.clone())["action"])
            loss.observe(make_rows(B).set("observation", states["observation"][:B]))
        assert (acted[0] - acted[1]).abs().max() > 1e-4

    def test_does_nothing_without_statistics(self):
        loss = make_loss()
        before = {name: value.clone() for name, value in loss.state_dict().items()}
        loss.observe(make_batch())
        assert_close(dict(loss.state_dict()), before, rtol=0, atol=0)
