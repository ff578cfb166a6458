from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torchrl.envs.utils import check_env_specs

from alm_torchrl.envs import gym as envs
from alm_torchrl.envs.gym import TASKS, TerminalSurvivalReward, make_env

TRUNCATED = {
    "T-Ant-v5": (
        "Ant-v5",
        {"include_cfrc_ext_in_observation": False},
        1.0,
    ),
    "T-Humanoid-v5": (
        "Humanoid-v5",
        {
            "include_cinert_in_observation": False,
            "include_cvel_in_observation": False,
            "include_qfrc_actuator_in_observation": False,
            "include_cfrc_ext_in_observation": False,
        },
        5.0,
    ),
}


class Spaces(gymnasium.Env):
    """Any two spaces; remembers the last action it was given."""

    def __init__(self, observation_space, action_space):
        self.observation_space = observation_space
        self.action_space = action_space
        self.closed = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.action = action
        return self.observation_space.sample(), np.float64(0.1), False, False, {}

    def close(self):
        self.closed = True


FLAT = spaces.Box(-np.inf, np.inf, (3,), np.float64)
UNIT = spaces.Box(-1.0, 1.0, (2,), np.float32)


@pytest.fixture
def register():
    """Registers a task under a name of its own; forgets it afterwards."""
    names = []

    def register_task(observation_space, action_space, **kwargs):
        name = f"Test-v{len(names)}"
        gymnasium.register(
            name, lambda: Spaces(observation_space, action_space), **kwargs
        )
        names.append(name)
        return name

    yield register_task
    for name in names:
        del gymnasium.registry[name]


def forward_and_costs(task, env, action, before):
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


def position(task, env):
    """x of the ant's torso, or of the humanoid's centre of mass."""
    data = env.unwrapped.data
    if task == "T-Ant-v5":
        return data.body("torso").xpos[0]
    mass = env.unwrapped.model.body_mass
    return (mass * data.xipos[:, 0]).sum() / mass.sum()


def fell(task, env):
    height = env.unwrapped.data.qpos[2]
    low, high = (0.2, 1.0) if task == "T-Ant-v5" else (1.0, 2.0)
    return not low <= height <= high


@pytest.mark.filterwarnings("ignore:the actions of Pendulum")
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.id)
def test_tasks_are_float32_and_as_listed(task):
    env = make_env(task.id, seed=0)
    rollout = env.rollout(3)
    assert rollout["observation"].shape == (3, task.observation_dim)
    assert rollout["action"].shape == (3, task.action_dim)
    assert rollout["next", "reward"].shape == (3, 1)
    for key in ("observation", "action", ("next", "observation"), ("next", "reward")):
        assert rollout[key].dtype == torch.float32, key
    assert env.observation_spec["observation"].dtype == torch.float32
    assert env.action_spec.dtype == env.reward_spec.dtype == torch.float32
    assert gymnasium.spec(task.id).max_episode_steps == task.max_episode_steps
    assert task.note


@pytest.mark.parametrize("task", ["HalfCheetah-v5", "T-Ant-v5"])
def test_specs_hold(task):
    check_env_specs(make_env(task, seed=0))


def test_casting_rounds_and_changes_nothing_else():
    env = make_env("HalfCheetah-v5", seed=3)
    plain = gymnasium.make("HalfCheetah-v5")
    plain.reset(seed=3)
    observation, _ = plain.reset()
    tensordict = env.reset()
    for _ in range(5):
        np.testing.assert_array_equal(
            tensordict["observation"], observation.astype(np.float32)
        )
        action = env.action_spec.rand()
        tensordict = env.step(tensordict.set("action", action))
        observation, reward, *_ = plain.step(action.numpy())
        assert tensordict["next", "reward"].item() == np.float32(reward)
        tensordict = env.step_mdp(tensordict)


def test_float64_actions_reach_the_task_as_float64(register):
    low, high = np.array([-1.0, -0.5]), np.array([1.0, 0.5])
    task = register(FLAT, spaces.Box(low, high, dtype=np.float64))
    env = make_env(task)
    assert env.action_spec.dtype == torch.float32
    assert env.action_spec.space.high.tolist() == [1.0, 0.5]
    env.step(env.reset().set("action", torch.tensor([0.25, -0.5])))
    action = env.unwrapped.action
    assert action.dtype == np.float64
    assert action.tolist() == [0.25, -0.5]


