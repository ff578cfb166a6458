"""The replay buffer: which windows are drawn, how often, and after which writes."""

from __future__ import annotations

import math
from itertools import cycle, pairwise

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

from alm_torchrl import replay
from alm_torchrl.replay import UniformWindowSampler, make_replay_buffer

TERMINATED, TRUNCATED, CUT = "terminated", "truncated", "cut"


def make_rows(episodes, first=0, first_id=0, with_ids=True):
    """Rows of (length, how it ended) episodes; the observation counts the rows."""
    lengths = [length for length, _ in episodes]
    rows = sum(lengths)
    last = torch.tensor(lengths).cumsum(0) - 1
    ends = {
        name: torch.zeros(rows, 1, dtype=torch.bool) for name in (TERMINATED, TRUNCATED)
    }
    for row, (_, end) in zip(last.tolist(), episodes, strict=True):
        if end != CUT:
            ends[end][row] = True
    count = torch.arange(first, first + rows, dtype=torch.float32).unsqueeze(-1)
    data = TensorDict(
        {
            "observation": count,
            "next": {
                "observation": count + 1,
                "done": ends[TERMINATED] | ends[TRUNCATED],
                **ends,
            },
        },
        batch_size=[rows],
    )
    if with_ids:
        ids = torch.arange(first_id, first_id + len(lengths))
        data["collector", "traj_ids"] = ids.repeat_interleave(torch.tensor(lengths))
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
    sampler = buffer.sampler
    sampler._settle(buffer.storage)
    order = (sampler._head + np.arange(sampler._count)) % len(sampler._starts)
    return (sampler._starts[order] % buffer.storage.max_size).tolist()


def brute_force_starts(written, capacity, horizon):
    """The same from the list of all rows ever written: (done, trajectory)."""
    found = []
    for row in range(max(0, len(written) - capacity), len(written) - horizon + 1):
        window = written[row : row + horizon]
        same = all(trajectory == window[0][1] for _, trajectory in window)
        if same and not any(done for done, _ in window[:-1]):
            found.append(row % capacity)
    return found


def written_rows(data):
    done = data["next", "done"].flatten().tolist()
    ids = data.get(("collector", "traj_ids"), torch.zeros(len(data))).tolist()
    return list(zip(done, ids, strict=True))


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


def assert_same_draws(one, other, seed):
    for buffer in (one, other):
        buffer.set_rng(torch.Generator().manual_seed(seed))
    for _ in range(3):
        assert (one.sample() == other.sample()).all()


episode_lists = st.lists(
    st.tuples(st.integers(1, 7), st.sampled_from([TERMINATED, TRUNCATED, CUT])),
    min_size=1,
    max_size=14,
)


