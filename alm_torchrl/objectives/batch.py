"""Reads batches for the terms of the loss: checks, masks and reductions.

The checks look at keys, shapes, types and devices, never at values.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from alm_torchrl.compat import mask_keys
from alm_torchrl.windows import SINGLE_KEY

if TYPE_CHECKING:
    from alm_torchrl.objectives.alm import ALMLoss


class Rows(NamedTuple):
    """Rows of a batch for a term of the loss, and how it averages over them."""

    data: TensorDictBase
    """Slices ``[B, K]``, or transitions flattened to ``[N]``; zeros where masked."""
    mask: Tensor | None
    """The rows that count, of shape :attr:`shape`."""
    shape: torch.Size
    """Shape of the rows before they were flattened."""
    steps: Tensor | None = None
    """The steps of slices that count, ``[B, K]``: those before the first masked one."""

    def visible(self, values: Tensor) -> Tensor:
        """Values ``[B, T]`` at the steps or states of slices, zero where none counts.

        Values ``[B]`` at the end of the slices count where all steps do.
        """
        if self.steps is None:
            return values
        return values.masked_fill(~self._seen(values), 0)

    def _seen(self, values: Tensor) -> Tensor:
        """Which of such values count."""
        steps = cast("Tensor", self.steps)
        if values.ndim == 1:
            return steps.all(1)
        count, length = values.shape[1], steps.shape[1]
        # Of K + 1 states, the first counts if its step does.
        first = steps[:, : max(count - length, 0)]
        return torch.cat([first, steps[:, :count]], 1)

    def reduce(self, loss: Tensor, reduction: str) -> Tensor:
        """Reduces a loss ``[N]`` over the rows that count.

        ``"none"`` gives ``[B]``: averaged over the steps of slices, and zero where no
        row counts.
        """
        loss, mask = loss.reshape(self.shape), self.mask
        if mask is not None:
            loss = loss.masked_fill(~mask, 0)
        if reduction == "sum":
            return loss.sum()
        if reduction == "mean":
            return loss.mean() if mask is None else loss.sum() / mask.sum().clamp_min(1)
        if loss.ndim == 1:
            return loss
        return loss.mean(1) if mask is None else loss.sum(1) / mask.sum(1).clamp_min(1)

    def mean(self, values: Tensor) -> Tensor:
        """Detached mean of ``[N, *]`` over the rows that count."""
        values = values.detach()
        if self.mask is None:
            return values.mean()
        if self.steps is not None:
            seen = self._seen(values)
            return values.masked_fill(~seen, 0).sum() / seen.sum().clamp_min(1)
        mask = self.mask.reshape(-1, *(1,) * (values.ndim - 1)).expand_as(values)
        return values.masked_fill(~mask, 0).sum() / mask.sum().clamp_min(1)


def entry_names(tensordict: TensorDictBase) -> list[NestedKey]:
    """The names of all entries, for messages."""
    return sorted(tensordict.keys(True, True), key=str)


def read_entry(tensordict: TensorDictBase, key: NestedKey) -> Tensor:
    """An entry of a batch; raises a KeyError that lists the entries."""
    entry = tensordict.get(key, default=None)
    if entry is None:
        raise KeyError(
            f"tensordict: expected the entry {key!r}, got {entry_names(tensordict)}."
        )
    return entry


def read_column(tensordict: TensorDictBase, key: NestedKey, like: Tensor) -> Tensor:
    """An entry with one number for each row, ``[*]``.

    Args:
        tensordict (TensorDictBase): ``[*]``.
        key (NestedKey): entry ``[*]`` or ``[*, 1]``.
        like (Tensor): a tensor on the expected device.

    Raises:
        KeyError: if the entry is missing.
        ValueError: if it has another shape or device.
    """
    entry = read_entry(tensordict, key)
    shape = tensordict.batch_size
    if entry.shape not in (shape, (*shape, 1)):
        raise ValueError(
            f"tensordict: expected {key!r} with one number for each of the rows "
            f"{list(shape)}, got shape {list(entry.shape)}."
        )
    if entry.device != like.device:
        raise ValueError(
            f"tensordict: expected {key!r} on the device of the networks, "
            f"{like.device}, got {entry.device}."
        )
    return entry.reshape(shape)


def read_part(
    tensordict: TensorDictBase, key: NestedKey, action_key: NestedKey
) -> TensorDictBase:
    """The entry ``key`` of a two-draw batch, or the plain batch itself.

    Raises:
        KeyError: if it has no action.
        ValueError: if it has windows and single rows in one.
    """
    part = tensordict.get(key, default=tensordict)
    if part.get(SINGLE_KEY, default=None) is not None:
        raise ValueError(
            f"tensordict: expected {key!r} apart from other rows, as the buffer of "
            "make_replay_buffer gives it, got windows and single rows in one, which "
            "another buffer drew with its sampler."
        )
    if part.get(action_key, default=None) is None:
        raise KeyError(
            f"tensordict: expected the entry {action_key!r}, alone or under {key!r}, "
            f"got {entry_names(tensordict)}."
        )
    return part


def read_slices(loss: ALMLoss, tensordict: TensorDictBase) -> Rows:
    """The slices ``[B, K]`` of a batch, which count up to their first masked step.

    Raises:
        ValueError: if there are none, or an entry does not fit.
    """
    data, mask = _read_rows(loss, tensordict, loss.tensor_keys.slice)
    if data.ndim != 2:
        raise ValueError(
            "model_loss expects slices with batch size [B, K], alone or under the key "
            f"{loss.tensor_keys.slice!r}, got batch size {list(data.batch_size)}."
        )
    steps = None if mask is None else mask.cumprod(1) > 0
    first = None if steps is None else steps[:, 0]
    return Rows(data, first, data.batch_size[:1], steps)


def read_horizon(loss: ALMLoss, tensordict: TensorDictBase) -> int | None:
    """The length K of the slices of a batch, or ``None`` for transitions."""
    key, action_key = loss.tensor_keys.slice, loss.tensor_keys.action
    steps = read_part(tensordict, key, action_key)[action_key].shape[1:-1]
    return steps[0] if steps else None


def read_transitions(loss: ALMLoss, tensordict: TensorDictBase) -> Rows:
    """The transitions of a batch, flattened to ``[N]``.

    Raises:
        ValueError: if they are neither ``[B]`` nor ``[B, K]``, or an entry
            does not fit.
    """
    data, mask = _read_rows(loss, tensordict, loss.tensor_keys.transition)
    shape = data.batch_size
    if len(shape) not in (1, 2):
        raise ValueError(
            "the one-step terms expect transitions [B] or slices [B, K], got batch "
            f"size {list(shape)}."
        )
    return Rows(data.reshape(-1), mask, shape)


def read_lookahead(
    loss: ALMLoss, transitions: TensorDictBase, n_step: int
) -> tuple[TensorDictBase, Tensor]:
    """The n steps from each transition on, and those that count.

    Of slices ``[B, K]`` they end with the slice or before a masked step.

    Returns:
        tuple of TensorDict and Tensor: steps ``[*, n]``, where the last one that counts
        is repeated on the others, and the mask of those that count.

    Raises:
        KeyError: if transitions have no look-ahead.
        ValueError: if it does not fit.
    """
    key, shape = loss.tensor_keys.lookahead, transitions.batch_size
    steps = transitions.get(key, default=None)
    if steps is not None:
        given = read_entry(steps, "mask")
        expected = (*shape, n_step)
        if steps.batch_size != expected or given.shape != expected:
            raise ValueError(
                f"tensordict: expected {key!r} with batch size and mask "
                f"{list(expected)}, got {list(steps.batch_size)} and "
                f"{list(given.shape)}."
            )
        return steps, given
    if len(shape) != 2:
        raise KeyError(
            f"tensordict: expected the entry {key!r}, which make_replay_buffer(n_step="
            f"{n_step}) gives, or slices [B, K], got {entry_names(transitions)}."
        )
    row = torch.arange(shape[0], device=transitions.device)[:, None, None]
    step = torch.arange(shape[1], device=transitions.device)[:, None]
    ahead = torch.arange(n_step, device=transitions.device)
    counts = (step + ahead < shape[1]).expand(*shape, n_step)
    mask = read_mask(loss, transitions)
    if mask is not None:
        counts = counts & mask[:, (step + ahead).clamp_max(shape[1] - 1)]
        counts = counts.cumprod(-1) > 0
    last = counts.sum(-1, keepdim=True) - 1
    return transitions[row, step + torch.minimum(ahead, last.clamp_min(0))], counts


def check_batch(loss: ALMLoss, tensordict: TensorDictBase) -> None:
    """Checks what all terms read of a batch, before the first one changes anything.

    Raises:
        KeyError: if an entry is missing.
        ValueError: if an entry does not fit.
    """
    slices, rows = read_slices(loss, tensordict), read_transitions(loss, tensordict)
    entries: dict[str, list[Tensor]] = {}
    for data in (slices.data, rows.data):
        following = read_entry(data, "next")
        for part in (data, following):
            for key, entry in loss.latents.observations(part).items(True, True):
                entries.setdefault(str(key), []).append(entry.flatten(0, data.ndim - 1))
        action = read_entry(data, loss.tensor_keys.action)
        entries.setdefault("action", []).append(action.flatten(0, data.ndim - 1))
    for key, found in entries.items():
        kinds = [(list(e.shape[1:]), e.dtype, e.device) for e in found]
        if any(kind != kinds[0] for kind in kinds):
            raise ValueError(
                f"tensordict: expected {key!r} alike in slices and transitions, now "
                f"and next, got {kinds}."
            )
    like = next(loss.parameters())
    following = read_entry(rows.data, "next")
    read_column(following, loss.tensor_keys.terminated, like)
    reward = read_column(following, loss.tensor_keys.reward, like)
    if loss.critic_target.n_step > 1:
        starts = rows.data.reshape(rows.shape)
        read_lookahead(loss, starts, loss.critic_target.n_step)
    if reward.dtype == torch.bool:
        raise ValueError(
            f"tensordict: expected numbers {loss.tensor_keys.reward!r}, got booleans."
        )


def _read_rows(
    loss: ALMLoss, tensordict: TensorDictBase, key: NestedKey
) -> tuple[TensorDictBase, Tensor | None]:
    """Rows with their full batch size, and the mask of those that count.

    Masked rows may hold anything, so they are filled with zeros: NaN would survive a
    gradient of zero. Raises a KeyError without an action, and a ValueError where the
    action holds no floats, another entry has another batch size, a mask is not
    boolean, or there are no rows.
    """
    action_key = loss.tensor_keys.action
    rows = read_part(tensordict, key, action_key)
    action = read_entry(rows, action_key)
    if not action.is_floating_point():
        raise ValueError(
            f"tensordict: expected floating-point actions {action_key!r}, got "
            f"{action.dtype}."
        )
    shape = action.shape[:-1]
    if rows.batch_size != shape:
        rows = rows.copy()
        try:
            rows.batch_size = shape
        except RuntimeError as error:
            raise ValueError(
                f"tensordict: expected entries of batch size {list(shape)}, that of "
                f"the action {action_key!r}, got {error}"
            ) from error
    if 0 in shape:
        raise ValueError(
            "tensordict: expected at least one row and step, got batch size "
            f"{list(shape)}."
        )
    mask = read_mask(loss, rows)
    if mask is None:
        return rows, None
    hidden = ~mask
    return rows.apply(
        lambda x: x.masked_fill(hidden.reshape(shape + (1,) * (x.ndim - len(shape))), 0)
    ), mask


def read_mask(loss: ALMLoss, rows: TensorDictBase) -> Tensor | None:
    """The rows ``[*]`` that count, or ``None`` without a mask.

    Raises:
        ValueError: if a mask is not boolean or has another shape.
    """
    mask, shape = None, rows.batch_size
    for name in mask_keys(loss):
        entry = rows.get(name, default=None)
        if entry is not None:
            if entry.dtype != torch.bool or entry.numel() != shape.numel():
                raise ValueError(
                    f"tensordict: expected a boolean mask {name!r} of shape "
                    f"{list(shape)}, got {entry.dtype} of shape {list(entry.shape)}."
                )
            entry = entry.reshape(shape)
            mask = entry if mask is None else mask & entry
    return mask


def explain_mismatch(
    part: str, module: nn.Module, inputs: TensorDictBase, error: Exception
) -> Exception:
    """Explains a shape, dtype, device or key mismatch of a network and its inputs.

    Args:
        part (str): name of the network in the message.
        module (TensorDictModule): the network.
        inputs (TensorDictBase): its inputs.
        error (Exception): what it raised.

    Returns:
        Exception: a ``KeyError`` or ``ValueError``, or ``error`` itself where it is
        about something else.
    """
    names = entry_names(inputs)
    read: list[NestedKey] = list(module.in_keys)  # type: ignore[arg-type]
    if any(key not in names for key in read):
        return KeyError(f"{part}: expected in_keys among {names}, got {read}.")
    tensors = {key: inputs.get(key) for key in read}
    # Target and frozen parameters are bound as buffers.
    bound = chain(module.parameters(), module.buffers())
    weight = next((tensor for tensor in bound if tensor.is_floating_point()), None)
    for key, tensor in tensors.items():
        if weight is not None and tensor.device != weight.device:
            return ValueError(
                f"{part}: expected {key!r} on the device of its parameters, "
                f"{weight.device}, got {tensor.device}."
            )
        if weight is not None and tensor.dtype != weight.dtype:
            return ValueError(
                f"{part}: expected {key!r} with the type of its parameters, "
                f"{weight.dtype}, got {tensor.dtype}."
            )
    # A subclass means something else, such as a lack of memory.
    if type(error) is not RuntimeError:
        return error
    text = str(error)
    if "tracing tensor" in text:
        return ValueError(
            f"{part}: expected a network that reads no value from a tensor (as .item() "
            "and if do), which a compiled update does not follow."
        )
    if "out_keys" in text:
        return ValueError(
            f"{part}: expected one tensor for each of out_keys {module.out_keys}, "
            f"got: {text}"
        )
    if "shape" in text or "size" in text.lower():
        shapes = ", ".join(f"{key!r} {list(x.shape)}" for key, x in tensors.items())
        return ValueError(
            f"{part}: expected a network for {shapes} (all parts must agree on these "
            f"sizes), got: {text}"
        )
    return error
