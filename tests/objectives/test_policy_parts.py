"""TD3's objective, the linear classifier, what parts cost, and all parts together."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close

from alm_torchrl import (
    ALMOptimizationStepper,
    functional,
    make_decoder,
    testing,
)
from alm_torchrl.objectives import (
    EntropyBonus,
    Logarithms,
    QValueObjective,
    Reconstruction,
    ScaledObjective,
    ValuePrediction,
)
from tests.helpers import (
    ACTION,
    LATENT,
    OBSERVATION,
    PARTS,
    K,
    gradients,
    make_batch,
    make_loss,
    network,
    part_of,
    seeded,
    variant,
)

# -- TD3's objective -------------------------------------------------------------------


class TestQValueObjective:
    @staticmethod
    def by_hand(loss, latent):
        """- mean min Q(z, tanh mean) on the networks themselves."""
        action = network(loss, "actor")(latent)[0]
        values = network(loss, "qvalue")(latent, action)
        return -torch.minimum(values[:, 0], values[:, 1]).mean()

    def test_value_and_gradient(self, batch):
        loss = make_loss(deterministic=True, policy_objective=QValueObjective())
        # Each of the critics is the smaller one somewhere.
        values = loss.latents.state_action_value(torch.randn(64, 4), torch.zeros(64, 2))
        assert len(values.argmin(-1).unique()) == 2
        value, metadata = loss.actor_loss(batch)
        expected = self.by_hand(loss, loss.latents.encode(batch["transition"]).mean)
        assert_close(value, expected)
        assert metadata == {}
        expected = {
            name: grad
            for name, grad in gradients(expected, loss).items()
            if part_of(name) == "actor"
        }
        assert all(grad.norm() > 0 for grad in expected.values())
        # Not a parameter of another part, and through the action alone.
        assert_close(gradients(value, loss), expected)

    def test_latents_are_the_targets_and_noise_is_clipped(self, batch):
        loss = make_loss(noise=5.0, bound=100.0, policy_objective=QValueObjective())
        seen = []
        hook = network(loss, "qvalue").register_forward_hook(
            lambda _, inputs, output: seen.append(inputs)
        )
        loss.actor_loss(batch)
        hook.remove()
        ((latent, action),) = seen
        target = loss.latents.encode(batch["transition"])
        assert ((latent - target.mean).abs() > 1e-3).all()
        noise = (action - network(loss, "actor")(latent)[0]).abs()
        assert_close(noise.max().item(), 0.3)

    def test_other_terms_are_the_same(self, batch):
        one = make_loss(deterministic=True)
        other = variant(one, policy_objective=QValueObjective())
        before, after = one(batch), other(batch).to_dict()
        assert {k for k, v in after.items() if v != before[k]} == {"loss_actor"}
        assert "policy_objective=QValueObjective()" in repr(other)


# -- an objective in units of its size ------------------------------------------------


class TestScaledObjective:
    @staticmethod
    def features(loss, latent):
        """What the actor's tanh squashes."""
        for layer in network(loss, "actor")[:-1]:
            latent = layer(latent)
        return latent

    @pytest.mark.parametrize(("factor", "floor"), [(1.0, False), (1e-3, True)])
    def test_value_and_gradient(self, batch, factor, floor):
        objective = ScaledObjective(QValueObjective(), coef=0.3, limit=0.2)
        loss = make_loss(deterministic=True, policy_objective=objective)
        for params in (network(loss, "qvalue").q1, network(loss, "qvalue").q2):
            params[-1].weight.data.mul_(factor)
        value, metadata = loss.actor_loss(batch)
        latent = loss.latents.encode(batch["transition"]).mean
        raw = self.features(loss, latent)
        values = network(loss, "qvalue")(latent, raw.tanh()).amin(-1)
        size = values.detach().abs().mean()
        assert (size < 0.01) == floor
        size = size.clamp(min=0.01)
        beyond = (raw.abs() - 0.2).clamp(min=0)
        assert 0 < (beyond == 0).float().mean() < 1
        expected = 0.3 * beyond.square().mean() - values.mean() / size
        assert_close(value, expected)
        assert_close(metadata, {"raw_action": raw.detach().abs().mean()})
        assert_close(
            gradients(value, loss),
            {
                name: grad
                for name, grad in gradients(expected, loss).items()
                if part_of(name) == "actor"
            },
            rtol=1e-4,
            atol=1e-6,
        )

    def test_combines_with_another_objective_and_the_contract(self, batch):
        objective = ScaledObjective(QValueObjective())
        loss = make_loss(policy_objective=objective)
        assert "raw_action" in loss.out_keys
        testing.check_loss(loss, batch)
        expected = "ScaledObjective(QValueObjective(), coef=0.01, limit=1.5)"
        assert repr(objective) == expected

    def test_raw_actions_are_finite_at_the_ends(self):
        loss = make_loss()
        network(loss, "actor")[-2].bias.data.fill_(100.0)
        raw = loss.latents.raw_action(torch.zeros(2, LATENT))
        assert_close(raw, torch.full_like(raw, 7.25), rtol=0.01, atol=0)

    def test_refuses_what_it_cannot_scale(self, batch):
        for bad in (None, lambda *_: None):
            with pytest.raises(TypeError, match="objective: expected a callable with"):
                ScaledObjective(bad)
        with pytest.raises(ValueError, match="coef: expected a number >= 0"):
            ScaledObjective(QValueObjective(), coef=-1.0)
        with pytest.raises(ValueError, match="limit: expected a number >= 0"):
            ScaledObjective(QValueObjective(), limit=-1.0)
        plain = TensorDictModule(nn.Linear(LATENT, ACTION), ["latent"], ["action"])
        loss = make_loss(
            actor=plain, policy_objective=ScaledObjective(QValueObjective())
        )
        with pytest.raises(TypeError, match="actor: expected one with a ClampedNormal"):
            loss.actor_loss(batch)


