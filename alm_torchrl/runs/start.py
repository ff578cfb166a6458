"""Where a run starts: the state of its folder, and what follows from it.

:func:`find_starts` decides; it reads only. What each state of the run folder
(``run_dir``) leads to:

============================================  ==========================================
the folder                                    what ``train`` does
============================================  ==========================================
missing, empty, or with other files only      begins
has files of a run, but no ``config.json``    refuses: that is not a run
``config.json`` alone                         begins, with any settings
rows, but killed before the first checkpoint  begins; the rows go aside
rows, and its checkpoints were removed        refuses
checkpoints                                   continues from the newest
the newest is damaged, or fails to load       continues from the one before
none can be used                              refuses
complete                                      does nothing; says how to train longer
complete, and more ``total_steps``            continues
begun from a checkpoint elsewhere, killed     begins from it again
before its first own checkpoint
other settings, another format, a bad file    refuses, and names them
another process trains in it                  refuses
gone in mid-run: renamed, deleted             ends at its next write, with an error
============================================  ==========================================

And with ``resume``:

============================================  ==========================================
``resume``                                    what ``train`` does
============================================  ==========================================
the run folder                                as above
a checkpoint of the run folder                continues from it
another run, or a checkpoint in one           begins ``run_dir`` from it, with its rows
a checkpoint outside of any run               begins ``run_dir`` from it
one of the last two, begun from it before     continues ``run_dir``
one of the last two, ``run_dir`` holds        refuses
another run
networks only, such as ``best``               refuses
============================================  ==========================================

Continuing, what was saved after the step that a run continues from is moved into
``checkpoints/set-aside-TIME``, and the rows after it into ``metrics-TIME.csv``. With
``fresh`` all that the folder holds is moved beside it first. Nothing is deleted.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchrl.checkpoint import CheckpointError

from alm_torchrl.runs.folder import (
    harmful_differences,
    holds_run,
    read_metrics,
    read_record,
    run_of,
)
from alm_torchrl.runs.loading import checkpoint_metadata, usable_checkpoints
from alm_torchrl.runs.settings import TrainConfig, UserError
from alm_torchrl.training.rotation import numbered_checkpoints

__all__ = ["Start", "find_starts", "resumed_config"]


@dataclass(frozen=True)
class Start:
    """Where a run starts: at nothing, or at a checkpoint."""

    checkpoint: Path | None = None
    step: int = -1
    wall_time: float = 0.0
    elsewhere: bool = False
    """Whether the checkpoint lies outside of the run folder."""


def resumed_config(resume: Path) -> TrainConfig | None:
    """The settings to resume with: those of a run folder, or of a checkpoint.

    Args:
        resume: a run folder, a checkpoint in one, or a checkpoint elsewhere, whose run
            goes into a folder of its own.

    Returns:
        TrainConfig or None: ``None`` if the path is nothing of these.

    Raises:
        ValueError: if a file does not have its form.
        CheckpointError: if the checkpoint is damaged or does not say.
    """
    run: Path | None = resume
    if (resume / "manifest.json").is_file():
        run = run_of(resume)
    if run is None:
        settings = checkpoint_metadata(resume)["settings"]
    elif holds_run(run):
        settings = read_record(run)["settings"]
    else:
        return None
    return replace(TrainConfig.from_dict(settings), run_dir=run)


def find_starts(config: TrainConfig, resume: Path | None) -> Iterator[Start]:
    """Where a run can start, the best first; the others if that fails to load.

    Args:
        config: the settings; ``config.run_path`` is the folder.
        resume: a run folder or a checkpoint to continue from.

    Yields:
        Start: each of them, its checkpoint verified when it is asked for.

    Raises:
        UserError: if there is none, or no other, as the table above says.
        OSError: if a file or folder is missing or in the way.
        ValueError: if a file of the folder does not have its form.
        CheckpointError: if a checkpoint that was named cannot be used.

    Warns:
        UserWarning: for each checkpoint of the folder that is skipped.
    """
    path, source = config.run_path, config.run_path
    if not holds_run(path):
        for name in ("checkpoints", "metrics.csv", "learning_curve.png"):
            if (path / name).exists():
                raise FileExistsError(
                    f"{path} has a {name} but no config.json, so it is not a run that "
                    "can be continued; choose another folder with --run-dir"
                )
    if resume is not None:
        if not resume.exists():
            raise FileNotFoundError(f"{resume} does not exist")
        named = (resume / "manifest.json").is_file()
        if not named and not holds_run(resume):
            raise FileNotFoundError(
                f"{resume} is neither a checkpoint nor a run folder, which has a "
                "config.json"
            )
        found = run_of(resume) if named else resume
        elsewhere = found is None or found.resolve() != path.resolve()
        if elsewhere and holds_run(path):
            _check_origin(path, resume)
        elif named:
            if found is not None:
                _check_settings(found, read_record(found)["settings"], config)
            yield _start_at(resume, config)
            return
        elif elsewhere:
            source = resume
    elif not holds_run(path):
        yield Start()
        return
    yield from _starts_in(source, config)


def _starts_in(source: Path, config: TrainConfig) -> Iterator[Start]:
    """The starts at the checkpoints of a run folder, or else anew."""
    record, directory = read_record(source), source / "checkpoints"
    metrics = source / "metrics.csv"
    rows = read_metrics(metrics) if metrics.exists() else []
    saved = numbered_checkpoints(directory)
    if rows or saved:
        _check_settings(source, record["settings"], config)
    reason = "all are damaged or fail to load"
    for checkpoint in usable_checkpoints(directory):
        try:
            yield _start_at(checkpoint, config)
        except (CheckpointError, UserError) as error:
            _warn(error)
            reason = str(error)
    if saved:
        raise UserError(
            f"no checkpoint in {directory} can be used: {reason}; --fresh starts anew"
        )
    if source.resolve() != config.run_path.resolve():
        raise UserError(f"{source} has no checkpoint to continue from")
    if origin := record.get("origin"):
        yield _start_at(Path(origin), config)
        return
    first_save = min(
        record["settings"]["checkpoint_interval"],
        record["settings"].get("keep_every") or float("inf"),
    )
    if rows and rows[-1]["environment_step"] > first_save:
        raise UserError(
            f"{source} has no checkpoints any more, although its metrics.csv goes to "
            f"environment step {rows[-1]['environment_step']:,}; --fresh starts anew"
        )
    yield Start()


def _start_at(checkpoint: Path, config: TrainConfig) -> Start:
    metadata = checkpoint_metadata(checkpoint)
    if "collected_frames" not in metadata:
        raise UserError(f"{checkpoint} holds networks only, to act with")
    _check_settings(checkpoint, metadata["settings"], config)
    source = run_of(checkpoint)
    return Start(
        checkpoint,
        metadata["collected_frames"],
        metadata.get("wall_time", 0.0),
        source is None or source.resolve() != config.run_path.resolve(),
    )


def _check_origin(path: Path, resume: Path) -> None:
    """Refuses a folder that holds another run than one begun from ``resume``."""
    origin = read_record(path).get("origin")
    begun_from = [] if origin is None else [Path(origin), Path(origin).parents[1]]
    if resume.resolve() not in begun_from:
        raise FileExistsError(
            f"{path} already holds a run; choose another folder with --run-dir"
        )


def _check_settings(
    place: Path, before: Mapping[str, Any], config: TrainConfig
) -> None:
    differences = harmful_differences(before, config)
    if differences:
        listed = "; ".join(
            f"{name}: {old!r} in the run, {new!r} now"
            for name, (old, new) in differences.items()
        )
        raise UserError(
            f"{place} is of a run with other settings ({listed}). Give the same, "
            "or start another run: with another --run-dir and no --resume, or --fresh"
        )


def _warn(error: Exception) -> None:
    warnings.warn(
        f"{error}. The checkpoint before it is used, if there is one.",
        UserWarning,
        stacklevel=3,
    )
