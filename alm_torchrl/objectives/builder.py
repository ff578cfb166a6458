"""Builds an ALMLoss with the networks of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from tensordict import NestedKey
from torch import Tensor
from torchrl.data import Bounded, Composite, TensorSpec
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
    listed,
)
from alm_torchrl.objectives.alm import ALMLoss

T = TypeVar("T")


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
    observation_key: NestedKey | list[NestedKey] = "observation",
    latent_key: NestedKey = "latent",
    action_key: NestedKey | None = None,
    reward_key: NestedKey | None = None,
    terminated_key: NestedKey | None = None,
    **loss_kwargs: Any,
) -> ALMLoss:
    """Builds the six networks of the paper and the loss over them.

    Sizes come from an environment's specs or from the arguments. Only those are needed
    that no given network answers: with an ``encoder`` of yours, observations may be
    anything that it reads.

    Args:
        env (EnvBase, optional): environment with flat observations and a bounded
            action. Default: ``None``.

    Keyword Args:
        observation_dim (int, optional): size of the observation, without ``env``; of
            several entries, the sum of their sizes. Default: ``None``.
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
        observation_key (NestedKey or list of NestedKey): entry that the encoder
            reads, or several. Default: ``"observation"``.
        latent_key (NestedKey): entry of the latent. Default: ``"latent"``.
        action_key (NestedKey, optional): entry of the action. Default: ``None``, that
            of ``env``, or ``"action"`` without it.
        reward_key (NestedKey, optional): entry of the reward, under ``"next"``,
            likewise.
        terminated_key (NestedKey, optional): entry of the termination, likewise.
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
    keys: dict[str, Any] = {
        "latent_key": latent_key,
        "action_key": action_key or _env_key(env, "action"),
    }
    sizes = NetworkSizes(
        *("make_alm_loss", env, observation_dim, action_low, action_high),
        observation_key=observation_key,
        action_key=keys["action_key"],
    )
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
    heads = width | keys
    kind: dict[str, Any] = {"latent": latent, "hidden_layers": latent_layers}
    built: dict[str, Any] = {
        "encoder": lambda: make_encoder(
            sizes.observation_dim(),
            normalize=normalize,
            observation_key=observation_key,
            latent_key=latent_key,
            **kind,
            **width,
        ),
        "model": lambda: make_model(
            sizes.action_dim(), **kind, **heads | {"hidden_dim": model_hidden_dim}
        ),
        "actor": lambda: (
            make_stochastic_actor(*sizes.action_bounds(), **heads)
            if stochastic
            else make_actor(
                *sizes.action_bounds(), noise_schedule=noise_schedule, **heads
            )
        ),
        "qvalue": lambda: make_qvalue(sizes.action_dim(), **heads),
        "reward": lambda: make_reward(
            sizes.action_dim(),
            **heads | {"hidden_dim": reward_hidden_dim or hidden_dim},
        ),
        "classifier": lambda: make_classifier(
            sizes.action_dim(), linear=linear_classifier, **heads
        ),
    }
    parts = {name: build() for name, build in built.items() if name not in loss_kwargs}
    loss = ALMLoss(**parts, **loss_kwargs)
    loss.set_keys(
        latent=latent_key,
        action=keys["action_key"],
        reward=reward_key or _env_key(env, "reward"),
        terminated=terminated_key or _env_key(env, "terminated"),
    )
    return loss


class NetworkSizes:
    """Sizes that networks need, of an environment or from arguments.

    Each is looked up where it is asked for, so what is not needed may be missing. The
    arguments and errors are those of the builder named ``caller``.

    Examples:
        >>> sizes = NetworkSizes("make_alm_loss", None, None, [-1.0], [1.0])
        >>> sizes.action_dim(), sizes.action_bounds()
        (1, (tensor([-1.]), tensor([1.])))
    """

    def __init__(
        self,
        caller: str,
        env: EnvBase | None,
        observation_dim: int | None,
        action_low: Tensor | Sequence[float] | None,
        action_high: Tensor | Sequence[float] | None,
        *,
        observation_key: NestedKey | list[NestedKey] = "observation",
        action_key: NestedKey = "action",
    ) -> None:
        given = (observation_dim, action_low, action_high)
        self._message = (
            f"{caller} needs either env or all of observation_dim, action_low and "
            f"action_high, got env={env is not None}, observation_dim="
            f"{observation_dim}, action_low={action_low}, action_high={action_high}."
        )
        if env is not None and any(size is not None for size in given):
            raise ValueError(self._message)
        self._env = env
        self._observation_dim = observation_dim
        self._bounds = (action_low, action_high)
        self._observation_keys = listed(observation_key)
        self._action_key = action_key

    def observation_dim(self) -> int:
        """Size of the observation; of several entries, the sum of their sizes."""
        if self._env is None:
            return check_integer("observation_dim", self._given(self._observation_dim))
        spec = self._env.observation_spec_unbatched
        entries = [spec.get(key, None) for key in self._observation_keys]
        if any(entry is None or entry.ndim != 1 for entry in entries):
            raise ValueError(
                "observation_key: expected flat entries [N] of env (or give an "
                f"encoder), got {self._observation_keys} of {_shapes(spec)}."
            )
        return sum(entry.shape[-1] for entry in entries)

    def action_bounds(self) -> tuple[Tensor, Tensor]:
        """Copies of the smallest and the largest action, ``[A]`` each."""
        if self._env is None:
            low, high = map(self._given, self._bounds)
            return check_bounds(low, high)  # type: ignore[arg-type]
        spec = self._action_spec()
        if not isinstance(spec, Bounded):
            raise ValueError(
                "env must have a bounded continuous action [A] (or give an actor), got "
                f"{type(spec).__name__}."
            )
        return check_bounds(spec.space.low, spec.space.high)

    def action_dim(self) -> int:
        """Size of the action."""
        if self._env is None:
            return self.action_bounds()[0].shape[0]
        return self._action_spec().shape[-1]

    def _action_spec(self) -> TensorSpec:
        assert self._env is not None
        actions = self._env.full_action_spec_unbatched
        spec = actions.get(self._action_key, None)
        if spec is None or spec.ndim != 1 or not spec.dtype.is_floating_point:
            raise ValueError(
                f"action_key: expected a continuous action [A] of env, got "
                f"{self._action_key!r} of {_shapes(actions)}."
            )
        return spec

    def _given(self, size: T | None) -> T:
        if size is None:
            raise ValueError(self._message)
        return size


def _env_key(env: EnvBase | None, name: str) -> NestedKey:
    """The entry of an environment's action, reward or termination."""
    if env is None:
        return name
    check_type("env", env, EnvBase, "make_env makes one from a Gymnasium task")
    if name == "terminated":
        names = [
            (key, key if isinstance(key, str) else key[-1]) for key in env.done_keys
        ]
        found = [key for key, last in names if last == name]
    else:
        found = env.action_keys if name == "action" else env.reward_keys
    if len(found) != 1:
        raise ValueError(f"{name}_key: expected one of {found}, got None.")
    return found[0]


def _shapes(spec: Composite) -> dict[NestedKey, list[int]]:
    return {key: list(leaf.shape) for key, leaf in spec.items(True, True)}
