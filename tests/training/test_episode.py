"""A running episode is repeated from its seed and actions, bit by bit."""

from __future__ import annotations

import random

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import (
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    TimeLimit,
)
from tensordict import TensorDict
from torchrl.checkpoint import CheckpointError
from torchrl.collectors import Collector
from torchrl.envs import (
    Compose,
    NoopResetEnv,
    PendulumEnv,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
    VecNormV2,
)

from alm_torchrl import CollectorState, EpisodeEnv, make_env, random_policy
from alm_torchrl.envs import TASKS
from alm_torchrl.training.files import read_state, write_state
from tests.training.trainer_runs import differing, tensors
from tests.walk_env import Walk, wrap

# Some actions reach beyond +-1, which make_env warns about.
pytestmark = pytest.mark.filterwarnings("ignore:the actions of:UserWarning")

KEYS = ("observation", "reward", "terminated", "truncated", "done")
LIMIT = 12


def make(task, **kwargs):
    bounds = "rescale" if task == "Pendulum-v1" else "clamp"
    return make_env(task, action_bounds=bounds, max_episode_steps=LIMIT, **kwargs)


def limited(env):
    return wrap(TimeLimit(env, LIMIT))


class Holder(gymnasium.Env):
    """Holds another environment."""

    def __init__(self):
        self.held = gymnasium.make("Pendulum-v1")
        self.observation_space = self.held.observation_space
        self.action_space = self.held.action_space

    def reset(self, *, seed=None, options=None):
        return self.held.reset(seed=seed)

    def step(self, action):
        return self.held.step(action)


class OwnGenerator(Walk):
    def reset(self, *, seed=None, options=None):
        self.draws = random.Random(seed)
        return super().reset(seed=seed)

    def step(self, action):
        position, *rest = super().step(action)
        return position + self.draws.gauss(), *rest


class GlobalGenerators(Walk):
    """Draws from the global generators in its resets, and seeds them."""

    def reset(self, *, seed=None, options=None):
        position, info = super().reset(seed=seed)
        draws = torch.rand(1).numpy() + np.random.rand() + random.random()  # noqa: NPY002
        torch.manual_seed(0)
        self.position += draws
        return position + draws, info


class Scribbling(Walk):
    """Writes into its action, and later into what it returned."""

    def reset(self, *, seed=None, options=None):
        self.returned, info = super().reset(seed=seed)
        return self.returned, info

    def step(self, action):
        position, *rest = super().step(action)
        action[:] = 7
        self.returned[:] = 7
        self.returned = position
        return position, *rest


class Curriculum(Walk):
    """Grows harder with each episode."""

    level = 0

    def reset(self, *, seed=None, options=None):
        self.level += 1
        return super().reset(seed=seed)

    def step(self, action):
        position, *rest = super().step(action)
        return position * self.level, *rest


class SavedCurriculum(Curriculum):
    def checkpoint_state(self):
        return {"level": self.level}

    def load_checkpoint_state(self, state):
        self.level = state["level"]


class Half(Walk):
    def checkpoint_state(self):
        return {}


def normalized():
    env = gymnasium.make("Pendulum-v1", max_episode_steps=LIMIT)
    return wrap(NormalizeReward(NormalizeObservation(RecordEpisodeStatistics(env))))


def transformed():
    keys = {"in_keys": ["observation"], "out_keys": ["normalized"]}
    transforms = NoopResetEnv(3), StepCounter(), RewardSum(), VecNormV2(**keys)
    return TransformedEnv(make("Pendulum-v1").base_env, Compose(*transforms))


MADE = {
    "an environment that holds another": lambda: limited(Holder()),
    "a generator of its own": lambda: limited(OwnGenerator()),
    "global generators": lambda: limited(GlobalGenerators()),
    "an environment that scribbles": lambda: limited(Scribbling()),
    "running moments": normalized,
    "state that outlives resets": lambda: limited(SavedCurriculum()),
    "transforms": transformed,
    "an environment of TorchRL's": lambda: TransformedEnv(
        PendulumEnv(), StepCounter(LIMIT)
    ),
}
OTHERS = tuple(MADE)
for task in TASKS:
    MADE[task.id] = lambda task=task.id: make(task)
    if task.id != "Pendulum-v1":
        MADE[f"{task.id} with noise"] = lambda task=task.id: make(
            task, dynamics_noise=0.1
        )


