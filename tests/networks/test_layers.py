"""The noise schedule, and the wrappers around layers and modules."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule, set_interaction_type
from torch import nn
from torchrl.envs.utils import exploration_type

from alm_torchrl import AlwaysSample, NoiseSchedule
from alm_torchrl.networks.layers import OutputLinear, TensorModule


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# -- the schedule ---------------------------------------------------------------------


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
    assert repr(loaded) == "NoiseSchedule(initial=1.0, final=0.2, steps=8)"


# -- wrappers -------------------------------------------------------------------------


class Split(nn.Module):
    def forward(self, x, y):
        return x + y, x * y


class Sum(nn.Module):
    def forward(self, x, y):
        return x + y


WRAPPED = [
    (Split, [("deep", "sum"), "product"]),
    (Split, ["x", ("next", "x")]),
    (Sum, [("next", "sum")]),
]


def xy():
    return TensorDict(x=torch.randn(3, 2), y=torch.randn(3, 2), batch_size=[3])


def assert_same(left, right):
    assert set(left.keys(True, True)) == set(right.keys(True, True))
    assert left.batch_size == right.batch_size
    assert (left == right).all()


@pytest.mark.parametrize(("net", "out_keys"), WRAPPED)
def test_tensor_module_writes_like_tensordict_module(net, out_keys):
    ours = TensorModule(net(), in_keys=["x", "y"], out_keys=out_keys)
    theirs = TensorDictModule(net(), in_keys=["x", "y"], out_keys=out_keys)
    td = xy()
    results = [module(td.copy()) for module in (ours, theirs)]
    assert_same(*results)
    written = TensorDict(batch_size=[3]), TensorDict(batch_size=[3])
    for module, output in zip((ours, theirs), written, strict=True):
        assert module(td, tensordict_out=output) is output
    assert_same(*written)
    assert set(written[0].keys(True, True)) == set(out_keys)
    outputs = [module(x=td["x"], y=td["y"]) for module in (ours, theirs)]
    for left, right in zip(*map(as_tuple, outputs), strict=True):
        assert torch.equal(left, right)
    same = td.copy()
    assert ours(same) is same


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


def test_tensor_module_selects_like_tensordict_module():
    td = xy()
    results = []
    for kind in (TensorModule, TensorDictModule):
        module = kind(Split(), in_keys=["x", "y"], out_keys=["sum", "product"])
        module.select_out_keys("product")
        results.append(module(td.copy()))
    assert_same(*results)
    assert "sum" not in results[0]
    assert torch.equal(results[0]["product"], td["x"] * td["y"])


def test_tensor_module_wants_one_tensor_per_key():
    module = TensorModule(Split(), in_keys=["x", "y"], out_keys=["a", "b", "c"])
    with pytest.raises(ValueError, match="zip"):
        module(xy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_linear_keeps_the_precision_of_its_weight(dtype):
    layer = OutputLinear(4, 3).to(dtype)
    plain = nn.Linear(4, 3).to(dtype)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(5, 4, dtype=dtype)
    assert torch.equal(layer(x), plain(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
        assert output.dtype == dtype
        assert torch.equal(output, plain(x.clone()).to(dtype)) == (
            plain(x).dtype == dtype
        )
        # From a hidden layer it comes in the lower precision.
        low = layer(x.bfloat16())
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(output, plain(x))
    assert low.dtype == dtype
    assert torch.equal(low, plain(x.bfloat16().to(dtype)))


class Remember(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(exploration_type())
        return x


@pytest.mark.parametrize(
    "surrounding",
    [None, InteractionType.DETERMINISTIC, InteractionType.MODE, InteractionType.RANDOM],
)
def test_always_sample(surrounding):
    remember = Remember()
    module = TensorDictModule(remember, in_keys=["x"], out_keys=[("deep", "x")])
    policy = AlwaysSample(module)
    assert policy.in_keys == ["x"]
    assert policy.out_keys == [("deep", "x")]
    td = TensorDict(x=torch.randn(3), batch_size=[])
    if surrounding is None:
        output = policy(td)
    else:
        with set_interaction_type(surrounding):
            output = policy(td)
            assert exploration_type() is surrounding
    assert remember.seen == [InteractionType.RANDOM]
    assert output is td
    assert torch.equal(td["deep", "x"], td["x"])
