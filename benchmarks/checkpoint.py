"""Time and size of checkpoints, by task and by what the replay holds.

For each task and number of stored steps it prints the time of the first save, which
writes every row; of the next one, 5,000 steps later, which is what training waits for
at each checkpoint; of loading in a fresh trainer; and the sizes on disk. The networks
have the paper's sizes. The rows are random numbers, since only their size matters:

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --tasks Humanoid-v5 --steps 10000
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from tensordict import TensorDict

from alm_torchrl import ALMTrainer, make_alm_loss, make_env, make_trainer

INTERVAL = 5000


def build(task: str, capacity: int, folder: Path) -> ALMTrainer:
    """A trainer of the paper's size."""
    with warnings.catch_warnings():
        # About actions beyond +-1.
        warnings.simplefilter("ignore", UserWarning)
        env = make_env(task)
    return make_trainer(
        env,
        make_alm_loss(env),
        total_steps=10,
        capacity=capacity,
        checkpoint_dir=folder,
    )


def fill(trainer: ALMTrainer, steps: int) -> None:
    """Stores random steps in episodes of 1,000."""
    env = trainer.collector.env
    observation_dim = env.observation_spec["observation"].shape[-1]
    action_dim = env.action_spec.shape[-1]
    while steps > 0:
        count = min(steps, 10_000)
        ends = (torch.arange(count) % 1000 == 999).unsqueeze(-1)
        rows = TensorDict(
            {
                "observation": torch.randn(count, observation_dim),
                "action": torch.randn(count, action_dim),
                "next": {
                    "observation": torch.randn(count, observation_dim),
                    "reward": torch.randn(count, 1),
                    "terminated": torch.zeros_like(ends),
                    "done": ends,
                },
                "collector": {"traj_ids": torch.arange(count) // 1000},
            },
            batch_size=[count],
        )
        trainer.replay_buffer.extend(rows)
        steps -= count


def timed(function: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def size(folder: Path, seen: set[int]) -> int:
    """Bytes of the files in a folder whose inodes are not in ``seen``; adds them."""
    total = 0
    for path in folder.rglob("*"):
        stat = path.stat()
        if path.is_file() and stat.st_ino not in seen:
            seen.add(stat.st_ino)
            total += stat.st_size
    return total


def measure(task: str, steps: int, folder: Path) -> None:
    """Prints one line of the table."""
    trainer = build(task, steps, folder)
    # One update, so that the optimizers have their moments.
    fill(trainer, steps)
    trainer.optimization_stepper.step(None, trainer.replay_buffer.sample())
    rotation, checkpoint = trainer.checkpoint_rotation, trainer.checkpoint
    first = timed(lambda: rotation.save(checkpoint, step=1))
    fill(trainer, INTERVAL)
    second = timed(lambda: rotation.save(checkpoint, step=2))
    older, newest = rotation.checkpoints()
    inodes: set[int] = set()
    sizes = [size(older, inodes) / 1e6, size(newest, inodes) / 1e6]
    fresh = build(task, steps, folder)
    load = timed(lambda: fresh.load_from_file(newest))
    print(
        f"{task:14} {steps:9,} {first:9.2f} s {second:9.2f} s {load:9.2f} s "
        f"{sizes[0]:9.1f} MB {sizes[1]:9.1f} MB"
    )
    sys.stdout.flush()


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["HalfCheetah-v5", "Humanoid-v5"])
    parser.add_argument(
        "--steps", nargs="+", type=int, default=[10_000, 100_000, 1_000_000]
    )
    parser.add_argument("--folder", help="on the disk to measure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{'task':14} {'stored':>9} {'first save':>11} {'next save':>11} {'load':>11} "
        f"{'first size':>12} {'next adds':>12}"
    )
    for task in args.tasks:
        for steps in args.steps:
            folder = Path(tempfile.mkdtemp(dir=args.folder))
            try:
                measure(task, steps, folder)
            finally:
                shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