def actions_for(env, count, seed=0):
    space = env.action_spec.space
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, *env.action_spec.shape, generator=generator)
    return space.low + (space.high - space.low) * draws


def run(env, tensordict, actions):
    """Steps and resets at ends: all that came out, and where it ended."""
    rows = []
    for action in actions:
        tensordict = tensordict.set("action", action.clone())
        tensordict, following = env.step_and_maybe_reset(tensordict)
        rows.append(tensors(tensordict["next"].to_dict()))
        rows.append(tensors(following.to_dict()))
        tensordict = following
    return rows, tensordict


def same(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return all(not differing(one, other) for one, other in pairs)


def middle(env, steps=LIMIT + 7):
    """Brings an environment into the middle of its second episode, by default."""
    _, here = run(env, env.reset(), actions_for(env, steps, seed=1))
    return here


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        *((name, LIMIT + 7) for name in (*OTHERS, "T-Ant-v5", "Hopper-v5 with noise")),
        *((name, 5) for name in OTHERS),
        *(
            pytest.param(name, LIMIT + 7, marks=pytest.mark.slow)
            for name in MADE
            if name not in (*OTHERS, "T-Ant-v5", "Hopper-v5 with noise")
        ),
    ],
)
def test_an_episode_goes_on_bit_for_bit(name, steps, tmp_path):
    make_one = MADE[name]
    torch.manual_seed(3)
    env, other = EpisodeEnv(make_one()), EpisodeEnv(make_one())
    here = middle(env, steps)
    write_state(tmp_path / "episode.npz", env.episode())
    write_state(tmp_path / "here.npz", here.to_dict())
    # The other one may have been anywhere.
    middle(other, 5)
    other.replay(read_state(tmp_path / "episode.npz"))
    there = TensorDict(read_state(tmp_path / "here.npz"), here.batch_size)
    courses = []
    for each, start in ((env, here), (other, there)):
        torch.manual_seed(5)
        courses.append(run(each, start, actions_for(env, LIMIT + 3))[0])
    assert any(bool(row.get("/done", False)) for row in courses[0])
    assert same(*courses)


@pytest.mark.parametrize(
    ("one", "other", "steps"),
    [
        (lambda: limited(Curriculum()), lambda: limited(Curriculum()), 1),
        (lambda: make("Hopper-v5"), lambda: make("Hopper-v5", frame_skip=2), 1),
        (lambda: make("Hopper-v5"), lambda: make("Hopper-v5", dynamics_noise=0.1), 1),
        (lambda: make("Hopper-v5"), lambda: make("Walker2d-v5"), 0),
    ],
    ids=["state that outlives resets", "argument", "noise", "task"],
)
def test_an_episode_that_is_not_repeated_is_refused(one, other, steps):
    env = EpisodeEnv(one())
    middle(env)
    with pytest.raises(CheckpointError, match=rf"after {steps} of \d+ steps") as error:
        EpisodeEnv(other()).replay(env.episode())
    for remedy in ("--fresh-episode", "checkpoint_state", "load_checkpoint_state"):
        assert remedy in str(error.value)


def test_another_action_is_noticed():
    env = EpisodeEnv(make("HalfCheetah-v5"))
    middle(env)
    episode = env.episode()
    episode["actions"][0][2] *= 0.999
    with pytest.raises(CheckpointError, match="after 3 of 7 steps"):
        EpisodeEnv(make("HalfCheetah-v5")).replay(episode)


def test_running_moments_are_those_of_before_the_reset():
    env, other = EpisodeEnv(normalized()), EpisodeEnv(normalized())
    middle(env)
    other.reset()
    episode = env.episode() | {"layers": other.episode()["layers"]}
    with pytest.raises(CheckpointError, match="does not repeat"):
        other.replay(episode)


