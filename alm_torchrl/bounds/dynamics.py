"""The optimal trajectory distribution, with which the bound is tight (A.4, A.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, einsum

from alm_torchrl.bounds.discounts import discount_bound, optimal_discount, payoffs
from alm_torchrl.bounds.exact import expectation, q_values
from alm_torchrl.bounds.problem import (
    FiniteMDP,
    LatentAgent,
    check_horizon,
    check_pair,
)

__all__ = [
    "OptimalDynamics",
    "dynamics_bound",
    "optimal_dynamics",
    "tightened_bound",
]


@dataclass(frozen=True, eq=False)
class OptimalDynamics:
    """``q*(tau|H)`` (A.4) as a Markov chain whose steps depend on the time left.

    ``q*(tau|H) = p(tau|H) psi_H / E_p[psi_H]``. Over ``(s, z, a)`` this factorises:
    step ``t`` of ``p`` is reweighted by the expected payoff that it leads to.

    Args:
        initial (Tensor): ``q*(s_0)``, ``[*, S]``.
        choice (Tensor): ``q*(z_t, a_t|s_t)`` for ``t = 0..H``, ``[*, H + 1, S, Z, A]``.
        kernel (Tensor): ``q*(s_{t+1}|s_t, a_t)`` for ``t < H``, ``[*, H, S, A, S]``.

    Examples:
        >>> from alm_torchrl.bounds import random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(1, 3, 2, generator=generator)
        >>> agent = random_agent(1, 3, 5, 2, generator=generator)
        >>> found = optimal_dynamics(mdp, agent, horizon=2, stop=1)
        >>> round(found.initial.sum().item(), 6)
        1.0
    """

    initial: Tensor
    choice: Tensor
    kernel: Tensor


def optimal_dynamics(
    mdp: FiniteMDP, agent: LatentAgent, horizon: int, stop: int
) -> OptimalDynamics:
    """The trajectory distribution that makes the term of ``H`` tight (A.4, step d).

    The paper gives it for ``H >= 1``; the bound is tight only if ``H = 0`` has it too,
    where it reweights ``s_0, z_0, a_0``. It changes ``p_0``, the kernel, the encoder
    and the policy and is not of the form of Eq. 4: no latent model attains it.

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): encoder and policy; the model plays no part.
        horizon (int): ``K >= 1``.
        stop (int): ``H`` in ``0..K``. The payoff is ``r`` for ``H < K`` and ``Q`` for
            ``H = K``.

    Returns:
        OptimalDynamics: tables for ``t = 0..H``.

    Raises:
        ValueError: if ``horizon`` is below 1, ``stop`` is not in ``0..K``, or ``agent``
            does not fit ``mdp``.

    Examples:
        >>> from alm_torchrl.bounds import payoffs, random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> agent = random_agent(4, 3, 5, 2, generator=generator)
        >>> chain = optimal_dynamics(mdp, agent, horizon=3, stop=2)
        >>> chain.choice.shape, chain.kernel.shape
        (torch.Size([4, 3, 3, 5, 2]), torch.Size([4, 2, 3, 2, 3]))
        >>> best = payoffs(mdp, agent, 3)[:, 2].log()
        >>> dynamics_bound(mdp, agent, 3, chain).allclose(best)
        True
    """
    beta = _payoff(mdp, agent, horizon, stop)
    joint = agent.encoder[..., None] * agent.policy[..., None, :, :]
    choices, kernels = [], []
    for step in range(stop, -1, -1):
        value = (joint * beta[..., None, :]).sum((-2, -1))
        choices.append(joint * (beta / value[..., None])[..., None, :])
        if step:
            arrival = mdp.kernel * value[..., None, None, :]
            beta = arrival.sum(-1)
            kernels.append(arrival / beta[..., None])
    start = mdp.initial * value
    return OptimalDynamics(
        initial=start / start.sum(-1, keepdim=True),
        choice=torch.stack(choices[::-1], -4),
        kernel=torch.stack(kernels[::-1], -4)
        if kernels
        else mdp.kernel.unsqueeze(-4)[..., :0, :, :, :],
    )


def dynamics_bound(
    mdp: FiniteMDP, agent: LatentAgent, horizon: int, dynamics: OptimalDynamics
) -> Tensor:
    """``E_d log[p(tau|H) psi_H / d(tau|H)]`` of trajectory tables ``d`` (A.4, step c).

    Evaluated by going through the tables step by step, whatever they hold. ``H`` is how
    many steps they have.

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): encoder and policy; the model plays no part.
        horizon (int): ``K >= 1``.
        dynamics (OptimalDynamics): distributions for ``t = 0..H``, ``H <= K``.

    Returns:
        Tensor: nats, ``[*]``; at most ``log E_p[psi_H]``, and equal to it for
        :func:`optimal_dynamics`.

    Raises:
        ValueError: if ``horizon`` is below 1, ``dynamics`` is longer, or ``agent`` does
            not fit ``mdp``.

    Examples:
        The real trajectories are not optimal ones:

        >>> from alm_torchrl.bounds import random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> agent = random_agent(4, 3, 2, 2, generator=generator)
        >>> real = agent.encoder[..., None] * agent.policy[..., None, :, :]
        >>> real = OptimalDynamics(mdp.initial, real[:, None], mdp.kernel[:, :0])
        >>> best = payoffs(mdp, agent, 3)[:, 0].log()
        >>> bool((dynamics_bound(mdp, agent, 3, real) < best).all())
        True
    """
    stop = dynamics.choice.shape[-4] - 1
    payoff = _payoff(mdp, agent, horizon, stop)
    joint = (agent.encoder[..., None] * agent.policy[..., None, :, :]).flatten(-2)
    state = dynamics.initial
    total = -_divergence(dynamics.initial, mdp.initial)
    for step in range(stop + 1):
        choice = dynamics.choice[..., step, :, :, :]
        total = total - expectation(
            "...s,...s->...", state, _divergence(choice.flatten(-2), joint)
        )
        visits = state[..., None] * choice.sum(-2)
        if step < stop:
            kernel = dynamics.kernel[..., step, :, :, :]
            total = total - expectation(
                "...sa,...sa->...", visits, _divergence(kernel, mdp.kernel)
            )
            state = einsum("...sa,...sap->...p", visits, kernel)
    return total + (visits * payoff.log()).sum((-2, -1))


def tightened_bound(mdp: FiniteMDP, agent: LatentAgent, horizon: int) -> Tensor:
    """The bound at the optimal discount and the optimal dynamics (A.5).

    It equals the log return, whatever ``K``: A.5's claim, computed without using it.

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): encoder and policy; the model plays no part.
        horizon (int): ``K >= 1``.

    Returns:
        Tensor: nats, ``[*]``.

    Raises:
        ValueError: if ``horizon`` is below 1, or ``agent`` does not fit ``mdp``.

    Examples:
        >>> from alm_torchrl.bounds import expected_return, random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> agent = random_agent(4, 3, 2, 2, generator=generator)
        >>> truth = expected_return(mdp, agent.state_policy).log()
        >>> tightened_bound(mdp, agent, 5).allclose(truth)
        True
    """
    discount = optimal_discount(payoffs(mdp, agent, horizon).log(), mdp.gamma)
    terms = []
    for stop in range(horizon + 1):
        dynamics = optimal_dynamics(mdp, agent, horizon, stop)
        terms.append(dynamics_bound(mdp, agent, horizon, dynamics))
    return discount_bound(torch.stack(terms, -1), mdp.gamma, discount)


def _payoff(mdp: FiniteMDP, agent: LatentAgent, horizon: int, stop: int) -> Tensor:
    """``psi`` of the trajectories that end at ``stop``, ``[*, S, A]``."""
    check_horizon(horizon)
    check_pair(mdp, agent)
    if not 0 <= stop <= horizon:
        raise ValueError(f"stop should lie in 0..{horizon}, got {stop}.")
    return mdp.reward if stop < horizon else q_values(mdp, agent.state_policy)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """``KL(p || q)`` over the last dimension."""
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)
