"""The entries that an ``ALMLoss`` reads and writes, and how it is printed."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tensordict import NestedKey, unravel_key
from torch import Tensor

from alm_torchrl.objectives.rewards import RewardScale

if TYPE_CHECKING:
    from alm_torchrl.objectives.alm import ALMLoss

# Metrics in the units of rewards.
SCALED = (
    *("model_reward", "terminal_value", "pred_value", "target_value", "td_error"),
    *("imagined_reward", "imagined_value", "lambda_return"),
)


@dataclass
class AcceptedKeys:
    """Keys that ``set_keys`` accepts, nested ones included."""

    latent: NestedKey = "latent"  # the classifier reads ("next", latent) too
    action: NestedKey = "action"
    reward: NestedKey = "reward"  # under "next"
    terminated: NestedKey = "terminated"  # under "next"; a time limit is not one
    predicted_reward: NestedKey = "predicted_reward"  # of the reward model
    state_action_value: NestedKey = "state_action_value"  # of the critics, [*, N]
    logits: NestedKey = "logits"  # of the classifier
    imagined: NestedKey = "imagined"  # optional: rows imagined for the classifier
    lookahead: NestedKey = "lookahead"  # of transitions: [*, n], for n-step targets
    slice: NestedKey = "slice"  # of a two-draw batch
    transition: NestedKey = "transition"  # of a two-draw batch


def read_keys(loss: ALMLoss) -> list[NestedKey]:
    """The entries of plain slices that a loss reads."""
    keys, observed = loss.tensor_keys, loss.encoder.in_keys
    following = [("next", key) for key in (*observed, keys.reward, keys.terminated)]
    return [unravel_key(key) for key in (*observed, keys.action, *following)]


def present_keys(loss: ALMLoss) -> list[str]:
    """The losses and metrics of a loss, in order; those of absent terms are left out.

    Raises:
        ValueError: if no term of ``model_loss`` is left.
    """
    coefs = {
        "kl": loss.kl_coef,
        "model_reward": loss.reward_coef,
        "terminal_value": loss.value_coef,
    }
    terms = [name for name, coef in coefs.items() if coef != 0]
    terms += [str(term.name) for term in loss.model_terms]
    if not terms:
        raise ValueError(
            "kl_coef, reward_coef, value_coef: expected one that is not 0, or "
            "model_terms, or model_loss is empty, got 0."
        )
    bound = ("imagined_reward", "imagined_log_ratio", "imagined_value", "lambda_return")
    policy = loss.policy_objective
    losses = ("model", "reward", "classifier", "qvalue", "actor", "alpha")
    keys = [
        *(f"loss_{name}" for name in losses),
        *terms,
        "classifier_accuracy",
        *("pred_value", "target_value", "td_error"),
        *(bound if policy is None else policy.metrics),
        *("alpha", "entropy"),
    ]
    absent = set()
    if loss.classifier is None:
        absent |= {"loss_classifier", "classifier_accuracy", "imagined_log_ratio"}
    if loss.entropy is None:
        absent |= {"loss_alpha", "alpha", "entropy"}
    return [key for key in keys if key not in absent]


def in_raw_units(loss: ALMLoss, metadata: dict[str, Tensor]) -> dict[str, Tensor]:
    """Metrics in the units of the environment's rewards."""
    if not isinstance(loss.reward_transform, RewardScale):
        return metadata
    scale = loss.reward_transform.scale
    return {k: v * scale if k in SCALED else v for k, v in metadata.items()}


def describe(loss: ALMLoss, parts: tuple[str, ...]) -> str:
    """The number of parameters of each network, and the settings of the loss."""
    lines = []
    for part in parts:
        if getattr(loss, part) is not None:
            params = getattr(loss, f"{part}_params").parameters()
            count = sum(parameter.numel() for parameter in params)
            lines.append(f"    {part:<10} {count:>11,} parameters")
    coefs = ("classifier_coef", "kl_coef", "value_coef", "reward_coef", "pessimism")
    numbers = ("gamma", "lmbda", *coefs)
    settings = {name: f"{float(getattr(loss, name)):g}" for name in numbers}
    settings["noise_clip"] = str(loss.latents.noise_clip)
    settings["discount_model_loss"] = str(loss.discount_model_loss)
    named = ("critic_target", "value_head", "reward_transform", "logarithms")
    for name in (*named, "entropy", "policy_objective"):
        part = getattr(loss, name)
        if part is not None:
            settings[name] = getattr(part, "__name__", repr(part))
    if len(loss.model_terms):
        terms = (f"{type(t).__name__}(coef={t.coef})" for t in loss.model_terms)
        settings["model_terms"] = f"[{', '.join(terms)}]"
    listed = ", ".join(f"{name}={value}" for name, value in settings.items())
    lines.append(textwrap.indent(textwrap.fill(listed, 76), "    "))
    return "\n".join([f"{type(loss).__name__}(", *lines, ")"])
