"""The bias of the K-step bound and of the critics against real returns (Fig. 4, 8)."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl import functional
from alm_torchrl.analysis.rollouts import noiseless_episodes
from alm_torchrl.baselines.losses import BaselineLoss
from alm_torchrl.checks import check_integer
from alm_torchrl.objectives import ALMLoss

__all__ = ["ESTIMATES", "bias_summary", "bound_bias", "normalised_bias"]

ESTIMATES = ("bound", "qvalue")
"""Entries of :func:`bound_bias` that estimate the return; baselines have no bound."""

_SMALLEST_RETURN = 10.0


def bound_bias(
    env: EnvBase,
    loss: ALMLoss | BaselineLoss,
    *,
    horizon: int = 3,
    pairs: int = 1000,
    cutoff: int = 350,
    seed: int = 0,
) -> TensorDict:
    """Compares the bound and the critics with Monte-Carlo returns (appendix E).

    The pairs are the states and actions of episodes without action noise. The return
    of a pair is the discounted sum of *all* later rewards of its episode, after the
    agent's ``reward_transform``, without the entropy bonus that soft critics include:
    it is part of their bias. A bound of logarithms is compared as ``exp(L^K) /
    (1 - gamma)``, what it says of the return (Theorem 3.1).

    Args:
        env: environment without batch dimensions whose episodes end.
        loss: the agent.

    Keyword Args:
        horizon: steps K of ALM's bound. Default: ``3``.
        pairs: smallest number of pairs; episodes stay whole. Default: ``1000``.
        cutoff: number of steps used from the start of each episode. Default: ``350``.
        seed: seed of the environment and of the latent samples. Default: ``0``.

    Returns:
        TensorDict: ``[N]`` on the CPU, N at least ``pairs``. Float64: ``monte_carlo``,
        the return; ``bound``, of :meth:`~alm_torchrl.ALMLoss.lower_bound` (ALM only);
        ``qvalue``, ``min Q(z, a)`` with ``z ~ e'(s)`` or a baseline's
        ``qvalue_estimate``; ``missing``, the weight ``gamma^(steps left)`` of what a
        time limit cuts off, 0 after a termination. Int64: ``episode`` and ``step``,
        from 0.

    Raises:
        TypeError: if ``env`` or ``loss`` has the wrong type.
        ValueError: if a number is out of range, or ``env`` has batch dimensions.

    Example:
        >>> from alm_torchrl import make_alm_loss, make_env
        >>> env = make_env("Pendulum-v1", action_bounds="rescale")
        >>> loss = make_alm_loss(env, hidden_dim=8, model_hidden_dim=8)
        >>> found = bound_bias(env, loss, pairs=10, cutoff=20)
        >>> found.shape, bool((found["monte_carlo"] < 0).all())
        (torch.Size([20]), True)
        >>> round(found["missing"][0].item(), 3)  # 200 steps are few for gamma = 0.99
        0.134
    """
    for name, number in (("horizon", horizon), ("pairs", pairs), ("cutoff", cutoff)):
        check_integer(name, number)
    returns: list[TensorDictBase] = []
    taken: list[TensorDictBase] = []
    accepted = (ALMLoss, BaselineLoss)
    with noiseless_episodes(env, loss, seed, accepted) as episodes:
        keys = (*loss.acting_policy().in_keys, loss.tensor_keys.action)
        while sum(map(len, taken)) < pairs:
            episode = next(episodes)
            returns.append(_returns(episode, env, loss, len(returns))[:cutoff])
            taken.append(episode.select(*keys)[:cutoff])
        rows = torch.cat(taken).to(next(loss.parameters()).device)
        estimates = _estimates(loss, rows, horizon)
    found: TensorDict = torch.cat(returns)
    return found.update({k: v.double().cpu() for k, v in estimates.items()})


def normalised_bias(pairs: TensorDictBase) -> TensorDict:
    """Computes the bias of each estimate, as it is and normalised in two ways.

    Args:
        pairs: ``[N]``, from :func:`bound_bias`.

    Returns:
        TensorDict: ``[N]``. Under each of :data:`ESTIMATES`: ``bias``, estimate minus
        return; ``per_pair``, the bias over ``max(|return|, 10)`` of the pair, as in
        the authors' code (there with the opposite sign); ``overall``, the bias over
        ``|mean return|``, as in the paper's appendix E.

    Example:
        >>> pairs = TensorDict(
        ...     monte_carlo=torch.tensor([20.0, 0.0]),
        ...     bound=torch.tensor([10.0, 1.0]),
        ...     qvalue=torch.tensor([20.0, 0.0]),
        ...     batch_size=[2],
        ... )
        >>> bias = normalised_bias(pairs)["bound"]
        >>> bias["per_pair"], bias["overall"]
        (tensor([-0.5000,  0.1000]), tensor([-1.0000,  0.1000]))
    """
    returns = pairs["monte_carlo"]
    biases = {n: pairs[n] - returns for n in ESTIMATES if n in pairs}
    return TensorDict(
        {
            name: {
                "bias": bias,
                "per_pair": bias / returns.abs().clamp_min(_SMALLEST_RETURN),
                "overall": bias / returns.mean().abs(),
            }
            for name, bias in biases.items()
        },
        batch_size=pairs.batch_size,
    )


def bias_summary(pairs: TensorDictBase) -> TensorDict:
    """Computes mean and standard deviation of each bias over all pairs.

    Args:
        pairs: ``[N]``, from :func:`bound_bias`.

    Returns:
        TensorDict: no batch size; ``"mean"`` and ``"std"`` (which divides by N, as in
        the authors' code) under each entry of :func:`normalised_bias`.

    Example:
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> pairs = TensorDict(
        ...     monte_carlo=one, bound=zero, qvalue=one, batch_size=[2]
        ... )
        >>> bias_summary(pairs)["bound", "overall", "mean"]
        tensor(-1.)
    """
    columns = normalised_bias(pairs).items(True, True)
    return TensorDict(
        {
            key: TensorDict(mean=column.mean(), std=column.std(correction=0))
            for key, column in columns
        }
    )


def _estimates(
    loss: ALMLoss | BaselineLoss, taken: TensorDictBase, horizon: int
) -> dict[str, Tensor]:
    """What the agent expects after the actions taken, ``[N]`` each."""
    if isinstance(loss, BaselineLoss):
        return {"qvalue": loss.qvalue_estimate(taken)}
    with set_exploration_type(ExplorationType.RANDOM):
        latents = loss.latents
        latent = latents.sample(latents.encode(taken))
        value = latents.state_action_value(latent, taken[loss.tensor_keys.action])
        bound = loss.lower_bound(taken, horizon)
    if loss.logarithms is not None and loss.logarithms.where == "bound":
        bound = bound.double().exp() / (1 - loss.gamma)
    return {"bound": bound, "qvalue": value.amin(-1)}


def _returns(
    episode: TensorDictBase, env: EnvBase, loss: ALMLoss | BaselineLoss, number: int
) -> TensorDict:
    """Discounted return from each step of an episode, ``[T]``, on the CPU."""
    length, following = len(episode), episode["next"]
    reward = following[env.reward_key].reshape(length).double().cpu()
    if isinstance(loss, BaselineLoss):
        gamma = loss.value_estimator.gamma.item()
    else:
        gamma = loss.gamma.item()
        if loss.reward_transform is not None:
            reward = loss.reward_transform(reward)
    # With lmbda = 1 and no value at the end: the sum of the discounted rewards.
    returns = functional.lambda_return(reward, torch.zeros_like(reward), gamma, 1.0)
    step = torch.arange(length)
    terminated = bool(following[loss.tensor_keys.terminated][-1].any())
    left = (length - step).double()
    return TensorDict(
        monte_carlo=returns,
        missing=torch.zeros_like(left) if terminated else gamma**left,
        episode=torch.full_like(step, number),
        step=step,
        batch_size=[length],
    )