# -- what each part costs --------------------------------------------------------------


def calls(loss, function, *args):
    """How often each network runs in a function."""
    counts = Counter(dict.fromkeys(PARTS, 0))
    hooks = [
        network(loss, part).register_forward_hook(
            lambda *_, part=part: counts.update([part])
        )
        for part in PARTS
        if getattr(loss, part) is not None
    ]
    function(*args)
    for hook in hooks:
        hook.remove()
    return dict(counts)


def all_calls(horizon):
    return {
        # First and next observations of the slices; those of the transitions.
        "encoder": 2 + 1,
        # Along the slices, in imagination, and once for the classifier.
        "model": 2 * horizon + 1,
        # At the end of the slices, in imagination, for the target.
        "actor": 1 + (horizon + 1) + 1,
        # At the end of the slices, in imagination, target and loss.
        "qvalue": 4,
        "reward": 3,
        "classifier": 2,
    }


@pytest.mark.parametrize("horizon", [1, 5])
def test_each_network_runs_as_often_as_needed(horizon):
    loss = make_loss()
    assert calls(loss, loss, make_batch(horizon=horizon)) == all_calls(horizon)


@pytest.mark.parametrize(
    ("kwargs", "saved", "gone"),
    [
        ({"kl_coef": 0.0}, {"encoder": 1}, {"kl"}),
        ({"value_coef": 0.0}, {"actor": 1, "qvalue": 1}, {"terminal_value"}),
        ({"reward_coef": 0.0}, {"reward": 1}, {"model_reward"}),
        (
            {"classifier_coef": 0.0},
            {"model": 1, "classifier": 2},
            {"loss_classifier", "classifier_accuracy", "imagined_log_ratio"},
        ),
        (
            {"policy_objective": QValueObjective()},
            {"model": K, "actor": K, "reward": 1, "classifier": 1},
            {"imagined_reward", "imagined_log_ratio", "imagined_value"}
            | {"lambda_return"},
        ),
        ({"model_terms": [ValuePrediction("model", coef=0.0)]}, {}, set()),
        ({"entropy": EntropyBonus()}, {"actor": -1}, set()),
    ],
    ids=lambda value: "-".join(sorted(value)),
)
def test_what_is_left_out_costs_nothing(batch, kwargs, saved, gone):
    loss = make_loss(**kwargs)
    expected = {part: n - saved.get(part, 0) for part, n in all_calls(K).items()}
    assert calls(loss, loss, batch) == expected
    assert set(loss(batch).keys()) == set(loss.out_keys)
    assert {*make_loss().out_keys} - {*loss.out_keys} == gone


