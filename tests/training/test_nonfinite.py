"""Losses and gradients that are not finite: named, and nothing moves any more."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch

from alm_torchrl import NonFiniteError
from tests.helpers import make_batch
from tests.training.stepping import (
    BAD,
    CHECKED,
    PARTS,
    Watch,
    bad_batch,
    changed,
    make_stepper,
    train,
    values_of,
    without_reading,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def spoiled(term):
    """Makes one term infinite; a gradient norm by a finite loss with a steep edge."""
    name = term.removeprefix("grad_norm_").removeprefix("loss_")
    method = next(method for method in PARTS if name in method)

    def spoil(called, value, metadata):
        if called != method:
            return value, metadata
        if term.startswith("grad_norm"):
            # Plus zero, whose derivative is infinite.
            return value + (value - value.detach()).sqrt(), metadata
        if term in metadata:
            metadata[term] = metadata[term] * math.inf
        return value * math.inf, metadata

    return method, spoil


@pytest.mark.parametrize("term", CHECKED)
def test_each_term_is_checked_before_its_step(term):
    stepper = make_stepper()
    stepper.step(None, make_batch())
    method, spoil = spoiled(term)
    watch = Watch(stepper, spoil)
    with pytest.raises(NonFiniteError, match=f"^{term} was not finite in update 2"):
        watch.step(make_batch())
    failed = list(PARTS).index(method)
    found, after = watch.found, values_of(stepper)
    assert changed(found[failed], after) == set()
    for earlier in range(failed):
        name = list(PARTS)[earlier]
        assert changed(found[earlier], found[earlier + 1]) == {name, *PARTS[name]}
    # It stays so, and so does the error.
    with pytest.raises(NonFiniteError) as again:
        stepper.step(None, make_batch())
    assert (again.value.term, again.value.step) == (term, 2)
    assert changed(after, values_of(stepper)) == set()


def test_a_failure_in_the_first_update():
    stepper = make_stepper()
    before = values_of(stepper)
    with pytest.raises(NonFiniteError, match="loss_model was not finite in update 1;"):
        stepper.step(None, bad_batch("loss_model"))
    after = values_of(stepper)
    assert changed(before, {name: after[name] for name in before}) == set()


def check_deferred(stepper, term, reading=without_reading, device="cpu"):
    """Updates go on after a failure and change nothing, until they are asked."""
    watch = Watch(stepper)
    with reading(stepper):
        for _ in range(2):
            stepper.step(None, make_batch().to(device))
        watch.step(bad_batch(term).to(device))
        assert watch.methods == list(PARTS)
        expected = watch.found[0 if term == "loss_model" else 1]
        assert changed(expected, values_of(stepper)) == set()
        metrics = stepper.step(None, make_batch().to(device))
        assert metrics["loss_actor"].isfinite()
        assert changed(expected, values_of(stepper)) == set()
        # A second failure does not replace the first.
        other = "loss_reward" if term == "loss_model" else "loss_model"
        stepper.step(None, bad_batch(other).to(device))
    assert changed(expected, values_of(stepper)) == set()
    assert stepper.optimizer_step_count == 5
    with pytest.raises(NonFiniteError) as caught:
        stepper.raise_if_nonfinite()
    assert (caught.value.term, caught.value.step) == (term, 3)


@pytest.mark.parametrize("term", BAD)
def test_failure_read_later(term):
    check_deferred(make_stepper(), term)


@pytest.mark.gpu
@pytest.mark.parametrize("term", BAD)
def test_failure_read_later_on_cuda(term):
    stepper = make_stepper("cuda", cudagraph=False)
    check_deferred(stepper, term, contextlib.nullcontext, "cuda")


def test_a_failure_is_saved_and_an_earlier_state_undoes_it():
    stepper, resumed = make_stepper(), make_stepper()
    train(stepper, range(1))
    state = copy.deepcopy(stepper.state_dict())
    with pytest.raises(NonFiniteError):
        stepper.step(None, bad_batch("loss_reward"))
    resumed.load_state_dict(stepper.state_dict())
    with pytest.raises(NonFiniteError) as caught:
        resumed.raise_if_nonfinite()
    assert (caught.value.term, caught.value.step) == ("loss_reward", 2)
    stepper.load_state_dict(state)
    before = values_of(stepper)
    train(stepper, range(1, 2))
    assert changed(before, values_of(stepper)) == {name.split()[0] for name in before}
    assert stepper.optimizer_step_count == 2
