"""Training in a run folder, from the first step to the closing lines."""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import shutil
import signal
import threading
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

from alm_torchrl.evaluation import evaluate_policy, random_policy, zero_policy
from alm_torchrl.runs.agents import build_env, build_loss, describe_spaces
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
    set_run_aside,
)
from alm_torchrl.runs.loading import (
    checkpoint_metadata,
    find_checkpoint,
    usable_checkpoints,
)
from alm_torchrl.runs.settings import TrainConfig, UserError
from alm_torchrl.training.stepper import NonFiniteError
from alm_torchrl.training.trainer import ALMTrainer, make_trainer

__all__ = ["find_device", "train", "user_errors"]

Rows = list[dict[str, Any]]


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns errors that users can cause into :class:`UserError`."""
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


def train(
    config: TrainConfig,
    resume: Path | None = None,
    fresh: bool = False,
    fresh_episode: bool = False,
) -> int:
    """Trains an agent in its run folder, and continues the run that is in it.

    In the main thread, SIGINT and SIGTERM stop the training once the current step is
    done and saved.

    Args:
        config: the settings; ``config.run_path`` is the folder.
        resume: a run folder, or a checkpoint in one, to continue from; a folder other
            than ``config.run_path`` stays as it is. Default: ``None``.
        fresh: move a run in ``config.run_path`` aside and start anew.
            Default: ``False``.
        fresh_episode: continue with a fresh episode, not the one that was running.
            Default: ``False``.

    Returns:
        int: 0, 130 after SIGINT (Ctrl-C), or 143 after SIGTERM.

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
        with user_errors():
            env = build_env(config.to_dict(), seed=config.seed)
            eval_env = build_env(config.to_dict())
            _check_logger(config.logger)
            stack.enter_context(lock_run(path))
            if fresh and holds_run(path):
                print(f"The run before is now in {set_run_aside(path)}")
            start = _find_start(config, resume)
            if start.step >= config.warmup_steps + config.total_steps:
                print(
                    f"The run in {path} is complete: {config.total_steps:,} training "
                    "steps.\n--total-steps continues it beyond, --fresh starts anew."
                )
                _print_folder(path, eval_env)
                return 0
            logger = _make_logger(config, start.step)
        return _train_in_folder(
            config, device, start, env, eval_env, logger, fresh_episode
        )


@dataclass(frozen=True)
class _Start:
    """Where a run starts: at nothing, or at a checkpoint of a run folder."""

    source: Path
    checkpoint: Path | None = None
    step: int = -1
    wall_time: float = 0.0


def _find_start(config: TrainConfig, resume: Path | None) -> _Start:
    path = config.run_path
    source, checkpoint = path, None
    if resume is not None:
        checkpoint = find_checkpoint(resume, components=None)
        source = resume if resume != checkpoint else checkpoint.resolve().parents[1]
        if source.resolve() != path.resolve() and holds_run(path):
            raise FileExistsError(f"{path} already holds a run; choose another folder")
    if resume is None and not holds_run(path):
        for name in ("checkpoints", "metrics.csv", "learning_curve.png"):
            if (path / name).exists():
                raise FileExistsError(
                    f"{path} has a {name} but no config.json, so it is not a run that "
                    "can be continued; choose another folder with --run-dir"
                )
        return _Start(path)
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
        if any(directory.glob("checkpoint-*")):
            raise UserError(
                f"all checkpoints in {directory} are damaged; --fresh starts anew"
            )
        return _Start(source)
    metadata = checkpoint_metadata(checkpoint)
    if "collected_frames" not in metadata:
        raise UserError(f"{checkpoint} holds networks only, to act with")
    step, wall_time = metadata["collected_frames"], metadata["wall_time"]
    return _Start(source, checkpoint, step, wall_time)


def _train_in_folder(
    config: TrainConfig,
    device: str,
    start: _Start,
    env: TransformedEnv,
    eval_env: TransformedEnv,
    logger: Logger | None,
    fresh_episode: bool,
) -> int:
    path, settings, spaces = config.run_path, config.to_dict(), describe_spaces(env)
    torch.manual_seed(config.seed)
    loss = build_loss(settings, spaces).to(device)
    print(f"Task    {config.task}: {config.warmup_steps:,} random environment steps,")
    print(f"        then {config.total_steps:,} training steps")
    print(f"Device  {device}, CPU threads: {torch.get_num_threads()}")
    print(f"Folder  {path}\n{loss}", flush=True)
    began = time.monotonic() - start.wall_time

    def wall_time() -> float:
        return round(time.monotonic() - began, 3)

    def on_evaluation(result: Mapping[str, Any]) -> None:
        row = {name: result[name] for name in METRICS_FIELDS if name in result}
        own = {"seed": config.seed, "task": config.task, "wall_time": wall_time()}
        writer.write(row | own)

    def metadata() -> dict[str, Any]:
        return {"settings": settings, "spaces": spaces, "wall_time": wall_time()}

    arguments = config.arguments_of(make_trainer) | {"logger": logger}
    with user_errors():
        trainer = make_trainer(
            env,
            loss,
            **arguments,
            eval_env=eval_env,
            on_evaluation=on_evaluation,
            checkpoint_dir=path / "checkpoints",
            checkpoint_metadata=metadata,
            progress_bar=True,
        )
        if start.checkpoint is None:
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
    with writer, _stop_on_signal(trainer) as signals:
        _run_trainer(trainer, signals, path, writer.rows)
    _plot(path, writer.rows)
    if signals:
        _print_interrupted(trainer, path, writer.rows)
    else:
        _print_scores(config, eval_env, writer.rows)
    _print_folder(path, eval_env)
    return 128 + signals[0] if signals else 0


