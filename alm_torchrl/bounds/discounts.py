"""Distributions over the horizon, and the bound with a discount of its own (A.4)."""

from __future__ import annotations

import torch
from torch import Tensor, einsum

from alm_torchrl.bounds.exact import q_values, real_rollout, weighted
from alm_torchrl.bounds.objective import bound_parts
from alm_torchrl.bounds.problem import (
    FiniteMDP,
    LatentAgent,
    check_horizon,
    check_pair,
)

__all__ = [
    "discount_bound",
    "horizon_terms",
    "optimal_discount",
    "payoffs",
    "truncated_geometric",
]


def truncated_geometric(gamma: Tensor, horizon: int) -> Tensor:
    """``P_K(H)`` (Lemma A.1): ``(1 - gamma) gamma^H`` for ``H < K``, ``gamma^K`` at K.

    ``E[sum_{t=0}^{H} x_t] = sum_{t=0}^{K} gamma^t x_t``, and with one term fewer
    ``E[sum_{t=0}^{H-1} x_t] = sum_{t=0}^{K-1} gamma^(t+1) x_t``.

    Args:
        gamma (Tensor): discount in ``[0, 1)``, ``[*]``.
        horizon (int): ``K >= 1``.

    Returns:
        Tensor: a distribution, ``[*, K + 1]``.

    Raises:
        ValueError: if ``horizon`` is below 1.

    Examples:
        >>> truncated_geometric(torch.tensor(0.5), 2)
        tensor([0.5000, 0.2500, 0.2500])
    """
    check_horizon(horizon)
    weight = gamma[..., None].pow(torch.arange(horizon + 1, device=gamma.device))
    stop = torch.ones_like(weight)
    stop[..., :-1] = (1 - gamma)[..., None]
    return weight * stop


def payoffs(mdp: FiniteMDP, agent: LatentAgent, horizon: int) -> Tensor:
    """``E_p[psi_H]`` for ``H = 0..K``: rewards of the first ``K`` steps, then ``Q``.

    Their mean over :func:`truncated_geometric` is the return (Lemma A.2).

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): encoder and policy; the model plays no part.
        horizon (int): ``K >= 1``.

    Returns:
        Tensor: ``[*, K + 1]``.

    Raises:
        ValueError: if ``horizon`` is below 1, or ``agent`` does not fit ``mdp``.

    Examples:
        >>> from alm_torchrl.bounds import expected_return, random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> agent = random_agent(4, 3, 2, 2, generator=generator)
        >>> mean = (truncated_geometric(mdp.gamma, 5) * payoffs(mdp, agent, 5)).sum(-1)
        >>> mean.allclose(expected_return(mdp, agent.state_policy))
        True
    """
    check_pair(mdp, agent)
    policy = agent.state_policy
    visits = real_rollout(mdp, policy, horizon)
    reward = einsum("...tsa,...sa->...t", visits[..., :-1, :, :], mdp.reward)
    value = (visits[..., -1, :, :] * q_values(mdp, policy)).sum((-2, -1))
    return torch.cat([reward, value[..., None]], -1)


def horizon_terms(mdp: FiniteMDP, agent: LatentAgent, horizon: int) -> Tensor:
    """``E_{q(tau|H)} log[p(tau|H) psi_H / q(tau|H)]`` for ``H = 0..K``, ``q`` of Eq. 4.

    Each is at most ``log E_p[psi_H]``. Their mean over :func:`truncated_geometric` is
    :func:`lower_bound` with the weight ``"tight"``.

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): encoder, model and policy.
        horizon (int): ``K >= 1``.

    Returns:
        Tensor: nats, ``[*, K + 1]``.

    Raises:
        ValueError: if ``horizon`` is below 1, or ``agent`` does not fit ``mdp``.

    Examples:
        >>> from alm_torchrl.bounds import lower_bound, random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> agent = random_agent(4, 3, 2, 2, generator=generator)
        >>> terms = horizon_terms(mdp, agent, 5)
        >>> mean = (truncated_geometric(mdp.gamma, 5) * terms).sum(-1)
        >>> mean.allclose(lower_bound(mdp, agent, 5, kl_weight="tight"))
        True
    """
    parts = bound_parts(mdp, agent, horizon)
    kl = parts.kl.cumsum(-1)
    before = torch.cat([torch.zeros_like(kl[..., :1]), kl], -1)
    return torch.cat([parts.log_reward, parts.log_value[..., -1:]], -1) - before


def optimal_discount(terms: Tensor, gamma: Tensor) -> Tensor:
    """The discount distribution that maximises :func:`discount_bound` (A.4, step g).

    ``gamma*_K(H)`` is proportional to ``P_K(H) exp(terms_H)``, by Lemma A.3. With the
    logarithm of :func:`payoffs` it is the paper's; with :func:`horizon_terms` it is the
    best one for the latent model at hand.

    Args:
        terms (Tensor): ``[*, K + 1]``, nats.
        gamma (Tensor): discount in ``[0, 1)``, ``[*]``.

    Returns:
        Tensor: a distribution, ``[*, K + 1]``.

    Examples:
        >>> optimal_discount(torch.zeros(3), torch.tensor(0.5))
        tensor([0.5000, 0.2500, 0.2500])
    """
    prior = truncated_geometric(gamma, terms.shape[-1] - 1)
    return (prior.log() + terms).softmax(-1)


def discount_bound(
    terms: Tensor, gamma: Tensor, discount: Tensor | None = None
) -> Tensor:
    """The bound with a discount distribution of its own (A.4, step c; A.5, step f).

    ``sum_H d(H) (log P_K(H) - log d(H) + terms_H)``. Any distribution ``d`` gives a
    lower bound on the log return as long as ``terms_H <= log E_p[psi_H]``.

    Args:
        terms (Tensor): ``[*, K + 1]``, nats.
        gamma (Tensor): discount in ``[0, 1)``, ``[*]``.
        discount (Tensor, optional): ``d``, ``[*, K + 1]``. Default: ``None``, the
            optimal one, with which the bound is ``log sum_H P_K(H) exp(terms_H)``.

    Returns:
        Tensor: nats, ``[*]``.

    Examples:
        With no latent model to pay for, the best discount makes the bound tight:

        >>> from alm_torchrl.bounds import expected_return, random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> agent = random_agent(4, 3, 2, 2, generator=generator)
        >>> tight = discount_bound(payoffs(mdp, agent, 5).log(), mdp.gamma)
        >>> tight.allclose(expected_return(mdp, agent.state_policy).log())
        True
    """
    prior = truncated_geometric(gamma, terms.shape[-1] - 1)
    if discount is None:
        return (prior.log() + terms).logsumexp(-1)
    gain = prior.log() - discount.log() + terms
    return weighted(discount, gain).sum(-1)
