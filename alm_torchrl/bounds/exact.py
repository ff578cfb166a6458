"""Exact expectations in finite problems: returns, values, occupancies, divergences.

Time is a dimension of its own, ``t = 0..K``, where a function has a horizon ``K``.
"""

from __future__ import annotations

import torch
from torch import Tensor, einsum

from alm_torchrl.bounds.problem import (
    FiniteMDP,
    LatentAgent,
    check_horizon,
    check_pair,
)

__all__ = [
    "discounted_visits",
    "expected_return",
    "model_rollout",
    "optimal_return",
    "q_values",
    "real_rollout",
]


class Discounted:
    """Solves for discounted sums over an unending Markov chain.

    It factorises ``(I - discount M)^T``, whose columns are dominated by their diagonal.
    Partial pivoting then leaves the order alone, the off-diagonal entries of the
    factors stay negative and a positive right side is only ever added to: each entry
    of the solution is accurate for itself, however far apart the rewards are.

    Args:
        transition (Tensor): rows of distributions, ``[*, N, N]``.
        discount (Tensor): in ``[0, 1)``, ``[*]``.
    """

    def __init__(self, transition: Tensor, discount: Tensor) -> None:
        size = transition.shape[-1]
        identity = torch.eye(size, dtype=transition.dtype, device=transition.device)
        system = identity - discount[..., None, None] * transition.mT
        self._factors = torch.linalg.lu_factor(system)

    def sum(self, payoff: Tensor) -> Tensor:
        """``sum_t discount^t M^t payoff``, ``[*, N]`` to ``[*, N]``."""
        solution = torch.linalg.lu_solve(
            *self._factors, payoff[..., None], adjoint=True
        )
        return solution[..., 0]

    def occupancy(self, start: Tensor) -> Tensor:
        """``sum_t discount^t start M^t``, ``[*, N]`` to ``[*, N]``."""
        return torch.linalg.lu_solve(*self._factors, start[..., None])[..., 0]


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """``weight * value``, where a weight of zero silences an infinite value."""
    return weight * value.where(weight != 0, 0)


def expectation(equation: str, weight: Tensor, value: Tensor) -> Tensor:
    """``einsum`` in which a weight of zero silences a value of plus infinity."""
    infinite = value.isinf()
    total = einsum(equation, weight, value.where(~infinite, 0))
    if not bool(infinite.any()):
        return total
    reached = einsum(equation, weight, infinite.to(weight.dtype)) > 0
    return total.masked_fill(reached, torch.inf)


def kl_table(p: Tensor, q: Tensor) -> Tensor:
    """``KL(p_i || q_j)`` of every row of ``p`` with every row of ``q``.

    Args:
        p (Tensor): ``[*, I, N]``.
        q (Tensor): ``[*, J, N]``.

    Returns:
        Tensor: nats, ``[*, I, J]``; infinite where ``q`` misses support of ``p``.

    Examples:
        >>> fair, sure = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
        >>> kl_table(sure, fair), kl_table(fair, sure)
        (tensor([[0.6931]]), tensor([[inf]]))
    """
    negentropy = torch.xlogy(p, p).sum(-1)[..., None]
    return negentropy - torch.xlogy(p[..., :, None, :], q[..., None, :, :]).sum(-1)


def latent_kl(model: Tensor, encoder: Tensor) -> Tensor:
    """``KL(m(.|z, a) || e(.|s'))`` (Eq. 7), ``[*, Z, A, S]``."""
    rows = kl_table(model.flatten(-3, -2), encoder)
    return rows.unflatten(-2, model.shape[-3:-1])


def q_values(mdp: FiniteMDP, policy: Tensor) -> Tensor:
    """Normalised values of a policy: ``E[(1 - gamma) sum_t gamma^t r | s, a]``.

    ``Q(s, a) = (1 - gamma) r(s, a) + gamma E[Q(s', a')]``: with a reward of one
    everywhere it is one. A latent drawn from the encoder only matters through the
    action, so that ``Q`` of an agent is that of its ``state_policy``.

    Args:
        mdp (FiniteMDP): the problem.
        policy (Tensor): ``pi(a|s)``, ``[*, S, A]``.

    Returns:
        Tensor: ``[*, S, A]``.

    Examples:
        >>> from alm_torchrl.bounds import random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(1, 3, 2, generator=generator, log10_reward=(0.0, 0.0))
        >>> policy = torch.full((1, 3, 2), 0.5, dtype=torch.float64)
        >>> q_values(mdp, policy).allclose(torch.ones(1, 3, 2, dtype=torch.float64))
        True
    """
    step = einsum("...sap,...sa->...sp", mdp.kernel, policy)
    reward = (1 - mdp.gamma)[..., None, None] * mdp.reward
    value = Discounted(step, mdp.gamma).sum((reward * policy).sum(-1))
    following = einsum("...sap,...p->...sa", mdp.kernel, value)
    return reward + mdp.gamma[..., None, None] * following