@pytest.mark.parametrize("task", TRUNCATED)
def test_truncated_tasks_pay_the_published_reward(task):
    _, _, survival = TRUNCATED[task]
    env = gymnasium.make(task)
    generator = np.random.default_rng(0)
    env.reset(seed=0)
    terminals = 0
    largest_contact = 0.0
    for step in range(1000):
        before = position(task, env)
        action = generator.uniform(env.action_space.low, env.action_space.high)
        action = action.astype(np.float32)
        _, reward, terminated, truncated, info = env.step(action)
        expected = forward_and_costs(task, env, action, before) + survival
        assert reward == pytest.approx(expected, abs=1e-6)
        assert info["reward_survive"] == survival
        assert terminated == fell(task, env)
        largest_contact = max(largest_contact, -info["reward_contact"])
        if step % 200 == 199:  # Ants seldom fall by themselves: lift them.
            qpos = env.unwrapped.data.qpos.copy()
            qpos[2] = 2.5
            env.unwrapped.set_state(qpos, env.unwrapped.data.qvel)
        if terminated or truncated:
            terminals += terminated
            env.reset()
    assert terminals >= 4
    assert largest_contact > 0


@pytest.mark.parametrize("task", TRUNCATED)
def test_truncated_tasks_differ_from_v5_by_the_last_survival_reward(task):
    original, arguments, survival = TRUNCATED[task]
    ours, theirs = gymnasium.make(task), gymnasium.make(original, **arguments)
    first = [env.reset(seed=1)[0] for env in (ours, theirs)]
    np.testing.assert_array_equal(*first)
    generator = np.random.default_rng(1)
    for step in range(300):
        action = generator.uniform(-1, 1, env_size(ours)).astype(np.float32)
        if step == 20:
            for env in (ours, theirs):
                qpos = env.unwrapped.data.qpos.copy()
                qpos[2] = 2.5
                env.unwrapped.set_state(qpos, env.unwrapped.data.qvel)
        mine, reference = ours.step(action), theirs.step(action)
        np.testing.assert_array_equal(mine[0], reference[0])
        assert mine[2:4] == reference[2:4]
        extra = survival if mine[2] else 0.0
        assert mine[1] == reference[1] + extra
        assert mine[4]["reward_survive"] == survival
        if mine[2]:
            break
    assert mine[2]


def env_size(env):
    return env.action_space.shape


def test_registration_is_idempotent():
    before = {task: gymnasium.spec(task) for task in TRUNCATED}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs._register()
    assert all(gymnasium.spec(task) is spec for task, spec in before.items())


def test_truncated_tasks_can_be_rebuilt_from_their_spec():
    env = gymnasium.make("T-Ant-v5", healthy_reward=3.0)
    again = gymnasium.make(env.spec)
    again.reset(seed=0)
    qpos = again.unwrapped.data.qpos.copy()
    qpos[2] = 2.5
    again.unwrapped.set_state(qpos, again.unwrapped.data.qvel)
    _, _, terminated, _, info = again.step(np.zeros(8, np.float32))
    assert terminated
    assert info["reward_survive"] == 3.0


def test_survival_wrapper_needs_a_survival_reward():
    with pytest.raises(ValueError, match=r"survival \(healthy\) reward"):
        TerminalSurvivalReward(gymnasium.make("HalfCheetah-v5"))


def test_seed_decides_the_episodes():
    starts = [make_env("Hopper-v5", seed=seed).reset() for seed in (0, 0, 1)]
    first, same, other = (start["observation"] for start in starts)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_making_draws_nothing_from_global_generators():
    torch_state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    make_env("Hopper-v5", seed=0).reset()
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002


def test_device():
    env = make_env("Hopper-v5", device="cpu")
    assert env.device == env.reset().device == torch.device("cpu")
    assert make_env("Hopper-v5").device is None


def test_keywords_reach_gymnasium():
    env = make_env("HalfCheetah-v5", max_episode_steps=3, forward_reward_weight=0.0)
    rollout = env.rollout(10)
    assert rollout["next", "truncated"].flatten().tolist() == [False, False, True]
    cost = -0.1 * rollout["action"].square().sum(-1, keepdim=True)
    torch.testing.assert_close(rollout["next", "reward"], cost)


