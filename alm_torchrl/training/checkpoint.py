"""TorchRL checkpoints that are checked before anything in them is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointAdapter,
    CheckpointError,
    CheckpointLoadResult,
    GlobalRNGState,
)
from torchrl.data import ReplayBuffer

from alm_torchrl.training.files import (
    file_digest,
    flush_to_disk,
    read_state,
    write_state,
)
from alm_torchrl.training.replay_segments import ReplayAdapter

__all__ = ["RandomState", "VerifiedCheckpoint", "clear_leftovers"]

FORMAT_VERSION = 2
_SECTION = "alm_torchrl"
_MANIFEST = "manifest.json"
_STATE = "state.npz"


class StateAdapter(CheckpointAdapter):
    """Keeps what has ``state_dict`` and ``load_state_dict`` in a file of arrays.

    TorchRL's own adapter writes memory-mapped files, where a full disk ends the
    process; here it is an error.
    """

    adapter_id = "alm_torchrl.state"

    def save(self, component: Any, path: Path, **_: Any) -> None:  # noqa: ANN401
        """Writes ``component.state_dict()`` into the directory ``path``."""
        path.mkdir(parents=True)
        write_state(path / _STATE, component.state_dict())

    def load(
        self,
        component: Any,  # noqa: ANN401
        path: Path,
        *,
        map_location: object,
        **_: Any,
    ) -> None:
        """Gives what lies in ``path`` to ``component.load_state_dict``."""
        component.load_state_dict(read_state(path / _STATE, map_location))


class RandomState(GlobalRNGState):
    """The generators of Python, NumPy and PyTorch as a checkpoint component.

    :class:`torchrl.checkpoint.GlobalRNGState` refuses the states of CUDA generators
    on a machine with fewer devices. This one leaves those out, and warns.

    Warns:
        UserWarning: by ``load_state_dict``, if states of CUDA generators are left out.

    Examples:
        >>> import torch
        >>> state = RandomState().state_dict()
        >>> number = torch.rand(())
        >>> RandomState().load_state_dict(state)
        >>> bool(torch.rand(()) == number)
        True
    """

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Puts the generators back where :meth:`state_dict` was taken.

        Args:
            state_dict: the saved state.
        """
        state = dict(state_dict)
        saved = state.pop("torch_cuda", [])
        here = torch.cuda.device_count()
        if len(saved) > here:
            warnings.warn(
                f"the checkpoint has the generators of {len(saved)} CUDA devices, and "
                f"there are {here} here: what is drawn on a GPU goes on with other "
                "random numbers.",
                UserWarning,
                stacklevel=2,
            )
        if saved[:here]:
            state["torch_cuda"] = saved[:here]
        super().load_state_dict(state)


