"""The folder of a training run: what it holds and how to read it back.

========================  ======================================================
``config.json``           settings, versions, commit and hardware (below)
``metrics.csv``           one row per evaluation, columns :data:`METRICS_FIELDS`
``learning_curve.png``    return against training steps
``checkpoints/``          the newest checkpoints (``torchrl.checkpoint``)
``tensorboard/``          losses and returns, unless another logger was chosen
========================  ======================================================

``config.json`` is an object with the keys

- ``settings``: every field of :class:`alm_torchrl.config.TrainConfig`;
- ``agent``: name of the algorithm;
- ``versions``: of Python and of each package in :data:`PACKAGES`;
- ``commit``: git commit of the source, with ``-dirty`` appended where tracked
  files were changed; ``null`` for an installed package;
- ``hardware``: ``cpu`` (model), ``cores`` (usable ones), ``threads`` (PyTorch's),
  ``device`` (``cpu`` or ``cuda``), ``gpu`` (model or ``null``);
- ``started``: local time with offset, ISO 8601.

``metrics.csv`` has a header line; numbers are written so that reading them gives
the same float. Its columns are ``seed``; ``training_step`` (updates so far, the
warm-up not counted, first row 0); ``environment_step`` (warm-up included);
``mean_return`` and ``mean_length`` over whole episodes; ``wall_time`` in seconds
since the run began; and ``task``, whose id ends in its version.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from alm_torchrl.config import AGENT, TrainConfig

__all__ = [
    "METRICS_FIELDS",
    "PACKAGES",
    "MetricsWriter",
    "Run",
    "create_run",
    "read_metrics",
    "read_run",
    "refuse_existing_run",
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
_OWN_NAMES = ("config.json", "metrics.csv", "checkpoints", "learning_curve.png")


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
        path: the file, which must not exist.

    Raises:
        FileExistsError: if the file exists.

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

    def __init__(self, path: Path) -> None:
        self._file = path.open("x", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, METRICS_FIELDS, lineterminator="\n")
        self._writer.writeheader()
        self._file.flush()

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

    Raises:
        ValueError: if the columns are not :data:`METRICS_FIELDS`.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
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


def refuse_existing_run(path: Path) -> None:
    """Check that a folder can take a new run: nothing in it would be overwritten.

    Raises:
        FileExistsError: if the folder already holds a run.
    """
    for name in _OWN_NAMES:
        if (path / name).exists():
            raise FileExistsError(
                f"{path} already holds a run ({name}); choose another --seed "
                "or another folder with --run-dir"
            )


def create_run(config: TrainConfig, device: str) -> Path:
    """Make the run folder with its ``config.json``.

    Args:
        config: the settings; ``config.run_path`` names the folder.
        device: the device in use, ``"cpu"`` or ``"cuda"``.

    Returns:
        Path: the folder.

    Raises:
        FileExistsError: if the folder already holds a run.
    """
    path = config.run_path
    refuse_existing_run(path)
    path.mkdir(parents=True, exist_ok=True)
    record = {
        "settings": config.to_dict(),
        "agent": AGENT,
        "versions": _versions(),
        "commit": _source_commit(),
        "hardware": _hardware(device),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    with (path / "config.json").open("x", encoding="utf-8") as file:
        json.dump(record, file, indent=2)
        file.write("\n")
    return path


def read_run(path: Path) -> Run:
    """Read the settings and the metrics of a run folder.

    Raises:
        FileNotFoundError: if the folder or one of the two files is missing.
        ValueError: if a file does not have the documented form.
    """
    for name in ("config.json", "metrics.csv"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is not a run folder: it has no {name}")
    record = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config = TrainConfig.from_dict(record["settings"])
    return Run(path, config, read_metrics(path / "metrics.csv"))


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
