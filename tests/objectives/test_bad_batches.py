"""Wrong networks and batches, each with the message that it gets.

A message names the argument, what was expected and what was given.
"""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical

from alm_torchrl import ALMLoss, make_encoder
from tests.helpers import (
    ACTION,
    LATENT,
    OBSERVATION,
    B,
    Concatenated,
    Gaussian,
    K,
    make_batch,
    make_loss,
    make_rows,
    probabilistic,
)

BOTH = ["latent", "action"]
ALL = [*BOTH, ("next", "latent")]


class Discrete(Categorical):
    """A distribution whose samples have no gradient."""

    def __init__(self, loc, scale):
        super().__init__(logits=loc)


def parts(**own):
    """The update of a loss with parts of the caller's own."""
    return make_loss(**own)(make_batch())


def part(network, in_keys, *out_keys):
    return TensorDictModule(network, in_keys, list(out_keys))


def with_slices(**changed):
    """The model's loss on slices with other entries."""
    rows = make_rows(B, K)
    for name, entry in changed.items():
        rows[tuple(name.split("__"))] = entry
    return make_loss().model_loss(rows)


def with_rows(name, entry):
    """The critics' loss on transitions with another entry."""
    return make_loss().qvalue_loss(make_rows(B).set(name, entry))


def without(key):
    return make_loss()(make_rows(B, K).exclude(key))


def two_draws(**entries):
    return make_loss()(TensorDict(entries, batch_size=[B]))


NETWORKS = {
    "network without keys": (
        lambda: parts(reward=nn.Linear(6, 1)),
        TypeError,
        "reward must be a TensorDictModule, got Linear",
    ),
    "encoder without a distribution": (
        lambda: parts(encoder=part(nn.Linear(3, 4), ["observation"], "latent")),
        TypeError,
        r"encoder must be probabilistic \(have get_dist\), .* got TensorDictModule",
    ),
    "lazy reward": (
        lambda: parts(reward=part(nn.LazyLinear(1), ["latent"], "predicted_reward")),
        ValueError,
        "reward: expected parameters of known shape, got a lazy module; call it once",
    ),
    "reward under the wrong key": (
        lambda: parts(reward=part(Concatenated(6, 1), BOTH, "reward")),
        KeyError,
        r"reward: expected the output 'predicted_reward', got \['reward'\]",
    ),
    "critics under the wrong key": (
        lambda: parts(qvalue=part(Concatenated(6, 2), BOTH, "q")),
        KeyError,
        r"qvalue: expected the output 'state_action_value', got \['q'\]",
    ),
    "action under the wrong key": (
        lambda: parts(actor=part(nn.Linear(LATENT, ACTION), ["latent"], "act")),
        KeyError,
        r"actor: expected the output 'action', got \['act'\]",
    ),
    "latent under the wrong key": (
        lambda: make_loss(
            encoder=probabilistic(Gaussian(OBSERVATION, LATENT), ["observation"], "z")
        ).acting_policy(),
        KeyError,
        r"encoder: expected the outputs \['latent'\], got \['loc', 'scale', 'z'\]",
    ),
    "network that reads what is not there": (
        lambda: parts(actor=part(nn.Linear(LATENT, ACTION), ["state"], "action")),
        KeyError,
        r"actor: expected in_keys among \['latent'\], got \['state'\]",
    ),
    "two outputs and one key": (
        lambda: parts(reward=part(Gaussian(6, 1), BOTH, "predicted_reward")),
        ValueError,
        r"reward: expected one tensor for each of out_keys \['predicted_reward'\], got",
    ),
    "two rewards": (
        lambda: parts(reward=part(Concatenated(6, 2), BOTH, "predicted_reward")),
        ValueError,
        r"reward: expected 'predicted_reward' of shape \[6, 3, 1\], got \[6, 3, 2\]",
    ),
    "one logit": (
        lambda: parts(classifier=part(Concatenated(10, 1), ALL, "logits")),
        ValueError,
        r"classifier: expected 'logits' of shape \[6, 2\], got \[6, 1\]",
    ),
    "model of another latent": (
        lambda: parts(
            model=probabilistic(Gaussian(6, LATENT + 1), BOTH, ("next", "latent"))
        ),
        ValueError,
        r"model: expected next latents of the shape of .* \[6, 4\], got \[6, 5\]",
    ),
    "reward of another latent": (
        lambda: parts(reward=part(Concatenated(99, 1), BOTH, "predicted_reward")),
        ValueError,
        r"reward: expected a network for 'latent' \[6, 3, 4\], 'action' \[6, 3, 2\] "
        r"\(all parts must agree on these sizes\), got: .*99x1",
    ),
    "encoder of another latent": (
        lambda: parts(
            encoder=probabilistic(Gaussian(OBSERVATION, 9), ["observation"], "latent")
        ),
        ValueError,
        r"model: expected a network for 'latent' \[6, 9\], .* must agree .* got: ",
    ),
    "actor of another action": (
        lambda: parts(actor=part(nn.Linear(LATENT, 5), ["latent"], "action")),
        ValueError,
        r"qvalue: expected a network for 'latent' \[6, 4\], 'action' \[6, 5\]",
    ),
    "samples without gradient": (
        lambda: parts(
            actor=probabilistic(Gaussian(LATENT, 2), ["latent"], "action", Discrete)
        ),
        TypeError,
        r"expected distributions whose samples .* \(has_rsample\), got Discrete",
    ),
    "part left out": (
        lambda: ALMLoss(encoder=make_encoder(3)),
        TypeError,
        "missing 5 required keyword-only arguments: 'model', 'actor'",
    ),
}


