"""The captured update, with a stand-in for the CUDA graph."""

from __future__ import annotations

import contextlib
import copy
from contextlib import contextmanager

import pytest
import torch

from alm_torchrl import NonFiniteError
from alm_torchrl.training import capture as capturing
from alm_torchrl.training.capture import CapturedUpdate
from tests.helpers import B, K, make_batch, make_rows
from tests.training.stepping import (
    bad_batch,
    changed,
    make_stepper,
    run_updates,
    values_of,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@contextmanager
def stand_in(monkeypatch):
    """A CUDA graph as a CPU can have it: captured without effect, run when replayed."""

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        captured = None

        def replay(self):
            captured = self.captured
            outputs = captured._update(captured._inputs)
            captured._outputs.copy_(torch.stack(list(outputs.values())))

    class Capture:
        def __init__(self, graph, stream):
            assert isinstance(stream, Stream)
            self.without_effect = capturing.restored(self.tensors)

        def tensors(self):
            return stepper_now[0]._update.tensors()

        def __enter__(self):
            groups = [o.param_groups[0] for o in stepper_now[0].optimizers.values()]
            assert all(group["capturable"] for group in groups)
            grads = [p.grad for p in stepper_now[0].loss.parameters()]
            assert all(grad is None for grad in grads)
            self.generator = torch.get_rng_state()
            self.without_effect.__enter__()

        def __exit__(self, *error):
            self.without_effect.__exit__(*error)
            torch.set_rng_state(self.generator)

    stepper_now = [None]
    fork = torch.random.fork_rng
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "Stream", Stream)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", Capture)
        patch.setattr(torch.random, "fork_rng", lambda devices: fork([]))

        def capture(stepper):
            stepper.cudagraph = True
            stepper_now[0] = stepper
            Graph.captured = stepper._run = CapturedUpdate(stepper._update)
            stepper._modes = [stepper._run]
            return stepper

        yield capture


def test_captured_updates_equal_eager_ones(monkeypatch):
    """The warm-up leaves no trace, and each batch reaches the graph."""
    eager = make_stepper(lr=1e-2)
    torch.manual_seed(0)
    captured = make_stepper(lr=1e-2)
    with stand_in(monkeypatch) as capture:
        expected = run_updates(eager, range(3))
        results = run_updates(capture(captured), range(3))
    for left, right in zip(expected, results, strict=True):
        assert (left == right).all()
    # What was returned does not change with later updates.
    assert (results[0] != results[1]).any()
    assert changed(values_of(eager), values_of(captured)) == set()
    assert not captured.optimizers["actor_loss"].param_groups[0]["capturable"]


def test_captured_updates_go_on_from_a_loaded_state(monkeypatch):
    uninterrupted = make_stepper(lr=1e-2)
    run_updates(uninterrupted, range(2))
    states = uninterrupted.loss.state_dict(), uninterrupted.state_dict()
    states = copy.deepcopy(states)
    other = make_stepper(lr=1e-2)
    with stand_in(monkeypatch) as capture:
        run_updates(capture(other), range(1))
        graph = other._run._graph
        other.loss.load_state_dict(states[0])
        other.load_state_dict(states[1])
        run_updates(other, range(2, 4))
        assert other._run._graph not in (None, graph)
    run_updates(uninterrupted, range(2, 4))
    assert changed(values_of(uninterrupted), values_of(other)) == set()
    assert other.optimizer_step_count == 4


def test_a_failure_in_a_captured_update(monkeypatch):
    stepper, term = make_stepper(), "loss_classifier"
    with stand_in(monkeypatch) as capture:
        capture(stepper)
        run_updates(stepper, range(2), lambda: make_batch(2))
        with pytest.raises(NonFiniteError, match=f"{term} was not finite in update 3"):
            stepper.step(None, bad_batch(term))
    before = values_of(stepper)
    assert all(value.isfinite().all() for value in before.values())


def test_a_capture_takes_batches_of_one_kind(monkeypatch):
    stepper = make_stepper()
    with stand_in(monkeypatch) as capture:
        capture(stepper).step(None, make_batch())
        before = values_of(stepper)
        for batch, match in (
            (
                make_batch(B + 1),
                r"'action'\) as in the first batch, \(\(6, 3, 2\), .* got",
            ),
            (make_rows(B, K), r"'observation'\) as in the first batch, None, got"),
        ):
            with pytest.raises(ValueError, match=match):
                stepper.step(None, batch)
    assert changed(before, values_of(stepper)) == set()


def test_an_update_that_cannot_be_captured_names_the_way_out(monkeypatch):
    stepper = make_stepper()
    actor_loss, calls = stepper.loss.actor_loss, []

    def reading(batch, *encoded):
        calls.append(batch)
        if len(calls) > capturing.WARMUP:
            raise RuntimeError("operation not permitted when stream is capturing")
        return actor_loss(batch, *encoded)

    stepper.loss.actor_loss = reading
    with stand_in(monkeypatch) as capture:
        capture(stepper)
        with pytest.raises(RuntimeError, match="cudagraph=False runs it") as caught:
            stepper.step(None, make_batch())
    assert "not permitted" in str(caught.value.__cause__)
    assert not stepper.optimizers["actor_loss"].param_groups[0]["capturable"]
