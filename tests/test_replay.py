"""The replay buffer: which windows are drawn, how often, and after which writes."""

from __future__ import annotations

import math
from itertools import cycle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint
from torchrl.data import (
    LazyTensorStorage,
    ListStorage,
    TensorDictReplayBuffer,
    TensorStorage,
)
from torchrl.data.replay_buffers.writers import ImmutableDatasetWriter

from alm_torchrl import windows
from alm_torchrl.replay import UniformWindowSampler, make_replay_buffer

TERMINATED, TRUNCATED, CUT = "terminated", "truncated", "cut"


def make_rows(episodes, first=0, first_id=0, with_ids=True):
    """Rows of (length, how it ended) episodes; the observation counts the rows."""
    lengths = torch.tensor([length for length, _ in episodes])
    rows = int(lengths.sum())
    ends = {end: torch.zeros(rows, 1, dtype=torch.bool) for end in ("done", TERMINATED)}
    ends[TRUNCATED] = ends[TERMINATED].clone()
    for row, (_, end) in zip(lengths.cumsum(0) - 1, episodes, strict=True):
        if end != CUT:
            ends[end][row] = ends["done"][row] = True
    count = torch.arange(first, first + rows, dtype=torch.float32).unsqueeze(-1)
    data = TensorDict({"observation": count, "next": ends}, batch_size=[rows])
    if with_ids:
        ids = torch.arange(first_id, first_id + len(lengths))
        data["collector", "traj_ids"] = ids.repeat_interleave(lengths)
    return data


def filled(episodes, capacity=None, **kwargs):
    """A buffer with the given episodes, written at once as far as they fit."""
    data = make_rows(episodes)
    buffer = make_replay_buffer(capacity or len(data), **kwargs)
    for chunk in data.split(buffer.storage.max_size):
        buffer.extend(chunk)
    return buffer


def starts(buffer):
    """Positions where the sampler would start a window, oldest first."""
    windows = buffer.sampler._settled(buffer.storage)
    return windows.starts(np.arange(windows.count)).tolist()


def brute_force_starts(data, capacity, horizon):
    """The same from all rows ever written."""
    done = data["next", "done"].flatten().tolist()
    ids = data.get(("collector", "traj_ids"), torch.zeros(len(data))).tolist()
    found = []
    for row in range(max(0, len(data) - capacity), len(data) - horizon + 1):
        window = slice(row, row + horizon)
        if len(set(ids[window])) == 1 and not any(done[window][:-1]):
            found.append(row % capacity)
    return found


def test_brute_force_itself():
    episodes = [(2, TERMINATED), (2, CUT), (2, CUT)]
    for capacity, horizon, expected in ((10, 2, [0, 2, 4]), (4, 2, [2, 0])):
        assert brute_force_starts(make_rows(episodes), capacity, horizon) == expected
    assert brute_force_starts(make_rows(episodes), 10, 1) == list(range(6))


def assert_windows(batch, horizon):
    slices = batch["slice"]
    assert slices.batch_size == (len(batch), horizon)
    assert batch["transition"].batch_size == (len(batch),)
    assert (slices["observation"].diff(dim=1) == 1).all()
    assert not slices["next", "done"][:, :-1].any()
    ids = slices.get(("collector", "traj_ids"), None)
    if ids is not None:
        assert (ids == ids[:, :1]).all()


def assert_uniform(counts, expected_outcomes, draws):
    """Chi-square with a bound five standard deviations above its mean."""
    assert len(counts) == expected_outcomes
    expected = draws / expected_outcomes
    statistic = sum((count - expected) ** 2 / expected for count in counts)
    freedom = expected_outcomes - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), statistic


@settings(deadline=None, max_examples=60)
@given(
    episodes=st.lists(
        st.tuples(st.integers(1, 7), st.sampled_from([TERMINATED, TRUNCATED, CUT])),
        min_size=1,
        max_size=14,
    ),
    horizon=st.integers(1, 5),
    spare=st.integers(0, 12),
    chunks=st.lists(
        st.tuples(st.integers(1, 17), st.booleans()), min_size=1, max_size=5
    ),
    with_ids=st.booleans(),
)
def test_valid_starts_match_brute_force(episodes, horizon, spare, chunks, with_ids):
    capacity = horizon + spare
    buffer = make_replay_buffer(capacity, horizon=horizon, batch_size=16)
    data, written = make_rows(episodes, with_ids=with_ids), 0
    chunk_sizes = cycle(chunks)
    while written < len(data):
        size, look = next(chunk_sizes)
        chunk = data[written : written + min(size, capacity)]
        written += len(chunk)
        if len(chunk) == 1:
            buffer.add(chunk[0])
        else:
            buffer.extend(chunk)
        if not look and written < len(data):
            continue  # several writes between two draws
        expected = brute_force_starts(data[:written], capacity, horizon)
        assert starts(buffer) == expected
        assert buffer.can_sample() == bool(expected)
        if expected:
            assert_windows(buffer.sample(), horizon)
    assert len(buffer) == min(capacity, len(data))


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_windows_and_transitions_are_uniform(horizon):
    # Short, long and unfinished episodes, and a ring that was wrapped twice.
    lengths = [2, 17, 1, 1, 9, 3, 24, 4, 2]
    episodes = [(n, TRUNCATED if n % 2 else TERMINATED) for n in lengths] + [(2, CUT)]
    options = {
        "horizon": horizon,
        "batch_size": 20_000,
        "generator": torch.Generator().manual_seed(horizon),
    }
    batch = filled(episodes, 30, **options).sample()
    valid = len(brute_force_starts(make_rows(episodes), 30, horizon))
    counts = batch["slice", "index"][:, 0].bincount()
    assert_uniform(counts[counts > 0].tolist(), valid, len(batch))
    assert_uniform(batch["transition", "index"].bincount().tolist(), 30, len(batch))
    # The two draws are independent.
    batch = filled([(5, CUT)], **options).sample()
    pairs = batch["slice", "index"][:, 0] * 5 + batch["transition", "index"]
    count = (6 - horizon) * 5
    assert_uniform(pairs.bincount(minlength=count).tolist(), count, len(batch))


