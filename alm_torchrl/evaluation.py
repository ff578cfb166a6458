"""Scores of a policy over whole episodes, without a trace in the training run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import RandomPolicy

from alm_torchrl.checks import check_integer, check_type
from alm_torchrl.envs.normalizers import Normalizers

__all__ = [
    "EvaluationStopped",
    "evaluate_policy",
    "isolated_rng",
    "random_policy",
    "zero_policy",
]

Policy = Callable[[TensorDictBase], TensorDictBase]


class EvaluationStopped(Exception):
    """An evaluation ended before its episodes did, as ``should_stop`` asked for."""


def evaluate_policy(
    env: EnvBase,
    policy: Policy,
    *,
    episodes: int = 5,
    seed: int = 0,
    exploration_type: ExplorationType = ExplorationType.DETERMINISTIC,
    should_stop: Callable[[], bool] | None = None,
) -> TensorDict:
    """Runs whole episodes and returns the score of each.

    The scores depend on ``env``, ``policy`` and ``seed`` alone. A training run is
    bit-equal with and without evaluations, because :func:`isolated_rng` restores all
    state. The environment is reset and stepped: use one that collects no data. The
    moments of Gymnasium's normalising wrappers in it (:class:`Normalizers`) do not
    move; other state of it that outlives resets does.

    Args:
        env: environment of batch size [] or [E] whose episodes end. Time limits of
            TorchRL (``StepCounter``) and Gymnasium count as ends. With [E], as of
            ``SerialEnv`` or ``ParallelEnv``, the policy acts in E episodes at once,
            which takes less time; episode i is one of environment i % E.
        policy: reads and writes tensordicts; an ``nn.Module`` runs in evaluation mode.
            It may be on another device than ``env``.

    Keyword Args:
        episodes: number of episodes. Default: ``5``.
        seed: seed of the environment and of the policy's random draws. Each episode
            starts from another state. Default: ``0``.
        exploration_type: how the policy draws actions. ALM's encoder samples its
            latent in any case. Default: ``ExplorationType.DETERMINISTIC``.
        should_stop: asked before each step; ``True`` ends the evaluation without
            scores. Default: ``None``, never.

    Returns:
        TensorDict: ``[episodes]``, on the CPU. ``"return"`` (float32) is the sum of
        the undiscounted rewards, ``"length"`` (int64) the number of steps.

    Raises:
        TypeError: if ``env`` is not a TorchRL environment or ``policy`` not callable.
        KeyError: if ``policy`` reads an entry that ``env`` lacks, or writes no action.
        ValueError: if ``episodes`` or ``seed`` is out of range, ``env`` has several
            batch dimensions, or its reward is not a single number.
        EvaluationStopped: if ``should_stop`` asked for it.

    Example:
        >>> from alm_torchrl.envs import make_env
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> scores = evaluate_policy(env, zero_policy(env), episodes=2)
        >>> scores["length"]
        tensor([200, 200])
        >>> bool((scores["return"] < 0).all())
        True
    """
    check_env(env, batch_dims=1)
    if not callable(policy):
        raise TypeError(
            "policy: expected a callable that reads and writes tensordicts, got "
            f"{type(policy).__name__}"
        )
    episodes = check_integer("episodes", episodes)
    seed = check_integer("seed", seed, 0, 2**32 - 1)
    available = list(env.observation_spec.keys(True, True))
    needed = list(getattr(policy, "in_keys", []))
    if any(key not in available for key in needed):
        raise KeyError(
            f"policy: expected in_keys among {available}, which env gives, got {needed}"
        )
    policy_on_env = _with_transfers(policy, env)
    with (
        isolated_rng(policy, seed=seed, exploration_type=exploration_type),
        Normalizers(env).frozen(),
    ):
        env.set_seed(seed)
        returns, lengths = _run_episodes(env, policy_on_env, episodes, should_stop)
    return TensorDict(
        {
            "return": torch.from_numpy(returns).float(),
            "length": torch.from_numpy(lengths),
        },
        batch_size=[episodes],
    )


def check_env(env: EnvBase, *, batch_dims: int = 0) -> None:
    """Raises an error if ``env`` has more batch dimensions, or not one reward."""
    check_type("env", env, EnvBase, "make_env makes one from a Gymnasium task")
    if len(env.batch_size) > batch_dims:
        raise ValueError(
            f"env: expected {'at most one' if batch_dims else 'no'} batch dimension, "
            f"got batch size {list(env.batch_size)}"
        )
    rewards = {key: env.full_reward_spec[key].shape for key in env.reward_keys}
    if [shape.numel() for shape in rewards.values()] != [env.batch_size.numel()]:
        raise ValueError(f"env: expected one reward of one number, got {rewards}")


@contextmanager
def isolated_rng(
    *modules: object,
    seed: int,
    exploration_type: ExplorationType = ExplorationType.DETERMINISTIC,
) -> Iterator[None]:
    """Runs code on its own random stream, without a trace in the training run.

    Inside, the global generators of PyTorch, NumPy and Python are seeded, the modules
    are in evaluation mode, and gradients are off. Afterwards all of this is restored,
    also after an error.

    Args:
        *modules: networks that run inside; anything but an ``nn.Module`` is ignored.

    Keyword Args:
        seed: seed of the global generators.
        exploration_type: exploration type inside.
            Default: ``ExplorationType.DETERMINISTIC``.

    Example:
        >>> with isolated_rng(seed=0):
        ...     first = torch.rand(())
        >>> with isolated_rng(seed=0):
        ...     bool(torch.rand(()) == first)
        True
    """
    training = [
        part
        for module in modules
        if isinstance(module, nn.Module)
        for part in module.modules()
        if part.training
    ]
    cuda = torch.cuda.is_initialized()
    devices = range(torch.cuda.device_count()) if cuda else ()
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002
    try:
        with (
            torch.random.fork_rng(devices=devices),
            set_exploration_type(exploration_type),
            torch.no_grad(),
        ):
            # torch.manual_seed would leave a seed that CUDA takes up at its first use.
            torch.default_generator.manual_seed(seed)
            if cuda:
                torch.cuda.manual_seed_all(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            for part in training:
                part.training = False
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for part in training:
            part.training = True


def random_policy(env: EnvBase) -> RandomPolicy:
    """Makes a policy that draws uniformly from the action space.

    Args:
        env: environment to act in.

    Returns:
        RandomPolicy: draws from PyTorch's global generator.

    Example:
        >>> from alm_torchrl.envs import make_env
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> random_policy(env)(env.reset())["action"].shape
        torch.Size([1])
    """
    return RandomPolicy(env.full_action_spec[env.action_key], action_key=env.action_key)


def zero_policy(env: EnvBase) -> TensorDictModule:
    """Makes a policy whose action is always zero.

    Args:
        env: environment to act in. If zero is outside its action bounds, the nearest
            action inside is used.

    Returns:
        TensorDictModule: has no inputs and no parameters.

    Example:
        >>> from alm_torchrl.envs import make_env
        >>> env = make_env("HalfCheetah-v5")
        >>> zero_policy(env)(env.reset())["action"]
        tensor([0., 0., 0., 0., 0., 0.])
    """
    spec = env.full_action_spec[env.action_key]
    action = spec.project(spec.zero())
    return TensorDictModule(action.clone, in_keys=[], out_keys=[env.action_key])


def _run_episodes(
    env: EnvBase,
    policy: Policy,
    episodes: int,
    should_stop: Callable[[], bool] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths of episodes; row j of [E] has the episodes j, j + E, ..."""
    rows = env.batch_size.numel()
    returns, lengths = np.zeros(episodes), np.zeros(episodes, np.int64)
    running = np.arange(rows)  # The episode of each row; past the last one, none.
    tensordict = env.reset()
    while True:
        if should_stop is not None and should_stop():
            raise EvaluationStopped("the evaluation was asked to stop")
        acted = policy(tensordict)
        if acted.get(env.action_key, default=None) is None:
            raise KeyError(
                f"policy: expected it to write {env.action_key!r}, got "
                f"{sorted(acted.keys(True, True), key=str)}"
            )
        scored = running < episodes
        if not scored.all():
            acted.set("_step", torch.from_numpy(scored).to(env.device))
        tensordict = env.step(acted)
        following = tensordict.get("next")
        reward = following.get(env.reward_key).reshape(rows).cpu().numpy()
        returns[running[scored]] += reward[scored]
        lengths[running[scored]] += 1
        ended = scored & np.logical_or.reduce(
            [following.get(key).reshape(rows).cpu().numpy() for key in env.done_keys]
        )
        running = running + rows * ended
        if (running >= episodes).all():
            return returns, lengths
        tensordict = _restart(env, env.step_mdp(tensordict), ended)


def _restart(
    env: EnvBase, tensordict: TensorDictBase, rows: np.ndarray
) -> TensorDictBase:
    """Resets the rows of a mask, [E]."""
    if not rows.any():
        return tensordict
    if rows.all():
        return env.reset()
    for key, group in zip(env.reset_keys, env.done_keys_groups, strict=True):
        shape = env.full_done_spec[group[0]].shape
        tensordict.set(key, torch.from_numpy(rows).reshape(shape).to(env.device))
    return env.reset(tensordict)


def _with_transfers(policy: Policy, env: EnvBase) -> Policy:
    """The policy, with transfers between devices if it is not on that of ``env``."""
    parameter = None
    if isinstance(policy, nn.Module):
        parameter = next(policy.parameters(), None)
    env_device = env.device or torch.device("cpu")
    if parameter is None or parameter.device == env_device:
        return policy
    policy_device = parameter.device
    return lambda tensordict: policy(tensordict.to(policy_device)).to(env_device)
