"""TD3, SAC and REDQ: their terms, their updates, and all that is around them."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import pytest
import resume_runs
import torch
from resume_runs import final, logged, train
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate, ValueEstimators
from trainer_runs import Counter, build, differing

from alm_torchrl import NoiseSchedule, NonFiniteError, load_policy, make_env
from alm_torchrl.baselines import (
    BaselineOptimizationStepper,
    TD3Baseline,
    make_redq_loss,
    make_sac_loss,
    make_td3_loss,
)
from alm_torchrl.baselines.losses import ClampedMeanNormal
from alm_torchrl.cli import main
from alm_torchrl.config import preset_config
from alm_torchrl.plotting import curves_of
from alm_torchrl.runs import Run, harmful_differences, read_run

AGENTS = ("td3", "sac", "redq")
PARTS = ("actor_network_params", "qvalue_network_params", "log_alpha")
SIZES = {"observation_dim": 3, "action_low": [-1.0, -0.4], "action_high": [1.0, 0.4]}
ENSEMBLE = {"num_qvalue_nets": 4, "updates_per_step": 3}
MAKERS = {
    "td3": make_td3_loss,
    "sac": make_sac_loss,
    "redq": functools.partial(make_redq_loss, **ENSEMBLE),
}


def make_loss(agent, env=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    if agent == "td3":
        kwargs = {"noise_schedule": NoiseSchedule(1.0, 0.2, steps=4), **kwargs}
    sizes = SIZES if env is None else {"env": env}
    return MAKERS[agent](**sizes, hidden_dim=8, **kwargs)


def make_batch(rows, loss=None):
    """Random transitions, enough for one step of a loss if one is given."""
    rows *= 1 if loss is None else loss.updates_per_step
    flags = torch.rand(rows, 1) < 0.3
    ends = {"reward": torch.randn(rows, 1), "terminated": flags, "done": flags}
    return TensorDict(
        {
            "observation": torch.randn(rows, 3),
            "action": torch.rand(rows, 2) * 2 - 1,
            "next": {"observation": torch.randn(rows, 3), **ends},
        },
        batch_size=[rows],
    )


def snapshot(loss):
    return {name: leaf.clone() for name, leaf in loss.state_dict().items()}


def changed(loss, before):
    """The parts of a loss whose entries differ from those in ``before``."""
    now = loss.state_dict()
    return {
        name.partition(".")[0]
        for name in now
        if not torch.equal(now[name], before[name])
    }


# -- terms -----------------------------------------------------------------------------


@pytest.mark.parametrize("agent", AGENTS)
def test_each_term_reaches_its_own_parameters(agent):
    loss = make_loss(agent)
    SoftUpdate(loss, tau=0.5)
    batch = make_batch(5)

    def reached(value):
        loss.zero_grad()
        value.backward()
        names = {n for n, p in loss.named_parameters() if p.grad is not None}
        nonzero = {
            n for n, p in loss.named_parameters() if p.grad is not None and p.grad.any()
        }
        return {name.partition(".")[0] for name in names}, nonzero

    def all_of(part):
        return {n for n, _ in loss.named_parameters() if n.startswith(part)}

    parts, nonzero = reached(loss.qvalue_loss(batch)[0])
    assert parts == {"qvalue_network_params"}
    assert nonzero == all_of("qvalue_network_params")
    value, metadata = loss.actor_loss(batch)
    parts, nonzero = reached(value)
    assert parts == {"actor_network_params"}
    assert nonzero == all_of("actor_network_params")
    assert not any(entry.requires_grad for entry in metadata.values())
    assert hasattr(loss, "alpha_loss") is (agent != "td3")
    if agent != "td3":
        parts, _ = reached(loss.alpha_loss(metadata["log_prob"]).mean())
        assert parts == {"log_alpha"}
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
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(head, in_keys=["observation"], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=ClampedMeanNormal,
        ),
    )
    critics = [
        TensorDictModule(
            Line(slope),
            in_keys=["observation", "action"],
            out_keys=["state_action_value"],
        )
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
    ends = torch.tensor([[False], [True]])
    batch = TensorDict(
        {
            "observation": torch.zeros(2, 1),
            "action": torch.full((2, 1), 0.1),
            "next": {
                "observation": torch.full((2, 1), 2.0),
                "reward": torch.ones(2, 1),
                "terminated": ends,
                "done": ends,
            },
        },
        batch_size=[2],
    )
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


def test_redq_terms_are_those_of_torchrl(monkeypatch):
    loss = make_loss("redq")
    SoftUpdate(loss, tau=0.5)
    loss.target_qvalue_network_params.data.apply_(lambda leaf: leaf.mul_(0.7))
    loss.log_alpha.data.fill_(-3.0)
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
    assert theirs["alpha"] == pytest.approx(torch.tensor(-3.0).exp().item())


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
    observations = make_batch(50).select("observation")
    for mode in (ExplorationType.DETERMINISTIC, ExplorationType.RANDOM):
        with set_exploration_type(mode):
            action = loss.acting_policy()(observations.clone())["action"]
        assert action[:, 0].abs().max() <= 1
        assert 0.39 < action[:, 1].abs().max() <= 0.4


def test_td3_mean_at_the_bounds_keeps_its_gradient():
    loss = make_loss("td3")
    SoftUpdate(loss, tau=0.5)
    bias = list(loss.actor_network_params.parameters())[-1]
    with torch.no_grad():
        bias.copy_(torch.tensor([0.0, 3.0]))
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


def test_redq_updates_critics_often_and_the_actor_once(monkeypatch):
    loss = make_loss("redq")
    stepper = BaselineOptimizationStepper(loss, lr=1e-2)
    calls = []
    for name in ("qvalue_loss", "actor_loss"):
        method = getattr(loss, name)
        monkeypatch.setattr(
            loss,
            name,
            lambda batch, name=name, method=method: (
                calls.append((name, batch["observation"].clone())),
                method(batch),
            )[1],
        )
    moves = []
    move = stepper.target_update.step
    monkeypatch.setattr(
        stepper.target_update, "step", lambda: (moves.append(len(calls)), move())
    )
    batch = make_batch(5, loss)
    stepper.step(None, TensorDict({"transition": batch}, batch_size=[15]))
    assert [name for name, _ in calls] == ["qvalue_loss"] * 3 + ["actor_loss"]
    rows = torch.cat([rows for _, rows in calls[:3]])
    assert torch.equal(rows, batch["observation"])
    assert torch.equal(calls[3][1], calls[2][1])
    assert moves == [1, 2, 4]
    with pytest.raises(ValueError, match="sub_batch: expected updates_per_step=3"):
        stepper.step(None, make_batch(5))


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


# -- training --------------------------------------------------------------------------


@pytest.mark.parametrize("agent", AGENTS)
def test_trainer_draws_transitions_for_each_update(agent):
    env = Counter()
    loss = make_loss(agent, env)
    trainer, buffer = build(env, loss)
    drawn = []
    step = trainer.optimization_stepper.step
    trainer.optimization_stepper.step = lambda trainer, batch: (
        drawn.append(batch["transition"].clone()),
        step(trainer, batch),
    )[1]
    trainer.train()
    assert [len(batch) for batch in drawn] == [4 * loss.updates_per_step] * 12
    assert len(buffer) == len(env.history) == 22
    happened = {tuple(step["observation"].tolist()): step for step in env.history}
    for row in drawn[-1]:
        step = happened[tuple(row["observation"].tolist())]
        assert torch.equal(row["action"], step["action"])
        assert torch.equal(row["next", "terminated"], step["terminated"])
    if agent == "td3":
        assert loss.noise_schedule.count == 12


@pytest.mark.parametrize("agent", AGENTS)
def test_resumed_equals_uninterrupted(agent, tmp_path, monkeypatch):
    monkeypatch.setattr(resume_runs, "tiny_loss", functools.partial(make_loss, agent))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"total_steps": 20, "eval_interval": 8}
    train(whole, "Pendulum-v1", **options)
    train(parts, "Pendulum-v1", stop=40, **options)
    middle = final(parts)
    assert 40 <= middle["/counts/0"] < 50
    train(parts, "Pendulum-v1", **options)
    end = final(parts)
    assert differing(end, final(whole)) == []
    assert end["/stepper/count"] == 20
    assert logged(parts / "log.txt") == logged(whole / "log.txt")
    names = {name for _, name in logged(whole / "log.txt")}
    assert {"loss_qvalue", "loss_actor", "eval/return"} <= names


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("precision", "bf16"),
        ("precision", "tf32"),
        ("compile", True),
        ("cudagraph", True),
    ],
)
def test_modes_that_only_alm_has_are_refused(setting, value):
    env = Counter()
    with pytest.raises(ValueError, match=f"^{setting}: expected .* with sac.*{value}"):
        build(env, make_loss("sac", env), **{setting: value})


def test_a_loss_of_another_size_is_refused():
    with pytest.raises(
        ValueError, match=r"actor: expected a network for 'observation'"
    ):
        build(Counter(), make_loss("sac"))


# -- command line ----------------------------------------------------------------------


@pytest.mark.parametrize("agent", AGENTS)
def test_command_trains_scores_and_keeps_a_policy(agent, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny = "--warmup-steps 20 --batch-size 4 --hidden-dim 8 --eval-episodes 1"
    tiny += " --total-steps 4 --eval-interval 4 --threads 1 --logger none"
    common = ["train", "Pendulum-v1", "--action-bounds", "rescale", *tiny.split()]
    assert main([*common, "--agent", agent]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"Pendulum-v1-{agent}-quick-s0-")
    assert json.loads((folder / "config.json").read_text())["agent"] == agent
    run = read_run(folder)
    assert [row["training_step"] for row in run.metrics] == [0, 4]
    assert main(["evaluate", str(folder), "--episodes", "1"]) == 0
    assert "return      mean" in capsys.readouterr().out
    policy = load_policy(folder)
    env = make_env("Pendulum-v1", action_bounds="rescale", seed=0)
    observation = env.reset()
    action = policy(observation.clone())["action"]
    assert torch.equal(action, policy(observation.clone())["action"])
    assert action.shape == (1,)
    # Not the networks that the run began with.
    state = policy.policy.state_dict()
    first = make_loss(agent, env).acting_policy().state_dict()
    assert any(name.endswith("weight") for name in differing(state, first))
    with pytest.raises(SystemExit):
        main([*common, "--agent", agent, "--compile"])
    assert "error: compile: expected False" in capsys.readouterr().err


def test_agent_is_in_the_name_and_in_the_legend(tmp_path):
    configs = [
        replace(preset_config("quick"), agent=agent, seed=seed)
        for agent in ("alm", "sac")
        for seed in (0, 1)
    ]
    assert configs[2].run_name == "HalfCheetah-v5-sac-quick-s0"
    assert configs[2].changes == {}
    rows = [{"training_step": 0, "mean_return": 1.0}]
    runs = [Run(tmp_path, config, rows) for config in configs]
    labels = [curve.label for curve in curves_of(runs)]
    assert labels == ["alm, quick, 2 seeds", "sac, quick, 2 seeds"]
    assert curves_of(runs[:1])[0].label == "quick, seed 0"
    assert curves_of(runs[2:3])[0].label == "sac, quick, seed 0"


def test_runs_that_are_older_than_the_setting_can_be_continued():
    config = preset_config("quick")
    before = {k: v for k, v in config.to_dict().items() if k != "agent"}
    assert harmful_differences(before, config) == {}
    other = replace(config, agent="td3")
    assert harmful_differences(before, other) == {"agent": ("alm", "td3")}
