"""Replay of K-step windows and single transitions, each drawn uniformly.

An update of ALM reads a batch of slices (the encoder/model objective) and a batch of
single transitions (the other losses). `make_replay_buffer` gives both in one
``sample()``. `UniformWindowSampler` draws them, for any `torchrl.data.ReplayBuffer`
with a tensor storage.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch.nn import functional
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    TensorDictReplayBuffer,
    TensorStorage,
)
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage

from alm_torchrl.checks import check_device, check_integer, check_type
from alm_torchrl.compat import last_written, storage_revision, stored_rows

__all__ = ["UniformWindowSampler", "make_replay_buffer"]

DONE_KEY = ("next", "done")
TRAJECTORY_KEY = ("collector", "traj_ids")


def _read(column: torch.Tensor, rows: np.ndarray) -> np.ndarray:
    """Rows of a stored entry, [N, elements per row]."""
    if column.device.type == "cpu":
        values = column.numpy()[rows]
    else:
        values = column[torch.from_numpy(rows)].cpu().numpy()
    return values.reshape(len(rows), -1)


def _split(data: TensorDictBase, horizon: int) -> tuple[TensorDictBase, TensorDictBase]:
    """Views of the first ``horizon`` columns and of the next one."""
    slices, transitions = {}, {}
    for key, value in data.items():
        if isinstance(value, torch.Tensor):
            slices[key] = value.narrow(1, 0, horizon)
            transitions[key] = value.select(1, horizon)
        elif isinstance(value, TensorDict):
            slices[key], transitions[key] = _split(value, horizon)
        else:
            slices[key], transitions[key] = value[:, :horizon], value[:, horizon]
    rows, device = data.shape[0], data.device
    # The checks of the public constructor would cost a fifth of the whole draw.
    return (
        TensorDict._new_unsafe(slices, torch.Size([rows, horizon]), device=device),
        TensorDict._new_unsafe(transitions, torch.Size([rows]), device=device),
    )


class UniformWindowSampler(Sampler):
    """Draws windows of consecutive steps uniformly.

    A window is ``horizon`` consecutive rows of one ``("collector", "traj_ids")``
    (where that key is stored), of which only the last may have ``("next", "done")``
    set. So it never crosses an episode's end, a time limit, the place where the ring
    is being overwritten, or a resume that starts a fresh episode. Every valid window is
    equally likely. (`torchrl.data.SliceSampler` draws trajectories uniformly, which
    favours steps of short ones.) In the buffer of `make_replay_buffer` it draws single
    rows, too: every stored row is equally likely, and independent of the windows. There
    it adds the rows that follow a single one, as far as the episode was recorded.

    A queue holds the rows at which a window may start, oldest first. A write appends
    new starts and drops overwritten ones, so the cost of a draw does not grow with what
    is stored. After writes other than ``add`` and ``extend`` of the buffer, the next
    draw rebuilds the queue. Its order depends on the stored rows alone: a loaded
    buffer draws what the saved one draws.

    Draws come from the buffer's generator, or else from torch's global one.

    Args:
        horizon (int): steps per window, K.

    Raises:
        ValueError: if ``horizon`` is not a positive integer.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> buffer = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(10),
        ...     sampler=UniformWindowSampler(horizon=2),
        ...     batch_size=8,
        ... )
        >>> done = torch.tensor([[False], [True], [False], [True]])
        >>> _ = buffer.extend(TensorDict({"next": {"done": done}}, [4]))
        >>> index = buffer.sample()["index"]
        >>> index.shape
        torch.Size([8, 2])
        >>> set(index[:, 0].tolist()) <= {0, 2}
        True
    """

    def __init__(self, horizon: int) -> None:
        self.horizon = check_integer("horizon", horizon)
        # Columns from a single row on; set by the buffer that tells them from windows.
        self.n_step = 0
        self._last_row: int | None = None
        self._revision = -1  # of the storage, after the writes that were seen
        self._pending = 0  # rows written since the last draw
        # Rows are numbered in the order of writing: row r is at r % capacity.
        self._written = 0
        # Circular queue of the rows that start a valid window.
        self._starts = np.empty(0, dtype=np.int64)
        self._head = 0
        self._count = 0

    def add(self, index: int | torch.Tensor) -> None:
        """Records that a row was written at an index."""
        self._last_row = int(index)
        self._pending += 1
        self._revision += 1

    def extend(self, index: torch.Tensor) -> None:
        """Records that rows were written at the indices [N], in this order."""
        self._last_row = int(index[-1])
        self._pending += len(index)
        self._revision += 1

    def can_sample(self, storage: Storage, batch_size: int) -> bool:
        """Whether the storage holds a valid window; draws are with replacement."""
        self._settle(storage)
        return self._count > 0

    def sample(
        self, storage: Storage, batch_size: int
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Draws windows.

        Args:
            storage (Storage): the buffer's storage.
            batch_size (int): windows to draw, B.

        Returns:
            The index [B, K], and an empty dictionary. With single rows it is
            [B, K + n]: the row and the n - 1 after it follow the window; where its
            episode ends before, its last row is repeated.

        Raises:
            RuntimeError: if no valid window is stored.
            ValueError: if ``batch_size`` is not a positive integer.
        """
        batch_size = check_integer("batch_size", batch_size)
        self._settle(storage)
        stored, capacity = len(storage), storage.max_size
        if self._count == 0:
            raise RuntimeError(
                f"No valid window among the {stored} stored rows: horizon "
                f"{self.horizon} needs {self.horizon} consecutive steps of one episode."
            )
        rank = self._draw(self._count, batch_size)
        starts = self._starts[(self._head + rank) % capacity]
        index = (starts[:, None] + np.arange(self.horizon)) % capacity
        if self.n_step:
            rows = self._follow(storage, self._draw(stored, batch_size))
            index = np.concatenate((index, rows), axis=1)
        return torch.from_numpy(index), {}

    def _follow(self, storage: Storage, row: np.ndarray) -> np.ndarray:
        """Positions [B] and those of the rows after them, [B, n], the last repeated."""
        row, capacity = row[:, None], storage.max_size
        if self.n_step == 1:
            return row
        newer = (self._written - 1 - row) % capacity
        steps = np.minimum(np.arange(self.n_step), newer)
        ends = self._ends(storage, (row + steps) % capacity)
        before = ~np.logical_or.accumulate(ends, axis=1)
        steps = np.minimum(steps, before.sum(1, keepdims=True))
        return (row + steps) % capacity

    @staticmethod
    def _ends(storage: Storage, rows: np.ndarray) -> np.ndarray:
        """Whether another episode follows rows [*, N] but the last, [*, N - 1]."""
        data, shape = stored_rows(storage), rows.shape
        done = _read(data.get(DONE_KEY), rows[..., :-1].reshape(-1))
        ends: np.ndarray = done.any(axis=1).reshape(*shape[:-1], -1)
        trajectory = data.get(TRAJECTORY_KEY, None)
        if trajectory is not None:
            ids = _read(trajectory, rows.reshape(-1)).reshape(*shape, -1)
            ends |= (ids[..., :-1, :] != ids[..., 1:, :]).any(axis=-1)
        return ends

    def _draw(self, high: int, size: int) -> np.ndarray:
        device = "cpu" if self._rng is None else self._rng.device
        drawn = torch.randint(high, (size,), generator=self._rng, device=device)
        return drawn.cpu().numpy()

    def _settle(self, storage: Storage) -> None:
        """Brings the queue of starts up to date with the storage."""
        # Whether only the pending rows have changed since the last draw.
        is_known = self._revision == storage_revision(storage)
        if is_known and self._pending == 0:
            return
        stored, capacity = len(storage), storage.max_size
        if is_known:
            new = self._written
            written = new + self._pending
        else:
            self._check_storage(storage)
            self._starts = np.empty(capacity, dtype=np.int64)
            self._head = self._count = 0
            written = stored if stored < capacity else capacity + self._cursor(storage)
            new = written - stored
        oldest = written - stored
        # Each written row overwrites at most one start, the oldest first.
        front = self._starts[self._slots(0, min(self._count, self._pending))]
        expired = int((front < oldest).sum())
        self._head = (self._head + expired) % capacity
        self._count -= expired
        # The first windows that end in a new row start before that row.
        first = max(new - self.horizon + 1, oldest)
        starts = first + self._valid_offsets(storage, first, written)
        self._starts[self._slots(self._count, len(starts))] = starts
        self._count += len(starts)
        self._written = written
        self._pending = 0
        self._revision = storage_revision(storage)

    def _cursor(self, storage: Storage) -> int:
        """Position of a full storage's oldest row, which is overwritten next."""
        last = self._last_row
        if last is None:  # written by another buffer, or full from the start
            last = last_written(storage)
        return 0 if last is None else (last + 1) % storage.max_size

    def _slots(self, offset: int, length: int) -> np.ndarray:
        """Positions in the circular queue, from ``offset`` after its head."""
        positions = np.arange(self._head + offset, self._head + offset + length)
        return positions % len(self._starts)

    def _valid_offsets(self, storage: Storage, first: int, stop: int) -> np.ndarray:
        """Offsets from ``first`` of the valid windows within rows [first, stop)."""
        if stop - first < self.horizon:
            return np.empty(0, dtype=np.int64)
        if self.horizon == 1:
            return np.arange(stop - first)
        rows = np.arange(first, stop) % storage.max_size
        cut = self._ends(storage, rows)
        windows = len(rows) - self.horizon + 1
        crossed = cut[:windows].copy()
        for step in range(1, self.horizon - 1):
            crossed |= cut[step : step + windows]
        return np.flatnonzero(~crossed)

    @staticmethod
    def _check_storage(storage: Storage) -> None:
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

    def state_dict(self) -> dict[str, Any]:
        """Returns the last row written; the rest follows from the storage."""
        return {"last_row": self._last_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state."""
        self._last_row = state_dict["last_row"]

    def dumps(self, path: str | Path) -> None:
        """Writes the state into a directory, which is made if missing."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / "sampler.json").write_text(json.dumps(self.state_dict()))

    def loads(self, path: str | Path) -> None:
        """Restores the state from a directory."""
        self.load_state_dict(json.loads((Path(path) / "sampler.json").read_text()))

    def _empty(self) -> None:
        """Does nothing: the next draw notices that the storage is empty."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(horizon={self.horizon})"


class WindowReplayBuffer(TensorDictReplayBuffer):
    """A `TensorDictReplayBuffer` that samples slices and single transitions.

    `make_replay_buffer` makes and documents it.
    """

    def __init__(
        self, *, sampler: UniformWindowSampler, n_step: int, **kwargs: Any
    ) -> None:
        sampler.n_step = self.n_step = n_step
        super().__init__(sampler=sampler, **kwargs)

    def extend(
        self, tensordicts: TensorDictBase, *, update_priority: bool | None = None
    ) -> torch.Tensor:
        """Stores rows [N] in the order of their time steps.

        Raises:
            ValueError: if there are more rows than the buffer can hold, or the batch
                size has another number of dimensions than one.
            KeyError: if the rows have other entries than those stored.
        """
        check_type("tensordicts", tensordicts, TensorDictBase)
        self._check_entries(tensordicts)
        capacity = self._storage.max_size
        if tensordicts.batch_dims != 1 or len(tensordicts) == 0:
            raise ValueError(
                "tensordicts: expected batch size [N], steps in the order of time and "
                f"breaks between episodes marked by {DONE_KEY} or {TRAJECTORY_KEY}, "
                f"got {list(tensordicts.batch_size)}."
            )
        if len(tensordicts) > capacity:
            raise ValueError(
                f"tensordicts: expected at most {capacity} rows (the buffer's "
                f"capacity) at once, got {len(tensordicts)}."
            )
        return super().extend(tensordicts, update_priority=update_priority)

    def add(self, data: TensorDictBase) -> int:
        """Stores a row.

        Raises:
            KeyError: if it has other entries than those stored.
        """
        self._check_entries(data)
        return super().add(data)

    def _check_entries(self, rows: TensorDictBase) -> None:
        """A storage would leave old values where an entry is missing."""
        stored = stored_rows(self._storage)
        if stored is None or len(self._storage) == 0:
            return
        given, expected = (set(data.keys(True, True)) for data in (rows, stored))
        given.discard("index")
        expected.discard("index")
        if given != expected:
            raise KeyError(
                "tensordicts: expected the entries of the stored rows, got missing "
                f"ones {sorted(map(str, expected - given))} and new ones "
                f"{sorted(map(str, given - expected))}."
            )

    def sample(
        self, batch_size: int | None = None, return_info: bool = False
    ) -> TensorDictBase | tuple[TensorDictBase, dict[str, Any]]:
        """Draws slices and transitions, independent of each other.

        Returns:
            A TensorDict [B] with "slice" [B, K] and "transition" [B], which has
            "lookahead" [B, n] if n is not 1; with ``return_info`` also the index
            [B, K + n] that was read, as ``info["index"]``.

        Raises:
            RuntimeError: if no valid window is stored.
        """
        data, info = super().sample(batch_size, return_info=True)
        horizon = data.shape[1] - self.n_step
        slices, transitions = _split(data, horizon)
        if self.n_step > 1:
            lookahead = data[:, horizon:]
            moved = info["index"][:, horizon:].diff(dim=1) != 0
            lookahead["mask"] = functional.pad(moved, (1, 0), value=True)
            transitions["lookahead"] = lookahead
        batch = TensorDict(
            {"slice": slices, "transition": transitions},
            batch_size=data.shape[:1],
            device=data.device,
        )
        return (batch, info) if return_info else batch


def make_replay_buffer(
    capacity: int,
    *,
    batch_size: int = 512,
    horizon: int = 3,
    n_step: int = 1,
    memmap_dir: str | Path | None = None,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> WindowReplayBuffer:
    """Makes the replay buffer of ALM (Ghugare et al., 2023, Algorithm 1).

    ``sample()`` gives a TensorDict [B] with "slice" [B, K], drawn uniformly from all
    windows of K consecutive steps of one episode, and "transition" [B], drawn
    uniformly and independently from all stored rows. Both reach an episode's last
    transition; episodes shorter than K serve as transitions only. Otherwise it is
    TorchRL's buffer. Transforms on reading see rows [B, K + n], before the split.

    For targets of n > 1 steps each transition comes with "lookahead" [B, n]: itself
    and the next n - 1 rows of its episode. Its boolean entry "mask" is true on the m
    rows that there are before the episode's end, a time limit or the newest row; the
    last of them is repeated on the others, so that it is always in the last column.

    Write steps in the order of time, with the keys of a TorchRL collector:
    ("next", "done"), and ("collector", "traj_ids") where an episode may break off
    without "done", as in ``env.rollout(n)`` or after a resume that starts a fresh
    episode. A window may cross a break that nothing marks.

    Args:
        capacity (int): rows to keep; the oldest is overwritten.

    Keyword Args:
        batch_size (int): slices, and transitions, per sample, B. Default: ``512``.
        horizon (int): steps per slice, K. Default: ``3``.
        n_step (int): rows of the look-ahead, n. Default: ``1``, without one.
        memmap_dir (str or Path, optional): directory of memory-mapped files for the
            rows; existing ones are overwritten. Default: ``None``, in memory.
        device (torch.device or str): device of the rows. Default: ``"cpu"``, the only
            one for memory-mapped files.
        generator (torch.Generator, optional): source of the draws. Default: ``None``,
            torch's global one.

    Returns:
        The empty buffer.

    Raises:
        ValueError: if a number is not a positive integer, ``capacity`` is below
            ``horizon``, the device does not exist, or ``memmap_dir`` is given with
            another device than the CPU.
        TypeError: if ``generator`` is no ``torch.Generator``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> buffer = make_replay_buffer(100, batch_size=4, horizon=3)
        >>> steps = TensorDict(
        ...     {
        ...         "observation": torch.arange(10.0).unsqueeze(-1),
        ...         "next": {"done": torch.zeros(10, 1, dtype=torch.bool)},
        ...     },
        ...     batch_size=[10],
        ... )
        >>> _ = buffer.extend(steps)
        >>> batch = buffer.sample()
        >>> batch["slice", "observation"].shape, batch["transition"].shape
        (torch.Size([4, 3, 1]), torch.Size([4]))
        >>> bool((batch["slice", "observation"].diff(dim=1) == 1).all())
        True
    """
    sampler = UniformWindowSampler(horizon)
    capacity = check_integer("capacity", capacity)
    if capacity < sampler.horizon:
        raise ValueError(
            f"capacity: expected at least horizon={sampler.horizon}, got {capacity}."
        )
    batch_size = check_integer("batch_size", batch_size)
    device = check_device("device", device)
    if generator is not None:
        check_type("generator", generator, torch.Generator)
    if memmap_dir is None:
        storage = LazyTensorStorage(capacity, device=device)
    elif device.type == "cpu":
        storage = LazyMemmapStorage(capacity, scratch_dir=memmap_dir, existsok=True)
    else:
        raise ValueError(
            f"device: expected 'cpu' with memmap_dir, got {str(device)!r}."
        )
    return WindowReplayBuffer(
        storage=storage,
        sampler=sampler,
        n_step=check_integer("n_step", n_step),
        batch_size=batch_size,
        generator=generator,
    )
