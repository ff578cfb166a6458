"""TD3, SAC and REDQ: their terms and their updates."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    TensorDictModule,
)
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate, ValueEstimators

from alm_torchrl import NoiseSchedule, NonFiniteError
from alm_torchrl.baselines.builders import make_redq_loss, make_sac_loss
from alm_torchrl.baselines.losses import ClampedMeanNormal, TD3Baseline
from alm_torchrl.training.baseline_stepper import BaselineOptimizationStepper
from tests.baselines.losses import (
    AGENTS,
    PARTS,
    SIZES,
    changed,
    make_batch,
    make_loss,
    snapshot,
)
from tests.helpers import probabilistic

# -- terms -----------------------------------------------------------------------------


@pytest.mark.parametrize("agent", AGENTS)
def test_each_term_reaches_its_own_parameters(agent):
    loss = make_loss(agent)
    SoftUpdate(loss, tau=0.5)
    batch = make_batch(5)

    def assert_reaches(part, value):
        """Every parameter of the part gets a gradient, and no other."""
        loss.zero_grad()
        value.backward()
        for name, parameter in loss.named_parameters():
            reached = parameter.grad is not None and bool(parameter.grad.any())
            assert reached is name.startswith(part), name
            assert (parameter.grad is None) is not reached, name

    assert_reaches("qvalue_network_params", loss.qvalue_loss(batch)[0])
    value, metadata = loss.actor_loss(batch)
    assert_reaches("actor_network_params", value)
    assert not any(entry.requires_grad for entry in metadata.values())
    assert hasattr(loss, "alpha_loss") is (agent != "td3")
    if agent != "td3":
        assert_reaches("log_alpha", loss.alpha_loss(metadata["log_prob"]).mean())
        expected = -(metadata["log_prob"].mean() + loss.target_entropy)
        torch.testing.assert_close(loss.log_alpha.grad, expected)


class Line(nn.Module):
    """``slope * action + observation``, a critic; or ``slope``, a mean action."""

    def __init__(self, slope):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, observation, action=None):
        if action is not None:
            return self.slope * action + observation
        mean = self.slope.expand_as(observation)
        return mean, self.schedule.std * torch.ones_like(mean)


def test_td3_target_by_hand(monkeypatch):
    head = Line(0.5)
    head.schedule = NoiseSchedule(0.4, 0.2, steps=1)
    actor = probabilistic(head, ["observation"], "action", ClampedMeanNormal)
    pair = ["observation", "action"]
    critics = [
        TensorDictModule(Line(slope), pair, ["state_action_value"])
        for slope in (1.0, -1.0)
    ]
    bounds = (torch.tensor([-1.0]), torch.tensor([1.0]))
    loss = TD3Baseline(
        actor, critics, bounds=bounds, noise_clip=0.3, loss_function="l2"
    )
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.5)
    SoftUpdate(loss, tau=0.5)
    # The online networks differ from the targets from now on.
    head.slope.data.fill_(-0.9)
    loss.qvalue_network_params.data.mul_(3)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    ends, ones = torch.tensor([[False], [True]]), torch.ones(2, 1)
    batch = TensorDict(observation=0 * ones, action=0.1 * ones, batch_size=[2])
    batch["next"] = {"observation": 2 * ones, "reward": ones}
    batch["next"].update({"terminated": ends, "done": ends})
    for std, action in ((0.4, 0.8), (0.2, 0.7)):
        # The noise of 0.4 is clipped to 0.3; the critics say 2 +- action.
        assert loss.noise_schedule.std == pytest.approx(std)
        value, metadata = loss.qvalue_loss(batch)
        targets = [1 + 0.5 * (2 - action), 1.0]
        assert metadata["target_value"].tolist() == pytest.approx(targets)
        squares = [(q - y) ** 2 for q in (0.3, -0.3) for y in targets]
        assert value.item() == pytest.approx(sum(squares) / 2)
        loss.noise_schedule.step()
    # The first critic at the online actor's mean.
    assert loss.actor_loss(batch)[0].item() == pytest.approx(-3 * -0.9)


@pytest.mark.parametrize("moved", [torch.nn.Module.double, copy.deepcopy])
def test_actor_and_schedule_stay_tied_to_the_loss(moved):
    loss = moved(make_loss("td3"))
    SoftUpdate(loss, tau=0.5)
    loss.noise_schedule.step(2)
    assert loss.noise_schedule.std == pytest.approx(0.6)
    assert torch.equal(
        loss.state_dict()["actor_network_params.module.0.module.5.schedule.std"],
        loss.noise_schedule.std,
    )
    dtype = next(loss.parameters()).dtype
    batch = make_batch(5).apply(
        lambda entry: entry.to(dtype) if entry.is_floating_point() else entry
    )
    loss.qvalue_loss(batch)
    assert loss.policy_noise == pytest.approx(0.6)
    before = loss.act(batch.clone())
    for parameter in loss.parameters():
        parameter.data.mul_(0.5)
    assert not torch.equal(loss.act(batch.clone()), before)


@pytest.mark.parametrize("log_alpha", [-3.0, 3.0])
def test_redq_terms_are_those_of_torchrl(monkeypatch, log_alpha):
    loss = make_loss("redq")
    SoftUpdate(loss, tau=0.5)
    loss.target_qvalue_network_params.data.apply_(lambda leaf: leaf.mul_(0.7))
    loss.log_alpha.data.fill_(log_alpha)
    batch = make_batch(5)
    monkeypatch.setattr(
        "torch.distributions.normal._standard_normal",
        lambda shape, dtype, device: torch.full(shape, 0.3, dtype=dtype, device=device),
    )
    order = torch.tensor([2, 0, 3, 1])
    monkeypatch.setattr(torch, "randperm", lambda _: order)
    theirs = loss(batch)
    # TorchRL averages over the critics, too.
    ours = loss.qvalue_loss(batch)[0] / loss.num_qvalue_nets
    torch.testing.assert_close(ours, theirs["loss_qvalue"])
    torch.testing.assert_close(loss.actor_loss(batch)[0], theirs["loss_actor"])
    assert theirs["alpha"].log().item() == pytest.approx(log_alpha)


def test_redq_draws_the_targets_critics_anew():
    loss = make_loss("redq")
    SoftUpdate(loss, tau=0.5)
    # Critic i says i, whatever it is asked.
    values = torch.arange(4.0)
    for name, leaf in loss.target_qvalue_network_params.items(True, True):
        leaf.data.zero_()
        if leaf.shape == (4, 1) and name[-1] == "bias":
            leaf.data.copy_(values.unsqueeze(-1))
    loss.log_alpha.data.fill_(-30.0)
    batch = make_batch(1)
    batch["next", "terminated"].zero_()
    seen = set()
    for _ in range(60):
        target = loss.qvalue_loss(batch)[1]["target_value"]
        value = (target - batch["next", "reward"].squeeze(-1))[0] / 0.99
        seen.add(round(value.mean().item()))
    # The smaller of two of four is never the largest.
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("agent", AGENTS)
def test_actions_stay_within_the_bounds(agent):
    loss = make_loss(agent)
    for parameter in loss.actor_network_params.parameters():
        parameter.data.mul_(30)
    batch = make_batch(50)
    for mode in (ExplorationType.DETERMINISTIC, ExplorationType.RANDOM):
        with set_exploration_type(mode):
            action = loss.act(batch.select("observation"))
        assert action[:, 0].abs().max() <= 1
        assert 0.39 < action[:, 1].abs().max() <= 0.4


def test_td3_mean_at_the_bounds_keeps_its_gradient():
    loss = make_loss("td3")
    bias = list(loss.actor_network_params.parameters())[-1]
    bias.data.copy_(torch.tensor([0.0, 3.0]))
    batch = make_batch(5)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert loss.act(batch)[:, 1].tolist() == pytest.approx([0.4] * 5, abs=1e-5)
    loss.actor_loss(batch)[0].backward()
    assert bias.grad[1].abs() > 0


def test_target_entropy_does_not_depend_on_the_unit_of_actions():
    wide, narrow = (
        make_sac_loss(observation_dim=3, action_low=[-b] * 2, action_high=[b] * 2)
        for b in (1.0, 0.1)
    )
    assert wide.target_entropy == -2
    narrow.actor_network_params.data.update_(wide.actor_network_params.data)
    batch = make_batch(6)
    losses = []
    for loss in (wide, narrow):
        SoftUpdate(loss, tau=0.5)
        loss.log_alpha.data.fill_(1.0)
        torch.manual_seed(0)
        log_prob = loss.actor_loss(batch)[1]["log_prob"]
        losses.append(loss.alpha_loss(log_prob).detach())
    torch.testing.assert_close(*losses)
    assert losses[0].std() > 0


# -- updates ---------------------------------------------------------------------------


def test_td3_delays_actor_and_targets():
    loss = make_loss("td3", policy_delay=3)
    stepper = BaselineOptimizationStepper(loss, lr=1e-2)
    for count in range(1, 7):
        before = snapshot(loss)
        metrics = stepper.step(None, make_batch(5))
        expected = {"qvalue_network_params"}
        if count % 3 == 0:
            expected |= {"actor_network_params"}
            expected |= {
                f"target_{part}_network_params" for part in ("actor", "qvalue")
            }
        assert changed(loss, before) == expected
        assert ("loss_actor" in metrics) is (count >= 3)
    assert stepper.optimizer_step_count == 6


@pytest.mark.parametrize("agent", ["sac", "redq"])
def test_soft_agents_update_everything_in_each_step(agent):
    loss = make_loss(agent)
    stepper = BaselineOptimizationStepper(loss, lr=1e-2, tau=0.25)
    before = snapshot(loss)
    stepper.step(None, make_batch(5, loss))
    assert changed(loss, before) == {*PARTS, "target_qvalue_network_params"}


@pytest.mark.parametrize("agent", ["td3", "redq"])
def test_a_copied_stepper_goes_on_alike_and_on_its_own(agent):
    def train(stepper, steps):
        for step in steps:
            torch.manual_seed(step)
            stepper.step(None, make_batch(5, stepper.loss))

    stepper = BaselineOptimizationStepper(make_loss(agent), lr=1e-2, tau=0.25)
    train(stepper, range(3))
    other = copy.deepcopy(stepper)
    before = snapshot(stepper.loss)
    train(other, range(3, 6))
    assert changed(stepper.loss, before) == set()
    assert changed(other.loss, before) >= set(PARTS[:2])
    train(stepper, range(3, 6))
    assert changed(other.loss, snapshot(stepper.loss)) == set()


def test_redq_updates_critics_often_and_the_actor_once(monkeypatch):
    loss = make_loss("redq")
    stepper = BaselineOptimizationStepper(loss, lr=1e-2)
    calls = []

    def spy(owner, name):
        method = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda *batch: (
                calls.append((name, *(one["observation"].clone() for one in batch))),
                method(*batch),
            )[1],
        )

    spy(loss, "qvalue_loss")
    spy(loss, "actor_loss")
    spy(stepper.target_update, "step")
    batch = make_batch(5, loss)
    stepper.step(None, TensorDict({"transition": batch}, batch_size=[15]))
    critic = ["qvalue_loss", "step"]
    names = [*critic, *critic, "qvalue_loss", "actor_loss", "step"]
    assert [name for name, *_ in calls] == names
    rows = [rows[0] for name, *rows in calls if name != "step"]
    assert torch.equal(torch.cat(rows[:3]), batch["observation"])
    assert torch.equal(rows[3], rows[2])
    with pytest.raises(ValueError, match="sub_batch: expected updates_per_step=3"):
        stepper.step(None, make_batch(5))


@pytest.mark.parametrize("agent", AGENTS)
def test_builders_pass_their_numbers_on(agent):
    own = {"noise_clip": 0.2, "policy_delay": 3} if agent == "td3" else {}
    loss = make_loss(agent, gamma=0.9, **own)
    assert loss.value_estimator.gamma == pytest.approx(0.9)
    assert loss.loss_function == "l2"
    assert {name: float(getattr(loss, name)) for name in own} == pytest.approx(own)
    assert make_loss(agent).value_estimator.gamma == pytest.approx(0.99)
    assert (make_loss("td3").noise_clip, make_loss("td3").policy_delay) == (0.3, 2)


def test_redq_has_the_papers_numbers():
    loss = make_redq_loss(**SIZES)
    assert (loss.num_qvalue_nets, loss.sub_sample_len) == (10, 2)
    assert loss.updates_per_step == 20
    weights = loss.qvalue_network_params["module", "0", "weight"]
    assert weights.shape == (10, 256, 5)
    # Each critic has an initialisation of its own, of the usual size.
    assert not torch.equal(weights[0], weights[1])
    assert weights.abs().max() <= 5**-0.5


def test_clipped_gradients_and_the_learning_rate_reach_the_optimizers():
    loss = make_loss("sac")
    stepper = BaselineOptimizationStepper(loss, lr=0.03, clip_norm=1e-6)
    assert set(stepper.optimizers) == {"qvalue", "actor", "alpha"}
    for optimizer in stepper.optimizers.values():
        assert [group["lr"] for group in optimizer.param_groups] == [0.03]
    metrics = stepper.step(None, make_batch(5))
    for part in ("qvalue", "actor"):
        params = list(getattr(loss, f"{part}_network_params").parameters())
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        assert norm == pytest.approx(1e-6, rel=1e-3)
        assert metrics[f"grad_norm_{part}"] > 1e-4


@pytest.mark.parametrize("agent", AGENTS)
def test_not_finite_raises_before_anything_changes(agent):
    loss = make_loss(agent)
    stepper = BaselineOptimizationStepper(loss)
    stepper.step(None, make_batch(5, loss))
    before = snapshot(loss)
    batch = make_batch(5, loss)
    batch["next", "reward"][2] = float("inf")
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="loss_qvalue") as caught:
            stepper.step(None, batch)
        assert (caught.value.step, caught.value.unit) == (2, "update")
        assert changed(loss, before) == set()
    with pytest.raises(NonFiniteError):
        stepper.raise_if_nonfinite()
