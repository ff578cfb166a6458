"""The terms of ALMLoss: alone and together, their batches, the classifier's halves."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl import ALMLoss
from alm_torchrl.objectives.rollouts import mixed_next
from tests.helpers import (
    HIDDEN,
    LATENT,
    METHODS,
    OBSERVATION,
    PARTS,
    B,
    make_batch,
    make_loss,
    make_rows,
    network,
    part_of,
    variant,
)


class TestTerms:
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_each_alone_is_the_same(self, batch, reduction):
        loss = make_loss(deterministic=True, reduction=reduction)
        values, encoded = loss(batch), loss.encode_transitions(batch)
        found = set(METHODS)
        for term, method in METHODS.items():
            # An encoder run of its own has fewer rows, and may round otherwise.
            assert_close(getattr(loss, method)(batch)[0], values[term])
            extra = (encoded,) if term != "loss_model" else ()
            value, metadata = getattr(loss, method)(batch, *extra)
            assert torch.equal(value, values[term])
            found |= set(metadata)
            for key, metric in metadata.items():
                assert not metric.requires_grad
                assert torch.equal(metric, values[key])
        assert found == set(loss.out_keys)

    def test_reward_and_classifier_together(self, batch):
        loss = make_loss(deterministic=True)
        values, encoded = loss(batch), loss.encode_transitions(batch)
        value, metadata = loss.reward_classifier_loss(batch, encoded)
        assert torch.equal(value, values["loss_reward"] + values["loss_classifier"])
        assert set(metadata) == {
            "loss_reward",
            "loss_classifier",
            "classifier_accuracy",
        }
        assert not any(metric.requires_grad for metric in metadata.values())
        bare = variant(loss, classifier_coef=0.0)
        assert torch.equal(
            bare.reward_classifier_loss(batch, encoded)[0], values["loss_reward"]
        )

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
        assert torch.equal(loss(batch)[term], 2 * plain[term])
        assert torch.equal(loss(batch)["own"], plain[term])
        if term in parts:
            changed, seen = loss.reward_classifier_loss(batch, encoded)
            assert_close(changed, together + plain[term])
            assert torch.equal(seen["own"], plain[term])

    def test_horizon_is_the_length_of_the_slices(self, monkeypatch):
        horizon = 4
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
        assert torch.equal(loss.actor_loss(transition, horizon=horizon)[0], value)
        assert seen == [horizon] * 4
        loss.actor_loss(batch, horizon=horizon + 1)
        assert seen[-1] == horizon + 1


def test_lower_bound_acts_with_the_mean_not_clamped():
    loss = make_loss(deterministic=True, bound=0.01, gamma=0.8, classifier_coef=0.5)
    rows, latents = make_rows(B), loss.latents
    z, a = latents.encode(rows).mean, rows["action"]
    after = latents.step(z, a).mean
    mean = network(loss, "actor")(after)[0]
    assert mean.abs().max() > 0.02
    logits = latents.classify(z, a, after)
    reward = latents.predict_reward(z, a) + 0.5 * (logits[:, 1] - logits[:, 0])
    value = latents.state_action_value(after, mean).amin(-1)
    a.requires_grad_()
    bound = loss.lower_bound(rows, 1)
    assert_close(bound, (reward + 0.8 * value).detach())
    assert not bound.requires_grad


class TestClassifier:
    @pytest.mark.parametrize("given", [True, False])
    def test_a_coefficient_of_zero_removes_it(self, batch, given):
        other = {} if given else {"classifier": None}
        loss = make_loss(classifier_coef=0.0, **other)
        assert loss.classifier is None
        parts = {part_of(name) for name, _ in loss.named_parameters()}
        assert parts == set(PARTS) - {"classifier"}
        assert set(loss(batch).keys()) == set(loss.out_keys)
        with pytest.raises(RuntimeError, match="classifier_coef=0"):
            loss.classifier_loss(batch)

    @pytest.mark.parametrize("rows", [1, 6, 7])
    def test_half_of_the_rows_is_imagined(self, rows):
        loss = make_loss()
        batch = make_rows(rows)
        encoded = loss.encode_transitions(batch)
        imagined = loss.latents.step(encoded.now.mean, batch["action"]).mean
        halves = set()
        for _ in range(5):
            with set_exploration_type(ExplorationType.DETERMINISTIC):
                chosen, following = mixed_next(loss, batch, encoded)
            assert chosen.sum() == rows // 2
            expected = imagined.where(chosen.unsqueeze(1), encoded.next.mean)
            assert_close(following, expected)
            halves.add(tuple(chosen.tolist()))
        assert len(halves) > 1 or rows == 1

    def test_which_half_may_be_given_in_either_shape(self, batch):
        loss = make_loss(deterministic=True)
        rows = batch["transition"]
        value, _ = loss.classifier_loss(rows)
        column = rows.copy().set("imagined", rows["imagined"].unsqueeze(1))
        assert torch.equal(loss.classifier_loss(column)[0], value)
        other = rows.copy().set("imagined", ~rows["imagined"])
        assert loss.classifier_loss(other)[0] != value


def test_repr():
    lines = repr(make_loss(gamma=0.5, kl_coef=2.0)).splitlines()
    encoder = HIDDEN * (OBSERVATION + 1 + HIDDEN + 1 + 2 * LATENT) + 2 * LATENT
    assert ["encoder", str(encoder), "parameters"] in [line.split() for line in lines]
    assert max(map(len, lines)) <= 80
    settings = " ".join(lines)
    assert "gamma=0.5," in settings
    assert "kl_coef=2," in settings
