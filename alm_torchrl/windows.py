"""Which stored rows follow each other, and how old a drawn one is.

Rows are those of a one-dimensional tensor storage, written in the order of time: row r
is at the position ``r % capacity``. Any number of environments may write in turns. Each
row links to the next one of its trajectory, wherever that is.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from itertools import takewhile

import numpy as np
import torch
from torchrl.data import TensorStorage
from torchrl.data.replay_buffers.storages import Storage

from alm_torchrl.compat import stored_rows

__all__ = ["StoredWindows", "check_storage", "recent_age"]

DONE_KEY = ("next", "done")
TRAJECTORY_KEY = ("collector", "traj_ids")
# Which columns of a sample are single rows, unrelated to the window before them.
SINGLE_KEY = "is_single"


class StoredWindows:
    """Links between stored rows, and a queue of those that start a window.

    A window is ``horizon`` rows that link to each other. A row links to the next one
    with the same ("collector", "traj_ids"), unless ("next", "done") is set; without
    that key all rows are of one environment. The queue is in the order of the rows. A
    write appends to it and drops what is overwritten, so that its cost does not grow
    with what is stored.

    Args:
        storage (Storage): the rows.
        horizon (int): rows of a window, K.
        written (int): rows written so far, the overwritten ones included.

    Raises:
        ValueError: if the storage is none of rows in the order of time.
        KeyError: if its rows have no ("next", "done").

    Examples:
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([[False], [True], [False], [False]])
        >>> rows = TensorDict({"next": {"done": done}}, [4])
        >>> rows["collector", "traj_ids"] = torch.tensor([0, 0, 5, 5])
        >>> windows = StoredWindows(TensorStorage(rows), horizon=2, written=4)
        >>> windows.starts(np.arange(windows.count))
        array([0, 2])
        >>> windows.follow(np.array([0, 3]), 3).tolist()
        [[0, 1, 1], [3, 3, 3]]
    """

    def __init__(self, storage: Storage, horizon: int, written: int) -> None:
        check_storage(storage)
        capacity = storage.max_size
        self.horizon = horizon
        self.written = written - len(storage)
        # Where the next row of a trajectory is; a last one links to itself.
        self._next = np.arange(capacity)
        # The number of the row before in the trajectory, or -1.
        self._previous = np.full(capacity, -1, dtype=np.int64)
        # The last row of each trajectory that may go on, roughly the oldest first.
        self._open: dict[int, int] = {}
        # Circular queue of the rows that start a window.
        self._starts = np.empty(capacity, dtype=np.int64)
        self._head = 0
        self.count = 0
        self.append(storage, len(storage))

    def starts(self, rank: np.ndarray) -> np.ndarray:
        """Positions at which windows start, the oldest of rank 0, [B]."""
        capacity = len(self._starts)
        return self._starts[(self._head + rank) % capacity] % capacity

    def follow(self, positions: np.ndarray, steps: int) -> np.ndarray:
        """Positions and those that follow; a trajectory's last one is repeated.

        Args:
            positions (ndarray): the first positions, [B].
            steps (int): positions to follow, the first ones included, K.

        Returns:
            ndarray: positions, [B, K].
        """
        index = np.empty((len(positions), steps), dtype=np.int64)
        index[:, 0] = positions
        for step in range(1, steps):
            positions = self._next[positions]
            index[:, step] = positions
        return index

    def append(self, storage: Storage, rows: int) -> None:
        """Takes in rows that were written after the ones known."""
        stored, capacity = len(storage), storage.max_size
        self.written += rows
        oldest = self.written - stored
        # Each written row overwrites at most one start, the oldest first.
        front = self._starts[self._slots(0, min(self.count, rows))]
        expired = int((front < oldest).sum())
        self._head = (self._head + expired) % capacity
        self.count -= expired
        new = np.arange(max(self.written - rows, oldest), self.written)
        self._link(storage, new, oldest)
        # A window that ends in a new row starts horizon - 1 rows before it.
        starts = new
        for _ in range(self.horizon - 1):
            starts = self._previous[starts % capacity]
            starts = starts[starts >= oldest]
        if len(starts):
            self._queue(np.sort(starts))

    def _link(self, storage: Storage, new: np.ndarray, oldest: int) -> None:
        """Links new rows to each other, and to the last ones before them."""
        capacity = len(self._next)
        positions = new % capacity
        self._next[positions] = positions
        if len(new) == 0:
            return
        data = stored_rows(storage)
        done = np.logical_or.reduce(_read(data.get(DONE_KEY), positions), axis=1)
        column = data.get(TRAJECTORY_KEY, None)
        ids = np.zeros(len(new), dtype=np.int64)
        if column is not None:
            ids = _read(column, positions)[:, 0]
        edges = np.zeros(1, dtype=np.int64)  # Where another trajectory begins.
        if len(new) > 1:
            order = np.argsort(ids, kind="stable")
            new, done, ids = new[order], done[order], ids[order]
            same = ids[1:] == ids[:-1]
            goes_on = same & ~done[:-1]
            self._connect(new[:-1][goes_on], new[1:][goes_on])
            edges = np.append(edges, np.flatnonzero(~same) + 1)
        ends = np.append(edges[1:], len(new)) - 1
        for name, first, last, is_over in zip(
            ids[edges].tolist(),
            new[edges].tolist(),
            new[ends].tolist(),
            done[ends].tolist(),
            strict=True,
        ):
            before = self._open.pop(name, -1)
            if before >= oldest:
                self._connect(before, first)
            if not is_over:
                self._open[name] = last
        # Trajectories that stopped without an end, and are overwritten.
        for name in list(takewhile(lambda name: self._open[name] < oldest, self._open)):
            del self._open[name]

    def _connect(self, rows: np.ndarray | int, following: np.ndarray | int) -> None:
        capacity = len(self._next)
        self._next[rows % capacity] = following % capacity
        self._previous[following % capacity] = rows

    def _queue(self, starts: np.ndarray) -> None:
        """Puts sorted starts into the queue, most often at its end."""
        first, capacity = int(starts[0]), len(self._starts)
        before = self.count
        if before and self._starts[(self._head + before - 1) % capacity] > first:
            # A slow trajectory's starts belong between those of others.
            before = bisect_right(
                range(before),
                first,
                key=lambda rank: self._starts[(self._head + rank) % capacity],
            )
            later = self._starts[self._slots(before, self.count - before)]
            starts = np.sort(np.concatenate((later, starts)))
        self._starts[self._slots(before, len(starts))] = starts
        self.count = before + len(starts)

    def _slots(self, offset: int, length: int) -> np.ndarray:
        """Positions in the circular queue, from ``offset`` after its head."""
        positions = np.arange(self._head + offset, self._head + offset + length)
        return positions % len(self._starts)


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
    if data is None:
        return
    if data.get(DONE_KEY, None) is None:
        raise KeyError(
            f"replay: expected rows with the key {DONE_KEY}, got "
            f"{sorted(data.keys(True, True), key=str)}."
        )
    ids = data.get(TRAJECTORY_KEY, None)
    if ids is not None and ids.numel() != storage.max_size:
        raise ValueError(
            f"replay: expected {TRAJECTORY_KEY} with one number for each row, got "
            f"shape {list(ids.shape[1:])}."
        )


def _read(column: torch.Tensor, rows: np.ndarray) -> np.ndarray:
    """Rows of a stored entry, [N, elements per row]."""
    if column.device.type == "cpu":
        values = column.numpy()[rows]
    else:
        values = column[torch.from_numpy(rows)].cpu().numpy()
    return values.reshape(len(rows), -1)
