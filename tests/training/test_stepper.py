"""One update of the stepper: order, clipping, saved state, precision."""

from __future__ import annotations

import copy
import io
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


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# -- groups, order and size of the steps -----------------------------------------------


def test_four_optimizers_share_all_online_parameters():
    stepper = make_stepper()
    assert list(stepper.optimizers) == list(PARTS)
    seen = []
    for method, parts in PARTS.items():
        optimizer = stepper.optimizers[method]
        assert type(optimizer) is torch.optim.AdamW
        [group] = optimizer.param_groups
        expected = [p for part in parts for p in part_parameters(stepper.loss, part)]
        assert {id(p) for p in group["params"]} == {id(p) for p in expected}
        settings = [group[name] for name in ("lr", "betas", "eps", "weight_decay")]
        assert settings == [1e-4, (0.9, 0.999), 1e-8, 0]
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


@pytest.mark.parametrize(
    ("scale", "clip_norm", "bites"),
    [(1.0, 100.0, False), (1e5, 100.0, True), (1.0, 1e-3, True)],
)
def test_gradients_are_clipped_and_targets_move_by_tau(scale, clip_norm, bites):
    stepper = make_stepper(lr=1e-2, clip_norm=clip_norm, tau=0.5)
    before = {k: v.clone() for k, v in targets(stepper.loss).items()}
    watch = Watch(stepper, lambda _, value, metadata: (value * scale, metadata))
    metrics = watch.step(make_batch())
    for method, optimizer in stepper.optimizers.items():
        norm = metrics[f"grad_norm_{method.removesuffix('_loss')}"]
        assert bool(norm > clip_norm) == bites, method
        averages = [state["exp_avg"] for state in optimizer.state.values()]
        used = torch.stack([a.norm() for a in averages]).norm() / (1 - 0.9)
        assert used.item() == pytest.approx(min(norm.item(), clip_norm), rel=1e-4)
    online = dict(stepper.loss.named_parameters())
    for name, target in targets(stepper.loss).items():
        torch.testing.assert_close(target, (before[name] + online[name]).detach() / 2)


def test_weights_decay_beside_the_gradient():
    stepper = make_stepper(lr=1e-2, weight_decay=0.1)
    plain = copy.deepcopy(stepper)
    for optimizer in plain.optimizers.values():
        optimizer.param_groups[0]["weight_decay"] = 0.0
    before = {k: v.clone() for k, v in plain.loss.named_parameters()}
    batch = make_batch()
    # The first step only: the later ones see other networks.
    for each in (stepper, plain):
        torch.manual_seed(1)
        Watch(each).step(batch)
    decayed = dict(stepper.loss.named_parameters())
    for name, value in plain.loss.named_parameters():
        if name.startswith(("encoder_params", "model_params")):
            torch.testing.assert_close(
                decayed[name], value - 1e-2 * 0.1 * before[name], rtol=0, atol=1e-6
            )


def test_the_learning_rate_falls_linearly():
    stepper = make_stepper(lr=1e-2, lr_final=2e-3, lr_steps=4)
    rates = []
    for _ in range(6):
        stepper.step(None, make_batch())
        rates += [[o.param_groups[0]["lr"] for o in stepper.optimizers.values()]]
    expected = [1e-2, 8e-3, 6e-3, 4e-3, 2e-3, 2e-3]
    assert rates == [pytest.approx([rate] * 4) for rate in expected]


# -- what goes in and comes out --------------------------------------------------------


@pytest.mark.parametrize("coef", [0.1, 0.0])
@pytest.mark.parametrize("make", [make_batch, lambda: make_rows(B, K)])
def test_metrics_are_the_same_detached_scalars_in_each_update(make, coef):
    loss = make_loss(updater=False, classifier_coef=coef)
    stepper = ALMOptimizationStepper(loss)
    norms = {name for name in CHECKED if name.startswith("grad_norm")}
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
    assert set(keys[0]) == {*loss.out_keys, *norms}
    [group] = stepper.optimizers["reward_classifier_loss"].param_groups
    parts = ["reward", "classifier"] if coef else ["reward"]
    expected = [p for part in parts for p in part_parameters(loss, part)]
    assert len(group["params"]) == len(expected)


