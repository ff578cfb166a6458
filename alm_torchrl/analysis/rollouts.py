"""Open-loop predictions of the latent model against what is encoded later (Fig. 7)."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.envs import EnvBase

from alm_torchrl.analysis.recording import (
    check_agent,
    evaluation_episodes,
    undisturbed_loss,
)
from alm_torchrl.checks import check_integer
from alm_torchrl.objectives import ALMLoss

__all__ = ["latent_rollout"]


def latent_rollout(
    env: EnvBase, loss: ALMLoss, *, steps: int = 50, starts: int = 20, seed: int = 0
) -> TensorDict:
    """Rolls the latent model along an episode's actions, next to the encoded truth.

    One episode of the agent without action noise is encoded: ``z_t`` is the mean of
    ``e'(s_t)``. From ``zhat_0 = z_i`` at several steps ``i`` of it, ``zhat_{t+1}`` is
    the mean of ``m(zhat_t, a_{i+t})`` with the actions that were taken; nothing later
    than ``z_i`` reaches it.

    Args:
        env: environment without batch dimensions whose episodes end.
        loss: the agent.

    Keyword Args:
        steps: longest prediction; a shorter episode gives as many as it has steps.
            Default: ``50``.
        starts: how many starts, evenly spaced from the episode's first step to the
            last that leaves room; fewer if there are fewer. Default: ``20``.
        seed: of the environment and of the latents that the agent acts on.
            Default: ``0``.

    Returns:
        TensorDict: ``[S, T + 1]`` on the CPU, S starts and T predicted steps:
        ``latent`` and ``predicted`` ``[S, T + 1, L]``; ``error``, the root mean square
        of their difference over the latent's dimensions; ``normalised_error``, divided
        by the root mean square deviation of the episode's latents (1 is the error of
        the best constant guess; NaN if the latents do not vary); ``step``, the
        episode's step. The first column is the start itself, whose error is 0.

    Raises:
        TypeError: if ``env`` is no TorchRL environment or ``loss`` no ``ALMLoss``.
        ValueError: if a number is out of range, or ``env`` has batch dimensions.

    Example:
        >>> from alm_torchrl import make_alm_loss, make_env
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> loss = make_alm_loss(env, hidden_dim=8, model_hidden_dim=8)
        >>> found = latent_rollout(env, loss, steps=5, starts=3)
        >>> found.shape, found["step"][:, 0]
        (torch.Size([3, 6]), tensor([  0,  97, 195]))
    """
    check_agent(env, loss, seed)
    check_integer("steps", steps)
    check_integer("starts", starts)
    device = next(loss.parameters()).device
    with undisturbed_loss(loss, seed):
        env.set_seed(seed)
        episode = next(evaluation_episodes(env, loss)).to(device)
        keys = loss.encoder.in_keys
        last = episode["next"].select(*keys)[-1:]
        latent = loss.latents.encode(torch.cat([episode.select(*keys), last])).mean
        steps = min(steps, len(episode))
        room = len(episode) - steps
        first = torch.linspace(0, room, min(starts, room + 1)).long()
        index = first.unsqueeze(1) + torch.arange(steps + 1)
        truth = latent[index.to(device)]
        action = episode[loss.tensor_keys.action][index[:, :-1].to(device)]
        predicted = [truth[:, 0]]
        for action_t in action.unbind(1):
            predicted.append(loss.latents.step(predicted[-1], action_t).mean)
    guess = torch.stack(predicted, 1)
    error = (guess - truth).double().square().mean(-1).sqrt()
    deviation = latent.double().var(0, correction=0).mean().sqrt()
    return TensorDict(
        latent=truth,
        predicted=guess,
        error=error,
        normalised_error=error / deviation,
        step=index,
        batch_size=index.shape,
    ).cpu()
