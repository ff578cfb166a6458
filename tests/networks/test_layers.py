"""The noise schedule, the output layer, and the wrapper that always samples."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule, set_interaction_type
from torch import nn
from torchrl.envs.utils import exploration_type

from alm_torchrl import AlwaysSample, NoiseSchedule
from alm_torchrl.networks.layers import OutputLinear


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_schedule_is_linear_then_constant():
    schedule = NoiseSchedule(1.0, 0.2, steps=8)
    std = schedule.std
    for n in range(12):
        assert schedule.std.shape == ()
        assert schedule.std.item() == pytest.approx(1.0 - 0.8 * min(n / 8, 1))
        schedule.step()
    assert schedule.std is std
    jumped = NoiseSchedule(1.0, 0.2, steps=8)
    jumped.step(5)
    assert jumped.std.item() == pytest.approx(0.5)


def test_default_schedule_is_exact_far_out():
    schedule = NoiseSchedule()
    schedule.step(99_999)
    assert schedule.std.item() == pytest.approx(0.1 + 0.9e-5, abs=1e-8)
    schedule.step()
    assert schedule.std.item() == pytest.approx(0.1, abs=1e-8)


def test_schedule_is_saved():
    schedule, loaded = NoiseSchedule(1.0, 0.2, 8), NoiseSchedule(1.0, 0.2, 8)
    schedule.step(3)
    loaded.load_state_dict(schedule.state_dict())
    assert loaded.std == schedule.std
    for each in (schedule, loaded):
        each.step()
    assert loaded.std.item() == pytest.approx(0.6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_linear_keeps_the_precision_of_its_weight(dtype):
    layer = OutputLinear(4, 3).to(dtype)
    plain = nn.Linear(4, 3).to(dtype)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
        low = layer(x.bfloat16())  # as from a hidden layer
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(output, plain(x))
    assert torch.equal(layer(x), plain(x))
    assert low.dtype == dtype
    assert torch.equal(low, plain(x.bfloat16().to(dtype)))


@pytest.mark.parametrize(
    "surrounding",
    [InteractionType.DETERMINISTIC, InteractionType.MODE, InteractionType.RANDOM],
)
def test_always_sample(surrounding):
    seen = []
    net = nn.Identity()
    net.register_forward_hook(lambda *_: seen.append(exploration_type()))
    policy = AlwaysSample(TensorDictModule(net, ["x"], [("deep", "x")]))
    assert (policy.in_keys, policy.out_keys) == (["x"], [("deep", "x")])
    td = TensorDict(x=torch.randn(3), batch_size=[])
    with set_interaction_type(surrounding):
        assert policy(td) is td
        assert exploration_type() is surrounding
    assert seen == [InteractionType.RANDOM]
    assert torch.equal(td["deep", "x"], td["x"])
