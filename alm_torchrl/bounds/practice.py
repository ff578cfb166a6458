"""What the practical algorithm computes instead of the bound, exactly.

Rewards, values and divergences as functions of latents depend on the data that they
are learned from: a distribution ``data`` over ``(s, a)``, ``[*, S, A]``, with
``z ~ e(s)`` and ``s' ~ p(s, a)``. Each table here is the optimum of its loss on it.
"""

from __future__ import annotations

from torch import Tensor, einsum

from alm_torchrl.bounds.exact import Discounted, weighted
from alm_torchrl.bounds.problem import FiniteMDP, LatentAgent, check_horizon

__all__ = [
    "classifier_log_ratio",
    "latent_dynamics",
    "latent_q_values",
    "latent_reward",
    "practical_estimate",
]


def latent_reward(mdp: FiniteMDP, encoder: Tensor, data: Tensor) -> Tensor:
    """The reward model's optimum (Eq. 11): ``E[r(s, a) | z, a]`` over the data.

    Args:
        mdp (FiniteMDP): the problem.
        encoder (Tensor): ``e(z|s)``, ``[*, S, Z]``; the algorithm uses its target copy.
        data (Tensor): distribution over ``(s, a)``, ``[*, S, A]``.

    Returns:
        Tensor: not normalised, ``[*, Z, A]``.

    Raises:
        ValueError: if a pair ``(z, a)`` never occurs in the data.

    Examples:
        >>> import torch
        >>> from alm_torchrl.bounds import random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(1, 3, 2, generator=generator)
        >>> uniform = torch.full((1, 3, 2), 1 / 6, dtype=torch.float64)
        >>> tells_all = torch.eye(3, dtype=torch.float64)[None]
        >>> latent_reward(mdp, tells_all, uniform).allclose(mdp.reward)
        True
    """
    return einsum("...zas,...sa->...za", _posterior(encoder, data), mdp.reward)


def latent_dynamics(mdp: FiniteMDP, encoder: Tensor, data: Tensor) -> Tensor:
    """The encoder's next latent given this one: ``E[e(z'|s') | z, a]`` over the data.

    Args:
        mdp (FiniteMDP): the problem.
        encoder (Tensor): ``e(z|s)``, ``[*, S, Z]``.
        data (Tensor): distribution over ``(s, a)``, ``[*, S, A]``.

    Returns:
        Tensor: a distribution over ``z'``, ``[*, Z, A, Z]``.

    Raises:
        ValueError: if a pair ``(z, a)`` never occurs in the data.

    Examples:
        >>> import torch
        >>> from alm_torchrl.bounds import random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(1, 3, 2, generator=generator)
        >>> uniform = torch.full((1, 3, 2), 1 / 6, dtype=torch.float64)
        >>> tells_all = torch.eye(3, dtype=torch.float64)[None]
        >>> latent_dynamics(mdp, tells_all, uniform).allclose(mdp.kernel)
        True
    """
    posterior = _posterior(encoder, data)
    return einsum("...zas,...sap,...pw->...zaw", posterior, mdp.kernel, encoder)


def latent_q_values(
    mdp: FiniteMDP, encoder: Tensor, policy: Tensor, data: Tensor
) -> Tensor:
    """The critic's fixed point (Eq. 10) as a function of the latent, normalised.

    ``Q(z, a) = E[(1 - gamma) r(s, a) + gamma Q(z', a') | z, a]`` with ``z' ~ e(s')``
    and ``a' ~ pi(z')``. It bootstraps from latents, as if they were states. Divide it
    by ``1 - gamma`` for the critic of the algorithm.

    Args:
        mdp (FiniteMDP): the problem.
        encoder (Tensor): ``e(z|s)``, ``[*, S, Z]``; the algorithm uses its target copy.
        policy (Tensor): ``pi(a|z)``, ``[*, Z, A]``.
        data (Tensor): distribution over ``(s, a)``, ``[*, S, A]``.

    Returns:
        Tensor: ``[*, Z, A]``.

    Raises:
        ValueError: if a pair ``(z, a)`` never occurs in the data.

    Examples:
        >>> import torch
        >>> from alm_torchrl.bounds import q_values, random_mdp, random_policy
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(1, 3, 2, generator=generator)
        >>> policy = random_policy(1, 3, 2, generator=generator)
        >>> uniform = torch.full((1, 3, 2), 1 / 6, dtype=torch.float64)
        >>> tells_all = torch.eye(3, dtype=torch.float64)[None]
        >>> learned = latent_q_values(mdp, tells_all, policy, uniform)
        >>> learned.allclose(q_values(mdp, policy))
        True
    """
    reward = (1 - mdp.gamma)[..., None, None] * latent_reward(mdp, encoder, data)
    dynamics = latent_dynamics(mdp, encoder, data)
    step = einsum("...za,...zaw->...zw", policy, dynamics)
    value = Discounted(step, mdp.gamma).sum((reward * policy).sum(-1))
    following = einsum("...zaw,...w->...za", dynamics, value)
    return reward + mdp.gamma[..., None, None] * following


