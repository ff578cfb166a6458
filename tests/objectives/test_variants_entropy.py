"""ALM-ENT: the stochastic actor, the entropy bonus and its temperature."""

from __future__ import annotations

import copy
import math

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
    make_env,
    make_stochastic_actor,
    make_trainer,
)
from alm_torchrl.runs.agents import build_loss, describe_spaces
from alm_torchrl.runs.loading import load_policy
from alm_torchrl.runs.settings import preset_config
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
from tests.training.test_modes import Waits

ALPHA = 0.7


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def entropy_loss(**kwargs):
    return make_loss(**{"alpha_init": ALPHA, **kwargs})


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
        value = loss.state_action_value(z[:, 1:], a[:, 1:]).amin(-1) + bonus[:, 1:]
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
        rollout = seeded(
            lambda: loss.imagine(loss._encoded(loss._transitions(rows)[0])[1], K)
        )
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
        loss = entropy_loss(deterministic=True, actor_objective="qvalue", bound=bound)
        batch = make_batch()
        z = loss.encode(batch["transition"]).mean
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
    z = loss.encode(rows["next"]).mean
    loc, scale, *_ = network(loss, "actor")(z)
    log_prob = gaussian_log_prob(loc, loc, scale)
    q = loss.state_action_value(z, loc, "target").amin(1)
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
    loc, scale, *_ = network(loss, "actor")(loss.encode(batch["transition"]).mean)
    log_prob = gaussian_log_prob(loc, loc, scale).mean().detach()
    expected = -ALPHA * (log_prob + (-ACTION if target is None else target))
    value, metadata = loss.alpha_loss(batch)
    assert_close(value.detach(), expected)
    # d alpha / d log alpha is alpha.
    assert_close(gradients(value, loss), {"log_alpha": expected})
    assert_close(metadata, {"alpha": torch.tensor(ALPHA), "entropy": -log_prob})


def test_noise_is_not_clipped():
    loss = entropy_loss(bound=100.0)
    z = torch.randn(64, LATENT)
    mean = network(loss, "actor")(z)[0]
    assert (loss.act(z) - mean).abs().max() > 1
    plain = make_loss(actor=loss.actor)
    assert (plain.act(z) - mean).abs().max() < 0.301
    assert "noise_clip" not in repr(loss)
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
        with pytest.raises(TypeError, match=rf"actor: expected .* alpha_init.*{got}"):
            entropy_loss(actor=actor)

    @pytest.mark.parametrize(
        ("name", "kwargs"),
        [
            ("alpha_init", {"alpha_init": 0.0}),
            ("alpha_init", {"alpha_init": True}),
            ("target_entropy", {"target_entropy": math.inf}),
            ("target_entropy", {"alpha_init": None, "target_entropy": -2.0}),
        ],
    )
    def test_numbers(self, name, kwargs):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            entropy_loss(**kwargs)

    def test_no_schedule_beside_it(self):
        sizes = {"observation_dim": 3, "action_low": [-1.0], "action_high": [1.0]}
        assert make_alm_loss(**sizes, alpha_init=1.0).noise_schedule is None
        with pytest.raises(ValueError, match="noise_schedule: expected None with"):
            make_alm_loss(**sizes, alpha_init=1.0, noise_schedule=NoiseSchedule())

    def test_without(self):
        loss = make_loss()
        assert loss.log_alpha is None
        assert not {"loss_alpha", "alpha", "entropy"} & {*loss.out_keys}
        assert "log_alpha" not in loss.state_dict()
        with pytest.raises(RuntimeError, match="alpha_init=None"):
            loss.alpha_loss(make_batch())


