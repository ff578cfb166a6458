"""What is ALM's own in ALMLoss: its terms, coefficients, draws and errors."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import IndependentNormal

from alm_torchrl import ALMLoss
from tests.helpers import (
    HIDDEN,
    LATENT,
    METHODS,
    OBSERVATION,
    PARTS,
    TRAINS,
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
    targets,
    total,
    variant,
)

equal = partial(assert_close, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def batch():
    return make_batch()


def count_calls(loss, part, method, *args):
    calls = []
    hook = network(loss, part).register_forward_hook(lambda *_: calls.append(1))
    getattr(loss, method)(*args)
    hook.remove()
    return len(calls)


class TestTerms:
    def test_one_optimizer_sees_the_gradients_of_five(self, batch):
        loss = make_loss(deterministic=True)
        together = gradients(total(loss(batch)), loss)
        for term, method in METHODS.items():
            grads = gradients(getattr(loss, method)(batch)[0], loss)
            own = {n: g for n, g in together.items() if part_of(n) in TRAINS[term]}
            assert set(grads) == set(own)
            assert_close(grads, own)

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_each_alone_is_the_same(self, batch, reduction):
        loss = make_loss(deterministic=True, reduction=reduction)
        values, encoded = loss(batch), loss.encode_transitions(batch)
        found = set(METHODS)
        for term, method in METHODS.items():
            # An encoder run of its own has fewer rows, and may round otherwise.
            assert_close(getattr(loss, method)(batch)[0], values[term])
            extra = (encoded,) if term != "loss_model" else ()
            value, metadata = getattr(loss, method)(batch, *extra)
            equal(value, values[term])
            found |= set(metadata)
            for key, metric in metadata.items():
                assert not metric.requires_grad
                equal(metric, values[key])
        assert found == set(loss.out_keys)

    def test_reward_and_classifier_together(self, batch):
        loss = make_loss(deterministic=True)
        values, encoded = loss(batch), loss.encode_transitions(batch)
        value, metadata = loss.reward_classifier_loss(batch, encoded)
        equal(value, values["loss_reward"] + values["loss_classifier"])
        assert set(metadata) == {
            "loss_reward",
            "loss_classifier",
            "classifier_accuracy",
        }
        assert not any(metric.requires_grad for metric in metadata.values())
        bare = variant(loss, classifier_coef=0.0)
        equal(bare.reward_classifier_loss(batch, encoded)[0], values["loss_reward"])

    def test_a_batch_used_again_follows_the_targets(self, batch):
        loss = make_loss(deterministic=True)
        before, copied = loss(batch), batch.clone()
        for target in targets(loss).values():
            target.data.add_(0.1 * torch.randn_like(target))
        other = variant(loss)
        equal(loss(batch).to_dict(), other(copied).to_dict())
        for term, method in METHODS.items():
            value, _ = getattr(loss, method)(batch)
            assert_close(value, other(copied)[term])
        assert (loss(batch)["loss_qvalue"] != before["loss_qvalue"]).all()
        assert set(batch.keys(True, True)) == set(copied.keys(True, True))

    @pytest.mark.parametrize("term", METHODS)
    def test_a_subclass_may_have_a_term_of_its_own(self, batch, term):
        loss = make_loss(deterministic=True)
        method = METHODS[term]

        def doubled(self, tensordict, *shared):
            value, metadata = getattr(ALMLoss, method)(self, tensordict, *shared)
            return 2 * value, {**metadata, "own": value.detach()}

        plain, encoded = loss(batch), loss.encode_transitions(batch)
        together, parts = loss.reward_classifier_loss(batch, encoded)
        loss.__class__ = type("Own", (ALMLoss,), {method: doubled})
        equal(loss(batch)[term], 2 * plain[term])
        equal(loss(batch)["own"], plain[term])
        if term in parts:
            changed, seen = loss.reward_classifier_loss(batch, encoded)
            assert_close(changed, together + plain[term])
            equal(seen["own"], plain[term])

    def test_plain_slices_are_windows_and_all_their_transitions(self):
        loss = make_loss(deterministic=True)
        slices = alternate(make_rows(B, K))
        two = TensorDict(slice=slices, transition=slices.reshape(-1))
        assert_close(loss(slices).to_dict(), loss(two).to_dict())

    @pytest.mark.parametrize("horizon", [1, 2, 4])
    def test_horizon_is_the_length_of_the_slices(self, horizon, monkeypatch):
        loss = make_loss(deterministic=True)
        seen = []
        imagine = loss.imagine
        monkeypatch.setattr(
            loss, "imagine", lambda z, steps: seen.append(steps) or imagine(z, steps)
        )
        batch = make_batch(horizon=horizon)
        loss(batch)
        loss(make_rows(B, horizon))
        value, _ = loss.actor_loss(batch)
        transition = batch["transition"]
        equal(loss.actor_loss(transition, horizon=horizon)[0], value)
        assert seen == [horizon] * 4
        loss.actor_loss(batch, horizon=horizon + 1)
        assert seen[-1] == horizon + 1

    def test_model_loss_is_its_parts(self, batch):
        loss = make_loss(deterministic=True)
        rollout = loss.model_rollout(batch["slice"])
        kl, reward, value = (rollout[k] for k in ("kl", "reward", "terminal_value"))
        for kwargs, gamma in (
            ({}, 1.0),
            ({"kl_coef": 2.0, "value_coef": 0.5, "gamma": 0.5}, 1.0),
            ({"discount_model_loss": True, "gamma": 0.5, "value_coef": 3.0}, 0.5),
        ):
            expected = -kwargs.get("value_coef", 1.0) * gamma**K * value
            for t in range(K):
                step = kwargs.get("kl_coef", 1.0) * kl[:, t] - reward[:, t]
                expected = expected + gamma**t * step
            actual, metadata = variant(loss, **kwargs).model_loss(batch)
            assert_close(actual, expected.mean())
            # The metrics are not weighted.
            assert_close(metadata["kl"], kl.detach().mean())
            assert_close(metadata["terminal_value"], value.detach().mean())

    @pytest.mark.parametrize(("gamma", "lmbda"), [(0.0, 0.9), (0.5, 0.0), (0.5, 1.0)])
    def test_returns_at_the_limits(self, batch, gamma, lmbda):
        loss = make_loss(
            deterministic=True, gamma=gamma, lmbda=lmbda, classifier_coef=0.7
        )
        z = loss.latents.encode(batch["transition"]).mean
        rollout = loss.imagine(z, K)
        reward = rollout["reward"] + 0.7 * rollout["log_ratio"]
        if lmbda == 1.0:
            expected = [rollout["value"][:, -1]]
            for t in reversed(range(K)):
                expected.insert(0, reward[:, t] + gamma * expected[0])
            expected = torch.stack(expected[:-1], 1)
        else:
            expected = reward + gamma * rollout["value"]
        assert_close(rollout["lambda_return"], expected)
        weights = gamma ** torch.arange(K)
        value, metadata = loss.actor_loss(batch)
        assert_close(value, -(expected * weights).mean())
        assert_close(metadata["lambda_return"], expected.detach().mean())

    def test_qvalue_target(self, batch):
        loss = make_loss(deterministic=True, gamma=0.5)
        rows = batch["transition"]
        z, after = (
            loss.latents.encode(rows).mean,
            loss.latents.encode(rows["next"]).mean,
        )
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            q = loss.latents.state_action_value(
                after, loss.latents.act(after), "target"
            )
        alive = ~rows["next", "terminated"]
        assert alive.any()
        assert not alive.all()
        target = rows["next", "reward"] + 0.5 * alive * q.amin(-1, keepdim=True)
        error = loss.latents.state_action_value(z, rows["action"], "live") - target
        value, metadata = loss.qvalue_loss(batch)
        assert_close(value, error.square().mean())
        assert_close(metadata["td_error"], error.abs().mean().detach())
        assert_close(metadata["target_value"], target.mean().detach())


class TestCoefficientsAtZero:
    def test_kl(self, batch):
        loss = make_loss(deterministic=True, kl_coef=0.0)
        assert set(loss(batch).keys()) == set(loss.out_keys)
        assert "kl" not in loss.out_keys
        assert count_calls(loss, "encoder", "model_loss", batch) == 1
        full = variant(loss, kl_coef=1.0)
        assert count_calls(full, "encoder", "model_loss", batch) == 2
        value, metadata = full.model_loss(batch)
        assert_close(value.detach() - K * metadata["kl"], loss.model_loss(batch)[0])

    def test_value(self, batch):
        loss = make_loss(deterministic=True, value_coef=0.0)
        assert set(loss(batch).keys()) == set(loss.out_keys)
        assert "terminal_value" not in loss.out_keys
        full = variant(loss, value_coef=1.0)
        for part in ("qvalue", "actor"):
            assert count_calls(loss, part, "model_loss", batch) == 0
            assert count_calls(full, part, "model_loss", batch) == 1
        value, metadata = full.model_loss(batch)
        assert_close(
            value.detach() + metadata["terminal_value"], loss.model_loss(batch)[0]
        )

    @pytest.mark.parametrize("given", [True, False])
    def test_classifier(self, batch, given):
        other = {} if given else {"classifier": None}
        loss = make_loss(deterministic=True, classifier_coef=0.0, **other)
        assert loss.classifier is None
        assert "classifier" not in repr(loss).split("gamma")[0]
        assert {part_of(n) for n, _ in loss.named_parameters()} == {
            part for part in PARTS if part != "classifier"
        }
        values = loss(batch)
        assert set(values.keys()) == set(loss.out_keys)
        assert not {"loss_classifier", "classifier_accuracy", "imagined_log_ratio"} & {
            *loss.out_keys
        }
        assert_close(-values["loss_actor"], self.actor_objective(loss, batch))
        with pytest.raises(RuntimeError, match="classifier_coef=0"):
            loss.classifier_loss(batch)

    @staticmethod
    def actor_objective(loss, batch):
        z = loss.latents.encode(batch["transition"]).mean
        rollout = loss.imagine(z, K)
        step, returns = rollout["value"][:, -1], []
        for t in reversed(range(K)):
            mixed = (1 - loss.lmbda) * rollout["value"][:, t] + loss.lmbda * step
            step = rollout["reward"][:, t] + loss.gamma * mixed
            returns.insert(0, step * loss.gamma**t)
        return torch.stack(returns).mean()


class Recorded(IndependentNormal):
    """Remembers the mean of every draw."""

    draws: list[torch.Tensor]

    def rsample(self, *args, **kwargs):
        self.draws.append(self.mean.detach())
        return super().rsample(*args, **kwargs)


class TestDraws:
    @pytest.mark.parametrize("rows", [1, 6, 7])
    def test_half_is_imagined(self, rows, monkeypatch):
        loss = make_loss()
        batch = make_batch(rows).exclude(("transition", "imagined"))
        seen = {}
        self.spy(loss, monkeypatch, seen)
        halves = set()
        for _ in range(4):
            loss.classifier_loss(batch)
            real, imagined, mixed = (seen[k] for k in ("real", "imagined", "mixed"))
            assert (len(real), len(imagined)) == (rows - rows // 2, rows // 2)
            chosen = (mixed.unsqueeze(1) == imagined).all(-1)
            assert (chosen.sum(0) == 1).all()
            chosen = chosen.any(1)
            assert ((mixed.unsqueeze(1) == real).all(-1).sum(0) == 1).all()
            assert ((mixed.unsqueeze(1) == real).all(-1).any(1) == ~chosen).all()
            assert chosen.sum() == rows // 2
            halves.add(tuple(chosen.tolist()))
        assert len(halves) > 1 or rows == 1

    def test_imagined_key_fixes_the_half(self, batch, monkeypatch):
        loss = make_loss()
        seen = {}
        self.spy(loss, monkeypatch, seen)
        for chosen in (torch.arange(B) < 1, torch.arange(B) > 1, torch.zeros(B) > 1):
            for shape in ((B,), (B, 1)):
                rows = batch["transition"].set("imagined", chosen.reshape(shape))
                value, metadata = loss.classifier_loss(rows)
                equal((seen["mixed"] == seen["imagined"]).all(-1), chosen)
                equal((seen["mixed"] == seen["real"]).all(-1), ~chosen)
                # Index 1 is real.
                log_prob = seen["logits"].log_softmax(-1)[
                    torch.arange(B), 1 - 1 * chosen
                ]
                assert_close(value, -log_prob.mean())
                correct = seen["logits"].argmax(-1) == ~chosen
                assert_close(metadata["classifier_accuracy"], correct.float().mean())

    @staticmethod
    def spy(loss, monkeypatch, seen):
        latents = loss.latents
        sample, step, classify = latents.sample, latents.step, latents.classify
        made = []

        def recorded_step(*args):
            made.append(step(*args))
            return made[-1]

        def recorded_sample(dist, *rows):
            draw = sample(dist, *rows)
            if made and dist is made[-1]:
                seen["imagined"] = draw
            else:
                # In the order z, z', z of the model.
                seen.setdefault("draws", []).append(draw)
            return draw

        def recorded_classify(z, action, after, *args):
            seen["real"], seen["mixed"] = seen["draws"][-2], after
            seen["logits"] = classify(z, action, after, *args)
            return seen["logits"]

        monkeypatch.setattr(latents, "step", recorded_step)
        monkeypatch.setattr(latents, "sample", recorded_sample)
        monkeypatch.setattr(latents, "classify", recorded_classify)

    def test_reward_and_classifier_share_a_latent_but_not_the_model(
        self, batch, monkeypatch
    ):
        loss = make_loss()
        seen = {}

        def spy(name):
            method = getattr(loss.latents, name)

            def recorded(latent, *args):
                seen[name] = latent
                return method(latent, *args)

            monkeypatch.setattr(loss.latents, name, recorded)

        for name in ("predict_reward", "classify", "step"):
            spy(name)
        loss.reward_classifier_loss(batch)
        equal(seen["predict_reward"], seen["classify"])
        assert (seen["step"] != seen["classify"]).all()

    def test_number_of_draws_of_an_update(self, batch):
        Recorded.draws = []
        net = Gaussian(OBSERVATION, LATENT)
        encoder = probabilistic(net, ["observation"], "latent", Recorded)
        loss = make_loss(encoder=encoder)
        rows, first = batch["transition"], batch["slice"][:, 0]
        means = {
            "z": loss.latents.encode(rows).mean,
            "z'": loss.latents.encode(rows["next"]).mean,
            "z_0 of the slices": loss.latents.encode(first, "live").mean,
        }
        loss(batch)
        found = [
            name
            for draw in Recorded.draws
            for name, mean in means.items()
            if torch.equal(draw, mean)
        ]
        assert len(found) == len(Recorded.draws)
        assert {name: found.count(name) for name in means} == {
            "z": 4,
            "z'": 2,
            "z_0 of the slices": 1,
        }

    def test_noise_clip(self, batch):
        loss = make_loss(noise=5.0, bound=100.0)
        z = torch.randn(64, LATENT)
        mean = seeded(variant(loss, noise_clip=0.0).latents.act, z)
        assert mean.abs().max() < 1
        assert_close((loss.latents.act(z) - mean).abs().max(), torch.tensor(0.3))
        assert (variant(loss, noise_clip=None).latents.act(z) - mean).abs().max() > 1
        for clip, other in ((0.3, loss), (0.5, variant(loss, noise_clip=0.5))):
            rollout = other.imagine(z, K)
            for t in range(K + 1):
                means = variant(loss, noise_clip=0.0).latents.act(
                    rollout["latent"][:, t]
                )
                noise = (rollout["action"][:, t] - means).abs().max()
                assert_close(noise, torch.tensor(clip))


class TestErrors:
    def test_batch_sizes(self, batch):
        loss = make_loss()
        rows = make_rows(B)
        with pytest.raises(ValueError, match=r"slices .* got batch size \[6\]"):
            loss.model_loss(rows)
        with pytest.raises(ValueError, match="slices"):
            loss(rows)
        with pytest.raises(ValueError, match="horizon=None"):
            loss.actor_loss(rows)
        with pytest.raises(
            ValueError, match="horizon: expected an integer >= 1, got 0"
        ):
            loss.actor_loss(batch, horizon=0)
        for term in ("reward", "classifier", "qvalue"):
            with pytest.raises(ValueError, match=r"got batch size \[6, 3, 2\]"):
                getattr(loss, f"{term}_loss")(make_rows(B, K, 2))

    @pytest.mark.parametrize(
        "key",
        [
            "observation",
            "action",
            ("next", "observation"),
            ("next", "reward"),
            ("next", "terminated"),
        ],
    )
    def test_missing_entries(self, key):
        name = key if isinstance(key, str) else key[-1]
        with pytest.raises(KeyError, match=name):
            make_loss()(make_rows(B, K).exclude(key))


def test_repr():
    loss = make_loss(gamma=0.5, kl_coef=2.0)
    lines = repr(loss).splitlines()
    for part in PARTS:
        count = sum(p.numel() for p in getattr(loss, part).parameters())
        assert any(line.split() == [part, str(count), "parameters"] for line in lines)
    encoder = HIDDEN * (OBSERVATION + 1 + HIDDEN + 1 + 2 * LATENT) + 2 * LATENT
    assert f" {encoder} parameters" in repr(loss)
    assert "gamma=0.5" in repr(loss)
    assert "kl_coef=2" in repr(loss)


def test_logit_one_is_real():
    """Index 1 is real: at equal logits the loss is log 2, and the ratio zero."""
    loss = make_loss(deterministic=True)
    last = network(loss, "classifier")[-1]
    last.weight.data.zero_()
    last.bias.data.zero_()
    batch = make_batch()
    assert_close(loss(batch)["loss_classifier"].item(), math.log(2.0))
    last.bias.data.copy_(torch.tensor([-1.0, 2.0]))
    assert_close(loss(batch)["imagined_log_ratio"], torch.tensor(3.0))
