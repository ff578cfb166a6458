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
        env: environment without batch dimensions whose episodes end. Time limits of
            TorchRL (``StepCounter``) and Gymnasium count as ends.
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
        ValueError: if ``episodes`` or ``seed`` is out of range, ``env`` has batch
            dimensions, or its reward is not a single number.
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
    check_env(env)
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
        scores = [
            _run_episode(env, policy_on_env, should_stop) for _ in range(episodes)
        ]
    returns, lengths = zip(*scores, strict=True)
    return TensorDict(
        {
            "return": torch.tensor(returns, dtype=torch.float32),
            "length": torch.tensor(lengths, dtype=torch.int64),
        },
        batch_size=[episodes],
    )


def check_env(env: EnvBase) -> None:
    """Raises an error unless ``env`` is a single environment with one reward."""
    check_type("env", env, EnvBase, "make_env makes one from a Gymnasium task")
    if env.batch_size:
        raise ValueError(
            f"env: expected no batch dimensions, got batch size {env.batch_size}"
        )
    rewards = {key: env.full_reward_spec[key].shape for key in env.reward_keys}
    if [shape.numel() for shape in rewards.values()] != [1]:
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
    return RandomPolicy(env.action_spec, action_key=env.action_key)


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
    action = env.action_spec.project(env.action_spec.zero())
    return TensorDictModule(action.clone, in_keys=[], out_keys=[env.action_key])


def _run_episode(
    env: EnvBase, policy: Policy, should_stop: Callable[[], bool] | None
) -> tuple[float, int]:
    """Return and length of one episode."""
    reward_key, done_keys = env.reward_key, env.done_keys
    total, length = 0.0, 0
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
        tensordict = env.step(acted)
        following = tensordict.get("next")
        total += following.get(reward_key).item()
        length += 1
        if any(following.get(key).item() for key in done_keys):
            return total, length
        tensordict = env.step_mdp(tensordict)


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