@pytest.mark.parametrize("end", [TERMINATED, TRUNCATED])
def test_last_transition_of_every_episode_is_drawn(end):
    episodes = [(4, end), (2, end), (1, end), (3, end)]
    batch = filled(episodes, horizon=3, batch_size=2000).sample()
    assert_windows(batch, 3)
    last_of_slices = batch["slice"][:, -1]["observation"]
    assert set(last_of_slices.flatten().tolist()) == {2.0, 3.0, 9.0}
    ended = batch["transition"][batch["transition"]["next", end].squeeze(-1)]
    assert set(ended["observation"].flatten().tolist()) == {3.0, 5.0, 6.0, 9.0}


def test_no_window_crosses_a_resume_that_starts_a_fresh_episode():
    buffer, resumed = (make_replay_buffer(20, horizon=3) for _ in range(2))
    buffer.extend(make_rows([(5, CUT)], first_id=4))
    resumed.load_state_dict(buffer.state_dict())
    resumed.extend(make_rows([(5, CUT)], first=5, first_id=9))
    assert starts(resumed) == [0, 1, 2, 5, 6, 7]


def test_one_row_writes_cost_the_same_whatever_is_stored(monkeypatch):
    read = []
    original = windows._read
    monkeypatch.setattr(
        windows,
        "_read",
        lambda column, rows: read.append(len(rows)) or original(column, rows),
    )
    data = make_rows([(7, TERMINATED)] * 40)
    buffer = make_replay_buffer(100, horizon=3, batch_size=4)
    buffer.extend(data[:50])
    buffer.sample()
    assert max(read) == 50
    read.clear()
    for row in range(50, len(data)):  # fills the ring and wraps it twice
        buffer.add(data[row])
        buffer.sample()
    assert starts(buffer) == brute_force_starts(data, 100, 3)
    assert read == [1, 1] * (len(data) - 50)


@pytest.mark.parametrize(
    ("way", "rows", "memmap"),
    [
        ("state_dict", 8, False),
        ("state_dict", 27, True),
        ("dumps", 8, True),
        ("dumps", 27, False),
        ("checkpoint", 27, False),
        ("checkpoint", 27, True),
    ],
)
@pytest.mark.filterwarnings("ignore:Loading the storage on an uninitialized TensorDict")
def test_saved_and_loaded_buffer_draws_the_same(tmp_path, way, rows, memmap):
    def make(name, seed):
        return make_replay_buffer(
            12,
            horizon=3,
            batch_size=64,
            memmap_dir=tmp_path / name if memmap else None,
            generator=torch.Generator().manual_seed(seed),
        )

    data = make_rows([(5, TERMINATED), (4, CUT), (1, TRUNCATED)] * 8)
    buffer, loaded = make("one", 1), make("other", 2)
    for row in range(rows):
        buffer.extend(data[row : row + 1])
        if row > 3:
            buffer.sample()  # so that its starts were collected one by one
    assert (tmp_path / "one" / "observation.memmap").exists() == memmap
    if rows == 27:  # loading forgets what the buffer held
        loaded.extend(make_rows([(2, TERMINATED)] * 6, first=90))
        assert not loaded.can_sample()
    if way == "state_dict":
        loaded.load_state_dict(buffer.state_dict())
    elif way == "dumps":
        buffer.dumps(tmp_path / "dump")
        loaded.loads(tmp_path / "dump")
    else:
        path = Checkpoint(replay_buffer=buffer).save(tmp_path / "checkpoint")
        Checkpoint(replay_buffer=loaded).load(path)
    assert len(loaded) == len(buffer)
    for written in range(rows, rows + 9):
        assert starts(loaded) == brute_force_starts(data[:written], 12, 3)
        # The state of the generator came along.
        assert (buffer.sample() == loaded.sample()).all()
        for each in (buffer, loaded):
            each.extend(data[written : written + 1].clone())