def _run_trainer(
    trainer: ALMTrainer, signals: list[int], path: Path, rows: Rows
) -> None:
    """Trains; an error that ends the run becomes one line that says how to go on."""
    try:
        trainer.train()
    except NonFiniteError as error:
        _plot(path, rows)
        raise UserError(f"training diverged: {error} Run folder: {path}") from error
    except KeyboardInterrupt:
        signals[:] = [signal.SIGINT]
    except OSError as error:
        how = _how_to_continue(trainer, path)
        raise UserError(f"{error}. Once that is solved, {how}") from error


@contextmanager
def _stop_on_signal(trainer: ALMTrainer) -> Iterator[list[int]]:
    """Lets SIGINT and SIGTERM stop a trainer after its current step, which it saves.

    An exception inside a step would leave parameters half updated. A second signal
    does not wait. Yields the list of the signals that came. Only the main thread can
    handle signals; elsewhere nothing changes.
    """
    signals: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def request_stop(number: int, frame: FrameType | None) -> None:
        signals[:] = [number]
        trainer.request_stop(signal.Signals(number).name)
        restore()
        # The signal may have come in the middle of a print(), which cannot be nested.
        os.write(
            2,
            b"\nStopping after this step or evaluation; Ctrl-C again stops at once.\n",
        )

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request_stop)
    try:
        yield signals
    finally:
        restore()


def _plot(path: Path, rows: Rows) -> None:
    if rows:
        with user_errors():
            plot_runs([read_run(path)], path / "learning_curve.png")


def _print_interrupted(trainer: ALMTrainer, path: Path, rows: Rows) -> None:
    newest = trainer.checkpoint_rotation.latest()
    saved = "There is no checkpoint yet." if newest is None else f"Saved in {newest}."
    print(f"\nInterrupted. {saved}")
    if rows:
        print(
            f"Last mean return {rows[-1]['mean_return']:.1f}, after "
            f"{rows[-1]['training_step']:,} training steps."
        )
    how = _how_to_continue(trainer, path)
    print(f"{how[0].upper()}{how[1:]}")


def _how_to_continue(trainer: ALMTrainer, path: Path) -> str:
    if trainer.checkpoint_rotation.latest() is None:
        return "start again with the same command"
    return f"continue with: alm-torchrl train --resume {shlex.quote(str(path))}"


def _print_scores(config: TrainConfig, env: TransformedEnv, rows: Rows) -> None:
    scores = {}
    for name, policy in (
        ("random policy", random_policy(env)),
        ("standing still", zero_policy(env)),
    ):
        found = evaluate_policy(
            env, policy, episodes=config.eval_episodes, seed=config.seed
        )
        scores[name] = found["return"].mean().item()
    scores["untrained agent"] = rows[0]["mean_return"]
    scores["trained agent"] = rows[-1]["mean_return"]
    print(f"\nMean return of {config.eval_episodes} episodes without action noise")
    for name, score in scores.items():
        print(f"  {name:15}  {score:10.1f}")


def _print_folder(path: Path, env: TransformedEnv) -> None:
    folder = shlex.quote(str(path))
    names = (file.name for file in path.iterdir() if not file.name.startswith("."))
    print(f"\nEverything is in {path}:\n  {', '.join(sorted(names))}")
    print("\nWhat to run next")
    print(f"  alm-torchrl evaluate {folder}")
    print(f"  alm-torchrl plot {folder}")
    if draws_pictures(env):
        print(f"  alm-torchrl render {folder}")


def find_device(name: str) -> str:
    """The device that ``--device`` stands for on this machine.

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
    """Imports what a logger needs before anything is written."""
    modules = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
    extra = "wandb" if name == "wandb" else "cli"
    try:
        if name in modules:
            importlib.import_module(modules[name])
    except ImportError as error:
        raise ImportError(
            f"--logger {name} needs another package: pip install 'alm_torchrl[{extra}]'"
        ) from error


def _make_logger(config: TrainConfig, step: int) -> Logger | None:
    """The logger; what was logged after environment step ``step`` is hidden."""
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
