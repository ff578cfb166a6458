"""The modes of an update: eager, compiled, captured; and that none wastes work."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from alm_torchrl import ALMOptimizationStepper
from alm_torchrl.objectives import EntropyBonus
from alm_torchrl.training import stepper as steppers
from tests.helpers import (
    ACTION,
    HIDDEN,
    LATENT,
    OBSERVATION,
    B,
    K,
    make_batch,
    make_loss,
    make_rows,
)
from tests.training.stepping import (
    PARTS,
    assert_same,
    changed,
    make_stepper,
    run_updates,
    values_of,
)
from tests.training.trainer_runs import counter_trainer


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# -- work -----------------------------------------------------------------------------


def product(*sizes, rows=B):
    return 2 * rows * sum(a * b for a, b in pairwise(sizes))


def trained(*sizes, rows=B):
    """Forward and backward; nobody asks for the gradient of the first input."""
    return 3 * product(*sizes, rows=rows) - product(*sizes[:2], rows=rows)


@pytest.mark.parametrize("given", [True, False])
def test_an_update_multiplies_no_more_than_it_needs(given):
    """Each network once for each input; frozen ones without their own gradients."""
    gaussian = (HIDDEN, HIDDEN, 2 * LATENT)
    encoder, model = (OBSERVATION, *gaussian), (LATENT + ACTION, *gaussian)
    actor = (LATENT, HIDDEN, HIDDEN, ACTION)
    value = (LATENT + ACTION, HIDDEN, HIDDEN, 1)
    classifier = (2 * LATENT + ACTION, HIDDEN, HIDDEN, 2)
    needed = {
        "model_loss": trained(*encoder)
        + 3 * K * product(*model)
        + product(*encoder, rows=K * B)
        + 2 * product(*value, rows=K * B)
        + product(*actor)
        + 2 * 2 * product(*value),
        "encode_transitions": 2 * product(*encoder),
        "reward_classifier_loss": trained(*value)
        + trained(*classifier)
        + product(*model, rows=B if given else B // 2),
        "qvalue_loss": product(*actor) + 2 * product(*value) + 2 * trained(*value),
        "actor_loss": K * trained(*actor)
        + product(*actor)
        + K * 2 * product(*model)
        + 2 * product(*value, rows=K * B)
        + 2 * product(*classifier, rows=K * B)
        + 2 * 2 * product(*value, rows=K * B),
    }
    batch = make_batch()
    if not given:
        del batch["transition", "imagined"]
    stepper = make_stepper()
    with FlopCounterMode(display=False) as counter:
        stepper.step(None, batch)
    assert counter.get_total_flops() == sum(needed.values())


class OtherNormal(torch.distributions.Independent):
    def __init__(self, loc, scale, **kwargs):
        super().__init__(torch.distributions.Normal(loc, scale), 1)


@pytest.mark.parametrize("make", [make_batch, lambda: make_rows(B, K)])
@pytest.mark.parametrize("distribution", [None, OtherNormal])
def test_terms_draw_the_same_from_shared_distributions(make, distribution):
    loss, batch = make_loss(), make()
    if distribution is not None:
        loss.encoder[-1].distribution_class = distribution
    shared = loss.encode_transitions(batch)
    for method in ("reward_classifier_loss", "qvalue_loss", "actor_loss"):
        torch.manual_seed(1)
        value, metadata = getattr(loss, method)(batch)
        torch.manual_seed(1)
        again, other = getattr(loss, method)(batch, shared)
        assert metadata.keys() == other.keys()
        # Rows that are encoded alone round differently.
        torch.testing.assert_close(again, value)


class Waits(TorchDispatchMode):
    """Counts the operations whose results the host must wait for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "masked_select"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("make", "precision", "entropy"),
    [
        (make_batch, "fp32", None),
        (lambda: make_rows(B, K), "bf16", None),
        (make_batch, "fp32", EntropyBonus()),
    ],
)
def test_an_update_waits_for_nothing(make, precision, entropy, monkeypatch):
    loss, batch = make_loss(updater=False, entropy=entropy), make()
    stepper = ALMOptimizationStepper(loss, precision=precision)
    monkeypatch.setattr(stepper, "raise_if_nonfinite", lambda: None)
    with Waits() as waits:
        metrics = stepper.step(None, batch)
        assert waits.found == []
        metrics["loss_model"].item()
    assert waits.found == ["_local_scalar_dense"]


