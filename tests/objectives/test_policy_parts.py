"""Parts of the policy's side: its objective, its classifier, its entropy."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Normal
from torch.testing import assert_close
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import IndependentNormal, TanhNormal

from alm_torchrl import (
    ALMOptimizationStepper,
    ClampedNormal,
    NoiseSchedule,
    NonFiniteError,
    functional,
    make_actor,
    make_alm_loss,
    make_classifier,
    make_decoder,
    make_stochastic_actor,
    testing,
)
from alm_torchrl.objectives import (
    EntropyBonus,
    Logarithms,
    QValueObjective,
    Reconstruction,
    ValuePrediction,
)
from tests.helpers import (
    ACTION,
    LATENT,
    OBSERVATION,
    PARTS,
    B,
    Gaussian,
    K,
    alternate,
    gradients,
    make_batch,
    make_loss,
    make_rows,
    network,
    part_of,
    probabilistic,
    seeded,
    variant,
)

ALPHA = 0.7


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


# -- TD3's objective -------------------------------------------------------------------


class TestQValueObjective:
    def by_hand(self, loss, latent):
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

    def test_latents_and_noise(self, batch):
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

    def test_only_actor_and_critics_run(self, batch):
        loss = make_loss(policy_objective=QValueObjective(), classifier_coef=0.0)
        counts = calls(loss, "actor_loss", batch, loss.encode_transitions(batch))
        assert counts == {**dict.fromkeys(PARTS, 0), "actor": 1, "qvalue": 1}
        assert calls(loss, "actor_loss", make_rows(B))["encoder"] == 1

    @pytest.mark.parametrize("coef", [0.0, 0.1])
    def test_keys(self, batch, coef):
        loss = make_loss(policy_objective=QValueObjective(), classifier_coef=coef)
        gone = {"imagined_reward", "imagined_log_ratio", "imagined_value"}
        assert not {*gone, "lambda_return"} & {*loss.out_keys}
        assert set(loss(batch).keys()) == set(loss.out_keys)
        assert ("loss_classifier" in loss.out_keys) == (coef > 0)
        assert "policy_objective=QValueObjective()" in repr(loss)

    def test_other_terms_are_the_same(self, batch):
        one = make_loss(deterministic=True)
        other = variant(one, policy_objective=QValueObjective())
        before, after = one(batch), other(batch).to_dict()
        assert {k for k, v in after.items() if v != before[k]} == {"loss_actor"}

    @pytest.mark.parametrize("reduction", ["sum", "none"])
    def test_reductions(self, reduction):
        rows = make_rows(B, K)
        loss = make_loss(
            deterministic=True, policy_objective=QValueObjective(), reduction=reduction
        )
        value = loss.actor_loss(rows)[0]
        assert value.shape == ((B,) if reduction == "none" else ())
        mean = variant(loss, policy_objective=QValueObjective()).actor_loss(rows)[0]
        count = B if reduction == "none" else B * K
        assert_close(value.sum() / count, mean)


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
        z, after = (
            loss.latents.encode(rows).mean,
            loss.latents.encode(rows["next"]).mean,
        )
        imagined = loss.latents.step(z, rows["action"]).mean
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
            logits = loss.latents.classify(z, torch.zeros(B, ACTION), z)
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
                {"policy_objective": QValueObjective()},
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
        counts = calls(make_loss(entropy=EntropyBonus()), "forward", batch)
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


def combined(**kwargs):
    """Every part at once."""
    decoder = make_decoder(4, latent_dim=3, hidden_dim=8)
    return {
        "entropy": EntropyBonus(),
        "logarithms": Logarithms("model"),
        "model_terms": [Reconstruction(decoder), ValuePrediction("encoder")],
        "policy_objective": QValueObjective(),
        "reward_transform": functional.shifted_log,
        **kwargs,
    }


LOSSES = {
    "qvalue": lambda: {"policy_objective": QValueObjective()},
    "linear classifier": lambda: {"linear_classifier": True},
    "entropy": lambda: {"entropy": EntropyBonus(alpha_init=0.5)},
    "all": combined,
    "all but TD3's objective": lambda: combined(policy_objective=None),
}


@pytest.mark.parametrize("make_kwargs", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("make", [testing.make_two_draw_batch, testing.make_slices])
def test_checks_for_losses(make_kwargs, make):
    sizes, kwargs = testing.Sizes(horizon=2), make_kwargs()
    routes = {**testing.ROUTES, "loss_model": ("encoder", "model")}
    if kwargs.get("model_terms"):
        routes["loss_model"] += ("model_terms",)
    testing.check_loss(testing.make_loss(sizes, **kwargs), make(sizes), routes)


def new_stepper(make_kwargs, seed=0):
    def make():
        kwargs = make_kwargs()
        if "model_terms" in kwargs:
            kwargs["model_terms"][0].decoder = make_decoder(
                OBSERVATION, latent_dim=LATENT, hidden_dim=8
            )
        return make_loss(updater=False, **kwargs)

    return ALMOptimizationStepper(seeded(make, seed=seed), lr=1e-2)


def updates(stepper, numbers):
    return [
        seeded(lambda: stepper.step(None, make_batch()), seed=n).to_dict()
        for n in numbers
    ]


@pytest.mark.parametrize("make_kwargs", LOSSES.values(), ids=LOSSES)
def test_stepper_continues(make_kwargs):
    whole, part, rest = (new_stepper(make_kwargs, n) for n in (0, 0, 1))
    before = copy.deepcopy(whole.loss.state_dict())
    expected = updates(whole, range(4))
    updates(part, range(2))
    rest.loss.load_state_dict(part.loss.state_dict())
    rest.load_state_dict(copy.deepcopy(part.state_dict()))
    assert_close(updates(rest, range(2, 4)), expected[2:], rtol=0, atol=0)
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


# -- entropy ---------------------------------------------------------------------------


def entropy_loss(alpha_init=ALPHA, target_entropy=None, **kwargs):
    bonus = EntropyBonus(alpha_init=alpha_init, target_entropy=target_entropy)
    return make_loss(entropy=bonus, **kwargs)


def gaussian_log_prob(value, loc, scale):
    """Summed over the numbers of an action."""
    each = -0.5 * ((value - loc) / scale) ** 2 - scale.log() - math.log(2 * math.pi) / 2
    return each.sum(-1)


# -- parts -----------------------------------------------------------------------------


class TestStochasticActor:
    def test_mean_and_scale(self):
        actor = make_stochastic_actor([-0.4] * 2, [0.4] * 2, latent_dim=3, hidden_dim=8)
        z = torch.randn(B, 3)
        layers = [m for m in actor.modules() if isinstance(m, nn.Linear)]
        sizes = [(layer.in_features, layer.out_features) for layer in layers]
        assert sizes == [(3, 8), (8, 8), (8, 4)]
        nn.init.normal_(layers[-1].bias, std=5.0)
        hidden = z
        for layer in layers[:-1]:
            hidden = nn.functional.elu(layer(hidden))
        loc, raw = layers[-1](hidden).split(2, 1)
        low, high = math.exp(-5), math.exp(2)
        scale = high - torch.log1p(torch.exp(high - raw))
        scale = low + torch.log1p(torch.exp(scale - low))
        dist = actor.get_dist(TensorDict(latent=z, batch_size=[B]))
        assert isinstance(dist, ClampedNormal)
        assert_close(dist.loc, loc.tanh())
        assert_close(dist.scale, scale)
        assert_close(dist.low, torch.full([B, 2], -0.4))
        assert_close(dist.high, torch.full([B, 2], 0.4))

    @pytest.mark.parametrize(("raw", "std"), [(-1e3, math.exp(-5)), (1e3, 7.3897)])
    def test_scale_stays_in_its_bounds(self, raw, std):
        actor = make_stochastic_actor([-1.0], [1.0], latent_dim=2, hidden_dim=4)
        nn.init.constant_(actor[0].module[-2].bias, raw)
        dist = actor.get_dist(TensorDict(latent=torch.zeros(2), batch_size=[]))
        assert dist.scale.item() == pytest.approx(std, rel=1e-3)

    def test_acting(self):
        loss = entropy_loss(bound=100.0)
        assert loss.noise_schedule is None
        policy, rows = loss.acting_policy(), make_rows(256)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            assert policy(rows.copy())["action"].abs().max() < 1
        with set_exploration_type(ExplorationType.RANDOM):
            noisy = policy(rows.copy())["action"]
        # Drawn with the actor's own scale, about 0.7 at the start.
        assert 0.4 < noisy.std() < 1.5

    def test_arguments(self):
        with pytest.raises(ValueError, match="action_low and action_high"):
            make_stochastic_actor([1.0], [-1.0])
        with pytest.raises(ValueError, match="hidden_dim"):
            make_stochastic_actor([-1.0], [1.0], hidden_dim=0)


class TestScoredSample:
    def test_is_the_sample_of_rsample_and_its_density(self):
        loc = torch.randn(5, 2, dtype=torch.float64)
        scale = torch.rand(5, 2, dtype=torch.float64) + 0.1
        free, tight = (ClampedNormal(loc, scale, -b, b) for b in (99.0, 0.2))
        sample, log_prob = seeded(free.rsample_and_log_prob)
        assert_close(log_prob.sum(-1), gaussian_log_prob(sample, loc, scale))
        clamped, same = seeded(tight.rsample_and_log_prob)
        assert_close(same, log_prob, rtol=0, atol=0)
        assert_close(clamped, seeded(tight.rsample), rtol=0, atol=0)
        assert clamped.abs().max() < 0.2

    def test_mean_is_the_entropy_also_at_the_bounds(self):
        dist = ClampedNormal(torch.tensor([0.9]), torch.tensor([2.0]))
        _, log_prob = dist.rsample_and_log_prob((20_000,))
        assert -log_prob.mean().item() == pytest.approx(dist.entropy().item(), abs=0.03)

    def test_gradient_is_that_of_the_entropy(self):
        loc = torch.tensor([0.9, 0.0], requires_grad=True)
        scale = torch.tensor([2.0, 0.5], requires_grad=True)
        _, log_prob = ClampedNormal(loc, scale).rsample_and_log_prob()
        log_prob.sum().backward()
        assert_close(loc.grad, torch.zeros(2))
        assert_close(scale.grad, -1 / scale.detach())


def test_formulas():
    generator = torch.Generator().manual_seed(1)
    value, log_prob = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    log_alpha = torch.tensor(-0.3, dtype=torch.float64, requires_grad=True)
    log_prob.requires_grad_()
    alpha = math.exp(-0.3)
    pairs = zip(value.tolist(), log_prob.tolist(), strict=True)
    soft = [q - alpha * p for q, p in pairs]
    assert_close(functional.soft_value(value, log_prob, alpha).tolist(), soft)
    loss = functional.temperature_loss(log_alpha, log_prob, -1.5)
    expected = [-alpha * (p - 1.5) for p in log_prob.tolist()]
    assert_close(loss.tolist(), expected)
    loss.sum().backward()
    assert_close(log_alpha.grad.item(), sum(expected))
    assert log_prob.grad is None


# -- terms -----------------------------------------------------------------------------


class TestPolicyReturn:
    def test_value(self):
        loss = entropy_loss(bound=100.0, gamma=0.8, lmbda=0.6, classifier_coef=0.5)
        rollout = loss.imagine(torch.randn(B, LATENT), K)
        loc, scale, *_ = network(loss, "actor")(rollout["latent"])
        log_prob = gaussian_log_prob(rollout["action"], loc, scale)
        # Float32 forgets a little of the noise in an action of its own size.
        assert_close(rollout["log_prob"], log_prob, rtol=1e-4, atol=1e-4)
        bonus = -ALPHA * rollout["log_prob"]
        z, a = rollout["latent"], rollout["action"]
        value = (
            loss.latents.state_action_value(z[:, 1:], a[:, 1:]).amin(-1) + bonus[:, 1:]
        )
        assert_close(rollout["value"], value)
        reward = rollout["reward"] + 0.5 * rollout["log_ratio"] + bonus[:, :-1]
        step, returns = value[:, -1], []
        for t in reversed(range(K)):
            step = reward[:, t] + 0.8 * (0.4 * value[:, t] + 0.6 * step)
            returns.insert(0, step)
        assert_close(rollout["lambda_return"], torch.stack(returns, 1))

    def test_gradient(self):
        """Without rewards and values, of the entropy of the imagined steps alone."""
        loss = entropy_loss(gamma=0.8, lmbda=0.6)
        for part in ("reward", "qvalue", "classifier"):
            getattr(loss, f"{part}_params").data.zero_()
        rows = alternate(make_rows(B))
        value, metadata = seeded(loss.actor_loss, rows, horizon=K)
        rollout = seeded(lambda: loss.imagine(loss.draw_latent(rows), K))
        bonus = -ALPHA * rollout["log_prob"]
        expected = sum(
            0.8**t * (0.8 * 0.6) ** (k - t) * bonus[:, k].mean() / K
            for t in range(K)
            for k in range(t, K)
        )
        grads = gradients(-expected, loss)
        assert {part_of(name) for name in grads} == {"actor"}
        assert all(grad.norm() > 0 for grad in grads.values())
        assert_close(gradients(value, loss), grads)
        values = gradients(rollout["value"].sum(), loss)
        assert all((grad == 0).all() for grad in values.values())
        assert_close(metadata["imagined_value"], bonus[:, 1:].mean().detach())

    @pytest.mark.parametrize("bound", [0.2, 1.0])
    def test_qvalue_objective_is_that_of_sac(self, bound):
        loss = entropy_loss(
            deterministic=True, policy_objective=QValueObjective(), bound=bound
        )
        batch = make_batch()
        z = loss.latents.encode(batch["transition"]).mean
        loc, scale, *_ = network(loss, "actor")(z)
        action = loc + (loc.clamp(-bound + 1e-6, bound - 1e-6) - loc).detach()
        q = network(loss, "qvalue")(z, action).amin(1)
        expected = -(q - ALPHA * gaussian_log_prob(loc, loc, scale)).mean()
        value, metadata = loss.actor_loss(batch)
        assert_close(value, expected)
        assert metadata == {}
        grads = gradients(value, loss)
        assert {part_of(name) for name in grads} == {"actor"}
        assert_close(grads, {k: gradients(expected, loss)[k] for k in grads})


def test_td_target():
    loss = entropy_loss(deterministic=True, gamma=0.9)
    rows = make_rows(B)
    z = loss.latents.encode(rows["next"]).mean
    loc, scale, *_ = network(loss, "actor")(z)
    log_prob = gaussian_log_prob(loc, loc, scale)
    q = loss.latents.state_action_value(z, loc, "target").amin(1)
    left = 0.9 * (1 - rows["next", "terminated"].float().squeeze(1))
    expected = rows["next", "reward"].squeeze(1) + left * (q - ALPHA * log_prob)
    target = loss.td_target(rows)
    assert_close(target, expected.detach())
    grads = gradients(loss.qvalue_loss(rows)[0], loss)
    assert {part_of(name) for name in grads} == {"qvalue"}


@pytest.mark.parametrize("target", [None, 0.5])
def test_alpha_loss(target):
    loss = entropy_loss(deterministic=True, target_entropy=target)
    batch = make_batch()
    loc, scale, *_ = network(loss, "actor")(
        loss.latents.encode(batch["transition"]).mean
    )
    log_prob = gaussian_log_prob(loc, loc, scale).mean().detach()
    expected = -ALPHA * (log_prob + (-ACTION if target is None else target))
    value, metadata = loss.alpha_loss(batch)
    assert_close(value.detach(), expected)
    # d alpha / d log alpha is alpha.
    assert_close(gradients(value, loss), {"entropy.log_alpha": expected})
    assert_close(metadata, {"alpha": torch.tensor(ALPHA), "entropy": -log_prob})


def test_noise_is_not_clipped():
    loss = entropy_loss(bound=100.0)
    z = torch.randn(64, LATENT)
    mean = network(loss, "actor")(z)[0]
    assert (loss.latents.act(z) - mean).abs().max() > 1
    plain = make_loss(actor=loss.actor)
    assert (plain.latents.act(z) - mean).abs().max() < 0.301
    assert "noise_clip=None" in repr(loss)
    assert "noise_clip=0.3" in repr(plain)


class TestOtherActors:
    @staticmethod
    def actor(distribution):
        net = Gaussian(LATENT, ACTION)
        return probabilistic(net, ["latent"], "action", distribution)

    @staticmethod
    def log_prob(distribution, action, loc, scale):
        if distribution is not TanhNormal:
            return gaussian_log_prob(action, loc, scale)
        before = gaussian_log_prob(action.atanh(), loc, scale)
        return before - (1 - action**2).log().sum(-1)

    @pytest.mark.parametrize("distribution", [TanhNormal, IndependentNormal, Normal])
    def test_log_prob(self, distribution):
        loss = entropy_loss(actor=self.actor(distribution))
        rollout = loss.imagine(torch.randn(B, LATENT), K)
        parameters = network(loss, "actor")(rollout["latent"])
        expected = self.log_prob(distribution, rollout["action"], *parameters)
        assert_close(rollout["log_prob"], expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("deterministic", [False, True])
    @pytest.mark.parametrize("distribution", [TanhNormal, IndependentNormal])
    def test_terms(self, distribution, deterministic):
        actor = self.actor(distribution)
        loss = entropy_loss(actor=actor, deterministic=deterministic)
        losses = loss(make_batch())
        assert set(losses.keys()) == set(loss.out_keys)
        assert all(value.isfinite() for value in losses.values())
        grads = gradients(losses["loss_actor"], loss)
        assert {part_of(name) for name in grads} == {"actor"}


# -- arguments and state ---------------------------------------------------------------


class TestArguments:
    @pytest.mark.parametrize(
        ("actor", "got"),
        [
            (make_actor([-1.0] * 2, [1.0] * 2, latent_dim=LATENT), "NoiseSchedule"),
            (
                TensorDictModule(nn.Linear(LATENT, ACTION), ["latent"], ["action"]),
                "got TensorDictModule",
            ),
        ],
    )
    def test_the_actor_must_learn_its_noise(self, actor, got):
        with pytest.raises(
            TypeError, match=rf"actor: expected one that learns its noise .*{got}"
        ):
            entropy_loss(actor=actor)

    @pytest.mark.parametrize(
        ("name", "kwargs"),
        [
            ("alpha_init", {"alpha_init": 0.0}),
            ("alpha_init", {"alpha_init": True}),
            ("target_entropy", {"target_entropy": math.inf}),
        ],
    )
    def test_numbers(self, name, kwargs):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            entropy_loss(**kwargs)

    def test_no_schedule_beside_it(self):
        sizes = {"observation_dim": 3, "action_low": [-1.0], "action_high": [1.0]}
        assert make_alm_loss(**sizes, entropy=EntropyBonus()).noise_schedule is None
        with pytest.raises(ValueError, match="noise_schedule: expected None with"):
            make_alm_loss(
                **sizes, entropy=EntropyBonus(), noise_schedule=NoiseSchedule()
            )

    def test_without(self):
        loss = make_loss()
        assert loss.entropy is None
        assert not {"loss_alpha", "alpha", "entropy"} & {*loss.out_keys}
        assert not [name for name in loss.state_dict() if "alpha" in name]
        with pytest.raises(RuntimeError, match="entropy=None"):
            loss.alpha_loss(make_batch())


class TestState:
    def test_saved_copied_and_reset(self):
        loss = entropy_loss()
        loss.entropy.log_alpha.data.fill_(-3.0)
        other = entropy_loss(alpha_init=2.0)
        assert other.entropy.log_alpha.item() == pytest.approx(math.log(2.0))
        other.load_state_dict(loss.state_dict())
        twin = copy.deepcopy(loss).double()
        assert other.entropy.log_alpha == twin.entropy.log_alpha == -3.0
        assert twin.entropy.log_alpha.dtype == torch.float64
        twin.entropy.log_alpha.data.zero_()
        assert loss.entropy.log_alpha == -3.0
        loss.reset_parameters_recursive()
        assert loss.entropy.log_alpha.item() == pytest.approx(math.log(ALPHA))

    def test_masked_rows_do_not_count(self):
        rows = make_rows(B)
        short = rows[:-2].clone()
        rows["collector", "mask"] = torch.arange(B) < B - 2
        rows["observation"][-2:] = float("nan")
        loss = entropy_loss(deterministic=True)
        value, metadata = loss.alpha_loss(rows)
        expected, other = loss.alpha_loss(short)
        assert_close(value, expected)
        assert_close(metadata, other)


class TestUpdate:
    @pytest.mark.parametrize("target", [-50.0, 50.0])
    def test_only_the_temperature_moves_and_where_to(self, target):
        loss = entropy_loss(updater=False, target_entropy=target)
        stepper = ALMOptimizationStepper(loss, lr=1e-2)
        assert list(stepper.optimizers)[-2:] == ["actor_loss", "alpha_loss"]
        (group,) = stepper.optimizers["alpha_loss"].param_groups
        assert group["params"] == [loss.entropy.log_alpha]
        found = {}

        def before_alpha(*_):
            found.update({k: p.detach().clone() for k, p in loss.named_parameters()})

        stepper.optimizers["alpha_loss"].register_step_pre_hook(before_alpha)
        metrics = stepper.step(None, make_batch())
        moved = {k for k, p in loss.named_parameters() if not torch.equal(p, found[k])}
        assert moved == {"entropy.log_alpha"}
        # Too much entropy: less weight.
        sign = 1 if target > 0 else -1
        expected = math.log(ALPHA) + sign * 1e-2
        assert loss.entropy.log_alpha.item() == pytest.approx(expected, abs=1e-4)
        assert metrics["grad_norm_alpha"] > 0
        assert_close(metrics["alpha"], torch.tensor(ALPHA))

    def test_without_it_there_is_no_such_step(self):
        stepper = ALMOptimizationStepper(make_loss(updater=False))
        assert "alpha_loss" not in stepper.optimizers

    def test_a_bad_temperature_stops_it(self):
        loss = entropy_loss(updater=False)
        stepper = ALMOptimizationStepper(loss)
        loss.entropy.log_alpha.data.fill_(float("nan"))
        with pytest.raises(NonFiniteError) as error:
            stepper.step(None, make_batch())
        assert error.value.term == "loss_qvalue"


def test_bf16_keeps_densities_in_full_precision():
    loss = entropy_loss()
    with torch.autocast("cpu", torch.bfloat16):
        rollout = loss.imagine(torch.randn(B, LATENT), K)
    assert rollout["log_prob"].dtype == torch.float32
