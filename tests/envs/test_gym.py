"""``make_env``: precision, bounds, seeds, and what it refuses."""

from __future__ import annotations

import copy
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from alm_torchrl.envs import make_env

FLAT = spaces.Box(-np.inf, np.inf, (3,), np.float64)
UNIT = spaces.Box(-1.0, 1.0, (2,), np.float32)


class Spaces(gymnasium.Env):
    """Any two spaces; remembers the last action it was given."""

    def __init__(self, observation_space, action_space):
        self.observation_space = observation_space
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        self.action = action
        return self.observation_space.sample(), np.float64(0.1), False, False, {}


@pytest.fixture
def register():
    """Registers a task under a name of its own; forgets it afterwards."""
    names = []

    def register_task(observation_space, action_space):
        name = f"Test-v{len(names)}"
        gymnasium.register(name, lambda: Spaces(observation_space, action_space))
        names.append(name)
        return name

    yield register_task
    for name in names:
        del gymnasium.registry[name]


def test_casting_rounds_and_changes_nothing_else():
    env = make_env("HalfCheetah-v5", seed=3)
    plain = gymnasium.make("HalfCheetah-v5")
    plain.reset(seed=3)
    observation, _ = plain.reset()
    tensordict = env.reset()
    assert env.device is None
    cpu = torch.device("cpu")
    assert make_env("HalfCheetah-v5", device="cpu").reset().device == cpu
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
    env = make_env(register(FLAT, spaces.Box(low, high, dtype=np.float64)))
    assert env.action_spec.dtype == torch.float32
    assert env.action_spec.space.high.tolist() == [1.0, 0.5]
    env.step(env.reset().set("action", torch.tensor([0.25, -0.5])))
    assert env.unwrapped.action.dtype == np.float64
    assert env.unwrapped.action.tolist() == [0.25, -0.5]


def test_seed_decides_the_episodes_and_leaves_global_generators_alone():
    torch_state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()  # noqa: NPY002
    starts = [make_env("Hopper-v5", seed=seed).reset() for seed in (0, 0, 1)]
    first, same, other = (start["observation"] for start in starts)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002


def test_keywords_reach_gymnasium():
    env = make_env("HalfCheetah-v5", max_episode_steps=3, forward_reward_weight=0.0)
    rollout = env.rollout(10)
    assert rollout["next", "truncated"].flatten().tolist() == [False, False, True]
    cost = -0.1 * rollout["action"].square().sum(-1, keepdim=True)
    torch.testing.assert_close(rollout["next", "reward"], cost)


@pytest.mark.filterwarnings("error")
def test_rescale_maps_one_to_the_bound(register):
    env = make_env("Pendulum-v1", action_bounds="rescale", seed=0)
    assert env.action_spec.space.low.tolist() == [-1.0]
    assert env.action_spec.space.high.tolist() == [1.0]
    assert env.action_spec.dtype == torch.float32
    for action in (1.0, -1.0, 0.5):
        env.step(env.reset().set("action", torch.tensor([action])))
        assert env.unwrapped.last_u == pytest.approx(2 * action)
    uneven = spaces.Box(np.array([0.0, -4.0]), np.array([1.0, 8.0]), dtype=np.float64)
    env = make_env(register(FLAT, uneven), action_bounds="rescale")
    env.step(env.reset().set("action", torch.tensor([-1.0, 0.5])))
    np.testing.assert_allclose(env.unwrapped.action, [0.0, 5.0], atol=1e-6)


