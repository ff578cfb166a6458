"""Rewards in units of their own, a ``reward_transform`` of the loss."""

from __future__ import annotations

import math
from itertools import cycle
from typing import Literal

import torch
from torch import Tensor, nn

from alm_torchrl.checks import (
    check_choice,
    check_discount,
    check_integer,
    check_number,
)

__all__ = ["RewardScale"]


class RewardScale(nn.Module):
    """Divides rewards by a running scale, over all steps seen.

    By the ``"returns"``: ``R / max(std(G), max|G| / limit)`` with
    ``G_t = gamma G_{t-1} + R_t`` from each episode's start. So the values that the
    critics learn have a spread of about 1, and hardly leave ``[-limit, limit]``.
    Source: Lee et al., "Hyperspherical Normalization for Scalable Deep Reinforcement
    Learning" (SimbaV2), https://arxiv.org/abs/2502.15280.

    By the ``"rewards"``: ``R / mean|R|``. Source: Fujimoto et al., "Towards
    General-Purpose Model-Free Reinforcement Learning" (MR.Q),
    https://arxiv.org/abs/2501.16142.

    The replay keeps the rewards as they are. Whoever steps the environment calls
    :meth:`observe` on each step, in the order of time; until then the scale is 1. The
    statistics are buffers: they travel with the loss, and a compiled update follows
    them. Metrics of the loss are in the units of the environment, the losses and the
    networks in those of the scale.

    Args:
        by (str): ``"returns"`` or ``"rewards"``. Default: ``"returns"``.

    Keyword Args:
        gamma (float): discount of G, in [0, 1). Default: ``0.99``.
        limit (float): largest magnitude of G when scaled, above 0. Default: ``5.0``.
        num_envs (int): environments whose steps are observed, E. Default: ``1``.

    Raises:
        ValueError: if ``by`` is neither of the two, or a number is out of range.

    Examples:
        >>> scale = RewardScale(gamma=0.5, limit=2.0)
        >>> scale.observe(torch.tensor([8.0, 4.0]), torch.tensor([False, True]))
        >>> scale(torch.tensor([8.0, 4.0]))
        tensor([2., 1.])
    """

    statistics: Tensor
    scale: Tensor

    def __init__(
        self,
        by: Literal["returns", "rewards"] = "returns",
        *,
        gamma: float = 0.99,
        limit: float = 5.0,
        num_envs: int = 1,
    ) -> None:
        super().__init__()
        self.by = check_choice("by", by, ("returns", "rewards"))
        self.gamma = check_discount("gamma", gamma)
        self.limit = check_number("limit", limit, open_low=True)
        self.num_envs = check_integer("num_envs", num_envs)
        # G now, of each environment; steps; mean, variance and largest magnitude of G;
        # mean magnitude of R.
        statistics = torch.zeros(num_envs + 5, dtype=torch.float64)
        self.register_buffer("statistics", statistics)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, reward: Tensor) -> Tensor:
        """Scaled rewards, any shape."""
        return reward / self.scale.to(reward.dtype)

    def observe(self, reward: Tensor, done: Tensor) -> None:
        """Adds steps in the order of time.

        Args:
            reward (Tensor): rewards of T steps in E environments, T * E numbers in any
                shape; those of one step stand together.
            done (Tensor): whether the episode ended with the step, likewise.
        """
        *returns, count, mean, variance, largest, size = self.statistics.tolist()
        steps = zip(reward.flatten().tolist(), done.flatten().tolist(), strict=True)
        for (reward_t, done_t), env in zip(steps, cycle(range(self.num_envs))):
            now = self.gamma * returns[env] + reward_t
            count += 1
            shift = now - mean
            mean += shift / count
            variance += (shift * (now - mean) - variance) / count
            largest = max(largest, abs(now))
            size += (abs(reward_t) - size) / count
            returns[env] = 0.0 if done_t else now
        found = [*returns, count, mean, variance, largest, size]
        self.statistics.copy_(torch.tensor(found, dtype=torch.float64))
        of_returns = max(math.sqrt(variance), largest / self.limit)
        scale = of_returns if self.by == "returns" else size
        self.scale.fill_(scale if scale > 0 else 1.0)

    def reset_parameters(self) -> None:
        """Forgets all steps."""
        self.statistics.zero_()
        self.scale.fill_(1.0)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"{self.by!r}, gamma={self.gamma:g}, limit={self.limit:g}"
