"""Exact resume in mid-episode, by replaying the episode from its own seed.

A checkpoint keeps the seed of the running episode and the actions since; loading
resets the environment with that seed and repeats the actions. Each observation, reward
and done flag must then be the recorded one, bit by bit.

State that outlives resets has to be put back before the reset. The running moments of
Gymnasium's ``NormalizeObservation`` and ``NormalizeReward`` are, and those of TorchRL's
transforms. Any other environment with such state, a ``gymnasium.Env``, a wrapper or an
``EnvBase``, offers two methods:

``checkpoint_state() -> dict[str, Any]``
    What a reset with a seed does not restore: numbers, strings, ``None``, NumPy arrays,
    torch tensors, and lists, tuples and dictionaries of such. Called before each reset,
    the first one included.
``load_checkpoint_state(state: dict[str, Any]) -> None``
    Takes what the other method returned.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from gymnasium.wrappers import NormalizeObservation, NormalizeReward
from tensordict import TensorDict, TensorDictBase
from torchrl.checkpoint import CheckpointError
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, GymWrapper, SerialEnv, TransformedEnv

from alm_torchrl.compat import (
    get_carrier,
    serial_workers,
    set_carrier,
    set_trajectories,
)
from alm_torchrl.envs.normalizers import env_layers, load_moments, moments_of
from alm_torchrl.evaluation import isolated_rng
from alm_torchrl.training.state_checks import check_names, check_state

__all__ = [
    "CollectorState",
    "EpisodeEnv",
    "EpisodeError",
    "episode_steps",
    "repeatable",
]

_DIGEST_BYTES = 8
_MAX_SEED = 2**31
_PROTOCOL = ("checkpoint_state", "load_checkpoint_state")


class EpisodeError(CheckpointError):
    """A saved episode cannot be repeated here, although nothing may be damaged."""


class EpisodeEnv(TransformedEnv):
    """An environment that can repeat its running episode.

    Each reset gets a seed of its own, drawn from PyTorch's global generator. Seed and
    actions of the running episode are recorded, and a digest of all that it returned.

    Args:
        env (EnvBase): the environment, without batch dimensions; transformed or not.
            It is stepped, but its transforms are cloned, as TorchRL does.

    Raises:
        ValueError: if ``env`` has batch dimensions.
        TypeError: if it has only one of the methods for state that outlives resets.

    Examples:
        >>> from alm_torchrl import make_env
        >>> one, other = (
        ...     EpisodeEnv(make_env("Pendulum-v1", action_bounds="rescale"))
        ...     for _ in range(2)
        ... )
        >>> steps = one.rollout(5)
        >>> other.replay(one.episode())
        >>> action = one.rand_action()
        >>> ends = [env.step(action.clone())["next"] for env in (one, other)]
        >>> bool((ends[0] == ends[1]).all())
        True
    """

    def __init__(self, env: EnvBase) -> None:
        if env.batch_size:
            raise ValueError(
                f"env must have no batch dimensions, got batch size {env.batch_size}"
            )
        if type(env) is TransformedEnv:
            super().__init__(env.base_env, env.transform.clone())
        else:
            super().__init__(env)
        self._layers = list(_layers(self.base_env))
        self._recorded_keys = [
            *self.full_observation_spec.keys(True, True),
            *self.reward_keys,
            *self.done_keys,
        ]
        self._next_seed: int | None = None
        self._seed = -1
        self._before: dict[str, Any] = {}
        self._actions: list[list[torch.Tensor]] = []
        self._digests = bytearray()

    def set_seed(
        self, seed: int | None = None, static_seed: bool = False
    ) -> int | None:
        """Sets the seed of the next reset.

        Args:
            seed: the seed. Default: ``None``, one from PyTorch's global generator.
            static_seed: return the same seed. Default: ``False``, the next one.
        """
        self._next_seed = seed
        return EnvBase.set_seed(self, seed, static_seed)

    @property
    def steps(self) -> int:
        """Steps of the running episode so far; one that raised does not count."""
        return len(self._actions)

    def episode(self) -> dict[str, Any]:
        """The running episode: what :meth:`replay` needs."""
        actions = zip(*self._actions, strict=True)
        return {
            **copy.deepcopy(self._before),
            "seed": self._seed,
            "actions": [torch.stack(values) for values in actions],
            "digests": torch.frombuffer(self._digests[:], dtype=torch.uint8),
        }

    def check(self, episode: Mapping[str, Any]) -> None:
        """Compares the form of an episode with the environment, and changes nothing.

        Raises:
            ValueError: naming the first entry that does not fit.
        """
        steps = max(len(episode["digests"]) // _DIGEST_BYTES - 1, 0)
        digests = torch.empty((steps + 1) * _DIGEST_BYTES, dtype=torch.uint8)
        own = {**self.episode(), "digests": digests, "layers": [], "actions": []}
        check_state(episode, own, "episode")
        shapes = [self.full_action_spec[key].shape for key in self.action_keys]
        expected = [[steps, *shape] for shape in shapes] if steps else []
        got = [list(actions.shape) for actions in episode["actions"]]
        if got != expected:
            raise ValueError(f"episode.actions: expected shapes {expected}, got {got}")
        for layer, state in zip(self._layers, episode["layers"], strict=False):
            # Any other layer judges its state itself.
            if isinstance(layer, NormalizeObservation | NormalizeReward):
                check_state(state, _lasting(layer), type(layer).__name__)

    def replay(self, episode: Mapping[str, Any]) -> None:
        """Repeats an episode, and compares all that the environment returns.

        Args:
            episode: what :meth:`episode` returned.

        Raises:
            EpisodeError: if anything differs; the environment must then be reset.
        """
        try:
            self._repeat(episode)
        except Exception as error:
            raise EpisodeError(
                f"the environment does not repeat its episode: {error}. Continue with "
                "a fresh episode (--fresh-episode, or CollectorState.fresh_episode), "
                f"or give the environment the methods {' and '.join(_PROTOCOL)}"
            ) from error

    def _load_lasting_state(self, episode: Mapping[str, Any]) -> None:
        """Loads what outlives resets, as it was before the episode."""
        saved, here = len(episode["layers"]), len(self._layers)
        if saved != here:
            raise ValueError(
                f"expected {saved} layers with state that outlives resets, got {here}"
            )
        for layer, state in zip(self._layers, episode["layers"], strict=True):
            _load_lasting(layer, state)

    @torch.no_grad()
    def _repeat(self, episode: Mapping[str, Any]) -> None:
        self._load_lasting_state(episode)
        self.transform.load_state_dict(episode["transforms"])
        self._next_seed = episode["seed"]
        tensordict = self.reset()
        digests = bytes(episode["digests"].tolist())
        self._compare(digests)
        for actions in zip(*episode["actions"], strict=True):
            for key, action in zip(self.action_keys, actions, strict=True):
                tensordict.set(key, action.to(self.device))
            tensordict = self.step(tensordict)
            tensordict = tensordict.exclude("next").update(tensordict["next"])
            self._compare(digests)

    def _compare(self, digests: bytes) -> None:
        length = len(self._digests)
        last = slice(length - _DIGEST_BYTES, length)
        if self._digests[last] != digests[last]:
            steps, total = (n // _DIGEST_BYTES - 1 for n in (length, len(digests)))
            raise ValueError(
                f"what it returned after {steps} of {total} steps differs from the "
                "record"
            )

    def _reset(
        self, tensordict: TensorDictBase | None = None, **kwargs: Any
    ) -> TensorDictBase:
        self._before = {
            "layers": [copy.deepcopy(_lasting(layer)) for layer in self._layers],
            "transforms": copy.deepcopy(self.transform.state_dict()),
        }
        if self._next_seed is None:
            self._seed = int(torch.randint(_MAX_SEED, ()))
        else:
            self._seed, self._next_seed = self._next_seed, None
        # An environment may seed, or draw from, the global generators.
        with isolated_rng(seed=self._seed):
            if isinstance(self.base_env, GymWrapper):
                kwargs["seed"] = self._seed
            else:
                self.base_env.set_seed(self._seed)
            first = super()._reset(tensordict, **kwargs).clone()
        self._actions, self._digests = [], bytearray(self._digest(first))
        return first

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        actions = [tensordict.get(key).clone() for key in self.action_keys]
        # Copies: the environment may write into what it was given and what it gave.
        following = super()._step(tensordict.clone()).clone()
        self._actions.append(actions)
        self._digests += self._digest(following)
        return following

    def _digest(self, tensordict: TensorDictBase) -> bytes:
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for key in self._recorded_keys:
            value = tensordict.get(key, None)
            if isinstance(value, torch.Tensor):
                if value.dtype == torch.bfloat16:  # NumPy has no such type.
                    value = value.float()
                digest.update(value.cpu().numpy().tobytes())
        return digest.digest()


class CollectorState:
    """A collector as a checkpoint component from which it continues exactly.

    TorchRL's own state of a collector leaves out where the environment is, so that a
    resumed run starts a fresh episode. This one adds the running episode, what the
    collector carries from one step to the next, and the numbers of the trajectories.
    The policy is left to the loss module that it belongs to.

    The environment is an :class:`EpisodeEnv`, or a ``SerialEnv`` of such. With any
    other, as parallel and natively batched ones, loading starts fresh episodes.

    Args:
        collector: a :class:`torchrl.collectors.Collector`.

    Keyword Args:
        fresh_episode: start a fresh episode when loading, with a seed that follows
            from the steps collected. Default: ``False``, continue the saved one.

    Raises:
        EpisodeError: by ``load_state_dict``, if the environment does not repeat
            its episode.

    Warns:
        UserWarning: by ``load_state_dict``, if a fresh episode starts.

    Examples:
        >>> from torchrl.collectors import Collector
        >>> from alm_torchrl import make_env, random_policy
        >>> def collector():
        ...     env = EpisodeEnv(make_env("Pendulum-v1", action_bounds="rescale"))
        ...     return Collector(env, random_policy(env), frames_per_batch=3,
        ...                      auto_register_policy_transforms=False)
        >>> one, other = collector(), collector()
        >>> _ = one.next()
        >>> CollectorState(other).load_state_dict(CollectorState(one).state_dict())
        >>> [int(c.next()["collector", "traj_ids"][0]) for c in (one, other)]
        [0, 0]
    """

    def __init__(self, collector: Collector, *, fresh_episode: bool = False) -> None:
        self.collector = collector
        self.fresh_episode = fresh_episode

    def state_dict(self) -> dict[str, Any]:
        """State of the collector, its transforms and the running episodes."""
        state = dict(self.collector.state_dict())
        state.pop("policy_state_dict", None)
        state["carrier"] = get_carrier(self.collector).clone().to_dict()
        state["episodes"] = [env.episode() for env in _episode_envs(self.collector.env)]
        return state

    def check_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Compares a state with collector and environment, and changes nothing.

        Raises:
            ValueError: naming the first entry that does not fit.
        """
        own = {**self.state_dict(), "episodes": [], "carrier": {}}
        check_names(state_dict, own, "collector")
        episodes, envs = state_dict["episodes"], _episode_envs(self.collector.env)
        if len(envs) != len(episodes):
            raise EpisodeError(
                f"the environment: expected {len(episodes)} that repeat episodes, got "
                f"{len(envs)}"
            )
        check_state(state_dict, own, "collector")
        carrier = get_carrier(self.collector)
        carried = TensorDict(state_dict["carrier"], carrier.batch_size).flatten_keys()
        for name, value in carrier.flatten_keys().items():
            # Before the first step there is no action.
            if name in carried or name not in self.collector.env.action_keys:
                check_state(carried.get(name, None), value, f"collector.carrier.{name}")
        for env, episode in zip(envs, episodes, strict=True):
            env.check(episode)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken.

        Args:
            state_dict: the saved state.
        """
        self.check_state_dict(state_dict)
        collector, saved = self.collector, dict(state_dict)
        episodes, carried = saved.pop("episodes"), saved.pop("carrier")
        envs = _episode_envs(collector.env)
        fresh = self.fresh_episode or not envs
        for env, episode in zip(envs, episodes, strict=True):
            if fresh:
                env._load_lasting_state(episode)
            else:
                env.replay(episode)
        # Gives the collector new numbers of trajectories, which fresh episodes need.
        collector.load_state_dict(saved, strict=False)
        carrier = get_carrier(collector)
        if fresh:
            self._start_episode(saved["frames"])
        else:
            set_trajectories(collector, saved["traj_pool"])
            carrier = TensorDict(carried, carrier.batch_size, carrier.device)
            set_carrier(collector, carrier)

    def _start_episode(self, steps: int) -> None:
        env, carrier = self.collector.env, get_carrier(self.collector)
        seed = torch.initial_seed() + 1_000_003 * (steps + 1)
        env.set_seed(seed % _MAX_SEED)
        first = env.reset()
        first.set("collector", carrier.get("collector"))
        set_carrier(self.collector, first if carrier.device else first.clear_device_())
        reason = "as asked for"
        if not self.fresh_episode:
            reason = f"since a {type(env).__name__} cannot repeat the last one"
        warnings.warn(
            f"the run continues with a fresh episode, {reason}",
            UserWarning,
            stacklevel=3,
        )


def repeatable(env: EnvBase) -> EnvBase:
    """The environment, made to repeat its running episodes where that is possible.

    Args:
        env (EnvBase): a single environment, which gets an :class:`EpisodeEnv` around
            it, or a ``SerialEnv`` of such, whose workers get one each. Any other, as
            ``ParallelEnv`` and natively batched ones, stays as it is.

    Returns:
        EnvBase: the environment to step.
    """
    if not env.batch_size:
        return EpisodeEnv(env)
    serial = env
    while isinstance(serial, TransformedEnv):
        serial = serial.base_env
    if isinstance(serial, SerialEnv):
        if serial.is_closed:
            serial.start()
        workers = serial_workers(serial)
        for number, worker in enumerate(workers):
            if not worker.batch_size and not _episode_envs(worker):
                workers[number] = EpisodeEnv(worker).set_spec_lock_()
    return env


def episode_steps(env: EnvBase) -> int:
    """Steps of the running episodes that ``env`` can repeat."""
    return sum(each.steps for each in _episode_envs(env))


def _episode_envs(env: EnvBase) -> list[EpisodeEnv]:
    """The environments that repeat their episodes, if all under ``env`` do."""
    while isinstance(env, TransformedEnv) and not isinstance(env, EpisodeEnv):
        env = env.base_env
    if isinstance(env, EpisodeEnv):
        return [env]
    if isinstance(env, SerialEnv):
        found = [_episode_envs(worker) for worker in serial_workers(env)]
        if all(found):
            return [each for envs in found for each in envs]
    return []


def _layers(env: EnvBase) -> Iterator[Any]:
    """An environment and what it wraps, where state may outlive resets."""
    for layer in env_layers(env):
        # On the class: a GymWrapper forwards unknown attributes.
        offered = [hasattr(type(layer), name) for name in _PROTOCOL]
        if any(offered) and not all(offered):
            raise TypeError(
                f"{type(layer).__name__}: expected both of {' and '.join(_PROTOCOL)}, "
                "got one"
            )
        if all(offered) or isinstance(layer, NormalizeObservation | NormalizeReward):
            yield layer


def _lasting(layer: Any) -> Any:  # noqa: ANN401
    """What of a layer outlives resets."""
    if isinstance(layer, NormalizeObservation | NormalizeReward):
        return moments_of(layer)
    return layer.checkpoint_state()


def _load_lasting(layer: Any, state: Any) -> None:  # noqa: ANN401
    if isinstance(layer, NormalizeObservation | NormalizeReward):
        load_moments(layer, state)
    else:
        layer.load_checkpoint_state(state)