class TestState:
    def test_saved_copied_and_reset(self):
        loss = entropy_loss()
        loss.log_alpha.data.fill_(-3.0)
        other = entropy_loss(alpha_init=2.0)
        assert other.log_alpha.item() == pytest.approx(math.log(2.0))
        other.load_state_dict(loss.state_dict())
        twin = copy.deepcopy(loss).double()
        assert other.log_alpha == twin.log_alpha == -3.0
        assert twin.log_alpha.dtype == torch.float64
        twin.log_alpha.data.zero_()
        assert loss.log_alpha == -3.0
        loss.reset_parameters_recursive()
        assert loss.log_alpha.item() == pytest.approx(math.log(ALPHA))

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
        assert group["params"] == [loss.log_alpha]
        found = {}

        def before_alpha(*_):
            found.update({k: p.detach().clone() for k, p in loss.named_parameters()})

        stepper.optimizers["alpha_loss"].register_step_pre_hook(before_alpha)
        metrics = stepper.step(None, make_batch())
        moved = {k for k, p in loss.named_parameters() if not torch.equal(p, found[k])}
        assert moved == {"log_alpha"}
        # Too much entropy: less weight.
        sign = 1 if target > 0 else -1
        expected = math.log(ALPHA) + sign * 1e-2
        assert loss.log_alpha.item() == pytest.approx(expected, abs=1e-4)
        assert metrics["grad_norm_alpha"] > 0
        assert_close(metrics["alpha"], torch.tensor(ALPHA))

    def test_without_it_there_is_no_such_step(self):
        stepper = ALMOptimizationStepper(make_loss(updater=False))
        assert "alpha_loss" not in stepper.optimizers

    def test_waits_for_nothing(self, monkeypatch):
        stepper = ALMOptimizationStepper(entropy_loss(updater=False))
        monkeypatch.setattr(stepper, "raise_if_nonfinite", lambda: None)
        batch = make_batch()
        with Waits() as waits:
            stepper.step(None, batch)
        assert waits.found == []

    def test_a_bad_temperature_stops_it(self):
        loss = entropy_loss(updater=False)
        stepper = ALMOptimizationStepper(loss)
        loss.log_alpha.data.fill_(float("nan"))
        with pytest.raises(NonFiniteError) as error:
            stepper.step(None, make_batch())
        assert error.value.term == "loss_qvalue"

    @pytest.mark.parametrize(
        "method", [pytest.param("actor_loss", marks=pytest.mark.slow), "alpha_loss"]
    )
    def test_compiles_as_one_graph(self, method):
        loss, batch = entropy_loss(), make_batch(horizon=1)
        term = getattr(loss, method)
        compiled = torch.compile(term, backend="eager", fullgraph=True)
        value, metadata = seeded(term, batch)
        other, other_metadata = seeded(compiled, batch)
        torch._dynamo.reset()
        assert_close(other, value)
        assert_close(other_metadata, metadata)
        assert_close(gradients(other, loss), gradients(value, loss))


def test_bf16_keeps_densities_in_full_precision():
    loss = entropy_loss()
    with torch.autocast("cpu", torch.bfloat16):
        rollout = loss.imagine(torch.randn(B, LATENT), K)
    assert rollout["log_prob"].dtype == torch.float32


def test_a_run_trains_saves_and_acts(tmp_path):
    env = make_env("Pendulum-v1", action_bounds="rescale")
    small = {"latent_dim": 2, "hidden_dim": 4, "model_hidden_dim": 4}
    settings = preset_config("quick", entropy=True, **small).to_dict()
    spaces = describe_spaces(env)

    def trainer():
        torch.manual_seed(0)
        return make_trainer(
            env,
            build_loss(settings, spaces),
            total_steps=3,
            warmup_steps=8,
            batch_size=4,
            lr=1e-2,
            checkpoint_dir=tmp_path,
            checkpoint_interval=10,
            checkpoint_metadata=lambda: {"settings": settings, "spaces": spaces},
        )

    first = trainer()
    first.train()
    loss = first.loss_module
    assert loss.log_alpha.item() == pytest.approx(math.log(0.1) - 0.03, abs=1e-3)
    saved = first.checkpoint_rotation.latest()
    policy = load_policy(saved, deterministic=False)
    rows = TensorDict(observation=torch.randn(5, 3), batch_size=[5])
    action = seeded(policy, rows.copy())["action"]
    with set_exploration_type(ExplorationType.RANDOM):
        expected = seeded(loss.acting_policy(), rows.copy())["action"]
    assert_close(action, expected, rtol=0, atol=0)
    again = trainer()
    again.load_from_file(saved)
    assert_close(again.loss_module.state_dict(), loss.state_dict(), rtol=0, atol=0)
    optimizer = again.optimization_stepper.optimizers["alpha_loss"]
    assert optimizer.state[again.loss_module.log_alpha]["step"] == 3
