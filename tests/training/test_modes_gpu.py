"""The modes of an update on a GPU: captured against eager, and no waiting."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alm_torchrl import ALMOptimizationStepper, NonFiniteError
from tests import parity
from tests.helpers import make_batch
from tests.training.stepping import (
    BAD,
    assert_same,
    bad_batch,
    changed,
    make_stepper,
    run_updates,
    values_of,
)
from tests.training.trainer_runs import Counter, build, tiny_loss

pytestmark = pytest.mark.gpu
RECORDINGS = sorted((Path(__file__).parents[1] / "data").glob("authors_*.npz"))
COMPILED = pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])


def cuda_batch():
    return make_batch().to("cuda")


def cuda_stepper(**kwargs):
    torch.manual_seed(0)
    return make_stepper("cuda", lr=1e-3, **kwargs)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("compile", [False, COMPILED])
def test_captured_updates_equal_eager_ones(precision, compile):
    eager = cuda_stepper(precision=precision, cudagraph=False)
    captured = cuda_stepper(precision=precision, compile=compile)
    assert captured.cudagraph
    runs = [run_updates(s, range(4), cuda_batch) for s in (eager, captured)]
    atol = 1e-4 if precision == "fp32" else 0.05
    for left, right in zip(*runs, strict=True):
        assert_same(dict(left.items()), dict(right.items()), atol)
    assert_same(values_of(eager), values_of(captured), atol)
    # What was returned does not change with later updates.
    assert (runs[1][0] != runs[1][1]).any()


@pytest.mark.parametrize("compile", [False, COMPILED])
def test_the_warm_up_leaves_no_trace(compile):
    stepper, batch = cuda_stepper(compile=compile), cuda_batch()
    before = values_of(stepper)
    buffers = [buffer.clone() for buffer in stepper.loss.buffers()]
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    stepper._run._capture(batch)
    after = values_of(stepper)
    assert changed(before, {name: after[name] for name in before}) == set()
    assert all(not after[name].any() for name in after if name not in before)
    for buffer, saved in zip(stepper.loss.buffers(), buffers, strict=True):
        assert torch.equal(buffer, saved)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])


@pytest.mark.parametrize("cudagraph", [False, True])
def test_an_update_waits_for_nothing(cudagraph):
    stepper, batch = cuda_stepper(cudagraph=cudagraph), cuda_batch()
    stepper.step(None, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = stepper.step(None, batch)
        with pytest.raises(RuntimeError, match="synchronizing"):
            metrics["loss_model"].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_updates_go_on_from_a_loaded_state():
    uninterrupted, other = cuda_stepper(), cuda_stepper()
    run_updates(uninterrupted, range(2), cuda_batch)
    states = uninterrupted.loss.state_dict(), uninterrupted.state_dict()
    states = copy.deepcopy(states)
    run_updates(other, range(1), cuda_batch)
    other.loss.load_state_dict(states[0])
    other.load_state_dict(states[1])
    for stepper in (uninterrupted, other):
        run_updates(stepper, range(2, 4), cuda_batch)
    assert_same(values_of(uninterrupted), values_of(other), 1e-5)
    assert other.optimizer_step_count == 4


@pytest.mark.parametrize("term", BAD)
def test_a_failure_in_a_captured_update(term):
    stepper = cuda_stepper()
    run_updates(stepper, range(2), lambda: make_batch(2).to("cuda"))
    stepper.step(None, bad_batch(term).to("cuda"))
    before = values_of(stepper)
    run_updates(stepper, range(2), lambda: make_batch(2).to("cuda"))
    assert changed(before, values_of(stepper)) == set()
    with pytest.raises(NonFiniteError) as caught:
        stepper.raise_if_nonfinite()
    assert (caught.value.term, caught.value.step) == (term, 3)


UNCAPTURABLE = """
from tests.training.test_modes_gpu import cuda_batch, cuda_stepper
stepper = cuda_stepper()
actor_loss = stepper.loss.actor_loss

def reading(batch, encoded):
    batch["slice", "action"].sum().item()
    return actor_loss(batch, encoded)

stepper.loss.actor_loss = reading
stepper.step(None, cuda_batch())
"""


def test_an_update_that_reads_from_the_device_is_refused():
    # In a process of its own, which a failed capture may leave unusable.
    result = subprocess.run(
        [sys.executable, "-c", UNCAPTURABLE],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert "RuntimeError: the update cannot be captured" in result.stderr


class OnCuda(parity.Parity):
    """A recording of which only norms, parameters and the bound are compared.

    A captured update cannot be watched from inside.
    """

    def __init__(self, path, **kwargs):
        super().__init__(path)
        for method in parity.GROUPS:
            delattr(self.loss, method)
        self.stepper = ALMOptimizationStepper(self.loss, **kwargs)
        # Its targets are copies now.
        self._load("init")

    def _loss(self):
        return super()._loss().to("cuda")

    def _batch(self, update):
        return super()._batch(update).to("cuda")

    def _compare(self, key, value):
        super()._compare(key, value.cpu())


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("cudagraph", [False, True])
def test_recorded_numbers(path, cudagraph):
    differences = OnCuda(str(path), cudagraph=cudagraph).run()
    assert {"grad_norm_actor", "after3", "lower_bound"} <= differences.keys()
    # A NaN is not small either.
    assert all(value <= parity.BOUND for value in differences.values()), differences


def test_a_trainer_captures(tmp_path):
    env = Counter()
    trainer, _ = build(env, tiny_loss(env).to("cuda"), checkpoint_dir=tmp_path)
    assert trainer.optimization_stepper.cudagraph
    trainer.train()
    env = Counter()
    resumed, _ = build(env, tiny_loss(env).to("cuda"), total_steps=15)
    resumed.load_from_file(trainer.checkpoint_rotation.latest())
    resumed.train()
    assert resumed.optimization_stepper.optimizer_step_count == 15
    resumed.optimization_stepper.raise_if_nonfinite()