def classifier_log_ratio(
    mdp: FiniteMDP, agent: LatentAgent, data: Tensor, *, shared_latent: bool = True
) -> Tensor:
    """The classifier's optimum (Eq. 9): ``log C - log(1 - C)`` for ``(z, a, z')``.

    The best classifier tells how much likelier ``z'`` is among the encoder's latents
    than among the model's, given ``z`` and ``a``: the log ratio of
    :func:`latent_dynamics` to the model. The bound has ``log e(z'|s')`` in its place.
    Averaging over ``s'`` inside the logarithm can only raise it, where ``s'`` is
    distributed as in the data: the classifier hides the part of the divergence that
    comes from the state not being known.

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): encoder (the algorithm uses its target copy) and model.
        data (Tensor): distribution over ``(s, a)``, ``[*, S, A]``.

    Keyword Args:
        shared_latent (bool): ``True`` if the imagined ``z'`` starts from the ``z`` that
            the classifier sees, as in Eq. 9; ``False`` if it starts from another draw
            of ``e(s)``, as in the authors' code and :class:`~alm_torchrl.ALMLoss`: the
            model in the ratio becomes its mean over that draw. Default: ``True``.

    Returns:
        Tensor: ``[*, Z, A, Z]``; infinite where only one of the two occurs.

    Raises:
        ValueError: if a pair ``(z, a)`` never occurs in the data.

    Examples:
        No classifier tells a model from the encoder that it agrees with:

        >>> import torch
        >>> from alm_torchrl.bounds import LatentAgent, random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(1, 3, 2, generator=generator)
        >>> start = random_agent(1, 3, 4, 2, generator=generator)
        >>> data = torch.full((1, 3, 2), 1 / 6, dtype=torch.float64)
        >>> agreed = latent_dynamics(mdp, start.encoder, data)
        >>> agent = LatentAgent(start.encoder, agreed, start.policy)
        >>> classifier_log_ratio(mdp, agent, data).abs().max() < 1e-12
        tensor(True)
    """
    real = latent_dynamics(mdp, agent.encoder, data)
    imagined = agent.model
    if not shared_latent:
        posterior = _posterior(agent.encoder, data)
        imagined = einsum(
            "...zas,...sy,...yaw->...zaw", posterior, agent.encoder, agent.model
        )
    return (real.log() - imagined.log()).where((real > 0) | (imagined > 0), 0)


def practical_estimate(
    model: Tensor,
    policy: Tensor,
    reward: Tensor,
    qvalue: Tensor,
    log_ratio: Tensor,
    gamma: Tensor,
    horizon: int,
    *,
    classifier_coef: float = 0.1,
) -> Tensor:
    """The estimate of the practical algorithm, from each latent and first action.

    The mean of ``sum_{t<K} gamma^t (r(z_t, a_t) + c rho(z_t, a_t, z_{t+1}))
    + gamma^K Q(z_K, a_K)`` with ``z_{t+1} ~ m(z_t, a_t)`` and, after the first,
    ``a_t ~ pi(z_t)``: Eq. 8 without logarithms, which is also the estimate of the bias
    study (Fig. 4). Any tables will do; nothing is normalised.

    Args:
        model (Tensor): ``m(z'|z, a)``, ``[*, Z, A, Z]``.
        policy (Tensor): ``pi(a|z)``, ``[*, Z, A]``.
        reward (Tensor): ``r(z, a)``, ``[*, Z, A]``.
        qvalue (Tensor): ``Q(z, a)``, ``[*, Z, A]``; without the factor ``1 - gamma``.
        log_ratio (Tensor): ``rho(z, a, z')``, ``[*, Z, A, Z]``, for instance
            :func:`classifier_log_ratio`.
        gamma (Tensor): discount, ``[*]``.
        horizon (int): ``K >= 1``.

    Keyword Args:
        classifier_coef (float): ``c``. Default: ``0.1``, the paper's.

    Returns:
        Tensor: ``[*, Z, A]``. With a given first action the estimate for an observation
        is the mean over ``z ~ e(s)``, ``encoder @ estimate``, ``[*, S, A]``.

    Raises:
        ValueError: if ``horizon`` is below 1.

    Examples:
        With exact tables it is the value that the critic starts from, for any horizon:

        >>> import torch
        >>> from alm_torchrl.bounds import q_values, random_mdp, random_policy
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(1, 3, 2, generator=generator)
        >>> policy = random_policy(1, 3, 2, generator=generator)
        >>> qvalue = q_values(mdp, policy) / (1 - mdp.gamma[:, None, None])
        >>> estimate = practical_estimate(
        ...     mdp.kernel,
        ...     policy,
        ...     mdp.reward,
        ...     qvalue,
        ...     torch.zeros_like(mdp.kernel),
        ...     mdp.gamma,
        ...     horizon=3,
        ... )
        >>> estimate.allclose(qvalue)
        True
    """
    check_horizon(horizon)
    step = reward + classifier_coef * weighted(model, log_ratio).sum(-1)
    discount = gamma[..., None, None]
    total = qvalue
    for _ in range(horizon):
        value = (policy * total).sum(-1)
        total = step + discount * einsum("...zaw,...w->...za", model, value)
    return total


def _posterior(encoder: Tensor, data: Tensor) -> Tensor:
    """``p(s|z, a)`` over the data, ``[*, Z, A, S]``."""
    joint = einsum("...sa,...sz->...zas", data, encoder)
    mass = joint.sum(-1, keepdim=True)
    if not bool((mass > 0).all()):
        raise ValueError(
            "data and encoder should give each pair of latent and action a positive "
            f"probability, got {int((mass <= 0).sum())} pairs without."
        )
    return joint / mass
