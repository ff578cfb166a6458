"""The critics' parts: n-step targets, pessimism, target noise, histograms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close

from alm_torchrl import (
    ALMOptimizationStepper,
    functional,
    make_replay_buffer,
    testing,
)
from alm_torchrl.objectives import (
    EntropyBonus,
    HLGauss,
    HuberError,
    QValueObjective,
    RewardScale,
    TDTarget,
)
from alm_torchrl.objectives.batch import read_lookahead
from alm_torchrl.training import compiled
from tests.helpers import (
    ACTION,
    LATENT,
    OBSERVATION,
    TRAINS,
    B,
    K,
    alternate,
    assert_equal,
    gradients,
    make_batch,
    make_loss,
    make_rows,
    network,
    seeded,
    variant,
)
from tests.objectives.test_value_heads import make_histogram_critics

numbers = st.floats(-5, 5, allow_nan=False)


def with_lookahead(n_step, lengths):
    """Transitions ``[B]``, each with the first of its steps repeated after its end."""
    steps = make_rows(len(lengths), n_step)
    ahead = torch.arange(n_step)
    mask = ahead < lengths[:, None]
    index = torch.minimum(ahead, lengths[:, None] - 1)
    steps = steps[torch.arange(len(lengths))[:, None], index]
    lookahead = steps.clone().set("mask", mask)
    return alternate(steps[:, 0].clone()).set("lookahead", lookahead)


def value_of(loss, observation, pessimism):
    """V'(s) on the networks themselves, for one observation."""
    rows = TensorDict(observation=observation[None], batch_size=[1])
    latent = loss.latents.encode(rows).mean
    action = network(loss, "actor")(latent)[0]
    values = loss.latents.state_action_value(latent, action, "target")[0].tolist()
    return sum(values) / 2 - pessimism * (max(values) - min(values)) / 2


def target_of(loss, steps, pessimism):
    """The target from a list of the recorded steps, by the sum of its definition."""
    total, weight = 0.0, 1.0
    for step in steps:
        total += weight * step["next", "reward"].item()
        weight *= loss.gamma.item() * (1 - step["next", "terminated"].item())
    end = steps[-1]["next", "observation"]
    return total + weight * value_of(loss, end, pessimism)


# -- n steps ---------------------------------------------------------------------------


@given(
    reward=st.lists(numbers, min_size=1, max_size=6),
    ends=st.lists(st.booleans(), min_size=6, max_size=6),
    steps=st.integers(1, 6),
    value=numbers,
)
def test_n_step_target_is_a_sum(reward, ends, steps, value):
    steps = min(steps, len(reward))
    expected, weight = 0.0, 1.0
    for r, end in zip(reward[:steps], ends, strict=False):
        expected, weight = expected + weight * r, weight * 0.9 * (not end)
    expected += weight * value
    discount = 0.9 * (1 - torch.tensor(ends[: len(reward)], dtype=torch.float64))
    mask = torch.arange(len(reward)) < steps
    rewards = torch.tensor(reward, dtype=torch.float64)
    rewards[~mask] = math.nan
    last = torch.tensor(value, dtype=torch.float64)
    found = functional.n_step_target(rewards, discount, last, mask)
    assert_close(found.item(), expected)
    if len(reward) == 1:
        one = functional.td_target(rewards[0], discount[0], last)
        assert_close(found, one, rtol=0, atol=0)


@pytest.mark.parametrize("n_step", [1, 2, 3])
@pytest.mark.parametrize("pessimism", [0.0, 0.3, 1.0, 1.5])
def test_target_equals_the_sum_of_the_recorded_steps(n_step, pessimism):
    part = TDTarget(n_step=n_step, pessimism=pessimism)
    loss = make_loss(deterministic=True, critic_target=part)
    lengths = torch.arange(24) % n_step + 1
    rows = with_lookahead(n_step, lengths)
    assert rows["next", "terminated"].any()
    expected = [
        target_of(loss, row["lookahead"][:length], pessimism)
        for row, length in zip(rows, lengths, strict=True)
    ]
    assert_close(loss.td_target(rows), torch.tensor(expected))


