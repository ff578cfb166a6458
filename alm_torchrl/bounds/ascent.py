"""Gradient ascent on the bound over encoder, model and policy together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alm_torchrl.bounds.exact import expected_return, optimal_return
from alm_torchrl.bounds.objective import KLWeight, lower_bound
from alm_torchrl.bounds.problem import FiniteMDP, LatentAgent

__all__ = ["Ascent", "ascend"]


@dataclass(frozen=True, eq=False)
class Ascent:
    """What :func:`ascend` did, in nats of the normalised return.

    Args:
        agent (LatentAgent): where it ended.
        bound (Tensor): ``L^K`` before each step and after the last, ``[*, N + 1]``.
        log_return (Tensor): logarithm of the agent's return, ``[*, N + 1]``.
        log_optimum (Tensor): logarithm of the best return of any policy, ``[*]``.

    Examples:
        >>> from alm_torchrl.bounds import random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(1, 2, 2, generator=generator)
        >>> agent = random_agent(1, 2, 2, 2, generator=generator)
        >>> way = ascend(mdp, agent, 1, steps=3)
        >>> way.bound.shape, bool(way.efficiency <= 1)
        (torch.Size([1, 4]), True)
    """

    agent: LatentAgent
    bound: Tensor
    log_return: Tensor
    log_optimum: Tensor

    @property
    def efficiency(self) -> Tensor:
        """Return reached, as a fraction of the optimal one, ``[*]``."""
        return (self.log_return[..., -1] - self.log_optimum).exp()


def ascend(
    mdp: FiniteMDP,
    agent: LatentAgent,
    horizon: int,
    *,
    steps: int,
    lr: float = 0.1,
    kl_weight: KLWeight = "printed",
) -> Ascent:
    """Climbs the exact bound ``L^K`` by Adam on the logits of all three tables.

    The gradient is the whole one, through ``Q`` as well. Problems of a batch do not
    influence each other.

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): where to start; every probability positive.
        horizon (int): ``K >= 1``.

    Keyword Args:
        steps (int): number of updates ``N``.
        lr (float): Adam's learning rate. Default: ``0.1``.
        kl_weight (str): see :func:`lower_bound`. Default: ``"printed"``.

    Returns:
        Ascent: the final agent and the way there.

    Raises:
        ValueError: if a probability of ``agent`` is zero, if ``horizon`` is below 1, or
            if ``agent`` does not fit ``mdp``.

    Examples:
        >>> from alm_torchrl.bounds import random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> agent = random_agent(4, 3, 3, 2, generator=generator)
        >>> result = ascend(mdp, agent, 1, steps=50)
        >>> bool((result.bound[:, -1] > result.bound[:, 0]).all())
        True
        >>> bool((result.bound <= result.log_return).all())
        True
    """
    tables = (agent.encoder, agent.model, agent.policy)
    if not all(bool((table > 0).all()) for table in tables):
        raise ValueError(
            "agent should start with positive probabilities only: a zero has no logit."
        )
    logits = [table.detach().log().requires_grad_() for table in tables]
    optimizer = torch.optim.Adam(logits, lr=lr)
    bounds, returns = [], []
    for step in range(steps + 1):
        current = LatentAgent(*(table.softmax(-1) for table in logits))
        bound = lower_bound(mdp, current, horizon, kl_weight=kl_weight)
        bounds.append(bound.detach())
        with torch.no_grad():
            returns.append(expected_return(mdp, current.state_policy).log())
        if step < steps:
            optimizer.zero_grad()
            (-bound.sum()).backward()
            optimizer.step()
    return Ascent(
        agent=LatentAgent(*(table.softmax(-1).detach() for table in logits)),
        bound=torch.stack(bounds, -1),
        log_return=torch.stack(returns, -1),
        log_optimum=optimal_return(mdp).log(),
    )
