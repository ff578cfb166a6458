"""Batches: a masked row leaves no trace; bad batches and arguments are refused."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical

from alm_torchrl import ALMLoss, make_actor, make_decoder, make_encoder
from alm_torchrl.objectives import (
    EntropyBonus,
    Logarithms,
    Reconstruction,
    ValuePrediction,
)
from tests.helpers import (
    ACTION,
    LATENT,
    OBSERVATION,
    PARTS,
    TRAINS,
    B,
    Concatenated,
    Gaussian,
    K,
    alternate,
    assert_equal,
    gradients,
    make_batch,
    make_loss,
    make_rows,
    probabilistic,
    total,
    variant,
)

MASK = torch.ones(B, K, dtype=torch.bool)
MASK[1, 2] = MASK[3, 0] = MASK[4] = False


def spoil(rows, mask):
    """The rows with a mask, and NaN in everything that it hides."""
    rows = rows.clone()
    for key in rows.keys(True, True):
        if rows[key].is_floating_point():
            rows[key][~mask] = float("nan")
    return rows.set(("collector", "mask"), mask.unsqueeze(-1))


def model_terms(loss, slices, mask):
    """Loss and metrics of slices one by one, up to their first masked step."""
    valueless = variant(loss, value_coef=0.0)
    parts = []
    for row, valid in zip(slices, mask, strict=True):
        length = int(valid.long().cumprod(0).sum())
        if length:
            of_row = loss if length == len(row) else valueless
            parts.append((length, *of_row.model_loss(row[None, :length])))
    values = {"loss_model": sum(value for _, value, _ in parts) / len(parts)}
    for name in ("kl", "model_reward"):
        total = sum(length * metrics[name] for length, _, metrics in parts)
        values[name] = total / sum(length for length, _, _ in parts)
    ends = [metrics["terminal_value"] for _, _, metrics in parts if len(metrics) == 3]
    return {**values, "terminal_value": sum(ends) / len(ends)}


class TestMasks:
    def test_masked_batch_is_the_batch_without_those_rows(self):
        loss = make_loss(deterministic=True)
        slices, mask = alternate(make_rows(B, K)), MASK
        transition = alternate(make_rows(B))
        for plain in (True, False):
            if plain:
                batch, kept = spoil(slices, mask), slices[mask]
            else:
                keep = torch.arange(B) % 3 > 0
                batch = TensorDict(
                    slice=spoil(slices, mask),
                    transition=spoil(transition, keep),
                    batch_size=[B],
                )
                kept = transition[keep]
            self.check(loss, batch, slices, mask, kept)

    @staticmethod
    def check(loss, batch, slices, mask, kept):
        values = loss(batch)
        expected = loss(TensorDict(slice=slices, transition=kept))
        expected.update(model_terms(loss, slices, mask))
        assert_equal(values, expected, exact=False)
        expected = gradients(total(expected), loss)
        assert_equal(gradients(total(values), loss), expected, exact=False)

    def test_no_reduction(self):
        loss = make_loss(deterministic=True, reduction="none")
        slices = alternate(make_rows(B, K))
        values, clean = loss(spoil(slices, MASK)), loss(slices)
        dropped = ~MASK.all(1)
        assert (values["loss_model"][~MASK[:, 0]] == 0).all()
        torch.testing.assert_close(
            values["loss_model"][~dropped], clean["loss_model"][~dropped]
        )
        cut = variant(loss, value_coef=0.0, reduction="none").model_loss(slices[:, :2])
        torch.testing.assert_close(values["loss_model"][1], cut[0][1])
        for term in set(TRAINS) - {"loss_model"}:
            assert values[term].shape == (B,)
            assert (values[term][~MASK.any(1)] == 0).all()
            torch.testing.assert_close(values[term][~dropped], clean[term][~dropped])
        # A row that is masked in part is the mean of what is left of it.
        left = loss.qvalue_loss(slices[1, :2])[0].mean()
        torch.testing.assert_close(values["loss_qvalue"][1], left)

    def test_everything_masked(self):
        loss = make_loss()
        values = loss(spoil(make_rows(B, K), torch.zeros(B, K, dtype=torch.bool)))
        assert all((value == 0).all() for value in values.values())
        grads = gradients(total(values), loss)
        assert all((grad == 0).all() for grad in grads.values())

    def test_mask_key(self):
        loss = make_loss(deterministic=True)
        slices = alternate(make_rows(B, K))
        clean, masked = loss(slices), loss(slices.copy().set("valid", MASK))
        assert_equal(masked, clean)
        loss.loss_mask_key = "valid"
        masked = slices.copy().set("valid", MASK)
        self.check(loss, masked, slices, MASK, slices[MASK])
        loss.loss_mask_key = None
        assert_equal(loss(slices.copy().set(("collector", "mask"), MASK)), clean)

    def test_masks_combine(self):
        loss = make_loss(deterministic=True)
        slices = alternate(make_rows(B, K))
        both = spoil(slices, MASK)
        shifted = torch.arange(B * K).reshape(B, K, 1) % 5 > 0
        keep = MASK & shifted.squeeze(-1)
        both.set("shifted_valid", shifted)
        self.check(loss, both, slices, keep, slices[keep])


# -- what is refused: a call, its error, and a part of the message ---------------------

BOTH = ["latent", "action"]
ALL = [*BOTH, ("next", "latent")]


class Discrete(Categorical):
    """A distribution whose samples have no gradient."""

    def __init__(self, loc, scale):
        super().__init__(logits=loc)


def built(**arguments):
    return lambda: make_loss(**arguments)


def updated(**networks):
    return lambda: make_loss(**networks)(make_batch())


def without(key):
    return lambda: make_loss()(make_rows(B, K).exclude(key))


def called(name, rows, *args, **entries):
    """A method of the loss on rows with other entries; ``__`` separates nested keys."""
    rows = rows.clone()
    for key, entry in entries.items():
        rows[tuple(key.split("__"))] = entry
    return lambda: getattr(make_loss(), name)(rows, *args)


def part(network, in_keys, out_key):
    return TensorDictModule(network, in_keys, [out_key])


def slices():
    return make_rows(B, K)


def float64(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


def meta(*shape):
    return torch.zeros(*shape, device="meta")


def reward_part(net, out_key="predicted_reward"):
    return part(net, BOTH, out_key)


def encoder(net, out_key="latent"):
    return probabilistic(net, ["observation"], out_key)


# An argument of the loss and a value that it refuses.
BAD_VALUES = [
    *[("gamma", 1.1), ("gamma", 1.0), ("gamma", float("nan")), ("lmbda", -0.1)],
    *[(name, -1.0) for name in ("kl_coef", "value_coef", "reward_coef")],
    *[("classifier_coef", -1.0), ("noise_clip", -0.3), ("reduction", "average")],
    ("classifier", None),
]
BAD_TYPES = [
    *[("discount_model_loss", 1), ("reward_transform", 2.0), ("logarithms", "model")],
    *[("entropy", 1.0), ("model_terms", [nn.Linear(1, 1)])],
    *[(name, nn.Linear(2, 2)) for name in PARTS],
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .* got {value!r}"):
        make_loss(**{name: value})


@pytest.mark.parametrize(("name", "value"), BAD_TYPES)
def test_values_of_another_type(name, value):
    got = type(value[0] if name == "model_terms" else value).__name__
    with pytest.raises(TypeError, match=f"^{name}(:| must) .* got {got}"):
        make_loss(**{name: value})


REFUSED = {
    "empty": (
        built(kl_coef=0.0, reward_coef=0.0, value_coef=0.0),
        ValueError,
        "expected one that is not 0",
    ),
    "where logarithms": (lambda: Logarithms("all"), ValueError, "where: "),
    "where value": (lambda: ValuePrediction("critic"), ValueError, "where: "),
    "weight of value": (
        lambda: ValuePrediction("model", coef=-1.0),
        ValueError,
        "coef: .* got -1",
    ),
    "decoder": (lambda: Reconstruction(nn.Linear(1, 1)), TypeError, "decoder: "),
    "decoder of another task": (
        updated(
            model_terms=[
                Reconstruction(part(nn.Linear(LATENT, 9), ["latent"], "reconstruction"))
            ]
        ),
        ValueError,
        "decoder: expected the shape of the observations",
    ),
    "decoder under the wrong key": (
        updated(
            model_terms=[Reconstruction(part(nn.Linear(LATENT, 3), ["latent"], "s"))]
        ),
        KeyError,
        "decoder: expected the output 'reconstruction', got",
    ),
    "temperature": (lambda: EntropyBonus(alpha_init=0.0), ValueError, "alpha_init: "),
    "target entropy": (
        lambda: EntropyBonus(target_entropy=float("inf")),
        ValueError,
        "target_entropy: ",
    ),
    "scheduled noise and a bonus": (
        built(
            entropy=EntropyBonus(),
            actor=make_actor([-1.0] * 2, [1.0] * 2, latent_dim=LATENT),
        ),
        TypeError,
        "actor: expected one that learns its noise .*NoiseSchedule",
    ),
    "no noise and a bonus": (
        built(
            entropy=EntropyBonus(),
            actor=part(nn.Linear(LATENT, ACTION), ["latent"], "action"),
        ),
        TypeError,
        "actor: expected one that learns its noise .*TensorDictModule",
    ),
    "encoder without a distribution": (
        built(encoder=part(nn.Linear(3, 4), ["observation"], "latent")),
        TypeError,
        "encoder must be probabilistic",
    ),
    "lazy reward": (
        built(reward=reward_part(nn.LazyLinear(1))),
        ValueError,
        "reward: .* lazy",
    ),
    "part left out": (
        lambda: ALMLoss(encoder=make_encoder(3)),
        TypeError,
        "missing 5 required keyword-only arguments",
    ),
    "reward under the wrong key": (
        updated(reward=reward_part(Concatenated(6, 1), "reward")),
        KeyError,
        "reward: expected the output 'predicted_reward', got .*'reward'",
    ),
    "latent under the wrong key": (
        lambda: make_loss(
            encoder=encoder(Gaussian(OBSERVATION, LATENT), "z")
        ).acting_policy(),
        KeyError,
        r"encoder: expected the outputs \['latent'\], got .*'z'",
    ),
    "network that reads what is not there": (
        updated(actor=part(nn.Linear(LATENT, ACTION), ["state"], "action")),
        KeyError,
        r"actor: expected in_keys among \['latent'\], got \['state'\]",
    ),
    "two outputs and one key": (
        updated(reward=reward_part(Gaussian(6, 1))),
        ValueError,
        "reward: expected one tensor for each of out_keys",
    ),
    "two rewards": (
        updated(reward=reward_part(Concatenated(6, 2))),
        ValueError,
        r"reward: expected .* of shape \[6, 3, 1\], got \[6, 3, 2\]",
    ),
    "one logit": (
        updated(classifier=part(Concatenated(10, 1), ALL, "logits")),
        ValueError,
        r"classifier: expected .* of shape \[6, 2\], got \[6, 1\]",
    ),
    "model of another latent": (
        updated(model=probabilistic(Gaussian(6, 5), BOTH, ("next", "latent"))),
        ValueError,
        r"model: expected .* \[6, 4\], got \[6, 5\]",
    ),
    "reward of another latent": (
        updated(reward=reward_part(Concatenated(99, 1))),
        ValueError,
        r"reward: expected a network for 'latent' \[6, 3, 4\].* got: .*99x1",
    ),
    "samples without gradient": (
        updated(
            actor=probabilistic(Gaussian(LATENT, 2), ["latent"], "action", Discrete)
        ),
        TypeError,
        "has_rsample.* got Discrete",
    ),
    "no action": (without("action"), KeyError, "expected the entry 'action', .* got"),
    "no observation": (without("observation"), KeyError, "encoder's in_keys .* got"),
    "no next step": (without("next"), KeyError, "expected the entry 'next', got"),
    "no next observation": (
        without(("next", "observation")),
        KeyError,
        "encoder's in_keys .* got",
    ),
    "no reward": (without(("next", "reward")), KeyError, "the entry 'reward', got"),
    "no end": (without(("next", "terminated")), KeyError, "the entry 'terminated', "),
    "transitions for slices": (
        called("model_loss", make_rows(B)),
        ValueError,
        r"slices .* got batch size \[6\]",
    ),
    "slices of slices": (
        called("reward_loss", make_rows(B, K, 2)),
        ValueError,
        r"transitions .* got batch size \[6, 3, 2\]",
    ),
    "no steps": (
        called("model_loss", make_rows(B, 0)),
        ValueError,
        r"at least one row and step, got batch size \[6, 0\]",
    ),
    "no rows": (
        called("model_loss", make_rows(0, K)),
        ValueError,
        r"at least one row and step, got batch size \[0, 3\]",
    ),
    "entries of different length": (
        lambda: make_loss().model_loss(
            TensorDict(
                {**slices().to_dict(), "action": torch.zeros(B, K - 1, ACTION)},
                batch_size=[B],
            )
        ),
        ValueError,
        r"expected entries of batch size \[6, 2\], .* got ",
    ),
    "observations of another task": (
        called("model_loss", slices(), observation=torch.zeros(B, K, 7)),
        ValueError,
        r"encoder: expected a network for 'observation' \[6, 7\]",
    ),
    "two rewards for each step": (
        called("qvalue_loss", make_rows(B), next__reward=torch.zeros(B, 2)),
        ValueError,
        r"'reward' with one number .* got shape \[6, 2\]",
    ),
    "double precision": (
        called("model_loss", slices(), observation=float64(B, K, OBSERVATION)),
        ValueError,
        r"encoder: .*torch\.float32, got torch\.float64",
    ),
    "actions of integers": (
        called("model_loss", slices(), action=torch.ones(B, K, ACTION).long()),
        ValueError,
        r"floating-point actions .* got torch\.int64",
    ),
    "action on another device": (
        called("qvalue_loss", make_rows(B), action=meta(B, ACTION)),
        ValueError,
        "qvalue: expected 'action' on the device .* cpu, got meta",
    ),
    "reward on another device": (
        called("qvalue_loss", make_rows(B), next__reward=meta(B, 1)),
        ValueError,
        "expected 'reward' on the device .* cpu, got meta",
    ),
    "mask of numbers": (
        called("model_loss", slices(), collector__mask=torch.ones(B, K)),
        ValueError,
        r"boolean mask .* got torch\.float32",
    ),
    "halves of numbers": (
        called("classifier_loss", make_rows(B), imagined=torch.ones(B)),
        ValueError,
        r"booleans 'imagined', got torch\.float32",
    ),
    "no horizon": (called("actor_loss", make_rows(B)), ValueError, "horizon=None"),
    "horizon of zero": (
        called("lower_bound", make_rows(B), 0),
        ValueError,
        "horizon: .* got 0",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert type(raised.value) is error


def test_each_part_is_masked_at_its_steps_and_states():
    parts = [Reconstruction(make_decoder(OBSERVATION, latent_dim=LATENT, hidden_dim=8))]
    parts += [ValuePrediction("encoder"), ValuePrediction("model")]
    slices = make_rows(B, K)
    for term in parts:
        loss = make_loss(deterministic=True, model_terms=[term], reduction="none")
        for terms in ([term], []):
            other = variant(loss, model_terms=terms, reduction="none", value_coef=0.0)
            # Steps after an end are not read, whatever they hold.
            found, means = other.model_loss(spoil(slices, MASK))
            expected, _ = other.model_loss(slices[:, :2])
            torch.testing.assert_close(found[1], expected[1])
            assert (found[[3, 4]] == 0).all()
        assert all(mean.isfinite() for mean in means.values())


@pytest.mark.parametrize("where", ["model", "bound"])
def test_logarithms_of_masked_steps_do_not_count(where):
    loss = make_loss(deterministic=True, reduction="none", value_coef=0.0)
    loss = variant(loss, logarithms=Logarithms(where), reduction="none", value_coef=0.0)
    slices = make_rows(B, K)
    found, _ = loss.model_loss(spoil(slices, MASK))
    expected, _ = loss.model_loss(slices[:, :2])
    torch.testing.assert_close(found[1], expected[1])