def test_one_step_is_the_default():
    one = make_loss()
    other = variant(one, critic_target=TDTarget(n_step=1, pessimism=1.0))
    batch = make_batch()
    assert_equal(seeded(other, batch), seeded(one, batch))
    # A look-ahead of one step, too.
    rows = with_lookahead(1, torch.ones(B, dtype=torch.int64))
    more = TDTarget()
    more.n_step = 2
    target = variant(one, critic_target=more)
    steps = rows["lookahead"]
    rows["lookahead"] = torch.cat([steps, steps], 1)
    rows["lookahead", "mask"][:, 1] = False
    found = seeded(target.td_target, rows)
    assert_close(found, seeded(one.td_target, rows), rtol=0, atol=0)


def test_slices_are_looked_ahead_to_their_end_or_mask():
    loss = make_loss(critic_target=TDTarget(n_step=3))
    slices = make_rows(3, 4)
    slices["count"] = torch.arange(12).reshape(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 2] = mask[2, 0] = False
    masked = slices.copy().set(("collector", "mask"), mask)
    for rows, valid in ((slices, torch.ones_like(mask)), (masked, mask)):
        steps, counts = read_lookahead(loss, rows, 3)
        for b in range(3):
            for k in range(4):
                expected = []
                for row in range(k, min(k + 3, 4)):
                    if not valid[b, row]:
                        break
                    expected.append(4 * b + row)
                rest = 3 - len(expected)
                assert counts[b, k].tolist() == [True] * len(expected) + [False] * rest
                expected = expected or [4 * b + k]
                read = steps["count"][b, k].tolist()
                assert read == (expected + expected[-1:] * 3)[:3]


def test_slices_and_transitions_with_the_same_steps_agree():
    loss = make_loss(deterministic=True, critic_target=TDTarget(n_step=2))
    slices = alternate(make_rows(B, K))
    flat = slices.reshape(-1)
    lookahead, mask = read_lookahead(loss, slices, 2)
    flat["lookahead"] = lookahead.flatten(0, 1).clone()
    flat["lookahead", "mask"] = mask.flatten(0, 1)
    assert_close(loss.td_target(slices).flatten(), loss.td_target(flat))
    for plain, other in zip(loss.qvalue_loss(slices), loss.qvalue_loss(flat), strict=1):
        assert_close(plain, other)
    # What follows a transition is not masked with it.
    assert not torch.equal(loss.td_target(flat), make_one_step(loss).td_target(flat))


def make_one_step(loss):
    return variant(loss, critic_target=None)


def test_a_masked_batch_is_the_batch_without_those_rows():
    loss = make_loss(deterministic=True, critic_target=TDTarget(n_step=2))
    rows = with_lookahead(2, torch.tensor([1, 2] * 3))
    keep = torch.arange(B) % 3 > 0
    masked = rows.clone().set(("collector", "mask"), keep)
    for key in masked.keys(True, True):
        if masked[key].is_floating_point():
            masked[key][~keep] = math.nan
    value, metadata = loss.qvalue_loss(masked)
    expected, means = loss.qvalue_loss(rows[keep])
    assert_close(value, expected)
    assert_equal(metadata, means, exact=False)
    assert_close(gradients(value, loss), gradients(expected, loss))


def test_what_does_not_fit_is_refused():
    loss = make_loss(critic_target=TDTarget(n_step=3))
    with pytest.raises(KeyError, match="expected the entry 'lookahead', which make"):
        loss.qvalue_loss(make_rows(B))
    rows = with_lookahead(2, torch.full((B,), 2))
    with pytest.raises(ValueError, match=r"'lookahead' .* \[6, 3\], got \[6, 2\]"):
        loss.qvalue_loss(rows)
    with pytest.raises(KeyError, match="expected the entry 'mask'"):
        loss.qvalue_loss(rows.set("lookahead", rows["lookahead"].exclude("mask")))


def test_keys_can_be_set():
    loss = make_loss(deterministic=True, critic_target=TDTarget(n_step=2))
    rows = with_lookahead(2, torch.full((B,), 2))
    expected = loss.td_target(rows)
    loss.set_keys(lookahead=("more", "steps"))
    lookahead = rows.pop("lookahead")
    assert_close(loss.td_target(rows.set(("more", "steps"), lookahead)), expected)


