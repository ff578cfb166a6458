"""TorchRL checkpoints that are checked before anything in them is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from torchrl.checkpoint import (
    Checkpoint,
    CheckpointAdapter,
    CheckpointError,
    CheckpointLoadResult,
)
from torchrl.data import ReplayBuffer

from alm_torchrl.training.files import (
    file_digest,
    flush_to_disk,
    read_state,
    write_state,
)
from alm_torchrl.training.replay_segments import ReplayAdapter

__all__ = ["StateAdapter", "VerifiedCheckpoint", "clear_leftovers"]

FORMAT_VERSION = 1
_SECTION = "alm_torchrl"
_MANIFEST = "manifest.json"


class _HasState(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


class StateAdapter(CheckpointAdapter):
    """Keeps what has ``state_dict`` and ``load_state_dict`` in JSON and arrays.

    Unlike TorchRL's own adapter it writes no memory-mapped files, so that a full disk
    is an error and not the end of the process.

    Examples:
        >>> import torch
        >>> from torchrl.checkpoint import Checkpoint
        >>> net = torch.nn.Linear(2, 1)
        >>> _ = Checkpoint().register("net", net, adapter=StateAdapter())
    """

    adapter_id = "alm_torchrl.state"

    def save(
        self,
        component: _HasState,
        path: Path,
        *,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Writes ``component.state_dict()`` into the directory ``path``."""
        state: dict[str, Any] = component.state_dict(*args, **kwargs)
        write_state(path, state)
        return state

    def load(
        self,
        component: _HasState,
        path: Path,
        *,
        map_location: object,
        tensor_load_kwargs: Mapping[str, Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        """Gives what lies in ``path`` to ``component.load_state_dict``."""
        component.load_state_dict(read_state(path, map_location), *args, **kwargs)


class VerifiedCheckpoint(Checkpoint):
    """A :class:`torchrl.checkpoint.Checkpoint` that notices any damage.

    The manifest records size and SHA-256 of each file, and of itself; ``load`` checks
    those of the requested components before the first of them is touched. Nothing is
    pickled. Components with ``state_dict`` are kept by :class:`StateAdapter`, replay
    buffers by :class:`ReplayAdapter`, whose unchanged files are shared with the
    checkpoint before, by hard link. A save is on disk when it returns, under its
    final name, or leaves nothing.

    Keyword Args:
        **components: objects to save and restore, as in TorchRL.

    Raises:
        CheckpointError: by ``load``, if a file is missing, damaged or foreign, naming
            the file, what was expected and what was got; by ``save`` and ``load``,
            as TorchRL's.
        OSError: by ``save``, if the disk is full or the folder cannot be written.

    Examples:
        >>> import tempfile, torch
        >>> source, target = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = VerifiedCheckpoint(net=source).save(f"{folder}/saved")
        ...     result = VerifiedCheckpoint(net=target).load(path)
        >>> result.loaded, torch.equal(source.weight, target.weight)
        ({'net'}, True)
    """

    def __init__(self, **components: Any) -> None:
        super().__init__(**components)
        self.newest: Path | None = None
        # Digests of files that do not change any more.
        self._digests: dict[tuple[int, ...], str] = {}
        self.register_adapter(object, StateAdapter())
        self.register_adapter(ReplayBuffer, ReplayAdapter(lambda: self.newest))

    def load(
        self,
        path: str | Path,
        *,
        components: Collection[str] | None = None,
        **kwargs: Any,
    ) -> CheckpointLoadResult:
        """Checks the files of the requested components, then restores them.

        Args:
            path: the checkpoint.

        Keyword Args:
            components: names of the components. Default: ``None``, all registered.
            **kwargs: as in :meth:`torchrl.checkpoint.Checkpoint.load`.

        Returns:
            CheckpointLoadResult: what was loaded.

        Raises:
            CheckpointError: if the checkpoint is damaged, foreign or incomplete.
        """
        source = self._local_path(path)
        self.verify(source, components=components or self.components)
        result = super().load(source, components=components, **kwargs)
        self.newest = source
        return result

    def verify(
        self, path: str | Path, *, components: Collection[str] | None = None
    ) -> dict[str, Any]:
        """Checks files against the manifest without loading them.

        Args:
            path: the checkpoint.

        Keyword Args:
            components: whose files to check; names that the checkpoint lacks are
                passed over. Default: ``None``, all.

        Returns:
            dict: the manifest.

        Raises:
            CheckpointError: if a file is missing or damaged, or the checkpoint was
                not written by this class or by a newer version of it.
        """
        source = self._local_path(path)
        manifest = read_manifest(source)
        recorded = manifest[_SECTION]["files"]
        for name, record in manifest["components"].items():
            if components is not None and name not in components:
                continue
            for file in record["files"]:
                relative = f"{record['path']}/{file}"
                if relative not in recorded:
                    raise CheckpointError(f"{source}: {relative} has no checksum")
                self._check(source / relative, *recorded[relative])
        return manifest

    def _check(self, path: Path, size: int, digest: str) -> None:
        try:
            found = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        if found != size:
            raise CheckpointError(
                f"{path} is damaged: expected {size} bytes, got {found}"
            )
        actual = file_digest(path)
        if actual != digest:
            raise CheckpointError(
                f"{path} is damaged: expected SHA-256 {digest}, got {actual}"
            )
        self._digests[_identity(path)] = digest

    def _publish_path(self, source: Path, destination: Path) -> None:
        """Completes the manifest, waits for the disk, and gives the final name."""
        files, digests = {}, {}
        for path in sorted(source.rglob("*")):
            relative = path.relative_to(source).as_posix()
            if path.is_dir():
                flush_to_disk(path)
            elif relative != _MANIFEST:
                identity = _identity(path)
                digest = self._digests.get(identity)
                if digest is None:
                    flush_to_disk(path)
                    digest = file_digest(path)
                digests[identity] = digest
                files[relative] = [path.stat().st_size, digest]
        manifest = json.loads((source / _MANIFEST).read_text(encoding="utf-8"))
        manifest[_SECTION] = {"format_version": FORMAT_VERSION, "files": files}
        manifest[_SECTION]["manifest_sha256"] = _manifest_digest(manifest)
        with (source / _MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, sort_keys=True)
            file.write("\n")
        flush_to_disk(source / _MANIFEST)
        flush_to_disk(source)
        super()._publish_path(source, destination)
        flush_to_disk(destination.parent)
        self._digests = digests
        self.newest = destination


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that :class:`VerifiedCheckpoint` wrote.

    Raises:
        CheckpointError: if it is damaged, foreign, or of a newer version.
    """
    try:
        manifest: dict[str, Any] = Checkpoint.manifest(path)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} has no readable manifest: {error}") from error
    section = manifest.get(_SECTION)
    if not isinstance(section, dict) or "manifest_sha256" not in section:
        raise CheckpointError(
            f"{path} was not written by alm_torchrl: its manifest has no checksums"
        )
    version = section.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}; this version of alm_torchrl "
            f"reads version {FORMAT_VERSION}"
        )
    expected = section["manifest_sha256"]
    actual = _manifest_digest(manifest)
    if actual != expected:
        raise CheckpointError(
            f"{path / _MANIFEST} is damaged: expected SHA-256 {expected} of its "
            f"content, got {actual}"
        )
    return manifest


def clear_leftovers(directory: Path) -> None:
    """Removes what killed saves left in a directory of checkpoints.

    A checkpoint that was moved aside for one of the same name, whose place is still
    empty, is moved back.

    Args:
        directory: the directory; one that does not exist is empty.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     directory = Path(folder)
        ...     (directory / ".checkpoint-7.stage-0b5e").mkdir()
        ...     clear_leftovers(directory)
        ...     list(directory.iterdir())
        []
    """
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        name, _, rest = path.name.removeprefix(".").rpartition(".")
        kind = rest.partition("-")[0]
        if not (path.name.startswith(".") and name):
            continue
        if kind == "backup" and not (directory / name).exists():
            os.replace(path, directory / name)
        elif kind in ("stage", "backup", "delete"):
            shutil.rmtree(path)


def _identity(path: Path) -> tuple[int, ...]:
    """Tells a file that has not been changed since from any other."""
    stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    section = {k: v for k, v in manifest[_SECTION].items() if k != "manifest_sha256"}
    text = json.dumps({**manifest, _SECTION: section}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
