"""Resident memory of a training run, which should not grow with its length.

Trains tiny networks on Pendulum-v1 with evaluations, checkpoints and logging, and a
replay that is full before the first update. Prints the resident memory (Linux only) at
equal intervals, and its growth. The exit status is 1 where that reaches the limit:

    python -m benchmarks.memory --updates 6000
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from pathlib import Path

import torch
from torchrl import torchrl_logger
from torchrl.record.loggers.csv import CSVLogger

from alm_torchrl import make_alm_loss, make_env, make_trainer

CAPACITY = 1000


def measure(updates: int, readings: int, folder: str) -> list[float]:
    """Trains, and reads the memory at equal intervals, in 10^6 bytes."""
    torch.manual_seed(0)
    env, eval_env = (make_env("Pendulum-v1", action_bounds="rescale") for _ in "ab")
    interval = updates // readings
    trainer = make_trainer(
        env,
        make_alm_loss(env, latent_dim=4, hidden_dim=16, model_hidden_dim=16),
        total_steps=updates,
        warmup_steps=CAPACITY,
        capacity=CAPACITY,
        batch_size=8,
        eval_env=eval_env,
        eval_interval=max(interval // 2, 1),
        eval_episodes=1,
        logger=CSVLogger("memory", log_dir=folder),
        checkpoint_dir=Path(folder) / "checkpoints",
        checkpoint_interval=max(interval // 2, 1),
    )
    megabytes: list[float] = []

    def read() -> None:
        count = trainer.optimization_stepper.optimizer_step_count
        if count and count % interval == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
            print(f"{count:8,} updates  {megabytes[-1]:8.2f} MB", flush=True)

    trainer.register_op("post_steps", read)
    trainer.train()
    return megabytes


def main() -> int:
    """Prints the readings and their growth."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--updates", type=int, default=50_000)
    parser.add_argument("--readings", type=int, default=5)
    parser.add_argument("--limit", type=float, default=10.0, help="in 10^6 bytes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torchrl_logger.setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        megabytes = measure(args.updates, args.readings, folder)
    growth = megabytes[-1] - megabytes[0]
    print(f"growth {growth:.2f} MB (limit {args.limit:g} MB)")
    return int(growth >= args.limit)


if __name__ == "__main__":
    raise SystemExit(main())
