"""TD3, SAC and REDQ in training: trainer, exact resume, command line."""

from __future__ import annotations

import functools
import json

import pytest
import torch

from alm_torchrl import load_policy, make_env
from alm_torchrl.cli import main
from alm_torchrl.runs.folder import read_run
from tests.baselines.losses import AGENTS, make_loss
from tests.training import resume_runs
from tests.training.resume_runs import final, logged, train
from tests.training.trainer_runs import Counter, build, differing

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


@pytest.mark.parametrize("agent", ["td3", "redq"])
def test_resumed_equals_uninterrupted(agent, tmp_path, monkeypatch):
    monkeypatch.setattr(resume_runs, "tiny_loss", functools.partial(make_loss, agent))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"total_steps": 20, "eval_interval": 8}
    train(whole, "Pendulum-v1", **options)
    train(parts, "Pendulum-v1", stop=20, **options)
    middle = final(parts)
    assert 20 <= middle["/counts/0"] < 30
    train(parts, "Pendulum-v1", **options)
    end = final(parts)
    assert differing(end, final(whole)) == []
    assert end["/stepper/count"] == 20
    assert logged(parts / "log.txt") == logged(whole / "log.txt")
    names = {name for _, name in logged(whole / "log.txt")}
    assert {"loss_qvalue", "loss_actor", "eval/return"} <= names


def test_modes_that_only_alm_has_are_refused():
    env = Counter()
    for setting, value in (("precision", "bf16"), ("compile", True), ("cudagraph", 1)):
        with pytest.raises(ValueError, match=f"^{setting}: expected .* with sac"):
            build(env, make_loss("sac", env), **{setting: value})


# -- command line ----------------------------------------------------------------------


def test_command_trains_scores_and_keeps_a_policy(tmp_path, monkeypatch, capsys):
    agent = "sac"
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
        main([*common, "--agent", agent, "--compile", "on", "--run-dir", "other"])
    assert "--compile: expected auto or off with sac" in capsys.readouterr().err
