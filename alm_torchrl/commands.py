"""What the commands of ``alm-torchrl`` do, and what they print."""

from __future__ import annotations

import logging
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

from alm_torchrl.checkpoint import (
    build_loss,
    load_loss,
    resolve_checkpoint,
    run_settings,
)
from alm_torchrl.config import TrainConfig, UserError
from alm_torchrl.envs import TASKS, make_env
from alm_torchrl.evaluation import Policy, evaluate_policy, random_policy, zero_policy
from alm_torchrl.plotting import plot_runs
from alm_torchrl.rendering import check_film_name, film_policy, render_headless
from alm_torchrl.runs import (
    METRICS_FIELDS,
    MetricsWriter,
    create_run,
    read_run,
    refuse_existing_run,
)
from alm_torchrl.stepper import NonFiniteError
from alm_torchrl.trainer import make_trainer

__all__ = ["evaluate", "plot", "render", "tasks", "train"]


def train(config: TrainConfig) -> int:
    """Train an agent in a new run folder.

    Returns:
        int: 0, or 130 if it was interrupted with Ctrl-C.

    Raises:
        UserError: if the task cannot be used, the run folder holds a run, a package
            is missing, or the training diverged.
    """
    began = time.monotonic()
    torchrl_logger.setLevel(logging.WARNING)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = _device(config.device)
    path = config.run_path
    with _mistakes():
        refuse_existing_run(path)
        env, eval_env = (
            make_env(config.task, action_bounds=config.action_bounds, seed=seed)
            for seed in (config.seed, None)
        )
        logger = _logger(config)
    torch.manual_seed(config.seed)
    loss = build_loss(config.to_dict(), env).to(device)
    print(f"Task    {config.task}: {config.warmup_steps:,} random environment steps,")
    print(f"        then {config.total_steps:,} training steps")
    print(f"Device  {device}, CPU threads: {torch.get_num_threads()}")
    print(f"Folder  {path}\n{loss}", flush=True)
    rows: list[dict[str, Any]] = []

    def on_evaluation(result: dict[str, Any]) -> None:
        row = {name: result[name] for name in METRICS_FIELDS if name in result}
        wall_time = round(time.monotonic() - began, 3)
        row.update(seed=config.seed, task=config.task, wall_time=wall_time)
        writer.write(row)
        rows.append(row)

    with _mistakes():
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
            eval_env=eval_env,
            eval_interval=config.eval_interval,
            eval_episodes=config.eval_episodes,
            on_evaluation=on_evaluation,
            logger=logger,
            log_interval=config.log_interval,
            checkpoint_dir=path / "checkpoints",
            checkpoint_interval=config.checkpoint_interval,
            keep_checkpoints=config.keep_checkpoints,
            progress_bar=True,
            seed=config.seed,
        )
        create_run(config, device)
    interrupt = _Interrupt(trainer)
    diverged: NonFiniteError | None = None
    with MetricsWriter(path / "metrics.csv") as writer, interrupt:
        try:
            trainer.train()
        except NonFiniteError as error:
            diverged = error
        except KeyboardInterrupt:
            interrupt.requested = True
    if rows:
        with _mistakes():
            plot_runs([read_run(path)], path / "learning_curve.png")
    if diverged is not None:
        raise UserError(
            f"training diverged: {diverged} Run folder: {path}"
        ) from diverged
    if interrupt.requested:
        print("\nInterrupted; what was measured so far is kept.")
        if rows:
            print(f"Last mean return {rows[-1]['mean_return']:.1f}, after", end=" ")
            print(f"{rows[-1]['training_step']:,} training steps.")
        _print_folder(path)
        return 130

    def score(policy: Policy) -> float:
        scores = evaluate_policy(
            eval_env, policy, episodes=config.eval_episodes, seed=config.seed
        )
        return scores["return"].mean().item()

    print(f"\nMean return of {config.eval_episodes} episodes without action noise")
    print(f"  random policy    {score(random_policy(eval_env)):10.1f}")
    print(f"  standing still   {score(zero_policy(eval_env)):10.1f}")
    print(f"  untrained agent  {rows[0]['mean_return']:10.1f}")
    print(f"  trained agent    {rows[-1]['mean_return']:10.1f}")
    _print_folder(path)
    return 0


