"""Episodes without action noise, and the latent model's predictions along them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType

from alm_torchrl.baselines.losses import BaselineLoss
from alm_torchrl.checks import check_integer, check_type
from alm_torchrl.evaluation import check_env, isolated_rng
from alm_torchrl.objectives import ALMLoss

__all__ = [
    "isolated_loss",
    "latent_rollout",
    "noiseless_episodes",
    "record_transitions",
]


def isolated_loss(
    loss: ALMLoss | BaselineLoss,
    seed: int,
    exploration_type: ExplorationType = ExplorationType.DETERMINISTIC,
) -> AbstractContextManager[None]:
    """:func:`~alm_torchrl.evaluation.isolated_rng` for all networks of a loss."""
    check_integer("seed", seed, 0, 2**32 - 1)
    # A LossModule keeps its networks in its dictionary, not among its submodules.
    networks = vars(loss).values()
    return isolated_rng(*networks, seed=seed, exploration_type=exploration_type)


@contextmanager
def noiseless_episodes(
    env: EnvBase,
    loss: ALMLoss | BaselineLoss,
    seed: int,
    accepted: tuple[type, ...] = (ALMLoss,),
) -> Iterator[Iterator[TensorDictBase]]:
    """Endless whole episodes, ``[T]`` each, inside :func:`isolated_loss`."""
    check_env(env)
    check_type("loss", loss, accepted)
    with isolated_loss(loss, seed):
        env.set_seed(seed)
        policy = loss.acting_policy()
        yield (
            env.rollout(sys.maxsize, policy, auto_cast_to_device=True)
            for _ in itertools.count()
        )


def record_transitions(
    env: EnvBase, loss: ALMLoss, *, transitions: int = 1000, seed: int = 0
) -> TensorDict:
    """Records transitions of an agent without action noise.

    Args:
        env: environment without batch dimensions whose episodes end.
        loss: the agent.

    Keyword Args:
        transitions: number N of transitions; cuts the last episode.
            Default: ``1000``.
        seed: seed of the environment and of the latent samples. Default: ``0``.

    Returns:
        TensorDict: ``[N]``, on the device of the networks, with the entries that
        ``loss`` reads.

    Raises:
        TypeError: if ``env`` or ``loss`` has the wrong type.
        ValueError: if a number is out of range, or ``env`` has batch dimensions.

    Example:
        >>> from alm_torchrl import make_alm_loss, make_env
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> loss = make_alm_loss(env, hidden_dim=8, model_hidden_dim=8)
        >>> record_transitions(env, loss, transitions=250)["action"].shape
        torch.Size([250, 1])
    """
    check_integer("transitions", transitions)
    recorded: list[TensorDictBase] = []
    with noiseless_episodes(env, loss, seed) as episodes:
        while sum(map(len, recorded)) < transitions:
            recorded.append(next(episodes).select(*loss.in_keys))
    device = next(loss.parameters()).device
    return torch.cat(recorded)[:transitions].to(device)


def latent_rollout(
    env: EnvBase, loss: ALMLoss, *, steps: int = 50, starts: int = 20, seed: int = 0
) -> TensorDict:
    """Rolls the latent model along the actions of an episode without action noise.

    ``z_t`` is the mean of ``e'(s_t)``. A prediction from step ``i`` begins at
    ``zhat_0 = z_i``, and ``zhat_{t+1}`` is the mean of ``m(zhat_t, a_{i+t})``.

    Args:
        env: environment without batch dimensions whose episodes end.
        loss: the agent.

    Keyword Args:
        steps: length T of the predictions, at most the episode's. Default: ``50``.
        starts: number S of starts, evenly spaced; at most as many as the episode has.
            Default: ``20``.
        seed: seed of the environment and of the latents acted on. Default: ``0``.

    Returns:
        TensorDict: ``[S, T + 1]`` on the CPU; the first column is the start.
        ``latent`` and ``predicted`` ``[S, T + 1, L]``; ``error``, the root mean square
        of their difference over the L dimensions; ``normalised_error``, that over the
        root mean square deviation of the episode's latents (1 for the best constant
        guess, NaN if the latents do not vary); ``step``, the step of the episode.

    Raises:
        TypeError: if ``env`` or ``loss`` has the wrong type.
        ValueError: if a number is out of range, or ``env`` has batch dimensions.

    Example:
        >>> from alm_torchrl import make_alm_loss, make_env
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> loss = make_alm_loss(env, hidden_dim=8, model_hidden_dim=8)
        >>> found = latent_rollout(env, loss, steps=5, starts=3)
        >>> found.shape, found["step"][:, 0]
        (torch.Size([3, 6]), tensor([  0,  97, 195]))
    """
    check_integer("steps", steps)
    check_integer("starts", starts)
    with noiseless_episodes(env, loss, seed) as episodes:
        device = next(loss.parameters()).device
        episode = next(episodes).to(device)
        keys = loss.encoder.in_keys
        last = episode["next"].select(*keys)[-1:]
        latent = loss.latents.encode(torch.cat([episode.select(*keys), last])).mean
        steps = min(steps, len(episode))
        room = len(episode) - steps
        first = torch.linspace(0, room, min(starts, room + 1)).long()
        index = first.unsqueeze(1) + torch.arange(steps + 1)
        truth = latent[index.to(device)]
        action = episode[loss.tensor_keys.action][index[:, :-1].to(device)]
        predictions = [truth[:, 0]]
        for action_t in action.unbind(1):
            predictions.append(loss.latents.step(predictions[-1], action_t).mean)
    predicted = torch.stack(predictions, 1)
    error = (predicted - truth).double().square().mean(-1).sqrt()
    deviation = latent.double().var(0, correction=0).mean().sqrt()
    return TensorDict(
        latent=truth,
        predicted=predicted,
        error=error,
        normalised_error=error / deviation,
        step=index,
        batch_size=index.shape,
    ).cpu()
