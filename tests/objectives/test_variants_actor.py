"""Variants of the policy's side: its objective, its classifier, its entropy."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close

from alm_torchrl import ALMOptimizationStepper, make_classifier, testing
from alm_torchrl.runs.agents import build_loss
from alm_torchrl.runs.folder import harmful_differences
from alm_torchrl.runs.settings import TrainConfig, preset_config
from tests.helpers import (
    ACTION,
    LATENT,
    PARTS,
    B,
    K,
    gradients,
    make_batch,
    make_loss,
    make_rows,
    network,
    part_of,
    seeded,
    variant,
)

equal = partial(assert_close, rtol=0, atol=0)
SPACES = {"observation_dim": 3, "action_low": [-1.0, -1.0], "action_high": [1.0, 1.0]}
SMALL = {"latent_dim": 2, "hidden_dim": 4, "model_hidden_dim": 4}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def batch():
    return make_batch()


def calls(loss, method, *args):
    """How often each network runs in a method, or in a function."""
    counts = dict.fromkeys(PARTS, 0)

    def count(part, *_):
        counts[part] += 1

    hooks = [
        network(loss, part).register_forward_hook(partial(count, part))
        for part in PARTS
        if getattr(loss, part) is not None
    ]
    (getattr(loss, method) if isinstance(method, str) else method)(*args)
    for hook in hooks:
        hook.remove()
    return counts


def settings_of(**changes):
    return preset_config("quick", **SMALL, **changes).to_dict()


# -- TD3's objective -------------------------------------------------------------------


class TestQValueObjective:
    def by_hand(self, loss, latent):
        """- mean min Q(z, tanh mean) on the networks themselves."""
        action = network(loss, "actor")(latent)[0]
        values = network(loss, "qvalue")(latent, action)
        return -torch.minimum(values[:, 0], values[:, 1]).mean()

    def test_value_and_gradient(self, batch):
        loss = make_loss(deterministic=True, actor_objective="qvalue")
        # Each of the critics is the smaller one somewhere.
        values = loss.state_action_value(torch.randn(64, 4), torch.zeros(64, 2))
        assert len(values.argmin(-1).unique()) == 2
        value, metadata = loss.actor_loss(batch)
        expected = self.by_hand(loss, loss.encode(batch["transition"]).mean)
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

    def test_latents_and_noise(self, batch):
        loss = make_loss(noise=5.0, bound=100.0, actor_objective="qvalue")
        seen = []
        hook = network(loss, "qvalue").register_forward_hook(
            lambda _, inputs, output: seen.append(inputs)
        )
        loss.actor_loss(batch)
        hook.remove()
        ((latent, action),) = seen
        target = loss.encode(batch["transition"])
        assert ((latent - target.mean).abs() > 1e-3).all()
        noise = (action - network(loss, "actor")(latent)[0]).abs()
        assert_close(noise.max().item(), 0.3)

    def test_only_actor_and_critics_run(self, batch):
        loss = make_loss(actor_objective="qvalue", classifier_coef=0.0)
        counts = calls(loss, "actor_loss", loss.encode_transitions(batch))
        assert counts == {**dict.fromkeys(PARTS, 0), "actor": 1, "qvalue": 1}
        assert calls(loss, "actor_loss", make_rows(B))["encoder"] == 1

    @pytest.mark.parametrize("coef", [0.0, 0.1])
    def test_keys(self, batch, coef):
        loss = make_loss(actor_objective="qvalue", classifier_coef=coef)
        gone = {"imagined_reward", "imagined_log_ratio", "imagined_value"}
        assert not {*gone, "lambda_return"} & {*loss.out_keys}
        assert set(loss(batch).keys()) == set(loss.out_keys)
        assert ("loss_classifier" in loss.out_keys) == (coef > 0)
        assert "actor_objective=qvalue" in repr(loss)

    def test_other_terms_are_the_same(self, batch):
        one = make_loss(deterministic=True)
        other = variant(one, actor_objective="qvalue")
        before, after = one(batch), other(batch).to_dict()
        assert {k for k, v in after.items() if v != before[k]} == {"loss_actor"}

    @pytest.mark.parametrize("reduction", ["sum", "none"])
    def test_reductions(self, reduction):
        rows = make_rows(B, K)
        loss = make_loss(
            deterministic=True, actor_objective="qvalue", reduction=reduction
        )
        value = loss.actor_loss(rows)[0]
        assert value.shape == ((B,) if reduction == "none" else ())
        mean = variant(loss, actor_objective="qvalue").actor_loss(rows)[0]
        count = B if reduction == "none" else B * K
        assert_close(value.sum() / count, mean)

    def test_unknown(self):
        with pytest.raises(ValueError, match=r"actor_objective: expected .* got 'td3'"):
            make_loss(actor_objective="td3")


# -- linear classifier -----------------------------------------------------------------


class TestLinearClassifier:
    def test_logits(self):
        classifier = make_classifier(ACTION, latent_dim=LATENT, linear=True)
        z, a, after = torch.randn(B, LATENT), torch.randn(B, ACTION), torch.randn(B, 4)
        rows = TensorDict(
            latent=z,
            action=a,
            next=TensorDict(latent=after, batch_size=B),
            batch_size=B,
        )
        weight, bias = classifier.parameters()
        torch.nn.init.normal_(bias)
        expected = torch.cat([z, a, after], 1) @ weight.T + bias
        assert_close(classifier(rows)["logits"], expected)
        # Orthogonal, as all layers are at the start.
        assert_close(weight @ weight.T, torch.eye(2))

    def test_loss(self, batch):
        loss = make_loss(deterministic=True, linear_classifier=True)
        layer = network(loss, "classifier")[0]
        rows = batch["transition"]
        z, after = loss.encode(rows).mean, loss.encode(rows["next"]).mean
        imagined = loss.step(z, rows["action"]).mean
        after = torch.where(rows["imagined"].unsqueeze(1), imagined, after)
        logits = layer(torch.cat([z, rows["action"], after], 1))
        label = (~rows["imagined"]).long()
        log_prob = logits.log_softmax(1).gather(1, label.unsqueeze(1))
        value, _ = loss.classifier_loss(batch)
        assert_close(value, -log_prob.mean())
        grads = gradients(value, loss)
        assert {part_of(name) for name in grads} == {"classifier"}
        assert len(grads) == 2

    def test_autocast_keeps_it_in_full_precision(self, batch):
        loss = make_loss(linear_classifier=True)
        z = torch.randn(B, LATENT)
        with torch.autocast("cpu", torch.bfloat16):
            logits = loss.classify(z, torch.zeros(B, ACTION), z)
        assert logits.dtype == torch.float32


# -- coefficients and horizons ---------------------------------------------------------


class TestCost:
    """How often each network runs in one pass of all terms."""

    @staticmethod
    def full(horizon):
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

    @pytest.mark.parametrize("horizon", [1, 2, 5])
    def test_any_horizon(self, horizon):
        batch = make_batch(horizon=horizon)
        loss = make_loss()
        assert calls(loss, "forward", batch) == self.full(horizon)
        assert all(value.isfinite() for value in loss(batch).values())

    @pytest.mark.parametrize(
        ("kwargs", "saved", "gone"),
        [
            ({"kl_coef": 0.0}, {"encoder": 1}, {"kl"}),
            ({"value_coef": 0.0}, {"actor": 1, "qvalue": 1}, {"terminal_value"}),
            (
                {"classifier_coef": 0.0},
                {"model": 1, "classifier": 2},
                {"loss_classifier", "classifier_accuracy", "imagined_log_ratio"},
            ),
            (
                {"actor_objective": "qvalue"},
                {"model": K, "actor": K, "reward": 1, "classifier": 1},
                {"imagined_reward", "imagined_log_ratio", "imagined_value"}
                | {"lambda_return"},
            ),
        ],
        ids=lambda value: "-".join(sorted(value)),
    )
    def test_what_is_left_out_costs_nothing(self, batch, kwargs, saved, gone):
        loss = make_loss(**kwargs)
        full = self.full(K)
        expected = {part: full[part] - saved.get(part, 0) for part in PARTS}
        assert calls(loss, "forward", batch) == expected
        assert {*make_loss().out_keys} - {*loss.out_keys} == gone

    def test_an_update_without_terms(self, batch):
        """What is saved in the terms is saved in the update, too."""
        loss = make_loss(
            updater=False, kl_coef=0.0, value_coef=0.0, classifier_coef=0.0
        )
        stepper = ALMOptimizationStepper(loss)
        counts = calls(loss, lambda: stepper.step(None, batch))
        expected = {"encoder": 2, "model": 2 * K, "actor": K + 2, "qvalue": 3}
        assert counts == {**expected, "reward": 3, "classifier": 0}

    def test_an_entropy_bonus_costs_one_run_of_the_actor(self, batch):
        full = self.full(K)
        counts = calls(make_loss(alpha_init=1.0), "forward", batch)
        assert counts == {**full, "actor": full["actor"] + 1}

    @pytest.mark.parametrize("coef", [0.01, 1.0, 10.0])
    def test_the_return_is_linear_in_the_classifiers_weight(self, coef):
        loss = make_loss(deterministic=True, gamma=0.9, lmbda=0.5, classifier_coef=1.0)
        z = torch.randn(B, LATENT)
        returns = {
            c: variant(loss, gamma=0.9, lmbda=0.5, classifier_coef=c).imagine(z, K)
            for c in (0.0, coef)
        }
        ratio = returns[coef]["log_ratio"]
        step, weighted = torch.zeros(B), []
        for t in reversed(range(K)):
            step = ratio[:, t] + 0.9 * 0.5 * step
            weighted.insert(0, coef * step)
        difference = returns[coef]["lambda_return"] - returns[0.0]["lambda_return"]
        assert_close(difference, torch.stack(weighted, 1))


# -- all of them -----------------------------------------------------------------------

LOSSES = {
    "qvalue": {"actor_objective": "qvalue"},
    "qvalue alone": {"actor_objective": "qvalue", "classifier_coef": 0.0},
    "linear classifier": {"linear_classifier": True},
    "entropy": {"alpha_init": 0.5},
    "entropy and qvalue": {"alpha_init": 0.5, "actor_objective": "qvalue"},
}


@pytest.mark.parametrize("kwargs", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("make", [testing.make_two_draw_batch, testing.make_slices])
def test_checks_for_losses(kwargs, make):
    sizes = testing.Sizes(horizon=2)
    testing.check_loss(testing.make_loss(sizes, **kwargs), make(sizes))


def new_stepper(kwargs, seed=0):
    loss = seeded(make_loss, updater=False, seed=seed, **kwargs)
    return ALMOptimizationStepper(loss, lr=1e-2)


def updates(stepper, numbers):
    return [
        seeded(lambda: stepper.step(None, make_batch()), seed=n).to_dict()
        for n in numbers
    ]


@pytest.mark.parametrize("kwargs", LOSSES.values(), ids=LOSSES)
def test_stepper_continues(kwargs):
    whole, part, rest = new_stepper(kwargs), new_stepper(kwargs), new_stepper(kwargs, 1)
    before = copy.deepcopy(whole.loss.state_dict())
    expected = updates(whole, range(4))
    updates(part, range(2))
    rest.loss.load_state_dict(part.loss.state_dict())
    rest.load_state_dict(copy.deepcopy(part.state_dict()))
    equal(updates(rest, range(2, 4)), expected[2:])
    equal(rest.loss.state_dict(), whole.loss.state_dict())
    same = [
        name
        for name, value in whole.loss.state_dict().items()
        if name.split(".")[0] not in ("gamma", "lmbda")
        and not name.endswith((".low", ".high", ".std", ".count"))
        and isinstance(value, torch.Tensor)
        and torch.equal(value, before[name])
    ]
    assert same == []


SETTINGS = {"actor_objective": "qvalue", "classifier": "linear", "entropy": True}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_reach_the_loss(name):
    plain, changed = (
        build_loss(settings, SPACES)
        for settings in (settings_of(), settings_of(**{name: SETTINGS[name]}))
    )
    assert repr(plain) != repr(changed)


def test_settings_of_older_runs():
    config = preset_config("quick", **SMALL)
    older = {k: v for k, v in config.to_dict().items() if k not in SETTINGS}
    assert TrainConfig.from_dict(older) == config
    assert harmful_differences(older, config) == {}
    for name, value in SETTINGS.items():
        changed = preset_config("quick", **SMALL, **{name: value})
        assert harmful_differences(older, changed) == {
            name: (getattr(config, name), value)
        }
    assert repr(build_loss(older, SPACES)) == repr(build_loss(config.to_dict(), SPACES))
