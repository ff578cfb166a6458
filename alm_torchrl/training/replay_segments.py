"""A replay buffer in immutable files that checkpoints share."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.checkpoint import CheckpointAdapter
from torchrl.data import ReplayBuffer, RoundRobinWriter, TensorStorage

from alm_torchrl.compat import generator_of, stored_rows
from alm_torchrl.replay import UniformWindowSampler
from alm_torchrl.training.files import file_digest, one_line, read_state, write_state
from alm_torchrl.training.state_checks import check_state

__all__ = ["ReplayAdapter"]

SEGMENT_ROWS = 8192
_INDEX = "replay.npz"
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK)


class ReplayAdapter(CheckpointAdapter):
    """Saves the rows that a replay buffer holds, in the order they were written.

    Rows are numbered in the order of writing and cut into segments of equal length,
    one file each. A complete segment never changes, so a later checkpoint takes it
    over by hard link (by copy where the file system has none), unless its digest is
    not the recorded one, and writes only what is new. Rows must not be changed once
    they are written.

    Args:
        recorded: gives size and digest of each file of the checkpoint to take segments
            from.
    """

    adapter_id = "alm_torchrl.replay"

    def __init__(self, recorded: Callable[[], Mapping[Path, Sequence[Any]]]) -> None:
        self.recorded = recorded
        self.digests: dict[Path, str] = {}
        """Of the files that were taken over, for who publishes them."""
        self._ids: WeakKeyDictionary[ReplayBuffer, str] = WeakKeyDictionary()

    def save(self, component: ReplayBuffer, path: Path, **_: Any) -> None:
        """Writes rows, sampler and generator into the directory ``path``."""
        storage, _writer = _parts(component)
        path.mkdir(parents=True)
        index = _index(component)
        index["id"] = self._ids.setdefault(component, uuid.uuid4().hex)
        written, cursor = index["written"], index["cursor"]
        known = self._complete_segments(index["id"])
        first = written - index["stored"]
        while first < written:
            number = first // SEGMENT_ROWS
            stop = min((number + 1) * SEGMENT_ROWS, written)
            name = f"rows-{number:06d}.npz"
            source, begin = known.get(name, (None, first))
            if source is not None and self._take_over(source, path / name):
                first = begin
            else:
                places = torch.arange(first, stop) - written + cursor
                rows = storage[places % storage.max_size]
                write_state(path / name, rows.to_dict())
            index["segments"].append([name, first, stop])
            first = stop
        write_state(path / _INDEX, index)

    def check(
        self,
        component: ReplayBuffer,
        path: Path,
        map_location: object = None,
    ) -> dict[str, Any]:
        """Compares what lies in ``path`` with the buffer, and changes nothing.

        Returns:
            The index of the segments.

        Raises:
            ValueError: naming the file that does not fit.
        """
        storage, _ = _parts(component)
        index = read_state(path / _INDEX)
        _check_index(index, component, path / _INDEX)
        oldest = expected = index["written"] - index["stored"]
        like = stored_rows(storage)
        for name, first, stop in index["segments"]:
            if max(first, oldest) != expected:
                raise ValueError(
                    f"{path / name}: expected row {expected}, got row {first}"
                )
            rows = _read_rows(path / name, stop - first)
            like = rows if like is None else like
            check_state(rows[:0].to_dict(), like[:0].to_dict(), str(path / name))
            expected = stop
        if expected != index["written"]:
            raise ValueError(
                f"{path}: expected {index['written']} rows, got {expected}"
            )
        return index

    def load(self, component: ReplayBuffer, path: Path, **_: Any) -> None:
        """Fills the buffer with what lies in ``path``; its own rows are dropped."""
        index = self.check(component, path)
        storage, writer = _parts(component)
        component.empty()
        written, cursor = index["written"], index["cursor"]
        following = written - index["stored"]
        for name, first, stop in index["segments"]:
            rows = _read_rows(path / name, stop - first, storage.device)
            places = torch.arange(following, stop) - written + cursor
            storage.set(places % storage.max_size, rows[following - first :])
            following = stop
        writer.load_state_dict({"_cursor": cursor, "_write_count": written})
        component.sampler.load_state_dict(index["sampler"])
        generator = generator_of(component)
        if generator is not None and index["generator"] is not None:
            generator.set_state(index["generator"])
        self._ids[component] = index["id"]

    def _take_over(self, source: Path, target: Path) -> bool:
        """Links a segment, unless it is no longer what was recorded."""
        _link(source, target)
        digest = file_digest(target)
        if digest == self.recorded()[source][1]:
            self.digests[target] = digest
            return True
        target.unlink()
        warnings.warn(
            f"{source} is damaged; its rows are written again from memory",
            UserWarning,
            stacklevel=2,
        )
        return False

    def _complete_segments(self, buffer_id: str) -> dict[str, tuple[Path, int]]:
        """File and first row of the same buffer's segments in the last checkpoint."""
        recorded = self.recorded()
        for file, (_, digest) in recorded.items():
            if file.name != _INDEX or not file.exists() or file_digest(file) != digest:
                continue
            index = read_state(file)
            if index["id"] == buffer_id:
                return {
                    name: (file.parent / name, first)
                    for name, first, stop in index["segments"]
                    if stop % SEGMENT_ROWS == 0 and _is_own_file(file.parent / name)
                }
        return {}


