"""Training in a run folder, from the first step to the closing lines."""

from __future__ import annotations

import importlib
import logging
import shlex
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Event
from typing import Any, Literal

import torch
from torchrl import torchrl_logger
from torchrl.checkpoint import CheckpointError
from torchrl.envs import EnvBase, SerialEnv
from torchrl.record.loggers import Logger

from alm_torchrl.envs import LockstepEnv
from alm_torchrl.evaluation import evaluate_policy, random_policy, zero_policy
from alm_torchrl.runs.agents import (
    build_env,
    build_eval_env,
    build_loss,
    describe_spaces,
)
from alm_torchrl.runs.curves import plot_runs
from alm_torchrl.runs.film import draws_pictures
from alm_torchrl.runs.folder import (
    METRICS_FIELDS,
    FolderGoneError,
    MetricsWriter,
    holds_run,
    lock_run,
    read_metrics,
    read_run,
    run_of,
    set_run_aside,
    watch_folder,
    write_config,
)
from alm_torchrl.runs.loading import checkpoint_metadata
from alm_torchrl.runs.settings import TrainConfig, UserError, user_errors
from alm_torchrl.runs.signals import stop_on_signal
from alm_torchrl.runs.start import Start, find_starts
from alm_torchrl.training.alm_trainer import ALMTrainer
from alm_torchrl.training.compiled import has_compiler
from alm_torchrl.training.episode import EpisodeError
from alm_torchrl.training.episode_length import EpisodeLengthError, time_limit
from alm_torchrl.training.stepper import NonFiniteError
from alm_torchrl.training.trainer import make_trainer

__all__ = ["find_device", "train"]

Rows = list[dict[str, Any]]

# Training steps from which compiling saves more time than it takes.
COMPILE_STEPS = 2500


