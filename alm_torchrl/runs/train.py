"""The ``train`` command: a run folder from its first step to its closing lines."""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from gymnasium.error import Error as GymnasiumError
from torchrl import torchrl_logger
from torchrl.checkpoint import CheckpointError
from torchrl.envs import TransformedEnv
from torchrl.record.loggers import Logger
from torchrl.trainers import Trainer

from alm_torchrl.envs import make_env
from alm_torchrl.evaluation import Policy, evaluate_policy, random_policy, zero_policy
from alm_torchrl.runs.curves import plot_runs
from alm_torchrl.runs.film import draws_pictures
from alm_torchrl.runs.folder import (
    METRICS_FIELDS,
    MetricsWriter,
    continue_run,
    create_run,
    harmful_differences,
    holds_run,
    lock_run,
    read_record,
    read_run,
    refuse_other_files,
    set_run_aside,
)
from alm_torchrl.runs.loading import (
    build_loss,
    checkpoint_metadata,
    describe_spaces,
    find_checkpoint,
    usable_checkpoints,
)
from alm_torchrl.runs.settings import TrainConfig, UserError
from alm_torchrl.training.stepper import NonFiniteError
from alm_torchrl.training.trainer import ALMTrainer, make_trainer

__all__ = ["find_device", "mistakes", "train"]


@contextmanager
def mistakes() -> Iterator[None]:
    """Turn the errors that name a mistake of the user's into :class:`UserError`."""
    try:
        yield
    except (
        OSError,
        ValueError,
        ImportError,
        GymnasiumError,
        CheckpointError,
    ) as error:
        raise UserError(str(error)) from error


@dataclass(frozen=True)
class _Start:
    """Where a run starts from: nothing, or a checkpoint of a run folder."""

    source: Path | None = None
    checkpoint: Path | None = None
    step: int = -1
    wall_time: float = 0.0


def train(
    config: TrainConfig,
    resume: Path | None = None,
    fresh: bool = False,
    fresh_episode: bool = False,
) -> int:
    """Train an agent in its run folder, from where the run in it was left.

    Args:
        config: the settings; ``config.run_path`` is the folder.
        resume: a run folder, or a checkpoint in one, to continue from; it is changed
            only if it is ``config.run_path``. Default: ``None``, the run in
            ``config.run_path`` if there is one.
        fresh: move such a run aside and start anew. Default: ``False``.
        fresh_episode: continue with a fresh episode, not the one that was running.
            Default: ``False``.

    Returns:
        int: 0, 130 if it was interrupted with Ctrl-C, or 143 with SIGTERM.

    Raises:
        UserError: if the task cannot be used, the folder is in use, the run in it has
            other settings or is damaged, a package is missing, the disk is full, or
            the training diverged.
    """
    torchrl_logger.setLevel(logging.WARNING)
    if resume is not None and fresh:
        raise UserError("--fresh starts anew and --resume continues: choose one")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = find_device(config.device)
    path = config.run_path
    with ExitStack() as stack:
        with mistakes():
            env, eval_env = (
                make_env(
                    config.task,
                    action_bounds=config.action_bounds,
                    dynamics_noise=config.dynamics_noise,
                    seed=seed,
                )
                for seed in (config.seed, None)
            )
            _check_logger(config.logger)
            stack.enter_context(lock_run(path))
            if fresh and holds_run(path):
                print(f"The run before is now in {set_run_aside(path)}")
            start = _start(config, resume)
            if start.step >= config.warmup_steps + config.total_steps:
                print(
                    f"The run in {path} is complete: {config.total_steps:,} training "
                    "steps.\n--total-steps continues it beyond, --fresh starts anew."
                )
                _print_folder(path, eval_env)
                return 0
            logger = _logger(config, start.step)
        return _train_in_folder(
            config, device, start, env, eval_env, logger, fresh_episode
        )


