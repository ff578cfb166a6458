"""The bound for data that another policy collected (A.7)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from alm_torchrl.bounds.exact import expectation, kl_table, model_rollout, q_values
from alm_torchrl.bounds.objective import bound_parts
from alm_torchrl.bounds.problem import FiniteMDP, LatentAgent

__all__ = ["OfflineForm", "cloning_terms", "offline_bound"]

OfflineForm = Literal["amended", "printed"]


def cloning_terms(
    mdp: FiniteMDP, agent: LatentAgent, behaviour: Tensor, horizon: int
) -> Tensor:
    """The behaviour-cloning term of each action (A.7), as a divergence.

    ``E_q[KL(pi(.|z_t) || pi_b(.|s_t))]`` for ``t = 0..K``: what the paper adds is the
    mean of ``log pi_b(a_t|s_t) - log pi(a_t|z_t)``, which is minus this.

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): encoder, model and policy.
        behaviour (Tensor): ``pi_b(a|s)``, ``[*, S, A]``.
        horizon (int): ``K >= 1``.

    Returns:
        Tensor: nats, ``[*, K + 1]``, not negative; entry 0 is the first action.

    Raises:
        ValueError: if ``horizon`` is below 1, or ``agent`` does not fit ``mdp``.

    Examples:
        >>> import torch
        >>> from alm_torchrl.bounds import random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> agent = random_agent(4, 3, 1, 2, generator=generator)  # a single latent
        >>> cloning_terms(mdp, agent, agent.state_policy, 3).abs().max() < 1e-12
        tensor(True)
    """
    joint = model_rollout(mdp, agent, horizon)
    table = kl_table(agent.policy, behaviour).mT
    return expectation("...tsz,...sz->...t", joint, table)


def offline_bound(
    mdp: FiniteMDP,
    agent: LatentAgent,
    behaviour: Tensor,
    horizon: int,
    *,
    form: OfflineForm = "amended",
) -> Tensor:
    """A lower bound on the log return of the behaviour policy (A.7).

    With ``Q_b`` the behaviour's values, ``KL_t`` as in :func:`lower_bound` and ``BC_t``
    those of :func:`cloning_terms`, the two forms are

    - amended: ``sum_{t<K} (gamma^t (1 - gamma) E_q[log r] - gamma^(t+1) KL_t)
      - sum_{t<=K} gamma^t BC_t + gamma^K E_q[log Q_b]``;
    - printed: ``sum_{t<K} gamma^t ((1 - gamma) E_q[log r] - KL_t - BC_{t+1})
      + gamma^K E_q[log Q_b]``.

    Under ``p_b`` the first action comes from ``pi_b(a_0|s_0)``, under ``q`` from
    ``pi(a_0|z_0)``. Their ratio is in every ``log p_b(tau|H) / q(tau|H)``, so that
    ``BC_0`` has weight 1. The printed form leaves it out and is **not** a lower bound.
    The action ``a_t`` is part of the trajectory when ``H >= t``: weight ``gamma^t``.

    What is bounded is ``E_{p_b}``, the return of the behaviour. It does not depend on
    the agent, and the bound may exceed the return of the agent's own policy.

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): encoder, model and policy.
        behaviour (Tensor): ``pi_b(a|s)``, ``[*, S, A]``.
        horizon (int): ``K >= 1``.

    Keyword Args:
        form (str): ``"amended"`` or ``"printed"``. Default: ``"amended"``.

    Returns:
        Tensor: nats, ``[*]``.

    Raises:
        ValueError: if ``form`` is another, if ``horizon`` is below 1, or if ``agent``
            does not fit ``mdp``.

    Examples:
        >>> import torch
        >>> from alm_torchrl.bounds import (
        ...     expected_return,
        ...     random_agent,
        ...     random_mdp,
        ...     random_policy,
        ... )
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(1000, 3, 2, generator=generator, gamma=0.1)
        >>> agent = random_agent(1000, 3, 2, 2, generator=generator)
        >>> behaviour = random_policy(1000, 3, 2, generator=generator)
        >>> truth = expected_return(mdp, behaviour).log()
        >>> bool((offline_bound(mdp, agent, behaviour, 3) <= truth).all())
        True
        >>> printed = offline_bound(mdp, agent, behaviour, 3, form="printed")
        >>> bool((printed <= truth).all())
        False
    """
    if form not in ("amended", "printed"):
        raise ValueError(f"form should be 'amended' or 'printed', got {form!r}.")
    parts = bound_parts(mdp, agent, horizon, qvalue=q_values(mdp, behaviour))
    cloning = cloning_terms(mdp, agent, behaviour, horizon)
    discounts = parts.discounts
    if form == "printed":
        cost = expectation("...t,...t->...", discounts[..., :-1], cloning[..., 1:])
        return parts.bounds("printed")[..., -1] - cost
    cost = expectation("...t,...t->...", discounts, cloning)
    return parts.bounds("tight")[..., -1] - cost