def test_an_update_without_terms(batch):
    """What is saved in the terms is saved in the update, too."""
    loss = make_loss(updater=False, kl_coef=0.0, value_coef=0.0, classifier_coef=0.0)
    stepper = ALMOptimizationStepper(loss)
    counts = calls(loss, stepper.step, None, batch)
    expected = {"encoder": 2, "model": 2 * K, "actor": K + 2, "qvalue": 3}
    assert counts == {**expected, "reward": 3, "classifier": 0}


# -- all of them -----------------------------------------------------------------------


def combined(observation_dim=4, latent_dim=3, **kwargs):
    """Every part at once."""
    decoder = make_decoder(observation_dim, latent_dim=latent_dim, hidden_dim=8)
    return {
        "entropy": EntropyBonus(),
        "logarithms": Logarithms("model"),
        "model_terms": [Reconstruction(decoder), ValuePrediction("encoder")],
        "policy_objective": QValueObjective(),
        "reward_transform": functional.shifted_log,
        **kwargs,
    }


@pytest.mark.parametrize(
    ("kwargs", "make"),
    [
        ({"linear_classifier": True}, testing.make_two_draw_batch),
        (combined(), testing.make_two_draw_batch),
        (combined(policy_objective=None), testing.make_slices),
    ],
    ids=["linear classifier", "all", "all but TD3's objective"],
)
def test_combinations_keep_the_contract_of_the_loss(kwargs, make):
    sizes = testing.Sizes(horizon=2)
    routes = {**testing.ROUTES, "loss_model": ("encoder", "model")}
    if kwargs.get("model_terms"):
        routes["loss_model"] += ("model_terms",)
    testing.check_loss(testing.make_loss(sizes, **kwargs), make(sizes), routes)


def new_stepper(seed):
    def make():
        kwargs = combined(OBSERVATION, LATENT, policy_objective=None)
        return make_loss(updater=False, **kwargs)

    return ALMOptimizationStepper(seeded(make, seed=seed), lr=1e-2)


def updates(stepper, numbers):
    return [
        seeded(lambda: stepper.step(None, make_batch()), seed=n).to_dict()
        for n in numbers
    ]


def test_stepper_continues():
    whole, part, rest = (new_stepper(n) for n in (0, 0, 1))
    before = copy.deepcopy(whole.loss.state_dict())
    expected = updates(whole, range(2))
    updates(part, range(1))
    rest.loss.load_state_dict(part.loss.state_dict())
    rest.load_state_dict(copy.deepcopy(part.state_dict()))
    assert_close(updates(rest, range(1, 2)), expected[1:], rtol=0, atol=0)
    after = whole.loss.state_dict()
    assert_close(rest.loss.state_dict(), after, rtol=0, atol=0)
    constant = (".low", ".high", ".std", ".count", "gamma", "lmbda")
    same = [
        name
        for name, value in after.items()
        if not name.endswith(constant)
        and isinstance(value, torch.Tensor)
        and torch.equal(value, before[name])
    ]
    assert same == []


@pytest.mark.parametrize("trailing", [(), (1,), (2, 3)])
def test_an_objective_may_return_metrics_of_any_shape(trailing):
    class Numbered(QValueObjective):
        metrics = ("number",)

        def __call__(self, loss, latent, horizon):
            value, _ = super().__call__(loss, latent, horizon)
            number = torch.arange(float(len(value)))
            number = number.reshape(-1, *(1 for _ in trailing)).expand(-1, *trailing)
            return value, {"number": number}

    batch = make_batch()
    _, metadata = make_loss(policy_objective=Numbered()).actor_loss(batch)
    assert metadata["number"] == (len(batch) - 1) / 2