# -- saved state -----------------------------------------------------------------------


@pytest.mark.parametrize("saved_by", ["torch", "checkpoint"])
def test_loaded_stepper_continues_as_if_nothing_happened(saved_by, tmp_path):
    uninterrupted = make_stepper(lr=1e-2)
    train(uninterrupted, range(2))
    resumed = make_stepper(lr=1e-2)
    if saved_by == "torch":
        buffer = io.BytesIO()
        torch.save(
            [uninterrupted.loss.state_dict(), uninterrupted.state_dict()], buffer
        )
        buffer.seek(0)
        loss_state, state = torch.load(buffer, weights_only=True)
        resumed.loss.load_state_dict(loss_state)
        resumed.load_state_dict(state)
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
    assert changed(middle, values_of(resumed)) == {n.split()[0] for n in middle}
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
    assert changed(before, values_of(other)) == {name.split()[0] for name in before}
    train(stepper, range(2, 4))
    assert changed(values_of(stepper), values_of(other)) == set()
    assert stepper.optimizer_step_count == other.optimizer_step_count == 4


# -- reduced precision -----------------------------------------------------------------


def outputs_of(stepper, kind):
    """Data types of the outputs of all layers of a kind in one update."""
    seen = set()
    handles = [
        module.register_forward_hook(lambda m, i, output: seen.add(output.dtype))
        for part in sum(PARTS.values(), ())
        for module in getattr(stepper.loss, part).modules()
        if type(module) is kind
    ]
    torch.manual_seed(1)
    metrics = stepper.step(None, make_batch(64))
    for handle in handles:
        handle.remove()
    return seen, metrics


def test_bf16_is_near_fp32_and_only_inside_the_hidden_layers():
    results = {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        torch.manual_seed(0)
        stepper = make_stepper(precision=precision)
        hidden, metrics = outputs_of(stepper, OrthogonalLinear)
        last, _ = outputs_of(stepper, OutputLinear)
        assert hidden == {dtype}
        assert last == {torch.float32}
        results[precision] = metrics
        values = [*metrics.values(), *values_of(stepper).values()]
        assert {value.dtype for value in values} == {torch.float32}
    full, reduced = results["fp32"], results["bf16"]
    for name in CHECKED:
        assert reduced[name].item() == pytest.approx(full[name].item(), rel=0.05), name
        assert reduced[name] != full[name], name


@pytest.mark.parametrize("part", ["slice", "transition"])
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda rows: rows.exclude(("next", "reward")), KeyError),
        (lambda rows: rows.exclude(("next", "terminated")), KeyError),
        (lambda rows: rows.exclude(("next", "observation")), KeyError),
        (lambda rows: rows.exclude("observation"), KeyError),
        (
            lambda rows: rows.set(("next", "reward"), rows["next", "reward"] > 0),
            ValueError,
        ),
        (
            lambda rows: rows.set("action", rows["action"].repeat_interleave(2, -1)),
            ValueError,
        ),
        (lambda rows: rows.set("action", rows["action"].double()), ValueError),
        (
            lambda rows: rows.set(
                ("next", "observation"), rows["next", "observation"][..., :1]
            ),
            ValueError,
        ),
        (
            lambda rows: rows.set(
                ("next", "reward"), rows["next", "reward"].expand(*rows.shape, 2)
            ),
            ValueError,
        ),
    ],
)
def test_a_batch_is_checked_whole_before_anything_changes(part, spoil, error):
    stepper = make_stepper()
    batch = make_batch()
    batch[part] = spoil(batch[part])
    before = values_of(stepper)
    try:
        stepper.step(None, batch)
    except error:
        assert changed(before, values_of(stepper)) == set()
        assert stepper.optimizer_step_count == 0
    else:
        # Nothing reads the recorded reward and end of slices.
        assert part == "slice"


@pytest.mark.parametrize("count", [-1, None, float("nan"), True])
def test_a_count_of_updates_that_is_none_is_refused(count):
    stepper = make_stepper()
    before = values_of(stepper)
    with pytest.raises(ValueError, match=r"stepper\.count: expected"):
        stepper.load_state_dict({**stepper.state_dict(), "count": count})
    assert changed(before, values_of(stepper)) == set()
