"""ALM's action distribution, and how the losses draw from any distribution."""

from __future__ import annotations

from typing import cast

import torch
from tensordict.nn.distributions import Delta as TensorDictDelta
from torch import Tensor
from torch.distributions import Distribution, Normal
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import Delta, IndependentNormal

__all__ = ["ClampedNormal", "PointNormal", "draw", "is_random"]

# Distance that samples keep from the action bounds, as in the authors' code.
_MARGIN = 1e-6


class ClampedNormal(Normal):
    """Gaussian whose samples are clamped to bounds with a straight-through gradient.

    A sample is ``loc + clip(scale * eps, -noise_clip, noise_clip)`` with
    ``eps ~ N(0, 1)``, clamped to ``[low + 1e-6, high - 1e-6]``. Its gradient ignores
    the clamp, so actions at the bounds still learn (the authors' code, after DrQ-v2).

    ``mean``, ``mode`` and ``deterministic_sample`` are ``loc``, *not* clamped: in
    evaluation the environment clips. ``log_prob`` and ``entropy`` are those of the
    Gaussian before the clamp.

    Args:
        loc (Tensor): mean, ``[*, A]``.
        scale (Tensor): standard deviation, broadcastable to ``loc``.
        low (Tensor or float): lower bound of the actions. Default: ``-1.0``.
        high (Tensor or float): upper bound of the actions. Default: ``1.0``.

    Raises:
        ValueError: if shapes do not broadcast or ``loc`` is not floating-point.

    Examples:
        >>> dist = ClampedNormal(torch.tensor([0.0, 5.0]), torch.zeros(2))
        >>> dist.rsample()
        tensor([0.0000, 1.0000])
        >>> dist.deterministic_sample
        tensor([0., 5.])
    """

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        low: Tensor | float = -1.0,
        high: Tensor | float = 1.0,
    ) -> None:
        try:
            # Non-finite parameters must reach the loss, where they are reported.
            super().__init__(loc, scale, validate_args=False)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                "loc and scale: expected tensors whose shapes broadcast, got "
                f"{_describe(loc)} and {_describe(scale)}."
            ) from error
        if not self.loc.is_floating_point():
            raise ValueError(
                f"loc: expected a floating-point tensor, got {self.loc.dtype}."
            )
        self.low = self._check_bound("low", low)
        self.high = self._check_bound("high", high)

    def _check_bound(self, name: str, value: Tensor | float) -> Tensor:
        loc = self.loc
        try:
            bound = torch.as_tensor(value, dtype=loc.dtype, device=loc.device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name}: expected a tensor or number, got {value!r}."
            ) from error
        try:
            bound.expand_as(loc)
        except RuntimeError as error:
            raise ValueError(
                f"{name}: expected a shape that broadcasts to that of loc, "
                f"{list(loc.shape)}, got {list(bound.shape)}."
            ) from error
        return bound

    @property
    def deterministic_sample(self) -> Tensor:
        """The mean, without the clamp."""
        return self.loc

    def rsample(
        self,
        sample_shape: torch.Size | list[int] | tuple[int, ...] = (),
        noise_clip: float | None = None,
    ) -> Tensor:
        """Draws a clamped sample, differentiable in ``loc`` and ``scale``.

        Args:
            sample_shape (torch.Size): leading shape of the sample. Default: ``()``.
            noise_clip (float, optional): largest magnitude of ``scale * eps``;
                ``0.0`` gives the clamped mean. Default: ``None``, no clip.

        Returns:
            Tensor: sample, ``[*sample_shape, *loc.shape]``.
        """
        return self._clamp(self._draw(sample_shape, noise_clip))

    def rsample_and_log_prob(
        self,
        sample_shape: torch.Size | list[int] | tuple[int, ...] = (),
        noise_clip: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draws a clamped sample, with the log density of its value before the clamp.

        The density is the Gaussian's, as if the environment clamped; it ignores
        ``noise_clip``. That of the clamped sample would understate the entropy at the
        bounds.

        Args:
            sample_shape (torch.Size): leading shape of the sample. Default: ``()``.
            noise_clip (float, optional): as of :meth:`rsample`. Default: ``None``.

        Returns:
            tuple of Tensor: sample and log density of each of its numbers, both
            ``[*sample_shape, *loc.shape]``.

        Examples:
            >>> dist = ClampedNormal(torch.tensor([5.0]), torch.ones(1))
            >>> dist.rsample_and_log_prob(noise_clip=0.0)
            (tensor([1.0000]), tensor([-0.9189]))
        """
        drawn = self._draw(sample_shape, noise_clip)
        return self._clamp(drawn), self.log_prob(drawn)

    def _draw(
        self,
        sample_shape: torch.Size | list[int] | tuple[int, ...],
        noise_clip: float | None,
    ) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        eps = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        noise = self.scale * eps
        if noise_clip is not None:
            noise = noise.clamp(-noise_clip, noise_clip)
        return self.loc + noise

    def _clamp(self, sample: Tensor) -> Tensor:
        clamped = sample.detach().clamp(self.low + _MARGIN, self.high - _MARGIN)
        return clamped + (sample - sample.detach())

    def sample(
        self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()
    ) -> Tensor:
        """Draws a clamped sample without gradient; see :meth:`rsample`."""
        with torch.no_grad():
            return self.rsample(sample_shape)


class PointNormal(IndependentNormal):
    """Diagonal Gaussian whose samples are its mean: a latent without noise.

    Its scale serves the KL alone. Between two of the same scale that is the squared
    distance of the means over ``2 scale^2``, in nats.

    Examples:
        >>> dist = PointNormal(torch.tensor([1.0, 2.0]), torch.full((2,), 0.1))
        >>> dist.rsample()
        tensor([1., 2.])
    """

    def rsample(
        self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()
    ) -> Tensor:
        """The mean, ``[*sample_shape, *loc.shape]``, with its gradient."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return cast("Tensor", self.mean.expand(shape))

    def sample(
        self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()
    ) -> Tensor:
        """The mean without gradient; see :meth:`rsample`."""
        return self.rsample(sample_shape).detach()


def _describe(value: object) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def is_random() -> bool:
    """Whether the current exploration type asks for random draws, the default.

    Examples:
        >>> from torchrl.envs.utils import set_exploration_type
        >>> with set_exploration_type(ExplorationType.MODE):
        ...     is_random()
        False
    """
    return exploration_type() in (None, ExplorationType.RANDOM)


def draw(dist: Distribution, noise_clip: float | None = None) -> Tensor:
    """Draws with a gradient, as the current exploration type says.

    Args:
        dist (Distribution): distribution to draw from.
        noise_clip (float, optional): largest magnitude of a :class:`ClampedNormal`'s
            noise. Default: ``None``, no clip.

    Returns:
        Tensor: a reparameterised sample; outside ``ExplorationType.RANDOM`` the
        ``deterministic_sample`` (or else the mean), mean, mode or median. Those of a
        :class:`ClampedNormal` are clamped.

    Raises:
        TypeError: if samples of the distribution have no gradient.
        NotImplementedError: if the distribution lacks the statistic.

    Examples:
        >>> from torchrl.envs.utils import set_exploration_type
        >>> with set_exploration_type(ExplorationType.MEAN):
        ...     draw(Normal(torch.zeros(2), torch.ones(2)))
        tensor([0., 0.])
    """
    if isinstance(dist, ClampedNormal):
        return dist.rsample(noise_clip=noise_clip if is_random() else 0.0)
    if not (dist.has_rsample or isinstance(dist, (Delta, TensorDictDelta))):
        raise TypeError(
            "encoder, model, actor: expected distributions whose samples have a "
            f"gradient (has_rsample), got {type(dist).__name__}."
        )
    if is_random():
        return dist.rsample()
    wanted = exploration_type()
    names = {ExplorationType.DETERMINISTIC: ("deterministic_sample", "mean")}
    for name in names.get(wanted, (str(wanted),)):
        if hasattr(type(dist), name):
            return cast("Tensor", getattr(dist, name))
    raise NotImplementedError(
        f"encoder, model, actor: expected distributions with a {wanted}, the current "
        f"exploration type, got {type(dist).__name__}."
    )
