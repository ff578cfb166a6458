from __future__ import annotations

import random
from collections import deque

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from alm_torchrl.env_state import (
    EnvironmentStateError,
    environment_state,
    load_environment_state,
)
from tests.walk_env import Odd, Walk, wrap


def test_an_attribute_of_an_unknown_type_is_an_error():
    for kept in (Odd(), [1, Odd()], {"a": Odd()}, Odd, {1, 2}, deque([Odd()])):
        env = wrap(Walk(_kept=kept))
        if kept is Odd:  # A class does not change.
            environment_state(env)
            continue
        with pytest.raises(EnvironmentStateError, match=r"_kept.* of Walk is a"):
            environment_state(env)
    with pytest.raises(
        EnvironmentStateError,
        match=r"attribute '_kept' of Walk is a .*walk_env\.Odd, whose state",
    ):
        environment_state(wrap(Walk(_kept=Odd())))


def test_a_method_of_another_object_hides_its_state():
    generator = np.random.default_rng(0)
    with pytest.raises(EnvironmentStateError, match="'draw' of Walk"):
        environment_state(wrap(Walk(draw=generator.normal)))
    environment_state(wrap(Walk(draw=np.mean, other=torch.sin)))


class Slots(Walk):
    __slots__ = ("hidden",)


def test_state_outside_of_attributes_is_an_error():
    with pytest.raises(EnvironmentStateError, match="Slots keeps state outside"):
        environment_state(wrap(Slots()))


def test_overlapping_and_circular_attributes_are_errors():
    array = np.arange(4.0)
    with pytest.raises(
        EnvironmentStateError, match=r"'b' of Walk shares memory .* 'a'"
    ):
        environment_state(wrap(Walk(a=array, b=array[1:])))
    with pytest.raises(EnvironmentStateError, match="shares memory"):
        environment_state(wrap(Walk(a=array, b=torch.from_numpy(array))))
    environment_state(wrap(Walk(a=array[:2], b=array[2:])))
    circle = []
    circle.append(circle)
    with pytest.raises(EnvironmentStateError, match="refers to itself"):
        environment_state(wrap(Walk(circle=circle)))
    with pytest.raises(EnvironmentStateError, match="constant among values"):
        environment_state(wrap(Walk(mixed=[1, np.sin])))


def test_all_kinds_of_values_come_back():
    shared = np.arange(3)
    kept = {
        "shared": shared,
        "again": [shared, (shared,)],
        "mapping": {1: "one", "two": {(1, 2): None}, None: 2**100},
        "queue": deque([1.5, np.float32(2.5)], maxlen=3),
        "tensor": torch.arange(4.0),
        "flags": (True, np.bool_(False), np.int8(3)),
        "empty": ([], {}, ()),
        "functions": {"sin": np.sin},
        "nan": float("nan"),
    }
    env, other = wrap(Walk(**kept)), wrap(Walk(extra=1, functions={"sin": np.cos}))
    load_environment_state(other, environment_state(env))
    walk = other.base_env._env.unwrapped
    assert not hasattr(walk, "extra")
    np.testing.assert_array_equal(walk.shared, shared)
    assert walk.shared is walk.again[0] is walk.again[1][0]
    assert walk.shared is not shared
    assert walk.mapping == kept["mapping"]
    assert walk.queue == kept["queue"]
    assert walk.queue.maxlen == 3
    assert type(walk.queue[1]) is np.float32
    assert torch.equal(walk.tensor, kept["tensor"])
    assert [type(flag) for flag in walk.flags] == [bool, np.bool_, np.int8]
    assert walk.empty == ([], {}, ())
    assert walk.functions == {"sin": np.cos}
    assert np.isnan(walk.nan)


def test_arrays_that_were_one_need_not_be_so_afterwards():
    # The taker's two names for one array must not be written one over the other.
    state = environment_state(wrap(Walk(a=np.zeros(2), b=np.ones(2))))
    one = np.full(2, 5.0)
    other = wrap(Walk(a=one, b=one))
    load_environment_state(other, state)
    walk = other.base_env._env.unwrapped
    assert walk.a.tolist() == [0, 0]
    assert walk.b.tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"])
def test_random_generators_go_on(kind):
    def kept(seed):
        return Walk(
            a=np.random.Generator(getattr(np.random, kind)(seed)),
            b=np.random.RandomState(seed),
            c=random.Random(seed),
        )

    def draws(walk):
        return [
            *walk.a.normal(size=3),
            *walk.b.normal(size=3),
            walk.c.gauss(),
            walk.action_space.sample().item(),
        ]

    walk, other = kept(0), kept(1)
    walk.action_space.seed(0)
    draws(walk)
    state = environment_state(wrap(walk))
    load_environment_state(wrap(other), state)
    assert draws(other) == draws(walk)


def test_generators_of_nested_spaces_go_on():
    def nested(seed):
        box = spaces.Box(0, 1, (1,))
        space = spaces.Dict({"a": box, "b": spaces.Tuple([spaces.Discrete(1000)])})
        space.seed(seed)
        return Walk(space=space)

    walk, other = nested(0), nested(1)
    load_environment_state(wrap(other), environment_state(wrap(walk)))
    for _ in range(3):
        assert other.space.sample() == walk.space.sample()


def test_views_of_a_simulators_memory_stay_views():
    def viewing(seed):
        env = gymnasium.make("Hopper-v5").unwrapped
        env.speeds = env.data.qvel
        return wrap(env, seed)

    env, other = viewing(0), viewing(1)
    env.rollout(4)
    load_environment_state(other, environment_state(env))
    unwrapped = other.base_env._env.unwrapped
    assert np.shares_memory(unwrapped.speeds, unwrapped.data.qvel)
    state = environment_state(env)
    del unwrapped.speeds
    with pytest.raises(EnvironmentStateError, match="'speeds' of HopperEnv was a view"):
        load_environment_state(other, state)


def test_an_action_may_be_kept():
    env, other = wrap(Walk(), 0), wrap(Walk(), 1)
    last = env.rollout(4)["action"][-1]
    load_environment_state(other, environment_state(env))
    assert other.base_env._env.last_action == last.numpy()