def test_clamp_keeps_the_bounds_and_warns_beyond_one():
    with pytest.warns(UserWarning, match=r"Pendulum-v1 lie between -2 and 2") as record:
        env = make_env("Pendulum-v1")
    assert [w.filename for w in record] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env.rollout(3)
        narrow = make_env("Humanoid-v5")
    assert env.action_spec.space.high.tolist() == [2.0]
    assert narrow.action_spec.space.high.max().item() == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (spaces.Box(0, 255, (8, 8, 3), np.uint8), UNIT, r"vectors of .*uint8.*images"),
        (spaces.Box(0.0, 1.0, (0,)), UNIT, r"vectors of .*\(0,\)"),
        (spaces.Box(-1.0, 1.0, (2, 2)), UNIT, r"one dimension.*\(2, 2\)"),
        (
            spaces.Dict(a=UNIT, b=spaces.Discrete(3)),
            UNIT,
            r"Dict\('a'.*FlattenObservation",
        ),
        (spaces.Tuple([spaces.Box(0, 1, (2, 2))]), UNIT, r"vectors of .*Tuple"),
        (spaces.Discrete(4), UNIT, r"Discrete\(4\).*FlattenObservation"),
        (FLAT, spaces.Discrete(3), r"actions that are vectors .*Discrete\(3\)"),
        (FLAT, spaces.Box(0, 3, (2,), np.int64), r"actions .* of floats.*int64"),
        (FLAT, spaces.Box(-1.0, 1.0, (2, 2)), r"actions .*one dimension.*\(2, 2\)"),
        (
            FLAT,
            spaces.Box(np.float32([-1, -np.inf]), np.float32([1, 1])),
            "range that is finite",
        ),
        (FLAT, spaces.Box(-1e39, 1e39, (2,), np.float64), "range that is finite"),
        (FLAT, spaces.Box(-3e38, 3e38, (2,), np.float32), "range that is finite"),
        (
            FLAT,
            spaces.Box(np.float32([-1, 2]), np.float32([1, 2])),
            "range that is finite",
        ),
    ],
)
def test_unsupported_spaces(register, observation_space, action_space, message):
    task = register(observation_space, action_space)
    for action_bounds in ("clamp", "rescale"):
        with pytest.raises(ValueError, match=f"^task: expected .*{message}") as error:
            make_env(task, action_bounds=action_bounds)
        assert task in str(error.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.bool_, np.float16])
def test_vectors_of_other_numbers_become_float32(register, dtype):
    env = make_env(register(spaces.Box(0, 1, (3,), dtype), UNIT))
    first = env.reset()["observation"]
    assert first.dtype == torch.float32
    assert env.observation_spec["observation"].is_in(first)


COUNTS = spaces.Box(0, 9, (3,), np.int64)


@pytest.mark.parametrize(
    ("space", "flat"),
    [
        (spaces.Dict(b=UNIT, a=COUNTS), lambda o: [*o["b"], *o["a"]]),
        (spaces.Tuple([UNIT, COUNTS]), lambda o: [*o[0], *o[1]]),
        (
            spaces.Dict(t=spaces.Tuple([UNIT, spaces.Dict(z=COUNTS)]), s=FLAT),
            lambda o: [*o["t"][0], *o["t"][1]["z"], *o["s"]],
        ),
    ],
)
def test_dictionaries_and_tuples_of_vectors_are_flattened(register, space, flat):
    task = register(space, UNIT)
    with pytest.warns(UserWarning, match=f"{task}.* are flattened to one ve") as record:
        env = make_env(task)
    assert [w.filename for w in record] == [__file__]
    space.seed(0)
    twin = copy.deepcopy(space)
    first, second = (np.float32(flat(twin.sample())) for _ in range(2))
    data = env.reset()
    assert data["observation"].dtype == torch.float32
    np.testing.assert_array_equal(data["observation"], first)
    data = env.step(data.set("action", torch.zeros(2)))
    np.testing.assert_array_equal(data["next", "observation"], second)
    assert env.observation_spec["observation"].is_in(data["observation"])
    assert env.unwrapped.action.tolist() == [0, 0]


@pytest.mark.parametrize(
    "space", [spaces.Dict(a=UNIT, b=spaces.Discrete(3)), spaces.Discrete(4)]
)
def test_the_advice_to_flatten_works(register, space):
    task = register(space, UNIT)
    with pytest.raises(ValueError, match="FlattenObservation"):
        make_env(task)
    spec = gymnasium.spec(task)
    spec.additional_wrappers = (FlattenObservation.wrapper_spec(),)
    assert make_env(task).rollout(3)["observation"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("action_bounds", ["clamp", "rescale"])
@pytest.mark.filterwarnings("ignore:task. the actions")
@settings(max_examples=10)
@given(bounds=st.tuples(*2 * [st.floats(-1e6, 1e6)]), share=st.floats(0, 1))
def test_every_action_in_the_spec_is_in_the_tasks_space(
    dtype, action_bounds, bounds, share
):
    low, high = (dtype(bound) for bound in sorted(bounds))
    assume(np.float32(low) < np.float32(high))
    own = spaces.Box(np.array([low]), np.array([high]), dtype=dtype)
    gymnasium.register("Bounded-v0", lambda: Spaces(FLAT, own))
    try:
        env = make_env("Bounded-v0", action_bounds=action_bounds)
    finally:
        del gymnasium.registry["Bounded-v0"]
    spec = env.action_spec.space
    for action in (spec.low, spec.high, torch.lerp(spec.low, spec.high, share)):
        env.step(env.reset().set("action", action.clamp(spec.low, spec.high)))
        assert own.contains(env.unwrapped.action)
