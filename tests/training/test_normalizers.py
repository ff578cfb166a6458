"""Agents of tasks that normalise: their moments are part of what was trained."""

from __future__ import annotations

import gymnasium
import pytest
import torch
from gymnasium.wrappers import NormalizeObservation, NormalizeReward

from alm_torchrl import evaluate_policy, make_alm_loss, make_env, make_trainer
from alm_torchrl.envs import LockstepEnv, Normalizers
from alm_torchrl.runs.loading import use_moments
from alm_torchrl.training.rotation import numbered_checkpoints

STEPS = {"total_steps": 6, "warmup_steps": 30, "batch_size": 4}


@pytest.fixture(scope="module", autouse=True)
def task():
    def normalised(**kwargs):
        env = gymnasium.make("Pendulum-v1", max_episode_steps=12, **kwargs)
        return NormalizeReward(NormalizeObservation(env))

    gymnasium.register("Normalised-v0", normalised)
    yield
    del gymnasium.registry["Normalised-v0"]


def make(name="Normalised-v0"):
    return make_env(name, action_bounds="rescale")


def make_two():
    return LockstepEnv([make(), make()])


def trainer(folder, rows, eval_env, **kwargs):
    env = make()
    torch.manual_seed(0)
    loss = make_alm_loss(env, hidden_dim=8, model_hidden_dim=8)
    return make_trainer(
        env,
        loss,
        **{**STEPS, **kwargs},
        eval_env=eval_env,
        eval_interval=3,
        eval_episodes=2,
        on_evaluation=rows.append,
        checkpoint_dir=folder,
        checkpoint_interval=2,
        keep_checkpoints=9,
    )


@pytest.mark.parametrize("make_eval_env", [make, make_two])
def test_evaluations_checkpoints_and_resumes_share_the_moments(tmp_path, make_eval_env):
    rows, again = [], []
    one = trainer(tmp_path, rows, make_eval_env())
    trained = one.collector.env
    one.train()
    # What acts with the saved networks and moments scores what was logged.
    newest, best = one.checkpoint_rotation.latest(), tmp_path / "best"
    env = make_eval_env()
    use_moments(env, newest)
    expected = Normalizers(trained).state_dict()["1.NormalizeObservation"]["mean"]
    found = Normalizers(env).state_dict()["1.NormalizeObservation"]["mean"]
    assert (found == expected).all()
    assert (found != 0).all()
    seed = STEPS["total_steps"] + 1
    policy = one.loss_module.acting_policy()
    scores = evaluate_policy(env, policy, episodes=2, seed=seed)
    assert scores["return"].mean().item() == rows[-1]["mean_return"]
    use_moments(env, best)
    # A run that goes on logs what the uninterrupted one does.
    other = trainer(tmp_path / "again", again, make_eval_env())
    saved = dict(numbered_checkpoints(tmp_path))
    first = saved[min(step for step in saved if step > STEPS["warmup_steps"])]
    other.load_from_file(first)
    other.train()
    assert again == rows[1:]


def test_an_evaluation_environment_without_the_wrappers_is_refused():
    env = make()
    loss = make_alm_loss(env, hidden_dim=8, model_hidden_dim=8)
    with pytest.raises(
        ValueError, match=r"eval_env must have the normalising wrappers"
    ):
        make_trainer(env, loss, **STEPS, eval_env=make("Pendulum-v1"))