def test_samples_hold_copies_of_the_stored_keys_and_the_index():
    rows = make_rows([(5, CUT)])
    buffer = make_replay_buffer(5, horizon=3, batch_size=2)
    buffer.extend(rows)
    batch, info = buffer.sample(return_info=True)
    assert set(batch.keys()) == {"slice", "transition"}
    for part in ("slice", "transition"):
        stored = set(rows.keys(True, True)) | {"index"}
        assert set(batch[part].keys(True, True)) == stored
    parts = batch["slice", "index"], batch["transition", "index"][:, None]
    assert torch.equal(info["index"], torch.cat(parts, 1))
    assert (buffer[parts[0]]["observation"] == batch["slice", "observation"]).all()
    batch["slice", "observation"].fill_(-1.0)
    assert (buffer[:]["observation"] == rows["observation"]).all()
    with pytest.warns(UserWarning, match="conflicting batch_sizes"):
        assert_windows(buffer.sample(batch_size=5), 3)


def test_draws_come_from_the_generator_or_else_from_the_global_one():
    options = {"horizon": 3, "batch_size": 32}
    buffer = filled([(30, CUT)], **options)
    torch.manual_seed(3)
    first = buffer.sample()
    assert not (buffer.sample() == first).all()
    torch.manual_seed(3)
    assert (buffer.sample() == first).all()
    own = filled([(30, CUT)], generator=torch.Generator().manual_seed(3), **options)
    state = torch.get_rng_state()
    assert (own.sample() == first).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_writes_by_position_and_an_emptied_storage_are_noticed():
    buffer = filled([(11, CUT)], capacity=8, horizon=3, batch_size=8)
    assert starts(buffer) == [3, 4, 5, 6, 7, 0]
    row = buffer[5]
    row["next", "done"] = torch.ones(1, dtype=torch.bool)
    buffer[5] = row
    assert starts(buffer) == [3, 6, 7, 0]
    buffer.empty()
    assert not buffer.can_sample()
    buffer.extend(make_rows([(5, CUT)], first=50))
    assert starts(buffer) == [0, 1, 2]
    assert buffer.sample()["transition", "observation"].min() >= 50


def test_sampler_serves_other_buffers_and_filled_storages():
    data = make_rows([(4, TERMINATED), (5, CUT)])

    def make_reader(storage, horizon):
        return TensorDictReplayBuffer(
            storage=storage,
            sampler=UniformWindowSampler(horizon),
            writer=ImmutableDatasetWriter(),
            batch_size=16,
        )

    dataset = make_reader(TensorStorage(data), 3)
    batch = dataset.sample()
    assert batch["observation"].shape == (16, 3, 1)
    assert (batch["observation"].diff(dim=1) == 1).all()
    assert starts(dataset) == [0, 1, 4, 5, 6]
    owner = make_replay_buffer(6, horizon=3)
    reader = make_reader(owner.storage, 2)
    owner.extend(data[:6])
    assert starts(reader) == [0, 1, 2, 4]
    owner.extend(data[6:8])
    assert starts(reader) == [2, 4, 5, 0]


def test_a_buffer_without_a_valid_window_becomes_usable():
    buffer = make_replay_buffer(9, horizon=3, batch_size=4)
    for stored in (0, 6):
        assert not buffer.can_sample()
        with pytest.raises(RuntimeError, match=f"the {stored} stored rows: horizon 3"):
            buffer.sample()
        buffer.extend(make_rows([(2, TERMINATED)] * 3))
    buffer.extend(make_rows([(3, TERMINATED)], first=6))
    assert_windows(buffer.sample(), 3)


def test_unusable_rows_and_storages_are_refused():
    buffer = make_replay_buffer(4, horizon=3, batch_size=4)
    with pytest.raises(ValueError, match=r"size \[N\] or \[E, T\], .* got \[2, 2, 1\]"):
        buffer.extend(make_rows([(4, CUT)]).view(2, 2, 1))
    buffer.extend(make_rows([(4, CUT)]).exclude(("next", "done")))
    with pytest.raises(KeyError, match=r"expected rows with the key .*next.*done"):
        buffer.sample()
    for storage in (ListStorage(4), LazyTensorStorage(4, ndim=2)):
        with pytest.raises(ValueError, match="TensorStorage with ndim=1"):
            UniformWindowSampler(3).sample(storage, 2)


@pytest.mark.parametrize("many", [False, True])
def test_rows_with_other_entries_than_the_stored_ones_are_refused(many):
    buffer = make_replay_buffer(9, horizon=2, batch_size=4)
    rows = make_rows([(4, CUT)])
    buffer.extend(rows)
    for other in (
        rows.exclude("observation"),
        rows.clone().set("more", rows["observation"]),
    ):
        with pytest.raises(KeyError, match="expected the entries of the stored rows"):
            buffer.extend(other) if many else buffer.add(other[0])
    assert len(buffer) == 4
    buffer.empty()
    buffer.extend(rows.exclude("observation"))


@pytest.mark.parametrize(
    ("rows", "error"),
    [([1, 2], TypeError), (None, TypeError), (make_rows([(3, CUT)])[:0], ValueError)],
)
def test_what_is_no_row_is_refused(rows, error):
    buffer = make_replay_buffer(9, horizon=2)
    with pytest.raises(error, match=r"^tensordicts: expected"):
        buffer.extend(rows)
    assert len(buffer) == 0
