"""Replay of environments that write in turns: no window mixes two of them."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import multiprocessing
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from alm_torchrl.replay import UniformWindowSampler, make_replay_buffer
from tests.helpers import make_batch, make_loss
from tests.test_replay import assert_uniform, starts

# Of each environment, the lengths of its episodes; a negative one breaks off.
STREAMS = st.lists(
    st.lists(st.integers(-6, 7).filter(bool), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)


def make_stream(number, lengths, first_id, renew=True):
    """Rows whose observation says the environment, its episode and the step.

    Without ``renew`` an episode that ends leaves its id to the next one.
    """
    rows, number_of_ids = [], 0
    for episode, length in enumerate(lengths):
        steps = abs(length)
        done = torch.zeros(steps, 1, dtype=torch.bool)
        done[-1] = length > 0
        observation = torch.tensor([[number, episode, t] for t in range(steps)]).float()
        collector = {"traj_ids": torch.full((steps,), first_id + number_of_ids)}
        number_of_ids += renew or length < 0
        rows.append(
            TensorDict(
                {
                    "observation": observation,
                    "next": {"done": done},
                    "collector": collector,
                },
                [steps],
            )
        )
    return torch.cat(rows)


def make_streams(streams, renew=True):
    return [
        make_stream(e, lengths, 100 * e, renew) for e, lengths in enumerate(streams)
    ]


def interleave(streams, turns):
    """The rows of all in one order of time, where ``turns`` say whose turn it is."""
    left = [list(stream.unbind(0)) for stream in streams]
    turns, rows = itertools.cycle(turns), []
    while any(left):
        waiting = [rows for rows in left if rows]
        rows.append(waiting[next(turns) % len(waiting)].pop(0))
    return torch.stack(rows)


def follower(data, row, count):
    """The rows after ``row`` in its episode, ``row`` included, at most ``count``."""
    found = [row]
    for later in range(row + 1, len(data)):
        if len(found) == count or data["next", "done"][found[-1]]:
            break
        if data["collector", "traj_ids"][later] == data["collector", "traj_ids"][row]:
            found.append(later)
    return found


def brute_force(data, capacity, horizon):
    """Positions of the rows that start a window, the oldest first."""
    oldest = max(0, len(data) - capacity)
    return [
        row % capacity
        for row in range(oldest, len(data))
        if len(follower(data, row, horizon)) == horizon
    ]


def wrong(observation):
    """How many slices [B, K, 3] are not consecutive steps of one episode."""
    same = (observation[..., :2] == observation[:, :1, :2]).all(-1).all(-1)
    steps = (observation[..., 2].diff(dim=1) == 1).all(-1)
    return int((~(same & steps)).sum())


@settings(deadline=None, max_examples=60)
@given(
    streams=STREAMS,
    turns=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    horizon=st.integers(1, 5),
    spare=st.integers(0, 12),
    n_step=st.integers(1, 4),
    short=st.booleans(),
    renew=st.booleans(),
    chunks=st.lists(st.tuples(st.integers(1, 17), st.booleans()), min_size=1),
)
def test_windows_of_interleaved_streams_match_brute_force(
    streams, turns, horizon, spare, n_step, short, renew, chunks
):
    data = interleave(make_streams(streams, renew), turns)
    capacity = horizon + spare
    options = {"horizon": horizon, "n_step": n_step, "short_slices": short}
    buffer, loaded = (
        make_replay_buffer(
            capacity, batch_size=8, generator=torch.Generator(), **options
        )
        for _ in range(2)
    )
    written, sizes = 0, itertools.cycle(chunks)
    while written < len(data):
        size, look = next(sizes)
        chunk = data[written : written + min(size, capacity)].clone()
        written += len(chunk)
        buffer.add(chunk[0]) if len(chunk) == 1 else buffer.extend(chunk)
        if not look and written < len(data):
            continue  # several writes between two draws
        known = data[:written]
        expected = brute_force(known, capacity, horizon)
        assert starts(buffer) == expected
        if not expected and not short:
            assert not buffer.can_sample()
            continue
        loaded.load_state_dict(buffer.state_dict())
        batch, index = buffer.sample(return_info=True)
        # Links that were followed are those that are built anew.
        assert (loaded.sample() == batch).all()
        oldest = max(0, written - capacity)
        number = {row % capacity: row for row in range(oldest, written)}
        parts = index["index"].split([horizon, n_step], dim=1)
        for part, steps in zip(parts, (horizon, n_step), strict=True):
            for read in part.tolist():
                rows = follower(known, number[read[0]], steps)
                rows += rows[-1:] * (steps - len(rows))
                assert [number[position] for position in read] == rows
        if not short:
            assert wrong(batch["slice", "observation"]) == 0


def test_windows_of_interleaved_streams_are_uniform():
    # Streams of other speeds, one that stops and one that begins, in a wrapped ring.
    streams = [[3, 5, -4, 30], [9, 1, 2, 7] * 3, [-20], [1, 1, 6]]
    turns = [0, 1, 1, 3, 1, 2, 0, 0, 3, 2, 1]
    data = interleave(make_streams(streams), turns)
    for horizon in (1, 2, 4):
        expected = brute_force(data, 60, horizon)
        draws = 40_000
        buffer = make_replay_buffer(
            60,
            horizon=horizon,
            batch_size=draws,
            generator=torch.Generator().manual_seed(horizon),
        )
        for chunk in data.split(7):
            buffer.extend(chunk.clone())
            buffer.can_sample()
        batch = buffer.sample()
        counts = batch["slice", "index"][:, 0].bincount()
        assert set(counts.nonzero().flatten().tolist()) == set(expected)
        assert_uniform(counts[counts > 0].tolist(), len(expected), draws)
        assert_uniform(batch["transition", "index"].bincount().tolist(), 60, draws)
        assert wrong(batch["slice", "observation"]) == 0


@pytest.mark.slow
def test_no_wrong_slice_in_a_million():
    generator = np.random.default_rng(0)
    drawn = 0
    while drawn < 1_000_000:
        count = int(generator.integers(1, 9))
        streams = [
            generator.choice([-1, 1], 30) * generator.integers(1, 40, 30)
            for _ in range(count)
        ]
        turns = generator.integers(0, count, 97).tolist()
        data = interleave(make_streams([s.tolist() for s in streams]), turns)
        horizon, capacity = (
            int(generator.integers(*ends)) for ends in ((1, 7), (20, 400))
        )
        buffer = make_replay_buffer(capacity, horizon=horizon, batch_size=500)
        for chunk in data.split(int(generator.integers(1, 20))):
            buffer.extend(chunk.clone())
            if buffer.can_sample():
                assert wrong(buffer.sample()["slice", "observation"]) == 0
                drawn += 500


def test_steps_of_a_batched_collector_are_stored_in_the_order_of_time():
    streams = make_streams([[4, 6], [10], [7, 3]])
    rows = torch.stack(streams)
    buffer = make_replay_buffer(40, horizon=3, batch_size=64)
    for steps in rows.split(4, dim=1):
        buffer.extend(steps)
    assert ("index",) not in rows.keys(True)
    assert buffer[:]["observation"][:6].tolist() == [
        *([0, 0, 0], [1, 0, 0], [2, 0, 0]),
        *([0, 0, 1], [1, 0, 1], [2, 0, 1]),
    ]
    assert len(starts(buffer)) == (2 + 4) + 8 + (5 + 1)
    assert wrong(buffer.sample()["slice", "observation"]) == 0
    one_by_one = make_replay_buffer(40, horizon=3)
    for steps in rows.unbind(1):
        one_by_one.extend(steps.clone())  # [N]: a step of each environment
    assert starts(one_by_one) == starts(buffer)


@pytest.mark.parametrize("ids", [None, "shared"])
def test_environments_that_nothing_tells_apart_are_refused(ids):
    rows = torch.stack(make_streams([[4], [4]]))
    if ids is None:
        rows = rows.exclude(("collector", "traj_ids"))
    else:
        rows["collector", "traj_ids"][1, 2:] = 0
    buffer = make_replay_buffer(40, horizon=3)
    with pytest.raises(ValueError, match="in each of the 2 environments, got"):
        buffer.extend(rows)
    assert len(buffer) == 0
    buffer.extend(rows[:1])  # one environment
    assert len(buffer) == 4


def write_stream(buffer, number, go):
    """What a process of its own writes."""
    stream = make_stream(number, [7, 5, 9] * 10, 1000 * number)
    go.wait()
    for rows in stream.split(1 + number):
        buffer.extend(rows)


def test_two_processes_write_while_a_third_draws():
    processes = multiprocessing.get_context("spawn")
    buffer = make_replay_buffer(200, horizon=3, batch_size=64)
    buffer.extend(make_stream(0, [5], 0))
    buffer.share()
    go = processes.Event()
    writers = [
        processes.Process(target=write_stream, args=(buffer, number, go))
        for number in (1, 2)
    ]
    for writer in writers:
        writer.start()
    go.set()
    while any(writer.is_alive() for writer in writers):
        assert wrong(buffer.sample()["slice", "observation"]) == 0
        writers[0].join(0.01)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert buffer.write_count == 5 + 2 * 210
    assert wrong(buffer.sample(2000)["slice", "observation"]) == 0
    fresh = make_replay_buffer(200, horizon=3, batch_size=64)
    fresh.load_state_dict(buffer.state_dict())
    assert starts(fresh) == starts(buffer)
    # All windows of the newest 200 rows, from the rows alone.
    found = Counter()
    stored = buffer[:]["observation"].int().tolist()
    for number, episode, step in stored:
        window = [[number, episode, step + k] for k in range(3)]
        found[number] += all(row in stored for row in window)
    assert len(starts(buffer)) == found.total()


def test_the_loss_refuses_windows_and_single_rows_in_one():
    rows = make_batch(batch=10, horizon=1)["slice"].squeeze(1)
    rows["next", "done"] = rows["next", "terminated"]
    buffer = make_replay_buffer(10, horizon=2, batch_size=4)
    buffer.extend(rows)
    loss = make_loss()
    assert loss.model_loss(buffer.sample())[0].isfinite().all()
    plain = TensorDictReplayBuffer(
        storage=buffer.storage, sampler=buffer.sampler, batch_size=4
    )
    for term in (loss, loss.model_loss, loss.qvalue_loss):
        with pytest.raises(ValueError, match="windows and single rows in one"):
            term(plain.sample())
    own = TensorDictReplayBuffer(
        storage=LazyTensorStorage(10), sampler=UniformWindowSampler(2), batch_size=4
    )
    own.extend(rows)
    assert loss.model_loss(own.sample())[0].isfinite().all()
