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

__all__ = ["evaluate_policy", "random_policy", "zero_policy"]

Policy = Callable[[TensorDictBase], TensorDictBase]


def evaluate_policy(
    env: EnvBase,
    policy: Policy,
    *,
    episodes: int = 5,
    seed: int = 0,
    exploration_type: ExplorationType = ExplorationType.DETERMINISTIC,
) -> TensorDict:
    """Runs whole episodes and returns what each of them scored.

    The numbers depend on ``env``, ``policy`` and ``seed`` alone, whatever ran before:
    the environment and PyTorch's, NumPy's and Python's global generators are seeded.
    Nothing of that stays: the generators, the exploration type and the policy's
    training or evaluation mode are restored, also after an error, so that a training
    run is bit-equal with and without evaluations. The environment is reset and
    stepped, so give it one of its own, not the one that data is collected from.

    Args:
        env: Any TorchRL environment without batch dimensions whose episodes end.
            TorchRL's time limits (``StepCounter``) and Gymnasium's count as ends.
        policy: Reads and writes tensordicts; an ``nn.Module`` is switched to its
            evaluation mode. It may lie on another device than ``env``.

    Keyword Args:
        episodes: How many episodes. Default: ``5``.
        seed: Seed of the environment and of the random stream that the policy draws
            from. The episodes start from different states. Default: ``0``.
        exploration_type: Default: ``ExplorationType.DETERMINISTIC``, the mode of the
            policy's distribution. (The encoder samples its latent nevertheless.)

    Returns:
        A tensordict of batch size ``[episodes]`` on the CPU: ``"return"`` (float32,
        undiscounted sum of rewards) and ``"length"`` (int64, steps).

    Raises:
        TypeError: If ``env`` is no TorchRL environment or ``policy`` no callable.
        KeyError: If ``policy`` reads what ``env`` does not give, or writes no action.
        ValueError: If ``episodes`` or ``seed`` is out of range, ``env`` has batch
            dimensions, or its reward is not one single number.

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
    check_integer("episodes", episodes)
    check_integer("seed", seed, 0, 2**32 - 1)
    given = list(env.observation_spec.keys(True, True))
    read = list(getattr(policy, "in_keys", []))
    if any(key not in given for key in read):
        raise KeyError(
            f"policy: expected in_keys among {given}, which env gives, got {read}"
        )
    policy_on_env = _moved_to_policy(policy, env)
    with undisturbed(policy, seed=seed, exploration_type=exploration_type):
        env.set_seed(seed)
        scores = [_run_episode(env, policy_on_env) for _ in range(episodes)]
    returns, lengths = zip(*scores, strict=True)
    return TensorDict(
        {
            "return": torch.tensor(returns, dtype=torch.float32),
            "length": torch.tensor(lengths, dtype=torch.int64),
        },
        batch_size=[episodes],
    )


def check_env(env: EnvBase) -> None:
    """Checks that whole episodes of an environment can be run one by one.

    Args:
        env: The environment.

    Raises:
        TypeError: If it is no TorchRL environment.
        ValueError: If it has batch dimensions, or its reward is not one number.
    """
    check_type("env", env, EnvBase, "make_env makes one from a Gymnasium task")
    if env.batch_size:
        raise ValueError(
            f"env must have no batch dimensions, got batch size {env.batch_size}"
        )
    rewards = {key: env.full_reward_spec[key].shape for key in env.reward_keys}
    if [shape.numel() for shape in rewards.values()] != [1]:
        raise ValueError(f"env must have one reward of one number, got {rewards}")


@contextmanager
def undisturbed(
    *modules: object,
    seed: int,
    exploration_type: ExplorationType = ExplorationType.DETERMINISTIC,
) -> Iterator[None]:
    """Runs what must leave no trace in a training run, and depend on nothing else.

    Inside, PyTorch's, NumPy's and Python's global generators are seeded, the modules
    are in their evaluation mode and nothing is recorded for gradients. All of it is
    put back at the end, also after an error.

    Args:
        *modules: What is run; anything but an ``nn.Module`` is left alone.

    Keyword Args:
        seed: Seed of the global generators.
        exploration_type: Default: ``ExplorationType.DETERMINISTIC``.

    Example:
        >>> with undisturbed(seed=0):
        ...     first = torch.rand(())
        >>> with undisturbed(seed=0):
        ...     bool(torch.rand(()) == first)
        True
    """
    with (
        _random_stream(seed),
        _evaluation_mode(*modules),
        set_exploration_type(exploration_type),
        torch.no_grad(),
    ):
        yield


def random_policy(env: EnvBase) -> RandomPolicy:
    """Makes a policy that draws uniformly from the action space of ``env``.

    Args:
        env: The environment to act in.

    Returns:
        A callable on tensordicts that draws from PyTorch's global generator.

    Example:
        >>> from alm_torchrl.envs import make_env
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> random_policy(env)(env.reset())["action"].shape
        torch.Size([1])
    """
    return RandomPolicy(env.action_spec, action_key=env.action_key)


def zero_policy(env: EnvBase) -> TensorDictModule:
    """Makes a policy that stands still: the action is zero at every step.

    Args:
        env: The environment to act in. Where zero lies outside its action bounds,
            the nearest action within is taken.

    Returns:
        A module without inputs or parameters that writes the action.

    Example:
        >>> from alm_torchrl.envs import make_env
        >>> env = make_env("HalfCheetah-v5")
        >>> zero_policy(env)(env.reset())["action"]
        tensor([0., 0., 0., 0., 0., 0.])
    """
    action = env.action_spec.project(env.action_spec.zero())
    return TensorDictModule(action.clone, in_keys=[], out_keys=[env.action_key])


def _run_episode(env: EnvBase, policy: Policy) -> tuple[float, int]:
    """Runs one episode; keeps nothing of it but its return and length."""
    reward_key, done_keys = env.reward_key, env.done_keys
    total, length = 0.0, 0
    tensordict = env.reset()
    while True:
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


def _moved_to_policy(policy: Policy, env: EnvBase) -> Policy:
    """Returns ``policy``, with transfers around it if it lies on another device."""
    parameter = None
    if isinstance(policy, nn.Module):
        parameter = next(policy.parameters(), None)
    env_device = env.device or torch.device("cpu")
    if parameter is None or parameter.device == env_device:
        return policy
    policy_device = parameter.device
    return lambda tensordict: policy(tensordict.to(policy_device)).to(env_device)


@contextmanager
def _random_stream(seed: int) -> Iterator[None]:
    """Seeds the global random generators, and puts them back at the end.

    ``torch.manual_seed`` is avoided: before CUDA is used for the first time, it
    leaves a seed behind that takes effect later.
    """
    cuda = torch.cuda.is_initialized()
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002
    try:
        devices = range(torch.cuda.device_count()) if cuda else ()
        with torch.random.fork_rng(devices=devices):
            torch.default_generator.manual_seed(seed)
            if cuda:
                torch.cuda.manual_seed_all(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def _evaluation_mode(*modules: object) -> Iterator[None]:
    """Switches every submodule to evaluation mode, and each back at the end."""
    training = [
        part
        for module in modules
        if isinstance(module, nn.Module)
        for part in module.modules()
        if part.training
    ]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
