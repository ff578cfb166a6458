"""Normalisation of observations by the statistics of all that were seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from alm_torchrl.checks import LARGEST_SIZE, check_integer
from alm_torchrl.functional import merge_moments

__all__ = ["RunningNorm"]

# Rows whose deviation is smaller hardly move: nothing divides by their noise.
EPSILON = 1e-8
LIMIT = 10.0


class RunningNorm(nn.Module):
    """Subtracts the mean of all rows seen, divides by their deviation, and clips.

    ``clip((x - mean) / sqrt(var + 1e-8), -10, 10)``; before the first row the mean is
    0 and the variance 1. Nothing but :meth:`update` changes the statistics. They are
    buffers in double precision, so that an entry that never changes gives 0 and not the
    rounding of its mean in units of a tiny deviation. They travel with the
    ``state_dict``, and a compiled update follows them.

    Args:
        size (int): numbers in a row.

    Raises:
        ValueError: if the size is not positive.

    Examples:
        >>> norm = RunningNorm(1)
        >>> norm.update(torch.tensor([[1.0], [5.0]]))
        >>> norm(torch.tensor([[3.0], [5.0], [1e6]])).flatten()
        tensor([ 0.,  1., 10.])
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        size = check_integer("size", size, high=LARGEST_SIZE)
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("var", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, rows: Tensor) -> Tensor:
        """Normalised rows, ``[*, size]``, of the type of the rows."""
        scale = (self.var + EPSILON).rsqrt()
        return ((rows - self.mean) * scale).clamp(-LIMIT, LIMIT).to(rows.dtype)

    @torch.no_grad()
    def update(
        self, rows: Tensor, mask: Tensor | None = None, skip: Tensor | None = None
    ) -> None:
        """Adds rows to the statistics, in place; rows that are not finite are refused.

        Args:
            rows (Tensor): ``[N, size]``. If a number that counts is NaN or infinite,
                none of the rows is added.
            mask (Tensor, optional): the rows that count, ``[N]``, booleans.
                Default: ``None``, all of them.
            skip (Tensor, optional): adds nothing where this boolean ``[]`` is true.
                Default: ``None``.
        """
        rows = rows.to(self.mean.dtype)
        weight = torch.ones_like(rows[:, :1])
        if mask is not None:
            weight = mask.reshape(-1, 1).to(rows.dtype)
            rows = rows.masked_fill(~mask.reshape(-1, 1), 0)
        count = weight.sum()
        mean = (weight * rows).sum(0) / count.clamp_min(1)
        var = (weight * (rows - mean).square()).sum(0) / count.clamp_min(1)
        old = (self.mean, self.var, self.count)
        # What single precision cannot hold is no observation either.
        kept = ~var.float().isfinite().all() | (count == 0)
        kept = kept if skip is None else kept | skip
        merged = merge_moments(old, (mean, var, count))
        for held, new in zip(old, merged, strict=True):
            held.copy_(torch.where(kept, held, new))

    def reset_parameters(self) -> None:
        """Forgets all rows."""
        self.mean.zero_()
        self.var.fill_(1.0)
        self.count.zero_()
