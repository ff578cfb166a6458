"""How environment steps and updates alternate in a run."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from alm_torchrl.checks import check_integer, check_number

__all__ = ["Pace"]


@dataclass(frozen=True)
class Pace:
    """Counts updates by environment steps, and the other way round.

    All environments make their steps at once, the warm-up's too, so that counts of
    environment steps are multiples of ``num_envs``. This module imports no PyTorch.

    Args:
        warmup_steps (int): random steps before updates, rounded up to such a multiple.
        num_envs (int): environments, E. Default: ``1``.
        updates_per_step (float): updates for each environment step, above 0.
            Default: ``1.0``.

    Raises:
        ValueError: if a number is out of range.

    Examples:
        >>> pace = Pace(warmup_steps=10, num_envs=4, updates_per_step=0.5)
        >>> pace.warmup_steps, [pace.updates(steps) for steps in (8, 12, 16, 20)]
        (12, [0, 0, 2, 4])
        >>> pace.environment_steps(3)
        20
    """

    warmup_steps: int
    num_envs: int = 1
    updates_per_step: float = 1.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        num_envs = check_integer("num_envs", self.num_envs)
        rate = check_number("updates_per_step", self.updates_per_step, open_low=True)
        warmup_steps = check_integer("warmup_steps", self.warmup_steps)
        for name, value in (
            ("warmup_steps", ceil(warmup_steps / num_envs) * num_envs),
            ("num_envs", num_envs),
            ("updates_per_step", rate),
        ):
            object.__setattr__(self, name, value)

    @property
    def _rate(self) -> Fraction:
        return Fraction(self.updates_per_step).limit_denominator(1_000_000)

    def updates(self, environment_steps: int) -> int:
        """Updates that are due after so many environment steps."""
        after = max(environment_steps - self.warmup_steps, 0)
        return int(after * self._rate)

    def environment_steps(self, updates: int) -> int:
        """Environment steps after which so many updates are due."""
        turns = ceil(updates / self._rate / self.num_envs)
        return self.warmup_steps + turns * self.num_envs
