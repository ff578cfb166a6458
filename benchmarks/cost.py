"""What a return costs: ``python -m benchmarks.cost --help``.

Trains one agent with its own settings, and evaluates it while the clock stands still.
The clock counts the processor time of all threads and child processes, so that what an
agent compiles is part of it. A file collects runs; their table is printed.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
import tyro
from tensordict import TensorDictBase
from torchrl import torchrl_logger

from alm_torchrl import evaluate_policy, make_env, make_trainer
from alm_torchrl.runs.agents import build_loss, describe_spaces
from alm_torchrl.runs.settings import preset_config

Agent = Literal["quick", "plus", "sac", "td3", "crossq"]
FIELDS = ("agent", "task", "seed", "environment_step", "core_seconds", "mean_return")
LEVELS = (2000.0, 5000.0)


@dataclass(frozen=True)
class Options:
    """Measure core-seconds until an agent's return is reached.

    quick and plus are presets of this library; sac and td3 are Stable-Baselines3's,
    crossq is SBX's (pip install sbx-rl), with the defaults of their classes.
    """

    agent: tyro.conf.Positional[Agent]
    """What to train."""
    output: Path
    """CSV to which the evaluations are added."""
    task: str = "HalfCheetah-v4"
    """Gymnasium task."""
    seed: int = 100
    """Seed of networks, environment and evaluations."""
    steps: int = 100_000
    """Environment steps; the run ends before, once the highest level is reached."""
    interval: int = 2500
    """Environment steps between evaluations."""
    episodes: int = 3
    """Episodes of an evaluation, without noise."""


class Reached(Exception):
    """Ends a run that has nothing left to show."""


class Meter:
    """Evaluates every so many steps, and notes what the steps between have cost."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.rows: list[dict[str, Any]] = []
        self._spent = 0.0
        self._began = _core_seconds()

    def note(self, step: int, evaluate: Callable[[], float]) -> None:
        """Adds a row.

        Raises:
            Reached: if the return is the highest level.
        """
        self._spent += _core_seconds() - self._began
        row = {name: getattr(self.options, name) for name in ("agent", "task", "seed")}
        row |= {"environment_step": step, "core_seconds": round(self._spent, 2)}
        self.rows.append(row | {"mean_return": round(evaluate(), 2)})
        print(*self.rows[-1].values(), flush=True)
        if self.rows[-1]["mean_return"] >= max(LEVELS):
            raise Reached
        self._began = _core_seconds()


def _core_seconds() -> float:
    return sum(os.times()[:4])


def train_ours(options: Options, meter: Meter) -> None:
    """Trains a preset of this library."""
    config = preset_config(options.agent, task=options.task, seed=options.seed)
    env, eval_env = make_env(options.task, seed=options.seed), make_env(options.task)
    torch.manual_seed(options.seed)
    loss = build_loss(config.to_dict(), describe_spaces(eval_env))
    arguments = config.arguments_of(make_trainer)
    arguments |= {"total_steps": options.steps - config.warmup_steps, "logger": None}
    with TemporaryDirectory() as folder:
        trainer = make_trainer(
            env,
            loss,
            **arguments | {"compile": True},
            checkpoint_dir=folder,
            progress_bar=False,
        )
        policy = loss.acting_policy()

        def evaluate() -> float:
            scores: TensorDictBase = evaluate_policy(
                eval_env, policy, episodes=options.episodes, seed=options.seed
            )
            return float(scores["return"].mean())

        def look() -> None:
            step = trainer.collected_frames
            if step % options.interval == 0:
                meter.note(step, evaluate)

        trainer.register_op("post_steps", look)
        trainer.train()


def train_theirs(options: Options, meter: Meter) -> None:
    """Trains an agent of Stable-Baselines3 or SBX."""
    from stable_baselines3 import SAC, TD3
    from stable_baselines3.common.evaluation import evaluate_policy as evaluation

    if options.agent == "crossq":
        from sbx import CrossQ as kind
    else:
        kind = {"sac": SAC, "td3": TD3}[options.agent]
    model = kind("MlpPolicy", gymnasium.make(options.task), seed=options.seed)
    eval_env = gymnasium.make(options.task)
    eval_env.reset(seed=options.seed)

    def evaluate() -> float:
        returns = evaluation(model, eval_env, options.episodes, warn=False)[0]
        return float(returns)

    for step in range(options.interval, options.steps + 1, options.interval):
        model.learn(options.interval, reset_num_timesteps=False)
        meter.note(step, evaluate)


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each run: milliseconds per step, and the price of each level."""
    runs: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        key = (str(row["agent"]), str(row["task"]), str(row["seed"]))
        runs.setdefault(key, []).append(row)
    head = "".join(f" {f'{level:,.0f}: core-s (steps)':>24}" for level in LEVELS)
    lines = [f"{'agent':8} {'task':16} {'seed':>5} {'core-ms/step':>12}{head}"]
    for (agent, task, seed), found in sorted(runs.items()):
        step, cost, returns = (
            np.array([float(row[name]) for row in found])
            for name in ("environment_step", "core_seconds", "mean_return")
        )
        line = f"{agent:8} {task:16} {seed:>5} {1000 * cost[-1] / step[-1]:12.1f}"
        for level in LEVELS:
            above = np.flatnonzero(returns >= level)
            cell = f"not by {step[-1]:,.0f}"
            if len(above):
                cell = f"{cost[above[0]]:,.0f} ({step[above[0]]:,.0f})"
            line += f" {cell:>24}"
        lines.append(line)
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    """Runs the benchmark."""
    options = tyro.cli(Options, args=args)
    torch.set_num_threads(1)
    torchrl_logger.setLevel(logging.WARNING)
    before: list[dict[str, Any]] = []
    if options.output.exists():
        with options.output.open(newline="", encoding="utf-8") as file:
            before = list(csv.DictReader(file))
    meter = Meter(options)
    run = train_ours if options.agent in ("quick", "plus") else train_theirs
    with suppress(Reached):
        run(options, meter)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(before + meter.rows)
    print(table(before + meter.rows))


if __name__ == "__main__":
    main()