def test_replay_to_target():
    """Rewards of an episode of known length, through buffer and loss."""
    buffer = make_replay_buffer(20, batch_size=256, horizon=2, n_step=3)
    rows = make_rows(8)
    rows["next", "terminated"] = torch.zeros(8, 1, dtype=torch.bool)
    rows["next", "terminated"][4] = True
    rows["next", "done"] = rows["next", "terminated"].clone()
    buffer.extend(rows)
    loss = make_loss(deterministic=True, critic_target=TDTarget(n_step=3))
    batch = buffer.sample()
    target = loss.td_target(batch["transition"])
    ends = [min(n + 3, 5) for n in range(5)] + [8, 8, 8]
    expected = torch.tensor(
        [target_of(loss, rows[n:end], 1.0) for n, end in enumerate(ends)]
    )
    index = batch["transition", "index"]
    assert set(index.tolist()) == set(range(8))
    assert_close(target, expected[index])
    assert loss(batch)["loss_qvalue"].isfinite()


# -- pessimism -------------------------------------------------------------------------


@given(st.lists(numbers, min_size=1, max_size=5), st.floats(0, 2))
def test_pessimistic_value(values, pessimism):
    q = torch.tensor(values, dtype=torch.float64)
    mean = sum(values) / len(values)
    expected = mean - pessimism * (mean - min(values))
    assert_close(functional.pessimistic_value(q, pessimism).item(), expected)
    assert functional.pessimistic_value(q, 1.0) == min(values)
    if len(values) == 2:
        half = pessimism * (max(values) - min(values)) / 2
        assert_close(functional.pessimistic_value(q, pessimism).item(), mean - half)


@pytest.mark.parametrize("pessimism", [0.0, 0.5])
def test_pessimism_of_what_is_maximised(pessimism):
    one = make_loss(deterministic=True)
    other = variant(one, pessimism=pessimism)
    batch = make_batch()
    rollout = other.model_rollout(batch["slice"])
    end = rollout["latent"][:, -1]
    values = one.latents.state_action_value(end, one.latents.mean_action(end))
    expected = values.mean(-1) - pessimism * (values.mean(-1) - values.amin(-1))
    assert_close(rollout["terminal_value"], expected)
    imagined = other.imagine(end, 2)
    latent, action = imagined["latent"][:, 1:], imagined["action"][:, 1:]
    values = one.latents.state_action_value(latent, action)
    expected = values.mean(-1) - pessimism * (values.mean(-1) - values.amin(-1))
    assert_close(imagined["value"], expected)
    # The critics' own target keeps its own.
    assert other(batch)["loss_qvalue"] == one(batch)["loss_qvalue"]
    qvalue = variant(one, pessimism=pessimism, policy_objective=QValueObjective())
    latent = one.latents.encode(batch["transition"]).mean
    values = one.latents.state_action_value(latent, one.latents.mean_action(latent))
    expected = values.mean(-1) - pessimism * (values.mean(-1) - values.amin(-1))
    assert_close(qvalue.actor_loss(batch)[0], -expected.mean())


# -- noise of the target's action ------------------------------------------------------


def test_target_noise_is_independent_of_exploration():
    part = TDTarget(noise_std=0.2, noise_clip=0.25)
    seen = []
    for noise in (0.0, 5.0):
        loss = seeded(make_loss, noise=noise, bound=100.0, critic_target=part)
        hook = network(loss, "qvalue").register_forward_hook(
            lambda _, inputs, output: seen.append(inputs)
        )
        seeded(loss.td_target, make_rows(4000))
        hook.remove()
    drawn = [action - network(loss, "actor")(latent)[0] for latent, action in seen]
    for noise in drawn:
        assert_close(noise.abs().max().item(), 0.25)
        kept = noise[noise.abs() < 0.249]
        clipped = 1 - len(kept) / noise.numel()
        assert abs(clipped - math.erfc(0.25 / 0.2 / math.sqrt(2))) < 0.02
        assert abs(noise.mean()) < 0.01
    loss.deterministic_sampling_mode = testing.ExplorationType.DETERMINISTIC
    expected = variant(loss, critic_target=TDTarget())
    rows = make_rows(5)
    assert_close(loss.td_target(rows), expected.td_target(rows))


def test_target_noise_is_clamped_to_the_actions():
    loss = make_loss(critic_target=TDTarget(noise_std=9.0, noise_clip=9.0))
    latent = torch.randn(64, LATENT)
    assert loss.latents.smoothed_action(latent, 9.0, 9.0).abs().max() < 1


