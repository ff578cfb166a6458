"""The networks of ALM as TensorDictModules, and the exploration schedule.

=============  =====================================  =================================
part           reads                                  writes
=============  =====================================  =================================
encoder        ``observation``                        ``latent_loc, latent_scale, latent``
latent model   ``latent, action``                     ``next_latent_loc,
                                                      next_latent_scale, ("next", "latent")``
actor          ``latent``                             ``action_loc, action_scale,
                                                      action_low, action_high, action``
critic         ``latent, action``                     ``state_action_value`` ``[*, 2]``
reward         ``latent, action``                     ``predicted_reward`` ``[*, 1]``
classifier     ``latent, action, ("next", "latent")`` ``logits`` ``[*, 2]``
=============  =====================================  =================================

Sizes, activations, bounds and initialisation are those of the paper's appendix D
and the authors' code. Each part is an ordinary TensorDictModule: any of them can be
replaced by a module with the same keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    set_interaction_type,
)
from torch import Tensor, nn
from torchrl.modules import IndependentNormal

from alm_torchrl.distributions import ClampedNormal
from alm_torchrl.functional import bound_loc, bound_scale

__all__ = [
    "AlwaysSample",
    "NoiseSchedule",
    "OrthogonalLinear",
    "make_actor",
    "make_classifier",
    "make_encoder",
    "make_model",
    "make_qvalue",
    "make_reward",
]

LATENT_DIM = 50
HIDDEN_DIM = 512
MODEL_HIDDEN_DIM = 1024


class OrthogonalLinear(nn.Linear):
    """Linear layer that resets to orthogonal weights (gain 1) and zero bias.

    Examples:
        >>> layer = OrthogonalLinear(3, 3)
        >>> torch.allclose(layer.weight @ layer.weight.T, torch.eye(3), atol=1e-5)
        True
    """

    def reset_parameters(self) -> None:
        """Draws new orthogonal weights and sets the bias to zero."""
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class NoiseSchedule(nn.Module):
    """Standard deviation of the exploration noise, linear in the training step.

    ``std(n) = final + (1 - min(n / steps, 1)) (initial - final)`` after ``n`` calls
    of :meth:`step`. One instance lives in the actor, which the loss and the acting
    policy share; only the trainer steps it. Action ``n`` uses ``std(n - 1)``, update
    ``n`` uses ``std(n)``.

    Args:
        initial (float): standard deviation at step 0. Default: ``1.0``.
        final (float): standard deviation from ``steps`` on. Default: ``0.1``.
        steps (int): training steps, warm-up excluded, to get there.
            Default: ``100_000``.

    Raises:
        ValueError: if a standard deviation is negative or ``steps`` is not positive.

    Examples:
        >>> schedule = NoiseSchedule(1.0, 0.0, steps=4)
        >>> schedule.step()
        >>> schedule.std
        tensor(0.7500)
    """

    std: Tensor
    count: Tensor

    def __init__(
        self, initial: float = 1.0, final: float = 0.1, steps: int = 100_000
    ) -> None:
        super().__init__()
        if initial < 0 or final < 0:
            raise ValueError(
                "initial and final must be standard deviations >= 0, got "
                f"initial={initial} and final={final}."
            )
        if steps < 1:
            raise ValueError(f"steps must be a positive integer, got {steps}.")
        self.initial = initial
        self.final = final
        self.steps = steps
        self.register_buffer("std", torch.tensor(float(initial)))
        self.register_buffer("count", torch.tensor(0))

    def step(self, n: int = 1) -> None:
        """Advances the schedule by ``n`` training steps, in place."""
        self.count.add_(n)
        left = 1 - (self.count.double() / self.steps).clamp(max=1.0)
        self.std.copy_(self.final + left * (self.initial - self.final))

    def extra_repr(self) -> str:
        """Arguments of the schedule."""
        return f"initial={self.initial}, final={self.final}, steps={self.steps}"


class AlwaysSample(TensorDictModuleBase):
    """Runs a probabilistic module in random mode, whatever surrounds it.

    ALM samples the latent when it acts, in evaluation too; only the action becomes
    deterministic there.

    Args:
        module (TensorDictModuleBase): module to run, for example the encoder.

    Examples:
        >>> from tensordict import TensorDict
        >>> policy = AlwaysSample(make_encoder(3, latent_dim=2))
        >>> td = TensorDict(observation=torch.zeros(3))
        >>> with set_interaction_type(InteractionType.DETERMINISTIC):
        ...     bool((policy(td)["latent"] == td["latent_loc"]).any())
        False
    """

    def __init__(self, module: TensorDictModuleBase) -> None:
        super().__init__()
        self.module = module
        self.in_keys = module.in_keys
        self.out_keys = module.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Calls the module with samples drawn at random."""
        with set_interaction_type(InteractionType.RANDOM):
            return self.module(tensordict)


class _Concatenate(nn.Module):
    """Concatenates its inputs along the last dimension."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0]


class _GaussianHead(nn.Module):
    """Splits features into a bounded mean and a bounded standard deviation."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = features.chunk(2, -1)
        return bound_loc(loc), bound_scale(raw)


