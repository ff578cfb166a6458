"""The lower bound on the return (Theorem 3.1), its parts and its lambda average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, einsum

from alm_torchrl.bounds.exact import (
    Discounted,
    expectation,
    latent_kl,
    model_rollout,
    q_values,
    weighted,
)
from alm_torchrl.bounds.problem import FiniteMDP, LatentAgent, check_pair

__all__ = ["BoundParts", "KLWeight", "bound_parts", "lambda_bound", "lower_bound"]

KLWeight = Literal["printed", "tight"]


@dataclass(frozen=True, eq=False)
class BoundParts:
    """Expectations under ``q^K`` that the bound consists of, step by step.

    Args:
        gamma (Tensor): discount, ``[*]``.
        log_reward (Tensor): ``E_q[log r(s_t, a_t)]`` for ``t < K``, ``[*, K]``: the
            extrinsic term of Eq. 6 without its factor ``1 - gamma``.
        kl (Tensor): ``E_q[KL(m(.|z_t, a_t) || e(.|s_{t+1}))]`` for ``t < K``,
            ``[*, K]``, in nats: the intrinsic term of Eq. 6 with its sign changed.
        log_value (Tensor): ``E_q[log Q(s_t, a_t)]`` for ``t = 0..K``, ``[*, K + 1]``.

    Examples:
        >>> from alm_torchrl.bounds import random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> agent = random_agent(4, 3, 2, 2, generator=generator)
        >>> parts = bound_parts(mdp, agent, 5)
        >>> parts.extrinsic.shape, parts.intrinsic().shape, parts.bounds().shape
        (torch.Size([4, 5]), torch.Size([4, 5]), torch.Size([4, 6]))
    """

    gamma: Tensor
    log_reward: Tensor
    kl: Tensor
    log_value: Tensor

    @property
    def discounts(self) -> Tensor:
        """``gamma^t`` for ``t = 0..K``, ``[*, K + 1]``."""
        steps = torch.arange(self.log_value.shape[-1], device=self.gamma.device)
        return self.gamma[..., None].pow(steps)

    @property
    def extrinsic(self) -> Tensor:
        """``gamma^t (1 - gamma) E_q[log r]`` for ``t < K``, ``[*, K]``."""
        rate = (1 - self.gamma)[..., None]
        return self.discounts[..., :-1] * rate * self.log_reward

    def intrinsic(self, kl_weight: KLWeight = "printed") -> Tensor:
        """The KL of each step with its weight, negative, ``[*, K]``.

        Args:
            kl_weight (str): ``"printed"`` for ``gamma^t``, ``"tight"`` for
                ``gamma^(t+1)``. Default: ``"printed"``.
        """
        weight = (
            self.discounts[..., :-1] * _step_weight(self.gamma, kl_weight)[..., None]
        )
        return -weighted(weight, self.kl)

    def bounds(self, kl_weight: KLWeight = "printed") -> Tensor:
        """``L^0 .. L^K`` (Eq. 5), ``[*, K + 1]``; ``L^0 = E[log Q(s_0, a_0)]``.

        Args:
            kl_weight (str): see :meth:`intrinsic`. Default: ``"printed"``.
        """
        steps = (self.extrinsic + self.intrinsic(kl_weight)).cumsum(-1)
        sums = torch.cat([torch.zeros_like(steps[..., :1]), steps], -1)
        return sums + self.discounts * self.log_value


def bound_parts(
    mdp: FiniteMDP,
    agent: LatentAgent,
    horizon: int,
    *,
    qvalue: Tensor | None = None,
) -> BoundParts:
    """The expectations that every form of the bound is made of.

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): encoder, model and policy.
        horizon (int): ``K >= 1``.

    Keyword Args:
        qvalue (Tensor, optional): positive ``Q(s, a)``, ``[*, S, A]``.
            Default: ``None``, the agent's own values, :func:`q_values`.

    Returns:
        BoundParts: for the horizons ``0..K``.

    Raises:
        ValueError: if ``horizon`` is below 1, or ``agent`` does not fit ``mdp``.

    Examples:
        The KL is zero for a model that predicts what the encoder says:

        >>> from alm_torchrl.bounds import LatentAgent, random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> agent = random_agent(4, 3, 1, 2, generator=generator)  # a single latent
        >>> bool((bound_parts(mdp, agent, 5).kl == 0).all())
        True
    """
    joint = model_rollout(mdp, agent, horizon)
    if qvalue is None:
        qvalue = q_values(mdp, agent.state_policy)
    visits = einsum("...tsz,...za->...tsa", joint, agent.policy)
    ahead = einsum(
        "...tsz,...za,...sap->...tzap", joint[..., :-1, :, :], agent.policy, mdp.kernel
    )
    return BoundParts(
        gamma=mdp.gamma,
        log_reward=einsum(
            "...tsa,...sa->...t", visits[..., :-1, :, :], mdp.reward.log()
        ),
        kl=expectation(
            "...tzap,...zap->...t", ahead, latent_kl(agent.model, agent.encoder)
        ),
        log_value=einsum("...tsa,...sa->...t", visits, qvalue.log()),
    )


def lower_bound(
    mdp: FiniteMDP,
    agent: LatentAgent,
    horizon: int,
    *,
    kl_weight: KLWeight = "printed",
) -> Tensor:
    r"""The bound ``L^K`` of Theorem 3.1 (Eq. 5, 6), or a tighter one at the same cost.

    ``L^K <= log E_p[(1 - gamma) sum_t gamma^t r]``, with

    ``L^K = sum_{t<K} (gamma^t (1 - gamma) E_q[log r(s_t, a_t)] - w_t KL_t)
    + gamma^K E_q[log Q(s_K, a_K)]``

    where ``KL_t = E_q[KL(m(.|z_t, a_t) || e(.|s_{t+1}))] >= 0``. The paper prints
    ``w_t = gamma^t``; ``w_t = gamma^(t+1)`` bounds the return as well and is larger by
    ``(1 - gamma) sum_{t<K} gamma^t KL_t``: strictly, unless every KL is zero.
    For random agents in random problems that is about ``1 - gamma`` of the gap between
    the bound and the return (``tutorials/theory.py``).

    **Proof.** Let ``H`` be ``t < K`` with probability ``(1 - gamma) gamma^t`` and ``K``
    with ``gamma^K``, and ``psi_H`` be ``r(s_H, a_H)`` for ``H < K`` and
    ``Q(s_K, a_K)`` for ``H = K``. By Lemma A.2 the return is
    ``E_H E_{p(tau|H)}[psi_H]``, where ``tau`` is ``s_0, z_0, a_0 .. s_H, z_H, a_H``.
    Jensen's inequality, over ``H`` and then over ``q(tau|H)``, gives

    ``log E_H E_p[psi_H] >= E_H E_q[log (p(tau|H) / q(tau|H)) + log psi_H]``.

    ``p`` and ``q`` share ``p_0``, the kernel, the policy and, for ``z_0``, the encoder.
    They differ in ``z_1 .. z_H``: ``p`` draws ``z_{t+1} ~ e(s_{t+1})`` and ``q`` draws
    ``z_{t+1} ~ m(z_t, a_t)``. The log ratio is therefore a sum of ``H`` terms,
    ``x_t = log e(z_{t+1}|s_{t+1}) - log m(z_{t+1}|z_t, a_t)`` for ``t = 0 .. H - 1``.
    Term ``t`` is present when ``H >= t + 1``, which has probability ``gamma^(t+1)``;
    given ``s_{t+1}, z_t, a_t`` its mean is minus the KL. Hence
    ``w_t = gamma^(t+1)``. The paper's step (f) lets the sum run to ``t = H``, one term
    too many, which gives term ``t`` the weight ``gamma^t``. As the KL is not negative,
    the bound so printed is a bound too, and the looser one. QED

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): encoder, model and policy.
        horizon (int): ``K >= 1``.

    Keyword Args:
        kl_weight (str): ``"printed"`` for ``gamma^t``, ``"tight"`` for
            ``gamma^(t+1)``. Default: ``"printed"``.

    Returns:
        Tensor: nats, ``[*]``; minus infinity where the encoder misses support of the
        model. Differentiable where every probability is positive.

    Raises:
        ValueError: if ``horizon`` is below 1, or ``agent`` does not fit ``mdp``.

    Examples:
        >>> from alm_torchrl.bounds import expected_return, random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(1000, 4, 2, generator=generator)
        >>> agent = random_agent(1000, 4, 3, 2, generator=generator)
        >>> printed = lower_bound(mdp, agent, 3)
        >>> tight = lower_bound(mdp, agent, 3, kl_weight="tight")
        >>> truth = expected_return(mdp, agent.state_policy).log()
        >>> bool((printed < tight).all()), bool((tight < truth).all())
        (True, True)
    """
    return bound_parts(mdp, agent, horizon).bounds(kl_weight)[..., -1]


def lambda_bound(
    mdp: FiniteMDP,
    agent: LatentAgent,
    lmbda: float,
    *,
    horizon: int | None = None,
    kl_weight: KLWeight = "printed",
) -> Tensor:
    """Lambda-weighted average of the bounds of all horizons (Lemma A.4).

    ``sum_k (1 - lmbda) lmbda^(k-1) L^k``, over ``k = 1, 2, ..`` by a linear solve or,
    with a ``horizon``, over ``k = 1 .. K``, ``L^K`` then taking all that is left,
    ``lmbda^(K-1)``. As an average of lower bounds it is one.

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): encoder, model and policy.
        lmbda (float): in ``[0, 1]``; 0 is ``L^1``, 1 the longest horizon alone.

    Keyword Args:
        horizon (int, optional): ``K >= 1``. Default: ``None``, no cut.
        kl_weight (str): see :func:`lower_bound`. Default: ``"printed"``.

    Returns:
        Tensor: nats, ``[*]``.

    Raises:
        ValueError: if ``lmbda`` leaves ``[0, 1]``, if ``horizon`` is below 1, or if
            ``agent`` does not fit ``mdp``.

    Examples:
        >>> from alm_torchrl.bounds import random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator, gamma=0.5)
        >>> agent = random_agent(4, 3, 2, 2, generator=generator)
        >>> cut = lambda_bound(mdp, agent, 0.95, horizon=60)
        >>> cut.allclose(lambda_bound(mdp, agent, 0.95))
        True
    """
    if not 0 <= lmbda <= 1:
        raise ValueError(f"lmbda should lie in [0, 1], got {lmbda}.")
    if horizon is None:
        return _endless_lambda_bound(mdp, agent, lmbda, kl_weight)
    bounds = bound_parts(mdp, agent, horizon).bounds(kl_weight)[..., 1:]
    weight = lmbda ** torch.arange(horizon).to(bounds)
    weight[:-1] *= 1 - lmbda
    return weighted(weight, bounds).sum(-1)


def _endless_lambda_bound(
    mdp: FiniteMDP, agent: LatentAgent, lmbda: float, kl_weight: KLWeight
) -> Tensor:
    """All horizons at once, by the discounted occupancy of ``(s_t, z_t)``.

    ``sum_t (lmbda gamma)^t E_q[(1 - gamma) log r - w KL + (1 - lmbda) gamma log Q']``:
    step ``t`` counts for all horizons above ``t``, whose weights add up to ``lmbda^t``.
    """
    check_pair(mdp, agent)
    pairs = (mdp.states, agent.latents)
    step = einsum("...za,...sap,...zaw->...szpw", agent.policy, mdp.kernel, agent.model)
    step = step.flatten(-2).flatten(-3, -2)
    start = (mdp.initial[..., None] * agent.encoder).flatten(-2)
    visits = Discounted(step, lmbda * mdp.gamma).occupancy(start)
    # Rounding must not turn a pair that is never met into one that is.
    met = start > 0
    for _ in range(pairs[0] * pairs[1] if lmbda > 0 else 0):
        met = met | ((met.to(step)[..., None, :] @ step)[..., 0, :] > 0)
    joint = visits.where(met, 0).unflatten(-1, pairs)

    log_q = q_values(mdp, agent.state_policy).log()
    log_value = einsum("...za,...sa->...sz", agent.policy, log_q)
    following = (step @ log_value.flatten(-2)[..., None])[..., 0].unflatten(-1, pairs)
    log_reward = einsum("...za,...sa->...sz", agent.policy, mdp.reward.log())
    rate, gamma = (1 - mdp.gamma)[..., None, None], mdp.gamma[..., None, None]
    payoff = rate * log_reward + (1 - lmbda) * gamma * following
    ahead = einsum("...sz,...za,...sap->...zap", joint, agent.policy, mdp.kernel)
    kl = expectation("...zap,...zap->...", ahead, latent_kl(agent.model, agent.encoder))
    weight = _step_weight(mdp.gamma, kl_weight)
    return (joint * payoff).sum((-2, -1)) - weighted(weight, kl)


def _step_weight(gamma: Tensor, kl_weight: KLWeight) -> Tensor:
    """What multiplies the KL of step ``t`` besides ``gamma^t``."""
    if kl_weight not in ("printed", "tight"):
        raise ValueError(
            f"kl_weight should be 'printed' or 'tight', got {kl_weight!r}."
        )
    return torch.ones_like(gamma) if kl_weight == "printed" else gamma
