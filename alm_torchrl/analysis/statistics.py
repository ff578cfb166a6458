"""Statistics of the latents, of the latent model and of the classifier."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType

from alm_torchrl import functional
from alm_torchrl.analysis.rollouts import isolated_loss
from alm_torchrl.checks import check_integer, check_type
from alm_torchrl.distributions import draw
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
    """Measures latents, latent model and classifier on transitions.

    Args:
        loss: the agent.
        transitions: ``[N]`` or ``[B, K]``, on the device of the networks, for example
            from :func:`~alm_torchrl.analysis.record_transitions`.

    Keyword Args:
        bins: number of bins of the classifier's probabilities. Default: ``10``.
        seed: seed of the latent samples. Default: ``0``.

    Returns:
        TensorDict: no batch size, on the device of the networks. ``kl``, the mean of
        ``KL(m(z, a) || e'(s'))`` with ``z ~ e'(s)``, in nats; ``latent_dim``, the
        latent's dimensions; ``effective_dim``, the :func:`participation_ratio` of the
        means of ``e'(s)``; ``latent_deviation``, the root mean square deviation of
        these means; ``latent_noise``, that of the encoder. With a classifier also
        ``classifier_accuracy``, ``calibration_error`` and the table ``reliability``
        ``[bins]``, on each transition with ``z' ~ e'(s')`` and with ``z' ~ m(z, a)``.

    Raises:
        TypeError: if ``loss`` is no ``ALMLoss`` with a diagonal Gaussian encoder and
            model.
        ValueError: if ``bins`` or ``seed`` is out of range.

    Example:
        >>> from alm_torchrl import make_alm_loss, make_env
        >>> from alm_torchrl.analysis import record_transitions
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> loss = make_alm_loss(env, hidden_dim=8, model_hidden_dim=8)
        >>> batch = record_transitions(env, loss, transitions=100)
        >>> found = latent_statistics(loss, batch)
        >>> bool(1 <= found["effective_dim"] <= 3)  # of 50: there are 3 observations
        True
    """
    check_type("loss", loss, ALMLoss)
    check_integer("bins", bins)
    transitions = transitions.reshape(-1)
    action = transitions[loss.tensor_keys.action]
    with isolated_loss(loss, seed, ExplorationType.RANDOM):
        latents = loss.latents
        now, after = latents.encode(transitions), latents.encode(transitions["next"])
        latent = draw(now)
        following = latents.step(latent, action)
        logits = None
        if loss.classifier is not None:
            samples = [draw(following), draw(after)]
            logits = torch.stack([latents.classify(latent, action, z) for z in samples])
    kl = functional.gaussian_kl(
        *normal_parameters(following, "model"), *normal_parameters(after, "encoder")
    )
    mean, scale = normal_parameters(now, "encoder")
    found = TensorDict(
        kl=kl.mean(),
        latent_dim=torch.tensor(mean.shape[-1], device=mean.device),
        effective_dim=participation_ratio(mean),
        latent_deviation=mean.var(0, correction=0).mean().sqrt(),
        latent_noise=scale.square().mean().sqrt(),
    )
    if logits is not None:
        real = torch.zeros_like(logits[..., 0], dtype=torch.bool)
        real[1] = True
        right = (logits.argmax(-1) == 1) == real
        found["classifier_accuracy"] = right.to(logits.dtype).mean()
        found["reliability"] = reliability(logits, real, bins=bins)
        found["calibration_error"] = calibration_error(found["reliability"])
    return found


def participation_ratio(latent: Tensor) -> Tensor:
    """Effective number of dimensions, ``(tr C)^2 / tr C^2`` with the covariance C.

    It is L if all directions vary alike, and 1 if all points are on a line.

    Args:
        latent: points, ``[N, L]``.

    Returns:
        Tensor: ``[]``, float64, between 1 and L; NaN if the points do not vary.

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
    """Computes how often latents were real, for each probability of the classifier.

    Args:
        logits: classifier output, ``[*, 2]``; index 1 is "real".
        real: which latents were real, boolean, ``[*]``.

    Keyword Args:
        bins: number of equal parts of [0, 1]. Default: ``10``.

    Returns:
        TensorDict: ``[bins]``, float64. ``confidence`` is the mean probability of
        "real" in a bin, ``frequency`` the share of real latents (both NaN in an empty
        bin), ``count`` their number.

    Raises:
        ValueError: if ``bins`` is not positive, or the shapes do not match.

    Example:
        >>> table = reliability(torch.zeros(4, 2), torch.arange(4) == 0, bins=3)
        >>> table["count"].tolist(), table["frequency"][1].item()
        ([0.0, 4.0, 0.0], 0.25)
    """
    check_integer("bins", bins)
    if logits.shape != (*real.shape, 2):
        raise ValueError(
            f"logits: expected shape {[*real.shape, 2]}, that of real and two, got "
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
    """Computes the expected calibration error.

    Args:
        table: ``[bins]``, from :func:`reliability`.

    Returns:
        Tensor: ``[]``, the mean over all latents of ``|confidence - frequency|`` of
        their bin, in [0, 1].

    Example:
        >>> certain = torch.tensor([[0.0, 99.0]]).expand(4, 2)
        >>> real = torch.tensor([True, True, True, False])
        >>> calibration_error(reliability(certain, real)).item()
        0.25
    """
    count = table["count"]
    distance = (table["confidence"] - table["frequency"]).abs().nan_to_num()
    return (count * distance).sum() / count.sum()
