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
The actors are built in :mod:`~alm_torchrl.networks.actors`.
"""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import NestedKey
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
    observation_key: NestedKey = "observation",
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
        observation_dim (int): size of the flat observation.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width of the hidden layers. Default: ``512``.
        hidden_layers (int): number of hidden layers. Default: ``2``.
        latent (str): the kind of latents. Default: ``"gaussian"``.
        normalize (bool): a :class:`~alm_torchrl.networks.RunningNorm` first, for
            ``ALMLoss.observe`` to update. Default: ``False``.
        layer_norm (bool): a LayerNorm before each activation. Default: ``False``.
        observation_key (NestedKey): key to read. Default: ``"observation"``.

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
    return _make_gaussian(net, [observation_key], "latent", "latent", latent)


def make_identity_encoder(
    observation_dim: int,
    *,
    scale: float = LATENT_SCALE,
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
    check_sizes(observation_dim=observation_dim)
    scale = check_number("scale", scale, open_low=True)
    net = FixedScale(torch.full((observation_dim,), scale))
    return _make_gaussian(net, [observation_key], "latent", "latent", "gaussian")


def make_model(
    action_dim: int,
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = MODEL_HIDDEN_DIM,
    hidden_layers: int = 2,
    latent: LatentKind = "gaussian",
    layer_norm: bool = False,
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
    keys: list[NestedKey] = ["latent", "action"]
    return _make_gaussian(net, keys, "next_latent", ("next", "latent"), latent)


def make_qvalue(
    action_dim: int,
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    layer_norm: bool = False,
) -> TensorDictModule:
    """Builds the twin critic ``Q1, Q2 (z, a)``.

    Args:
        action_dim (int): size of the action.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width (LayerNorm and tanh, then ELU). Default: ``512``.
        layer_norm (bool): a LayerNorm before the ELU too. Default: ``False``.

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
    return TensorDictModule(net, ["latent", "action"], ["state_action_value"])


def make_reward(
    action_dim: int,
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    layer_norm: bool = False,
) -> TensorDictModule:
    """Builds the reward model ``r(z, a)`` (Eq. 11).

    Args:
        action_dim (int): size of the action.

    Keyword Args:
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width (LayerNorm and tanh, then ELU). Default: ``512``.
        layer_norm (bool): a LayerNorm before the ELU too. Default: ``False``.

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
    return TensorDictModule(net, ["latent", "action"], ["predicted_reward"])


def make_classifier(
    action_dim: int,
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    layer_norm: bool = False,
    linear: bool = False,
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
    check_sizes(
        observation_dim=observation_dim, latent_dim=latent_dim, hidden_dim=hidden_dim
    )
    net = make_elu_mlp(latent_dim, hidden_dim, observation_dim)
    return TensorDictModule(net, ["latent"], ["reconstruction"])


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
    prefix: str,
    out_key: NestedKey,
    kind: LatentKind,
) -> ProbabilisticTensorDictSequential:
    loc, scale = f"{prefix}_loc", f"{prefix}_scale"
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, in_keys, [loc, scale]),
        ProbabilisticTensorDictModule(
            in_keys={"loc": loc, "scale": scale},
            out_keys=[out_key],
            distribution_class=IndependentNormal if kind == "gaussian" else PointNormal,
            # Non-finite parameters must reach the loss, where they are reported.
            distribution_kwargs={"validate_args": False},
            default_interaction_type=InteractionType.RANDOM,
        ),
    )


def check_sizes(**sizes: int) -> None:
    """Raises a ValueError where the size of a layer is out of range."""
    for name, size in sizes.items():
        check_integer(name, size, high=LARGEST_SIZE)
