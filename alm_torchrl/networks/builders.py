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

These are the default keys; each is an argument, and nested keys work. Means, standard
deviations and bounds are named after the entry they belong to, and stand beside it.
Sizes, activations, bounds and initialisation are those of the paper's appendix D
and the authors' code. A module of yours with the same keys can replace any part.
The actors are built in :mod:`~alm_torchrl.networks.actors`.
"""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import NestedKey, unravel_key
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torchrl.modules import IndependentNormal

from alm_torchrl.checks import LARGEST_SIZE, check_choice, check_integer, check_number
from alm_torchrl.distributions import PointNormal
from alm_torchrl.networks.layers import (
    MLP,
    FixedScale,
    GaussianHead,
    OutputLinear,
    SimNorm,
    TwinCritic,
    make_elu_mlp,
    make_value_mlp,
)
from alm_torchrl.networks.running_norm import RunningNorm

__all__ = [
    "make_classifier",
    "make_decoder",
    "make_encoder",
    "make_identity_encoder",
    "make_model",
    "make_qvalue",
    "make_reward",
]

LATENT_DIM = 50
HIDDEN_DIM = 512
MODEL_HIDDEN_DIM = 1024
# Standard deviation of latents that are not learned: the smallest of those that are.
LATENT_SCALE = 0.1

LatentKind = Literal["gaussian", "rms", "simnorm", "layernorm"]


def make_encoder(
    observation_dim: int,
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    hidden_layers: int = 2,
    latent: LatentKind = "gaussian",
    normalize: bool = False,
    layer_norm: bool = False,
    observation_key: NestedKey | list[NestedKey] = "observation",
    latent_key: NestedKey = "latent",
) -> ProbabilisticTensorDictSequential:
    """Builds the encoder ``e(z | s)``, a diagonal Gaussian over latents.

    ELU layers, then one of four kinds of latents:

    - ``"gaussian"``: mean bounded to (-30, 30), standard deviation to about [0.1, 10];
    - ``"rms"``: ``z / sqrt(mean_i z_i^2 + 1e-5)``, of length about sqrt(L);
    - ``"simnorm"``: softmax within groups of 8 numbers (TD-MPC2,
      https://arxiv.org/abs/2310.16828);
    - ``"layernorm"``: ELU of a LayerNorm without weights, as a hidden layer of MR.Q
      (https://arxiv.org/abs/2501.16142).

    The last three have no noise, see :class:`~alm_torchrl.distributions.PointNormal`:
    their samples are the mean. With the fixed deviation 0.1, the KL of Eq. 7 is ``50
    |m(z, a) - e'(s')|^2``. The latent model must be of the same kind.

    Args:
        observation_dim (int): size of the flat observation; of several entries, the
            sum of their sizes.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width of the hidden layers. Default: ``512``.
        hidden_layers (int): number of hidden layers. Default: ``2``.
        latent (str): the kind of latents. Default: ``"gaussian"``.
        normalize (bool): a :class:`~alm_torchrl.networks.RunningNorm` first, for
            ``ALMLoss.observe`` to update. Default: ``False``.
        layer_norm (bool): a LayerNorm before each activation. Default: ``False``.
        observation_key (NestedKey or list of NestedKey): entry to read, or several,
            which are put one after the other. Default: ``"observation"``.
        latent_key (NestedKey): entry to write. Default: ``"latent"``.

    Returns:
        ProbabilisticTensorDictSequential: writes ``latent_loc``, ``latent_scale``
        and ``latent``, each ``[*, L]``; samples unless the exploration type is
        deterministic.

    Raises:
        ValueError: if a size is not positive, ``latent`` unknown, or ``latent_dim`` no
            multiple of 8 with ``"simnorm"``.

    Examples:
        >>> from tensordict import TensorDict
        >>> encoder = make_encoder(3, latent_dim=2, hidden_dim=8)
        >>> td = TensorDict(observation=torch.zeros(4, 3), batch_size=[4])
        >>> encoder(td)["latent"].shape
        torch.Size([4, 2])
        >>> make_encoder(5, observation_key=["position", ("arm", "speed")]).in_keys
        ['position', ('arm', 'speed')]
    """
    check_sizes(
        observation_dim=observation_dim, latent_dim=latent_dim, hidden_dim=hidden_dim
    )
    net = make_elu_mlp(
        observation_dim,
        hidden_dim,
        *_latent_head(latent, latent_dim),
        hidden_layers=check_integer("hidden_layers", hidden_layers),
        layer_norm=layer_norm,
    )
    if normalize:
        net.insert(0, RunningNorm(observation_dim))
    return _make_gaussian(net, listed(observation_key), latent_key, latent)


def make_identity_encoder(
    observation_dim: int,
    *,
    scale: float = LATENT_SCALE,
    observation_key: NestedKey | list[NestedKey] = "observation",
    latent_key: NestedKey = "latent",
) -> ProbabilisticTensorDictSequential:
    """Builds an encoder without parameters: the latent is the observation (Fig. 13).

    It is a narrow Gaussian around the observation, so that the KL of Eq. 7 exists.
    The other parts need ``latent_dim=observation_dim``.

    Args:
        observation_dim (int): size of the flat observation, and so of the latent.

    Keyword Args:
        scale (float): standard deviation, in units of the observation. Default:
            ``0.1``, the smallest that the model can have.
        observation_key (NestedKey or list of NestedKey): as of :func:`make_encoder`.
            Default: ``"observation"``.
        latent_key (NestedKey): entry to write. Default: ``"latent"``.

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
    check_sizes(observation_dim=observation_dim)
    scale = check_number("scale", scale, open_low=True)
    net = FixedScale(torch.full((observation_dim,), scale))
    return _make_gaussian(net, listed(observation_key), latent_key, "gaussian")


def make_model(
    action_dim: int,
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = MODEL_HIDDEN_DIM,
    hidden_layers: int = 2,
    latent: LatentKind = "gaussian",
    layer_norm: bool = False,
    latent_key: NestedKey = "latent",
    action_key: NestedKey = "action",
) -> ProbabilisticTensorDictSequential:
    """Builds the latent model ``m(z' | z, a)``, a diagonal Gaussian like the encoder.

    Args:
        action_dim (int): size of the action.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width of the hidden layers. Default: ``1024``.
        hidden_layers (int): number of hidden layers. Default: ``2``.
        latent (str): the kind of its latents, that of :func:`make_encoder`.
            Default: ``"gaussian"``.
        layer_norm (bool): a LayerNorm before each activation. Default: ``False``.
        latent_key (NestedKey): entry to read; under ``"next"``, the one to write.
            Default: ``"latent"``.
        action_key (NestedKey): entry to read. Default: ``"action"``.

    Returns:
        ProbabilisticTensorDictSequential: writes ``next_latent_loc``,
        ``next_latent_scale`` and ``("next", "latent")``, each ``[*, L]``.

    Raises:
        ValueError: as of :func:`make_encoder`.

    Examples:
        >>> make_model(1, latent_dim=2, hidden_dim=8).in_keys
        ['latent', 'action']
    """
    check_sizes(action_dim=action_dim, latent_dim=latent_dim, hidden_dim=hidden_dim)
    net = make_elu_mlp(
        latent_dim + action_dim,
        hidden_dim,
        *_latent_head(latent, latent_dim),
        hidden_layers=check_integer("hidden_layers", hidden_layers),
        layer_norm=layer_norm,
    )
    return _make_gaussian(
        net, [latent_key, action_key], latent_key, latent, following=True
    )


def make_qvalue(
    action_dim: int,
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    layer_norm: bool = False,
    latent_key: NestedKey = "latent",
    action_key: NestedKey = "action",
    state_action_value_key: NestedKey = "state_action_value",
) -> TensorDictModule:
    """Builds the twin critic ``Q1, Q2 (z, a)``.

    Args:
        action_dim (int): size of the action.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width (LayerNorm and tanh, then ELU). Default: ``512``.
        layer_norm (bool): a LayerNorm before the ELU too. Default: ``False``.
        latent_key (NestedKey): entry to read. Default: ``"latent"``.
        action_key (NestedKey): likewise. Default: ``"action"``.
        state_action_value_key (NestedKey): entry to write.
            Default: ``"state_action_value"``.

    Returns:
        TensorDictModule: writes ``state_action_value`` ``[*, 2]``. A critic of yours
        may write any number of values there.

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> make_qvalue(1, latent_dim=2, hidden_dim=8).out_keys
        ['state_action_value']
    """
    check_sizes(action_dim=action_dim, latent_dim=latent_dim, hidden_dim=hidden_dim)
    net = TwinCritic(latent_dim + action_dim, hidden_dim, layer_norm=layer_norm)
    return TensorDictModule(net, [latent_key, action_key], [state_action_value_key])


def make_reward(
    action_dim: int,
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    layer_norm: bool = False,
    latent_key: NestedKey = "latent",
    action_key: NestedKey = "action",
    predicted_reward_key: NestedKey = "predicted_reward",
) -> TensorDictModule:
    """Builds the reward model ``r(z, a)`` (Eq. 11).

    Args:
        action_dim (int): size of the action.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width (LayerNorm and tanh, then ELU). Default: ``512``.
        layer_norm (bool): a LayerNorm before the ELU too. Default: ``False``.
        latent_key (NestedKey): entry to read. Default: ``"latent"``.
        action_key (NestedKey): likewise. Default: ``"action"``.
        predicted_reward_key (NestedKey): entry to write.
            Default: ``"predicted_reward"``.

    Returns:
        TensorDictModule: writes ``predicted_reward`` ``[*, 1]``.

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> make_reward(1, latent_dim=2, hidden_dim=8).out_keys
        ['predicted_reward']
    """
    check_sizes(action_dim=action_dim, latent_dim=latent_dim, hidden_dim=hidden_dim)
    in_dim = latent_dim + action_dim
    net = make_value_mlp(in_dim, hidden_dim, 1, layer_norm=layer_norm)
    return TensorDictModule(net, [latent_key, action_key], [predicted_reward_key])


def make_classifier(
    action_dim: int,
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    layer_norm: bool = False,
    linear: bool = False,
    latent_key: NestedKey = "latent",
    action_key: NestedKey = "action",
    logits_key: NestedKey = "logits",
) -> TensorDictModule:
    """Builds the classifier ``C(z, a, z')`` of real against imagined latents (Eq. 9).

    Args:
        action_dim (int): size of the action.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width (LayerNorm and tanh, then ELU). Default: ``512``.
        layer_norm (bool): a LayerNorm before the ELU too. Default: ``False``.
        linear (bool): logits linear in ``(z, a, z')``, without hidden layers (Fig. 16).
            Default: ``False``.
        latent_key (NestedKey): entry to read, now and under ``"next"``.
            Default: ``"latent"``.
        action_key (NestedKey): entry to read. Default: ``"action"``.
        logits_key (NestedKey): entry to write. Default: ``"logits"``.

    Returns:
        TensorDictModule: writes ``logits`` ``[*, 2]``; index 1 is "from the encoder".

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> make_classifier(1, latent_dim=2, hidden_dim=8).out_keys
        ['logits']
    """
    check_sizes(action_dim=action_dim, latent_dim=latent_dim, hidden_dim=hidden_dim)
    in_dim = 2 * latent_dim + action_dim
    if linear:
        net = MLP(OutputLinear(in_dim, 2))
    else:
        net = make_value_mlp(in_dim, hidden_dim, 2, layer_norm=layer_norm)
    keys = [latent_key, action_key, ("next", latent_key)]
    return TensorDictModule(net, keys, [logits_key])


def make_decoder(
    observation_dim: int,
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    latent_key: NestedKey = "latent",
    reconstruction_key: NestedKey = "reconstruction",
) -> TensorDictModule:
    """Builds the decoder ``d(s | z)``: the mean of a unit Gaussian over observations.

    Only learning by maximum likelihood (Fig. 15) needs one. The paper does not
    describe it; this one mirrors the encoder, with unbounded outputs.

    Args:
        observation_dim (int): size of the flat observation, S.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width of both hidden layers. Default: ``512``.
        latent_key (NestedKey): entry to read. Default: ``"latent"``.
        reconstruction_key (NestedKey): entry to write.
            Default: ``"reconstruction"``.

    Returns:
        TensorDictModule: writes ``reconstruction`` ``[*, S]``.

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> make_decoder(3, latent_dim=2, hidden_dim=8).out_keys
        ['reconstruction']
    """
    check_sizes(
        observation_dim=observation_dim, latent_dim=latent_dim, hidden_dim=hidden_dim
    )
    net = make_elu_mlp(latent_dim, hidden_dim, observation_dim)
    return TensorDictModule(net, [latent_key], [reconstruction_key])


def _latent_head(
    kind: LatentKind, latent_dim: int
) -> tuple[int, *tuple[nn.Module, ...]]:
    """Size of the last layer, and what makes mean and standard deviation of it."""
    check_choice("latent", kind, ("gaussian", "rms", "simnorm", "layernorm"))
    if kind == "gaussian":
        return 2 * latent_dim, GaussianHead()
    scale = FixedScale(torch.full((latent_dim,), LATENT_SCALE))
    if kind == "rms":
        norm = nn.RMSNorm(latent_dim, eps=1e-5, elementwise_affine=False)
        return latent_dim, norm, scale
    if kind == "layernorm":
        layer_norm = nn.LayerNorm(latent_dim, elementwise_affine=False)
        return latent_dim, layer_norm, nn.ELU(inplace=True), scale
    if latent_dim % SimNorm.group:
        raise ValueError(
            f"latent_dim: expected a multiple of {SimNorm.group} with "
            f"latent='simnorm', got {latent_dim}."
        )
    return latent_dim, SimNorm(), scale


def _make_gaussian(
    net: nn.Module,
    in_keys: list[NestedKey],
    latent_key: NestedKey,
    kind: LatentKind,
    *,
    following: bool = False,
) -> ProbabilisticTensorDictSequential:
    """Draws the latent, or the following one, from what the network gives."""
    prefix = "next_" if following else ""
    loc = key_beside(latent_key, prefix + "{}_loc")
    scale = key_beside(latent_key, prefix + "{}_scale")
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, in_keys, [loc, scale]),
        ProbabilisticTensorDictModule(
            in_keys={"loc": loc, "scale": scale},
            out_keys=[("next", latent_key) if following else latent_key],
            distribution_class=IndependentNormal if kind == "gaussian" else PointNormal,
            # Non-finite parameters must reach the loss, where they are reported.
            distribution_kwargs={"validate_args": False},
            default_interaction_type=InteractionType.RANDOM,
        ),
    )


def key_beside(key: NestedKey, name: str) -> NestedKey:
    """The key in the same place with another name, in which {} stands for the old."""
    if isinstance(key, str):
        return name.format(key)
    *place, last = unravel_key(key)
    return (*place, name.format(last))


def listed(keys: NestedKey | list[NestedKey]) -> list[NestedKey]:
    """One key or several as a list."""
    return keys if isinstance(keys, list) else [keys]


def check_sizes(**sizes: int) -> None:
    """Raises a ValueError where the size of a layer is out of range."""
    for name, size in sizes.items():
        check_integer(name, size, high=LARGEST_SIZE)
