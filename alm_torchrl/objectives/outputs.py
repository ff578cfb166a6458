"""Which losses and metrics an ``ALMLoss`` has, and how it is printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alm_torchrl.objectives.alm import ALMLoss


def present_keys(loss: ALMLoss) -> list[str]:
    """The losses and metrics of a loss, in order; those of absent terms are left out.

    Raises:
        ValueError: if no term of ``model_loss`` is left.
    """
    has_classifier, has_alpha = loss.classifier is not None, loss.entropy is not None
    terms = [str(term.name) for term in loss.model_terms]
    present = {
        "loss_model": True,
        "loss_reward": True,
        "loss_classifier": has_classifier,
        "loss_qvalue": True,
        "loss_actor": True,
        "loss_alpha": has_alpha,
        "kl": loss.kl_coef != 0,
        "model_reward": loss.reward_coef != 0,
        "terminal_value": loss.value_coef != 0,
        **dict.fromkeys(terms, True),
    }
    if not terms and not any((loss.kl_coef, loss.reward_coef, loss.value_coef)):
        raise ValueError(
            "kl_coef, reward_coef, value_coef: expected one that is not 0, or "
            "model_terms, or model_loss is empty, got 0."
        )
    present["classifier_accuracy"] = has_classifier
    present |= dict.fromkeys(("pred_value", "target_value", "td_error"), True)
    if loss.policy_objective is None:
        present["imagined_reward"] = True
        present["imagined_log_ratio"] = has_classifier
        present |= dict.fromkeys(("imagined_value", "lambda_return"), True)
    else:
        present |= dict.fromkeys(loss.policy_objective.metrics, True)
    present |= dict.fromkeys(("alpha", "entropy"), has_alpha)
    return [name for name, here in present.items() if here]


def describe(loss: ALMLoss, parts: tuple[str, ...]) -> str:
    """The number of parameters of each network, and the settings of the loss."""
    lines = []
    for part in parts:
        if getattr(loss, part) is not None:
            params = getattr(loss, f"{part}_params").parameters()
            count = sum(parameter.numel() for parameter in params)
            lines.append(f"    {part:<10} {count:>11,} parameters")
    numbers = ("gamma", "lmbda", "classifier_coef", "kl_coef", "value_coef")
    settings = {name: f"{float(getattr(loss, name)):g}" for name in numbers}
    settings["reward_coef"] = f"{loss.reward_coef:g}"
    settings["noise_clip"] = str(loss.latents.noise_clip)
    settings["discount_model_loss"] = str(loss.discount_model_loss)
    for name in ("reward_transform", "logarithms", "entropy", "policy_objective"):
        part = getattr(loss, name)
        if part is not None:
            settings[name] = getattr(part, "__name__", repr(part))
    if len(loss.model_terms):
        terms = (f"{type(t).__name__}(coef={t.coef})" for t in loss.model_terms)
        settings["model_terms"] = f"[{', '.join(terms)}]"
    listed = ", ".join(f"{name}={value}" for name, value in settings.items())
    return "\n".join([f"{type(loss).__name__}(", *lines, f"    {listed}", ")"])
