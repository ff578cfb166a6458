"""How critics learn: exchangeable parts of :class:`~alm_torchrl.ALMLoss`.

- ``critic_target``: :class:`TDTarget`, of one or more steps
- ``value_head``: :class:`SquaredError` (Eq. 10), :class:`HuberError`, :class:`HLGauss`
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import huber_loss

from alm_torchrl import functional
from alm_torchrl.checks import LARGEST_FLOAT, check_integer, check_number
from alm_torchrl.objectives.batch import (
    Rows,
    read_column,
    read_entry,
    read_lookahead,
)
from alm_torchrl.objectives.latents import Encoding
from alm_torchrl.objectives.rollouts import policy_value

if TYPE_CHECKING:
    from alm_torchrl.objectives.alm import ALMLoss

__all__ = ["HLGauss", "HuberError", "SquaredError", "TDTarget", "ValueHead"]


class TDTarget:
    """The critics' target, of n recorded steps and the target critics' value.

    ``y = sum_{i<m} gamma^i R_i + gamma^m (1 - terminated) V'(s_m)`` with

    ``V'(s) = mean_j Q'_j(z, pi(z)) - pessimism (mean_j Q'_j - min_j Q'_j)``

    and ``z ~ e'(s)``. Of the n steps, m come before the episode's end, a time limit or
    the end of what was recorded; there the value takes over. R is the reward after
    ``reward_transform``. With an entropy bonus V' contains it; the rewards do not.
    One step and a pessimism of 1 are the paper's (Eq. 10).

    With two critics V' is ``mean - pessimism (max - min) / 2``. Sources: n steps
    without correction as in Rainbow (https://arxiv.org/abs/1710.02298), noise as in TD3
    (https://arxiv.org/abs/1802.09477).

    More than one step need batches of ``make_replay_buffer(..., n_step=n)``, or plain
    slices ``[B, K]``, whose last steps then have shorter targets.

    Keyword Args:
        n_step (int): steps, n. Default: ``1``.
        pessimism (float): weight of the critics' disagreement: 1 takes the smallest
            value, 0 their mean. Default: ``1.0``.
        noise_std (float, optional): standard deviation of the target action's noise, in
            the units of the action, for an actor with a
            :class:`~alm_torchrl.ClampedNormal`. Not used with an entropy bonus.
            Default: ``None``, the actor's own noise and the loss's ``noise_clip``.
        noise_clip (float): clip of the noise of ``noise_std``. Default: ``0.3``.

    Raises:
        ValueError: if a number is out of range.

    Examples:
        >>> TDTarget(n_step=3, pessimism=0.5)
        TDTarget(n_step=3, pessimism=0.5, noise_std=None, noise_clip=0.3)
    """

    def __init__(
        self,
        *,
        n_step: int = 1,
        pessimism: float = 1.0,
        noise_std: float | None = None,
        noise_clip: float = 0.3,
    ) -> None:
        self.n_step = check_integer("n_step", n_step)
        self.pessimism = check_number("pessimism", pessimism)
        if noise_std is not None:
            noise_std = check_number("noise_std", noise_std)
        self.noise_std = noise_std
        self.noise_clip = check_number("noise_clip", noise_clip)

    def __call__(
        self, loss: ALMLoss, transitions: TensorDictBase, encoded: Encoding | None
    ) -> Tensor:
        """Target ``[*]`` for transitions ``[*]``; one step reads ``encoded``."""
        if self.n_step == 1:
            following = read_entry(transitions, "next")
            dist = loss.latents.encode(following) if encoded is None else encoded.next
            value = self.value(loss, dist)
            reward, discount = _reward_and_discount(loss, transitions, value)
            return functional.td_target(reward, discount, value)
        steps, mask = read_lookahead(loss, transitions, self.n_step)
        # The last step that counts is repeated up to the last column.
        dist = loss.latents.encode(read_entry(steps, "next")[..., -1])
        value = self.value(loss, dist)
        reward, discount = _reward_and_discount(loss, steps, value)
        return functional.n_step_target(reward, discount, value, mask)

    def value(self, loss: ALMLoss, dist: Distribution) -> Tensor:
        """Value ``[*]`` of the target critics at latents drawn from ``dist``."""
        noise = None
        if self.noise_std is not None:
            noise = self.noise_std, self.noise_clip
        return policy_value(
            loss,
            loss.latents.sample(dist),
            "frozen",
            "target",
            pessimism=self.pessimism,
            noise=noise,
        )

    def __repr__(self) -> str:
        names = ("n_step", "pessimism", "noise_std", "noise_clip")
        listed = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"TDTarget({listed})"


def read_target(loss: ALMLoss, rows: Rows, encoded: Encoding | None) -> Tensor:
    """The critics' target for transitions of a batch, flattened to ``[N]``."""
    # Only slices that are not flattened show what follows a transition.
    one_step = loss.critic_target.n_step == 1
    starts = rows.data if one_step else rows.data.reshape(rows.shape)
    return loss.td_target(starts, encoded).reshape(-1)


def _reward_and_discount(
    loss: ALMLoss, rows: TensorDictBase, like: Tensor
) -> tuple[Tensor, Tensor]:
    reward = loss.recorded_reward(rows, like)
    following = read_entry(rows, "next")
    terminated = read_column(following, loss.tensor_keys.terminated, like)
    return reward, loss.gamma * (1 - terminated.to(like.dtype))


class ValueHead(Protocol):
    """How values are read from what the critics write, and how that is learned."""

    def values(self, output: Tensor) -> Tensor:
        """Values ``[*, N]`` of N critics from their output."""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of each critic, ``[*, N]``, for targets ``[*]``."""


class SquaredError:
    """Critics write values ``[*, N]`` and learn by the squared error (Eq. 10).

    Examples:
        >>> SquaredError().loss(torch.tensor([[1.0, 3.0]]), torch.tensor([2.0]))
        tensor([[1., 1.]])
    """

    def values(self, output: Tensor) -> Tensor:
        """The output itself, ``[*, N]``."""
        return output

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """``(Q_i - y)^2``, ``[*, N]``, for targets ``[*]``."""
        return (output - target.unsqueeze(-1)).square()

    def __repr__(self) -> str:
        return "SquaredError()"


class HuberError:
    """Critics write values ``[*, N]`` and learn by Huber's loss.

    ``(Q_i - y)^2 / 2`` where ``|Q_i - y| <= delta``, else
    ``delta (|Q_i - y| - delta / 2)``: a large error pulls no harder. MR.Q learns its
    critics so (https://arxiv.org/abs/2501.16142), with rewards of magnitude 1.

    Args:
        delta (float): error from which on the loss is linear, above 0.
            Default: ``1.0``.

    Raises:
        ValueError: if ``delta`` is out of range.

    Examples:
        >>> HuberError().loss(torch.tensor([[1.5, 4.0]]), torch.tensor([2.0]))
        tensor([[0.1250, 1.5000]])
    """

    def __init__(self, delta: float = 1.0) -> None:
        self.delta = check_number("delta", delta, open_low=True)

    def values(self, output: Tensor) -> Tensor:
        """The output itself, ``[*, N]``."""
        return output

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Huber's loss of each critic, ``[*, N]``, for targets ``[*]``."""
        wanted = target.unsqueeze(-1).expand_as(output)
        return huber_loss(output, wanted, reduction="none", delta=self.delta)

    def __repr__(self) -> str:
        return f"HuberError({self.delta:g})"


class HLGauss(nn.Module):
    """Critics write a histogram over values and learn it by cross entropy.

    ``Q = sum_b p_b c_b`` with ``p = softmax(logits)`` over bins of equal width with
    centres ``c_1 = low`` to ``c_M = high``. The target's histogram is a Gaussian around
    ``y``, clamped to ``[low, high]``, of standard deviation ``sigma_ratio`` times the
    width: the mass in each bin, normalised. The loss is ``- sum_b h_b(y) log p_b``.
    Source: Farebrother et al., "Stop Regressing: Training Value Functions via
    Classification for Scalable Deep RL", https://arxiv.org/abs/2403.03950.

    The critics write the logits of one critic after the other, ``[*, N bins]``. Values
    outside of the range cannot be told from its ends: choose it for the returns, or
    scale the rewards.

    Args:
        low (float): centre of the first bin.
        high (float): centre of the last bin.

    Keyword Args:
        bins (int): number of bins, M, at least 2. Default: ``101``.
        sigma_ratio (float): standard deviation in bins. Default: ``0.75``, the paper's.

    Raises:
        ValueError: if a number is out of range.

    Examples:
        >>> head = HLGauss(-1.0, 1.0, bins=3)
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 99.0]])
        >>> head.values(logits)
        tensor([[0., 1.]])
    """

    centers: Tensor
    edges: Tensor

    def __init__(
        self, low: float, high: float, *, bins: int = 101, sigma_ratio: float = 0.75
    ) -> None:
        super().__init__()
        self.low = check_number("low", low, -LARGEST_FLOAT)
        self.high = check_number("high", high, self.low, open_low=True)
        self.bins = check_integer("bins", bins, 2)
        sigma_ratio = check_number("sigma_ratio", sigma_ratio, open_low=True)
        width = (self.high - self.low) / (self.bins - 1)
        self.sigma = sigma_ratio * width
        half = width / 2
        self.register_buffer(
            "centers", torch.linspace(self.low, self.high, self.bins), persistent=False
        )
        self.register_buffer(
            "edges",
            torch.linspace(self.low - half, self.high + half, self.bins + 1),
            persistent=False,
        )

    def values(self, output: Tensor) -> Tensor:
        """Expectations ``[*, N]`` from logits ``[*, N bins]``."""
        return (self._logits(output).softmax(-1) * self.centers).sum(-1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross entropy of each critic, ``[*, N]``, for targets ``[*]``."""
        wanted = self.histogram(target).unsqueeze(-2)
        return -(wanted * self._logits(output).log_softmax(-1)).sum(-1)

    def histogram(self, target: Tensor) -> Tensor:
        """The target's histogram, ``[*, bins]``, for targets ``[*]``."""
        distance = self.edges - target.clamp(self.low, self.high).unsqueeze(-1)
        below = torch.erf(distance / (math.sqrt(2) * self.sigma))
        mass = below.diff(dim=-1)
        return mass / mass.sum(-1, keepdim=True)

    def _logits(self, output: Tensor) -> Tensor:
        if output.shape[-1] % self.bins:
            raise ValueError(
                f"qvalue: expected logits [*, N * {self.bins}], got shape "
                f"{list(output.shape)}."
            )
        return output.unflatten(-1, (-1, self.bins))

    def extra_repr(self) -> str:
        """The range and the number of bins."""
        return f"{self.low:g}, {self.high:g}, bins={self.bins}"
