"""One update of the stepper: order, sizes of the steps, saved state, precision."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from torchrl.checkpoint import Checkpoint

from alm_torchrl import ALMOptimizationStepper
from alm_torchrl.networks.layers import OrthogonalLinear, OutputLinear
from tests.helpers import B, K, make_batch, make_loss, make_rows, targets
from tests.training.stepping import (
    CHECKED,
    PARTS,
    TARGETS,
    Watch,
    changed,
    make_stepper,
    part_parameters,
    train,
    values_of,
)

METRICS = {
    "kl",
    "model_reward",
    "terminal_value",
    "classifier_accuracy",
    "pred_value",
    "target_value",
    "td_error",
    "imagined_reward",
    "imagined_log_ratio",
    "imagined_value",
    "lambda_return",
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# -- groups, order and size of the steps ----------------------------------------------


def test_four_optimizers_share_all_online_parameters():
    stepper = make_stepper()
    assert list(stepper.optimizers) == list(PARTS)
    seen = []
    for method, parts in PARTS.items():
        optimizer = stepper.optimizers[method]
        assert type(optimizer) is torch.optim.Adam
        [group] = optimizer.param_groups
        expected = [p for part in parts for p in part_parameters(stepper.loss, part)]
        assert {id(p) for p in group["params"]} == {id(p) for p in expected}
        assert len(group["params"]) == len(expected)
        assert group["lr"] == 1e-4
        assert group["betas"] == (0.9, 0.999)
        assert group["eps"] == 1e-8
        assert group["weight_decay"] == 0
        assert not group["amsgrad"]
        seen += [id(p) for p in group["params"]]
    assert len(seen) == len(set(seen))
    assert set(seen) == {id(p) for p in stepper.loss.parameters() if p.requires_grad}


def test_each_step_sees_the_earlier_ones_and_targets_move_last():
    stepper = make_stepper(lr=1e-2)
    stepper.step(None, make_batch())
    watch = Watch(stepper)
    before = values_of(stepper)
    watch.step(make_batch())
    assert watch.methods == list(PARTS)
    states = [*watch.found, values_of(stepper)]
    assert changed(before, states[0]) == set()
    for (method, parts), old, new in zip(
        PARTS.items(), states[:-1], states[1:], strict=True
    ):
        last = method == "actor_loss"
        assert changed(old, new) == {method, *parts} | (set(TARGETS) if last else set())


def test_losses_read_the_parameters_of_their_moment():
    """With frozen noise, later losses differ from those before any step."""
    stepper = make_stepper(lr=1e-2)
    batch = make_batch()

    def losses_now():
        torch.manual_seed(1)
        return stepper.loss(batch)

    old = losses_now()
    torch.manual_seed(1)
    metrics = stepper.step(None, batch)
    # The rewards and the critics' targets do not depend on the steps before.
    for name in ("loss_model", "loss_reward", "loss_qvalue"):
        assert metrics[name] == old[name], name
    # The classifier imagines with the new model, the policy with all the new parts.
    for name in ("loss_classifier", "loss_actor"):
        assert abs(metrics[name] - old[name]) > 1e-4, name


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_first_step_has_the_size_of_lr(lr):
    stepper = make_stepper(lr=lr)
    before = values_of(stepper)
    stepper.step(None, make_batch())
    after = values_of(stepper)
    for parts in PARTS.values():
        for part in parts:
            # Adam's first step is lr in each entry that has a gradient.
            steps = [
                (after[name] - before[name]).abs().max().item()
                for name in before
                if name.split()[0] == part
            ]
            assert max(steps) == pytest.approx(lr, rel=1e-2)


@pytest.mark.parametrize(
    ("scale", "clip_norm", "bites"),
    [(1.0, 100.0, False), (1e5, 100.0, True), (1.0, 1e-3, True)],
)
def test_clip_norm(scale, clip_norm, bites):
    stepper = make_stepper(clip_norm=clip_norm)

    def scaled(method, value, metadata):
        return value * scale, metadata

    metrics = Watch(stepper, scaled).step(make_batch())
    for method, optimizer in stepper.optimizers.items():
        norm = metrics[f"grad_norm_{method.removesuffix('_loss')}"]
        assert bool(norm > clip_norm) == bites, method
        averages = [state["exp_avg"] for state in optimizer.state.values()]
        used = torch.stack([a.norm() for a in averages]).norm() / (1 - 0.9)
        assert used.item() == pytest.approx(min(norm.item(), clip_norm), rel=1e-4)


@pytest.mark.parametrize(("kwargs", "tau"), [({}, 0.005), ({"tau": 0.5}, 0.5)])
def test_targets_move_by_tau(kwargs, tau):
    stepper = make_stepper(lr=1e-2, **kwargs)
    before = {k: v.clone() for k, v in targets(stepper.loss).items()}
    stepper.step(None, make_batch())
    online = dict(stepper.loss.named_parameters())
    for name, target in targets(stepper.loss).items():
        expected = before[name] + tau * (online[name] - before[name])
        torch.testing.assert_close(target, expected)
        assert not torch.equal(target, before[name])


# -- what goes in and comes out -------------------------------------------------------


@pytest.mark.parametrize("make", [make_batch, lambda: make_rows(B, K)])
def test_metrics_are_the_same_detached_scalars_in_each_update(make):
    stepper = make_stepper()
    keys = []
    for n in range(1, 4):
        metrics = stepper.step(None, make())
        assert stepper.optimizer_step_count == n
        keys.append(list(metrics.keys()))
        for value in metrics.values():
            assert value.shape == ()
            assert not value.requires_grad
            assert value.isfinite()
    assert keys[0] == keys[1] == keys[2]
    assert set(keys[0]) == {*METRICS, *CHECKED}


def test_without_a_classifier():
    stepper = ALMOptimizationStepper(make_loss(updater=False, classifier_coef=0.0))
    metrics = stepper.step(None, make_batch())
    absent = {"loss_classifier", "classifier_accuracy", "imagined_log_ratio"}
    assert set(metrics.keys()) == {*METRICS, *CHECKED} - absent
    [group] = stepper.optimizers["reward_classifier_loss"].param_groups
    assert len(group["params"]) == len(part_parameters(stepper.loss, "reward"))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"lr": 0.0}, "lr: expected a number > 0, got 0.0"),
        ({"lr": math.nan}, "lr: expected a number > 0, got nan"),
        ({"clip_norm": -1.0}, "clip_norm: expected a number > 0, got -1.0"),
        ({"tau": 0.0}, "tau: expected a number > 0 and <= 1, got 0.0"),
        ({"tau": 1.5}, "tau: expected a number > 0 and <= 1, got 1.5"),
        ({"precision": "fp16"}, "precision: expected 'fp32' or 'tf32' or 'bf16'"),
    ],
)
def test_argument_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        ALMOptimizationStepper(make_loss(updater=False), **kwargs)


# -- saved state ----------------------------------------------------------------------


@pytest.mark.parametrize("saved_by", ["torch", "checkpoint"])
def test_loaded_stepper_continues_as_if_nothing_happened(saved_by, tmp_path):
    uninterrupted = make_stepper(lr=1e-2)
    train(uninterrupted, range(2))
    resumed = make_stepper(lr=1e-2)
    if saved_by == "torch":
        buffer = io.BytesIO()
        states = [uninterrupted.loss.state_dict(), uninterrupted.state_dict()]
        torch.save(states, buffer)
        buffer.seek(0)
        states = torch.load(buffer, weights_only=True)
        resumed.loss.load_state_dict(states[0])
        resumed.load_state_dict(states[1])
    else:
        Checkpoint(loss=uninterrupted.loss, stepper=uninterrupted).save(tmp_path / "c")
        Checkpoint(loss=resumed.loss, stepper=resumed).load(tmp_path / "c")
    assert changed(values_of(uninterrupted), values_of(resumed)) == set()
    middle = values_of(resumed)
    train(uninterrupted, range(2, 4))
    # What was loaded is not shared with what was saved.
    assert changed(middle, values_of(resumed)) == set()
    train(resumed, range(2, 4))
    assert changed(values_of(uninterrupted), values_of(resumed)) == set()
    assert len(changed(middle, values_of(resumed))) == 12
    assert resumed.optimizer_step_count == 4


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda stepper: pickle.loads(pickle.dumps(stepper)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_goes_on_alike_and_on_its_own(copied):
    stepper = make_stepper(lr=1e-3, tau=0.1, clip_norm=5.0)
    train(stepper, range(2))
    other = copied(stepper)
    before = values_of(stepper)
    train(other, range(2, 4))
    assert changed(before, values_of(stepper)) == set()
    assert changed(before, values_of(other)) == {*sum(PARTS.values(), ()), *TARGETS} | {
        *PARTS
    }
    train(stepper, range(2, 4))
    assert changed(values_of(stepper), values_of(other)) == set()
    assert stepper.optimizer_step_count == other.optimizer_step_count == 4


def test_state_holds_plain_data():
    stepper = make_stepper()
    train(stepper, range(1))

    def check(value):
        if isinstance(value, dict):
            for key, entry in value.items():
                assert isinstance(key, str | int)
                check(entry)
        elif isinstance(value, list | tuple):
            for entry in value:
                check(entry)
        else:
            assert value is None or isinstance(value, torch.Tensor | int | float | str)

    state = stepper.state_dict()
    assert set(state["optimizers"]) == set(PARTS)
    check(state)


# -- reduced precision ----------------------------------------------------------------


def outputs_of(stepper, kind):
    """Data types of the outputs of all layers of a kind in one update."""
    seen = set()
    handles = [
        module.register_forward_hook(lambda m, i, output: seen.add(output.dtype))
        for part in sum(PARTS.values(), ())
        for module in getattr(stepper.loss, part).modules()
        if type(module) is kind
    ]
    assert handles
    torch.manual_seed(1)
    metrics = stepper.step(None, make_batch(64))
    for handle in handles:
        handle.remove()
    return seen, metrics


def test_bf16_is_near_fp32_and_only_inside_the_hidden_layers():
    results = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        stepper = make_stepper(precision=precision)
        hidden, metrics = outputs_of(stepper, OrthogonalLinear)
        last, _ = outputs_of(stepper, OutputLinear)
        expected = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        assert hidden == {expected}
        assert last == {torch.float32}
        results[precision] = metrics
        assert all(value.dtype == torch.float32 for value in metrics.values())
        for value in values_of(stepper).values():
            assert value.dtype == torch.float32
    full, reduced = results["fp32"], results["bf16"]
    for name in CHECKED:
        assert reduced[name].item() == pytest.approx(full[name].item(), rel=0.05), name
        assert reduced[name] != full[name], name
