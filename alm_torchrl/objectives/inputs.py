"""Batches in, reduced losses out: shapes, masks and reductions of the terms."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import NestedKey, TensorDictBase
from torch import Tensor


def read_masked(
    tensordict: TensorDictBase, action_key: NestedKey, mask_keys: Sequence[NestedKey]
) -> tuple[TensorDictBase, Tensor | None]:
    """Finds the batch size and the mask of an input, and hides what is masked.

    Args:
        tensordict (TensorDictBase): ``[*]``, perhaps with fewer declared dimensions.
        action_key (NestedKey): entry ``[*, A]`` that tells the batch size.
        mask_keys (sequence of NestedKey): boolean entries ``[*]`` or ``[*, 1]`` to
            look for; several are combined.

    Returns:
        tuple: the input with its full batch size and zeros in the masked rows (which
        may hold anything: NaN would survive a zero gradient), and the mask ``[*]`` or
        ``None``.

    Raises:
        KeyError: if there is no action.
    """
    shape = tensordict[action_key].shape[:-1]
    if tensordict.batch_size != shape:
        tensordict = tensordict.copy()
        tensordict.batch_size = shape
    mask = None
    for key in mask_keys:
        entry = tensordict.get(key, default=None)
        if entry is not None:
            entry = entry.reshape(shape)
            mask = entry if mask is None else mask & entry
    if mask is None:
        return tensordict, None
    hidden = ~mask
    return tensordict.apply(
        lambda x: x.masked_fill(hidden.reshape(shape + (1,) * (x.ndim - len(shape))), 0)
    ), mask


def reduce_masked(loss: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    """Reduces a loss over the rows that count.

    Args:
        loss (Tensor): ``[B]`` or ``[B, K]``.
        mask (Tensor, optional): the rows that count, of the same shape.
        reduction (str): ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        Tensor: a scalar, or ``[B]`` with ``"none"``: averaged over K, and zero where
        no row counts.
    """
    if mask is not None:
        loss = loss.masked_fill(~mask, 0)
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.mean() if mask is None else loss.sum() / mask.sum().clamp_min(1)
    if loss.ndim == 1:
        return loss
    return loss.mean(1) if mask is None else loss.sum(1) / mask.sum(1).clamp_min(1)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Detached mean over the rows that count, ``values`` ``[B, *]``, mask ``[B]``."""
    values = values.detach()
    if mask is None:
        return values.mean()
    mask = mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    mask = mask.expand_as(values)
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp_min(1)
