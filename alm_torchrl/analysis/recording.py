"""Episodes of the evaluation policy, for the other diagnostics."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from alm_torchrl.baselines.losses import BaselineLoss
from alm_torchrl.checks import check_integer, check_type
from alm_torchrl.evaluation import check_env, undisturbed
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.objectives.alm import PARTS

__all__ = ["evaluation_episodes", "record_transitions", "undisturbed_loss"]


def check_agent(
    env: EnvBase,
    loss: ALMLoss | BaselineLoss,
    seed: int,
    expected: type | tuple[type, ...] = ALMLoss,
) -> None:
    """Checks what every diagnostic of an agent in an environment is given.

    Raises:
        TypeError: if ``env`` is no TorchRL environment or ``loss`` not as ``expected``.
        ValueError: if ``env`` has batch dimensions or more than one reward, or the
            seed is out of range.
    """
    check_env(env)
    check_type("loss", loss, expected)
    check_integer("seed", seed, 0, 2**32 - 1)


def undisturbed_loss(
    loss: ALMLoss | BaselineLoss, seed: int
) -> AbstractContextManager[None]:
    """A random stream and the evaluation mode for all networks of a loss.

    Args:
        loss: the networks.
        seed: of the stream.
    """
    if isinstance(loss, BaselineLoss):
        return undisturbed(loss.actor_network, loss.qvalue_network, seed=seed)
    networks = (getattr(loss, part) for part in PARTS)
    return undisturbed(*networks, seed=seed)


def evaluation_episodes(
    env: EnvBase, loss: ALMLoss | BaselineLoss
) -> Iterator[TensorDictBase]:
    """Whole episodes of the agent without action noise, one after the other.

    Args:
        env: environment whose episodes end; it is reset for each.
        loss: the agent.

    Yields:
        TensorDict: the transitions of one episode, ``[T]``, on the device of ``env``.
        The last one is terminated, or truncated by a time limit.
    """
    policy = loss.acting_policy()
    while True:
        yield env.rollout(sys.maxsize, policy, auto_cast_to_device=True)


def record_transitions(
    env: EnvBase, loss: ALMLoss, *, transitions: int = 1000, seed: int = 0
) -> TensorDict:
    """Transitions of an agent without action noise.

    Args:
        env: environment without batch dimensions whose episodes end.
        loss: the agent.

    Keyword Args:
        transitions: how many, N; the last episode is cut there. Default: ``1000``.
        seed: of the environment and of the latent samples. Default: ``0``.

    Returns:
        TensorDict: ``[N]``, on the device of the networks, with the entries that
        ``loss`` reads.

    Raises:
        TypeError: if ``env`` is no TorchRL environment or ``loss`` no ``ALMLoss``.
        ValueError: if a number is out of range, or ``env`` has batch dimensions.

    Example:
        >>> from alm_torchrl import make_alm_loss, make_env
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> loss = make_alm_loss(env, hidden_dim=8, model_hidden_dim=8)
        >>> record_transitions(env, loss, transitions=250)["action"].shape
        torch.Size([250, 1])
    """
    check_agent(env, loss, seed)
    check_integer("transitions", transitions)
    found: list[TensorDictBase] = []
    with undisturbed_loss(loss, seed):
        env.set_seed(seed)
        episodes = evaluation_episodes(env, loss)
        while sum(map(len, found)) < transitions:
            found.append(next(episodes).select(*loss.in_keys))
    device = next(loss.parameters()).device
    return torch.cat(found)[:transitions].to(device)
