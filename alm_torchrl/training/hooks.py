"""Trainer hooks: evaluation, episode statistics, progress bar, deferred checks."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.objectives import LossModule
from torchrl.trainers.trainers import TrainerHookBase

from alm_torchrl.envs import Normalizers
from alm_torchrl.evaluation import EvaluationStopped, Policy, evaluate_policy
from alm_torchrl.training.baseline_stepper import BaselineOptimizationStepper
from alm_torchrl.training.checkpoint import VerifiedCheckpoint
from alm_torchrl.training.stepper import ALMOptimizationStepper

if TYPE_CHECKING:
    from tqdm import tqdm

    from alm_torchrl.training.alm_trainer import ALMTrainer

__all__ = [
    "BestCheckpoint",
    "EpisodeLog",
    "EvaluationHook",
    "Hook",
    "NonFiniteCheck",
    "ProgressBar",
    "episode_ends",
]


class Hook(TrainerHookBase):
    """A hook without state, registered at one stage of its trainer."""

    stage: str
    trainer: ALMTrainer

    def register(self, trainer: ALMTrainer, name: str = "") -> None:
        """Registers the hook at its stage."""
        self.trainer = trainer
        trainer.register_op(self.stage, self)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the hook has no state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores nothing."""


class EvaluationHook(Hook):
    """Evaluates the policy at training step 0, at intervals and at the end.

    The seed of an evaluation follows from ``seed`` and the training step, so the hook
    has no state. Results go to ``on_evaluation`` and to the trainer's logger (keys
    ``eval/return`` and ``eval/length``, by environment step). A request to stop ends
    an evaluation at its next step, without a result.

    Args:
        env (EnvBase): environment for evaluations only.
        policy (callable): policy to evaluate, its mode taken as action.

    Keyword Args:
        interval (int): training steps between evaluations. Default: ``5000``.
        episodes (int): whole episodes of each. Default: ``5``.
        seed (int): seed of the run. Default: ``0``.
        on_evaluation (callable, optional): receives a dictionary of plain numbers,
            see :func:`~alm_torchrl.make_trainer`. Default: ``None``.
        normalizers (Normalizers, optional): those of the training environment, whose
            moments ``env`` takes over. Default: ``None``, it has its own.

    Warns:
        UserWarning: if a return is not finite, with its episode and training step.

    Examples:
        >>> from alm_torchrl import make_alm_loss, make_env, make_trainer
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> loss = make_alm_loss(env, hidden_dim=8, model_hidden_dim=8)
        >>> trainer = make_trainer(
        ...     env, loss, total_steps=2, warmup_steps=8, batch_size=4
        ... )
        >>> rows = []
        >>> EvaluationHook(
        ...     make_env("Pendulum-v1", action_bounds="rescale"),
        ...     loss.acting_policy(),
        ...     episodes=1,
        ...     on_evaluation=rows.append,
        ... ).register(trainer)
        >>> trainer.train()
        >>> [row["training_step"] for row in rows]
        [0, 2]
    """

    stage = "post_steps_log"

    def __init__(
        self,
        env: EnvBase,
        policy: Policy,
        *,
        interval: int = 5000,
        episodes: int = 5,
        seed: int = 0,
        on_evaluation: Callable[[dict[str, Any]], None] | None = None,
        normalizers: Normalizers | None = None,
    ) -> None:
        self.env = env
        self.policy = policy
        self.interval = interval
        self.episodes = episodes
        self.seed = seed
        self.on_evaluation = on_evaluation
        self.normalizers = normalizers

    def __call__(self, batch: TensorDictBase | None) -> None:
        """Evaluates if it is time."""
        frames, pace = self.trainer.collected_frames, self.trainer.pace
        step = self.trainer.training_steps
        if frames in (pace.warmup_steps, self.trainer.total_frames):
            self.evaluate(step)
        elif frames > pace.warmup_steps:
            before = pace.updates(frames - pace.num_envs)
            if step // self.interval > before // self.interval:
                self.evaluate(step)

    def evaluate(self, step: int) -> None:
        """Evaluates now; ``step`` is the training step and part of the seed."""
        if self.normalizers is not None:
            Normalizers(self.env).load_state_dict(self.normalizers.state_dict())
        try:
            scores = evaluate_policy(
                self.env,
                self.policy,
                episodes=self.episodes,
                seed=(self.seed * 1_000_003 + step + 1) % 2**31,
                should_stop=lambda: getattr(self.trainer, "stop_requested", False),
            )
        except EvaluationStopped:
            return
        returns, lengths = scores["return"], scores["length"].to(scores["return"])
        row = {
            "training_step": step,
            "environment_step": self.trainer.collected_frames,
            "mean_return": returns.mean().item(),
            "std_return": returns.std().item() if self.episodes > 1 else 0.0,
            "mean_length": lengths.mean().item(),
        }
        nonfinite = returns.isfinite().logical_not().nonzero()
        if len(nonfinite):
            row["nonfinite_episode"] = int(nonfinite[0]) + 1
        if self.trainer.logger is not None:
            for name in ("return", "length"):
                self.trainer.logger.log_scalar(
                    f"eval/{name}",
                    row[f"mean_{name}"],
                    step=self.trainer.collected_frames,
                )
        if self.on_evaluation is not None:
            self.on_evaluation(row)
        if len(nonfinite):
            warnings.warn(
                f"the evaluation at training step {step} has the return "
                f"{returns[nonfinite[0]].item()} in episode "
                f"{row['nonfinite_episode']} of {self.episodes}",
                UserWarning,
                stacklevel=2,
            )


