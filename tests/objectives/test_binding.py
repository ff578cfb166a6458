"""Modules hold the parameters that a term wants, and their own again afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictParams
from torch import nn

from alm_torchrl.objectives import latents
from alm_torchrl.objectives.binding import can_swap, swapped_params
from tests.helpers import TRAINS, gradients, make_batch, make_loss, part_of, seeded


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def other_params(net: nn.Module) -> TensorDictParams:
    other = copy.deepcopy(net)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data.add_(1)
    return TensorDict.from_module(other, as_module=True)


def tensors(net: nn.Module) -> list[torch.Tensor]:
    return [*net.parameters(), *net.buffers()]


def test_a_loan_computes_what_to_module_computes_and_is_given_back():
    net, x = make_net().eval(), torch.randn(5, 3)
    params, before = other_params(net), tensors(net)
    with params.to_module(net):
        expected = net(x)
    with swapped_params(net, params):
        assert torch.equal(net(x), expected)
    assert all(a is b for a, b in zip(tensors(net), before, strict=True))
    assert not torch.equal(net(x), expected)


def test_a_loan_is_given_back_after_an_error_and_from_within_another():
    net = make_net()
    params, before = other_params(net), tensors(net)
    loan = swapped_params(net, params)
    with pytest.raises(ZeroDivisionError), loan:
        raise ZeroDivisionError
    inner = swapped_params(net, other_params(net))
    with loan:
        lent = tensors(net)
        with inner:
            assert tensors(net)[0] is not lent[0]
        with loan:
            pass
        assert all(a is b for a, b in zip(tensors(net), lent, strict=True))
    assert all(a is b for a, b in zip(tensors(net), before, strict=True))


def test_a_detached_loan_shares_memory_and_has_no_gradient():
    net = nn.Linear(2, 2)
    params = TensorDict.from_module(net, as_module=True)
    with swapped_params(net, params, detach=True):
        assert not net.weight.requires_grad
        assert net.weight.data_ptr() == params["weight"].data_ptr()
    assert net.weight.requires_grad


def test_modules_that_react_to_attributes_are_left_to_tensordict():
    assert can_swap(make_net())
    assert not can_swap(nn.Sequential(nn.LSTM(2, 2)))


@pytest.mark.parametrize("term", ["model_loss", "actor_loss", "qvalue_loss"])
def test_a_functional_call_of_the_loss_replaces_live_frozen_and_target_alike(term):
    loss, batch = make_loss(), make_batch()
    other = make_loss()
    before = {name: value.clone() for name, value in loss.state_dict().items()}

    def value(which):
        torch.manual_seed(1)
        return getattr(which, term)(batch)[0]

    own, wanted = value(loss), value(other)
    assert not torch.equal(own, wanted)
    with TensorDict.from_module(other).to_module(loss):
        assert torch.equal(value(loss), wanted)
    assert torch.equal(value(loss), own)
    assert all(torch.equal(loss.state_dict()[k], v) for k, v in before.items())


def test_networks_that_cannot_be_lent_give_the_same_gradients(monkeypatch, batch):
    loss = make_loss()
    lent = seeded(loss, batch)
    monkeypatch.setattr(latents, "can_swap", lambda _: False)
    loss = copy.deepcopy(loss)
    bound = seeded(loss, batch)
    for term, parts in TRAINS.items():
        assert torch.equal(bound[term], lent[term])
        assert {part_of(name) for name in gradients(bound[term], loss)} == parts