BATCHES = {
    "no action": (
        lambda: without("action"),
        KeyError,
        r"expected the entry 'action', alone or under 'slice', got \[.*'observation'",
    ),
    "misspelt slices": (
        lambda: two_draws(slices=make_rows(B, K), transition=make_rows(B)),
        KeyError,
        r"expected the entry 'action', alone or under 'slice', got .*'slices'",
    ),
    "no observation": (
        lambda: without("observation"),
        KeyError,
        r"expected the encoder's in_keys \['observation'\], .* got \[.*'action'\]",
    ),
    "no next step": (
        lambda: without("next"),
        KeyError,
        r"tensordict: expected the entry 'next', got \['action', 'observation'\]",
    ),
    "no reward": (
        lambda: without(("next", "reward")),
        KeyError,
        r"expected the entry 'reward', got \['observation', 'terminated'\]",
    ),
    "transitions for slices": (
        lambda: make_loss().model_loss(make_rows(B)),
        ValueError,
        r"model_loss expects slices with batch size \[B, K\], .* got batch size \[6\]",
    ),
    "slices of slices": (
        lambda: make_loss().reward_loss(make_rows(B, K, 2)),
        ValueError,
        r"expect transitions \[B\] or slices \[B, K\], got batch size \[6, 3, 2\]",
    ),
    "slices without steps": (
        lambda: make_loss().model_loss(make_rows(B, 0)),
        ValueError,
        r"expected at least one row and step, got batch size \[6, 0\]",
    ),
    "slices without rows": (
        lambda: make_loss().model_loss(make_rows(0, K)),
        ValueError,
        r"expected at least one row and step, got batch size \[0, 3\]",
    ),
    "entries of different length": (
        lambda: two_draws(
            slice=TensorDict(
                {**make_rows(B, K).to_dict(), "action": torch.zeros(B, K - 1, ACTION)},
                batch_size=[B],
            ),
            transition=make_rows(B),
        ),
        ValueError,
        r"expected entries of batch size \[6, 2\], that of the action 'action', got ",
    ),
    "observations of another task": (
        lambda: with_slices(observation=torch.zeros(B, K, 7)),
        ValueError,
        r"encoder: expected a network for 'observation' \[6, 7\] .*, got: .*6x7 and 3x",
    ),
    "actions of another task": (
        lambda: with_slices(action=torch.zeros(B, K, 7)),
        ValueError,
        r"model: expected a network for 'latent' \[6, 4\], 'action' \[6, 7\] .* got: ",
    ),
    "two rewards for each step": (
        lambda: with_rows(("next", "reward"), torch.zeros(B, 2)),
        ValueError,
        r"expected 'reward' with one number for each of the rows \[6\], got .*\[6, 2\]",
    ),
    "observations in double precision": (
        lambda: with_slices(observation=torch.zeros(B, K, 3, dtype=torch.float64)),
        ValueError,
        r"encoder: expected 'observation' with the type of its parameters, "
        r"torch\.float32, got torch\.float64",
    ),
    "observations of bytes": (
        lambda: with_slices(observation=torch.zeros(B, K, 3, dtype=torch.uint8)),
        ValueError,
        r"encoder: expected 'observation' with .* torch\.float32, got torch\.uint8",
    ),
    "actions of integers": (
        lambda: with_slices(action=torch.zeros(B, K, ACTION, dtype=torch.int64)),
        ValueError,
        r"expected floating-point actions 'action', got torch\.int64",
    ),
    "slices on another device": (
        lambda: make_loss().model_loss(make_rows(B, K).to("meta")),
        ValueError,
        "encoder: expected 'observation' on the device of its parameters, cpu, got met",
    ),
    "action on another device": (
        lambda: with_rows("action", torch.zeros(B, ACTION, device="meta")),
        ValueError,
        "qvalue: expected 'action' on the device of its parameters, cpu, got meta",
    ),
    "reward on another device": (
        lambda: with_rows(("next", "reward"), torch.zeros(B, 1, device="meta")),
        ValueError,
        "expected 'reward' on the device of the networks, cpu, got meta",
    ),
    "mask of numbers": (
        lambda: with_slices(collector__mask=torch.ones(B, K)),
        ValueError,
        r"expected a boolean mask \('collector', 'mask'\) .*, got torch\.float32",
    ),
    "halves of numbers": (
        lambda: make_loss().classifier_loss(
            make_rows(B).set("imagined", torch.ones(B))
        ),
        ValueError,
        r"expected booleans 'imagined', got torch\.float32",
    ),
    "no horizon": (
        lambda: make_loss().actor_loss(make_rows(B)),
        ValueError,
        r"expected slices \[B, K\] or a horizon .* got .*horizon=None",
    ),
    "horizon of zero": (
        lambda: make_loss().lower_bound(make_rows(B), 0),
        ValueError,
        "horizon: expected an integer >= 1, got 0",
    ),
}


CASES = {**NETWORKS, **BATCHES}


@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_wrong_network_or_batch(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert type(raised.value) is error
