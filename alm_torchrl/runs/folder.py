"""The folder of a training run: what it holds and how to read it back.

========================  ======================================================
``config.json``           settings, versions, commit and hardware (below)
``metrics.csv``           one row per evaluation, columns :data:`METRICS_FIELDS`
``learning_curve.png``    return against training steps
``metrics-TIME.csv``      rows that a continuation from an earlier step left behind
``checkpoints/``          the newest checkpoints, milestones, ``best`` without the
                          replay, and in ``set-aside-TIME`` what was left behind
``tensorboard/``          losses and returns, unless another logger was chosen
``train.log``             what the runs of ``reproduce`` and ``sweep`` printed
``.lock``                 held by the process that trains in the folder
``.worker``               host and process that make the run of a sweep
========================  ======================================================

``config.json`` is an object with the keys

- ``format``: :data:`FORMAT`; folders of another format are refused;
- ``settings``: every field of :class:`alm_torchrl.runs.settings.TrainConfig`;
- ``agent``: name of the algorithm;
- ``versions``: of Python and of each package in :data:`PACKAGES`;
- ``commit``: git commit of the source, with ``-dirty`` appended if tracked files
  were changed; ``null`` for an installed package;
- ``hardware``: ``cpu`` (model), ``cores`` (usable ones), ``threads`` (PyTorch's),
  ``device`` (``cpu`` or ``cuda``), ``gpu`` (model or ``null``);
- ``origin``: the checkpoint of another folder that the run began from, or ``null``;
- ``started``: local time with offset, ISO 8601;
- ``continued``: one object for each time the run was continued, with ``time``,
  ``environment_step``, ``checkpoint``, ``changes`` (setting: [before, after]) and the
  ``versions``, ``commit`` and ``hardware`` of then.

``metrics.csv`` has a header line; numbers are written so that reading them gives
the same float. The whole file is replaced with each row. Its columns are ``seed``;
``training_step`` (updates so far, the warm-up not counted, first row 0);
``environment_step`` (warm-up included); ``mean_return`` and ``mean_length`` over whole
episodes; ``wall_time`` in seconds that the run took (pauses left out); and ``task``,
whose id ends in its version.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from alm_torchrl.runs.settings import TrainConfig
from alm_torchrl.training.rotation import time_stamp

__all__ = [
    "CHANGEABLE",
    "FORMAT",
    "METRICS_FIELDS",
    "PACKAGES",
    "FolderGoneError",
    "MetricsWriter",
    "Run",
    "available_cores",
    "harmful_differences",
    "holds_run",
    "lock_run",
    "provenance",
    "read_metrics",
    "read_record",
    "read_run",
    "run_of",
    "set_run_aside",
    "watch_folder",
    "write_config",
]

FORMAT = 2
"""Of the run folder; a folder without a number has format 1."""

METRICS_FIELDS = (
    "seed",
    "training_step",
    "environment_step",
    "mean_return",
    "mean_length",
    "wall_time",
    "task",
)
"""Columns of ``metrics.csv``, in order."""

PACKAGES = ("alm_torchrl", "torch", "torchrl", "tensordict", "gymnasium", "mujoco")
"""Packages whose versions a run records."""

CHANGEABLE = frozenset(
    {
        "preset",
        "threads",
        "total_steps",
        "eval_interval",
        "log_interval",
        "checkpoint_interval",
        "keep_checkpoints",
        "keep_every",
        "logger",
        "run_dir",
    }
)
"""Settings that a run may change when it continues."""

_INTEGERS = ("seed", "training_step", "environment_step")
_FLOATS = ("mean_return", "mean_length", "wall_time")


@dataclass(frozen=True)
class Run:
    """A run read from its folder."""

    path: Path
    """The folder."""
    config: TrainConfig
    """Its settings."""
    metrics: list[dict[str, Any]]
    """Rows of ``metrics.csv``, numbers converted; empty before the first one."""


class MetricsWriter:
    """Writes rows of ``metrics.csv``, each on disk before :meth:`write` returns.

    The whole file is replaced each time, so that a killed process leaves it complete.

    Args:
        path: the file. Of the rows that it has, those after ``until`` are moved to a
            file ``metrics-TIME.csv`` beside it first.
        until: environment step of the last row to keep. Default: ``-1``, none.
        rows: to begin with, in a new file. Default: ``()``.

    Raises:
        ValueError: if the file exists and does not have the documented form.

    Example:
        >>> import tempfile
        >>> row = {name: 0 for name in METRICS_FIELDS} | {"task": "Hopper-v5"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "metrics.csv"
        ...     MetricsWriter(path).write(row)
        ...     read_metrics(path)[0]["task"]
        'Hopper-v5'
    """

    def __init__(
        self, path: Path, until: int = -1, rows: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self.path = path
        found = read_metrics(path) if path.exists() else [dict(row) for row in rows]
        self.rows = [row for row in found if row["environment_step"] <= until]
        """The rows so far."""
        self.aside: Path | None = None
        """Where the rows after ``until`` are."""
        later = [row for row in found if row["environment_step"] > until]
        if later and path.exists():
            self.aside = path.with_name(f"{path.stem}-{time_stamp()}{path.suffix}")
            _write_rows(self.aside, later)
        _write_rows(path, self.rows)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row with exactly the columns :data:`METRICS_FIELDS`."""
        if set(row) != set(METRICS_FIELDS):
            raise ValueError(f"row: expected {METRICS_FIELDS}, got {tuple(row)}")
        self.rows.append(dict(row))
        _write_rows(self.path, self.rows)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.csv`` with integers and floats converted.

    Raises:
        ValueError: if the columns are not :data:`METRICS_FIELDS`, or a row is
            incomplete or not of their form. A run never leaves such a row.
    """
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        lines = list(file)
    if lines and not lines[-1].endswith("\n"):
        raise ValueError(
            f"{path}, line {len(lines)}: expected a complete line, got "
            f"{lines[-1][:80]!r}"
        )
    reader = csv.DictReader(lines)
    if tuple(reader.fieldnames or ()) != METRICS_FIELDS:
        raise ValueError(
            f"{path}: expected the columns {', '.join(METRICS_FIELDS)}, "
            f"got {', '.join(reader.fieldnames or ())}"
        )
    try:
        return [_convert_row(row) for row in reader]
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{path}, line {reader.line_num}: expected one value for each column, "
            f"got {lines[reader.line_num - 1].strip()[:80]!r} ({error})"
        ) from error


def _convert_row(row: Mapping[str, Any]) -> dict[str, Any]:
    if tuple(row) != METRICS_FIELDS or None in row.values():
        raise ValueError("another number of values")
    integers = {name: int(row[name]) for name in _INTEGERS}
    floats = {name: float(row[name]) for name in _FLOATS}
    return {**row, **integers, **floats}


@contextmanager
def lock_run(path: Path, timeout: float = 0.0) -> Iterator[None]:
    """Keeps other processes from training in a folder; makes it if it is missing.

    The operating system frees the lock when the process ends. A folder that was made
    here and stays empty is removed again.

    Args:
        path: the folder.
        timeout: seconds to wait for the lock. Default: ``0.0``.

    Raises:
        BlockingIOError: if another process holds the lock.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    file = path / ".lock"
    lock = FileLock(file)
    try:
        lock.acquire(timeout=timeout)
    except Timeout as error:
        raise BlockingIOError(
            f"{path} is in use: another process trains in it"
        ) from error
    try:
        yield
    finally:
        # A parent may hold other files by now, the folder may be gone, and Windows
        # keeps a locked file.
        with suppress(OSError):
            if made and list(path.iterdir()) == [file]:
                file.unlink()
                for folder in made:
                    folder.rmdir()
        lock.release()


class FolderGoneError(OSError):
    """A run folder was renamed or deleted while a run was in it."""


def watch_folder(path: Path) -> Callable[[], None]:
    """A function that raises :class:`FolderGoneError` once a folder is another one."""
    watched = path.stat()

    def check() -> None:
        try:
            same = os.path.samestat(path.stat(), watched)
        except OSError:
            same = False
        if not same:
            raise FolderGoneError(
                f"{path} was renamed or deleted while the run was in it; nothing more "
                "is saved. If it was renamed, continue it under its new name with "
                "alm-torchrl train --resume"
            )

    return check


def holds_run(path: Path) -> bool:
    """Whether a folder has the settings of a run."""
    return (path / "config.json").is_file()


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in, or ``None`` if it lies elsewhere."""
    directory = checkpoint.absolute().parent
    in_run = directory.name == "checkpoints" and holds_run(directory.parent)
    return directory.parent if in_run else None


def set_run_aside(path: Path) -> Path:
    """Moves what is in a run folder into a new one beside it, and returns that.

    ``config.json`` comes last: killed before, the folder still holds a run.
    """
    aside = path.with_name(f"{path.name}-replaced-{time_stamp()}")
    aside.mkdir()
    names = {entry.name for entry in path.iterdir()} - {".lock", "config.json"}
    for name in (*sorted(names), "config.json"):
        os.replace(path / name, aside / name)
    return aside


def write_config(
    config: TrainConfig, device: str, checkpoint: Path | None = None, step: int = 0
) -> None:
    """Writes the ``config.json`` of ``config.run_path``.

    Args:
        config: the settings from now on.
        device: the device in use, ``"cpu"`` or ``"cuda"``.
        checkpoint: what the run continues from; its run's record goes on then.
            Default: ``None``, a new run.
        step: environment step of the checkpoint. Default: ``0``.
    """
    path, after, now = config.run_path, config.to_dict(), provenance(device)
    record = {
        "format": FORMAT,
        "settings": after,
        "agent": config.agent,
        **now,
        "origin": None,
        "started": _now(),
        "continued": [],
    }
    if checkpoint is not None:
        source, before = run_of(checkpoint), after
        if source is not None:
            record = read_record(source)
            before = TrainConfig.from_dict(record["settings"]).to_dict()
        if source is None or source.resolve() != path.resolve():
            record["origin"] = str(checkpoint.resolve())
        record["settings"] = after
        changes = {
            name: [before[name], value]
            for name, value in after.items()
            if before[name] != value
        }
        entry = {
            "time": _now(),
            "environment_step": step,
            "checkpoint": str(checkpoint.resolve()),
            "changes": changes,
            **now,
        }
        record["continued"].append(entry)
    _replace(path / "config.json", json.dumps(record, indent=2) + "\n")


def harmful_differences(
    before: Mapping[str, Any], config: TrainConfig
) -> dict[str, tuple[Any, Any]]:
    """Settings that a run cannot change when it continues, with both values.

    ``compile="auto"`` leaves that choice to the run.
    """
    started, now = TrainConfig.from_dict(before).to_dict(), config.to_dict()
    if config.compile == "auto":
        now["compile"] = started["compile"]
    return {
        name: (started[name], value)
        for name, value in now.items()
        if name not in CHANGEABLE and started[name] != value
    }


def read_record(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a run folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not readable or of another format.
    """
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a run folder: it has no config.json")
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = record.get("format", 1)
        if found == FORMAT:
            TrainConfig.from_dict(record["settings"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not the config.json of a run: {error}") from error
    if found != FORMAT:
        raise ValueError(
            f"{file}: expected a run folder of format {FORMAT}, which this version of "
            f"alm_torchrl reads, got one of format {found}"
        )
    return record


def read_run(path: Path) -> Run:
    """Reads the settings and the metrics of a run folder.

    Raises:
        FileNotFoundError: if the folder or one of the two files is missing.
        ValueError: if a file does not have the documented form.
    """
    config = TrainConfig.from_dict(read_record(path)["settings"])
    if not (path / "metrics.csv").is_file():
        raise FileNotFoundError(f"{path} is not a run folder: it has no metrics.csv")
    return Run(path, config, read_metrics(path / "metrics.csv"))


def available_cores() -> int:
    """The processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return (os.cpu_count() or 1) if affinity is None else len(affinity(0))


def provenance(device: str) -> dict[str, Any]:
    """The ``versions``, ``commit`` and ``hardware`` of a record; see this module."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        versions[name] = None
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    hardware = {
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }
    return {"versions": versions, "commit": _source_commit(), "hardware": hardware}


def _source_commit() -> str | None:
    """The commit of the checkout that holds this file, if there is one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    command += ["--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, METRICS_FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    _replace(path, text.getvalue())


def _replace(path: Path, text: str) -> None:
    """Gives a file a new content, on disk, or leaves it as it is."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
