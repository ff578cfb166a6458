"""The outputs of ``ALMLoss``: which there are with the terms that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alm_torchrl.objectives.alm import ALMLoss

__all__ = ["OUT_KEYS", "present_keys"]

# Metrics of the terms of ``loss_model``, one each.
MODEL_KEYS = (
    "kl",
    "model_reward",
    "terminal_value",
    "reconstruction",
    "value_prediction",
)

# Metrics of the policy's rollouts.
IMAGINED_KEYS = (
    "imagined_reward",
    "imagined_log_ratio",
    "imagined_value",
    "lambda_return",
)

# Metrics of the entropy bonus.
ENTROPY_KEYS = ("alpha", "entropy")

OUT_KEYS = (
    "loss_model",
    "loss_reward",
    "loss_classifier",
    "loss_qvalue",
    "loss_actor",
    "loss_alpha",
    *MODEL_KEYS,
    "classifier_accuracy",
    "pred_value",
    "target_value",
    "td_error",
    *IMAGINED_KEYS,
    *ENTROPY_KEYS,
)
"""Losses and metrics of ``ALMLoss`` with all of its terms, in order."""


def present_keys(loss: ALMLoss) -> list[str]:
    """The outputs of a loss: those of :data:`OUT_KEYS` whose terms it computes.

    Args:
        loss (ALMLoss): with all of its arguments set.

    Raises:
        ValueError: if no term of ``loss_model`` is left.
    """
    predicts_value = loss.value_prediction != "none" and loss.value_prediction_coef != 0
    there = {
        "kl": loss.kl_coef != 0,
        "model_reward": loss.reward_coef != 0,
        "terminal_value": loss.value_coef != 0,
        "reconstruction": loss.reconstruction_coef != 0,
        "value_prediction": predicts_value,
    }
    if not any(there.values()):
        raise ValueError(
            "kl_coef, reward_coef, value_coef, reconstruction_coef: expected one "
            "that is not 0, or a value_prediction, or loss_model is empty, got 0."
        )
    there |= dict.fromkeys(IMAGINED_KEYS, loss.actor_objective == "bound")
    there |= dict.fromkeys(("loss_alpha", *ENTROPY_KEYS), loss.log_alpha is not None)
    if loss.classifier is None:
        names = ("loss_classifier", "classifier_accuracy", "imagined_log_ratio")
        there |= dict.fromkeys(names, False)
    return [key for key in OUT_KEYS if there.get(key, True)]
