from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import (
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    TransformObservation,
)
from tensordict import TensorDict
from torchrl.envs import EnvBase, GymWrapper, SerialEnv, TransformedEnv

from alm_torchrl.env_state import (
    EnvironmentStateError,
    environment_state,
    load_environment_state,
)
from alm_torchrl.envs import TASKS, make_env
from tests.walk_env import Odd, Walk, wrap

OTHERS = (
    *("Reacher-v5", "Pusher-v5", "Swimmer-v5", "InvertedDoublePendulum-v5"),
    *("HumanoidStandup-v5", "InvertedPendulum-v5"),
)
# Some actions reach beyond +-1, which make_env warns about.
pytestmark = pytest.mark.filterwarnings("ignore:the actions of:UserWarning")


def make(task, seed=None, **kwargs):
    if task == "Pendulum-v1":
        kwargs["action_bounds"] = "rescale"
    return make_env(task, seed=seed, **{"max_episode_steps": 30, **kwargs})


def layer(state, name):
    """The entry of one layer of an environment's state."""
    (entry,) = [e for e in state["layers"] if e["class"].endswith(name)]
    return entry


def draw_actions(env, count, seed=0):
    space = env.action_spec.space
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, *env.action_spec.shape, generator=generator)
    return space.low + (space.high - space.low) * draws


def run(env, actions):
    """Steps and resets at ends: all that came out, row by row, and the ends' number."""
    rows, ends = [], 0
    for action in actions:
        after = env.step(TensorDict({"action": action}))["next"]
        keys = ("observation", "reward", "terminated", "truncated", "done")
        rows.append(torch.cat([after[key].double() for key in keys]))
        if after["done"].item():
            ends += 1
            rows.append(env.reset()["observation"].double())
    return rows, ends


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours[0], theirs[0], strict=True))


def start(env, steps=19):
    """Brings an environment into the middle of an episode that is not its first."""
    env.reset()
    run(env, draw_actions(env, steps, seed=1))
    if env.base_env._env.get_wrapper_attr("_elapsed_steps") == 0:
        run(env, draw_actions(env, 1, seed=2))
    return env


def same_course(env, other, mutate=lambda state: None, steps=65):
    """Whether ``other`` goes on as ``env`` does once it has taken its state."""
    state = environment_state(env)
    actions = draw_actions(env, steps)
    expected = run(env, actions)
    assert expected[1] > 0
    mutate(state)
    load_environment_state(other, state)
    actual = run(other, actions)
    return len(actual[0]) == len(expected[0]) and equal(actual, expected)


@pytest.mark.parametrize("task", [*(task.id for task in TASKS), *OTHERS])
def test_fresh_environments_go_on_bit_for_bit(task, tmp_path):
    env = start(make(task, seed=0))
    state = environment_state(env)
    assert_plain(state)
    actions = draw_actions(env, 65)
    expected = run(env, actions)
    assert expected[1] > 0
    save(state, tmp_path)
    for other in (start(make(task, seed=7), steps=8), make(task)):
        load_environment_state(other, load(tmp_path))
        assert equal(run(other, actions), expected)


def test_taking_the_state_changes_nothing():
    env, twin = (start(make("Walker2d-v5", seed=0)) for _ in range(2))
    environment_state(env)
    actions = draw_actions(env, 65)
    assert equal(run(env, actions), run(twin, actions))


def test_a_real_time_limit_is_kept():
    env = start(make("HalfCheetah-v5", seed=0, max_episode_steps=None), steps=950)
    assert same_course(env, make("HalfCheetah-v5", max_episode_steps=None))


def test_rendering_stays_as_it_is():
    env = start(make("Pendulum-v1", seed=0, render_mode="rgb_array"))
    env.base_env._env.render()
    other = make("Pendulum-v1")
    state = environment_state(env)
    load_environment_state(other, state)
    assert other.base_env._env.unwrapped.render_mode is None
    load_environment_state(env, environment_state(other))
    assert env.base_env._env.render().shape == (500, 500, 3)
    assert same_course(env, other)


def assert_plain(state, path="state"):
    if isinstance(state, dict):
        for key, value in state.items():
            assert type(key) is str, path
            assert_plain(value, f"{path}/{key}")
    elif isinstance(state, list):
        for index, value in enumerate(state):
            assert_plain(value, f"{path}/{index}")
    else:
        kinds = (bool, int, float, str, type(None), np.ndarray, torch.Tensor)
        assert type(state) in kinds, path