def evaluate(checkpoint: Path, episodes: int, seed: int) -> int:
    """Print the scores of a trained agent.

    Raises:
        UserError: if there is no checkpoint, or the number of episodes is below 1.
    """
    with _mistakes():
        run, file = resolve_checkpoint(checkpoint)
        env = _env_of(run)
        policy = load_loss(file, env).acting_policy()
        scores = evaluate_policy(env, policy, episodes=episodes, seed=seed)
    returns = scores["return"].double()
    std = f"{returns.std().item():.1f}" if episodes > 1 else "-"
    print(f"task        {run_settings(run)['task']}")
    print(f"checkpoint  {file}")
    print(f"episodes    {episodes}, without action noise, seed {seed}")
    print(f"return      mean {returns.mean():.1f}, standard deviation {std},")
    print(f"            min {returns.min():.1f}, max {returns.max():.1f}")
    print(f"length      mean {scores['length'].double().mean():.1f}")
    return 0


def plot(runs: Sequence[Path], output: Path) -> int:
    """Draw learning curves and print where they went.

    Raises:
        UserError: if a folder is not that of a run, or nothing can be drawn.
    """
    with _mistakes():
        if not runs:
            raise ValueError("plot needs at least one run folder")
        print(plot_runs([read_run(path) for path in runs], output))
    return 0


def render(checkpoint: Path, output: Path, seed: int, steps: int | None) -> int:
    """Film an episode of a trained agent and print where the film went.

    Raises:
        UserError: if there is no checkpoint, or the film cannot be written.
    """
    render_headless()
    with _mistakes():
        check_film_name(output)
        run, file = resolve_checkpoint(checkpoint)
        env = _env_of(run, render_mode="rgb_array")
        policy = load_loss(file, env).acting_policy()
        print(f"Filming {file}", flush=True)
        film = film_policy(env, policy, output, seed=seed, max_steps=steps)
    print(
        f"{film.path}: {film.frames} frames at {film.fps:g} per second, "
        f"{film.steps} steps, return {film.episode_return:.1f}"
    )
    return 0


def tasks() -> int:
    """Print the paper's tasks."""
    print(f"{'task':15} {'observation':>11} {'action':>6} {'steps':>5}  note")
    for task in TASKS:
        sizes = f"{task.observation_dim:11} {task.action_dim:6}"
        start = f"{task.id:15} {sizes} {task.max_episode_steps:5}  "
        indent = " " * len(start)
        print(
            textwrap.fill(task.note, 80, initial_indent=start, subsequent_indent=indent)
        )
    print(
        "\nAny other Gymnasium task with flat observations and continuous actions works"
        "\ntoo; 'module:Task-v0' imports the module that registers it first."
    )
    return 0


class _Interrupt:
    """Lets Ctrl-C stop a trainer after its current step, with a checkpoint.

    Inside a step an exception would find parameters half updated. A second Ctrl-C
    does not wait.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.requested = False

    def __enter__(self) -> None:
        self._previous = signal.signal(signal.SIGINT, self._request)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.trainer.request_stop("Ctrl-C")
        signal.signal(signal.SIGINT, self._previous)
        print(
            "\nStopping after this step or evaluation; Ctrl-C again stops at once.",
            file=sys.stderr,
        )


@contextmanager
def _mistakes() -> Iterator[None]:
    """Turn the errors that name a mistake of the user's into :class:`UserError`."""
    try:
        yield
    except (OSError, ValueError, ImportError, GymnasiumError, CheckpointError) as error:
        raise UserError(str(error)) from error


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device")
    return name


def _env_of(run: Path, render_mode: str | None = None) -> TransformedEnv:
    settings = run_settings(run)
    return make_env(
        settings["task"],
        action_bounds=settings["action_bounds"],
        render_mode=render_mode,
    )


def _logger(config: TrainConfig) -> Logger | None:
    path = config.run_path
    if config.logger == "tensorboard":
        from torchrl.record.loggers.tensorboard import TensorboardLogger

        try:
            return TensorboardLogger("tensorboard", log_dir=str(path))
        except ImportError as error:
            raise ImportError(
                "--logger tensorboard needs TensorBoard: pip install 'alm_torchrl[cli]'"
            ) from error
    if config.logger == "wandb":
        from torchrl.record.loggers.wandb import WandbLogger

        try:
            return WandbLogger(path.name, project="alm_torchrl", save_dir=str(path))
        except ImportError as error:
            raise ImportError(
                "--logger wandb needs W&B: pip install 'alm_torchrl[wandb]'"
            ) from error
    return None


def _print_folder(path: Path) -> None:
    folder = shlex.quote(str(path))
    print(f"\nEverything is in {path}:")
    print("  " + ", ".join(sorted(file.name for file in path.iterdir())))
    print("\nWhat to run next")
    print(f"  alm-torchrl evaluate {folder}")
    print(f"  alm-torchrl plot {folder}")
    print(f"  alm-torchrl render {folder}")