def train(
    config: TrainConfig,
    resume: Path | None = None,
    fresh: bool = False,
    fresh_episode: bool = False,
    on_evaluation: Callable[[dict[str, Any]], object] | None = None,
    stop: Event | None = None,
    lock_timeout: float = 0.0,
) -> int:
    """Trains an agent in its run folder, and continues the run that is in it.

    :mod:`alm_torchrl.runs.start` says what each state of the folder leads to. In the
    main thread, SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 stop the training once
    the current step is done and saved, unless they have another handler. In another
    thread, ``stop`` does.

    Args:
        config: the settings; ``config.run_path`` is the folder.
        resume: a run folder, or a checkpoint, to continue from; a folder other
            than ``config.run_path`` stays as it is. Default: ``None``.
        fresh: move a run in ``config.run_path`` aside and start anew.
            Default: ``False``.
        fresh_episode: continue with a fresh episode, not the one that was running.
            Default: ``False``.
        on_evaluation: receives each new row of ``metrics.csv``. Default: ``None``.
        stop: once set, stops the training as SIGINT does. Default: ``None``.
        lock_timeout: seconds to wait for another process that trains in the folder.
            Default: ``0.0``.

    Returns:
        int: 0, or 128 and the number of the signal that stopped the training, such
        as 130 after SIGINT (Ctrl-C) or ``stop``.

    Raises:
        UserError: if the task cannot be used, the folder is in use, the run in it has
            other settings or is damaged, a package is missing, the disk is full, the
            folder is gone, the environment raises, or the training diverged.
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
            envs = _build_envs(config)
            _check_logger(config.logger)
            stack.enter_context(lock_run(path, lock_timeout))
            if fresh and holds_run(path):
                print(f"The run before is now in {set_run_aside(path)}")
            starts = find_starts(config, resume)
            start = next(starts)
            if _is_complete(config, start):
                done = config.pace.updates(start.step)
                where = (start.elsewhere and start.checkpoint) or path
                print(
                    f"The run in {where} is complete: {done:,} training steps. To "
                    "train longer:\n  "
                    f"{_resume_command(config, where)} --total-steps {2 * done}"
                )
                if not start.elsewhere:
                    _print_folder(config, envs[1])
                return 0
            config = replace(config, compile=_compile_mode(config, device, start))
        return _train_in_folder(
            config,
            device,
            chain([start], starts),
            envs,
            fresh_episode,
            on_evaluation,
            stop,
        )


def _compile_mode(
    config: TrainConfig, device: str, start: Start
) -> Literal["on", "off"]:
    """Whether the update is compiled; a run that continues keeps its mode."""
    if config.compile == "on" and config.agent != "alm":
        raise UserError(f"--compile: expected auto or off with {config.agent}, got on")
    if config.compile == "on" and device == "cpu" and not has_compiler():
        raise UserError(
            "--compile: on needs a C++ compiler (g++, or the one that CXX names), and "
            "there is none; --compile off runs without"
        )
    if config.compile != "auto":
        return config.compile
    if start.checkpoint is not None:
        before = checkpoint_metadata(start.checkpoint)["settings"]["compile"]
        return "on" if before == "on" else "off"
    pays = config.total_steps >= COMPILE_STEPS
    can = config.agent == "alm" and device == "cpu" and has_compiler()
    return "on" if pays and can else "off"


def _build_envs(config: TrainConfig) -> tuple[EnvBase, LockstepEnv]:
    """The environments of training and evaluation."""
    settings, num_envs = config.to_dict(), config.num_envs
    build = partial(build_env, settings, trust=True)
    env = build(seed=config.seed) if num_envs == 1 else SerialEnv(num_envs, build)
    return env, build_eval_env(settings, config.eval_episodes, trust=True)


def _is_complete(config: TrainConfig, start: Start) -> bool:
    """Whether the last step was made, and evaluated."""
    if start.step < config.pace.environment_steps(config.total_steps):
        return False
    metrics = config.run_path / "metrics.csv"
    rows = read_metrics(metrics) if metrics.exists() else []
    return start.elsewhere or _has_row(rows, start.step)


def _has_row(rows: Rows, step: int) -> bool:
    return any(row["environment_step"] == step for row in rows)


def _train_in_folder(
    config: TrainConfig,
    device: str,
    starts: Iterator[Start],
    envs: tuple[EnvBase, LockstepEnv],
    fresh_episode: bool,
    on_row: Callable[[dict[str, Any]], object] | None,
    stop: Event | None,
) -> int:
    path, settings = config.run_path, config.to_dict()
    watch, made = watch_folder(path), [envs]
    pace = config.pace
    print(f"Task    {config.task}: {pace.warmup_steps:,} random environment steps,")
    print(f"        then {config.total_steps:,} training steps")
    threads, mode = torch.get_num_threads(), "eager"
    if config.compile == "on":
        mode = "compiled at the first one, which takes a minute or more"
    print(f"Device  {device}, CPU threads: {threads}\nUpdates {mode}")
    print(f"Folder  {path}", flush=True)

    def make(start: Start) -> tuple[ALMTrainer, LockstepEnv]:
        # Those that were built first serve once.
        env, eval_env = made.pop() if made else _build_envs(config)
        spaces = describe_spaces(eval_env)
        torch.manual_seed(config.seed)
        loss = build_loss(settings, spaces).to(device)
        began = time.monotonic() - start.wall_time

        def wall_time() -> float:
            return round(time.monotonic() - began, 3)

        def on_evaluation(result: Mapping[str, Any]) -> None:
            watch()
            if "nonfinite_episode" in result:
                raise NonFiniteError(
                    f"the return of evaluation episode {result['nonfinite_episode']}",
                    result["training_step"],
                    unit="training step",
                )
            row = {name: result[name] for name in METRICS_FIELDS if name in result}
            own = {"seed": config.seed, "task": config.task, "wall_time": wall_time()}
            writer.write(row | own)
            if on_row is not None:
                on_row(row | own)

        def metadata() -> dict[str, Any]:
            watch()
            return {"settings": settings, "spaces": spaces, "wall_time": wall_time()}

        arguments = config.arguments_of(make_trainer)
        arguments["logger"] = _make_logger(config, start.step)
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
        trainer.checkpoint.components["collector"].fresh_episode = fresh_episode
        return trainer, eval_env

    with user_errors():
        start, (trainer, eval_env) = _load(starts, make)
        print(trainer.loss_module, flush=True)
        writer = _open_folder(config, device, start, trainer)
    with stop_on_signal(trainer) as signals:

        def obey(stop: Event) -> None:
            if stop.is_set():
                signals[:] = signals or [signal.SIGINT]
                trainer.request_stop("stop")

        if stop is not None:
            trainer.register_op("post_steps", partial(obey, stop))
        try:
            _run_trainer(config, trainer, start, signals, writer.rows)
        except UserError:
            # A writer may have failed because the folder is gone.
            with user_errors():
                watch()
            raise
    _plot(path, writer.rows)
    if signals:
        # The terminal may be gone, which is what SIGHUP says.
        with suppress(OSError):
            _print_interrupted(config, trainer, writer.rows)
            _print_folder(config, eval_env)
        return 128 + signals[0]
    _print_scores(config, eval_env, writer.rows)
    _print_folder(config, eval_env)
    return 0


def _load(
    starts: Iterator[Start],
    make: Callable[[Start], tuple[ALMTrainer, LockstepEnv]],
) -> tuple[Start, tuple[ALMTrainer, LockstepEnv]]:
    """The first start whose checkpoint loads, with a trainer that is there."""
    failure: CheckpointError | None = None
    for start in starts:
        # A new one each time: a load that fails may have changed it.
        made = make(start)
        try:
            if start.checkpoint is not None:
                made[0].load_from_file(start.checkpoint)
        except CheckpointError as error:
            if isinstance(error.__cause__, EpisodeError):
                raise
            failure = CheckpointError(f"{start.checkpoint} does not load: {error}")
            warnings.warn(
                f"{failure}. The checkpoint before it is used, if there is one.",
                UserWarning,
                stacklevel=2,
            )
        else:
            return start, made
    raise failure or CheckpointError("there is no checkpoint")


def _open_folder(
    config: TrainConfig, device: str, start: Start, trainer: ALMTrainer
) -> MetricsWriter:
    """Sets aside what the run leaves behind, and notes that it starts."""
    aside = [trainer.checkpoint_rotation.set_newer_aside(start.step)]
    write_config(config, device, start.checkpoint, start.step)
    rows: Rows = []
    if start.elsewhere and start.checkpoint is not None:
        source = run_of(start.checkpoint)
        if source is not None and (source / "metrics.csv").exists():
            rows = read_metrics(source / "metrics.csv")
    writer = MetricsWriter(config.run_path / "metrics.csv", start.step, rows)
    if start.elsewhere:
        # From here on the folder needs no other one.
        trainer.save_trainer(force_save=True)
    for place in filter(None, (*aside, writer.aside)):
        print(f"What the run had after that is now in {place}")
    if start.checkpoint is not None:
        print(f"Continues from {start.checkpoint}, environment step {start.step:,}")
    return writer


def _run_trainer(
    config: TrainConfig,
    trainer: ALMTrainer,
    start: Start,
    signals: list[int],
    rows: Rows,
) -> None:
    """Trains; an error that ends the run becomes one line that says how to go on."""
    path = config.run_path
    try:
        if not _has_row(rows, start.step):
            # It may have been stopped in the evaluation of this step.
            trainer.evaluate()
        trainer.train()
    except NonFiniteError as error:
        _plot(path, rows)
        raise UserError(f"training diverged: {error} Run folder: {path}") from error
    except KeyboardInterrupt:
        signals[:] = [signal.SIGINT]
    except (FolderGoneError, EpisodeLengthError) as error:
        raise UserError(str(error)) from error
    except OSError as error:
        how = _how_to_continue(config, trainer)
        raise UserError(f"{error}. Once that is solved, {how}") from error
    except Exception as error:
        if _lacks_memory(error):
            raise UserError(
                f"not enough memory for these settings, such as --capacity: {error}"
            ) from error
        if trainer.whole_at is None:
            raise
        how = _how_to_continue(config, trainer)
        raise UserError(
            f"the environment or an evaluation raised {type(error).__name__}: {error}. "
            f"{_saved(trainer)} Once that is solved, {how}"
        ) from error


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        # Of PyTorch's allocator on a CPU.
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _plot(path: Path, rows: Rows) -> None:
    if rows:
        with user_errors():
            plot_runs([read_run(path)], path / "learning_curve.png")


def _print_interrupted(config: TrainConfig, trainer: ALMTrainer, rows: Rows) -> None:
    print(f"\nInterrupted. {_saved(trainer)}")
    if rows:
        print(
            f"Last mean return {rows[-1]['mean_return']:.1f}, after "
            f"{rows[-1]['training_step']:,} training steps."
        )
    how = _how_to_continue(config, trainer)
    print(f"{how[0].upper()}{how[1:]}")


def _saved(trainer: ALMTrainer) -> str:
    """Where this process saved last."""
    rotation = trainer.checkpoint_rotation
    if rotation.saved is not None:
        return f"Saved in {rotation.saved}."
    newest = rotation.latest()
    if newest is None:
        return "There is no checkpoint yet."
    return f"Nothing was saved since {newest}."


def _how_to_continue(config: TrainConfig, trainer: ALMTrainer) -> str:
    if trainer.checkpoint_rotation.latest() is None:
        return "start again with the same command"
    return f"continue with: {_resume_command(config, config.run_path)}"


def _resume_command(config: TrainConfig, path: Path) -> str:
    return f"alm-torchrl train --resume {shlex.quote(str(path))}{_trust(config)}"


def _trust(config: TrainConfig) -> str:
    """The flag without which a command does not import the module of a task."""
    return " --trust" if ":" in config.task else ""


def _print_scores(config: TrainConfig, env: LockstepEnv, rows: Rows) -> None:
    scores = {}
    # Without a time limit, these might never end.
    references = (
        ()
        if time_limit(env) is None
        else (
            ("random policy", random_policy(env)),
            ("standing still", zero_policy(env)),
        )
    )
    for name, policy in references:
        found = evaluate_policy(
            env, policy, episodes=config.eval_episodes, seed=config.seed
        )
        scores[name] = found["return"].mean().item()
    if rows[0]["training_step"] == 0:
        scores["untrained agent"] = rows[0]["mean_return"]
    scores["trained agent"] = rows[-1]["mean_return"]
    print(f"\nMean return of {config.eval_episodes} episodes without action noise")
    for name, score in scores.items():
        print(f"  {name:15}  {score:10.1f}")


def _print_folder(config: TrainConfig, env: LockstepEnv) -> None:
    path, trust = config.run_path, _trust(config)
    folder = shlex.quote(str(path))
    names = (file.name for file in path.iterdir() if not file.name.startswith("."))
    print(f"\nEverything is in {path}:\n  {', '.join(sorted(names))}")
    print("\nWhat to run next")
    print(f"  alm-torchrl evaluate {folder}{trust}")
    print(f"  alm-torchrl plot {folder}")
    if draws_pictures(env.envs[0]):
        print(f"  alm-torchrl render {folder}{trust}")


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
