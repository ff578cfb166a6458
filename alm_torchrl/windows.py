"""Which rows of a storage belong together, and how old a drawn one is.

Rows are those of a one-dimensional tensor storage, written in the order of time: row r
is at the position ``r % capacity``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torchrl.data import TensorStorage
from torchrl.data.replay_buffers.storages import Storage

from alm_torchrl.compat import stored_rows

__all__ = [
    "check_storage",
    "episode_ends",
    "follow_rows",
    "recent_age",
    "window_offsets",
]

DONE_KEY = ("next", "done")
TRAJECTORY_KEY = ("collector", "traj_ids")


def episode_ends(storage: Storage, positions: np.ndarray) -> np.ndarray:
    """Where an episode ends between rows one after the other.

    Args:
        storage (Storage): rows with ("next", "done") and, where an episode may end
            without it, ("collector", "traj_ids").
        positions (ndarray): positions of rows, [*, N].

    Returns:
        ndarray: whether the next row belongs to another episode, [*, N - 1].

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import TensorStorage
        >>> done = torch.tensor([[False], [True], [False]])
        >>> storage = TensorStorage(TensorDict({"next": {"done": done}}, [3]))
        >>> episode_ends(storage, np.arange(3))
        array([False,  True])
    """
    data, shape = stored_rows(storage), positions.shape
    done = _read(data.get(DONE_KEY), positions[..., :-1].reshape(-1))
    ends: np.ndarray = done.any(axis=1).reshape(*shape[:-1], -1)
    trajectory = data.get(TRAJECTORY_KEY, None)
    if trajectory is not None:
        ids = _read(trajectory, positions.reshape(-1)).reshape(*shape, -1)
        ends |= (ids[..., :-1, :] != ids[..., 1:, :]).any(axis=-1)
    return ends


def window_offsets(storage: Storage, first: int, stop: int, horizon: int) -> np.ndarray:
    """Offsets from ``first`` of the windows of one episode within rows [first, stop).

    Args:
        storage (Storage): see :func:`episode_ends`.
        first (int): the first row.
        stop (int): the row after the last one.
        horizon (int): rows of a window, K.

    Returns:
        ndarray: the offsets, in order.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import TensorStorage
        >>> done = torch.tensor([[False], [True], [False]])
        >>> storage = TensorStorage(TensorDict({"next": {"done": done}}, [3]))
        >>> window_offsets(storage, 0, 3, horizon=2)
        array([0])
    """
    if stop - first < horizon:
        return np.empty(0, dtype=np.int64)
    if horizon == 1:
        return np.arange(stop - first)
    ends = episode_ends(storage, np.arange(first, stop) % storage.max_size)
    windows = stop - first - horizon + 1
    crossed = ends[:windows].copy()
    for step in range(1, horizon - 1):
        crossed |= ends[step : step + windows]
    return np.flatnonzero(~crossed)


def follow_rows(
    storage: Storage, positions: np.ndarray, steps: int, written: int
) -> np.ndarray:
    """Rows and those that follow in their episodes; the last one is repeated.

    Args:
        storage (Storage): see :func:`episode_ends`.
        positions (ndarray): positions of the first rows, [B].
        steps (int): rows to follow, the first one included, K.
        written (int): rows written so far; none follows the last of them.

    Returns:
        ndarray: positions, [B, K].

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import TensorStorage
        >>> done = torch.tensor([[False], [True], [False]])
        >>> storage = TensorStorage(TensorDict({"next": {"done": done}}, [3]))
        >>> follow_rows(storage, np.array([0, 2]), 3, written=3).tolist()
        [[0, 1, 1], [2, 2, 2]]
    """
    first, capacity = positions[:, None], storage.max_size
    if steps == 1:
        return first
    newer = (written - 1 - first) % capacity
    offset = np.minimum(np.arange(steps), newer)
    ends = episode_ends(storage, (first + offset) % capacity)
    before = ~np.logical_or.accumulate(ends, axis=1)
    offset = np.minimum(offset, before.sum(1, keepdims=True))
    return (first + offset) % capacity


def recent_age(share: np.ndarray, count: int, decay: float, floor: float) -> np.ndarray:
    """Ages with probabilities in proportion to ``max(decay^age, floor)``.

    The weights are a geometric series up to where it reaches the floor, and the floor
    from there on. Their cumulative sum is inverted in closed form.

    Args:
        share (ndarray): uniform draws in [0, 1), [N].
        count (int): number of ages, from 0 on.
        decay (float): weight of one step of age, in (0, 1).
        floor (float): smallest weight, in (0, 1].

    Returns:
        ndarray: an age below ``count`` for each draw, [N].

    Examples:
        >>> recent_age(np.array([0.0, 0.5, 0.6, 0.9]), 3, 0.5, 0.5)
        array([0, 1, 1, 2])
    """
    step = math.log(decay)
    fading = min(count, math.ceil(math.log(floor) / step))
    fresh = math.expm1(fading * step) / math.expm1(step)  # The sum of decay^age.
    mass = share * (fresh + floor * (count - fading))
    young = np.log1p(np.minimum(mass, fresh) * math.expm1(step)) / step
    old = fading + (mass - fresh) / floor
    age = np.where(mass < fresh, young, old).astype(np.int64)
    return np.minimum(age, count - 1)


def check_storage(storage: Storage) -> None:
    """Raises a ValueError or KeyError where a storage has no rows in order of time.

    Examples:
        >>> from torchrl.data import ListStorage
        >>> check_storage(ListStorage(3))
        Traceback (most recent call last):
        ValueError: storage: expected a TensorStorage with ndim=1, got ListStorage ...
    """
    if not isinstance(storage, TensorStorage) or storage.ndim != 1:
        raise ValueError(
            "storage: expected a TensorStorage with ndim=1, got "
            f"{type(storage).__name__} with ndim={storage.ndim}."
        )
    data = stored_rows(storage)
    if data is not None and data.get(DONE_KEY, None) is None:
        raise KeyError(
            f"replay: expected rows with the key {DONE_KEY}, got "
            f"{sorted(data.keys(True, True), key=str)}."
        )


def _read(column: torch.Tensor, rows: np.ndarray) -> np.ndarray:
    """Rows of a stored entry, [N, elements per row]."""
    if column.device.type == "cpu":
        values = column.numpy()[rows]
    else:
        values = column[torch.from_numpy(rows)].cpu().numpy()
    return values.reshape(len(rows), -1)
