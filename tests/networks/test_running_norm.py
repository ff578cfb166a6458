"""The statistics of observations, against those of all rows at once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from alm_torchrl import functional
from alm_torchrl.networks import RunningNorm


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def moments(rows):
    return rows.mean(0), rows.var(0, correction=0), rows.new_tensor(len(rows))


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    shift=st.floats(-100, 100),
    seed=st.integers(0, 1000),
)
def test_batches_add_up_to_all_rows(sizes, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    rows = shift + rows * torch.tensor([1e-3, 1.0, 50.0])
    parts = rows.split(sizes)
    norm = RunningNorm(3)
    merged = moments(parts[0])
    for part in parts:
        norm.update(part)
    for part in parts[1:]:
        merged = functional.merge_moments(merged, moments(part))
    for found in (merged, (norm.mean, norm.var, norm.count)):
        assert_close(found, moments(rows), check_dtype=False, rtol=1e-9, atol=1e-9)


def test_merging_does_not_depend_on_the_order():
    a, b = moments(torch.randn(5, 3)), moments(torch.randn(2, 3))
    empty = (torch.full((3,), 7.0), torch.full((3,), 9.0), torch.tensor(0.0))
    one = functional.merge_moments(a, b)
    assert_close(one, functional.merge_moments(b, a))
    assert_close(functional.merge_moments(a, empty), a, rtol=0, atol=0)
    assert_close(functional.merge_moments(empty, a), a)


def test_normalises_and_clips():
    norm = RunningNorm(2)
    rows = torch.tensor([[0.5, -20.0], [3.0, 20.0]])
    assert_close(norm(rows), rows.clamp(-10, 10))  # Nothing seen: only the clip.
    norm.update(torch.tensor([[1.0, 5.0], [5.0, 5.0], [3.0, 5.0]]))
    scale = math.sqrt(8 / 3)
    found = norm(torch.tensor([[5.0, 5.0], [3.0, 5.1], [1e9, 4.0]]))
    assert_close(found, torch.tensor([[2 / scale, 0.0], [0.0, 10.0], [10.0, -10.0]]))
    assert norm(torch.zeros(4, 1, 2)).shape == (4, 1, 2)
    assert norm(torch.full((2,), math.nan)).isnan().all()


def test_stays_exact_after_many_batches_of_large_numbers():
    norm = RunningNorm(1)
    rows = 1000 + torch.randn(2000, 256, 1)
    for batch in rows:
        norm.update(batch)
    mean, var, count = moments(rows.reshape(-1, 1).double())
    assert norm.count == count
    assert_close(norm.mean, mean, rtol=0, atol=1e-9)
    assert_close(norm.var, var, rtol=1e-9, atol=0)


def test_an_entry_that_never_changes_is_zero():
    norm = RunningNorm(2)
    for count in range(1, 200):
        rows = torch.randn(count, 2)
        rows[:, 0] = 8.9072  # A mean in single precision is wrong in its last digit.
        norm.update(rows)
    found = norm(rows)
    assert found.dtype == rows.dtype
    assert_close(found[:, 0], torch.zeros(count), rtol=0, atol=1e-6)


def test_rows_that_do_not_count_are_not_read():
    norm, expected = RunningNorm(2), RunningNorm(2)
    rows = torch.randn(6, 2)
    mask = torch.tensor([True, False, True, True, False, False])
    expected.update(rows[mask])
    norm.update(rows.masked_fill(~mask[:, None], math.nan), mask)
    assert_close(norm.state_dict(), expected.state_dict())
    for held in (norm, RunningNorm(2)):
        before = {name: value.clone() for name, value in held.state_dict().items()}
        held.update(rows, torch.zeros(6, dtype=torch.bool))
        assert_close(held.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_rows_that_are_not_finite_change_nothing(bad):
    norm = RunningNorm(2)
    norm.update(torch.randn(6, 2))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    rows = torch.randn(6, 2)
    rows[3, 1] = bad  # The square of the last one is infinite.
    norm.update(rows)
    norm.update(torch.randn(6, 2), skip=torch.tensor(True))
    assert_close(norm.state_dict(), before, rtol=0, atol=0)
    norm.update(torch.randn(6, 2), skip=torch.tensor(False))
    assert norm.count == 12


def test_updates_in_place_and_forgets():
    norm = RunningNorm(2)
    held = dict(norm.named_buffers())
    norm.update(torch.randn(6, 2))
    norm.reset_parameters()
    assert all(held[name] is value for name, value in norm.named_buffers())
    assert_close(norm.state_dict(), RunningNorm(2).state_dict(), rtol=0, atol=0)
    assert list(norm.parameters()) == []
    with pytest.raises(ValueError, match="size: expected an integer >= 1"):
        RunningNorm(0)
