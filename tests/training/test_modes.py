"""The modes of an update: eager, compiled, captured; and that none wastes work."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from alm_torchrl import ALMOptimizationStepper
from alm_torchrl.training import update
from tests import parity
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
    targets,
)
from tests.training import resume_runs
from tests.training.resume_runs import WARMUP
from tests.training.stepping import PARTS, changed, make_stepper, values_of
from tests.training.trainer_runs import counter_trainer, differing, tensors

TERMS = ["encode_transitions", *PARTS]
RECORDINGS = sorted((Path(__file__).parents[1] / "data").glob("authors_*.npz"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def run_updates(stepper, updates, make=make_batch):
    """Updates on batches and with noise of their own seeds; returns the metrics."""
    results = []
    for n in updates:
        torch.manual_seed(n)
        results.append(stepper.step(None, make()))
    return results


def assert_same(one, other, atol=0.0):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=atol, atol=atol, msg=name)


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


@pytest.mark.parametrize("make", [make_batch, lambda: make_rows(B, K)])
def test_terms_draw_the_same_from_shared_distributions(make):
    loss, batch = make_loss(), make()
    shared = loss.encode_transitions(batch)
    for method in ("reward_classifier_loss", "qvalue_loss", "actor_loss"):
        torch.manual_seed(1)
        value, metadata = getattr(loss, method)(batch)
        torch.manual_seed(1)
        again, other = getattr(loss, method)(batch, shared)
        assert metadata.keys() == other.keys()
        # Rows that are encoded alone round differently.
        torch.testing.assert_close(again, value)


def test_distributions_of_another_kind_are_shared_too():
    loss, batch = make_loss(), make_batch()
    loss.encoder[-1].distribution_class = OtherNormal
    encoded = loss.encode_transitions(batch)
    assert isinstance(encoded.now, OtherNormal)
    torch.manual_seed(1)
    expected, _ = loss.reward_classifier_loss(batch)
    torch.manual_seed(1)
    value, _ = loss.reward_classifier_loss(batch, encoded)
    torch.testing.assert_close(value, expected)


class OtherNormal(update.torch.distributions.Independent):
    def __init__(self, loc, scale, **kwargs):
        super().__init__(torch.distributions.Normal(loc, scale), 1)


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("make", [make_batch, lambda: make_rows(B, K)])
def test_an_update_waits_for_nothing(make, precision, monkeypatch):
    stepper, batch = make_stepper(precision=precision), make()
    monkeypatch.setattr(stepper, "raise_if_nonfinite", lambda: None)
    with Waits() as waits:
        metrics = stepper.step(None, batch)
        assert waits.found == []
        metrics["loss_model"].item()
    assert waits.found == ["_local_scalar_dense"]


# -- arguments ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"cudagraph": True}, ValueError, "cudagraph: True expects .* CUDA .* got cpu"),
        ({"precision": "tf32"}, ValueError, "precision: 'tf32' expects .* got cpu"),
        ({"compile": "yes"}, TypeError, "compile: expected bool, got str"),
        ({"cudagraph": 1}, TypeError, "cudagraph: expected bool, got int"),
    ],
)
def test_argument_errors(kwargs, error, match):
    with pytest.raises(error, match=match):
        ALMOptimizationStepper(make_loss(updater=False), **kwargs)
    with pytest.raises(ValueError, match=r"loss: .* got reduction='none'"):
        ALMOptimizationStepper(make_loss(updater=False, reduction="none"))


def test_defaults_on_a_cpu():
    stepper = make_stepper()
    assert (stepper.compile, stepper.cudagraph, stepper.precision) == (
        False,
        False,
        "fp32",
    )


def test_matrix_products_in_tf32_are_limited_to_the_update():
    before = torch.get_float32_matmul_precision()
    with update._matrix_products("tf32"):
        assert torch.get_float32_matmul_precision() == "high" != before
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(KeyError), update._matrix_products("tf32"):
        raise KeyError
    assert torch.get_float32_matmul_precision() == before
    with update._matrix_products("fp32"):
        assert torch.get_float32_matmul_precision() == before


# -- compiled -------------------------------------------------------------------------


@pytest.fixture
def backend(monkeypatch):
    """Lets terms be compiled by a quicker backend, or not at all."""

    def use(name, calls=None):
        def compiled(method):
            if name is not None:
                return torch.compile(method, backend=name, fullgraph=True)

            def counted(*args):
                calls.append(method.__name__)
                return method(*args)

            return counted

        monkeypatch.setattr(update, "compile_term", compiled)

    yield use
    torch._dynamo.reset()


def test_compiled_terms_replace_those_of_the_loss(backend):
    calls = []
    eager = make_stepper(lr=1e-2)
    backend(None, calls)
    torch.manual_seed(0)
    compiled = make_stepper(lr=1e-2, compile=True)
    assert calls == []
    for n in range(2):
        torch.manual_seed(n)
        expected = eager.step(None, make_batch())
        torch.manual_seed(n)
        assert (expected == compiled.step(None, make_batch())).all()
    assert calls == 2 * [TERMS[1], TERMS[0], *TERMS[2:]]
    assert changed(values_of(eager), values_of(compiled)) == set()


def test_make_trainer_compiles(backend):
    calls = []
    backend(None, calls)
    trainer = counter_trainer(compile=True)
    trainer.train()
    assert trainer.optimization_stepper.compile
    assert len(calls) == 5 * trainer.optimization_stepper.optimizer_step_count
    plain = counter_trainer()
    plain.train()
    assert not plain.optimization_stepper.compile
    states = [tensors(t.loss_module.state_dict()) for t in (trainer, plain)]
    assert differing(*states) == []


def compare_term(method, precision="fp32"):
    """A compiled term against the term: values, metrics and gradients."""
    loss, batch = make_loss(), make_batch()
    params = list(loss.parameters())
    results = []
    for term in (getattr(loss, method), update.compile_term(getattr(loss, method))):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
            value, metadata = term(batch)
        grads = torch.autograd.grad(value, params, allow_unused=True)
        results.append((value, metadata, grads))
    (value, metadata, grads), (other, other_metadata, other_grads) = results
    torch.testing.assert_close(other, value)
    assert_same(metadata, other_metadata, 1e-5)
    assert [g is None for g in grads] == [g is None for g in other_grads]
    for ours, theirs in zip(grads, other_grads, strict=True):
        if ours is not None:
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)


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
        losses = [make_loss(updater=False) for _ in range(2)]
        for loss in losses:
            for method in (loss.reward_loss, loss.classifier_loss):
                value, _ = update.compile_term(method)(make_batch())
                assert value.requires_grad
    torch._dynamo.reset()


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("method", ["reward_loss", "classifier_loss", *TERMS[1:]])
def test_each_term_compiles_to_one_graph(backend, method):
    backend("aot_eager")
    compare_term(method)


@pytest.mark.timeout(1800)
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
    batches = [run_updates(stepper, range(3)) for stepper in (eager, compiled)]
    # In bf16 the compiler keeps fp32 between operations that it fuses.
    atol = 1e-4 if precision == "fp32" else 0.05
    for left, right in zip(*batches, strict=True):
        assert_same(dict(left.items()), dict(right.items()), atol)
    assert_same(values_of(eager), values_of(compiled), atol)
    assert len(targets(compiled.loss)) > 0
    # A saved state goes on in the other mode.
    eager.loss.load_state_dict(compiled.loss.state_dict())
    eager.load_state_dict(copy.deepcopy(compiled.state_dict()))
    left, right = (run_updates(s, [3])[0] for s in (eager, compiled))
    assert_same(dict(left.items()), dict(right.items()), atol)
    torch._dynamo.reset()


class Unwatched(parity.Parity):
    """A recording replayed without a look at what is inside an update."""

    def __init__(self, path, **kwargs):
        super().__init__(path)
        for method in parity.GROUPS:
            delattr(self.loss, method)
        self.stepper = ALMOptimizationStepper(self.loss, **kwargs)
        # Its targets are copies now.
        self._load("init")

    def run(self):
        names = {"loss_model": "loss_encoder_model"}
        names |= {f"grad_norm_{m[:-5]}": f"grad_norm_{n}" for m, (n, _) in GROUPS}
        for number in range(self.updates):
            self.update = number
            metrics = self.stepper.step(None, self._batch(number))
            for name, value in metrics.items():
                if name.startswith(("loss_", "grad_norm_")):
                    self._compare(f"update{number}/{names.get(name, name)}", value)
            for net in self._nets():
                for key, param in self._parameters(net).items():
                    self._compare(f"after{number + 1}/{net}/{key}", param)
        return dict(self.differences)


GROUPS = parity.GROUPS.items()


def check_parity(path, **kwargs):
    differences = Unwatched(str(path), **kwargs).run()
    assert len(differences) == 12
    for group, difference in differences.items():
        assert difference <= parity.BOUND, group


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_recorded_numbers_unwatched(path):
    check_parity(path)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_recorded_numbers_compiled(path, backend):
    backend("aot_eager")
    check_parity(path, compile=True)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_a_compiled_run_continues(backend, tmp_path):
    backend("aot_eager")
    check_continued(tmp_path, compile=True)


def test_a_run_continues(backend, tmp_path):
    backend(None, [])
    check_continued(tmp_path, compile=True)


def check_continued(folder, **options):
    """A run that is stopped and continued ends near an eager one that is not."""
    options = {"total_steps": 12, "eval_interval": 100, **options}
    resume_runs.train(folder / "a", "Pendulum-v1", stop=WARMUP + 5, **options)
    stopped = resume_runs.final(folder / "a")
    resume_runs.train(folder / "a", "Pendulum-v1", **options)
    resume_runs.train(folder / "b", "Pendulum-v1", **{**options, "compile": False})
    states = [resume_runs.final(folder / name) for name in "ab"]
    for count, state in ((5, stopped), (12, states[0])):
        assert state["/stepper/count"] == count
    trained = [
        {k: v for k, v in state.items() if k.startswith(("/loss/", "/stepper/"))}
        for state in states
    ]
    assert_same(*trained, 1e-4)