def expected_return(mdp: FiniteMDP, policy: Tensor) -> Tensor:
    """The objective of reinforcement learning (Eq. 1, under ``p`` of Eq. 2).

    ``E_p[(1 - gamma) sum_t gamma^t r(s_t, a_t)]``. Theorem 3.1 bounds this divided by
    ``1 - gamma``.

    Args:
        mdp (FiniteMDP): the problem.
        policy (Tensor): ``pi(a|s)``, ``[*, S, A]``; of an agent, its ``state_policy``.

    Returns:
        Tensor: ``[*]``, between the smallest and the largest reward.

    Examples:
        >>> from alm_torchrl.bounds import random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> agent = random_agent(4, 3, 2, 2, generator=generator)
        >>> truth = expected_return(mdp, agent.state_policy)
        >>> bool((truth <= optimal_return(mdp)).all())
        True
    """
    value = (q_values(mdp, policy) * policy).sum(-1)
    return (mdp.initial * value).sum(-1)


def optimal_return(mdp: FiniteMDP) -> Tensor:
    """The largest :func:`expected_return` of any policy, by policy iteration.

    No agent exceeds it, and an agent whose encoder tells all states apart can reach it.

    Args:
        mdp (FiniteMDP): the problem.

    Returns:
        Tensor: ``[*]``.

    Examples:
        >>> from alm_torchrl.bounds import random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator, gamma=0.0)
        >>> best = (mdp.initial * mdp.reward.max(-1).values).sum(-1)
        >>> optimal_return(mdp).allclose(best)
        True
    """
    choice = mdp.reward.argmax(-1, keepdim=True)
    while True:
        policy = torch.zeros_like(mdp.reward).scatter(-1, choice, 1.0)
        qvalue = q_values(mdp, policy)
        best, greedy = qvalue.max(-1, keepdim=True)
        # The margin is above rounding, so that equal actions cannot alternate.
        better = best > qvalue.gather(-1, choice) * (1 + 1e-12)
        if not bool(better.any()):
            return (mdp.initial * best[..., 0]).sum(-1)
        choice = greedy.where(better, choice)


def real_rollout(mdp: FiniteMDP, policy: Tensor, horizon: int) -> Tensor:
    """Where ``p`` is at each step: ``p(s_t, a_t)`` for ``t = 0..K`` (Eq. 2).

    Args:
        mdp (FiniteMDP): the problem.
        policy (Tensor): ``pi(a|s)``, ``[*, S, A]``.
        horizon (int): ``K >= 1``.

    Returns:
        Tensor: ``[*, K + 1, S, A]``.

    Raises:
        ValueError: if ``horizon`` is below 1.

    Examples:
        >>> from alm_torchrl.bounds import random_mdp, random_policy
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> policy = random_policy(4, 3, 2, generator=generator)
        >>> real_rollout(mdp, policy, 5).shape
        torch.Size([4, 6, 3, 2])
    """
    check_horizon(horizon)
    visits = [mdp.initial[..., None] * policy]
    for _ in range(horizon):
        state = einsum("...sa,...sap->...p", visits[-1], mdp.kernel)
        visits.append(state[..., None] * policy)
    return torch.stack(visits, -3)


def discounted_visits(mdp: FiniteMDP, policy: Tensor) -> Tensor:
    """``(1 - gamma) sum_t gamma^t p(s_t, a_t)``: the data of a discounted policy.

    Args:
        mdp (FiniteMDP): the problem.
        policy (Tensor): ``pi(a|s)``, ``[*, S, A]``.

    Returns:
        Tensor: a distribution, ``[*, S, A]``.

    Examples:
        The return is the mean reward under it:

        >>> from alm_torchrl.bounds import random_mdp, random_policy
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> policy = random_policy(4, 3, 2, generator=generator)
        >>> mean = (discounted_visits(mdp, policy) * mdp.reward).sum((-2, -1))
        >>> mean.allclose(expected_return(mdp, policy))
        True
    """
    step = einsum("...sap,...sa->...sp", mdp.kernel, policy)
    state = Discounted(step, mdp.gamma).occupancy(mdp.initial)
    return (1 - mdp.gamma)[..., None, None] * state[..., None] * policy


def model_rollout(mdp: FiniteMDP, agent: LatentAgent, horizon: int) -> Tensor:
    """Where ``q`` is at each step: ``q^K(s_t, z_t)`` for ``t = 0..K`` (Eq. 4).

    ``s_0 ~ p_0``, ``z_0 ~ e(s_0)``; then ``a_t ~ pi(z_t)``, ``s_{t+1} ~ p(s_t, a_t)``
    and, independently of ``s_{t+1}``, ``z_{t+1} ~ m(z_t, a_t)``. The action adds
    ``pi(a_t|z_t)``.

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): encoder, model and policy.
        horizon (int): ``K >= 1``.

    Returns:
        Tensor: ``[*, K + 1, S, Z]``.

    Raises:
        ValueError: if ``horizon`` is below 1, or ``agent`` does not fit ``mdp``.

    Examples:
        >>> from alm_torchrl.bounds import random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> agent = random_agent(4, 3, 5, 2, generator=generator)
        >>> model_rollout(mdp, agent, 6).shape
        torch.Size([4, 7, 3, 5])
    """
    check_horizon(horizon)
    check_pair(mdp, agent)
    joint = [mdp.initial[..., None] * agent.encoder]
    for _ in range(horizon):
        ahead = einsum(
            "...sz,...za,...sap->...zap", joint[-1], agent.policy, mdp.kernel
        )
        joint.append(einsum("...zap,...zaw->...pw", ahead, agent.model))
    return torch.stack(joint, -3)