def save(state, folder):
    arrays = {}

    def strip(value):
        if isinstance(value, np.ndarray):
            arrays[str(len(arrays))] = value
            return {"array": len(arrays) - 1}
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items()}
        return [strip(item) for item in value] if isinstance(value, list) else value

    (folder / "state.json").write_text(json.dumps(strip(state), sort_keys=True))
    np.savez(folder / "state.npz", **arrays)


def load(folder):
    def fill(value):
        if isinstance(value, dict):
            if list(value) == ["array"]:
                return arrays[str(value["array"])]
            return {key: fill(item) for key, item in value.items()}
        return [fill(item) for item in value] if isinstance(value, list) else value

    with np.load(folder / "state.npz") as arrays:
        return fill(json.loads((folder / "state.json").read_text()))


def go_on_elsewhere(folder):
    env = make("Humanoid-v5", seed=3)
    load_environment_state(env, load(folder))
    torch.save(run(env, draw_actions(env, 65)), folder / "course.pt")


@pytest.mark.slow
def test_another_process_goes_on_bit_for_bit(tmp_path):
    env = start(make("Humanoid-v5", seed=0))
    save(environment_state(env), tmp_path)
    expected = run(env, draw_actions(env, 65))
    tests = Path(__file__).parents[2]
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"import pathlib, sys; sys.path[:0] = [{str(tests)!r}, "
            f"{str(tests.parent)!r}]; from tests.training import test_env_state; "
            f"test_env_state.go_on_elsewhere(pathlib.Path({str(tmp_path)!r}))",
        ],
        check=True,
        cwd=tmp_path,
    )
    actual = torch.load(tmp_path / "course.pt")
    assert expected[1] > 0
    assert equal(actual, expected)


def of_another(state):
    """The simulation in a state, and that of an environment elsewhere."""
    other = environment_state(start(make("Humanoid-v5", seed=3)))
    return [
        layer(whole, "HumanoidEnv")["attributes"]["data"]["simulator"]
        for whole in (state, other)
    ]


def forget_derived(state):
    simulator, other = of_another(state)
    simulator["derived"] = other["derived"]


def forget_integration(state):
    simulator, other = of_another(state)
    simulator["integration"] = other["integration"]


def forget_generator(state):
    layer(state, "HumanoidEnv")["attributes"]["_np_random"] = None


def forget_time_limit(state):
    layer(state, "TimeLimit")["attributes"]["_elapsed_steps"] = 0


@pytest.mark.parametrize(
    "forget",
    [
        forget_derived,
        forget_integration,
        forget_generator,
        forget_time_limit,
    ],
)
def test_each_part_of_the_state_matters(forget):
    # Without a healthy state, an episode lasts until its time is up.
    env, other = (
        make("Humanoid-v5", seed=seed, terminate_when_unhealthy=False)
        for seed in (0, 7)
    )
    other.reset()
    assert not same_course(start(env), other, forget)


def test_episode_statistics_and_running_moments_go_on():
    def wrapped(seed):
        env = gymnasium.make("Pendulum-v1", max_episode_steps=30)
        env = NormalizeReward(NormalizeObservation(RecordEpisodeStatistics(env)))
        env = TransformObservation(
            env,
            lambda array: array.astype(np.float32),
            spaces.Box(-np.inf, np.inf, (3,)),
        )
        return wrap(env, seed)

    env, other = start(wrapped(0), 40), wrapped(1)
    assert same_course(env, other)
    ours, theirs = (
        e.base_env._env.get_wrapper_attr("length_queue") for e in (env, other)
    )
    assert type(theirs) is deque
    assert theirs.maxlen == ours.maxlen
    assert list(theirs) == list(ours) == [30] * 3
    assert other.base_env._env.get_wrapper_attr("episode_count") == 3
    moments = [e.base_env._env.get_wrapper_attr("obs_rms") for e in (env, other)]
    np.testing.assert_array_equal(moments[0].var, moments[1].var)


def test_an_episodes_clock_does_not_run_while_it_is_stored(monkeypatch):
    env, other = (
        wrap(RecordEpisodeStatistics(gymnasium.make("Pendulum-v1")), 0)
        for _ in range(2)
    )
    env.reset()
    now = time.perf_counter()
    monkeypatch.setattr(time, "perf_counter", lambda: now + 5)
    state = environment_state(env)
    monkeypatch.setattr(time, "perf_counter", lambda: now - 1000)
    load_environment_state(other, state)
    passed = now - 1000 - other.base_env._env.episode_start_time
    assert 5 <= passed < 60


