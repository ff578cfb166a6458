"""Time and size of checkpoints, by task and by what the replay holds.

Each line gives the time of the first save, which writes every row; of the next one,
5,000 steps later, which is what training waits for; of loading in a fresh trainer; and
what the two saves take on the disk. The networks have the paper's sizes:

    python -m benchmarks.checkpoint
    python -m benchmarks.checkpoint --tasks Humanoid-v5 --steps 10000
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torchrl import torchrl_logger

from alm_torchrl import ALMTrainer, make_env, make_trainer
from alm_torchrl.runs.settings import preset_config
from benchmarks.problem import Problem

INTERVAL = 5000


def build(problem: Problem, capacity: int, folder: Path) -> ALMTrainer:
    """A trainer of the paper's size."""
    return make_trainer(
        make_env(problem.config.task),
        problem.make_loss(),
        total_steps=10,
        capacity=capacity,
        checkpoint_dir=folder,
    )


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def size(folder: Path, seen: set[int]) -> float:
    """Megabytes of the files whose inodes are not in ``seen``; adds them."""
    total = 0
    for path in folder.rglob("*"):
        stat = path.stat()
        if path.is_file() and stat.st_ino not in seen:
            seen.add(stat.st_ino)
            total += stat.st_size
    return total / 1e6


def measure(problem: Problem, steps: int, folder: Path) -> None:
    """Prints one line of the table."""
    trainer = build(problem, steps, folder)
    trainer.replay_buffer.extend(problem.make_rows(steps))
    # One update, so that the optimizers have their moments.
    trainer.optimization_stepper.step(None, trainer.replay_buffer.sample())
    rotation, checkpoint = trainer.checkpoint_rotation, trainer.checkpoint
    times = [timed(lambda: rotation.save(checkpoint, step=1))]
    trainer.replay_buffer.extend(problem.make_rows(INTERVAL))
    times.append(timed(lambda: rotation.save(checkpoint, step=2)))
    older, newest = rotation.checkpoints()
    seen: set[int] = set()
    sizes = [size(older, seen), size(newest, seen)]
    fresh = build(problem, steps, folder)
    times.append(timed(lambda: fresh.load_from_file(newest)))
    cells = [f"{x:9.2f} s" for x in times] + [f"{x:9.1f} MB" for x in sizes]
    print(f"{problem.config.task:14} {steps:9,} {' '.join(cells)}", flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["HalfCheetah-v5", "Humanoid-v5"])
    steps = [10_000, 100_000, 1_000_000]
    parser.add_argument("--steps", nargs="+", type=int, default=steps)
    parser.add_argument("--folder", help="on the disk to measure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torchrl_logger.setLevel(logging.WARNING)
    print(
        f"{'task':14} {'stored':>9} {'first save':>11} {'next save':>11} {'load':>11} "
        f"{'first size':>12} {'next adds':>12}"
    )
    for task in args.tasks:
        problem = Problem(preset_config("paper", task=task))
        for steps in args.steps:
            with TemporaryDirectory(dir=args.folder) as folder:
                measure(problem, steps, Path(folder))


if __name__ == "__main__":
    main()
