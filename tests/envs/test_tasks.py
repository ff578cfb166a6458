"""The paper's tasks: what they show, and what they pay."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from torchrl.envs.utils import check_env_specs

from alm_torchrl.envs import TASKS, make_env
from alm_torchrl.envs.tasks import TerminalSurvivalReward, _register

# The task that each truncated one was made from, what it leaves out, what it survives.
TRUNCATED = {
    "T-Ant-v5": ("Ant-v5", ["cfrc_ext"], 1.0),
    "T-Humanoid-v5": (
        "Humanoid-v5",
        ["cinert", "cvel", "qfrc_actuator", "cfrc_ext"],
        5.0,
    ),
}


def position(task, env):
    """x of the ant's torso, or of the humanoid's centre of mass."""
    data = env.unwrapped.data
    if task == "T-Ant-v5":
        return data.body("torso").xpos[0]
    mass = env.unwrapped.model.body_mass
    return (mass * data.xipos[:, 0]).sum() / mass.sum()


def published_reward(task, env, action, before):
    """The published reward, without survival, from the simulator's own numbers."""
    model, data = env.unwrapped.model, env.unwrapped.data
    seconds = model.opt.timestep * env.unwrapped.frame_skip
    speed = (position(task, env) - before) / seconds
    if task == "T-Ant-v5":
        forces = np.clip(data.cfrc_ext, -1.0, 1.0)
        contact = 0.5 * 1e-3 * np.square(forces).sum()
        return speed - 0.5 * np.square(action).sum() - contact
    contact = min(0.5e-6 * np.square(data.cfrc_ext).sum(), 10.0)
    return 1.25 * speed - 0.1 * np.square(data.ctrl).sum() - contact


def fell(task, env):
    height = env.unwrapped.data.qpos[2]
    low, high = (0.2, 1.0) if task == "T-Ant-v5" else (1.0, 2.0)
    return not low <= height <= high


def lift(env):
    """Lifts the body so high that the next step ends the episode."""
    qpos = env.unwrapped.data.qpos.copy()
    qpos[2] = 2.5
    env.unwrapped.set_state(qpos, env.unwrapped.data.qvel)


@pytest.mark.filterwarnings("ignore:task. the actions of Pendulum")
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_tasks_are_float32_and_as_listed(task):
    env = make_env(task.id, seed=0)
    rollout = env.rollout(3)
    assert rollout["observation"].shape == (3, task.observation_dim)
    assert rollout["action"].shape == (3, task.action_dim)
    assert rollout["next", "reward"].shape == (3, 1)
    for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
        assert rollout[key].dtype == torch.float32, key
    assert gymnasium.spec(task.id).max_episode_steps == task.max_episode_steps
    check_env_specs(env)


@pytest.mark.parametrize("task", TRUNCATED)
def test_truncated_tasks_pay_the_published_reward(task):
    *_, survival = TRUNCATED[task]
    env = gymnasium.make(task)
    env.reset(seed=0)
    env.action_space.seed(0)
    terminals = 0
    largest_contact = 0.0
    for step in range(200):
        before = position(task, env)
        action = env.action_space.sample()
        _, reward, terminated, truncated, info = env.step(action)
        expected = published_reward(task, env, action, before) + survival
        assert reward == pytest.approx(expected, abs=1e-6)
        assert info["reward_survive"] == survival
        assert terminated == fell(task, env)
        largest_contact = max(largest_contact, -info["reward_contact"])
        if step % 50 == 49:  # Ants seldom fall by themselves.
            lift(env)
        if terminated or truncated:
            terminals += terminated
            env.reset()
    assert terminals >= 3
    assert largest_contact > 0


@pytest.mark.parametrize("task", TRUNCATED)
def test_make_env_adds_exactly_the_survival_reward_that_v5_leaves_out(task):
    original, left_out, survival = TRUNCATED[task]
    arguments = {f"include_{name}_in_observation": False for name in left_out}
    ours = make_env(task, seed=1)
    theirs = make_env(original, seed=1, **arguments)
    mine, reference = ours.reset(), theirs.reset()
    for step in range(30):
        assert torch.equal(mine["observation"], reference["observation"])
        action = theirs.action_spec.rand()
        if step == 20:
            lift(ours)
            lift(theirs)
        mine, reference = (
            env.step(td.set("action", action))["next"]
            for env, td in ((ours, mine), (theirs, reference))
        )
        assert torch.equal(mine["terminated"], reference["terminated"])
        extra = survival if mine["terminated"] else 0.0
        torch.testing.assert_close(mine["reward"], reference["reward"] + extra)
        if mine["terminated"]:
            break
    assert mine["terminated"]


def test_a_survival_reward_that_is_paid_is_not_paid_twice():
    paid = TerminalSurvivalReward(gymnasium.make("Hopper-v5", healthy_reward=3.0))
    rewards = []
    for env in (paid, TerminalSurvivalReward(paid)):
        env.reset(seed=0)
        terminated, total = False, []
        while not terminated:
            _, reward, terminated, _, info = env.step(np.ones(3, np.float32))
            total.append(float(reward))
        assert info["reward_survive"] == 3.0
        rewards.append(total)
    assert rewards[0] == rewards[1]


def test_survival_wrapper_needs_a_survival_reward():
    with pytest.raises(ValueError, match="expected a MuJoCo task with a survival rew"):
        TerminalSurvivalReward(gymnasium.make("HalfCheetah-v5"))


@pytest.mark.filterwarnings("error")
def test_a_task_is_registered_once_and_rebuilt_from_its_spec():
    before = gymnasium.spec("T-Ant-v5")
    _register("T-Ant-v5", "other:Env")
    assert gymnasium.spec("T-Ant-v5") is before
    env = gymnasium.make(gymnasium.make("T-Ant-v5", healthy_reward=3.0).spec)
    env.reset(seed=0)
    lift(env)
    _, _, terminated, _, info = env.step(np.zeros(8, np.float32))
    assert terminated
    assert info["reward_survive"] == 3.0
