"""The Trainer of an ALM agent or a baseline, which leaves order behind."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchrl.checkpoint import CheckpointError
from torchrl.trainers import Trainer

from alm_torchrl.training.checkpoint import read_manifest
from alm_torchrl.training.episode import episode_steps
from alm_torchrl.training.episode_length import EpisodeLengthError
from alm_torchrl.training.hooks import EvaluationHook, ProgressBar
from alm_torchrl.training.pace import Pace
from alm_torchrl.training.stepper import NonFiniteError

__all__ = ["ALMTrainer"]


class ALMTrainer(Trainer):
    """A :class:`torchrl.trainers.Trainer` that leaves order behind when it ends.

    Made by :func:`make_trainer`. Checkpoints of later steps than it starts at are set
    aside first. Where training raises, its progress bar is closed. An error of the
    environment or of an evaluation comes between two training steps: the run is saved
    before it is raised. A :class:`~alm_torchrl.NonFiniteError` names the last good
    checkpoint.

    Examples:
        >>> from alm_torchrl import make_alm_loss, make_env, make_trainer
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> loss = make_alm_loss(env, hidden_dim=8, model_hidden_dim=8)
        >>> trainer = make_trainer(
        ...     env, loss, total_steps=2, warmup_steps=8, batch_size=4
        ... )
        >>> trainer.train()
        >>> trainer.collected_frames  # warm-up included
        10
    """

    bar: ProgressBar | None = None
    evaluation: EvaluationHook | None = None
    pace: Pace
    total_steps: int
    stop_requested = False
    """Whether :meth:`request_stop` was called."""
    whole_at: int | None = 0
    """Steps of the running episodes between two training steps, ``None`` in one."""

    @property
    def training_steps(self) -> int:
        """Updates so far."""
        return min(self.pace.updates(self.collected_frames), self.total_steps)

    def train(self) -> None:
        """Trains until the end, a stop that was requested, or an error.

        Does nothing if the end was reached before, as after loading a checkpoint of a
        complete run.

        Raises:
            NonFiniteError: if something was not finite; see :func:`make_trainer`.
            EpisodeLengthError: if the episodes of the warm-up were all shorter than
                the horizon, or none ended and the task names no time limit.

        Warns:
            UserWarning: if checkpoints of later steps are set aside, or if the
                environment raises when it is closed.
        """
        rotation = self.checkpoint_rotation
        if rotation is not None and (
            aside := rotation.set_newer_aside(self.collected_frames)
        ):
            warnings.warn(
                f"what was saved after environment step {self.collected_frames} is "
                f"now in {aside}",
                UserWarning,
                stacklevel=2,
            )
        self.whole_at = episode_steps(self.collector.env)
        try:
            if self.collected_frames < self.total_frames:
                super().train()
                self.collector.close()
        except NonFiniteError as error:
            raise NonFiniteError(
                error.term,
                error.step,
                unit=error.unit,
                checkpoint=None if rotation is None else rotation.latest(),
            ) from error
        except EpisodeLengthError:
            raise
        except Exception:
            # A step of the environment that raises does not count, a reset may.
            if self.whole_at == episode_steps(self.collector.env):
                # The disk, or the folder, may be the reason.
                with suppress(OSError, CheckpointError):
                    self.save_trainer(force_save=True)
            raise
        finally:
            if self.bar is not None:
                self.bar.close()

    def load_from_file(self, file: str | Path, **kwargs: Any) -> Trainer:
        """Loads a checkpoint of :class:`~alm_torchrl.VerifiedCheckpoint`.

        Args:
            file: the checkpoint.
            **kwargs: as of :meth:`torchrl.trainers.Trainer.load_from_file`.

        Raises:
            CheckpointError: if it is damaged, foreign, or does not fit.
        """
        read_manifest(Path(file))
        return super().load_from_file(file, **kwargs)

    def evaluate(self) -> None:
        """Evaluates now, if an evaluation is due at the step where the training is.

        A run that was stopped in an evaluation was saved without its result.
        """
        if self.evaluation is not None:
            self.evaluation(None)

    def request_stop(self, reason: str | None = None) -> None:
        """Stops the training after its current step, which is saved.

        Args:
            reason: for the log. Default: ``None``.
        """
        self.stop_requested = True
        super().request_stop(reason)

    def save_trainer(self, force_save: bool = False) -> None:
        """Saves if it is time, or a milestone.

        Args:
            force_save: save now. Default: ``False``.
        """
        rotation = self.checkpoint_rotation
        milestone = rotation is not None and rotation.is_milestone(
            self.collected_frames
        )
        super().save_trainer(force_save or milestone)
