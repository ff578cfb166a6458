"""Value heads of the critics: squared error, Huber's, histograms."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close

from alm_torchrl.objectives import (
    HLGauss,
    HuberError,
)
from alm_torchrl.objectives.critics import SquaredError
from tests.helpers import (
    ACTION,
    LATENT,
    gradients,
    make_batch,
    make_loss,
    network,
    part_of,
    variant,
)

numbers = st.floats(-5, 5, allow_nan=False)


def histogram(target, low, high, bins, ratio):
    """Mass of a Gaussian in each bin, by the error function of the standard library."""
    width = (high - low) / (bins - 1)
    y = min(max(target, low), high)
    edges = [low + (b - 0.5) * width for b in range(bins + 1)]
    below = [math.erf((e - y) / (math.sqrt(2) * ratio * width)) for e in edges]
    mass = [after - before for before, after in pairwise(below)]
    return [m / sum(mass) for m in mass]


@settings(deadline=None)
@given(target=st.floats(-3, 3), bins=st.integers(2, 9), ratio=st.floats(0.4, 2))
def test_histogram_and_cross_entropy(target, bins, ratio):
    head = HLGauss(-1.0, 2.0, bins=bins, sigma_ratio=ratio).double()
    expected = histogram(target, -1.0, 2.0, bins, ratio)
    y = torch.tensor([target], dtype=torch.float64)
    assert_close(head.histogram(y)[0].tolist(), expected, rtol=1e-6, atol=1e-6)
    logits = torch.arange(2.0 * bins, dtype=torch.float64).sin()[None]
    p = [row.exp() / row.exp().sum() for row in logits.reshape(2, bins)]
    cross = [
        -sum(h * math.log(q) for h, q in zip(expected, row.tolist(), strict=True))
        for row in p
    ]
    assert_close(head.loss(logits, y)[0].tolist(), cross, rtol=1e-6, atol=1e-6)
    centers = [-1 + 3 * b / (bins - 1) for b in range(bins)]
    means = [
        sum(c * q for c, q in zip(centers, row.tolist(), strict=True)) for row in p
    ]
    assert_close(head.values(logits)[0].tolist(), means)


def test_the_fitted_histogram_has_the_value_of_its_target():
    head = HLGauss(-5.0, 5.0)
    target = torch.linspace(-4.5, 4.5, 200)
    logits = head.histogram(target).clamp_min(1e-30).log()
    assert_close(head.values(logits).squeeze(-1), target, rtol=0, atol=1e-3)
    # At the fit the gradient is zero.
    logits.requires_grad_()
    head.loss(logits, target).sum().backward()
    assert logits.grad.abs().max() < 1e-5


def test_squared_error():
    output, target = torch.tensor([[1.0, 4.0]]), torch.tensor([3.0])
    assert SquaredError().values(output) is output
    assert SquaredError().loss(output, target).tolist() == [[4.0, 1.0]]


class Critics(nn.Sequential):
    """Layers on all of its inputs."""

    def forward(self, *inputs):
        return super().forward(torch.cat(inputs, -1))


class TestHuberError:
    def test_value_and_gradient(self):
        output = torch.tensor([[3.5, 9.0, -4.0]], requires_grad=True)
        loss = HuberError(2.0).loss(output, torch.tensor([3.0]))
        assert_close(loss, torch.tensor([[0.125, 2 * 6 - 2.0, 2 * 7 - 2.0]]))
        loss.sum().backward()
        assert output.grad.tolist() == [[0.5, 2.0, -2.0]]
        assert HuberError().values(output) is output

    def test_a_large_delta_is_half_the_squared_error(self, batch):
        one = make_loss(deterministic=True)
        other = variant(one, value_head=HuberError(1e6))
        (value, metadata), (half, same) = (
            one.qvalue_loss(batch),
            other.qvalue_loss(batch),
        )
        assert_close(half, value / 2)
        assert metadata == same
        assert "value_head=HuberError(1e+06)" in " ".join(repr(other).split())


def make_histogram_critics(bins=7, in_dim=LATENT + ACTION):
    net = Critics(nn.Linear(in_dim, 8), nn.ELU(), nn.Linear(8, 2 * bins))
    return TensorDictModule(net, ["latent", "action"], ["state_action_value"])


def test_every_reader_of_values_gets_expectations():
    head = HLGauss(-2.0, 2.0, bins=7)
    loss = make_loss(
        deterministic=True, qvalue=make_histogram_critics(), value_head=head
    )
    latent, action = torch.randn(5, LATENT), torch.zeros(5, ACTION)
    logits = network(loss, "qvalue")(latent, action).reshape(5, 2, 7)
    expected = (logits.softmax(-1) * torch.linspace(-2, 2, 7)).sum(-1)
    assert_close(loss.latents.state_action_value(latent, action), expected)
    batch = make_batch()
    value, metadata = loss.qvalue_loss(batch)
    rows = batch["transition"]
    z = loss.latents.encode(rows).mean
    output = network(loss, "qvalue")(z, rows["action"])
    target = loss.td_target(rows)
    assert_close(value, head.loss(output, target).mean())
    assert_close(metadata["pred_value"], head.values(output).mean())
    error = (head.values(output) - target[:, None]).abs().mean()
    assert_close(metadata["td_error"], error)
    grads = gradients(value, loss)
    assert {part_of(name) for name, grad in grads.items() if grad.any()} == {"qvalue"}


def test_critics_of_another_size_are_refused():
    loss = make_loss(
        qvalue=make_histogram_critics(7), value_head=HLGauss(-1.0, 1.0, bins=5)
    )
    with pytest.raises(ValueError, match=r"qvalue: expected logits \[\*, N \* 5\]"):
        loss.qvalue_loss(make_batch())
