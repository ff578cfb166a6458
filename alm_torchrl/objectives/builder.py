"""Builds an ALMLoss with the networks of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchrl.data import Bounded
from torchrl.envs import EnvBase

from alm_torchrl.checks import check_integer, check_type
from alm_torchrl.networks import (
    NoiseSchedule,
    make_actor,
    make_classifier,
    make_encoder,
    make_model,
    make_qvalue,
    make_reward,
    make_stochastic_actor,
)
from alm_torchrl.networks.actors import check_bounds
from alm_torchrl.networks.builders import (
    HIDDEN_DIM,
    LATENT_DIM,
    MODEL_HIDDEN_DIM,
    LatentKind,
)
from alm_torchrl.objectives.alm import ALMLoss


def make_alm_loss(
    env: EnvBase | None = None,
    *,
    observation_dim: int | None = None,
    action_low: Tensor | Sequence[float] | None = None,
    action_high: Tensor | Sequence[float] | None = None,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    model_hidden_dim: int = MODEL_HIDDEN_DIM,
    reward_hidden_dim: int | None = None,
    noise_schedule: NoiseSchedule | None = None,
    linear_classifier: bool = False,
    latent: LatentKind = "gaussian",
    latent_layers: int = 2,
    normalize: bool = False,
    layer_norm: bool = False,
    **loss_kwargs: Any,
) -> ALMLoss:
    """Builds the six networks of the paper and the loss over them.

    Sizes come from an environment's specs or from the arguments.

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
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width of all networks but the model. Default: ``512``.
        model_hidden_dim (int): width of the latent model. Default: ``1024``.
        reward_hidden_dim (int, optional): width of the reward model. Default: ``None``,
            ``hidden_dim``.
        noise_schedule (NoiseSchedule, optional): exploration noise.
            Default: ``None``, 1.0 to 0.1 over 100,000 training steps; not used with
            ``entropy``, whose actor learns its noise.
        linear_classifier (bool): a classifier without hidden layers (Fig. 16).
            Default: ``False``.
        latent (str): kind of the latents, see :func:`~alm_torchrl.make_encoder`.
            Default: ``"gaussian"``.
        latent_layers (int): hidden layers of encoder and latent model. Default: ``2``.
        normalize (bool): normalise the observations inside the encoder; see
            :meth:`ALMLoss.observe`. Default: ``False``.
        layer_norm (bool): a LayerNorm before each activation of the networks.
            Default: ``False``.
        **loss_kwargs: arguments of :class:`~alm_torchrl.ALMLoss`; a network given
            here replaces the built one.

    Returns:
        ALMLoss: the loss, with targets equal to the online networks.

    Raises:
        ValueError: if sizes are missing, given twice, or the specs do not fit, or if
            a ``noise_schedule`` is given beside ``entropy``.
        TypeError: if ``env`` is no TorchRL environment.

    Examples:
        >>> loss = make_alm_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> loss.encoder.out_keys
        ['latent_loc', 'latent_scale', 'latent']
    """
    observation_dim, action_low, action_high = network_sizes(
        "make_alm_loss", env, observation_dim, action_low, action_high
    )
    action_dim = action_low.shape[0]
    stochastic = loss_kwargs.get("entropy") is not None
    if stochastic and noise_schedule is not None:
        raise ValueError(
            "noise_schedule: expected None with entropy, as the actor learns its "
            f"noise, got {noise_schedule}."
        )
    width: dict[str, Any] = {
        "latent_dim": latent_dim,
        "hidden_dim": hidden_dim,
        "layer_norm": layer_norm,
    }
    kind: dict[str, Any] = {"latent": latent, "hidden_layers": latent_layers}
    built: dict[str, Any] = {
        "encoder": lambda: make_encoder(
            observation_dim, normalize=normalize, **kind, **width
        ),
        "model": lambda: make_model(
            action_dim, **kind, **width | {"hidden_dim": model_hidden_dim}
        ),
        "actor": lambda: (
            make_stochastic_actor(action_low, action_high, **width)
            if stochastic
            else make_actor(
                action_low, action_high, noise_schedule=noise_schedule, **width
            )
        ),
        "qvalue": lambda: make_qvalue(action_dim, **width),
        "reward": lambda: make_reward(
            action_dim, **width | {"hidden_dim": reward_hidden_dim or hidden_dim}
        ),
        "classifier": lambda: make_classifier(
            action_dim, linear=linear_classifier, **width
        ),
    }
    parts = {name: build() for name, build in built.items() if name not in loss_kwargs}
    return ALMLoss(**parts, **loss_kwargs)


def network_sizes(
    caller: str,
    env: EnvBase | None,
    observation_dim: int | None,
    action_low: Tensor | Sequence[float] | None,
    action_high: Tensor | Sequence[float] | None,
) -> tuple[int, Tensor, Tensor]:
    """Size of the observation and copies of the action's bounds.

    The arguments and errors are those of the builder named ``caller``.

    Examples:
        >>> network_sizes("make_alm_loss", None, 3, [-1.0], [1.0])
        (3, tensor([-1.]), tensor([1.]))
    """
    given = [size is not None for size in (observation_dim, action_low, action_high)]
    if any(given) if env is not None else not all(given):
        raise ValueError(
            f"{caller} needs either env or all of observation_dim, action_low and "
            f"action_high, got env={env is not None}, observation_dim="
            f"{observation_dim}, action_low={action_low}, action_high={action_high}."
        )
    if env is not None:
        check_type("env", env, EnvBase, "make_env makes one from a Gymnasium task")
        observation_dim, action_low, action_high = _sizes(env)
    observation_dim = check_integer("observation_dim", observation_dim)
    bounds = check_bounds(action_low, action_high)  # type: ignore[arg-type]
    return observation_dim, *bounds


def _sizes(env: EnvBase) -> tuple[int, Tensor, Tensor]:
    observation = env.observation_spec.get("observation", None)
    action = env.action_spec_unbatched
    if observation is None or observation.ndim - len(env.batch_size) != 1:
        raise ValueError(
            'env must have a flat "observation" entry [*, N], got observation spec '
            f"{env.observation_spec}."
        )
    if not isinstance(action, Bounded) or action.ndim != 1:
        raise ValueError(
            f"env must have a bounded continuous action [A], got action spec {action}."
        )
    return observation.shape[-1], action.space.low, action.space.high