# -- arguments ------------------------------------------------------------------------


def test_defaults_on_a_cpu():
    stepper = make_stepper()
    modes = stepper.compile, stepper.cudagraph, stepper.precision
    assert modes == (False, False, "fp32")


def test_matrix_products_in_tf32_are_limited_to_the_update():
    before = torch.get_float32_matmul_precision()
    with steppers._matrix_products("tf32"):
        assert torch.get_float32_matmul_precision() == "high" != before
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(KeyError), steppers._matrix_products("tf32"):
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
    with steppers._matrix_products("fp32"):
        assert torch.get_float32_matmul_precision() == before


# -- compiled --------------------------------------------------------------------------


@pytest.fixture
def compiled_calls(monkeypatch):
    """Has terms counted where they would be compiled."""
    calls = []

    def counted(method):
        def term(*args):
            calls.append(method.__name__)
            return method(*args)

        return term

    monkeypatch.setattr(steppers, "compile_term", counted)
    return calls


def test_compiled_terms_replace_those_of_the_loss(compiled_calls):
    eager = make_stepper(lr=1e-2)
    torch.manual_seed(0)
    compiled = make_stepper(lr=1e-2, compile=True)
    runs = [run_updates(stepper, range(2)) for stepper in (eager, compiled)]
    for left, right in zip(*runs, strict=True):
        assert (left == right).all()
    first, *others = PARTS
    assert compiled_calls == 2 * [first, "encode_transitions", *others]
    assert changed(values_of(eager), values_of(compiled)) == set()


def test_make_trainer_compiles(compiled_calls):
    trainer = counter_trainer(compile=True)
    trainer.train()
    assert trainer.optimization_stepper.compile
    updates = trainer.optimization_stepper.optimizer_step_count
    assert len(compiled_calls) == 5 * updates
    assert not counter_trainer().optimization_stepper.compile


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_process_can_compile_any_number_of_losses(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda term, *, options, **kwargs: compile(term, backend="eager", **kwargs),
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        # A loss that is gone would not count.
        losses = [make_loss(updater=False) for _ in range(3)]
        for method in (losses[0].qvalue_loss, *(loss.reward_loss for loss in losses)):
            value, _ = steppers.compile_term(method)(make_batch())
            assert value.requires_grad
    torch._dynamo.reset()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "precision",
    [
        pytest.param("fp32", marks=pytest.mark.slow),
        pytest.param("bf16", marks=pytest.mark.exhaustive),
    ],
)
def test_compiled_updates_equal_eager_ones(precision):
    """With the compiler that is used, and the noise of the eager update."""
    eager = make_stepper(lr=1e-3, precision=precision)
    torch.manual_seed(0)
    compiled = make_stepper(lr=1e-3, precision=precision, compile=True)
    runs = [run_updates(stepper, range(3)) for stepper in (eager, compiled)]
    # In bf16 the compiler keeps fp32 between operations that it fuses.
    atol = 1e-4 if precision == "fp32" else 0.05
    for left, right in zip(*runs, strict=True):
        assert_same(dict(left.items()), dict(right.items()), atol)
    assert_same(values_of(eager), values_of(compiled), atol)
    # A saved state goes on in the other mode.
    eager.loss.load_state_dict(compiled.loss.state_dict())
    eager.load_state_dict(copy.deepcopy(compiled.state_dict()))
    left, right = (run_updates(s, [3])[0] for s in (eager, compiled))
    assert_same(dict(left.items()), dict(right.items()), atol)
    torch._dynamo.reset()
