"""Builds the losses of the baselines with their networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

from tensordict.nn import InteractionType, TensorDictModule
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.modules import (
    MLP,
    NormalParamExtractor,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import ValueEstimators

from alm_torchrl.baselines.losses import (
    BaselineLoss,
    ClampedMeanNormal,
    REDQBaseline,
    SACBaseline,
    TD3Baseline,
)
from alm_torchrl.checks import check_integer, check_number, check_type
from alm_torchrl.networks.actors import make_clamped_actor
from alm_torchrl.networks.builders import HIDDEN_DIM
from alm_torchrl.networks.layers import (
    ActorHead,
    NoiseSchedule,
    make_elu_mlp,
    make_value_mlp,
)
from alm_torchrl.objectives.builder import NetworkSizes

__all__ = ["make_redq_loss", "make_sac_loss", "make_td3_loss"]

STANDARD_HIDDEN_DIM = 256

Loss = TypeVar("Loss", bound=BaselineLoss)


def make_td3_loss(
    env: EnvBase | None = None,
    *,
    observation_dim: int | None = None,
    action_low: Tensor | Sequence[float] | None = None,
    action_high: Tensor | Sequence[float] | None = None,
    hidden_dim: int = HIDDEN_DIM,
    gamma: float = 0.99,
    noise_clip: float = 0.3,
    noise_schedule: NoiseSchedule | None = None,
    policy_delay: int = 2,
) -> TD3Baseline:
    """Builds TD3 with ALM's networks and exploration ("TD3 (ours)" of Fig. 5c).

    Actor and critics are ALM's, but read the observation. The noise of actions and
    of the target follows one schedule; the target's is clipped. The actor maximises
    the first critic at its mean, without noise, and has a target of its own.

    Args:
        env (EnvBase, optional): environment with a flat ``"observation"`` and a
            bounded action. Default: ``None``.

    Keyword Args:
        observation_dim (int, optional): size of the observation, without ``env``.
            Default: ``None``.
        action_low (Tensor or sequence of float, optional): lower bounds of the
            action, ``[A]``, without ``env``. Default: ``None``.
        action_high (Tensor or sequence of float, optional): upper bounds, likewise.
            Default: ``None``.
        hidden_dim (int): width of both hidden layers. Default: ``512``.
        gamma (float): discount per step, in [0, 1). Default: ``0.99``.
        noise_clip (float): largest noise of the target's action. Default: ``0.3``.
        noise_schedule (NoiseSchedule, optional): standard deviation of the noise.
            Default: ``None``, 1.0 to 0.1 over 100,000 training steps.
        policy_delay (int): environment steps per update of actor and targets.
            Default: ``2``.

    Returns:
        TD3Baseline: the loss, with targets equal to the online networks.

    Raises:
        ValueError: if sizes are missing, given twice or do not fit, or a number is out
            of range.
        TypeError: if ``env`` or ``noise_schedule`` is of another type.

    Examples:
        >>> loss = make_td3_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> loss.acting_policy().in_keys
        ['observation']
    """
    sizes = NetworkSizes("make_td3_loss", env, observation_dim, action_low, action_high)
    observation_dim, (low, high) = sizes.observation_dim(), sizes.action_bounds()
    hidden_dim = check_integer("hidden_dim", hidden_dim)
    noise_clip = check_number("noise_clip", noise_clip)
    schedule = NoiseSchedule() if noise_schedule is None else noise_schedule
    check_type("noise_schedule", schedule, NoiseSchedule)
    head = ActorHead(low, high, schedule)
    net = make_elu_mlp(observation_dim, hidden_dim, low.shape[0], head)
    actor = make_clamped_actor(net, "observation", "action", ClampedMeanNormal)
    critics = [
        TensorDictModule(
            make_value_mlp(observation_dim + low.shape[0], hidden_dim, 1),
            in_keys=["observation", "action"],
            out_keys=["state_action_value"],
        )
        for _ in range(2)
    ]
    loss = TD3Baseline(
        actor,
        critics,
        bounds=(low, high),
        num_qvalue_nets=len(critics),
        noise_clip=noise_clip,
        loss_function="l2",
        policy_delay=policy_delay,
    )
    return _with_discount(loss, gamma)


def make_sac_loss(
    env: EnvBase | None = None,
    *,
    observation_dim: int | None = None,
    action_low: Tensor | Sequence[float] | None = None,
    action_high: Tensor | Sequence[float] | None = None,
    hidden_dim: int = STANDARD_HIDDEN_DIM,
    gamma: float = 0.99,
) -> SACBaseline:
    """Builds SAC: a tanh-Gaussian actor, two critics, a tuned temperature.

    Networks have two hidden ReLU layers. The target entropy is minus the number of
    action dimensions, for actions rescaled to [-1, 1].

    Args:
        env (EnvBase, optional): environment with a flat ``"observation"`` and a
            bounded action. Default: ``None``.

    Keyword Args:
        observation_dim (int, optional): size of the observation, without ``env``.
            Default: ``None``.
        action_low (Tensor or sequence of float, optional): lower bounds of the
            action, ``[A]``, without ``env``. Default: ``None``.
        action_high (Tensor or sequence of float, optional): upper bounds, likewise.
            Default: ``None``.
        hidden_dim (int): width of both hidden layers. Default: ``256``.
        gamma (float): discount per step, in [0, 1). Default: ``0.99``.

    Returns:
        SACBaseline: the loss, with targets equal to the online networks.

    Raises:
        ValueError: if sizes are missing, given twice or do not fit, or a number is out
            of range.
        TypeError: if ``env`` is no TorchRL environment.

    Examples:
        >>> loss = make_sac_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> loss.target_entropy
        tensor(-1.)
    """
    sizes = NetworkSizes("make_sac_loss", env, observation_dim, action_low, action_high)
    observation_dim, (low, high) = sizes.observation_dim(), sizes.action_bounds()
    loss = SACBaseline(
        *_make_standard_networks(observation_dim, low, high, hidden_dim, critics=2),
        num_qvalue_nets=2,
        loss_function="l2",
        target_entropy=_target_entropy(low, high),
    )
    return _with_discount(loss, gamma)


def make_redq_loss(
    env: EnvBase | None = None,
    *,
    observation_dim: int | None = None,
    action_low: Tensor | Sequence[float] | None = None,
    action_high: Tensor | Sequence[float] | None = None,
    hidden_dim: int = STANDARD_HIDDEN_DIM,
    gamma: float = 0.99,
    num_qvalue_nets: int = 10,
    sub_sample_len: int = 2,
    updates_per_step: int = 20,
) -> REDQBaseline:
    """Builds REDQ: SAC's networks with an ensemble of critics.

    Args:
        env (EnvBase, optional): environment with a flat ``"observation"`` and a
            bounded action. Default: ``None``.

    Keyword Args:
        observation_dim (int, optional): size of the observation, without ``env``.
            Default: ``None``.
        action_low (Tensor or sequence of float, optional): lower bounds of the
            action, ``[A]``, without ``env``. Default: ``None``.
        action_high (Tensor or sequence of float, optional): upper bounds, likewise.
            Default: ``None``.
        hidden_dim (int): width of both hidden layers. Default: ``256``.
        gamma (float): discount per step, in [0, 1). Default: ``0.99``.
        num_qvalue_nets (int): critics, at least 2. Default: ``10``.
        sub_sample_len (int): critics drawn for each target, the smallest of which
            counts; less than all. Default: ``2``.
        updates_per_step (int): updates of the critics per environment step.
            Default: ``20``.

    Returns:
        REDQBaseline: the loss, with targets equal to the online networks.

    Raises:
        ValueError: if sizes are missing, given twice or do not fit, or a number is out
            of range.
        TypeError: if ``env`` is no TorchRL environment.

    Examples:
        >>> loss = make_redq_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> loss.num_qvalue_nets, loss.sub_sample_len, loss.updates_per_step
        (10, 2, 20)
    """
    sizes = NetworkSizes(
        "make_redq_loss", env, observation_dim, action_low, action_high
    )
    observation_dim, (low, high) = sizes.observation_dim(), sizes.action_bounds()
    critics = check_integer("num_qvalue_nets", num_qvalue_nets, 2)
    loss = REDQBaseline(
        *_make_standard_networks(observation_dim, low, high, hidden_dim, critics),
        num_qvalue_nets=critics,
        sub_sample_len=check_integer("sub_sample_len", sub_sample_len, 1, critics - 1),
        loss_function="l2",
        # TorchRL would keep the temperature within [0.1, 10].
        min_alpha=0.0,
        max_alpha=math.inf,
        target_entropy=_target_entropy(low, high),
        updates_per_step=updates_per_step,
    )
    return _with_discount(loss, gamma)


def _make_standard_networks(
    observation_dim: int, low: Tensor, high: Tensor, hidden_dim: int, critics: int
) -> tuple[ProbabilisticActor, list[ValueOperator]]:
    cells = 2 * [check_integer("hidden_dim", hidden_dim)]
    action_dim = low.shape[0]

    def make_mlp(in_dim: int, out_dim: int) -> MLP:
        return MLP(in_dim, out_dim, num_cells=cells, activation_class=nn.ReLU)

    mlp = make_mlp(observation_dim, 2 * action_dim)
    net = nn.Sequential(mlp, NormalParamExtractor())
    actor = ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": low, "high": high},
        default_interaction_type=InteractionType.RANDOM,
    )
    # From a single module TorchRL would draw critics with another initialisation.
    pair = ["observation", "action"]
    return actor, [
        ValueOperator(make_mlp(observation_dim + action_dim, 1), in_keys=pair)
        for _ in range(critics)
    ]


def _target_entropy(low: Tensor, high: Tensor) -> float:
    """Minus the number of dimensions, in units of the bounds."""
    return -low.shape[0] + ((high - low) / 2).log().sum().item()


def _with_discount(loss: Loss, gamma: float) -> Loss:
    gamma = check_number("gamma", gamma, 0, 1, open_high=True)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=gamma)
    return loss