class VerifiedCheckpoint(Checkpoint):
    """A :class:`torchrl.checkpoint.Checkpoint` that notices any damage.

    The manifest records size and SHA-256 of each file, and of itself; ``load`` checks
    those of the requested components before the first of them is touched. Nothing is
    pickled. The rows of replay buffers are shared between checkpoints by hard link.
    A save is on disk under its final name when it returns, or leaves nothing.

    Keyword Args:
        **components: objects with ``state_dict`` and ``load_state_dict``, and replay
            buffers, to save and restore.

    Raises:
        CheckpointError: by ``load``, if a file is missing, damaged or foreign, or a
            component does not take its state.
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
        # The checkpoint saved or loaded last, and size and digest of its files.
        self._newest: Path | None = None
        self._files: dict[str, list[Any]] = {}
        self.register_adapter(object, StateAdapter())
        self.register_adapter(ReplayBuffer, ReplayAdapter(lambda: self._newest))

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
            What was loaded.
        """
        source = Path(path).expanduser().absolute()
        manifest = self.verify(source, components=components or self.components)
        result = super().load(source, components=components, **kwargs)
        self._newest, self._files = source, manifest[_SECTION]["files"]
        return result

    def verify(
        self, path: str | Path, *, components: Collection[str] | None = None
    ) -> dict[str, Any]:
        """Checks files against the manifest without loading them.

        Args:
            path: the checkpoint.

        Keyword Args:
            components: whose files to check; names that the checkpoint lacks are
                ignored. Default: ``None``, all.

        Returns:
            The manifest.

        Raises:
            CheckpointError: if the checkpoint is damaged, foreign or of another format.
        """
        source = Path(path).expanduser().absolute()
        manifest = read_manifest(source)
        for name, record in manifest["components"].items():
            if components is None or name in components:
                for file in record["files"]:
                    relative = f"{record['path']}/{file}"
                    recorded = manifest[_SECTION]["files"].get(relative)
                    _check(source / relative, recorded)
        return manifest

    def _publish_path(self, source: Path, destination: Path) -> None:
        """Completes the manifest, waits for the disk, and gives the final name."""
        files: dict[str, list[Any]] = {}
        for path in sorted(source.rglob("*")):
            relative = path.relative_to(source).as_posix()
            if path.is_dir():
                flush_to_disk(path)
            elif relative != _MANIFEST:
                shared = self._shared(path, relative)
                if shared is None:
                    flush_to_disk(path)
                files[relative] = shared or [path.stat().st_size, file_digest(path)]
        manifest = json.loads((source / _MANIFEST).read_text(encoding="utf-8"))
        manifest[_SECTION] = {"format_version": FORMAT_VERSION, "files": files}
        manifest[_SECTION]["manifest_sha256"] = _manifest_digest(manifest)
        with (source / _MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, sort_keys=True)
        flush_to_disk(source / _MANIFEST)
        flush_to_disk(source)
        super()._publish_path(source, destination)
        flush_to_disk(destination.parent)
        self._newest, self._files = destination, files

    def _shared(self, path: Path, relative: str) -> list[Any] | None:
        """Size and digest of a file that is also in the checkpoint before."""
        if self._newest is None or path.stat().st_nlink == 1:
            return None
        before = self._newest / relative
        same = before.exists() and before.samefile(path)
        return self._files.get(relative) if same else None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that :class:`VerifiedCheckpoint` wrote.

    Raises:
        CheckpointError: if it is damaged, foreign, or of another version.
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
    expected, actual = section["manifest_sha256"], _manifest_digest(manifest)
    if actual != expected:
        raise CheckpointError(
            f"{path / _MANIFEST} is damaged: expected SHA-256 {expected} of its "
            f"content, got {actual}"
        )
    return manifest


# Merge: the checkpoint's own branch has this function; take that one.
def inspect_checkpoint(path: Path) -> Iterator[tuple[str, str | None]]:
    """Each file of a checkpoint, and what is wrong with it, if anything."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        yield _MANIFEST, str(error)
        return
    yield _MANIFEST, None
    for file, recorded in manifest[_SECTION]["files"].items():
        try:
            _check(path / file, recorded)
        except CheckpointError as error:
            yield file, str(error)
        else:
            yield file, None


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
    for path in sorted(directory.glob(".?*.*-*")):
        name, _, rest = path.name[1:].rpartition(".")
        kind = rest.partition("-")[0]
        if kind == "backup" and path.is_dir() and not (directory / name).exists():
            os.replace(path, directory / name)
        elif kind in ("stage", "backup", "delete") and path.is_dir():
            shutil.rmtree(path)


def _check(path: Path, recorded: list[Any] | None) -> None:
    """Compares a file with the size and digest that the manifest has for it."""
    if recorded is None:
        raise CheckpointError(f"{path} has no checksum in the manifest")
    size, digest = recorded
    try:
        found = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if found != size:
        raise CheckpointError(f"{path} is damaged: expected {size} bytes, got {found}")
    actual = file_digest(path)
    if actual != digest:
        raise CheckpointError(
            f"{path} is damaged: expected SHA-256 {digest}, got {actual}"
        )


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    section = {k: v for k, v in manifest[_SECTION].items() if k != "manifest_sha256"}
    text = json.dumps({**manifest, _SECTION: section}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
