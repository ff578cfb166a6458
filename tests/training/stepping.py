"""Steppers to test, and what an update of theirs changed."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch

from alm_torchrl import ALMOptimizationStepper
from tests.helpers import make_batch, make_loss, part_of, targets

PARTS = {
    "model_loss": ("encoder", "model"),
    "reward_classifier_loss": ("reward", "classifier"),
    "qvalue_loss": ("qvalue",),
    "actor_loss": ("actor",),
}
TARGETS = ("target_encoder", "target_qvalue")
# In the order in which an update checks them.
CHECKED = (
    "loss_model",
    "grad_norm_model",
    "loss_reward",
    "loss_classifier",
    "grad_norm_reward_classifier",
    "loss_qvalue",
    "grad_norm_qvalue",
    "loss_actor",
    "grad_norm_actor",
)

# Terms that data can make not finite, see bad_batch.
BAD = ("loss_model", "loss_reward", "loss_classifier", "grad_norm_reward_classifier")


def make_stepper(device="cpu", **kwargs):
    stepper = ALMOptimizationStepper(make_loss(updater=False).to(device), **kwargs)
    # The stepper made them copies.
    for target in targets(stepper.loss).values():
        target.data.add_(0.05 * torch.randn_like(target))
    return stepper


def part_parameters(loss, part):
    return list(getattr(loss, f"{part}_params").parameters())


def values_of(stepper):
    """Copies of all that an update may change, by name."""
    loss = stepper.loss
    copies = {
        f"{part} {i}": param.detach().clone()
        for part in sum(PARTS.values(), ())
        for i, param in enumerate(part_parameters(loss, part))
    }
    for name, target in targets(loss).items():
        copies[f"target_{part_of(name)} {name}"] = target.clone()
    for name, optimizer in stepper.optimizers.items():
        for i, param in enumerate(optimizer.param_groups[0]["params"]):
            for key, value in optimizer.state[param].items():
                copies[f"{name} {key} {i}"] = value.clone()
    return copies


def changed(before, after):
    """First words of the names of what differs, NaN included."""
    assert before.keys() == after.keys()
    return {
        name.split()[0] for name in before if not torch.equal(before[name], after[name])
    }


class Watch:
    """Makes updates and remembers what each loss found; may spoil its value."""

    def __init__(self, stepper, spoil=None):
        self.stepper = stepper
        self.spoil = spoil
        self.methods = []
        self.found = []

    def step(self, batch):
        loss = self.stepper.loss
        for method in PARTS:
            setattr(loss, method, partial(self._compute, method))
        try:
            return self.stepper.step(None, batch)
        finally:
            for method in PARTS:
                delattr(loss, method)

    def _compute(self, method, *args):
        self.methods.append(method)
        self.found.append(values_of(self.stepper))
        loss = self.stepper.loss
        value, metadata = getattr(type(loss), method)(loss, *args)
        if self.spoil is not None:
            value, metadata = self.spoil(method, value, dict(metadata))
        return value, metadata


@contextmanager
def without_reading(stepper):
    """Updates as on a device where reading the verdict would have to wait."""
    with mock.patch.object(stepper, "raise_if_nonfinite"):
        yield


def train(stepper, updates):
    for n in updates:
        torch.manual_seed(n)
        stepper.step(None, make_batch())


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


def bad_batch(term, size=2):
    """A batch that by itself makes this term the first that is not finite."""
    batch = make_batch(size)
    if term == "loss_model":
        batch["slice", "observation"][0, 0, 0] = math.inf
    elif term == "loss_reward":
        batch["transition", "next", "reward"][0] = math.nan
    elif term == "loss_classifier":
        batch["transition", "next", "observation"][:] = math.nan
    else:
        # The square is finite, the sum of the squared gradients is not.
        assert term == "grad_norm_reward_classifier"
        batch["transition", "next", "reward"][0] = 1.8e19
    return batch