class _ActorHead(nn.Module):
    """Squashes the mean and adds the schedule's std and the action bounds."""

    def __init__(self, low: Tensor, high: Tensor, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loc = features.tanh()
        # A copy: what is written must not change with the schedule.
        scale = self.schedule.std * torch.ones_like(loc)
        return loc, scale, self.low.expand_as(loc), self.high.expand_as(loc)


class _TwinCritic(nn.Module):
    """Two value networks that read the same input; their outputs are stacked last."""

    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.q1 = _value_mlp(in_dim, hidden_dim, 1)
        self.q2 = _value_mlp(in_dim, hidden_dim, 1)

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return torch.cat([self.q1(latent, action), self.q2(latent, action)], -1)


class _Chain(nn.Sequential):
    """Sequential whose first layer takes any number of inputs."""

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        output = self[0](*inputs)
        for layer in self[1:]:
            output = layer(output)
        return output


def _elu_mlp(in_dim: int, hidden_dim: int, out_dim: int, *head: nn.Module) -> _Chain:
    return _Chain(
        _Concatenate(),
        OrthogonalLinear(in_dim, hidden_dim),
        nn.ELU(),
        OrthogonalLinear(hidden_dim, hidden_dim),
        nn.ELU(),
        OrthogonalLinear(hidden_dim, out_dim),
        *head,
    )


def _value_mlp(in_dim: int, hidden_dim: int, out_dim: int) -> _Chain:
    return _Chain(
        _Concatenate(),
        OrthogonalLinear(in_dim, hidden_dim),
        nn.LayerNorm(hidden_dim),
        nn.Tanh(),
        OrthogonalLinear(hidden_dim, hidden_dim),
        nn.ELU(),
        OrthogonalLinear(hidden_dim, out_dim),
    )


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size}.")


def _gaussian(
    net: nn.Module,
    in_keys: Sequence[NestedKey],
    prefix: str,
    out_key: NestedKey,
) -> ProbabilisticTensorDictSequential:
    loc, scale = f"{prefix}_loc", f"{prefix}_scale"
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, in_keys=list(in_keys), out_keys=[loc, scale]),
        ProbabilisticTensorDictModule(
            in_keys={"loc": loc, "scale": scale},
            out_keys=[out_key],
            distribution_class=IndependentNormal,
            # Non-finite parameters must reach the loss, where they are reported.
            distribution_kwargs={"validate_args": False},
            default_interaction_type=InteractionType.RANDOM,
        ),
    )


def make_encoder(
    observation_dim: int,
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    observation_key: NestedKey = "observation",
) -> ProbabilisticTensorDictSequential:
    """Builds the stochastic encoder ``e(z | s)``: a diagonal Gaussian over latents.

    Two ELU layers; mean bounded to (-30, 30), standard deviation to about [0.1, 10].

    Args:
        observation_dim (int): size of the flat observation.
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
        >>> encoder(TensorDict(observation=torch.zeros(4, 3), batch_size=[4]))["latent"].shape
        torch.Size([4, 2])
    """
    _check_sizes(
        observation_dim=observation_dim, latent_dim=latent_dim, hidden_dim=hidden_dim
    )
    net = _elu_mlp(observation_dim, hidden_dim, 2 * latent_dim, _GaussianHead())
    return _gaussian(net, [observation_key], "latent", "latent")


def make_model(
    action_dim: int,
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = MODEL_HIDDEN_DIM,
) -> ProbabilisticTensorDictSequential:
    """Builds the latent model ``m(z' | z, a)``: a diagonal Gaussian like the encoder's.

    Args:
        action_dim (int): size of the action.
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width of both hidden layers. Default: ``1024``.

    Returns:
        ProbabilisticTensorDictSequential: reads ``latent`` and ``action``, writes
        ``next_latent_loc``, ``next_latent_scale`` and ``("next", "latent")``.

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> model = make_model(1, latent_dim=2, hidden_dim=8)
        >>> model.out_keys[-1]
        ('next', 'latent')
    """
    _check_sizes(action_dim=action_dim, latent_dim=latent_dim, hidden_dim=hidden_dim)
    net = _elu_mlp(
        latent_dim + action_dim, hidden_dim, 2 * latent_dim, _GaussianHead()
    )
    return _gaussian(net, ["latent", "action"], "next_latent", ("next", "latent"))


