"""How far each approximation of the practical algorithm is from the return."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, einsum

from alm_torchrl.bounds.exact import (
    expectation,
    expected_return,
    latent_kl,
    model_rollout,
    q_values,
    weighted,
)
from alm_torchrl.bounds.practice import (
    classifier_log_ratio,
    latent_q_values,
    latent_reward,
    practical_estimate,
)
from alm_torchrl.bounds.problem import FiniteMDP, LatentAgent

__all__ = [
    "approximation_gaps",
    "excess_limit",
    "surrogate_bound",
]


def surrogate_bound(
    mdp: FiniteMDP,
    agent: LatentAgent,
    horizon: int,
    *,
    logs: bool = True,
    kl_coef: Tensor | float = 1.0,
    target_encoder: Tensor | None = None,
    log_ratio: Tensor | None = None,
    reward: Tensor | None = None,
    qvalue: Tensor | None = None,
) -> Tensor:
    """``L^K`` as printed, with any of its ingredients replaced; normalised.

    ``sum_{t<K} gamma^t ((1 - gamma) f(r_t) + c x_t) + gamma^K f(Q_K)`` under ``q`` of
    Eq. 4, with the defaults ``f = log``, ``c = 1``, ``x_t = log e(z_{t+1}|s_{t+1}) -
    log m(z_{t+1}|z_t, a_t)`` and ``r``, ``Q`` of the state. Theorem 3.1 speaks of the
    defaults only.

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): encoder, model and policy.
        horizon (int): ``K >= 1``.

    Keyword Args:
        logs (bool): ``False`` for ``f(x) = x``. Default: ``True``.
        kl_coef (Tensor or float): ``c``, one number or ``[*]``. Default: ``1.0``.
        target_encoder (Tensor, optional): takes the place of ``e`` in ``x_t`` (not in
            ``z_0 ~ e``), ``[*, S, Z]``. Default: ``None``.
        log_ratio (Tensor, optional): takes the place of ``x_t``, indexed
            ``[z, a, z']``, ``[*, Z, A, Z]``. Default: ``None``.
        reward (Tensor, optional): ``r(z, a)``, ``[*, Z, A]``. Default: ``None``.
        qvalue (Tensor, optional): normalised ``Q(z, a)``, ``[*, Z, A]``.
            Default: ``None``.

    Returns:
        Tensor: ``[*]``, in nats or, without logs, in units of the normalised return.

    Raises:
        ValueError: if both ``target_encoder`` and ``log_ratio`` are given, if
            ``horizon`` is below 1, or if ``agent`` does not fit ``mdp``.

    Examples:
        >>> from alm_torchrl.bounds import lower_bound, random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> agent = random_agent(4, 3, 2, 2, generator=generator)
        >>> surrogate_bound(mdp, agent, 3).allclose(lower_bound(mdp, agent, 3))
        True
    """
    if target_encoder is not None and log_ratio is not None:
        raise ValueError(
            "target_encoder and log_ratio should not both be given: each takes the "
            "place of the same term."
        )
    joint = model_rollout(mdp, agent, horizon)
    by_state = einsum("...tsz,...za->...tsa", joint, agent.policy)
    by_latent = joint.sum(-2)[..., None] * agent.policy[..., None, :, :]

    def mean(table: Tensor | None, default: Tensor) -> Tensor:
        """``E_q[f]`` at each step, of a table over latents or, without, over states."""
        visits = by_state if table is None else by_latent
        value = default if table is None else table
        value = value.log() if logs else value
        return (visits * value[..., None, :, :]).sum((-2, -1))

    if log_ratio is None:
        encoder = agent.encoder if target_encoder is None else target_encoder
        ahead = einsum("...tsz,...za,...sap->...tzap", joint, agent.policy, mdp.kernel)
        kl = expectation("...tzap,...zap->...t", ahead, latent_kl(agent.model, encoder))
    else:
        ratio = weighted(agent.model, log_ratio).sum(-1)
        kl = -weighted(by_latent, ratio[..., None, :, :]).sum((-2, -1))
    steps = torch.arange(horizon + 1, device=mdp.gamma.device)
    discounts = mdp.gamma[..., None].pow(steps)
    coef = torch.as_tensor(kl_coef, dtype=discounts.dtype, device=discounts.device)
    extrinsic = (1 - mdp.gamma)[..., None] * mean(reward, mdp.reward)
    total = discounts * extrinsic - weighted(discounts * coef[..., None], kl)
    value = mean(qvalue, q_values(mdp, agent.state_policy))
    return total[..., :-1].sum(-1) + (discounts * value)[..., -1]


def approximation_gaps(
    mdp: FiniteMDP,
    agent: LatentAgent,
    horizon: int,
    *,
    data: Tensor,
    target_encoder: Tensor,
    classifier_coef: float = 0.1,
) -> dict[str, Tensor]:
    """The relative error of the return's estimate, one approximation at a time.

    An estimate is ``exp`` of :func:`surrogate_bound` or, without logs, the surrogate
    itself; the error is ``estimate / return - 1``. The bound's own is not positive; a
    positive one means that the estimate is no lower bound here.

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): encoder, model and policy.
        horizon (int): ``K >= 1``.

    Keyword Args:
        data (Tensor): distribution over ``(s, a)`` that rewards, values and the
            classifier are learned from, ``[*, S, A]``.
        target_encoder (Tensor): ``e'(z|s)``, ``[*, S, Z]``.
        classifier_coef (float): ``c``. Default: ``0.1``.

    Returns:
        dict[str, Tensor]: errors ``[*]``, by name. ``exact`` is the bound; ``no logs``,
        ``coefficient``, ``target encoder``, ``classifier``, ``learned reward`` and
        ``learned Q`` replace one thing each. ``in practice`` is
        :func:`practical_estimate` of all of them, whose rewards are not normalised: in
        the units of the others its coefficient is ``c (1 - gamma)``.

    Raises:
        ValueError: if ``horizon`` is below 1, if ``agent`` does not fit ``mdp``, or if
            a pair ``(z, a)`` never occurs in the data.

    Examples:
        >>> from alm_torchrl.bounds import discounted_visits, random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> agent = random_agent(4, 3, 2, 2, generator=generator)
        >>> data = discounted_visits(mdp, agent.state_policy)
        >>> gaps = approximation_gaps(
        ...     mdp, agent, 3, data=data, target_encoder=agent.encoder
        ... )
        >>> bool((gaps["exact"] <= 0).all())
        True
    """
    truth = expected_return(mdp, agent.state_policy)
    reward = latent_reward(mdp, agent.encoder, data)
    qvalue = latent_q_values(mdp, agent.encoder, agent.policy, data)
    ratio = classifier_log_ratio(mdp, agent, data)

    target = replace(agent, encoder=target_encoder)
    unit = (1 - mdp.gamma)[..., None, None]
    practical = practical_estimate(
        agent.model,
        agent.policy,
        latent_reward(mdp, target_encoder, data),
        latent_q_values(mdp, target_encoder, agent.policy, data) / unit,
        classifier_log_ratio(mdp, target, data),
        mdp.gamma,
        horizon,
        classifier_coef=classifier_coef,
    )
    start = einsum("...s,...sz->...z", mdp.initial, target_encoder)[..., None]
    estimates = {
        "exact": surrogate_bound(mdp, agent, horizon).exp(),
        "no logs": surrogate_bound(mdp, agent, horizon, logs=False),
        "coefficient": surrogate_bound(
            mdp, agent, horizon, kl_coef=classifier_coef
        ).exp(),
        "target encoder": surrogate_bound(
            mdp, agent, horizon, target_encoder=target_encoder
        ).exp(),
        "classifier": surrogate_bound(mdp, agent, horizon, log_ratio=ratio).exp(),
        "learned reward": surrogate_bound(mdp, agent, horizon, reward=reward).exp(),
        "learned Q": surrogate_bound(mdp, agent, horizon, qvalue=qvalue).exp(),
        "in practice": (unit * start * agent.policy * practical).sum((-2, -1)),
    }
    return {name: estimate / truth - 1 for name, estimate in estimates.items()}


def excess_limit(mdp: FiniteMDP, kl_coef: Tensor | float) -> Tensor:
    r"""How far the surrogate without logs can exceed the return, at most.

    ``surrogate_bound(logs=False, kl_coef=c) <= E_p[R] + (max r - min r)^2 / (8 c)``.

    **Proof.** For each ``H``, ``E_q[psi] - c KL(q || p) <= c log E_p[exp(psi / c)]``
    (Donsker and Varadhan), which is at most ``E_p[psi] + (max - min)^2 / (8 c)``
    (Hoeffding's lemma); ``psi``, a reward or a normalised value, lies between the
    smallest and the largest reward. The mean over ``H`` gives the return (Lemma A.2)
    and, as in :func:`lower_bound`, the KL of step ``t`` the weight ``gamma^(t+1)``; the
    printed one only lowers the left side. QED

    Args:
        mdp (FiniteMDP): the problem.
        kl_coef (Tensor or float): ``c > 0`` in the normalised form; the algorithm's
            coefficient times ``1 - gamma``.

    Returns:
        Tensor: in units of the normalised return, ``[*]``.

    Examples:
        >>> from alm_torchrl.bounds import random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator, log10_reward=(0.0, 0.0))
        >>> excess_limit(mdp, 1.0)
        tensor([0., 0., 0., 0.], dtype=torch.float64)
    """
    span = mdp.reward.amax((-2, -1)) - mdp.reward.amin((-2, -1))
    return span.square() / (8 * kl_coef)
