"""Time of a draw of windows and transitions against RandomSampler's of as many rows.

Both buffers share one storage, filled with HalfCheetah-sized rows. One row is written
before every pair of draws, the two draws alternate, and their order is swapped each
time; what a sampler does about that row counts as part of its draw. Each line gives
medians in milliseconds and, as the result, the ratio of the medians:

    python benchmarks/replay.py
    python benchmarks/replay.py --sizes 10000 100000 --repeats 1000
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable

import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter

from alm_torchrl.replay import make_replay_buffer

BATCH_SIZE, HORIZON = 512, 3
OBSERVATION, ACTION = 17, 6
CHUNK = 50_000


def make_rows(done: torch.Tensor, traj_ids: torch.Tensor) -> TensorDict:
    """Random transitions [N] with the given episode ends [N] and ids [N]."""
    rows = len(done)
    done = done.unsqueeze(-1)
    no = torch.zeros_like(done)
    return TensorDict(
        {
            "observation": torch.randn(rows, OBSERVATION),
            "action": torch.randn(rows, ACTION),
            "done": no,
            "terminated": no,
            "truncated": no,
            "collector": {"traj_ids": traj_ids},
            "next": {
                "observation": torch.randn(rows, OBSERVATION),
                "reward": torch.randn(rows, 1),
                "done": done,
                "terminated": no,
                "truncated": done,
            },
        },
        batch_size=[rows],
    )


def episodes(rows: int, length: int) -> TensorDict:
    """Rows of episodes of one length."""
    step = torch.arange(rows)
    return make_rows(step % length == length - 1, step // length)


def one_step_episodes(rows: int) -> TensorDict:
    """One-step episodes around a single longer one, in the middle."""
    step = torch.arange(rows)
    middle = (step - rows // 2).abs() <= HORIZON
    return make_rows(~middle, torch.where(middle, -1, step))


def measure(contents: TensorDict, repeats: int) -> dict[str, float]:
    """Medians in ms of a one-row write and both draws, and the ratio of the draws."""
    capacity = len(contents)
    windows = make_replay_buffer(capacity, batch_size=BATCH_SIZE, horizon=HORIZON)
    for chunk in contents.split(CHUNK):
        windows.extend(chunk.clone())
    rows = TensorDictReplayBuffer(
        storage=windows.storage,
        sampler=RandomSampler(),
        writer=ImmutableDatasetWriter(),
        batch_size=BATCH_SIZE * (HORIZON + 1),
    )
    times: dict[str, list[float]] = {"write": [], "windows": [], "rows": []}

    def timed(name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        times[name].append(1e3 * (time.perf_counter() - start))

    for repeat in range(repeats):
        # Rewrites the ring in place: the contents stay what they were.
        row = contents[repeat % capacity : repeat % capacity + 1].clone()
        timed("write", lambda row=row: windows.extend(row))
        draws = [("windows", windows.sample), ("rows", rows.sample)]
        for name, call in draws if repeat % 2 else reversed(draws):
            timed(name, call)
    warm = repeats // 10
    result = {name: statistics.median(values[warm:]) for name, values in times.items()}
    result["ratio"] = result["windows"] / result["rows"]
    return result


def main() -> None:
    """Prints one line per size, and one for the one-step episodes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000]
    )
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    cases: list[tuple[str, Callable[[], TensorDict]]] = [
        (f"{size} rows, episodes of 1000", lambda size=size: episodes(size, 1000))
        for size in args.sizes
    ]
    cases.append(
        (
            "100000 one-step episodes around 5 windows",
            lambda: one_step_episodes(100_000),
        )
    )
    print(f"{'ms':45}{'write':>9}{'windows':>9}{'rows':>9}{'ratio':>7}")
    for name, make in cases:
        result = measure(make(), args.repeats)
        print(
            f"{name:45}{result['write']:9.3f}{result['windows']:9.3f}"
            f"{result['rows']:9.3f}{result['ratio']:7.2f}"
        )


if __name__ == "__main__":
    main()
