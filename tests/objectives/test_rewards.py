"""The scale of rewards: statistics by hand, units, and how it travels."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from alm_torchrl import ALMOptimizationStepper, testing
from alm_torchrl.objectives import QValueObjective, RewardScale, TDTarget
from alm_torchrl.objectives.outputs import SCALED
from tests.helpers import assert_equal, make_batch, make_loss, seeded, total, variant

steps = st.lists(
    st.tuples(st.floats(-9, 9), st.booleans()), min_size=1, max_size=30
).filter(lambda found: any(abs(reward) > 1e-3 for reward, _ in found))


@given(found=steps, cut=st.integers(0, 30), limit=st.floats(0.1, 9))
def test_scale_by_hand(found, cut, limit):
    sums, now = [], 0.0
    for reward, done in found:
        now = 0.9 * now + reward
        sums.append(now)
        now = 0.0 if done else now
    spread, largest = statistics.pstdev(sums), max(map(abs, sums))
    expected = max(spread, largest / limit)
    scale = RewardScale(gamma=0.9, limit=limit)
    for part in (found[:cut], found[cut:]):
        rewards = torch.tensor([[r] for r, _ in part], dtype=torch.float64)
        scale.observe(rewards, torch.tensor([[d] for _, d in part]))
    assert_close(scale.scale.item(), expected, rtol=1e-5, atol=1e-6)
    reward = torch.tensor([2.0, -3.0])
    assert_close(scale(reward), reward / scale.scale)
    by_rewards = RewardScale("rewards")
    by_rewards.load_state_dict(scale.state_dict())
    by_rewards.observe(torch.tensor([1.0]), torch.tensor([True]))
    expected = (sum(abs(r) for r, _ in found) + 1) / (len(found) + 1)
    assert_close(by_rewards.scale.item(), expected, rtol=1e-5, atol=1e-6)
    scaled = max(abs(number) for number in sums) / scale.scale.item()
    assert scaled <= limit * 1.0001


def test_without_steps_or_rewards_the_scale_is_one():
    scale = RewardScale()
    reward = torch.randn(3)
    assert torch.equal(scale(reward), reward)
    scale.observe(torch.zeros(4), torch.zeros(4, dtype=torch.bool))
    assert torch.equal(scale(reward), reward)


def scaled_loss(**kwargs):
    scale = RewardScale()
    scale.observe(torch.tensor([100.0, 40.0]), torch.tensor([False, True]))
    return make_loss(deterministic=True, reward_transform=scale, **kwargs)


@pytest.mark.parametrize("objective", [None, QValueObjective()])
def test_losses_are_scaled_and_metrics_are_not(objective):
    loss = scaled_loss(policy_objective=objective)
    factor = loss.reward_transform.scale
    assert factor > 5
    batch = make_batch()
    divided = batch.clone()
    for part in ("slice", "transition"):
        divided[part, "next", "reward"] /= factor
    plain = variant(loss, reward_transform=None, policy_objective=objective)
    values, expected = loss(batch), plain(divided)
    names = set(SCALED) & set(values.keys())
    assert len(names) == (5 if objective else 8)
    for name, value in values.items():
        wanted = expected[name] * (factor if name in names else 1)
        assert_close(value, wanted)


def test_n_steps_are_scaled_once():
    loss = scaled_loss(critic_target=TDTarget(n_step=2))
    plain = variant(loss, critic_target=loss.critic_target)
    slices = testing.make_slices(testing.Sizes(observation_dim=3, latent_dim=4))
    divided = slices.clone()
    divided["next", "reward"] /= loss.reward_transform.scale
    assert_close(loss.td_target(slices), plain.td_target(divided))


def test_it_travels_and_is_reset():
    loss, other = scaled_loss(), make_loss(reward_transform=RewardScale())
    other.load_state_dict(loss.state_dict(), strict=True)
    copied = copy.deepcopy(loss)
    more = torch.tensor([7.0, -3.0]), torch.tensor([False, False])
    for each in (loss, other, copied):
        each.reward_transform.observe(*more)
    assert_equal(
        other.reward_transform.state_dict(), copied.reward_transform.state_dict()
    )
    assert_equal(
        loss.reward_transform.state_dict(), copied.reward_transform.state_dict()
    )
    loss.reset_parameters_recursive()
    assert loss.reward_transform.scale == 1
    assert not loss.reward_transform.statistics.any()
    assert "reward_transform=RewardScale('returns', gamma=0.99, limit=5)" in repr(loss)


def test_an_update_leaves_it_alone_and_reads_it():
    loss = scaled_loss(updater=False)
    before = copy.deepcopy(loss.reward_transform.state_dict())
    stepper = ALMOptimizationStepper(loss)
    stepper.step(None, make_batch())
    assert_equal(loss.reward_transform.state_dict(), before)


def test_contract_of_the_loss():
    sizes = testing.Sizes()
    scale = RewardScale()
    scale.observe(torch.tensor([9.0]), torch.tensor([True]))
    loss = testing.make_loss(sizes, reward_transform=scale)
    testing.check_loss(loss, testing.make_two_draw_batch(sizes))
    value = seeded(loss, testing.make_slices(sizes))
    assert total(value).isfinite()


@pytest.mark.parametrize(
    ("name", "value"), [("by", "std"), ("gamma", 1.0), ("limit", 0.0)]
)
def test_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        RewardScale(**{name: value})