@settings(deadline=None, max_examples=60)
@given(
    episodes=episode_lists,
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
    data, written = make_rows(episodes, with_ids=with_ids), []
    chunk_sizes = cycle(chunks)
    while len(written) < len(data):
        size, look = next(chunk_sizes)
        chunk = data[len(written) : len(written) + min(size, capacity)]
        written += written_rows(chunk)
        if len(chunk) == 1:
            buffer.add(chunk[0])
        else:
            buffer.extend(chunk)
        if not look and len(written) < len(data):
            continue  # several writes between two draws
        expected = brute_force_starts(written, capacity, horizon)
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
    generator = torch.Generator().manual_seed(horizon)
    buffer = filled(
        episodes, 30, horizon=horizon, batch_size=20_000, generator=generator
    )
    batch = buffer.sample()
    valid = len(brute_force_starts(written_rows(make_rows(episodes)), 30, horizon))
    counts = batch["slice", "index"][:, 0].bincount()
    assert_uniform(counts[counts > 0].tolist(), valid, len(batch))
    assert_uniform(batch["transition", "index"].bincount().tolist(), 30, len(batch))
    # The two draws are independent.
    short = filled([(5, CUT)], horizon=2, batch_size=20_000, generator=generator)
    batch = short.sample()
    pairs = batch["slice", "index"][:, 0] * 5 + batch["transition", "index"]
    assert_uniform(pairs.bincount(minlength=20).tolist(), 4 * 5, len(batch))


def test_no_window_crosses_the_seam():
    buffer = filled([(8, CUT)], capacity=6, horizon=3, batch_size=500)
    # Rows 6 and 7 overwrote 0 and 1; the ring's end may be crossed, the seam not.
    assert starts(buffer) == [2, 3, 4, 5]
    slices = buffer.sample()["slice", "observation"].squeeze(-1)
    assert set(slices[:, 0].tolist()) == {2.0, 3.0, 4.0, 5.0}
    assert set(slices[:, -1].tolist()) == {4.0, 5.0, 6.0, 7.0}


@pytest.mark.parametrize("end", [TERMINATED, TRUNCATED])
def test_last_transition_of_every_episode_is_drawn(end):
    buffer = filled(
        [(4, end), (2, end), (1, end), (3, end)], horizon=3, batch_size=2000
    )
    batch = buffer.sample()
    assert_windows(batch, 3)
    last_of_slices = batch["slice"][:, -1]["observation"]
    assert set(last_of_slices.flatten().tolist()) == {2.0, 3.0, 9.0}
    ended = batch["transition"][batch["transition"]["next", end].squeeze(-1)]
    assert set(ended["observation"].flatten().tolist()) == {3.0, 5.0, 6.0, 9.0}


def test_no_window_crosses_a_resume_that_starts_a_fresh_episode():
    buffer = make_replay_buffer(20, horizon=3, batch_size=8)
    buffer.extend(make_rows([(5, CUT)], first_id=4))
    resumed = make_replay_buffer(20, horizon=3, batch_size=8)
    resumed.load_state_dict(buffer.state_dict())
    resumed.extend(make_rows([(5, CUT)], first=5, first_id=9))
    assert starts(resumed) == [0, 1, 2, 5, 6, 7]
    without_ids = filled([(10, CUT)], horizon=3)
    assert starts(without_ids) == list(range(8))


def test_one_row_writes_cost_the_same_whatever_is_stored(monkeypatch):
    read = []
    original = replay._read
    monkeypatch.setattr(
        replay,
        "_read",
        lambda column, rows: read.append(len(rows)) or original(column, rows),
    )
    episodes = [(7, TERMINATED)] * 40
    data = make_rows(episodes)
    buffer = make_replay_buffer(100, horizon=3, batch_size=4)
    buffer.extend(data[:50])
    buffer.sample()
    assert max(read) == 50
    read.clear()
    for row in range(50, len(data)):  # fills the ring and wraps it twice
        if row % 2:
            buffer.extend(data[row : row + 1])
        else:
            buffer.add(data[row])
        buffer.sample()
        assert starts(buffer) == brute_force_starts(
            written_rows(data[: row + 1]), 100, 3
        )
    assert max(read) == 3
    assert len(read) == 2 * (len(data) - 50)


@pytest.mark.parametrize("memmap", [False, True], ids=["memory", "memmap"])
@pytest.mark.parametrize("rows", [8, 27], ids=["partly filled", "wrapped"])
@pytest.mark.parametrize("way", ["state_dict", "dumps", "checkpoint"])
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
    if way == "state_dict":
        loaded.load_state_dict(buffer.state_dict())
    elif way == "dumps":
        buffer.dumps(tmp_path / "dump")
        loaded.loads(tmp_path / "dump")
    else:
        path = Checkpoint(replay_buffer=buffer).save(tmp_path / "checkpoint")
        Checkpoint(replay_buffer=loaded).load(path)
    assert len(loaded) == len(buffer)
    assert starts(loaded) == brute_force_starts(written_rows(data[:rows]), 12, 3)
    for _ in range(3):  # the state of the generator came along
        assert (buffer.sample() == loaded.sample()).all()
    for written in range(rows, rows + 9):
        for each in (buffer, loaded):
            each.extend(data[written : written + 1].clone())
        assert (buffer.sample() == loaded.sample()).all()
    assert starts(loaded) == brute_force_starts(written_rows(data[: rows + 9]), 12, 3)


def test_loading_into_a_used_buffer_forgets_what_it_held(tmp_path):
    saved = filled([(17, CUT)], capacity=10, horizon=3, batch_size=64)
    saved.dumps(tmp_path / "dump")
    used = filled([(2, TERMINATED)] * 5, capacity=10, horizon=3, batch_size=64)
    assert starts(used) == []
    used.loads(tmp_path / "dump")
    assert starts(used) == [7, 8, 9, 0, 1, 2, 3, 4]
    assert_same_draws(saved, used, seed=5)


def test_memmap_storage_is_on_disk_and_its_directory_can_be_reused(tmp_path):
    for _ in range(2):
        buffer = make_replay_buffer(10, horizon=3, batch_size=8, memmap_dir=tmp_path)
        buffer.extend(make_rows([(6, TERMINATED), (4, CUT)]))
        assert buffer.storage._storage.is_memmap()
        assert (tmp_path / "observation.memmap").stat().st_size == 10 * 4
        assert starts(buffer) == [0, 1, 2, 3, 6, 7]
        assert_windows(buffer.sample(), 3)


def test_rows_are_read_by_position_as_from_any_buffer():
    buffer = filled([(6, TERMINATED), (4, CUT)], horizon=3, batch_size=8)
    assert buffer[4].batch_size == ()
    assert buffer[4]["observation"].item() == 4
    assert buffer[:]["observation"].flatten().tolist() == list(range(10))
    assert buffer[torch.tensor([7, 2])]["observation"].flatten().tolist() == [7, 2]
    assert len(buffer) == 10
    batch, info = buffer.sample(return_info=True)
    index = torch.cat(
        [batch["slice", "index"], batch["transition", "index"][:, None]], 1
    )
    assert torch.equal(info["index"], index)
    assert (buffer[index][:, :3]["observation"] == batch["slice", "observation"]).all()


def test_samples_hold_the_stored_keys_and_no_others():
    rows = make_rows([(5, CUT)])
    stored = set(rows.keys(True, True)) | {"index"}
    buffer = make_replay_buffer(5, batch_size=2)
    buffer.extend(rows)
    batch = buffer.sample()
    assert set(batch.keys()) == {"slice", "transition"}
    assert set(batch["slice"].keys(True, True)) == stored
    assert set(batch["transition"].keys(True, True)) == stored
    batch["slice", "observation"].fill_(-1.0)
    assert (buffer[:]["observation"] >= 0).all()


def test_draws_come_from_the_generator_or_else_from_the_global_one():
    episodes = [(30, CUT)]
    buffer = filled(episodes, horizon=3, batch_size=32)
    torch.manual_seed(3)
    first = buffer.sample()
    assert not (buffer.sample() == first).all()
    torch.manual_seed(3)
    assert (buffer.sample() == first).all()
    own = filled(
        episodes, horizon=3, batch_size=32, generator=torch.Generator().manual_seed(3)
    )
    state = torch.get_rng_state()
    assert (own.sample() == first).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_write_by_position_is_noticed():
    buffer = filled([(8, CUT)], horizon=3, batch_size=8)
    assert starts(buffer) == [0, 1, 2, 3, 4, 5]
    row = buffer[3]
    row["next", "done"] = torch.ones(1, dtype=torch.bool)
    buffer[3] = row
    assert starts(buffer) == [0, 1, 4, 5]


def test_an_emptied_buffer_starts_afresh():
    buffer = filled([(11, CUT)], capacity=8, horizon=3, batch_size=8)
    buffer.sample()
    buffer.empty()
    assert not buffer.can_sample()
    buffer.extend(make_rows([(5, CUT)], first=50))
    assert starts(buffer) == [0, 1, 2]
    assert buffer.sample()["transition", "observation"].min() >= 50


def test_sampler_serves_other_buffers_and_filled_storages():
    data = make_rows([(4, TERMINATED), (5, CUT)])
    dataset = TensorDictReplayBuffer(
        storage=TensorStorage(data),
        sampler=UniformWindowSampler(3),
        writer=ImmutableDatasetWriter(),
        batch_size=16,
    )
    assert dataset.sample()["observation"].shape == (16, 4, 1)
    assert starts(dataset) == [0, 1, 4, 5, 6]
    owner = make_replay_buffer(6, horizon=3)
    reader = TensorDictReplayBuffer(
        storage=owner.storage,
        sampler=UniformWindowSampler(2),
        writer=ImmutableDatasetWriter(),
        batch_size=16,
    )
    owner.extend(data[:6])
    assert starts(reader) == [0, 1, 2, 4]
    owner.extend(data[6:8])
    assert starts(reader) == [2, 4, 5, 0]


def test_a_buffer_without_a_valid_window_becomes_usable():
    buffer = make_replay_buffer(9, horizon=3, batch_size=4)
    for stored, chunk in ((0, None), (6, make_rows([(2, TERMINATED)] * 3))):
        if chunk is not None:
            buffer.extend(chunk)
        assert not buffer.can_sample()
        with pytest.raises(RuntimeError, match=f"the {stored} stored rows: horizon 3"):
            buffer.sample()
    buffer.extend(make_rows([(3, TERMINATED)], first=6))
    assert_windows(buffer.sample(), 3)


def test_unusable_rows_and_storages_are_refused():
    buffer = make_replay_buffer(4, horizon=3, batch_size=4)
    with pytest.raises(ValueError, match=r"batch size \[N\], .* got \[2, 2\]"):
        buffer.extend(make_rows([(4, CUT)]).view(2, 2))
    buffer.extend(make_rows([(4, CUT)]).exclude(("next", "done")))
    with pytest.raises(KeyError, match=r"expected rows with the key .*next.*done"):
        buffer.sample()
    for storage in (ListStorage(4), LazyTensorStorage(4, ndim=2)):
        with pytest.raises(ValueError, match="TensorStorage with ndim=1"):
            UniformWindowSampler(3).sample(storage, 2)


def test_brute_force_itself():
    written = [(False, 0), (True, 0), (False, 1), (False, 1), (False, 2), (False, 2)]
    assert brute_force_starts(written, 10, 2) == [0, 2, 4]
    assert brute_force_starts(written, 4, 2) == [2, 0]
    assert [b - a for a, b in pairwise(brute_force_starts(written, 10, 1))] == [1] * 5
