"""TorchRL checkpoints that are checked before anything in them is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointAdapter,
    CheckpointError,
    CheckpointLoadResult,
    GlobalRNGState,
)
from torchrl.data import ReplayBuffer
from torchrl.record.loggers import Logger

from alm_torchrl.training.files import (
    file_digest,
    flush_to_disk,
    one_line,
    parse_json,
    read_state,
    write_state,
)
from alm_torchrl.training.replay_segments import ReplayAdapter
from alm_torchrl.training.state_checks import check_adam, check_names, check_state

__all__ = [
    "RandomState",
    "VerifiedCheckpoint",
    "clear_leftovers",
    "inspect_checkpoint",
    "read_manifest",
]

FORMAT_VERSION = 2
_SECTION = "alm_torchrl"
_MANIFEST = "manifest.json"
_STATE = "state.npz"
_NUMPY_WORDS = 624


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
        map_location: Any,  # noqa: ANN401
        **_: Any,
    ) -> None:
        """Gives what lies in ``path`` to ``component.load_state_dict``."""
        component.load_state_dict(read_state(path / _STATE, map_location))

    def check(self, component: Any, path: Path, map_location: Any) -> None:  # noqa: ANN401
        """Compares what lies in ``path`` with the component, and changes nothing."""
        state = read_state(path / _STATE, map_location)
        if hasattr(component, "check_state_dict"):
            component.check_state_dict(state)
        elif isinstance(component, torch.optim.Adam):
            check_adam(state, component, "state")
        elif not isinstance(component, Logger):  # which may be of another kind now
            own = component.state_dict()
            check_state(state, own, "state")
            if isinstance(component, nn.Module):
                check_names(state, own, "state")


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

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Tries a state on generators of its own.

        Raises:
            ValueError: if there are no generators in such a state.
        """
        names = ("python", "torch_cpu", "numpy")
        own = self.state_dict()
        check_state(
            {name: state_dict.get(name) for name in names},
            {name: own[name] for name in names},
            "generators",
        )
        random.Random().setstate(state_dict["python"])
        if not 0 <= state_dict["numpy"][2] <= _NUMPY_WORDS:
            raise ValueError(f"generators.numpy: position {state_dict['numpy'][2]}")
        torch.Generator().set_state(state_dict["torch_cpu"].cpu())
        cuda = state_dict.get("torch_cuda", [])
        for number, state in enumerate(cuda[: torch.cuda.device_count()]):
            torch.Generator(f"cuda:{number}").set_state(state.cpu())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Puts the generators back where :meth:`state_dict` was taken.

        Args:
            state_dict: the saved state.
        """
        self.check_state_dict(state_dict)
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

    The manifest records size and SHA-256 of each file, and of itself. ``load`` checks
    the files of the requested components and then, without ``strict="warn"`` or
    ``"ignore"``, whether each state fits its component, before the first of them is
    touched. Names, types, sizes, shapes and dtypes must be those of the component's
    own ``state_dict()``, where that is not empty. A component whose state changes in
    size has a method ``check_state_dict(state_dict)`` that raises ``ValueError``.

    Nothing is pickled. The rows of replay buffers are shared between checkpoints by
    hard link. A save is on disk under its final name when it returns, or leaves
    nothing.

    Keyword Args:
        **components: objects with ``state_dict`` and ``load_state_dict``, and replay
            buffers, to save and restore.

    Raises:
        CheckpointError: by ``load``, if a file is missing, damaged or foreign, or a
            component does not take its state.
        OSError: by ``save``, if the disk is full or the folder cannot be written.

    Warns:
        UserWarning: by ``save``, if a file of the checkpoint before is damaged that
            was to be shared; its rows are written again.

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
        # Size and digest of the files of the checkpoint saved or loaded last.
        self._files: dict[Path, list[Any]] = {}
        self._replay = ReplayAdapter(lambda: self._files)
        self._state = StateAdapter()
        self.register_adapter(object, self._state)
        self.register_adapter(ReplayBuffer, self._replay)

    def load(
        self,
        path: str | Path,
        *,
        components: Collection[str] | None = None,
        **kwargs: Any,
    ) -> CheckpointLoadResult:
        """Checks the requested components, then restores them.

        Args:
            path: the checkpoint.

        Keyword Args:
            components: names of the components. Default: ``None``, all registered,
                besides a logger that the checkpoint lacks.
            **kwargs: as in :meth:`torchrl.checkpoint.Checkpoint.load`.

        Returns:
            What was loaded.
        """
        source = Path(path).expanduser().absolute()
        names = sorted(self.components if components is None else components)
        manifest = self.verify(source, components=names)
        if components is None:  # A run may continue with a logger, after none.
            names = [
                name
                for name in names
                if name in manifest["components"]
                or not isinstance(self.components[name], Logger)
            ]
        if (kwargs.get("strict") or self.strict) == "error":
            for name in names:
                self._check_fit(source, manifest, name, kwargs.get("map_location"))
        try:
            result = super().load(source, components=names, **kwargs)
        except CheckpointError as error:
            raise CheckpointError(
                f"{source}: {' '.join(str(error).split())}", error.result
            ) from (error.__cause__ or error)
        files = manifest[_SECTION]["files"]
        self._files = {source / name: record for name, record in files.items()}
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
        for name, problem in _inspect_files(source, manifest, components):
            if problem is not None:
                raise CheckpointError(f"{source / name} {problem}")
        return manifest

    def _check_fit(
        self,
        source: Path,
        manifest: Mapping[str, Any],
        name: str,
        map_location: Any,  # noqa: ANN401
    ) -> None:
        """Raises if the state of a component is missing or does not fit it."""
        record = manifest["components"].get(name)
        if record is None:
            raise CheckpointError(f"{source} has no component {name!r}")
        for adapter in (self._state, self._replay):
            if record["adapter"] == adapter.adapter_id:
                place = source / record["path"]
                try:
                    adapter.check(self.components[name], place, map_location)
                except Exception as error:
                    raise CheckpointError(
                        f"{place} does not fit the component {name!r}: "
                        f"{one_line(error)}"
                    ) from error

    def _publish_path(self, source: Path, destination: Path) -> None:
        """Completes the manifest, waits for the disk, and gives the final name."""
        files: dict[str, list[Any]] = {}
        digests = self._replay.digests
        for path in sorted(source.rglob("*")):
            flush_to_disk(path)
            if path.is_file() and path != source / _MANIFEST:
                digest = digests.pop(path, None) or file_digest(path)
                relative = path.relative_to(source).as_posix()
                files[relative] = [path.stat().st_size, digest]
        manifest = json.loads((source / _MANIFEST).read_text(encoding="utf-8"))
        manifest[_SECTION] = {"format_version": FORMAT_VERSION, "files": files}
        manifest[_SECTION]["manifest_sha256"] = _manifest_digest(manifest)
        with (source / _MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, sort_keys=True)
        flush_to_disk(source / _MANIFEST)
        flush_to_disk(source)
        super()._publish_path(source, destination)
        flush_to_disk(destination.parent)
        self._files = {destination / name: record for name, record in files.items()}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that :class:`VerifiedCheckpoint` wrote.

    Raises:
        CheckpointError: if it is damaged, foreign, or of another version.
    """
    file = path / _MANIFEST
    try:
        if not file.is_file():
            raise FileNotFoundError(f"no file {_MANIFEST}")
        manifest = parse_json(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has no readable manifest: {one_line(error)}"
        ) from error
    section = manifest.get(_SECTION) if isinstance(manifest, dict) else None
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
            f"{file} is damaged: expected SHA-256 {expected} of its content, got "
            f"{actual}"
        )
    try:
        Checkpoint.manifest(path)
        _check_layout(manifest)
    except Exception as error:
        raise CheckpointError(f"{file} is malformed: {one_line(error)}") from error
    return manifest


