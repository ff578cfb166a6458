"""Statistics of the latents, of the latent model and of the classifier."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from alm_torchrl import functional
from alm_torchrl.analysis.recording import undisturbed_loss
from alm_torchrl.checks import check_integer, check_type
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.objectives.latents import normal_parameters

__all__ = [
    "calibration_error",
    "latent_statistics",
    "participation_ratio",
    "reliability",
]


def latent_statistics(
    loss: ALMLoss, transitions: TensorDictBase, *, bins: int = 10, seed: int = 0
) -> TensorDict:
    """How the latents, the latent model and the classifier look on some transitions.

    Args:
        loss: the agent.
        transitions: what the loss reads, ``[N]`` or ``[B, K]``, on the device of the
            networks; :func:`~alm_torchrl.diagnostics.record_transitions` gives some.

    Keyword Args:
        bins: of the classifier's probabilities. Default: ``10``.
        seed: of the latent samples. Default: ``0``.

    Returns:
        TensorDict: no batch size, on the device of the networks. ``kl``, the mean of
        ``KL(m(z, a) || e'(s'))`` with ``z ~ e'(s)``, in nats; ``effective_dim``, the
        :func:`participation_ratio` of the means of ``e'(s)``; ``latent_deviation`` and
        ``latent_noise``, the root mean squares of how far these means lie apart and of
        the encoder's own standard deviation. Where there is a classifier, each
        transition serves it twice, with ``z' ~ e'(s')`` and ``z' ~ m(z, a)``:
        ``classifier_accuracy``, ``calibration_error`` and the table ``reliability``
        ``[bins]``.

    Raises:
        TypeError: if ``loss`` is no ``ALMLoss``, or its encoder or model no diagonal
            Gaussian.
        ValueError: if ``bins`` or the seed is out of range.

    Example:
        >>> from alm_torchrl import make_alm_loss, make_env
        >>> from alm_torchrl.analysis.recording import (record_transitions)
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> loss = make_alm_loss(env, hidden_dim=8, model_hidden_dim=8)
        >>> batch = record_transitions(env, loss, transitions=100)
        >>> found = latent_statistics(loss, batch)
        >>> bool(1 <= found["effective_dim"] <= 3)  # of 50: there are 3 observations
        True
    """
    check_type("loss", loss, ALMLoss)
    check_integer("bins", bins)
    check_integer("seed", seed, 0, 2**32 - 1)
    transitions = transitions.reshape(-1)
    action = transitions[loss.tensor_keys.action]
    with undisturbed_loss(loss, seed):
        now, after = (
            loss.latents.encode(transitions),
            loss.latents.encode(transitions["next"]),
        )
        latent = loss.latents.sample(now)
        following = loss.latents.step(latent, action)
        kl = functional.gaussian_kl(
            *normal_parameters(following, "model"), *normal_parameters(after, "encoder")
        )
        mean, scale = normal_parameters(now, "encoder")
        found = {
            "kl": kl.mean(),
            "effective_dim": participation_ratio(mean),
            "latent_deviation": mean.var(0, correction=0).mean().sqrt(),
            "latent_noise": scale.square().mean().sqrt(),
        }
        if loss.classifier is not None:
            logits = torch.stack(
                [
                    loss.latents.classify(latent, action, loss.latents.sample(dist))
                    for dist in (following, after)
                ]
            )
            real = torch.zeros_like(logits[..., 0], dtype=torch.bool)
            real[1] = True
            table = reliability(logits, real, bins=bins)
            found["classifier_accuracy"] = (
                ((logits.argmax(-1) == 1) == real).to(logits.dtype).mean()
            )
            found["calibration_error"] = calibration_error(table)
            found["reliability"] = table
    return TensorDict(found)


def participation_ratio(latent: Tensor) -> Tensor:
    """Effective number of dimensions, ``(tr C)^2 / tr C^2`` with the covariance C.

    It is L where all directions vary alike and 1 where all points lie on a line.

    Args:
        latent: points, ``[N, L]``.

    Returns:
        Tensor: between 1 and L; NaN if the points do not vary. Shape ``[]``, float64.

    Raises:
        ValueError: if ``latent`` is not ``[N, L]`` with N at least 2.

    Example:
        >>> corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
        >>> participation_ratio(corners).item()
        2.0
        >>> participation_ratio(corners[:2]).item()
        1.0
    """
    if latent.ndim != 2 or len(latent) < 2:
        raise ValueError(
            "latent: expected at least two points, shape [N, L], got "
            f"{list(latent.shape)}."
        )
    centred = latent.double() - latent.double().mean(0)
    covariance = centred.mT @ centred
    return covariance.trace().square() / covariance.square().sum()


def reliability(logits: Tensor, real: Tensor, *, bins: int = 10) -> TensorDict:
    """How often latents were real, by the probability that the classifier gave.

    Args:
        logits: classifier output, ``[*, 2]``; index 1 is "real".
        real: which latents were real, boolean, ``[*]``.

    Keyword Args:
        bins: equal parts of [0, 1]. Default: ``10``.

    Returns:
        TensorDict: ``[bins]``, float64: ``confidence``, the mean probability of "real"
        in a bin; ``frequency``, the share of real ones; ``count``. The first two are
        NaN where nothing fell.

    Raises:
        ValueError: if ``bins`` is not positive, or the shapes do not fit.

    Example:
        >>> table = reliability(torch.zeros(4, 2), torch.arange(4) == 0, bins=3)
        >>> table["count"].tolist(), table["frequency"][1].item()
        ([0.0, 4.0, 0.0], 0.25)
    """
    check_integer("bins", bins)
    if logits.shape != (*real.shape, 2):
        raise ValueError(
            f"logits: expected the shape of real and two, {[*real.shape, 2]}, got "
            f"{list(logits.shape)}."
        )
    probability = logits.double().softmax(-1)[..., 1].reshape(-1)
    index = (probability * bins).long().clamp_max(bins - 1)
    empty = probability.new_zeros(bins)
    count = empty.index_add(0, index, torch.ones_like(probability))
    return TensorDict(
        confidence=empty.index_add(0, index, probability) / count,
        frequency=empty.index_add(0, index, real.reshape(-1).double()) / count,
        count=count,
        batch_size=[bins],
    )


def calibration_error(table: TensorDictBase) -> Tensor:
    """Expected calibration error: mean distance of confidence and frequency.

    Args:
        table: what :func:`reliability` returned.

    Returns:
        Tensor: mean over all latents of their bin's ``|confidence - frequency|``, in
        [0, 1]; shape ``[]``.

    Example:
        >>> certain = torch.tensor([[0.0, 99.0]]).expand(4, 2)
        >>> real = torch.tensor([True, True, True, False])
        >>> calibration_error(reliability(certain, real)).item()
        0.25
    """
    count = table["count"]
    distance = (table["confidence"] - table["frequency"]).abs().nan_to_num()
    return (count * distance).sum() / count.sum()
