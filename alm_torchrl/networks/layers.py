"""Layers, heads, the noise schedule, and a wrapper that always samples."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    InteractionType,
    TensorDictModuleBase,
    set_interaction_type,
)
from torch import Tensor, nn

from alm_torchrl.checks import check_integer, check_number
from alm_torchrl.functional import bound_loc, bound_scale

__all__ = ["AlwaysSample", "NoiseSchedule", "OrthogonalLinear", "OutputLinear"]


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


class OutputLinear(OrthogonalLinear):
    """Last layer of a network, which keeps full precision under autocast.

    Means, standard deviations, values, rewards and logits have the precision of the
    parameters, and so has everything computed from them.

    Examples:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     OutputLinear(2, 1)(torch.zeros(1, 2)).dtype
        torch.float32
    """

    def forward(self, input: Tensor) -> Tensor:
        """Applies the layer outside any autocast."""
        if not torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


class NoiseSchedule(nn.Module):
    """Standard deviation of the exploration noise, linear in the training step.

    ``std(n) = final + (1 - min(n / steps, 1)) (initial - final)`` after ``n`` calls
    of :meth:`step`. The actor holds one, which the loss and the acting policy share;
    only the stepper advances it. Action ``n`` uses ``std(n - 1)``, update ``n`` uses
    ``std(n)``.

    Args:
        initial (float): standard deviation at step 0. Default: ``1.0``.
        final (float): standard deviation from ``steps`` on. Default: ``0.1``.
        steps (int): training steps until ``final``, warm-up excluded.
            Default: ``100_000``.

    Raises:
        ValueError: if a number is out of range.

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
        self.initial = check_number("initial", initial)
        self.final = check_number("final", final)
        self.steps = check_integer("steps", steps)
        self.register_buffer("std", torch.tensor(self.initial))
        self.register_buffer("count", torch.tensor(0))

    def step(self, n: int = 1) -> None:
        """Advances the schedule in place.

        Args:
            n (int): training steps. Default: ``1``.
        """
        self.count.add_(n)
        left = 1 - (self.count.double() / self.steps).clamp(max=1.0)
        self.std.copy_(self.final + left * (self.initial - self.final))

    def extra_repr(self) -> str:
        """Arguments of the schedule."""
        return f"initial={self.initial}, final={self.final}, steps={self.steps}"


class AlwaysSample(TensorDictModuleBase):
    """Runs a probabilistic module in random mode under any exploration type.

    ALM samples the latent whenever it acts; in evaluation only the action is
    deterministic.

    Args:
        module (TensorDictModuleBase): module to run, for example the encoder.

    Examples:
        >>> from tensordict import TensorDict
        >>> from alm_torchrl import make_encoder
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


class GaussianHead(nn.Module):
    """Splits features into a bounded mean and a bounded standard deviation."""

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        loc, raw = features.chunk(2, -1)
        return bound_loc(loc), bound_scale(raw)


class FixedScale(nn.Module):
    """Returns its inputs, concatenated, as the mean, and a constant deviation."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        loc = _concatenated(inputs)
        return loc, self.scale.expand_as(loc)


class SimNorm(nn.Module):
    """Softmax within each group of 8 features: latents on a product of simplices.

    Source: Hansen et al., "TD-MPC2", https://arxiv.org/abs/2310.16828, Eq. 5.

    Examples:
        >>> SimNorm()(torch.zeros(16)).sum()
        tensor(2.)
    """

    group = 8

    def forward(self, features: Tensor) -> Tensor:
        """Positive numbers that sum to 1 in each group, shape of ``features``."""
        return features.unflatten(-1, (-1, self.group)).softmax(-1).flatten(-2)


class ActorHead(nn.Module):
    """Returns a squashed mean, a standard deviation and the action bounds.

    The standard deviation is the schedule's; without a schedule it is learned, from
    the second half of the features.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, low: Tensor, high: Tensor, schedule: NoiseSchedule | None
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.schedule is None:
            features, raw = features.chunk(2, -1)
            scale = bound_scale(raw, math.exp(-5), math.exp(2))
        else:
            # A copy: what is written must not change with the schedule.
            scale = self.schedule.std * torch.ones_like(features)
        loc = features.tanh()
        return loc, scale, self.low.expand_as(loc), self.high.expand_as(loc)


class TwinCritic(nn.Module):
    """Two value networks that read the same input; their outputs are stacked last."""

    def __init__(self, in_dim: int, hidden_dim: int, *, layer_norm: bool) -> None:
        super().__init__()
        self.q1 = make_value_mlp(in_dim, hidden_dim, 1, layer_norm=layer_norm)
        self.q2 = make_value_mlp(in_dim, hidden_dim, 1, layer_norm=layer_norm)

    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return torch.cat([self.q1(latent, action), self.q2(latent, action)], -1)


class MLP(nn.Sequential):
    """Sequential that concatenates its inputs first."""

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        output = _concatenated(inputs)
        for layer in self:
            output = layer(output)
        return output


def make_elu_mlp(
    in_dim: int,
    hidden_dim: int,
    out_dim: int,
    *head: nn.Module,
    hidden_layers: int = 2,
    layer_norm: bool = False,
) -> MLP:
    sizes = [in_dim, *[hidden_dim] * hidden_layers]
    hidden = [
        layer
        for pair in pairwise(sizes)
        for layer in _hidden(*pair, nn.ELU(inplace=True), layer_norm)
    ]
    return MLP(*hidden, OutputLinear(hidden_dim, out_dim), *head)


def make_value_mlp(
    in_dim: int, hidden_dim: int, out_dim: int, *, layer_norm: bool = False
) -> MLP:
    """The first hidden layer is normalised anyway, the second with ``layer_norm``."""
    return MLP(
        *_hidden(in_dim, hidden_dim, nn.Tanh(), True),
        *_hidden(hidden_dim, hidden_dim, nn.ELU(inplace=True), layer_norm),
        OutputLinear(hidden_dim, out_dim),
    )


def _concatenated(inputs: tuple[Tensor, ...]) -> Tensor:
    return torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0]


def _hidden(
    in_dim: int, out_dim: int, activation: nn.Module, layer_norm: bool
) -> list[nn.Module]:
    norm = [nn.LayerNorm(out_dim)] if layer_norm else []
    return [OrthogonalLinear(in_dim, out_dim), *norm, activation]
