"""Which checkpoints of a directory stay, are deleted, or are set aside."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation

from alm_torchrl.training.checkpoint import read_manifest

__all__ = ["MilestoneRotation", "numbered_checkpoints", "time_stamp"]


class MilestoneRotation(CheckpointRotation):
    """A rotation that keeps milestones too, and never mixes two branches of a run.

    A milestone says so in its manifest, and is never deleted. ``saved`` is the
    checkpoint that this object wrote last, ``None`` before the first.

    Args:
        directory: where the checkpoints are.

    Keyword Args:
        keep_last: how many of the newest to keep.
        keep_every: steps between milestones. Default: ``None``, no milestones.
        stride: steps from one possible checkpoint to the next; the first at or after a
            multiple of ``keep_every`` is the milestone. Default: ``1``.

    Examples:
        >>> import tempfile
        >>> from alm_torchrl import VerifiedCheckpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rotation = MilestoneRotation(folder, keep_last=1, keep_every=4)
        ...     for step in (2, 4, 6, 8, 10):
        ...         _ = rotation.save(VerifiedCheckpoint(), step=step)
        ...     [number for number, _ in numbered_checkpoints(rotation.directory)]
        [4, 8, 10]
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int,
        keep_every: int | None = None,
        stride: int = 1,
    ) -> None:
        super().__init__(directory, keep_last=keep_last)
        self.keep_every = keep_every
        self.stride = stride
        self.saved: Path | None = None

    def is_milestone(self, step: int) -> bool:
        """Whether the checkpoint of a step is to stay for good."""
        return self.keep_every is not None and step % self.keep_every < self.stride

    def save(
        self,
        checkpoint: Checkpoint,
        *,
        step: int,
        metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Saves a checkpoint, then deletes those that are not to stay."""
        marked = {**(metadata or {}), "milestone": self.is_milestone(step)}
        self.saved = super().save(checkpoint, step=step, metadata=marked, **kwargs)
        return self.saved

    def checkpoints(self) -> tuple[Path, ...]:
        """The checkpoints by step."""
        return tuple(path for _, path in numbered_checkpoints(self.directory))

    def latest(self) -> Path | None:
        """The checkpoint of the largest step, if there is one."""
        return next(reversed(self.checkpoints()), None)

    def prune(self) -> tuple[Path, ...]:
        """Deletes all but the newest and the milestones, and returns the deleted."""
        removed = []
        for path in self.checkpoints()[: -self.keep_last]:
            try:
                milestone = read_manifest(path).get("metadata", {}).get("milestone")
            except CheckpointError:
                continue
            if not milestone:
                # A killed deletion is ended by clear_leftovers.
                doomed = path.with_name(f".{path.name}.delete-{uuid.uuid4().hex}")
                os.replace(path, doomed)
                shutil.rmtree(doomed)
                removed.append(path)
        return tuple(removed)

    def set_newer_aside(self, step: int) -> Path | None:
        """Moves what was saved after a step into a folder of its own.

        Those are the checkpoints of later steps, and ``best`` if it is of a later
        step or damaged. Without this, a run that goes on from an older checkpoint
        would take them for its own.

        Returns:
            The folder, or ``None`` if there was nothing to move.
        """
        found = reversed(numbered_checkpoints(self.directory))
        newer = [path for number, path in found if number > step]
        best = self.directory / "best"
        if best.exists() and _step_of_best(best) > step:
            newer.append(best)
        if not newer:
            return None
        aside = self.directory / f"set-aside-{time_stamp()}"
        aside.mkdir()
        for path in newer:
            os.replace(path, aside / path.name)
        return aside


def numbered_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Step and path of what is named as a checkpoint in a directory, by step."""
    return sorted(
        (int(number), path)
        for path in directory.glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isascii()
        and number.isdigit()
        and path.is_dir()
    )


def time_stamp() -> str:
    """The local time for a name."""
    return datetime.now().strftime("%Y%m%d-%H%M%S-%f")


def _step_of_best(path: Path) -> float:
    """Its environment step, or infinity if it does not say."""
    try:
        return float(read_manifest(path)["metadata"]["environment_step"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return float("inf")
