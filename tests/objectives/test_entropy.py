"""The entropy bonus: its actor and densities, the terms it changes, its temperature."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.distributions import Normal
from torch.testing import assert_close
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import IndependentNormal, TanhNormal

from alm_torchrl import (
    ALMOptimizationStepper,
    ClampedNormal,
    NoiseSchedule,
    functional,
    make_alm_loss,
    make_stochastic_actor,
)
from alm_torchrl.objectives import EntropyBonus, QValueObjective
from tests.helpers import (
    ACTION,
    LATENT,
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
)

ALPHA = 0.7


def entropy_loss(alpha_init=ALPHA, target_entropy=None, **kwargs):
    bonus = EntropyBonus(alpha_init=alpha_init, target_entropy=target_entropy)
    return make_loss(entropy=bonus, **kwargs)


def gaussian_log_prob(value, loc, scale):
    """Summed over the numbers of an action."""
    each = -0.5 * ((value - loc) / scale) ** 2 - scale.log() - math.log(2 * math.pi) / 2
    return each.sum(-1)


def actor_output(loss, latent):
    """Mean and scale of the action, from the network itself."""
    loc, scale, *_ = network(loss, "actor")(latent)
    return loc, scale


# -- actor and densities ---------------------------------------------------------------


class TestStochasticActor:
    def test_acts_with_its_own_noise(self):
        loss = entropy_loss(bound=100.0)
        assert loss.noise_schedule is None
        policy, rows = loss.acting_policy(), make_rows(256)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            assert policy(rows.copy())["action"].abs().max() < 1
        with set_exploration_type(ExplorationType.RANDOM):
            assert 0.4 < policy(rows.copy())["action"].std() < 1.5
        # No clip in the losses either, unlike without the bonus.
        z = torch.randn(64, LATENT)
        mean, _ = actor_output(loss, z)
        assert (loss.latents.act(z) - mean).abs().max() > 1
        plain = make_loss(actor=loss.actor)
        for action in (plain.latents.act(z), plain.latents.act_and_score(z)[0]):
            assert 0.299 < (action - mean).abs().max() < 0.301

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="action_low and action_high"):
            make_stochastic_actor([1.0], [-1.0])
        sizes = {"observation_dim": 3, "action_low": [-1.0], "action_high": [1.0]}
        with pytest.raises(ValueError, match="noise_schedule: expected None with"):
            make_alm_loss(
                **sizes, entropy=EntropyBonus(), noise_schedule=NoiseSchedule()
            )


def test_sample_and_density():
    """The sample is that of ``rsample``, the density that of noise without a clamp."""
    loc = torch.randn(5, 2, dtype=torch.float64)
    scale = torch.rand(5, 2, dtype=torch.float64) + 0.1
    free, tight = (ClampedNormal(loc, scale, -b, b) for b in (99.0, 0.2))
    sample, log_prob = seeded(free.rsample_and_log_prob)
    assert_close(log_prob.sum(-1), gaussian_log_prob(sample, loc, scale))
    clamped, same = seeded(tight.rsample_and_log_prob)
    assert_close(same, log_prob, rtol=0, atol=0)
    assert_close(clamped, seeded(tight.rsample), rtol=0, atol=0)
    assert clamped.abs().max() < 0.2


def test_density_gives_the_entropy_and_its_gradient_at_the_bounds_too():
    loc = torch.tensor([0.9, 0.0], requires_grad=True)
    scale = torch.tensor([2.0, 0.5], requires_grad=True)
    dist = ClampedNormal(loc, scale)
    _, log_prob = dist.rsample_and_log_prob((20_000,))
    assert_close(-log_prob.mean(0), dist.entropy(), rtol=0, atol=0.03)
    log_prob[0].sum().backward()
    assert_close(loc.grad, torch.zeros(2))
    assert_close(scale.grad, -1 / scale.detach())


def test_formulas():
    value, log_prob = torch.randn(2, 7, dtype=torch.float64)
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


class TestOtherActors:
    @staticmethod
    def actor(distribution):
        net = Gaussian(LATENT, ACTION)
        return probabilistic(net, ["latent"], "action", distribution)

    @pytest.mark.parametrize("distribution", [TanhNormal, IndependentNormal, Normal])
    def test_log_prob(self, distribution):
        loss = entropy_loss(actor=self.actor(distribution))
        rollout = loss.imagine(torch.randn(B, LATENT), K)
        action = rollout["action"]
        loc, scale = actor_output(loss, rollout["latent"])
        if distribution is TanhNormal:
            expected = gaussian_log_prob(action.atanh(), loc, scale)
            expected = expected - (1 - action**2).log().sum(-1)
        else:
            expected = gaussian_log_prob(action, loc, scale)
        assert_close(rollout["log_prob"], expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("deterministic", [False, True])
    def test_terms(self, batch, deterministic):
        actor = self.actor(TanhNormal)
        loss = entropy_loss(actor=actor, deterministic=deterministic)
        losses, other = (seeded(loss, batch, seed=seed) for seed in (1, 2))
        assert all(value.isfinite() for value in losses.values())
        assert (losses["loss_actor"] == other["loss_actor"]) == deterministic
        assert (losses["loss_alpha"] == other["loss_alpha"]) == deterministic
        grads = gradients(losses["loss_actor"], loss)
        assert {part_of(name) for name in grads} == {"actor"}


# -- terms -----------------------------------------------------------------------------


class TestPolicyReturn:
    def test_value(self):
        loss = entropy_loss(bound=100.0, gamma=0.8, lmbda=0.6, classifier_coef=0.5)
        rollout = loss.imagine(torch.randn(B, LATENT), K)
        z, a = rollout["latent"], rollout["action"]
        log_prob = gaussian_log_prob(a, *actor_output(loss, z))
        # Float32 forgets a little of the noise in an action of its own size.
        assert_close(rollout["log_prob"], log_prob, rtol=1e-4, atol=1e-4)
        bonus = -ALPHA * rollout["log_prob"]
        value = loss.latents.state_action_value(z[:, 1:], a[:, 1:]).amin(-1)
        value = value + bonus[:, 1:]
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
        loc, scale = actor_output(loss, z)
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
    loc, scale = actor_output(loss, z)
    q = loss.latents.state_action_value(z, loc, "target").amin(1)
    left = 0.9 * (1 - rows["next", "terminated"].float().squeeze(1))
    bonus = -ALPHA * gaussian_log_prob(loc, loc, scale)
    expected = rows["next", "reward"].squeeze(1) + left * (q + bonus)
    assert_close(loss.td_target(rows), expected.detach())
    grads = gradients(loss.qvalue_loss(rows)[0], loss)
    assert {part_of(name) for name in grads} == {"qvalue"}


@pytest.mark.parametrize("target", [None, 0.5])
def test_alpha_loss(target):
    loss = entropy_loss(deterministic=True, target_entropy=target)
    rows = make_rows(B)
    loc, scale = actor_output(loss, loss.latents.encode(rows).mean)
    log_prob = gaussian_log_prob(loc, loc, scale).mean().detach()
    expected = -ALPHA * (log_prob + (-ACTION if target is None else target))
    value, metadata = loss.alpha_loss(rows)
    assert_close(value.detach(), expected)
    # d alpha / d log alpha is alpha.
    assert_close(gradients(value, loss), {"entropy.log_alpha": expected})
    assert_close(metadata, {"alpha": torch.tensor(ALPHA), "entropy": -log_prob})
    masked = torch.cat([rows, make_rows(2).apply(lambda x: x * float("nan"))])
    masked["collector", "mask"] = torch.arange(B + 2) < B
    masked_value, masked_metadata = loss.alpha_loss(masked)
    assert_close(masked_value, value)
    assert_close(masked_metadata, metadata)


def test_without_a_bonus():
    loss = make_loss()
    assert not {"loss_alpha", "alpha", "entropy"} & {*loss.out_keys}
    assert not [name for name in loss.state_dict() if "alpha" in name]
    with pytest.raises(RuntimeError, match="entropy=None"):
        loss.alpha_loss(make_batch())


# -- state and updates -----------------------------------------------------------------


def test_saved_copied_and_reset():
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


@pytest.mark.parametrize("target", [-50.0, 50.0])
def test_its_step_moves_the_temperature_alone(target):
    loss = entropy_loss(updater=False, target_entropy=target)
    stepper = ALMOptimizationStepper(loss, lr=1e-2)
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
    expected = math.log(ALPHA) + math.copysign(1e-2, target)
    assert loss.entropy.log_alpha.item() == pytest.approx(expected, abs=1e-4)
    assert metrics["grad_norm_alpha"] > 0
    assert_close(metrics["alpha"], torch.tensor(ALPHA))


def test_bf16_keeps_densities_in_full_precision():
    loss = entropy_loss()
    with torch.autocast("cpu", torch.bfloat16):
        rollout = loss.imagine(torch.randn(B, LATENT), K)
    assert rollout["log_prob"].dtype == torch.float32
