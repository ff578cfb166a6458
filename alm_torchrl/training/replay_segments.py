"""A replay buffer in immutable files that checkpoints share."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tensordict import TensorDict
from torchrl.checkpoint import CheckpointAdapter
from torchrl.data import ReplayBuffer, RoundRobinWriter, TensorStorage

from alm_torchrl.compat import generator_of
from alm_torchrl.training.files import read_state, write_state

__all__ = ["ReplayAdapter"]

SEGMENT_ROWS = 8192
_INDEX = "replay.npz"
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)


class ReplayAdapter(CheckpointAdapter):
    """Saves the rows that a replay buffer holds, in the order they were written.

    Rows are numbered in the order of writing and cut into segments of equal length,
    one file each. A complete segment never changes, so a later checkpoint takes it
    over by hard link (by copy where the file system has none) and writes only what
    is new. Rows must not be changed once they are written.

    Args:
        previous: gives the checkpoint to take segments from, if there is one.
    """

    adapter_id = "alm_torchrl.replay"

    def __init__(self, previous: Callable[[], Path | None]) -> None:
        self.previous = previous
        self._ids: WeakKeyDictionary[ReplayBuffer, str] = WeakKeyDictionary()

    def save(self, component: ReplayBuffer, path: Path, **_: Any) -> None:
        """Writes rows, sampler and generator into the directory ``path``."""
        storage, writer = _parts(component)
        path.mkdir(parents=True)
        position = writer.state_dict()
        written, cursor = position["_write_count"], position["_cursor"]
        buffer_id = self._ids.setdefault(component, uuid.uuid4().hex)
        known = self._complete_segments(buffer_id)
        first, segments = written - len(storage), []
        while first < written:
            number = first // SEGMENT_ROWS
            stop = min((number + 1) * SEGMENT_ROWS, written)
            name = f"rows-{number:06d}.npz"
            if name in known:
                source, first = known[name]
                _link(source, path / name)
            else:
                places = torch.arange(first, stop) - written + cursor
                rows = storage[places % storage.max_size]
                write_state(path / name, rows.to_dict())
            segments.append([name, first, stop])
            first = stop
        generator = generator_of(component)
        index = {
            "id": buffer_id,
            "capacity": storage.max_size,
            "written": written,
            "stored": len(storage),
            "cursor": cursor,
            "segments": segments,
            "sampler": component.sampler.state_dict(),
            "generator": None if generator is None else generator.get_state(),
        }
        write_state(path / _INDEX, index)

    def load(self, component: ReplayBuffer, path: Path, **_: Any) -> None:
        """Fills the buffer with what lies in ``path``; its own rows are dropped."""
        storage, writer = _parts(component)
        index = read_state(path / _INDEX)
        if index["capacity"] != storage.max_size:
            raise ValueError(
                f"the replay buffer: expected the saved capacity {index['capacity']}, "
                f"got {storage.max_size}"
            )
        component.empty()
        written, cursor = index["written"], index["cursor"]
        oldest = expected = written - index["stored"]
        for name, first, stop in index["segments"]:
            state = read_state(path / name, storage.device)
            try:
                rows = TensorDict(state, batch_size=[stop - first])
            except RuntimeError as error:
                raise ValueError(
                    f"{path / name}: expected {stop - first} rows ({error})"
                ) from error
            if max(first, oldest) != expected:
                raise ValueError(
                    f"{path / name}: expected row {expected}, got row {first}"
                )
            places = torch.arange(expected, stop) - written + cursor
            storage.set(places % storage.max_size, rows[expected - first :])
            expected = stop
        if expected != written:
            raise ValueError(f"{path}: expected {written} rows, got {expected}")
        writer.load_state_dict({"_cursor": cursor, "_write_count": written})
        component.sampler.load_state_dict(index["sampler"])
        generator = generator_of(component)
        if generator is not None and index["generator"] is not None:
            generator.set_state(index["generator"])
        self._ids[component] = index["id"]

    def _complete_segments(self, buffer_id: str) -> dict[str, tuple[Path, int]]:
        """File and first row of the same buffer's segments in the last checkpoint."""
        previous = self.previous()
        if previous is None:
            return {}
        for file in (previous / "components").glob(f"*/{_INDEX}"):
            index = read_state(file)
            if index["id"] == buffer_id:
                return {
                    name: (file.parent / name, first)
                    for name, first, stop in index["segments"]
                    if stop % SEGMENT_ROWS == 0 and (file.parent / name).exists()
                }
        return {}


def _parts(buffer: ReplayBuffer) -> tuple[TensorStorage, RoundRobinWriter]:
    storage, writer = buffer.storage, buffer.writer
    if not isinstance(storage, TensorStorage) or storage.ndim != 1:
        raise TypeError(
            "the replay buffer's storage: expected a TensorStorage with ndim=1, got "
            f"{type(storage).__name__}"
        )
    if not isinstance(writer, RoundRobinWriter):
        raise TypeError(
            "the replay buffer's writer: expected a RoundRobinWriter, got "
            f"{type(writer).__name__}"
        )
    return storage, writer


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)