def _start(config: TrainConfig, resume: Path | None) -> _Start:
    """The newest usable checkpoint of the run to continue, if there is one."""
    path = config.run_path
    source, checkpoint = path, None
    if resume is not None:
        checkpoint = find_checkpoint(resume, components=None)
        source = resume if resume != checkpoint else checkpoint.resolve().parents[1]
        if source.resolve() != path.resolve() and holds_run(path):
            raise FileExistsError(f"{path} already holds a run; choose another folder")
    if not holds_run(source):
        refuse_other_files(source)
        return _Start()
    differences = harmful_differences(read_record(source)["settings"], config)
    if differences:
        listed = "; ".join(
            f"{name}: {before!r} in the run, {after!r} now"
            for name, (before, after) in differences.items()
        )
        raise UserError(
            f"{source} holds a run with other settings ({listed}). Give the same, "
            "another folder with --run-dir, or --fresh to start anew"
        )
    directory = source / "checkpoints"
    if checkpoint is None:
        checkpoint = next(usable_checkpoints(directory), None)
    if checkpoint is None:
        if directory.is_dir() and any(directory.glob("checkpoint-*")):
            raise UserError(
                f"all checkpoints in {directory} are damaged; --fresh starts anew"
            )
        return _Start()
    metadata = checkpoint_metadata(checkpoint)
    if metadata["settings"]["task"] != config.task:
        raise UserError(
            f"{checkpoint} is of the task {metadata['settings']['task']}, "
            f"expected {config.task}"
        )
    return _Start(
        source, checkpoint, metadata["collected_frames"], metadata["wall_time"]
    )


def _train_in_folder(
    config: TrainConfig,
    device: str,
    start: _Start,
    env: TransformedEnv,
    eval_env: TransformedEnv,
    logger: Logger | None,
    fresh_episode: bool,
) -> int:
    path = config.run_path
    spaces = describe_spaces(env)
    torch.manual_seed(config.seed)
    loss = build_loss(config.to_dict(), spaces).to(device)
    print(f"Task    {config.task}: {config.warmup_steps:,} random environment steps,")
    print(f"        then {config.total_steps:,} training steps")
    print(f"Device  {device}, CPU threads: {torch.get_num_threads()}")
    print(f"Folder  {path}\n{loss}", flush=True)
    began = time.monotonic() - start.wall_time

    def wall_time() -> float:
        return round(time.monotonic() - began, 3)

    def on_evaluation(result: Mapping[str, Any]) -> None:
        row = {name: result[name] for name in METRICS_FIELDS if name in result}
        writer.write(
            row | {"seed": config.seed, "task": config.task, "wall_time": wall_time()}
        )

    with mistakes():
        trainer = make_trainer(
            env,
            loss,
            total_steps=config.total_steps,
            warmup_steps=config.warmup_steps,
            batch_size=config.batch_size,
            horizon=config.horizon,
            capacity=config.replay_capacity,
            lr=config.lr,
            clip_norm=config.clip_norm,
            tau=config.tau,
            precision=config.precision,
            compile=config.compile,
            cudagraph=config.cudagraph,
            eval_env=eval_env,
            eval_interval=config.eval_interval,
            eval_episodes=config.eval_episodes,
            on_evaluation=on_evaluation,
            logger=logger,
            log_interval=config.log_interval,
            checkpoint_dir=path / "checkpoints",
            checkpoint_interval=config.checkpoint_interval,
            keep_checkpoints=config.keep_checkpoints,
            checkpoint_metadata=lambda: {
                "settings": config.to_dict(),
                "spaces": spaces,
                "wall_time": wall_time(),
            },
            progress_bar=True,
            seed=config.seed,
        )
        if start.checkpoint is None or start.source is None:
            create_run(config, device)
        else:
            collector = trainer.checkpoint.components["collector"]
            collector.fresh_episode = fresh_episode
            trainer.load_from_file(start.checkpoint)
            continue_run(config, device, start.source, start.checkpoint, start.step)
            if start.source.resolve() != path.resolve():
                shutil.copyfile(start.source / "metrics.csv", path / "metrics.csv")
            print(f"Continues from {start.checkpoint}, environment step {start.step:,}")
        writer = MetricsWriter(path / "metrics.csv", start.step)
    interrupt = _Interrupt(trainer)
    rows = writer.rows
    with writer, interrupt:
        _run_trainer(trainer, interrupt, path, rows)
    _plot(path, rows)
    if interrupt.signal is not None:
        _print_interrupted(trainer, rows, path)
    else:
        _print_scores(config, eval_env, rows)
    _print_folder(path, eval_env)
    return 0 if interrupt.signal is None else 128 + interrupt.signal


def _run_trainer(
    trainer: ALMTrainer, interrupt: _Interrupt, path: Path, rows: list[dict[str, Any]]
) -> None:
    """Train, and turn what ends a run into one line that says how to go on."""
    try:
        trainer.train()
    except NonFiniteError as error:
        _plot(path, rows)
        raise UserError(f"training diverged: {error} Run folder: {path}") from error
    except KeyboardInterrupt:
        interrupt.signal = signal.SIGINT
    except OSError as error:
        how = _how_to_continue(trainer, path)
        raise UserError(f"{error}. Once that is solved, {how}") from error


