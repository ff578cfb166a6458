"""A replay buffer in immutable files that checkpoints share."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.checkpoint import CheckpointAdapter
from torchrl.data import (
    ReplayBuffer,
    RoundRobinWriter,
    TensorDictRoundRobinWriter,
    TensorStorage,
)

from alm_torchrl.training.files import (
    read_state,
    read_tensors,
    write_json,
    write_state,
    write_tensors,
)

__all__ = ["ReplayAdapter"]

_INDEX = "replay.json"
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)


class ReplayAdapter(CheckpointAdapter):
    """Saves the rows that a replay buffer holds, in the order they were written.

    Rows are numbered in the order of writing and cut into segments of equal length,
    one file each. A segment that is complete never changes, so a later checkpoint
    takes it over by hard link (by copy where the file system has none) and writes
    only what is new: the cost of a save depends on the steps since the one before,
    not on what is stored. Rows must not be changed once they are written.

    Works for any TorchRL buffer with a one-dimensional
    :class:`~torchrl.data.TensorStorage` of tensordicts, in memory or memory-mapped,
    and a round-robin writer; sampler and generator are saved with it.

    Args:
        previous: gives the checkpoint to take segments from, if there is one.

    Keyword Args:
        segment_rows: rows per segment. Default: ``8192``.

    Raises:
        TypeError: by ``save`` and ``load``, for another kind of buffer.
        ValueError: by ``load``, if the buffer has another capacity, or the files do
            not hold what their index says.

    Examples:
        >>> import tempfile
        >>> from torchrl.checkpoint import Checkpoint
        >>> from alm_torchrl import make_replay_buffer
        >>> def checkpoint(buffer):
        ...     adapter = ReplayAdapter(lambda: None)
        ...     return Checkpoint().register("replay", buffer, adapter=adapter)
        >>> one, other = (
        ...     make_replay_buffer(9, batch_size=2, horizon=1) for _ in range(2)
        ... )
        >>> done = torch.tensor([[False], [True]])
        >>> _ = one.extend(TensorDict({"next": {"done": done}}, [2]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = checkpoint(one).save(f"{folder}/saved")
        ...     _ = checkpoint(other).load(path)
        >>> len(other)
        2
    """

    adapter_id = "alm_torchrl.replay"

    def __init__(
        self, previous: Callable[[], Path | None], *, segment_rows: int = 8192
    ) -> None:
        self.previous = previous
        self.segment_rows = segment_rows
        self._ids: WeakKeyDictionary[ReplayBuffer, str] = WeakKeyDictionary()

    def save(
        self,
        component: ReplayBuffer,
        path: Path,
        *,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Writes what the buffer holds into the directory ``path``."""
        storage, writer = _parts(component)
        path.mkdir(parents=True)
        written, stored = writer._write_count, len(storage)
        buffer_id = self._ids.setdefault(component, uuid.uuid4().hex)
        old = self._segments_of_previous(buffer_id)
        segments = []
        for first, stop in self._bounds(written - stored, written):
            number = first // self.segment_rows
            name = f"rows-{number:06d}.npz"
            known = old.get(name)
            if known is not None and known["path"].exists():
                _link(known["path"], path / name)
                first = known["first"]
            else:
                index = torch.arange(first, stop) - written + writer._cursor
                rows = storage[index % storage.max_size]
                write_tensors(path / name, _leaves(rows))
            segments.append({"file": name, "first": first, "stop": stop})
        write_json(
            path / _INDEX,
            {
                "id": buffer_id,
                "capacity": storage.max_size,
                "written": written,
                "stored": stored,
                "cursor": writer._cursor,
                "segments": segments,
            },
        )
        generator = component._rng
        write_state(
            path / "sampler",
            {
                "sampler": component.sampler.state_dict(),
                "generator": None if generator is None else generator.get_state(),
            },
        )

    def load(
        self,
        component: ReplayBuffer,
        path: Path,
        *,
        map_location: object,
        tensor_load_kwargs: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Fills the buffer with what lies in ``path``; its own rows are dropped."""
        storage, writer = _parts(component)
        index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
        if index["capacity"] != storage.max_size:
            raise ValueError(
                f"the replay buffer: expected the saved capacity {index['capacity']}, "
                f"got {storage.max_size}"
            )
        written, stored, cursor = index["written"], index["stored"], index["cursor"]
        component.empty()
        expected = written - stored
        for segment in index["segments"]:
            file = path / segment["file"]
            rows = _rows(read_tensors(file), segment["stop"] - segment["first"], file)
            first = max(segment["first"], written - stored)
            if first != expected:
                raise ValueError(f"{file}: expected row {expected}, got row {first}")
            expected = segment["stop"]
            rows = rows[first - segment["first"] :].to(storage.device)
            places = torch.arange(first, expected) - written + cursor
            storage.set(places % storage.max_size, rows)
        if expected != written:
            raise ValueError(f"{path}: expected {written} rows, got {expected}")
        writer.load_state_dict({"_cursor": cursor, "_write_count": written})
        state = read_state(path / "sampler")
        component.sampler.load_state_dict(state["sampler"])
        if component._rng is not None and state["generator"] is not None:
            component._rng.set_state(state["generator"])
        self._ids[component] = index["id"]

    def _bounds(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cuts rows [first, stop) at the multiples of the segment's length."""
        while first < stop:
            end = min((first // self.segment_rows + 1) * self.segment_rows, stop)
            yield first, end
            first = end

    def _segments_of_previous(self, buffer_id: str) -> dict[str, dict[str, Any]]:
        """Complete segments of the same buffer in the previous checkpoint, by name."""
        previous = self.previous()
        if previous is None:
            return {}
        for file in (previous / "components").glob(f"*/{_INDEX}"):
            index = json.loads(file.read_text(encoding="utf-8"))
            if index["id"] == buffer_id:
                return {
                    segment["file"]: {**segment, "path": file.parent / segment["file"]}
                    for segment in index["segments"]
                    if segment["stop"] % self.segment_rows == 0
                }
        return {}


def _parts(buffer: ReplayBuffer) -> tuple[TensorStorage, RoundRobinWriter]:
    storage, writer = buffer.storage, buffer.writer
    is_round_robin = isinstance(writer, RoundRobinWriter | TensorDictRoundRobinWriter)
    if not isinstance(storage, TensorStorage) or storage.ndim != 1:
        raise TypeError(
            "the replay buffer's storage: expected a TensorStorage with ndim=1, got "
            f"{type(storage).__name__}"
        )
    if not is_round_robin:
        raise TypeError(
            "the replay buffer's writer: expected a RoundRobinWriter, got "
            f"{type(writer).__name__}"
        )
    return storage, writer


def _leaves(rows: TensorDictBase) -> dict[str, torch.Tensor]:
    """Leaves by the JSON text of their key, which may be nested."""
    return {
        json.dumps(key): value
        for key, value in rows.items(include_nested=True, leaves_only=True)
    }


def _rows(leaves: Mapping[str, torch.Tensor], count: int, file: Path) -> TensorDict:
    rows = TensorDict({}, batch_size=[count])
    for text, value in leaves.items():
        key = json.loads(text)
        if value.shape[0] != count:
            raise ValueError(
                f"{file}: expected {count} rows of {key}, got {value.shape[0]}"
            )
        rows.set(key if isinstance(key, str) else tuple(key), value)
    return rows


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)
