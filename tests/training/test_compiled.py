"""The update as one graph: recorded, and in slow tests compiled."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch._dynamo.utils import counters

from alm_torchrl import ALMOptimizationStepper, NonFiniteError
from alm_torchrl.networks import make_decoder, make_reward
from alm_torchrl.objectives import (
    Consistency,
    EntropyBonus,
    InfoNCE,
    Logarithms,
    QValueObjective,
    Reconstruction,
    RewardFidelity,
    ScaledObjective,
    ValuePrediction,
)
from alm_torchrl.training import compiled as compiled_updates
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
    variant,
)
from tests.training.stepping import (
    assert_same,
    bad_batch,
    changed,
    make_stepper,
    run_updates,
    values_of,
    without_reading,
)


def decoder():
    return make_decoder(OBSERVATION, latent_dim=LATENT, hidden_dim=HIDDEN)


VARIANTS = {
    "paper": dict,
    "entropy": lambda: {"entropy": EntropyBonus()},
    "decoder": lambda: {"model_terms": [Reconstruction(decoder())]},
    "value": lambda: {"model_terms": [ValuePrediction("model")]},
    "logarithms": lambda: {"logarithms": Logarithms("model")},
    "qvalue": lambda: {"policy_objective": QValueObjective()},
    "self-prediction": lambda: {
        "model_terms": [Consistency(), RewardFidelity(), InfoNCE()],
        "policy_objective": ScaledObjective(QValueObjective()),
        **{"latent": "simnorm", "latent_dim": 8, "normalize": True, "layer_norm": True},
    },
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def recorded(monkeypatch):
    """Has graphs run operation by operation, which needs no compiler."""
    graphs = []

    def keep(graph, example):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(compiled_updates, "compile_graph", keep)
    return graphs


def pair(loss=None, **kwargs):
    """An eager stepper and a compiled one with the same parameters."""
    loss = make_loss(updater=False) if loss is None else loss
    kwargs = {"lr": 1e-3, **kwargs}
    eager = ALMOptimizationStepper(loss, **kwargs)
    other = ALMOptimizationStepper(copy.deepcopy(loss), compile=True, **kwargs)
    return eager, other


def assert_equal_updates(eager, other, make=make_batch, atol=1e-5, updates=4):
    runs = [run_updates(stepper, range(updates), make) for stepper in (eager, other)]
    for left, right in zip(*runs, strict=True):
        assert_same(dict(left.items()), dict(right.items()), atol)
    assert_same(values_of(eager), values_of(other), atol)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.slow if name == "entropy" else pytest.mark.exhaustive,
        )
        for name in VARIANTS
    ],
)
def test_the_graph_is_the_eager_update(name, recorded):
    loss = make_loss(updater=False, **VARIANTS[name]())
    assert_equal_updates(*pair(loss))
    assert len(recorded) == 1


@pytest.mark.exhaustive
def test_decay_of_weights_and_rate(recorded):
    assert_equal_updates(*pair(weight_decay=0.1, lr_final=1e-4, lr_steps=3))


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_plain_slices_and_precisions(precision, recorded):
    steppers = pair(precision=precision)
    atol = 1e-5 if precision == "fp32" else 0.05
    assert_equal_updates(*steppers, make=lambda: make_rows(B, K), atol=atol)


@pytest.mark.exhaustive
def test_recording_leaves_no_trace(recorded):
    _, stepper = pair()
    batch = make_batch()
    before, state = values_of(stepper), torch.get_rng_state()
    stepper._run._compile(batch)
    after = values_of(stepper)
    assert changed(before, {name: after[name] for name in before}) == set()
    assert not any(after[name].any() for name in after if name not in before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in stepper.loss.parameters())


def new_rate(stepper):
    for optimizer in stepper.optimizers.values():
        optimizer.param_groups[0]["lr"] = 3e-2


def new_eps(stepper):
    stepper.optimizers["qvalue_loss"].param_groups[0]["eps"] = 0.1


def new_coefficient(stepper):
    stepper.loss.kl_coef = 0.1


def frozen_encoder(stepper):
    for parameter in stepper.loss.encoder_params.parameters():
        parameter.requires_grad_(False)


def loaded(stepper):
    torch.manual_seed(9)
    other = make_stepper(lr=1e-3)
    run_updates(other, range(3))
    stepper.loss.load_state_dict(other.loss.state_dict())
    stepper.load_state_dict(copy.deepcopy(other.state_dict()))


def loaded_optimizer(stepper):
    optimizer = stepper.optimizers["model_loss"]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for state in optimizer.state.values():
        state["exp_avg_sq"].add_(1.0)


@pytest.mark.parametrize(
    ("change", "recordings"),
    [
        pytest.param(new_rate, 1, marks=pytest.mark.slow),
        pytest.param(loaded, 2, marks=pytest.mark.slow),
        pytest.param(new_coefficient, 2, marks=pytest.mark.slow),
        pytest.param(frozen_encoder, 2, marks=pytest.mark.exhaustive),
        pytest.param(new_eps, 2, marks=pytest.mark.exhaustive),
        pytest.param(loaded_optimizer, 1, marks=pytest.mark.exhaustive),
    ],
)
def test_what_changes_between_updates_is_followed(change, recordings, recorded):
    eager, other = pair()
    assert_equal_updates(eager, other, updates=2)
    for stepper in (eager, other):
        change(stepper)
    assert_equal_updates(eager, other, updates=2)
    assert len(recorded) == recordings


@pytest.mark.exhaustive
@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_other_forms_of_adam_are_refused(option, recorded):
    _, stepper = pair()
    stepper.optimizers["qvalue_loss"].param_groups[0][option] = True
    with pytest.raises((RuntimeError, KeyError), match=f"{option}|exp_avg_sq"):
        stepper.step(None, make_batch())


@pytest.mark.exhaustive
@pytest.mark.parametrize("values", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf)])
def test_a_value_that_one_update_lacks_is_a_difference(values, recorded):
    _, stepper = pair()
    metrics, expected = ({"x": torch.tensor(value)} for value in values)
    with pytest.raises(RuntimeError, match="differs from the eager update: x"):
        stepper._run._compared(metrics, expected)
    assert stepper._run._compared(metrics, metrics) is metrics


@pytest.mark.exhaustive
def test_a_loss_in_another_precision_is_recorded_anew(recorded):
    _, stepper = pair()
    stepper.step(None, make_batch())
    stepper.loss.double()
    with pytest.raises(ValueError, match=r"type of its parameters, torch\.float64"):
        stepper.step(None, make_batch())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda: make_batch()[:-1], r"expected .* as in the first batch"),
        (lambda: make_batch().exclude(("slice", "next", "reward")), "got None"),
        (lambda: make_batch().double(), "torch.float64"),
    ],
)
def test_a_batch_unlike_the_first_is_refused(batch, message, recorded):
    _, stepper = pair()
    stepper.step(None, make_batch())
    before = values_of(stepper)
    with pytest.raises(ValueError, match=f"{message}.*compile=False takes any batch"):
        stepper.step(None, batch())
    assert changed(before, values_of(stepper)) == set()


@pytest.mark.exhaustive
@pytest.mark.parametrize("bad", ["loss_model", "loss_reward"])
def test_a_step_that_is_not_finite_changes_nothing(bad, recorded):
    eager, other = pair()
    for stepper in (eager, other):
        run_updates(stepper, range(3))
        with without_reading(stepper):
            torch.manual_seed(3)
            stepper.step(None, bad_batch(bad, B))
        with pytest.raises(NonFiniteError, match=f"{bad} was not finite in update 4"):
            stepper.raise_if_nonfinite()
    assert_same(values_of(eager), values_of(other), 1e-5)


class Annealed(nn.Module):
    """Multiplies by a number that changes in Python."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0.1 * self.calls)


