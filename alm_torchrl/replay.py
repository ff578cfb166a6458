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
)
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage

from alm_torchrl.checks import check_device, check_integer, check_number, check_type
from alm_torchrl.compat import last_written, storage_revision, stored_rows
from alm_torchrl.windows import (
    DONE_KEY,
    TRAJECTORY_KEY,
    check_storage,
    follow_rows,
    recent_age,
    window_offsets,
)

__all__ = ["UniformWindowSampler", "make_replay_buffer"]

MASK_KEY = ("collector", "mask")


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

    With a ``recency_decay`` below 1 they prefer what is new: a window's weight is
    ``max(recency_decay^age, recency_floor)``, its age the number of newer windows, and
    that of a single row likewise. No weights are stored. Source: the faded replay of
    DR.Q, with 0.9999 and 0.1.

    Args:
        horizon (int): steps per window, K.

    Keyword Args:
        recency_decay (float): weight of one step of age, in (0, 1]. Default: ``1.0``,
            uniform.
        recency_floor (float): smallest weight, in (0, 1]. Default: ``0.1``.

    Raises:
        ValueError: if ``horizon`` is not a positive integer, or a number is out of
            range.

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

    def __init__(
        self, horizon: int, *, recency_decay: float = 1.0, recency_floor: float = 0.1
    ) -> None:
        self.horizon = check_integer("horizon", horizon)
        self.recency_decay = check_number(
            "recency_decay", recency_decay, 0, 1, open_low=True
        )
        self.recency_floor = check_number(
            "recency_floor", recency_floor, 0, 1, open_low=True
        )
        # Columns from a single row on; set by the buffer that tells them from windows.
        self.n_step = 0
        self.short = False  # Whether windows may be short; set by that buffer, too.
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
        return len(storage) > 0 if self.short else self._count > 0

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
            episode ends before, its last row is repeated. So is that of short windows.

        Raises:
            RuntimeError: if no valid window is stored.
            ValueError: if ``batch_size`` is not a positive integer.
        """
        batch_size = check_integer("batch_size", batch_size)
        self._settle(storage)
        stored, capacity = len(storage), storage.max_size
        if not self.can_sample(storage, batch_size):
            raise RuntimeError(
                f"No valid window among the {stored} stored rows: horizon "
                f"{self.horizon} needs {self.horizon} consecutive steps of one episode."
            )
        if self.short:
            starts = self._draw_rows(storage, batch_size)
            index = follow_rows(storage, starts, self.horizon, self._written)
        else:
            rank = self._draw(self._count, batch_size)
            starts = self._starts[(self._head + rank) % capacity]
            index = (starts[:, None] + np.arange(self.horizon)) % capacity
        if self.n_step:
            rows = self._draw_rows(storage, batch_size)
            ahead = follow_rows(storage, rows, self.n_step, self._written)
            index = np.concatenate((index, ahead), axis=1)
        return torch.from_numpy(index), {}

    def _draw_rows(self, storage: Storage, size: int) -> np.ndarray:
        """Positions [size] of stored rows."""
        stored = len(storage)
        rank = self._draw(stored, size)
        if self.recency_decay == 1:
            return rank
        return (self._written - stored + rank) % storage.max_size

    def _draw(self, high: int, size: int) -> np.ndarray:
        """Ranks [size] below ``high``, where the oldest comes first."""
        device = "cpu" if self._rng is None else self._rng.device
        decay, floor = self.recency_decay, self.recency_floor
        if decay < 1:
            share = torch.rand(
                size, generator=self._rng, device=device, dtype=torch.float64
            )
            return high - 1 - recent_age(share.cpu().numpy(), high, decay, floor)
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
            check_storage(storage)
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
        starts = first + window_offsets(storage, first, written, self.horizon)
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


def _first_reads(index: torch.Tensor) -> torch.Tensor:
    """Where [B, K] positions are not those of the step before, [B, K]."""
    return functional.pad(index.diff(dim=1) != 0, (1, 0), value=True)


class WindowReplayBuffer(TensorDictReplayBuffer):
    """A `TensorDictReplayBuffer` that samples slices and single transitions.

    `make_replay_buffer` makes and documents it.
    """

    def __init__(
        self, *, sampler: UniformWindowSampler, n_step: int, short: bool, **kwargs: Any
    ) -> None:
        sampler.n_step = self.n_step = n_step
        sampler.short = self.short = short
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
        if self.short:
            slices[MASK_KEY] = _first_reads(info["index"][:, :horizon])
        if self.n_step > 1:
            lookahead = data[:, horizon:]
            lookahead["mask"] = _first_reads(info["index"][:, horizon:])
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
    short_slices: bool = False,
    recency_decay: float = 1.0,
    recency_floor: float = 0.1,
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

    With ``short_slices`` every stored row starts a slice, the last ones of an episode
    too. Such a slice is filled up in the same way, and ("collector", "mask") [B, K] is
    true where its steps are real: TorchRL's losses and ALM's leave out the others.

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
        short_slices (bool): whether slices may reach beyond their episode's end.
            Default: ``False``.
        recency_decay (float): weight of a row that is one row older, in (0, 1]; see
            :class:`UniformWindowSampler`. Default: ``1.0``, uniform.
        recency_floor (float): smallest weight, in (0, 1]. Default: ``0.1``.
        memmap_dir (str or Path, optional): directory of memory-mapped files for the
            rows; existing ones are overwritten. Default: ``None``, in memory.
        device (torch.device or str): device of the rows. Default: ``"cpu"``, the only
            one for memory-mapped files.
        generator (torch.Generator, optional): source of the draws. Default: ``None``,
            torch's global one.

    Returns:
        The empty buffer.

    Raises:
        ValueError: if a number is out of range, ``capacity`` is below ``horizon``, the
            device does not exist, or ``memmap_dir`` is given with another device than
            the CPU.
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
    sampler = UniformWindowSampler(
        horizon, recency_decay=recency_decay, recency_floor=recency_floor
    )
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
        short=check_type("short_slices", short_slices, bool),
        batch_size=batch_size,
        generator=generator,
    )
