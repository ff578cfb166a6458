"""What the terms of the loss are computed from; the functions are its methods."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs.utils import set_exploration_type

from alm_torchrl import functional
from alm_torchrl.checks import check_integer
from alm_torchrl.networks import RunningNorm
from alm_torchrl.objectives.batch import read_column, read_entry, read_transitions
from alm_torchrl.objectives.latents import (
    Encoding,
    Parameters,
    normal_parameters,
    split_dist,
)

if TYPE_CHECKING:
    from alm_torchrl.objectives.alm import ALMLoss

Method = TypeVar("Method", bound=Callable[..., Any])


def sampling(method: Method) -> Method:
    """Runs a method in the loss's sampling mode, as TorchRL runs ``*_loss`` methods."""

    @wraps(method)
    def wrapped(loss: ALMLoss, *args: object, **kwargs: object) -> object:
        with set_exploration_type(loss.deterministic_sampling_mode):
            return method(loss, *args, **kwargs)

    return cast("Method", wrapped)


@torch.no_grad()
def encode_transitions(loss: ALMLoss, tensordict: TensorDictBase) -> Encoding:
    """Runs the target encoder once for all one-step terms and the policy's.

    Returns:
        Encoding: the distributions of the latents before and after each transition.
    """
    transitions = read_transitions(loss, tensordict).data
    seen = [
        loss.latents.observations(rows)
        for rows in (transitions, read_entry(transitions, "next"))
    ]
    halves = split_dist(loss.latents.encode(torch.cat(seen)))
    return Encoding(*(halves or map(loss.latents.encode, seen)))


@torch.no_grad()
def observe(
    loss: ALMLoss, tensordict: TensorDictBase, skip: Tensor | None = None
) -> None:
    """Adds the observations of transitions to the statistics inside the encoder.

    To call once for each update, before the terms. The encoder's
    :class:`~alm_torchrl.networks.RunningNorm` sees its in_keys one after the other;
    buffers of the target encoder are copied. Without such a part it does nothing.

    Where ``skip``, a boolean ``[]``, is true, nothing changes.
    """
    norms = [m for m in loss.encoder.modules() if isinstance(m, RunningNorm)]
    if not norms:
        return
    rows = read_transitions(loss, tensordict)
    observed = loss.latents.observations(rows.data)
    entries = [observed.get(key) for key in loss.encoder.in_keys]
    mask = None if rows.mask is None else rows.mask.flatten()
    for norm in norms:
        norm.update(torch.cat(entries, -1), mask, skip)
    for key, source in loss.encoder_params.items(True, True):
        if not source.requires_grad:
            loss.target_encoder_params.get(key).copy_(source)


@sampling
@torch.no_grad()
def draw_latent(
    loss: ALMLoss, tensordict: TensorDictBase, encoded: Encoding | None = None
) -> Tensor:
    """Draws ``z ~ e'(s)`` for transitions, ``[N, L]``, without gradient."""
    if encoded is not None:
        return loss.latents.sample(encoded.now)
    rows = read_transitions(loss, tensordict)
    return loss.latents.sample(loss.latents.encode(rows.data))


@sampling
def model_rollout(loss: ALMLoss, slices: TensorDictBase) -> TensorDict:
    """Rolls the live model along the recorded actions of slices (Eq. 7).

    Returns:
        TensorDict: batch size ``[B]``, with ``latent`` ``[B, K+1, L]`` and, where
        its coefficient is not zero, ``reward`` ``[B, K]``, ``kl`` ``[B, K]`` and
        ``terminal_value`` ``[B]``. The gradient reaches encoder and model.
    """
    action = read_entry(slices, loss.tensor_keys.action)
    first = loss.latents.observations(slices)[:, 0]
    latents = [loss.latents.sample(loss.latents.encode(first, "live"))]
    dists = []
    for action_t in action.unbind(1):
        dists.append(loss.latents.step(latents[-1], action_t, "live"))
        latents.append(loss.latents.sample(dists[-1]))
    latent = torch.stack(latents, 1)
    rollout = TensorDict(latent=latent, batch_size=[action.shape[0]])
    if loss.reward_coef != 0:
        rollout["reward"] = loss.latents.predict_reward(latent[:, :-1], action)
    if loss.kl_coef != 0:
        with torch.no_grad():
            target = loss.latents.encode(read_entry(slices, "next"))
        locs, scales = zip(
            *(normal_parameters(dist, "model") for dist in dists), strict=True
        )
        rollout["kl"] = functional.gaussian_kl(
            torch.stack(locs, 1),
            torch.stack(scales, 1),
            *normal_parameters(target, "encoder"),
        )
    if loss.value_coef != 0:
        with torch.no_grad():
            last_action = loss.latents.act(latents[-1])
        value = loss.latents.state_action_value(latents[-1], last_action)
        rollout["terminal_value"] = loss.combine(value)
    return rollout