def _plot(path: Path, rows: list[dict[str, Any]]) -> None:
    if rows:
        with mistakes():
            plot_runs([read_run(path)], path / "learning_curve.png")


def _print_interrupted(
    trainer: Trainer, rows: list[dict[str, Any]], path: Path
) -> None:
    newest = trainer.checkpoint_rotation.latest()
    print("\nInterrupted.", end=" ")
    if newest is None:
        print("There is no checkpoint yet.")
    else:
        print(f"Saved in {newest}.")
    if rows:
        print(f"Last mean return {rows[-1]['mean_return']:.1f}, after", end=" ")
        print(f"{rows[-1]['training_step']:,} training steps.")
    how = _how_to_continue(trainer, path)
    print(f"{how[0].upper()}{how[1:]}")


def _print_scores(
    config: TrainConfig, env: TransformedEnv, rows: list[dict[str, Any]]
) -> None:
    def score(policy: Policy) -> float:
        scores = evaluate_policy(
            env, policy, episodes=config.eval_episodes, seed=config.seed
        )
        return scores["return"].mean().item()

    print(f"\nMean return of {config.eval_episodes} episodes without action noise")
    print(f"  random policy    {score(random_policy(env)):10.1f}")
    print(f"  standing still   {score(zero_policy(env)):10.1f}")
    print(f"  untrained agent  {rows[0]['mean_return']:10.1f}")
    print(f"  trained agent    {rows[-1]['mean_return']:10.1f}")


def _print_folder(path: Path, env: TransformedEnv) -> None:
    folder = shlex.quote(str(path))
    print(f"\nEverything is in {path}:")
    names = (file.name for file in path.iterdir() if not file.name.startswith("."))
    print("  " + ", ".join(sorted(names)))
    print("\nWhat to run next")
    print(f"  alm-torchrl evaluate {folder}")
    print(f"  alm-torchrl plot {folder}")
    if draws_pictures(env):
        print(f"  alm-torchrl render {folder}")


def _how_to_continue(trainer: Trainer, path: Path) -> str:
    if trainer.checkpoint_rotation.latest() is None:
        return "start again with the same command"
    return f"continue with: alm-torchrl train --resume {shlex.quote(str(path))}"


class _Interrupt:
    """Lets Ctrl-C and SIGTERM stop a trainer after its current step, which it saves.

    Inside a step an exception would find parameters half updated. A second signal
    does not wait.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.signal: int | None = None

    def __enter__(self) -> None:
        self._previous = [
            signal.signal(number, self._request) for number in self.SIGNALS
        ]

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in zip(self.SIGNALS, self._previous, strict=True):
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.trainer.request_stop(signal.Signals(number).name)
        self._restore()
        # print() cannot be used: the signal may have come in the middle of one.
        os.write(
            2,
            b"\nStopping after this step or evaluation; Ctrl-C again stops at once.\n",
        )


def find_device(name: str) -> str:
    """The device that ``--device`` means here.

    Raises:
        UserError: if it is CUDA and there is none.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device: expected one that PyTorch finds, got cuda, but there is no "
            "CUDA device"
        )
    return name


def _check_logger(name: str) -> None:
    """Import what a logger needs before anything is written."""
    try:
        if name == "tensorboard":
            importlib.import_module("torch.utils.tensorboard")
        elif name == "wandb":
            importlib.import_module("wandb")
    except ImportError as error:
        extra = "wandb" if name == "wandb" else "cli"
        raise ImportError(
            f"--logger {name} needs another package: pip install 'alm_torchrl[{extra}]'"
        ) from error


def _logger(config: TrainConfig, step: int) -> Logger | None:
    """The logger, told to forget what was logged after environment step ``step``."""
    path = config.run_path
    if config.logger == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        from torchrl.record.loggers.tensorboard import TensorboardLogger

        class _Tensorboard(TensorboardLogger):
            def _create_experiment(self) -> SummaryWriter:
                return SummaryWriter(str(path / "tensorboard"), purge_step=step + 1)

        return _Tensorboard("tensorboard", log_dir=str(path))
    if config.logger == "wandb":
        from torchrl.record.loggers.wandb import WandbLogger

        return WandbLogger(path.name, project="alm_torchrl", save_dir=str(path))
    return None