class Reading(nn.Module):
    def forward(self, x):
        return x * x.abs().max().item()


def with_layer(layer):
    """A loss whose reward network has another last layer."""
    loss = make_loss(updater=False)
    reward = make_reward(ACTION, latent_dim=LATENT, hidden_dim=HIDDEN)
    keys = reward.in_keys, reward.out_keys
    last = TensorDictModule(layer, reward.out_keys, reward.out_keys)
    reward = TensorDictSequential(reward, last)
    assert (reward.in_keys, reward.out_keys) == keys
    return variant(loss, reward=reward)


@pytest.mark.slow
def test_numbers_that_change_in_python_are_refused(recorded):
    _, stepper = pair(with_layer(Annealed()))
    stepper.step(None, make_batch())
    with pytest.raises(
        RuntimeError, match=r"compile: the graph differs .*compile=False"
    ):
        run_updates(stepper, range(2))


@pytest.mark.slow
def test_a_network_that_reads_values_is_refused(recorded):
    _, stepper = pair(with_layer(Reading()))
    before = values_of(stepper)
    with pytest.raises(RuntimeError, match=r"^compile: .*compile=False runs it as it"):
        stepper.step(None, make_batch())
    after = values_of(stepper)
    assert changed(before, {name: after[name] for name in before}) == set()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param("paper", "fp32", marks=pytest.mark.slow),
        pytest.param("paper", "bf16", marks=pytest.mark.exhaustive),
        *(
            pytest.param(name, "fp32", marks=pytest.mark.exhaustive)
            for name in VARIANTS
            if name != "paper"
        ),
    ],
)
def test_the_compiled_update_is_the_eager_one(name, precision):
    loss = make_loss(updater=False, **VARIANTS[name]())
    eager, other = pair(loss, precision=precision)
    # In bf16 the compiler keeps fp32 between operations that it fuses.
    assert_equal_updates(eager, other, atol=1e-4 if precision == "fp32" else 0.05)
    # Compiled anew from a saved state, it goes on bit by bit.
    again = ALMOptimizationStepper(
        copy.deepcopy(other.loss), lr=1e-3, precision=precision, compile=True
    )
    again.loss.load_state_dict(other.loss.state_dict())
    again.load_state_dict(copy.deepcopy(other.state_dict()))
    hits = counters["inductor"]["fxgraph_cache_hit"]
    left, right = (run_updates(stepper, range(2)) for stepper in (other, again))
    assert counters["inductor"]["fxgraph_cache_hit"] == hits + 1
    for one, two in zip(left, right, strict=True):
        assert changed(dict(one.items()), dict(two.items())) == set()
    assert changed(values_of(other), values_of(again)) == set()