@sampling
def imagine(loss: ALMLoss, latent: Tensor, horizon: int) -> TensorDict:
    """Rolls the policy out in the latent model and scores it (Eq. 8, A.3).

    The gradient reaches the actor's parameters through the actions and the chain
    of latents; every other network is frozen. The actor sees latents without
    gradient, the critics see actions without gradient.

    With an entropy bonus, ``- alpha log pi`` of its action is added to each reward
    and each value of the return. In a value it has no gradient either.

    Returns:
        TensorDict: batch size ``[B]``, with ``latent`` ``[B, K+1, L]``, ``action``
        ``[B, K+1, A]``, ``reward`` and ``log_ratio`` ``[B, K]`` for t = 0..K-1
        (the log ratio is zero without a classifier), ``value`` ``[B, K]`` for
        t = 1..K, and ``lambda_return`` ``[B, K]``. With an entropy bonus also
        ``log_prob`` ``[B, K+1]``, and ``value`` contains the bonus.
    """
    bonus = loss.entropy
    z, a, log_prob = loss.latents.imagine(latent, horizon, log_prob=bonus is not None)
    reward, log_ratio = loss.latents.score(z, a[:, :-1])
    values = loss.latents.state_action_value(z[:, 1:], a[:, 1:].detach())
    value = loss.combine(values)
    gain, end = in_return(loss, reward, value)
    total = gain + loss.classifier_coef * log_ratio
    if bonus is not None and log_prob is not None:
        later = log_prob[:, 1:].detach()
        total = bonus.add(total, log_prob[:, :-1])
        value, end = bonus.add(value, later), bonus.add(end, later)
    rollout = TensorDict(
        latent=z,
        action=a,
        reward=reward,
        log_ratio=log_ratio,
        value=value,
        lambda_return=functional.lambda_return(total, end, loss.gamma, loss.lmbda),
        batch_size=[latent.shape[0]],
    )
    return rollout if log_prob is None else rollout.set("log_prob", log_prob)


@sampling
@torch.no_grad()
def td_target(
    loss: ALMLoss, transitions: TensorDictBase, encoded: Encoding | None = None
) -> Tensor:
    """What the critics learn (Eq. 10), the loss's ``critic_target``.

    By default ``R + gamma (1 - terminated) min_i Q'_i(z', pi(z'))`` with
    ``z' ~ e'(s')`` and R after ``reward_transform``; with an entropy bonus, of
    ``min_i Q'_i(z', a') - alpha log pi(a' | z')``.

    Returns:
        Tensor: ``[*]`` for transitions ``[*]``, without gradient.
    """
    return loss.critic_target(loss, transitions, encoded)


@sampling
@torch.no_grad()
def lower_bound(loss: ALMLoss, transitions: TensorDictBase, horizon: int) -> Tensor:
    """K-step estimate of the lower bound for given first actions (Fig. 4, 8).

    ``sum_{t<K} gamma^t (r(z_t, a_t) + c log ratio_t) + gamma^K min Q(z_K, a_K)``
    from ``z_0 ~ e'(s)``, with the given first action and the actor's mean, not
    clamped, afterwards. With ``Logarithms("bound")`` and ``classifier_coef=1`` it
    is L^K of Theorem 3.1, and ``exp(L^K) / (1 - gamma)`` bounds the return.

    Returns:
        Tensor: the estimate for each row of the transitions, ``[B]``.
    """
    check_integer("horizon", horizon)
    latents = [loss.latents.sample(loss.latents.encode(transitions))]
    actions = [read_entry(transitions, loss.tensor_keys.action)]
    for _ in range(horizon):
        dist = loss.latents.step(latents[-1], actions[-1])
        latents.append(loss.latents.sample(dist))
        actions.append(loss.latents.mean_action(latents[-1]))
    z, a = torch.stack(latents, 1), torch.stack(actions, 1)
    reward, log_ratio = loss.latents.score(z, a[:, :-1])
    value = loss.combine(loss.latents.state_action_value(z[:, -1], a[:, -1]))
    gain, end = in_return(loss, reward, value)
    return functional.k_step_bound(
        gain + loss.classifier_coef * log_ratio, end, loss.gamma
    )