def _index(buffer: ReplayBuffer) -> dict[str, Any]:
    """What a checkpoint says of a buffer besides its rows, without the segments."""
    storage, writer = _parts(buffer)
    position, generator = writer.state_dict(), generator_of(buffer)
    return {
        "id": "",
        "capacity": storage.max_size,
        "written": position["_write_count"],
        "stored": len(storage),
        "cursor": position["_cursor"],
        "segments": [],
        "sampler": buffer.sampler.state_dict(),
        "generator": None if generator is None else generator.get_state(),
    }


def _check_index(index: Any, buffer: ReplayBuffer, file: Path) -> None:  # noqa: ANN401
    """Raises if an index does not fit a buffer or has impossible numbers."""
    own, generator = _index(buffer), generator_of(buffer)
    if isinstance(index, dict):
        # Either may have no generator, and the saved one is left out then.
        if generator is None or index.get("generator") is None:
            own["generator"] = index.get("generator")
        else:
            torch.Generator(generator.device).set_state(index["generator"])
    check_state(index, own, str(file))
    if index["capacity"] != own["capacity"]:
        raise ValueError(
            f"the replay buffer: expected the saved capacity {index['capacity']}, got "
            f"{own['capacity']}"
        )
    capacity, written = own["capacity"], index["written"]
    stored, cursor = index["stored"], index["cursor"]
    if not 0 <= stored <= min(written, capacity) or not (
        cursor in range(capacity) if stored == capacity else cursor == stored
    ):
        raise ValueError(
            f"{file}: expected written >= stored >= 0 and the cursor behind the rows, "
            f"got written={written}, stored={stored}, cursor={cursor}"
        )
    if isinstance(buffer.sampler, UniformWindowSampler):
        last = index["sampler"]["last_row"]
        if last is not None and last not in range(capacity):
            raise ValueError(f"{file}: expected a row below {capacity}, got {last}")
    names: list[str] = []
    for segment in index["segments"]:
        check_state(segment, ["", 0, 0], f"{file}: segment")
        name, first, stop = segment
        if not re.fullmatch(r"rows-\d+\.npz", name) or name in names:
            raise ValueError(f"{file}: expected the name of a segment, got {name!r}")
        if not 0 <= first < stop:
            raise ValueError(f"{file}: {name} has the rows {first} to {stop}")
        names.append(name)


def _read_rows(
    file: Path, count: int, device: torch.device | None = None
) -> TensorDict:
    state = read_state(file, device)
    try:
        rows = TensorDict(state, batch_size=[count])
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: expected {count} rows ({one_line(error)})"
        ) from error
    if not all(isinstance(value, Tensor) for value in rows.values(True, True)):
        raise ValueError(f"{file}: expected rows of tensors")
    return rows


def _is_own_file(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


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