def inspect_checkpoint(path: str | Path) -> Iterator[tuple[str, str | None]]:
    """What is wrong with each file of a checkpoint.

    Args:
        path: the checkpoint.

    Yields:
        tuple: name of a file in the checkpoint, and ``None`` or one line of what is
        wrong with it. The manifest comes first, and alone if it cannot be used.

    Examples:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = VerifiedCheckpoint(net=torch.nn.Linear(2, 1))
        ...     path = saved.save(f"{folder}/saved")
        ...     (path / "notes.txt").touch()
        ...     for file, problem in inspect_checkpoint(path):
        ...         print(file, problem)
        manifest.json None
        components/0000-net/state.npz None
        notes.txt is not in the manifest
    """
    source = Path(path).expanduser().absolute()
    try:
        manifest = read_manifest(source)
    except CheckpointError as error:
        yield _MANIFEST, str(error)
        return
    yield _MANIFEST, None
    yield from _inspect_files(source, manifest)


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
    for path in filter(Path.is_dir, sorted(directory.glob(".?*.*-*"))):
        name, _, rest = path.name[1:].rpartition(".")
        kind = rest.partition("-")[0]
        if kind == "backup" and not (directory / name).exists():
            os.replace(path, directory / name)
        elif kind in ("stage", "backup", "delete"):
            shutil.rmtree(path)