def mixed_next(
    loss: ALMLoss, transitions: TensorDictBase, encoded: Encoding
) -> tuple[Tensor, Tensor]:
    """Which next latents are imagined, [N], and the next latents, [N, L]."""
    action, key = transitions[loss.tensor_keys.action], loss.tensor_keys.imagined
    step, sample = loss.latents.step, loss.latents.sample
    if transitions.get(key, default=None) is None:
        # Each row runs through one of the networks only.
        rank = torch.rand(action.shape[0], device=action.device).argsort()
        half, rest = rank.argsort().tensor_split([action.shape[0] // 2])
        real = sample(encoded.next, rest)
        # The authors imagine from a latent of its own, not that of the reward.
        latent = sample(encoded.now)
        imagined = sample(step(latent[half], action[half]))
        return rank < len(half), torch.cat([imagined, real])[rank]
    real, latent = sample(encoded.next), sample(encoded.now)
    imagined = sample(step(latent, action))
    chosen = read_column(transitions, key, latent)
    if chosen.dtype != torch.bool:
        raise ValueError(f"tensordict: expected booleans {key!r}, got {chosen.dtype}.")
    return chosen, torch.where(chosen.unsqueeze(-1), imagined, real)


def policy_bound(
    loss: ALMLoss, latent: Tensor, horizon: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The lower bound that the policy maximises, ``[N]``, and metrics ``[N, K]``."""
    if horizon is None:
        raise ValueError(
            "actor_loss: expected slices [B, K] or a horizon >= 1, got transitions and "
            "horizon=None."
        )
    rollout = loss.imagine(latent, horizon)
    objective = functional.discounted_mean(rollout["lambda_return"], loss.gamma)
    names = ["reward", "value"] + ["log_ratio"] * (loss.classifier is not None)
    metrics = {f"imagined_{name}": rollout[name] for name in names}
    return objective, metrics | {"lambda_return": rollout["lambda_return"]}


def policy_value(
    loss: ALMLoss,
    latent: Tensor,
    actor: Parameters,
    critics: Parameters,
    *,
    pessimism: float,
    noise: tuple[float, float] | None = None,
) -> Tensor:
    """The critics' value of the policy's action, with its bonus, ``[*]``.

    ``noise`` is the standard deviation and clip of the action's, or the actor's own.
    """
    if loss.entropy is not None:
        action, log_prob = loss.latents.act_and_score(latent, actor)
        values = loss.latents.state_action_value(latent, action, critics)
        value = functional.pessimistic_value(values, pessimism)
        return loss.entropy.add(value, log_prob)
    if noise is None:
        action = loss.latents.act(latent, actor)
    else:
        action = loss.latents.smoothed_action(latent, *noise)
    values = loss.latents.state_action_value(latent, action, critics)
    return functional.pessimistic_value(values, pessimism)


def combine(loss: ALMLoss, values: Tensor) -> Tensor:
    """One value ``[*]`` from those of the critics ``[*, N]``, to be maximised."""
    return functional.pessimistic_value(values, loss.pessimism)


def recorded_reward(loss: ALMLoss, transitions: TensorDictBase, like: Tensor) -> Tensor:
    """The reward of transitions ``[*]`` as reward model and critics learn it."""
    following = read_entry(transitions, "next")
    reward = read_column(following, loss.tensor_keys.reward, like)
    transform = loss.reward_transform
    return reward if transform is None else transform(reward)


def in_return(loss: ALMLoss, reward: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Reward and value as they enter the policy's return and the bound."""
    if loss.logarithms is None:
        return reward, value
    return loss.logarithms.in_return(reward, value, loss.gamma)