class Own(Walk):
    """Keeps its position where attributes do not show it, and hands it out."""

    def __init__(self):
        super().__init__(hidden=Odd())

    def step(self, action):
        self.hidden.count = getattr(self.hidden, "count", 0) + 1
        step = super().step(action)
        return step[0] + self.hidden.count, *step[1:]

    def checkpoint_state(self):
        count = getattr(self.hidden, "count", 0)
        return {"count": count, "at": self.position, "random": self.np_random}

    def load_checkpoint_state(self, state):
        self.hidden.count = state["count"]
        self.position = state["at"]
        self.np_random = state["random"]


def test_an_environments_own_methods_are_used():
    def limited(seed):
        return wrap(gymnasium.wrappers.TimeLimit(Own(), 30), seed)

    env = limited(0)
    assert same_course(start(env), limited(1))
    layers = environment_state(env)["layers"]
    assert "own" in layers[1]
    assert "own" not in layers[0]


def test_what_own_methods_return_must_be_plain():
    env = wrap(Own())
    env.base_env._env.position = Odd()
    with pytest.raises(EnvironmentStateError, match=r"checkpoint_state.* of Own is a"):
        environment_state(env)


class Half(Walk):
    def checkpoint_state(self):
        return {}


def test_both_methods_are_needed():
    with pytest.raises(EnvironmentStateError, match="Half has checkpoint_state, but"):
        environment_state(wrap(Half()))


class Counter(EnvBase):
    """A TorchRL environment that counts its steps."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def _reset(self, tensordict=None):
        raise NotImplementedError

    def _step(self, tensordict):
        raise NotImplementedError

    def _set_seed(self, seed):
        raise NotImplementedError


class OwnCounter(Counter):
    def checkpoint_state(self):
        return {"count": self.count}

    def load_checkpoint_state(self, state):
        self.count = state["count"]


def test_torchrl_environments_need_the_methods():
    with pytest.raises(
        EnvironmentStateError,
        match=r"Counter .*checkpoint_state and load_checkpoint_state",
    ):
        environment_state(Counter())
    env, other = OwnCounter(), OwnCounter()
    env.count = 12
    load_environment_state(other, environment_state(env))
    assert other.count == 12


class Wrapper(GymWrapper):
    """A wrapper of somebody's own, which may have state of its own."""


def test_batches_and_other_wrappers_are_refused():
    batch = SerialEnv(2, lambda: wrap(Walk()))
    with pytest.raises(EnvironmentStateError, match="batch size"):
        environment_state(batch)
    with pytest.raises(EnvironmentStateError, match=r"Wrapper .*checkpoint_state"):
        environment_state(TransformedEnv(Wrapper(Walk())))


def test_another_environments_state_is_refused():
    env = make("Hopper-v5")
    state = environment_state(env)
    # Refused before anything is changed.
    before = env.base_env._env.get_wrapper_attr("_np_random")
    for other, message in (
        (make("Walker2d-v5"), "the same classes"),
        (make("Hopper-v5", max_episode_steps=31), "TimeLimit with the same arguments"),
        (make("Hopper-v5", frame_skip=2), "HopperEnv with the same arguments"),
        (wrap(gymnasium.make("Hopper-v5")), "the same classes"),
        (make("T-Ant-v5"), "the same classes"),
    ):
        with pytest.raises(ValueError, match=message):
            load_environment_state(other, state)
    with pytest.raises(ValueError, match="HumanoidEnv with the same task"):
        load_environment_state(
            wrap(gymnasium.make("Humanoid-v5").unwrapped),
            environment_state(wrap(gymnasium.make("T-Humanoid-v5").unwrapped)),
        )
    with pytest.raises(ValueError, match="format None"):
        load_environment_state(env, {})
    assert env.base_env._env.get_wrapper_attr("_np_random") is before


def test_another_mujoco_model_is_refused():
    env, other = make("Hopper-v5"), make("Hopper-v5")
    other.base_env._env.unwrapped.model.geom_friction[1] *= 1.01
    with pytest.raises(ValueError, match="another one: geom_friction has other values"):
        load_environment_state(other, environment_state(env))
    walker = make("Walker2d-v5", xml_file="walker2d.xml")
    with pytest.raises(ValueError, match="MuJoCo model is another one"):
        load_environment_state(make("Walker2d-v5"), environment_state(walker))


def test_simulations_with_unreadable_state_are_refused():
    import mujoco

    env = make("Hopper-v5")
    env.base_env._env.unwrapped.model.opt.enableflags |= int(
        mujoco.mjtEnableBit.mjENBL_SLEEP
    )
    with pytest.raises(EnvironmentStateError, match=r"'data' of HopperEnv .* asleep"):
        environment_state(env)