def test_each_reset_has_a_seed_of_its_own():
    env = EpisodeEnv(limited(GlobalGenerators()))
    torch.manual_seed(0)
    seeds, firsts = [], []
    for _ in range(4):
        firsts.append(env.reset()["observation"].item())
        seeds.append(env.episode()["seed"])
    assert len(set(seeds)) == len(set(firsts)) == 4
    # Of the run's generator nothing else was drawn, and it was not seeded.
    after = torch.rand(())
    torch.manual_seed(0)
    assert [int(torch.randint(2**31, ())) for _ in range(4)] == seeds
    assert torch.rand(()) == after
    env.set_seed(seeds[1])
    assert env.reset()["observation"].item() == firsts[1]
    assert env.reset()["observation"].item() != firsts[1]


def test_environments_that_cannot_be_recorded_are_refused():
    with pytest.raises(ValueError, match=r"no batch dimensions, got .*\[2\]"):
        EpisodeEnv(SerialEnv(2, lambda: wrap(Walk())))
    with pytest.raises(TypeError, match="Half: expected both of checkpoint_state"):
        EpisodeEnv(wrap(Half()))


# -- collectors ------------------------------------------------------------------------


def collector_of(env):
    torch.manual_seed(3)
    return Collector(
        env,
        random_policy(env),
        frames_per_batch=env.batch_size.numel(),
        auto_register_policy_transforms=False,
    )


def serial(*wrappers):
    def worker():
        env = make("Hopper-v5")
        for wrapper in wrappers:
            env = wrapper(env)
        return env

    return TransformedEnv(SerialEnv(2, worker), RewardSum())


@pytest.mark.parametrize(
    "make_one", [lambda: EpisodeEnv(make("Hopper-v5")), lambda: serial(EpisodeEnv)]
)
def test_a_collector_goes_on(make_one, tmp_path):
    one, other = collector_of(make_one()), collector_of(make_one())
    for count, collector in ((LIMIT + 7, one), (3, other)):
        for _ in range(count):
            collector.next()
    write_state(tmp_path / "state.npz", CollectorState(one).state_dict())
    CollectorState(other).load_state_dict(read_state(tmp_path / "state.npz"))
    courses = []
    for collector in (one, other):
        torch.manual_seed(5)
        courses.append([collector.next().clone() for _ in range(LIMIT)])
    assert any(step["next", "done"].any() for step in courses[0])
    for ours, theirs in zip(*courses, strict=True):
        assert differing(tensors(ours.to_dict()), tensors(theirs.to_dict())) == []


@pytest.mark.parametrize(
    ("make_one", "options", "reason"),
    [
        (lambda: EpisodeEnv(make("Hopper-v5")), {"fresh_episode": True}, "asked for"),
        (serial, {}, "TransformedEnv cannot repeat"),
    ],
)
def test_a_fresh_episode_starts_where_it_has_to(make_one, options, reason):
    one, other = collector_of(make_one()), collector_of(make_one())
    for _ in range(3):
        before = one.next()
    state = CollectorState(one).state_dict()
    with pytest.warns(UserWarning, match=f"fresh episode, .*{reason}"):
        CollectorState(other, **options).load_state_dict(state)
    after = other.next()
    first = after["observation"]
    assert not torch.equal(first, before["next", "observation"])
    assert not torch.equal(first, collector_of(make_one()).next()["observation"])
    ids = [batch["collector", "traj_ids"] for batch in (before, after)]
    assert ids[1].min() > ids[0].max()


def test_a_fresh_episode_keeps_what_outlives_resets():
    one, other = (collector_of(EpisodeEnv(normalized())) for _ in "ab")
    for _ in range(LIMIT + 7):
        one.next()
    state = CollectorState(one).state_dict()
    with pytest.warns(UserWarning, match="fresh episode"):
        CollectorState(other, fresh_episode=True).load_state_dict(state)
    expected = state["episodes"][0]["layers"]
    kept = CollectorState(other).state_dict()["episodes"][0]["layers"]
    assert differing(tensors(kept), tensors(expected)) == []
    assert expected[1]["count"] > LIMIT


def test_another_number_of_environments_is_refused():
    state = CollectorState(collector_of(serial(EpisodeEnv))).state_dict()
    other = CollectorState(collector_of(EpisodeEnv(make("Hopper-v5"))))
    with pytest.raises(CheckpointError, match="expected 2 that repeat episodes, got 1"):
        other.load_state_dict(state)
