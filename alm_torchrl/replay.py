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
    SINGLE_KEY,
    TRAJECTORY_KEY,
    StoredWindows,
    recent_age,
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

    A window is ``horizon`` consecutive steps of one trajectory, of which only the last
    may have ``("next", "done")`` set. So it never crosses an episode's end, a time
    limit, the place where the ring is being overwritten, or a resume that starts a
    fresh episode. Any number of environments may write their steps in turns, if
    ``("collector", "traj_ids")`` tells them apart; without that key all rows are those
    of one. Every valid window is equally likely. (`torchrl.data.SliceSampler` draws
    trajectories uniformly, which favours steps of short ones.) In the buffer of
    `make_replay_buffer` it draws single rows, too: every stored row is equally likely,
    and independent of the windows. There it adds the rows that follow a single one, as
    far as the episode was recorded, and marks these columns in the entry "is_single".

    The cost of a draw does not grow with what is stored: links between rows and a queue
    of starts follow each ``add`` and ``extend`` of the buffer, in other processes too,
    if it is shared. After other writes the next draw rebuilds them. Their order depends
    on the stored rows alone: a loaded buffer draws what the saved one draws.

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
        # Writes, the rows in them, and the position of the last row, or -1; of all
        # processes that the sampler is sent to.
        self._log = torch.tensor([0, 0, -1]).share_memory_()
        # The same, and the storage's revision, at the last draw.
        self._seen = (-1, 0, 0)
        self._windows: StoredWindows | None = None

    def add(self, index: int | torch.Tensor) -> None:
        """Records that a row was written at an index."""
        self._record(1, int(index))

    def extend(self, index: torch.Tensor) -> None:
        """Records that rows were written at the indices [N], in this order."""
        self._record(len(index), int(index[-1]))

    def _record(self, rows: int, last: int) -> None:
        writes, before, _ = self._log.tolist()
        self._log.copy_(torch.tensor([writes + 1, before + rows, last]))

    def can_sample(self, storage: Storage, batch_size: int) -> bool:
        """Whether the storage holds a valid window; draws are with replacement."""
        return len(storage) > 0 if self.short else self._settled(storage).count > 0

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
        windows, stored = self._settled(storage), len(storage)
        if not self.can_sample(storage, batch_size):
            raise RuntimeError(
                f"No valid window among the {stored} stored rows: horizon "
                f"{self.horizon} needs {self.horizon} consecutive steps of one episode."
            )
        if self.short:
            starts = self._draw_rows(storage, windows, batch_size)
        else:
            starts = windows.starts(self._draw(windows.count, batch_size))
        index = windows.follow(starts, self.horizon)
        if not self.n_step:
            return torch.from_numpy(index), {}
        rows = self._draw_rows(storage, windows, batch_size)
        ahead = windows.follow(rows, self.n_step)
        index = np.concatenate((index, ahead), axis=1)
        is_single = torch.arange(index.shape[1]) >= self.horizon
        return torch.from_numpy(index), {SINGLE_KEY: is_single.expand(index.shape)}

    def _draw_rows(
        self, storage: Storage, windows: StoredWindows, size: int
    ) -> np.ndarray:
        """Positions [size] of stored rows."""
        stored = len(storage)
        rank = self._draw(stored, size)
        if self.recency_decay == 1:
            return rank
        return (windows.written - stored + rank) % storage.max_size

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

    def _settled(self, storage: Storage) -> StoredWindows:
        """The windows in the storage as it is now."""
        revision = storage_revision(storage)
        writes, rows, last = self._log.tolist()
        known_revision, known_writes, known_rows = self._seen
        windows = self._windows
        # Each write that was recorded has changed the storage once.
        if windows is None or revision - known_revision != writes - known_writes:
            stored, capacity = len(storage), storage.max_size
            if last < 0:  # written by another buffer, or full from the start
                written_last = last_written(storage)
                last = -1 if written_last is None else written_last
            written = stored if stored < capacity else capacity + last + 1
            windows = self._windows = StoredWindows(storage, self.horizon, written)
        elif rows > known_rows:
            windows.append(storage, rows - known_rows)
        self._seen = (revision, writes, rows)
        return windows

    def state_dict(self) -> dict[str, Any]:
        """Returns the last row written; the rest follows from the storage."""
        last = int(self._log[2])
        return {"last_row": None if last < 0 else last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state."""
        last = state_dict["last_row"]
        self._log[2] = -1 if last is None else last

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


def _check_trajectories(rows: TensorDictBase) -> None:
    """Raises a ValueError unless rows [E, T] have a trajectory in one place only."""
    ids = rows.get(TRAJECTORY_KEY, None)
    if ids is None:
        got = "none"
    else:
        ids = ids.reshape(rows.batch_size)
        pairs = torch.stack((torch.arange(len(ids)).expand_as(ids.T).T, ids.cpu()), -1)
        if len(pairs.flatten(0, 1).unique(dim=0)) == len(ids.unique()):
            return
        got = "some that environments share"
    raise ValueError(
        f"tensordicts: expected {TRAJECTORY_KEY}, which a Collector writes, with other "
        f"numbers in each of the {len(rows)} environments, got {got}."
    )


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
        """Stores rows [N] in the order of time, or [E, T] of E environments.

        Raises:
            ValueError: if there are more rows than the buffer can hold, the batch size
                has another number of dimensions, or nothing tells E environments apart.
            KeyError: if the rows have other entries than those stored.
        """
        check_type("tensordicts", tensordicts, TensorDictBase)
        self._check_entries(tensordicts)
        capacity, shape = self._storage.max_size, tensordicts.batch_size
        if len(shape) not in (1, 2) or shape.numel() == 0:
            raise ValueError(
                "tensordicts: expected batch size [N] or [E, T], steps in the order of "
                f"time and breaks between episodes marked by {DONE_KEY} or "
                f"{TRAJECTORY_KEY}, got {list(shape)}."
            )
        if shape.numel() > capacity:
            raise ValueError(
                f"tensordicts: expected at most {capacity} rows (the buffer's "
                f"capacity) at once, got {shape.numel()}."
            )
        if len(shape) == 2:
            if shape[0] > 1:
                _check_trajectories(tensordicts)
            tensordicts = tensordicts.transpose(0, 1).reshape(-1)
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
        del data[SINGLE_KEY], info[SINGLE_KEY]
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
    ("next", "done"), and ("collector", "traj_ids") where several environments write, or
    an episode may break off without "done", as in ``env.rollout(n)`` or after a resume
    that starts a fresh episode. A window may cross a break that nothing marks.
    ``extend`` takes [N] rows, such as a step of N environments, or [E, T], such as T
    steps of E. For writers in other processes, call ``share()`` after the first write.

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
