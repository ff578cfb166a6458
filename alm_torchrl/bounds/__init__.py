"""Exact lower bounds on the return, in problems small enough to solve.

In a finite problem with a finite latent space, the return, the values and the bound of
Theorem 3.1 are sums, dynamic programmes and linear solves: exact, in float64, batched
and differentiable. Here the theory of Ghugare et al., "Simplifying Model-based RL"
(ICLR 2023, https://arxiv.org/abs/2209.08466) is checked claim by claim, and each
approximation of the practical algorithm has an exact value.

All returns and values are normalised by ``1 - gamma``, as in Eq. 1, except in
:func:`practical_estimate`. The bounds are in nats of the log return.

**Verdicts** on the claims of section 3.3 and appendix A. *Holds*: as printed.
*Amended*: holds when changed as stated. *Fails*: there is a counterexample, in
``tests/bounds/test_counterexamples.py``. What holds is tested on random problems.

================================= ======= ==============================================
Claim                             Verdict Remark
================================= ======= ==============================================
Eq. 1 as ``E_p[R]`` with Eq. 2    holds
Eq. 3                             holds   of endless trajectories under Eq. 4 its right
                                          side is minus infinity, unless the KL is zero
3.3: latents of ``q`` are         amended given the latent and action before, not by
independent of states                     themselves
3.3: the bound needs samples of   fails   ``r``, ``Q`` and ``e(z'|s')`` are the state's;
latents only                              practice replaces them
3.3: Eq. 5 is Eq. 3 with Eq. 4    amended by Jensen's inequality over the horizon (A.2);
                                          put in as it is, it differs, up or down
Eq. 6: (b) is a negative KL       holds   in the mean, given ``z_t, a_t, s_{t+1}``
Theorem 3.1                       holds   so it does with ``gamma^(t+1)`` before the KL:
                                          a higher bound, which an example attains
3.3: larger K, looser bound       holds   from K = 0 on, the model-free one
3.3: a learnable discount makes   fails   it takes the optimal dynamics as well, which
it tight                                  no model of the form of Eq. 4 has
Lemma A.1                         holds   its second line means ``gamma^H``
Lemma A.2                         amended ``gamma^t`` for ``gamma^(t-1)``; ``Q`` is
                                          given ``s_H, a_H``
Lemma A.3                         holds
A.2, steps (a) to (e)             holds
A.2, step (f)                     amended the sum ends at ``t = H - 1``
A.2, step (h)                     amended then the KL's weight is ``gamma^(t+1)``; as
                                          printed, (f) leads to a sum up to ``t = K``.
                                          ``Q`` is of ``s_K``, not of ``z_K``
Lemma A.4                         holds   with ``lambda^(k-1)`` for ``lambda^(n-1)``;
                                          cut at K as well
A.4 (c): any discount             holds
A.4 (d): optimal dynamics         amended for ``H = 0`` too
A.4: they are not Markovian       amended given H they are, over ``(s, z, a)``; each
                                          step depends on the time left
A.4: biased to high return        holds   over all H they are ``p`` times the return
A.4 (g): optimal discount         holds
A.5: tight                        amended with the optimal dynamics at ``H = 0``
A.6: ``L^K >= L^(K+1)``           holds   with either weight of the KL
A.6, its inequality               amended ``gamma log Q`` for ``gamma^(K+1) log Q``,
                                          given ``z_K`` too; ``R`` is normalised already
A.7                               fails   the first action's term is missing; amended in
                                          :func:`offline_bound`. It bounds the return of
                                          the data, not of the agent
A.8: ``a log(1 + r/a)`` is ``r``  holds   short by at most ``r^2 / (2 a)``
A.8: the best policy stays        holds   where no episode ends; ``Q`` rises by ``a``
A.8, steps (b) to (d)             amended the constants add up to ``log a``, not 0; (d)
                                          multiplies by ``a``
================================= ======= ==============================================

Of section 4: leaving out the logarithms is not A.8 with ``c`` for ``a``, as ``a`` must
be large (:func:`log_omission_gap`), but what it can add to the return is limited
(:func:`excess_limit`). The classifier does not give ``log e(z'|s') - log m(z'|z, a)``,
but the ratio of what ``z`` and ``a`` alone can tell (:func:`classifier_log_ratio`).

Examples:
    >>> import torch
    >>> from alm_torchrl.bounds import (
    ...     expected_return,
    ...     lower_bound,
    ...     random_agent,
    ...     random_mdp,
    ... )
    >>> generator = torch.Generator().manual_seed(0)
    >>> mdp = random_mdp(1000, 4, 2, generator=generator)
    >>> agent = random_agent(1000, 4, 3, 2, generator=generator)
    >>> truth = expected_return(mdp, agent.state_policy)
    >>> bool((lower_bound(mdp, agent, horizon=3).exp() <= truth).all())
    True
"""

from alm_torchrl.bounds.ascent import Ascent, ascend
from alm_torchrl.bounds.discounts import (
    discount_bound,
    horizon_terms,
    optimal_discount,
    payoffs,
    truncated_geometric,
)
from alm_torchrl.bounds.dynamics import (
    OptimalDynamics,
    dynamics_bound,
    optimal_dynamics,
    tightened_bound,
)
from alm_torchrl.bounds.exact import (
    discounted_visits,
    expected_return,
    model_rollout,
    optimal_return,
    q_values,
    real_rollout,
)
from alm_torchrl.bounds.gaps import approximation_gaps, excess_limit, surrogate_bound
from alm_torchrl.bounds.objective import (
    BoundParts,
    KLWeight,
    bound_parts,
    lambda_bound,
    lower_bound,
)
from alm_torchrl.bounds.offline import OfflineForm, cloning_terms, offline_bound
from alm_torchrl.bounds.practice import (
    classifier_log_ratio,
    latent_dynamics,
    latent_q_values,
    latent_reward,
    practical_estimate,
)
from alm_torchrl.bounds.problem import (
    FiniteMDP,
    LatentAgent,
    random_agent,
    random_mdp,
    random_policy,
)
from alm_torchrl.bounds.shift import log_omission_error, log_omission_gap, shift_reward

__all__ = [
    "Ascent",
    "BoundParts",
    "FiniteMDP",
    "KLWeight",
    "LatentAgent",
    "OfflineForm",
    "OptimalDynamics",
    "approximation_gaps",
    "ascend",
    "bound_parts",
    "classifier_log_ratio",
    "cloning_terms",
    "discount_bound",
    "discounted_visits",
    "dynamics_bound",
    "excess_limit",
    "expected_return",
    "horizon_terms",
    "lambda_bound",
    "latent_dynamics",
    "latent_q_values",
    "latent_reward",
    "log_omission_error",
    "log_omission_gap",
    "lower_bound",
    "model_rollout",
    "offline_bound",
    "optimal_discount",
    "optimal_dynamics",
    "optimal_return",
    "payoffs",
    "practical_estimate",
    "q_values",
    "random_agent",
    "random_mdp",
    "random_policy",
    "real_rollout",
    "shift_reward",
    "surrogate_bound",
    "tightened_bound",
    "truncated_geometric",
]
