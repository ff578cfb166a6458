"""Time of our draw of slices and transitions, next to RandomSampler's of as many rows.

Before each draw a row is written, and what a sampler does about it counts. Rows are as
large as HalfCheetah's. ``speed`` below is TorchRL's time over ours:

    python -m benchmarks.replay
    python -m benchmarks.replay --sizes 10000 100000 --repeats 50
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable

import torch
from tensordict import TensorDict
from torchrl import torchrl_logger
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler

from alm_torchrl.replay import make_replay_buffer
from alm_torchrl.runs.settings import preset_config
from benchmarks.problem import Problem
from benchmarks.timing import Contender, interleave


def one_step_episodes(rows: TensorDict, horizon: int) -> TensorDict:
    """The rows as episodes of one step, around a single longer one in the middle."""
    step = torch.arange(len(rows))
    middle = (step - len(rows) // 2).abs() <= horizon
    rows["next", "done"] = ~middle.unsqueeze(-1)
    rows["collector", "traj_ids"] = torch.where(middle, -1, step)
    return rows


def write_and_draw(buffer: ReplayBuffer, rows: TensorDict) -> Callable[[], object]:
    """Fills a buffer. The call rewrites a row with what it was, and draws."""
    buffer.extend(rows.clone())
    written = 0

    def call() -> None:
        nonlocal written
        buffer.extend(rows[written : written + 1].clone())
        written = (written + 1) % len(rows)
        buffer.sample()

    return call


def main() -> None:
    """Prints a line for each size, and one for one-step episodes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    sizes = [10_000, 100_000, 1_000_000]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torchrl_logger.setLevel(logging.WARNING)
    problem = Problem(preset_config("paper", task="HalfCheetah-v5"))
    batch_size, horizon = problem.config.batch_size, problem.config.horizon
    cases = [(f"{size} rows", problem.make_rows(size)) for size in args.sizes]
    single = one_step_episodes(problem.make_rows(100_000), horizon)
    cases.append(("100000 rows, one-step episodes", single))
    print(f"{'ms per write and draw':32}{'ours':>9}{'TorchRL':>9}{'speed':>7}")
    for name, rows in cases:
        ours = make_replay_buffer(len(rows), batch_size=batch_size, horizon=horizon)
        theirs = TensorDictReplayBuffer(
            storage=LazyTensorStorage(len(rows)),
            sampler=RandomSampler(),
            batch_size=batch_size * (horizon + 1),
        )
        calls = [write_and_draw(buffer, rows) for buffer in (ours, theirs)]
        contenders = [Contender(name, call) for call in calls]
        timings = interleave(contenders, args.repeats, time.perf_counter)
        a, b = (1e3 * timing["median"] for timing in timings)
        print(f"{name:32}{a:9.3f}{b:9.3f}{b / a:7.2f}", flush=True)


if __name__ == "__main__":
    main()
