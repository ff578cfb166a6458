"""The modes of an update: eager, compiled, captured; and that none wastes work."""

from __future__ import annotations

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
    make_stepper,
)


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