def test_rescale_maps_one_to_the_bound():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make_env("Pendulum-v1", action_bounds="rescale", seed=0)
    assert env.action_spec.space.low.tolist() == [-1.0]
    assert env.action_spec.space.high.tolist() == [1.0]
    assert env.action_spec.dtype == torch.float32
    for action in (1.0, -1.0, 0.5):
        env.step(env.reset().set("action", torch.tensor([action])))
        assert env.unwrapped.last_u == pytest.approx(2 * action)


def test_rescale_maps_uneven_bounds(register):
    box = spaces.Box(np.array([0.0, -4.0]), np.array([1.0, 8.0]), dtype=np.float64)
    env = make_env(register(FLAT, box), action_bounds="rescale")
    env.step(env.reset().set("action", torch.tensor([-1.0, 0.5])))
    np.testing.assert_allclose(env.unwrapped.action, [0.0, 5.0], atol=1e-6)


def test_clamp_keeps_the_bounds_and_warns_beyond_one():
    with pytest.warns(UserWarning, match=r"Pendulum-v1 lie between -2 and 2") as record:
        env = make_env("Pendulum-v1")
    assert [w.filename for w in record] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.rollout(3)
    assert env.action_spec.space.high.tolist() == [2.0]


def test_clamp_is_silent_within_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make_env("Humanoid-v5")
    assert env.action_spec.space.high.max().item() == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("observation_space", "match"),
    [
        (spaces.Box(0, 255, (8, 8, 3), np.uint8), r"flat vectors.*uint8.*images"),
        (spaces.Box(0, 255, (8,), np.uint8), r"flat vectors of floats.*uint8"),
        (spaces.Box(-1.0, 1.0, (2, 2)), r"one dimension.*\(2, 2\)"),
        (spaces.Dict(a=UNIT), r"Dict\('a'.*FlattenObservation"),
        (spaces.Tuple([UNIT]), r"Tuple.*FlattenObservation"),
        (spaces.Discrete(4), r"Discrete\(4\).*FlattenObservation"),
    ],
)
def test_unsupported_observations(register, observation_space, match):
    task = register(observation_space, UNIT)
    with pytest.raises(ValueError, match=match) as error:
        make_env(task)
    assert task in str(error.value)


@pytest.mark.parametrize(
    ("action_space", "match"),
    [
        (spaces.Discrete(3), r"continuous vectors.*Discrete\(3\)"),
        (spaces.MultiDiscrete([2, 2]), r"continuous vectors.*MultiDiscrete"),
        (spaces.Box(0, 3, (2,), np.int64), r"Box space of floats.*int64"),
        (spaces.Box(-1.0, 1.0, (2, 2)), r"one dimension.*\(2, 2\)"),
        (spaces.Box(-np.inf, np.inf, (2,)), r"finite bounds.*inf"),
        (spaces.Box(np.float32([-1, -np.inf]), np.float32([1, 1])), r"finite bounds"),
    ],
)
@pytest.mark.parametrize("action_bounds", ["clamp", "rescale"])
def test_unsupported_actions(register, action_space, action_bounds, match):
    task = register(FLAT, action_space)
    with pytest.raises(ValueError, match=match) as error:
        make_env(task, action_bounds=action_bounds)
    assert task in str(error.value)


@pytest.mark.parametrize("task", ["Nope-v1", "Ant-v99", "a b", "no_module:Nope-v1"])
def test_unknown_tasks(task):
    with pytest.raises(ValueError, match="`alm-torchrl tasks` lists") as error:
        make_env(task)
    assert repr(task) in str(error.value)


def test_a_colon_imports_the_module_first(tmp_path, monkeypatch):
    (tmp_path / "own_tasks.py").write_text(
        "import gymnasium\n"
        "spec = gymnasium.spec('Pendulum-v1')\n"
        "gymnasium.register('Own-v0', spec.entry_point, max_episode_steps=7)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        env = make_env("own_tasks:Own-v0", action_bounds="rescale")
    finally:
        gymnasium.registry.pop("Own-v0", None)
    assert env.rollout(20).batch_size == (7,)


@pytest.mark.filterwarnings("ignore:.*The environment Ant-v2 is out of date")
def test_tasks_that_moved_away():
    with pytest.raises(ImportError, match=r"'Ant-v2' cannot be built.*alm-torchrl tas"):
        make_env("Ant-v2")


def test_unknown_action_bounds():
    with pytest.raises(ValueError, match="'clamp' or 'rescale', got 'squash'"):
        make_env("HalfCheetah-v5", action_bounds="squash")
