"""The folder of a training run: what it holds and how to read it back.

========================  ======================================================
``config.json``           settings, versions, commit and hardware (below)
``metrics.csv``           one row per evaluation, columns :data:`METRICS_FIELDS`
``learning_curve.png``    return against training steps
``checkpoints/``          the newest checkpoints, and ``best`` without the replay
``tensorboard/``          losses and returns, unless another logger was chosen
``.lock``                 held by the process that trains in the folder
========================  ======================================================

``config.json`` is an object with the keys

- ``settings``: every field of :class:`alm_torchrl.runs.settings.TrainConfig`;
- ``agent``: name of the algorithm;
- ``versions``: of Python and of each package in :data:`PACKAGES`;
- ``commit``: git commit of the source, with ``-dirty`` appended where tracked
  files were changed; ``null`` for an installed package;
- ``hardware``: ``cpu`` (model), ``cores`` (usable ones), ``threads`` (PyTorch's),
  ``device`` (``cpu`` or ``cuda``), ``gpu`` (model or ``null``);
- ``started``: local time with offset, ISO 8601;
- ``continued``: one object for each time the run was continued, with ``time``,
  ``environment_step``, ``checkpoint``, ``changes`` (setting: [before, after]) and the
  ``versions``, ``commit`` and ``hardware`` of then.

``metrics.csv`` has a header line; numbers are written so that reading them gives
the same float. Its columns are ``seed``; ``training_step`` (updates so far, the
warm-up not counted, first row 0); ``environment_step`` (warm-up included);
``mean_return`` and ``mean_length`` over whole episodes; ``wall_time`` in seconds
that the run took (pauses left out); and ``task``, whose id ends in its version.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from alm_torchrl.runs.settings import TrainConfig

__all__ = [
    "CHANGEABLE",
    "METRICS_FIELDS",
    "PACKAGES",
    "MetricsWriter",
    "Run",
    "circumstances",
    "continue_run",
    "create_run",
    "harmful_differences",
    "holds_run",
    "lock_run",
    "read_metrics",
    "read_record",
    "read_run",
    "refuse_other_files",
    "set_run_aside",
]

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

_INTEGERS = ("seed", "training_step", "environment_step")
_FLOATS = ("mean_return", "mean_length", "wall_time")
_OWN_NAMES = ("metrics.csv", "checkpoints", "learning_curve.png")

CHANGEABLE = frozenset(
    {
        "preset",
        "threads",
        "total_steps",
        "log_interval",
        "checkpoint_interval",
        "keep_checkpoints",
        "logger",
        "run_dir",
    }
)
"""Settings that a run may change when it continues."""


@dataclass(frozen=True)
class Run:
    """A run read from its folder."""

    path: Path
    """The folder."""
    config: TrainConfig
    """Its settings."""
    metrics: list[dict[str, Any]]
    """Rows of ``metrics.csv``, numbers converted, possibly none yet."""


class MetricsWriter:
    """Writes rows of ``metrics.csv``, each on disk before :meth:`write` returns.

    Args:
        path: the file; rows in it stay, as far as ``until`` says.
        until: environment step up to which rows stay, those of later steps being
            measured again. Default: ``-1``, none.

    Raises:
        ValueError: if the file exists and its columns are not :data:`METRICS_FIELDS`.

    Example:
        >>> import tempfile
        >>> row = {name: 0 for name in METRICS_FIELDS} | {"task": "Hopper-v5"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "metrics.csv"
        ...     with MetricsWriter(path) as writer:
        ...         writer.write(row)
        ...     read_metrics(path)[0]["task"]
        'Hopper-v5'
    """

    def __init__(self, path: Path, until: int = -1) -> None:
        rows = read_metrics(path) if path.exists() and until >= 0 else []
        self.rows = [row for row in rows if row["environment_step"] <= until]
        """The rows so far."""
        kept = path.with_name(f".{path.name}.new")
        self._file = kept.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, METRICS_FIELDS, lineterminator="\n")
        self._writer.writeheader()
        self._writer.writerows(self.rows)
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(kept, path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row that has exactly the columns :data:`METRICS_FIELDS`.

        Raises:
            ValueError: if a column is missing or unknown.
        """
        if set(row) != set(METRICS_FIELDS):
            raise ValueError(f"row: expected {METRICS_FIELDS}, got {tuple(row)}")
        self._writer.writerow(row)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.append(dict(row))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        """Return the writer itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.csv`` with integers and floats converted.

    A last line without its end, as a killed process leaves it, is passed over.

    Raises:
        ValueError: if the columns are not :data:`METRICS_FIELDS`.
    """
    with path.open(newline="", encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n")]
    reader = csv.DictReader(lines)
    if tuple(reader.fieldnames or ()) != METRICS_FIELDS:
        raise ValueError(
            f"{path}: expected the columns {', '.join(METRICS_FIELDS)}, "
            f"got {', '.join(reader.fieldnames or ())}"
        )
    return [
        {
            **row,
            **{name: int(row[name]) for name in _INTEGERS},
            **{name: float(row[name]) for name in _FLOATS},
        }
        for row in reader
    ]


@contextmanager
def lock_run(path: Path) -> Iterator[None]:
    """Keep other processes from training in a folder, which is made if need be.

    The lock is the operating system's: it ends with its process, however that ends.
    A folder that was made for it and stays empty is removed again.

    Raises:
        BlockingIOError: if another process holds it.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    file = path / ".lock"
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BlockingIOError(
            f"{path} is in use: another process trains in it"
        ) from error
    try:
        yield
    finally:
        if made and list(path.iterdir()) == [file]:
            # Others may have come into a parent; Windows keeps a locked file.
            with suppress(OSError):
                file.unlink()
                for folder in made:
                    folder.rmdir()
        lock.release()


def holds_run(path: Path) -> bool:
    """Whether a folder has the settings of a run."""
    return (path / "config.json").is_file()


def refuse_other_files(path: Path) -> None:
    """Check that a folder without a run has nothing that a run would overwrite.

    Raises:
        FileExistsError: if it has.
    """
    for name in _OWN_NAMES:
        if (path / name).exists():
            raise FileExistsError(
                f"{path} has a {name} but no config.json, so it is not a run that can "
                "be continued; choose another folder with --run-dir"
            )


def set_run_aside(path: Path) -> Path:
    """Move what is in a run folder into a new one beside it, whose path is returned."""
    time = datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    aside = path.with_name(f"{path.name}-replaced-{time}")
    aside.mkdir()
    for entry in sorted(path.iterdir()):
        if entry.name != ".lock":
            os.replace(entry, aside / entry.name)
    return aside


def create_run(config: TrainConfig, device: str) -> None:
    """Write the ``config.json`` of a new run into ``config.run_path``.

    Args:
        config: the settings.
        device: the device in use, ``"cpu"`` or ``"cuda"``.
    """
    record = {
        "settings": config.to_dict(),
        "agent": config.agent,
        **circumstances(device),
        "started": _now(),
        "continued": [],
    }
    _write_record(config.run_path, record)


def continue_run(
    config: TrainConfig, device: str, source: Path, checkpoint: Path, step: int
) -> None:
    """Note in the ``config.json`` of ``config.run_path`` that a run is continued.

    Args:
        config: the settings from now on.
        device: the device in use, ``"cpu"`` or ``"cuda"``.
        source: folder of the run that is continued, possibly another one.
        checkpoint: where it continues.
        step: environment step of the checkpoint.
    """
    record = read_record(source)
    before = record["settings"]
    after = config.to_dict()
    entry = {
        "time": _now(),
        "environment_step": step,
        "checkpoint": str(checkpoint.resolve()),
        "changes": {
            name: [before.get(name), value]
            for name, value in after.items()
            if before.get(name) != value
        },
        **circumstances(device),
    }
    record["settings"] = after
    record["continued"] = [*record.get("continued", []), entry]
    _write_record(config.run_path, record)


def harmful_differences(
    before: Mapping[str, Any], config: TrainConfig
) -> dict[str, tuple[Any, Any]]:
    """Settings that a run cannot change when it continues.

    Args:
        before: the settings that the run was started with.
        config: those it would continue with.

    Returns:
        dict: the names of those that differ, with both values. :data:`CHANGEABLE`
        ones are left out, and a setting that an older version did not have yet counts
        as its default.
    """
    after = config.to_dict()
    # A setting that is younger than the run had its default.
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.default is not dataclasses.MISSING
    }
    before = {**defaults, **before}
    return {
        name: (before.get(name), value)
        for name, value in after.items()
        if name not in CHANGEABLE and before.get(name) != value
    }


def read_record(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a run folder.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not readable.
    """
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a run folder: it has no config.json")
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        record["settings"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not the config.json of a run: {error}") from error
    return record


def read_run(path: Path) -> Run:
    """Read the settings and the metrics of a run folder.

    Raises:
        FileNotFoundError: if the folder or one of the two files is missing.
        ValueError: if a file does not have the documented form.
    """
    record = read_record(path)
    if not (path / "metrics.csv").is_file():
        raise FileNotFoundError(f"{path} is not a run folder: it has no metrics.csv")
    config = TrainConfig.from_dict(record["settings"])
    return Run(path, config, read_metrics(path / "metrics.csv"))


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    new = path / ".config.json.new"
    with new.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path / "config.json")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def circumstances(device: str) -> dict[str, Any]:
    """Package versions, source commit and hardware, as records keep them."""
    return {
        "versions": _versions(),
        "commit": _source_commit(),
        "hardware": _hardware(device),
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _source_commit() -> str | None:
    """The commit of the checkout that this file belongs to, if it is in one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    command += ["--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _hardware(device: str) -> dict[str, Any]:
    import torch

    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity is not None else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
