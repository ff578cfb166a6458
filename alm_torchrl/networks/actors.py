"""Builders of ALM's actors, probabilistic TensorDictModules.

They read ``latent`` and write ``action`` with ``action_loc``, ``action_scale``,
``action_low`` and ``action_high``, or entries of your own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import Tensor, nn

from alm_torchrl.checks import check_type
from alm_torchrl.distributions import ClampedNormal
from alm_torchrl.networks.builders import (
    HIDDEN_DIM,
    LATENT_DIM,
    check_sizes,
    key_beside,
)
from alm_torchrl.networks.layers import ActorHead, NoiseSchedule, make_elu_mlp

__all__ = ["make_actor", "make_stochastic_actor"]


def make_actor(
    action_low: Tensor | Sequence[float],
    action_high: Tensor | Sequence[float],
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    layer_norm: bool = False,
    noise_schedule: NoiseSchedule | None = None,
    latent_key: NestedKey = "latent",
    action_key: NestedKey = "action",
) -> ProbabilisticTensorDictSequential:
    """Builds the actor ``pi(a | z)``: tanh mean, scheduled noise, clamped samples.

    The mean lies in (-1, 1) whatever the bounds are. Samples are clamped to narrower
    bounds; the mean never reaches wider ones (rescale the environment's actions).

    Args:
        action_low (Tensor or sequence of float): lower bounds, ``[A]``.
        action_high (Tensor or sequence of float): upper bounds, ``[A]``.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width of both hidden layers. Default: ``512``.
        layer_norm (bool): a LayerNorm before each activation. Default: ``False``.
        noise_schedule (NoiseSchedule, optional): standard deviation of the noise.
            Default: ``None``, a new ``NoiseSchedule()``.
        latent_key (NestedKey): entry to read. Default: ``"latent"``.
        action_key (NestedKey): entry to write. Default: ``"action"``.

    Returns:
        ProbabilisticTensorDictSequential: writes ``action`` ``[*, A]`` and the
        parameters of its :class:`~alm_torchrl.ClampedNormal`.

    Raises:
        ValueError: if the bounds are not two finite vectors with ``low < high``, or
            a size is not positive.
        TypeError: if ``noise_schedule`` is no ``NoiseSchedule``.

    Examples:
        >>> from tensordict import TensorDict
        >>> actor = make_actor([-0.4], [0.4], latent_dim=2, hidden_dim=8)
        >>> td = actor(TensorDict(latent=torch.zeros(5, 2), batch_size=[5]))
        >>> bool((td["action"].abs() <= 0.4).all())
        True
    """
    low, high = check_bounds(action_low, action_high)
    check_sizes(latent_dim=latent_dim, hidden_dim=hidden_dim)
    schedule = NoiseSchedule() if noise_schedule is None else noise_schedule
    check_type("noise_schedule", schedule, NoiseSchedule)
    head = ActorHead(low, high, schedule)
    actions = low.shape[0]
    net = make_elu_mlp(latent_dim, hidden_dim, actions, head, layer_norm=layer_norm)
    return make_clamped_actor(net, latent_key, action_key, ClampedNormal)


def make_stochastic_actor(
    action_low: Tensor | Sequence[float],
    action_high: Tensor | Sequence[float],
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    layer_norm: bool = False,
    latent_key: NestedKey = "latent",
    action_key: NestedKey = "action",
) -> ProbabilisticTensorDictSequential:
    """Builds an actor ``pi(a | z)`` that learns its own noise (ALM-ENT, Table 5).

    Unlike in :func:`make_actor`, the network gives the standard deviation, softly
    bounded to [e^-5, e^2]. It is the actor for an entropy bonus.

    Args:
        action_low (Tensor or sequence of float): lower bounds, ``[A]``.
        action_high (Tensor or sequence of float): upper bounds, ``[A]``.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width of both hidden layers. Default: ``512``.
        layer_norm (bool): a LayerNorm before each activation. Default: ``False``.
        latent_key (NestedKey): entry to read. Default: ``"latent"``.
        action_key (NestedKey): entry to write. Default: ``"action"``.

    Returns:
        ProbabilisticTensorDictSequential: writes ``action`` ``[*, A]`` and the
        parameters of its :class:`~alm_torchrl.ClampedNormal`.

    Raises:
        ValueError: if the bounds are not two finite vectors with ``low < high``, or
            a size is not positive.

    Examples:
        >>> from tensordict import TensorDict
        >>> actor = make_stochastic_actor([-0.4], [0.4], latent_dim=2, hidden_dim=8)
        >>> dist = actor.get_dist(TensorDict(latent=torch.zeros(5, 2), batch_size=[5]))
        >>> action, log_prob = dist.rsample_and_log_prob()
        >>> action.shape, bool((dist.scale > 0.0067).all())
        (torch.Size([5, 1]), True)
    """
    low, high = check_bounds(action_low, action_high)
    check_sizes(latent_dim=latent_dim, hidden_dim=hidden_dim)
    head = ActorHead(low, high, None)
    out_dim = 2 * low.shape[0]
    net = make_elu_mlp(latent_dim, hidden_dim, out_dim, head, layer_norm=layer_norm)
    return make_clamped_actor(net, latent_key, action_key, ClampedNormal)


def make_clamped_actor(
    net: nn.Module,
    in_key: NestedKey,
    action_key: NestedKey,
    distribution: type[ClampedNormal],
) -> ProbabilisticTensorDictSequential:
    """Wraps a network that ends in an :class:`ActorHead` into an actor."""
    names = ("loc", "scale", "low", "high")
    keys = {name: key_beside(action_key, f"{{}}_{name}") for name in names}
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, [in_key], list(keys.values())),
        ProbabilisticTensorDictModule(
            in_keys=keys,
            out_keys=[action_key],
            distribution_class=distribution,
            default_interaction_type=InteractionType.RANDOM,
        ),
    )


def check_bounds(
    action_low: Tensor | Sequence[float], action_high: Tensor | Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Returns copies of the action bounds: two finite vectors with ``low < high``."""
    low, high = (
        _as_vector("action_low", action_low),
        _as_vector("action_high", action_high),
    )
    if low.shape != high.shape:
        raise ValueError(
            "action_low and action_high: expected vectors of the same size, got shapes "
            f"{tuple(low.shape)} and {tuple(high.shape)}."
        )
    if not (low.isfinite() & high.isfinite() & (low < high)).all():
        raise ValueError(
            "action_low and action_high: expected finite numbers with low < high, got "
            f"{low.tolist()} and {high.tolist()}."
        )
    return low, high


def _as_vector(name: str, values: Tensor | Sequence[float]) -> Tensor:
    try:
        vector = torch.as_tensor(values, dtype=torch.get_default_dtype()).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{name}: expected a vector of numbers, got {values!r}."
        ) from error
    if vector.ndim != 1 or len(vector) == 0:
        raise ValueError(
            f"{name}: expected a vector, got a tensor of shape {tuple(vector.shape)}."
        )
    return vector