def episode_ends(steps: TensorDictBase, env: EnvBase) -> Tensor:
    """Whether an episode ends with each step, by any done key of the environment.

    Args:
        steps (TensorDictBase): steps of ``env`` [*].
        env (EnvBase): the environment, whose keys may be nested.

    Returns:
        Tensor: booleans [*, 1].

    Examples:
        >>> from alm_torchrl import make_env
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> episode_ends(env.rollout(200), env)[-2:]
        tensor([[False],
                [ True]])
    """
    next_steps = steps.get("next")
    flags = [next_steps.get(key).flatten(steps.ndim) for key in env.done_keys]
    return torch.cat(flags, -1).any(-1, keepdim=True)


class EpisodeLog(Hook):
    """Logs return and length of the training episodes that end.

    Keys ``train/return`` and ``train/length``, their means over the environments in
    which one ends.

    Args:
        env (EnvBase): the training environment, for its reward and done keys.

    Examples:
        >>> import torch
        >>> from alm_torchrl import make_env
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> steps = env.rollout(200)
        >>> steps["collector", "traj_ids"] = torch.zeros(200, dtype=torch.int64)
        >>> log = EpisodeLog(env)
        >>> [log(step) for step in steps[:-1]] == [None] * 199
        True
        >>> log(steps[-1])["train/length"]
        200.0
    """

    stage = "pre_steps_log"

    def __init__(self, env: EnvBase) -> None:
        self.env = env
        self._shape = env.batch_size
        self._trajectory = np.full(self._shape, -1)
        self._return = np.zeros(self._shape)
        self._length = np.zeros(self._shape, dtype=np.int64)

    def register(self, trainer: ALMTrainer, name: str = "episode_log") -> None:
        """Registers the hook, and the sums of the running episode for checkpoints."""
        super().register(trainer)
        trainer.register_module(name, self)

    def __call__(self, batch: TensorDictBase) -> dict[str, float] | None:
        """Adds a step of the environments; returns means where episodes ended."""
        step = batch.reshape(*self._shape, 1)
        trajectory = step.get(("collector", "traj_ids")).cpu().numpy()
        trajectory = trajectory.reshape(self._shape)
        goes_on = trajectory == self._trajectory
        reward = step.get(("next", self.env.reward_key)).reshape(self._shape)
        self._trajectory = trajectory.copy()
        self._return = self._return * goes_on + reward.cpu().numpy()
        self._length = self._length * goes_on + 1
        ended = episode_ends(step, self.env).reshape(self._shape).cpu().numpy()
        if not ended.any():
            return None
        return {
            "train/return": float(self._return[ended].mean()),
            "train/length": float(self._length[ended].mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        """The running episodes: their numbers, and returns and lengths so far."""
        return {
            "trajectory": self._trajectory.tolist(),
            "return": self._return.tolist(),
            "length": self._length.tolist(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._trajectory = np.array(state_dict["trajectory"])
        self._return = np.array(state_dict["return"])
        self._length = np.array(state_dict["length"])


class BestCheckpoint:
    """Keeps the networks that scored best in an evaluation, without the replay.

    A return that is not finite is no score. If the checkpoint is gone, because it was
    set aside, the next evaluation is the best.

    Args:
        loss (LossModule): the networks.
        path (Path): the checkpoint to write.

    Keyword Args:
        metadata (callable): gives what the manifest says besides score and progress.
        **components: what is saved beside the networks.

    Examples:
        >>> import tempfile
        >>> from alm_torchrl import make_alm_loss
        >>> loss = make_alm_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     best = BestCheckpoint(loss, Path(folder, "best"), metadata=dict)
        ...     for mean_return in (-9.0, -2.0, -5.0):
        ...         best({"mean_return": mean_return})
        ...     VerifiedCheckpoint.manifest(best.path)["metadata"]
        {'mean_return': -2.0}
    """

    def __init__(
        self,
        loss: LossModule,
        path: Path,
        *,
        metadata: Callable[[], dict[str, Any]],
        **components: Any,
    ) -> None:
        self.path = path
        self.metadata = metadata
        self._checkpoint = VerifiedCheckpoint(loss_module=loss, **components)
        self._best: float | None = None

    def __call__(self, row: dict[str, Any]) -> None:
        """Saves if the evaluation is the best so far."""
        if not math.isfinite(row["mean_return"]):
            return
        best = self._best if self.path.exists() else None
        if best is None or row["mean_return"] > best:
            self._checkpoint.save(self.path, metadata={**row, **self.metadata()})
            self._best = row["mean_return"]

    def state_dict(self) -> dict[str, Any]:
        """The best mean return so far."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self._best = state_dict["best"]


class NonFiniteCheck(Hook):
    """Reads at intervals whether an update met a value that was not finite.

    For devices on which a reading in each update would wait for the device.

    Args:
        stepper (ALMOptimizationStepper or BaselineOptimizationStepper): the stepper.
        interval (int): updates between two readings.

    Raises:
        NonFiniteError: while training.
    """

    stage = "post_steps"

    def __init__(
        self,
        stepper: ALMOptimizationStepper | BaselineOptimizationStepper,
        interval: int,
    ) -> None:
        self.stepper = stepper
        self.interval = interval

    def register(self, trainer: ALMTrainer, name: str = "") -> None:
        """Registers the check after each step and at the end."""
        super().register(trainer, name)
        trainer.register_op("shutdown", self.stepper.raise_if_nonfinite)

    def __call__(self) -> None:
        """Asks if it is time."""
        if self.stepper.optimizer_step_count % self.interval == 0:
            self.stepper.raise_if_nonfinite()


class ProgressBar(Hook):
    """Shows environment steps per second, the time left and the last return.

    Twice a second on a terminal, twice a minute where the output is kept in a file.

    Raises:
        ImportError: if tqdm is missing.
    """

    stage = "post_steps"

    def __init__(self) -> None:
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError(
                "progress_bar=True needs tqdm: pip install 'alm_torchrl[cli]'"
            ) from error
        self._make_bar = tqdm
        self._bar: tqdm | None = None

    def register(self, trainer: ALMTrainer, name: str = "") -> None:
        """Registers the bar after each step and its ends at the trainer's."""
        super().register(trainer, name)
        trainer.register_op("setup", self.open)
        trainer.register_op("shutdown", self.close)

    def open(self) -> None:
        """Shows the bar at the trainer's count of environment steps."""
        self._bar = self._make_bar(
            initial=self.trainer.collected_frames,
            total=self.trainer.total_frames,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        )

    def __call__(self) -> None:
        """Advances to the trainer's count of environment steps."""
        if self._bar is not None:
            self._bar.update(self.trainer.collected_frames - self._bar.n)

    def show_return(self, mean_return: float) -> None:
        """Shows a mean return behind the bar from now on."""
        if self._bar is not None:
            self._bar.set_postfix({"return": f"{mean_return:.1f}"})

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()
