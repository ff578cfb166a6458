"""Builders of ALM's networks, each an ordinary TensorDictModule.

============  ================================  ====================================
part          reads                             writes
============  ================================  ====================================
encoder       ``observation``                   ``latent_loc``, ``latent_scale``,
                                                ``latent``
latent model  ``latent, action``                ``next_latent_loc``,
                                                ``next_latent_scale``,
                                                ``("next", "latent")``
actor         ``latent``                        ``action_loc``, ``action_scale``,
                                                ``action_low``, ``action_high``,
                                                ``action``
critic        ``latent, action``                ``state_action_value`` ``[*, 2]``
reward        ``latent, action``                ``predicted_reward`` ``[*, 1]``
classifier    ``latent, action``,               ``logits`` ``[*, 2]``
              ``("next", "latent")``
decoder       ``latent``                        ``reconstruction`` ``[*, S]``
============  ================================  ====================================

Sizes, activations, bounds and initialisation are those of the paper's appendix D
and the authors' code. A module of yours with the same keys can replace any part.
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
from torchrl.modules import IndependentNormal

from alm_torchrl.checks import LARGEST_SIZE, check_integer, check_number, check_type
from alm_torchrl.distributions import ClampedNormal
from alm_torchrl.networks.layers import (
    MLP,
    ActorHead,
    FixedScale,
    GaussianHead,
    NoiseSchedule,
    OutputLinear,
    TwinCritic,
    make_elu_mlp,
    make_value_mlp,
)

__all__ = [
    "make_actor",
    "make_classifier",
    "make_decoder",
    "make_encoder",
    "make_identity_encoder",
    "make_model",
    "make_qvalue",
    "make_reward",
    "make_stochastic_actor",
]

LATENT_DIM = 50
HIDDEN_DIM = 512
MODEL_HIDDEN_DIM = 1024


def make_encoder(
    observation_dim: int,
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    observation_key: NestedKey = "observation",
) -> ProbabilisticTensorDictSequential:
    """Builds the stochastic encoder ``e(z | s)``, a diagonal Gaussian over latents.

    Two ELU layers; mean bounded to (-30, 30), standard deviation to about [0.1, 10].

    Args:
        observation_dim (int): size of the flat observation.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width of both hidden layers. Default: ``512``.
        observation_key (NestedKey): key to read. Default: ``"observation"``.

    Returns:
        ProbabilisticTensorDictSequential: writes ``latent_loc``, ``latent_scale``
        and ``latent``, each ``[*, L]``; samples unless the exploration type is
        deterministic.

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> from tensordict import TensorDict
        >>> encoder = make_encoder(3, latent_dim=2, hidden_dim=8)
        >>> td = TensorDict(observation=torch.zeros(4, 3), batch_size=[4])
        >>> encoder(td)["latent"].shape
        torch.Size([4, 2])
    """
    _check_sizes(
        observation_dim=observation_dim, latent_dim=latent_dim, hidden_dim=hidden_dim
    )
    net = make_elu_mlp(observation_dim, hidden_dim, 2 * latent_dim, GaussianHead())
    return _make_gaussian(net, [observation_key], "latent", "latent")


def make_identity_encoder(
    observation_dim: int,
    *,
    scale: float = 0.1,
    observation_key: NestedKey = "observation",
) -> ProbabilisticTensorDictSequential:
    """Builds an encoder without parameters: the latent is the observation (Fig. 13).

    It is a narrow Gaussian around the observation, so that the KL of Eq. 7 exists.
    The other parts need ``latent_dim=observation_dim``.

    Args:
        observation_dim (int): size of the flat observation, and so of the latent.

    Keyword Args:
        scale (float): standard deviation, in units of the observation. Default:
            ``0.1``, the smallest that the model can have.
        observation_key (NestedKey): key to read. Default: ``"observation"``.

    Returns:
        ProbabilisticTensorDictSequential: writes ``latent_loc``, ``latent_scale``
        and ``latent``, each ``[*, observation_dim]``.

    Raises:
        ValueError: if the size or the scale is not positive.

    Examples:
        >>> from tensordict import TensorDict
        >>> encoder = make_identity_encoder(2)
        >>> td = encoder(TensorDict(observation=torch.ones(2)))
        >>> td["latent_loc"], td["latent_scale"]
        (tensor([1., 1.]), tensor([0.1000, 0.1000]))
    """
    _check_sizes(observation_dim=observation_dim)
    scale = check_number("scale", scale, open_low=True)
    net = FixedScale(torch.full((observation_dim,), scale))
    return _make_gaussian(net, [observation_key], "latent", "latent")


def make_model(
    action_dim: int,
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = MODEL_HIDDEN_DIM,
) -> ProbabilisticTensorDictSequential:
    """Builds the latent model ``m(z' | z, a)``, a diagonal Gaussian like the encoder.

    Args:
        action_dim (int): size of the action.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width of both hidden layers. Default: ``1024``.

    Returns:
        ProbabilisticTensorDictSequential: writes ``next_latent_loc``,
        ``next_latent_scale`` and ``("next", "latent")``, each ``[*, L]``.

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> make_model(1, latent_dim=2, hidden_dim=8).in_keys
        ['latent', 'action']
    """
    _check_sizes(action_dim=action_dim, latent_dim=latent_dim, hidden_dim=hidden_dim)
    in_dim = latent_dim + action_dim
    net = make_elu_mlp(in_dim, hidden_dim, 2 * latent_dim, GaussianHead())
    return _make_gaussian(net, ["latent", "action"], "next_latent", ("next", "latent"))


def make_actor(
    action_low: Tensor | Sequence[float],
    action_high: Tensor | Sequence[float],
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    noise_schedule: NoiseSchedule | None = None,
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
        noise_schedule (NoiseSchedule, optional): standard deviation of the noise.
            Default: ``None``, a new ``NoiseSchedule()``.

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
    _check_sizes(latent_dim=latent_dim, hidden_dim=hidden_dim)
    schedule = NoiseSchedule() if noise_schedule is None else noise_schedule
    check_type("noise_schedule", schedule, NoiseSchedule)
    head = ActorHead(low, high, schedule)
    net = make_elu_mlp(latent_dim, hidden_dim, low.shape[0], head)
    return make_clamped_actor(net, "latent", ClampedNormal)


def make_stochastic_actor(
    action_low: Tensor | Sequence[float],
    action_high: Tensor | Sequence[float],
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
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
    _check_sizes(latent_dim=latent_dim, hidden_dim=hidden_dim)
    head = ActorHead(low, high, None)
    net = make_elu_mlp(latent_dim, hidden_dim, 2 * low.shape[0], head)
    return make_clamped_actor(net, "latent", ClampedNormal)


def make_qvalue(
    action_dim: int, *, latent_dim: int = LATENT_DIM, hidden_dim: int = HIDDEN_DIM
) -> TensorDictModule:
    """Builds the twin critic ``Q1, Q2 (z, a)``.

    Args:
        action_dim (int): size of the action.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width (LayerNorm and tanh, then ELU). Default: ``512``.

    Returns:
        TensorDictModule: writes ``state_action_value`` ``[*, 2]``. A critic of yours
        may write any number of values there.

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> make_qvalue(1, latent_dim=2, hidden_dim=8).out_keys
        ['state_action_value']
    """
    _check_sizes(action_dim=action_dim, latent_dim=latent_dim, hidden_dim=hidden_dim)
    net = TwinCritic(latent_dim + action_dim, hidden_dim)
    return TensorDictModule(net, ["latent", "action"], ["state_action_value"])


def make_reward(
    action_dim: int, *, latent_dim: int = LATENT_DIM, hidden_dim: int = HIDDEN_DIM
) -> TensorDictModule:
    """Builds the reward model ``r(z, a)`` (Eq. 11).

    Args:
        action_dim (int): size of the action.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width (LayerNorm and tanh, then ELU). Default: ``512``.

    Returns:
        TensorDictModule: writes ``predicted_reward`` ``[*, 1]``.

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> make_reward(1, latent_dim=2, hidden_dim=8).out_keys
        ['predicted_reward']
    """
    _check_sizes(action_dim=action_dim, latent_dim=latent_dim, hidden_dim=hidden_dim)
    net = make_value_mlp(latent_dim + action_dim, hidden_dim, 1)
    return TensorDictModule(net, ["latent", "action"], ["predicted_reward"])


def make_classifier(
    action_dim: int,
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    linear: bool = False,
) -> TensorDictModule:
    """Builds the classifier ``C(z, a, z')`` of real against imagined latents (Eq. 9).

    Args:
        action_dim (int): size of the action.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width (LayerNorm and tanh, then ELU). Default: ``512``.
        linear (bool): logits linear in ``(z, a, z')``, without hidden layers (Fig. 16).
            Default: ``False``.

    Returns:
        TensorDictModule: writes ``logits`` ``[*, 2]``; index 1 is "from the encoder".

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> make_classifier(1, latent_dim=2, hidden_dim=8).out_keys
        ['logits']
    """
    _check_sizes(action_dim=action_dim, latent_dim=latent_dim, hidden_dim=hidden_dim)
    in_dim = 2 * latent_dim + action_dim
    if linear:
        net = MLP(OutputLinear(in_dim, 2))
    else:
        net = make_value_mlp(in_dim, hidden_dim, 2)
    return TensorDictModule(net, ["latent", "action", ("next", "latent")], ["logits"])


def make_decoder(
    observation_dim: int, *, latent_dim: int = LATENT_DIM, hidden_dim: int = HIDDEN_DIM
) -> TensorDictModule:
    """Builds the decoder ``d(s | z)``: the mean of a unit Gaussian over observations.

    Only learning by maximum likelihood (Fig. 15) needs one. The paper does not
    describe it; this one mirrors the encoder, with unbounded outputs.

    Args:
        observation_dim (int): size of the flat observation, S.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width of both hidden layers. Default: ``512``.

    Returns:
        TensorDictModule: writes ``reconstruction`` ``[*, S]``.

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> make_decoder(3, latent_dim=2, hidden_dim=8).out_keys
        ['reconstruction']
    """
    _check_sizes(
        observation_dim=observation_dim, latent_dim=latent_dim, hidden_dim=hidden_dim
    )
    net = make_elu_mlp(latent_dim, hidden_dim, observation_dim)
    return TensorDictModule(net, ["latent"], ["reconstruction"])


def _make_gaussian(
    net: nn.Module, in_keys: list[NestedKey], prefix: str, out_key: NestedKey
) -> ProbabilisticTensorDictSequential:
    loc, scale = f"{prefix}_loc", f"{prefix}_scale"
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, in_keys, [loc, scale]),
        ProbabilisticTensorDictModule(
            in_keys={"loc": loc, "scale": scale},
            out_keys=[out_key],
            distribution_class=IndependentNormal,
            # Non-finite parameters must reach the loss, where they are reported.
            distribution_kwargs={"validate_args": False},
            default_interaction_type=InteractionType.RANDOM,
        ),
    )


def make_clamped_actor(
    net: nn.Module, in_key: NestedKey, distribution: type[ClampedNormal]
) -> ProbabilisticTensorDictSequential:
    """Wraps a network that ends in an :class:`ActorHead` into an actor."""
    keys = {name: f"action_{name}" for name in ("loc", "scale", "low", "high")}
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, [in_key], list(keys.values())),
        ProbabilisticTensorDictModule(
            in_keys=keys,
            out_keys=["action"],
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


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        check_integer(name, size, high=LARGEST_SIZE)