def make_actor(
    action_low: Tensor | Sequence[float],
    action_high: Tensor | Sequence[float],
    *,
    latent_dim: int = LATENT_DIM,
    hidden_dim: int = HIDDEN_DIM,
    noise_schedule: NoiseSchedule | None = None,
) -> ProbabilisticTensorDictSequential:
    """Builds the actor ``pi(a | z)``: tanh mean, scheduled noise, clamp to the bounds.

    The mean lies in (-1, 1) whatever the bounds are; narrower bounds are met by the
    clamp of :class:`~alm_torchrl.distributions.ClampedNormal`, wider ones are never
    reached (rescale the environment's actions instead).

    Args:
        action_low (Tensor or sequence of float): lower bounds, ``[A]``.
        action_high (Tensor or sequence of float): upper bounds, ``[A]``.
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width of both hidden layers. Default: ``512``.
        noise_schedule (NoiseSchedule, optional): standard deviation of the noise.
            Default: ``None``, a new ``NoiseSchedule()``.

    Returns:
        ProbabilisticTensorDictSequential: reads ``latent``, writes ``action``
        ``[*, A]`` and its parameters.

    Raises:
        ValueError: if the bounds are not two finite vectors with ``low < high``, or
            a size is not positive.

    Examples:
        >>> actor = make_actor([-0.4], [0.4], latent_dim=2, hidden_dim=8)
        >>> from tensordict import TensorDict
        >>> td = actor(TensorDict(latent=torch.zeros(5, 2), batch_size=[5]))
        >>> bool((td["action"].abs() <= 0.4).all())
        True
    """
    low = torch.as_tensor(action_low, dtype=torch.get_default_dtype()).clone()
    high = torch.as_tensor(action_high, dtype=torch.get_default_dtype()).clone()
    if low.ndim != 1 or low.shape != high.shape:
        raise ValueError(
            "action_low and action_high must be vectors of the same size, got shapes "
            f"{tuple(low.shape)} and {tuple(high.shape)}."
        )
    if not bool((torch.isfinite(low) & torch.isfinite(high) & (low < high)).all()):
        raise ValueError(
            "action_low and action_high must be finite with low < high, got "
            f"{low.tolist()} and {high.tolist()}."
        )
    _check_sizes(
        action_dim=low.shape[0], latent_dim=latent_dim, hidden_dim=hidden_dim
    )
    schedule = NoiseSchedule() if noise_schedule is None else noise_schedule
    net = _elu_mlp(
        latent_dim, hidden_dim, low.shape[0], _ActorHead(low, high, schedule)
    )
    names = ("loc", "scale", "low", "high")
    return ProbabilisticTensorDictSequential(
        TensorDictModule(
            net, in_keys=["latent"], out_keys=[f"action_{name}" for name in names]
        ),
        ProbabilisticTensorDictModule(
            in_keys={name: f"action_{name}" for name in names},
            out_keys=["action"],
            distribution_class=ClampedNormal,
            default_interaction_type=InteractionType.RANDOM,
        ),
    )


def make_qvalue(
    action_dim: int, *, latent_dim: int = LATENT_DIM, hidden_dim: int = HIDDEN_DIM
) -> TensorDictModule:
    """Builds the twin critic ``Q1, Q2 (z, a)``.

    Args:
        action_dim (int): size of the action.
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width of the hidden layers (LayerNorm and tanh, then ELU).
            Default: ``512``.

    Returns:
        TensorDictModule: writes ``state_action_value`` ``[*, 2]``, one entry for each
        critic. A module of the caller's may have any number of critics there.

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> make_qvalue(1, latent_dim=2, hidden_dim=8).out_keys
        ['state_action_value']
    """
    _check_sizes(action_dim=action_dim, latent_dim=latent_dim, hidden_dim=hidden_dim)
    return TensorDictModule(
        _TwinCritic(latent_dim + action_dim, hidden_dim),
        in_keys=["latent", "action"],
        out_keys=["state_action_value"],
    )


def make_reward(
    action_dim: int, *, latent_dim: int = LATENT_DIM, hidden_dim: int = HIDDEN_DIM
) -> TensorDictModule:
    """Builds the reward model ``r(z, a)`` (Eq. 11).

    Args:
        action_dim (int): size of the action.
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width of the hidden layers (LayerNorm and tanh, then ELU).
            Default: ``512``.

    Returns:
        TensorDictModule: writes ``predicted_reward`` ``[*, 1]``.

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> make_reward(1, latent_dim=2, hidden_dim=8).out_keys
        ['predicted_reward']
    """
    _check_sizes(action_dim=action_dim, latent_dim=latent_dim, hidden_dim=hidden_dim)
    return TensorDictModule(
        _value_mlp(latent_dim + action_dim, hidden_dim, 1),
        in_keys=["latent", "action"],
        out_keys=["predicted_reward"],
    )


def make_classifier(
    action_dim: int, *, latent_dim: int = LATENT_DIM, hidden_dim: int = HIDDEN_DIM
) -> TensorDictModule:
    """Builds the classifier ``C(z, a, z')`` of real against imagined latents (Eq. 9).

    Args:
        action_dim (int): size of the action.
        latent_dim (int): size of the latent, L. Default: ``50``.
        hidden_dim (int): width of the hidden layers (LayerNorm and tanh, then ELU).
            Default: ``512``.

    Returns:
        TensorDictModule: writes ``logits`` ``[*, 2]``; index 1 is "from the encoder".

    Raises:
        ValueError: if a size is not positive.

    Examples:
        >>> make_classifier(1, latent_dim=2, hidden_dim=8).out_keys
        ['logits']
    """
    _check_sizes(action_dim=action_dim, latent_dim=latent_dim, hidden_dim=hidden_dim)
    return TensorDictModule(
        _value_mlp(2 * latent_dim + action_dim, hidden_dim, 2),
        in_keys=["latent", "action", ("next", "latent")],
        out_keys=["logits"],
    )
