"""The bias of the K-step bound and of the critics against real returns (Fig. 4, 8)."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase

from alm_torchrl import functional
from alm_torchrl.analysis.recording import (
    check_agent,
    evaluation_episodes,
    undisturbed_loss,
)
from alm_torchrl.baselines.losses import BaselineLoss
from alm_torchrl.checks import check_integer
from alm_torchrl.objectives import ALMLoss

__all__ = ["ESTIMATES", "bias_summary", "bound_bias", "normalised_bias"]

ESTIMATES = ("bound", "qvalue")
"""Entries of :func:`bound_bias` that are estimates of the return, where present."""

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
    """The bound and the critics' value next to Monte-Carlo returns (appendix E).

    Episodes of the agent without action noise are run until there are ``pairs`` states
    with the action taken there, only the first ``cutoff`` steps of each counting. The
    return of a pair is the discounted sum of *all* later rewards of its episode. Where
    a time limit ends the episode, what would have followed is not in it: its weight
    ``gamma^(steps left)`` is given as ``missing``. (With the paper's tasks, 1000 steps
    and ``gamma = 0.99``, it is at most 0.0015 at the default cutoff.)

    A baseline has no bound; its critics are measured in the same way. SAC's and REDQ's
    are soft values: in them is the entropy bonus of all later steps of the *stochastic*
    policy, whereas the return is here, as for ALM, of rewards only and of the policy
    without noise. So part of their bias is that bonus. (REDQ's own study,
    https://arxiv.org/abs/2101.05982, draws the actions and adds the bonus to the
    return.)

    Args:
        env: environment without batch dimensions whose episodes end; its rewards are
            those that the agent was trained on.
        loss: the agent.

    Keyword Args:
        horizon: steps K of ALM's bound. Default: ``3``.
        pairs: fewest pairs to find; an episode's are kept together. Default: ``1000``.
        cutoff: steps at the start of an episode that count. Default: ``350``.
        seed: of the environment and of the latent samples. Default: ``0``.

    Returns:
        TensorDict: ``[N]`` with N at least ``pairs``, on the CPU, float64:
        ``monte_carlo``; of ALM only, ``bound``
        (:meth:`~alm_torchrl.ALMLoss.lower_bound`); ``qvalue``: of ALM ``min Q(z, a)``
        with ``z ~ e'(s)``, of TD3 and SAC ``min Q(s, a)``, of REDQ the mean over its
        critics, as in its own study; ``missing``, 0 where the episode terminated; and
        int64 ``episode`` and ``step``, both from 0.

    Raises:
        TypeError: if ``env`` is no TorchRL environment, or ``loss`` neither an
            ``ALMLoss`` nor a ``BaselineLoss``.
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
    check_agent(env, loss, seed, (ALMLoss, BaselineLoss))
    for name, number in (("horizon", horizon), ("pairs", pairs), ("cutoff", cutoff)):
        check_integer(name, number)
    returns: list[TensorDictBase] = []
    rows: list[TensorDictBase] = []
    taken_keys = (*loss.acting_policy().in_keys, loss.tensor_keys.action)
    with undisturbed_loss(loss, seed):
        env.set_seed(seed)
        for number, episode in enumerate(evaluation_episodes(env, loss)):
            returns.append(_returns(episode, env, loss, number)[:cutoff])
            rows.append(episode.select(*taken_keys)[:cutoff])
            if sum(map(len, rows)) >= pairs:
                break
        device = next(loss.parameters()).device
        taken = torch.cat(rows).to(device)
        estimates = _estimates(loss, taken, horizon)
    found: TensorDict = torch.cat(returns)
    return found.update({k: v.double().cpu() for k, v in estimates.items()})


def normalised_bias(pairs: TensorDictBase) -> TensorDict:
    """Bias of each estimate of each pair, plain and normalised in two ways.

    Args:
        pairs: ``[N]``, what :func:`bound_bias` returned.

    Returns:
        TensorDict: ``[N]``; under ``bound``, where there is one, and ``qvalue`` each
        ``bias``, the estimate minus the return; ``per_pair``, divided by
        ``max(|return|, 10)`` of that pair, as the authors' code does (which has the
        opposite sign); ``overall``, divided by ``|mean return|``, as the paper's
        appendix E does.

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
    target = pairs["monte_carlo"]
    biases = {}
    for name in (name for name in ESTIMATES if name in pairs):
        bias = pairs[name] - target
        biases[name] = {
            "bias": bias,
            "per_pair": bias / target.abs().clamp_min(_SMALLEST_RETURN),
            "overall": bias / target.mean().abs(),
        }
    return TensorDict(biases, batch_size=pairs.batch_size)


def bias_summary(pairs: TensorDictBase) -> TensorDict:
    """Mean and standard deviation of the biases over all pairs.

    Args:
        pairs: ``[N]``, what :func:`bound_bias` returned.

    Returns:
        TensorDict: no batch size; ``("bound", "per_pair", "mean")`` and so on, for
        each entry of :func:`normalised_bias`. The deviation ``"std"`` divides by N, as
        the authors do.

    Example:
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> pairs = TensorDict(
        ...     monte_carlo=one, bound=zero, qvalue=one, batch_size=[2]
        ... )
        >>> bias_summary(pairs)["bound", "overall", "mean"]
        tensor(-1.)
    """
    biases = normalised_bias(pairs)
    return TensorDict(
        {
            name: {
                kind: {"mean": column.mean(), "std": column.std(correction=0)}
                for kind, column in biases[name].items()
            }
            for name in ESTIMATES
            if name in biases
        }
    )


def _estimates(
    loss: ALMLoss | BaselineLoss, taken: TensorDictBase, horizon: int
) -> dict[str, Tensor]:
    """What an agent expects to follow on the actions taken, ``[N]`` each."""
    if isinstance(loss, BaselineLoss):
        return {"qvalue": loss.qvalue_estimate(taken)}
    latent = loss.latents.sample(loss.latents.encode(taken))
    value = loss.latents.state_action_value(
        latent, taken[loss.tensor_keys.action]
    ).amin(-1)
    return {"bound": loss.lower_bound(taken, horizon), "qvalue": value}


def _returns(
    episode: TensorDictBase, env: EnvBase, loss: ALMLoss | BaselineLoss, number: int
) -> TensorDict:
    """Discounted return from each step of an episode, ``[T]``, on the CPU."""
    length = len(episode)
    following = episode["next"]
    reward = following[env.reward_key].reshape(length).double().cpu()
    baseline = isinstance(loss, BaselineLoss)
    gamma = (loss.value_estimator.gamma if baseline else loss.gamma).item()
    # With lmbda = 1 and no value at the end: the sum of the discounted rewards.
    returns = functional.lambda_return(reward, torch.zeros_like(reward), gamma, 1.0)
    step = torch.arange(length)
    terminated = bool(following[loss.tensor_keys.terminated][-1].any())
    left = (length - step).double()
    missing = torch.zeros_like(left) if terminated else gamma**left
    return TensorDict(
        monte_carlo=returns,
        missing=missing,
        episode=torch.full_like(step, number),
        step=step,
        batch_size=[length],
    )
