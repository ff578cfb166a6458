"""What the commands of ``alm-torchrl`` do, and what they print."""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl import torchrl_logger
from torchrl.envs import TransformedEnv

from alm_torchrl.checks import check_integer, check_output
from alm_torchrl.envs import TASKS, make_env
from alm_torchrl.evaluation import evaluate_policy
from alm_torchrl.experiments.reproduce import (
    ReproduceOptions,
    describe_experiments,
)
from alm_torchrl.experiments.reproduce import reproduce as _reproduce
from alm_torchrl.runs.curves import plot_runs, reference_curve
from alm_torchrl.runs.diagnose import DiagnoseOptions, run_diagnose
from alm_torchrl.runs.film import check_film_name, film_policy, render_headless
from alm_torchrl.runs.folder import read_run
from alm_torchrl.runs.loading import checkpoint_metadata, find_checkpoint, load_policy
from alm_torchrl.runs.train import mistakes, train

__all__ = [
    "diagnose",
    "evaluate",
    "list_experiments",
    "plot",
    "render",
    "reproduce",
    "tasks",
    "train",
]


def diagnose(options: DiagnoseOptions) -> int:
    """Look into a trained agent: print the tables, and write them and pictures.

    Raises:
        UserError: if there is no checkpoint, or it has not what is asked for.
    """
    with mistakes():
        check_output("output", options.output)
        run_diagnose(options, _env, lambda text: print(text, flush=True))
    return 0


def evaluate(checkpoint: Path, episodes: int, seed: int) -> int:
    """Print the scores of a trained agent.

    Raises:
        UserError: if there is no checkpoint, or the number of episodes is below 1.
    """
    with mistakes():
        file = find_checkpoint(checkpoint)
        settings = checkpoint_metadata(file)["settings"]
        env = _env(settings)
        policy = load_policy(file)
        scores = evaluate_policy(env, policy, episodes=episodes, seed=seed)
    returns = scores["return"].double()
    std = f"{returns.std().item():.1f}" if episodes > 1 else "-"
    print(f"task        {settings['task']}")
    if settings.get("dynamics_noise"):
        print(f"dynamics    noise {settings['dynamics_noise']:g}")
    print(f"checkpoint  {file}")
    print(f"episodes    {episodes}, without action noise, seed {seed}")
    print(f"return      mean {returns.mean():.1f}, standard deviation {std},")
    print(f"            min {returns.min():.1f}, max {returns.max():.1f}")
    print(f"length      mean {scores['length'].double().mean():.1f}")
    return 0


def list_experiments() -> int:
    """Print the experiments of the paper."""
    print(describe_experiments())
    return 0


def plot(runs: Sequence[Path], output: Path, reference: Sequence[Path] = ()) -> int:
    """Draw learning curves and print where they went.

    Raises:
        UserError: if a folder is not that of a run, or nothing can be drawn.
    """
    with mistakes():
        if not runs:
            raise ValueError("plot needs at least one run folder")
        check_output("output", output)
        references = [reference_curve(path) for path in reference]
        print(plot_runs([read_run(path) for path in runs], output, references))
    return 0


def reproduce(name: str, options: ReproduceOptions) -> int:
    """Rerun an experiment of the paper.

    Raises:
        UserError: if there is no such experiment, or nothing can be drawn.
    """
    torchrl_logger.setLevel(logging.WARNING)
    try:
        with mistakes():
            check_output("output", options.output)
            return _reproduce(name, options, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        print("\nInterrupted; the runs are saved. The same command continues them.")
        return 130


def render(checkpoint: Path, output: Path, seed: int, steps: int | None) -> int:
    """Film an episode of a trained agent and print where the film went.

    Raises:
        UserError: if there is no checkpoint, or the film cannot be written.
    """
    render_headless()
    with mistakes():
        check_film_name(output)
        if steps is not None:
            check_integer("steps", steps)
        check_output("output", output)
        file = find_checkpoint(checkpoint)
        settings = checkpoint_metadata(file)["settings"]
        try:
            env = _env(settings, render_mode="rgb_array")
        except ValueError as error:
            raise ValueError(f"{settings['task']} cannot be filmed: {error}") from error
        policy = load_policy(file)
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


def _env(settings: Mapping[str, Any], **gym_kwargs: Any) -> TransformedEnv:
    return make_env(
        settings["task"],
        action_bounds=settings["action_bounds"],
        dynamics_noise=settings.get("dynamics_noise", 0.0),
        **gym_kwargs,
    )