def test_target_noise_needs_an_actor_with_a_clamped_normal():
    actor = TensorDictModule(nn.Linear(LATENT, ACTION), ["latent"], ["action"])
    loss = make_loss(actor=actor, critic_target=TDTarget(noise_std=0.2))
    with pytest.raises(TypeError, match="actor: expected one with a ClampedNormal"):
        loss.td_target(make_rows(B))


# -- together --------------------------------------------------------------------------


def combined(sizes):
    in_dim = sizes.latent_dim + sizes.action_dim
    return {
        "critic_target": TDTarget(n_step=2, pessimism=0.4, noise_std=0.2),
        "pessimism": 0.0,
        "qvalue": make_histogram_critics(in_dim=in_dim),
        "value_head": HLGauss(-2.0, 2.0, bins=7),
    }


@pytest.mark.parametrize(
    "more", [{}, {"entropy": EntropyBonus()}, {"policy_objective": QValueObjective()}]
)
def test_combinations_keep_the_contract_of_the_loss(more):
    sizes = testing.Sizes(horizon=3)
    loss = testing.make_loss(sizes, **combined(sizes), **more)
    testing.check_loss(loss, testing.make_slices(sizes))


def test_the_parts_are_printed_and_float64_and_state_dict_work():
    sizes = testing.Sizes()
    loss = testing.make_loss(sizes, **combined(sizes))
    text = " ".join(repr(loss).split())
    assert "critic_target=TDTarget(n_step=2, pessimism=0.4, noise_std=0.2," in text
    assert "pessimism=0," in text
    assert "value_head=HLGauss(-2, 2, bins=7)" in text
    slices = testing.make_slices(sizes)
    double = loss.double()(slices.double())
    assert all(double[term].dtype == torch.float64 for term in TRAINS)
    other = testing.make_loss(sizes, seed=1, **combined(sizes)).double()
    other.load_state_dict(loss.state_dict(), strict=True)
    values = [seeded(each, slices.double()) for each in (loss, other)]
    assert_equal(*values)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: TDTarget(n_step=0), "n_step"),
        (lambda: TDTarget(pessimism=-0.1), "pessimism"),
        (lambda: TDTarget(noise_std=-1.0), "noise_std"),
        (lambda: TDTarget(noise_clip=-1.0), "noise_clip"),
        (lambda: HuberError(0.0), "delta"),
        (lambda: HLGauss(1.0, 1.0), "high"),
        (lambda: HLGauss(0.0, 1.0, bins=1), "bins"),
        (lambda: HLGauss(0.0, 1.0, sigma_ratio=0.0), "sigma_ratio"),
        (lambda: make_loss(pessimism=-1.0), "pessimism"),
        (lambda: make_replay_buffer(9, n_step=0), "n_step"),
    ],
)
def test_values_out_of_range(make, name):
    with pytest.raises(ValueError, match=f"^{name}: expected .* got "):
        make()


@pytest.mark.slow
def test_a_recorded_update_is_the_eager_one(monkeypatch):
    """With short slices, a look-ahead and a scale that changes between updates."""
    monkeypatch.setattr(compiled, "compile_graph", lambda graph, _: graph)
    sizes = testing.Sizes(batch=8, observation_dim=OBSERVATION, latent_dim=LATENT)
    buffer = make_replay_buffer(
        40, batch_size=8, n_step=2, short_slices=True, recency_decay=0.9
    )
    rows = make_rows(40)
    rows["next", "done"] = rows["next", "terminated"].clone()
    buffer.extend(rows)

    def train(compile):
        torch.manual_seed(0)
        scale = RewardScale()
        more = {"reward_transform": scale, "policy_objective": QValueObjective()}
        loss = testing.make_loss(sizes, **combined(sizes), **more)
        stepper = ALMOptimizationStepper(loss, compile=compile)
        for step in range(4):
            scale.observe(torch.tensor([3.0**step]), torch.tensor([False]))
            metrics = stepper.step(None, buffer.sample())
        return metrics

    recorded = train(compile=True)
    for name, value in train(compile=False).items():
        assert_close(recorded[name], value, rtol=1e-4, atol=1e-5)