def _inspect_files(
    source: Path,
    manifest: Mapping[str, Any],
    components: Collection[str] | None = None,
) -> Iterator[tuple[str, str | None]]:
    """The files of a manifest and those that lie there; all, or of some components."""
    recorded = manifest[_SECTION]["files"]
    found = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }
    folders = tuple(
        f"{record['path']}/"
        for name, record in manifest["components"].items()
        if components is not None and name in components
    )
    for name in sorted(found | recorded.keys()):
        if name != _MANIFEST and (components is None or name.startswith(folders)):
            yield name, _problem(source, name, recorded.get(name))


def _problem(source: Path, name: str, recorded: list[Any] | None) -> str | None:
    """What is wrong with a file, given its size and digest in the manifest."""
    path = source / name
    if recorded is None:
        return "is not in the manifest"
    size, digest = recorded
    try:
        if path.resolve(strict=True) != source.resolve() / name or not path.is_file():
            return "is no file of the checkpoint itself"
        found = path.stat().st_size
        if found != size:
            return f"is damaged: expected {size} bytes, got {found}"
        actual = file_digest(path)
    except OSError as error:
        return f"cannot be read: {error}"
    if actual != digest:
        return f"is damaged: expected SHA-256 {digest}, got {actual}"
    return None


def _check_layout(manifest: Mapping[str, Any]) -> None:
    """Raises if files are named that a checkpoint cannot have, or twice."""
    files = manifest[_SECTION]["files"]
    for part, value in (("metadata", manifest.get("metadata")), ("files", files)):
        if not isinstance(value, dict):
            raise ValueError(f"{part}: expected an object, got {value!r}")
    for name, record in files.items():
        path = PurePosixPath(name)
        outside = path.is_absolute() or ".." in path.parts or "\\" in name
        if outside or path.as_posix() != name:
            raise ValueError(f"{name!r} is no place in a checkpoint")
        if not isinstance(record, list) or [*map(type, record)] != [int, str]:
            raise ValueError(f"{name}: expected size and digest, got {record!r}")
    inventory = [
        f"{record['path']}/{file}"
        for record in manifest["components"].values()
        for file in record["files"]
    ]
    if sorted(inventory) != sorted(files):
        other = sorted({*inventory} ^ {*files}) or "a file twice"
        raise ValueError(f"components and checksums name different files: {other}")


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    section = {k: v for k, v in manifest[_SECTION].items() if k != "manifest_sha256"}
    text = json.dumps({**manifest, _SECTION: section}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
