"""The rows after a transition, short slices, and draws that prefer what is new."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alm_torchrl.replay import make_replay_buffer
from alm_torchrl.windows import recent_age
from tests.test_replay import (
    CUT,
    TERMINATED,
    TRUNCATED,
    assert_uniform,
    filled,
    make_rows,
    starts,
)

# -- the rows after a transition -------------------------------------------------------


def brute_force_lookahead(data, row, n_step):
    """``row``, of all rows ever written, and those that follow in its episode."""
    done = data["next", "done"].flatten().tolist()
    ids = data.get(("collector", "traj_ids"), torch.zeros(len(data))).tolist()
    found = [row]
    while len(found) < n_step and found[-1] + 1 < len(data) and not done[found[-1]]:
        if ids[found[-1] + 1] != ids[row]:
            break
        found.append(found[-1] + 1)
    return found


@settings(deadline=None, max_examples=40)
@given(
    episodes=st.lists(
        st.tuples(st.integers(1, 7), st.sampled_from([TERMINATED, TRUNCATED, CUT])),
        min_size=1,
        max_size=8,
    ),
    n_step=st.integers(2, 5),
    capacity=st.integers(3, 20),
    chunk=st.integers(1, 9),
    with_ids=st.booleans(),
)
def test_the_lookahead_matches_brute_force(episodes, n_step, capacity, chunk, with_ids):
    data = make_rows(episodes, with_ids=with_ids)
    options = {"horizon": 1, "batch_size": 32}
    buffer, one_step = (
        make_replay_buffer(capacity, n_step=n, generator=torch.Generator(), **options)
        for n in (n_step, 1)
    )
    written = 0
    for rows in data.split(min(chunk, capacity)):
        written += len(rows)
        for each in (buffer, one_step):
            each.extend(rows)
        batch, known = buffer.sample(), one_step.sample()
        lookahead = batch["transition"].pop("lookahead")
        assert (batch == known).all()  # the same draws
        first = batch["transition", "observation"].flatten().long().tolist()
        assert min(first) >= written - capacity
        for row, read, mask in zip(
            first,
            lookahead["observation"].squeeze(-1).long().tolist(),
            lookahead["mask"].tolist(),
            strict=True,
        ):
            expected = brute_force_lookahead(data[:written], row, n_step)
            rest = n_step - len(expected)
            assert read == expected + expected[-1:] * rest
            assert mask == [True] * len(expected) + [False] * rest


def test_every_row_starts_a_lookahead_and_loading_keeps_it():
    episodes = [(4, TERMINATED), (3, TRUNCATED), (5, CUT), (2, CUT)]
    buffer = filled(episodes, horizon=2, n_step=3, batch_size=600)
    batch = buffer.sample()
    assert set(batch["transition", "index"].tolist()) == set(range(14))
    whole = batch["transition", "lookahead", "mask"].all(1)
    starts = batch["transition", "index"][whole]
    assert set(starts.tolist()) == {0, 1, 4, 7, 8, 9}
    other = make_replay_buffer(14, horizon=2, n_step=3, batch_size=600)
    other.load_state_dict(buffer.state_dict())
    torch.manual_seed(1)
    expected = buffer.sample()
    torch.manual_seed(1)
    assert (other.sample() == expected).all()


# -- short slices ----------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [14, 9])
def test_short_slices_start_at_every_row(capacity):
    episodes = [(4, TERMINATED), (3, TRUNCATED), (5, CUT), (2, CUT)]
    data = make_rows(episodes)
    buffer = filled(
        episodes, capacity=capacity, horizon=3, batch_size=4000, short_slices=True
    )
    slices = buffer.sample()["slice"]
    mask = slices["collector", "mask"]
    first = slices["observation"][:, 0, 0].long()
    counts = first.bincount(minlength=14)[14 - capacity :]
    assert_uniform(counts.tolist(), capacity, 4000)
    read = slices["observation"].squeeze(-1).long()
    for row in range(14 - capacity, 14):
        expected = brute_force_lookahead(data, row, 3)
        rest = 3 - len(expected)
        for found, valid in zip(read[first == row], mask[first == row], strict=True):
            assert found.tolist() == expected + expected[-1:] * rest
            assert valid.tolist() == [True] * len(expected) + [False] * rest


def test_short_slices_need_no_whole_window():
    buffer = make_replay_buffer(9, horizon=3, batch_size=4, short_slices=True)
    assert not buffer.can_sample()
    with pytest.raises(RuntimeError, match="the 0 stored rows"):
        buffer.sample()
    buffer.extend(make_rows([(1, TERMINATED)]))
    mask = buffer.sample()["slice", "collector", "mask"]
    assert (mask == torch.tensor([True, False, False])).all()


# -- recency ---------------------------------------------------------------------------


@settings(deadline=None)
@given(
    count=st.integers(1, 40),
    decay=st.floats(0.05, 0.999),
    floor=st.floats(0.01, 1.0),
)
def test_ages_have_exactly_their_probabilities(count, decay, floor):
    weights = [max(decay**age, floor) for age in range(count)]
    total, below = sum(weights), 0.0
    for age, weight in enumerate(weights):
        # The draws that give this age are those between two cumulative sums.
        ends = np.array([below + 1e-9, below + weight - 1e-9]) / total
        assert recent_age(ends, count, decay, floor).tolist() == [age, age]
        below += weight
    ends = np.array([0.0, np.nextafter(1.0, 0.0)])
    ages = recent_age(ends, count, decay, floor)
    assert ages.tolist() == [0, count - 1]


@pytest.mark.parametrize("short_slices", [False, True])
def test_new_rows_and_windows_are_preferred(short_slices):
    # A ring that was wrapped, with episode ends in it.
    episodes = [(5, TERMINATED)] * 8
    buffer = filled(
        episodes,
        capacity=23,
        horizon=2,
        batch_size=50_000,
        short_slices=short_slices,
        recency_decay=0.9,
        recency_floor=0.3,
        generator=torch.Generator().manual_seed(0),
    )
    batch = buffer.sample()
    for part, valid in (
        (batch["slice"][:, 0], starts(buffer)),
        (batch["transition"], None),
    ):
        row = part["observation"].flatten().long()
        if valid is None or short_slices:
            rows = list(range(17, 40))
        else:
            rows = sorted(17 + (position - 17) % 23 for position in valid)
        weights = torch.tensor([max(0.9**a, 0.3) for a in range(len(rows))]).flip(0)
        expected = 50_000 * weights / weights.sum()
        counts = row.bincount(minlength=40)[rows]
        assert counts.sum() == 50_000
        assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


@pytest.mark.parametrize("name", ["recency_decay", "recency_floor"])
@pytest.mark.parametrize("value", [0.0, 1.1])
def test_recency_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected a number > 0 and <= 1"):
        make_replay_buffer(9, **{name: value})
