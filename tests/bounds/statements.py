"""What section 3.3 and appendix A state, as inequalities over random problems.

A statement maps a problem to its slack, one number or more for each MDP of the batch,
not negative where the statement holds. Arguments break it; see `test_claims`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import einsum

from alm_torchrl.bounds import (
    OptimalDynamics,
    bound_parts,
    cloning_terms,
    discount_bound,
    discounted_visits,
    dynamics_bound,
    excess_limit,
    expected_return,
    horizon_terms,
    lambda_bound,
    latent_dynamics,
    log_omission_error,
    log_omission_gap,
    lower_bound,
    model_rollout,
    offline_bound,
    optimal_discount,
    optimal_dynamics,
    optimal_return,
    payoffs,
    q_values,
    shift_reward,
    surrogate_bound,
    tightened_bound,
    truncated_geometric,
)
from alm_torchrl.bounds.exact import expectation, kl_table, latent_kl, weighted
from tests.bounds.problems import at_most, equal


def log_return(problem):
    return expected_return(problem.mdp, problem.agent.state_policy).log()


# -- Lemmas A.1 to A.3 ---------------------------------------------------------------


def lemma_a1(problem, last=0, power=0):
    """``E[sum_{t <= H - last} x_t] = sum_t gamma^(t + power) x_t``."""
    gamma, horizon = problem.mdp.gamma, problem.horizon
    x = problem.numbers[:, : horizon + 1 - last]
    sums = torch.cat([torch.zeros(len(x), last).double(), x.cumsum(-1)], -1)
    mean = (truncated_geometric(gamma, horizon) * sums).sum(-1)
    powers = torch.arange(x.shape[-1]) + power
    return equal((gamma[:, None].pow(powers) * x).sum(-1), mean)


def lemma_a2(problem, power=0, normalised=True):
    mdp, horizon = problem.mdp, problem.horizon
    terms = payoffs(mdp, problem.agent, horizon)
    weight = truncated_geometric(mdp.gamma, horizon)
    weight[:, :-1] *= mdp.gamma[:, None] ** power
    if not normalised:
        terms[:, -1] /= 1 - mdp.gamma
    truth = expected_return(mdp, problem.agent.state_policy)
    # As printed, with gamma^(t - 1), the first weight is infinite for gamma = 0.
    weight = weight.nan_to_num(posinf=1e9)
    return equal((weight * terms).sum(-1).log(), truth.log())


def two_ways_to_the_return(problem, normalised=True):
    mdp, policy = problem.mdp, problem.agent.state_policy
    mean = (discounted_visits(mdp, policy) * mdp.reward).sum((-2, -1))
    if not normalised:
        mean = mean / (1 - mdp.gamma)
    return equal(mean.log(), expected_return(mdp, policy).log())


def lemma_a3(problem, entropy=1.0):
    """``max_p E_p[f - log p] = log sum exp f``, at the softmax."""
    f, p = problem.numbers[:, :10] * 3, problem.numbers[:, 10:20].softmax(-1)

    def objective(p):
        return (p * (f - entropy * p.log())).sum(-1)

    best = objective(f.softmax(-1))
    return torch.stack([at_most(objective(p), best), equal(best, f.logsumexp(-1))])


# -- Theorem 3.1 ---------------------------------------------------------------------


def theorem(
    problem, *, kl_sign=1, kl_power=0, swap_kl=False, rate=True, normalised=True
):
    """``L^K`` with a part of it exchanged."""
    parts = bound_parts(problem.mdp, problem.agent, problem.horizon)
    discounts, gamma = parts.discounts, parts.gamma[:, None]
    kl = swapped_kl(problem) if swap_kl else kl_sign * parts.kl
    cost = weighted(discounts[:, :-1] * gamma**kl_power, kl)
    share = 1 - gamma if rate else 1.0
    value = parts.log_value[:, -1]
    if not normalised:
        value = value - (1 - parts.gamma).log()
    total = (discounts[:, :-1] * share * parts.log_reward - cost).sum(-1)
    return at_most(total + discounts[:, -1] * value, log_return(problem))


def swapped_kl(problem):
    """``KL(e(.|s_{t+1}) || m(.|z_t, a_t))`` in place of the other direction."""
    mdp, agent = problem.mdp, problem.agent
    joint = model_rollout(mdp, agent, problem.horizon)[:, :-1]
    ahead = einsum("btsz,bza,bsap->btzap", joint, agent.policy, mdp.kernel)
    rows = kl_table(agent.encoder, agent.model.flatten(1, 2)).mT
    table = rows.unflatten(1, agent.model.shape[1:3])
    return expectation("btzap,bzap->bt", ahead, table)


def printed(problem):
    bound = lower_bound(problem.mdp, problem.agent, problem.horizon)
    return at_most(bound, log_return(problem))


def tight(problem):
    bound = lower_bound(problem.mdp, problem.agent, problem.horizon, kl_weight="tight")
    return at_most(bound, log_return(problem))


def improvement(problem, factor=1.0):
    """The tight bound is above the printed one by ``(1 - gamma) sum gamma^t KL_t``."""
    mdp, agent, horizon = problem.mdp, problem.agent, problem.horizon
    parts = bound_parts(mdp, agent, horizon)
    gain = lower_bound(mdp, agent, horizon, kl_weight="tight")
    gain = gain - lower_bound(mdp, agent, horizon)
    cost = (parts.discounts[:, :-1] * parts.kl).sum(-1)
    scale = 1 + cost
    expected = factor * (1 - mdp.gamma) * cost
    return torch.stack([gain / scale, equal(gain / scale, expected / scale)])


# -- A.3 -----------------------------------------------------------------------------


def lambda_average(problem, weight="printed", cut=False):
    mdp, agent = problem.mdp, problem.agent
    bound = lambda_bound(
        mdp,
        agent,
        problem.lmbda,
        horizon=problem.horizon if cut else None,
        kl_weight=weight,
    )
    return at_most(bound, log_return(problem))


def lambda_average_by_hand(problem, kl=True, share=True):
    parts = bound_parts(problem.mdp, problem.agent, problem.horizon)
    parts = parts if kl else replace(parts, kl=torch.zeros_like(parts.kl))
    weight = problem.lmbda ** torch.arange(problem.horizon).double()
    if share:
        weight[:-1] *= 1 - problem.lmbda
    bound = weighted(weight, parts.bounds()[:, 1:]).sum(-1)
    return at_most(bound, log_return(problem))


# -- A.4, A.5 ------------------------------------------------------------------------


def any_discount(problem, prior=True, kl=True):
    """Step (c) with a random discount distribution and Eq. 4's dynamics."""
    mdp, agent, horizon = problem.mdp, problem.agent, problem.horizon
    terms = horizon_terms(mdp, agent, horizon)
    if not kl:
        parts = bound_parts(mdp, agent, horizon)
        terms = torch.cat([parts.log_reward, parts.log_value[:, -1:]], -1)
    discount = problem.numbers[:, : horizon + 1].softmax(-1)
    if not prior:
        terms = terms - truncated_geometric(mdp.gamma, horizon).log()
        terms = terms.nan_to_num(posinf=1e6)
    return at_most(discount_bound(terms, mdp.gamma, discount), log_return(problem))


def best_discount(problem, swap=False):
    """The optimal discount beats any other, and the bound stays a bound."""
    mdp, agent, horizon = problem.mdp, problem.agent, problem.horizon
    terms = horizon_terms(mdp, agent, horizon)
    best = discount_bound(terms, mdp.gamma, optimal_discount(terms, mdp.gamma))
    other = problem.numbers[:, : horizon + 1].softmax(-1)
    other = torch.stack([other, truncated_geometric(mdp.gamma, horizon)])
    others = discount_bound(terms, mdp.gamma, other)
    if swap:
        return at_most(best, others)
    shorter = at_most(best, log_return(problem))
    return torch.cat([at_most(others, best), shorter[None]])


def tight_at_the_optimum(problem):
    bound = tightened_bound(problem.mdp, problem.agent, problem.horizon)
    return equal(bound, log_return(problem))


def tightness(problem, geometric=False, dynamics="optimal"):
    """With less than A.5 asks for."""
    mdp, agent, horizon = problem.mdp, problem.agent, problem.horizon
    terms = payoffs(mdp, agent, horizon).log()
    if dynamics == "Eq. 4":
        terms = horizon_terms(mdp, agent, horizon)
    elif dynamics == "H >= 1":
        terms[:, 0] = horizon_terms(mdp, agent, horizon)[:, 0]
    discount = truncated_geometric(mdp.gamma, horizon) if geometric else None
    return equal(discount_bound(terms, mdp.gamma, discount), log_return(problem))


def best_dynamics(problem, swap=False):
    """``q*`` attains ``log E_p[psi]``, and no other chain exceeds it."""
    mdp, agent, horizon = problem.mdp, problem.agent, problem.horizon
    stop = horizon // 2
    best = optimal_dynamics(mdp, agent, horizon, stop)
    chain = OptimalDynamics(mdp.initial, best.choice.flip(1), best.kernel.flip(1))
    term = payoffs(mdp, agent, horizon)[:, stop].log()
    value = dynamics_bound(mdp, agent, horizon, best)
    other = dynamics_bound(mdp, agent, horizon, chain)
    if swap:
        return at_most(value, other)
    return torch.stack([at_most(other, value), equal(value, term)])


def optimism(problem, swap=False):
    """``E_{q*}[psi] >= E_p[psi]``: the optimal dynamics seek payoff."""
    mdp, agent, horizon = problem.mdp, problem.agent, problem.horizon
    chain = optimal_dynamics(mdp, agent, horizon, horizon)
    state = chain.initial
    for step in range(horizon):
        visits = state[..., None] * chain.choice[:, step].sum(-2)
        state = einsum("bsa,bsap->bp", visits, chain.kernel[:, step])
    visits = state[..., None] * chain.choice[:, horizon].sum(-2)
    mean = (visits * q_values(mdp, agent.state_policy)).sum((-2, -1))
    real = payoffs(mdp, agent, horizon)[:, -1]
    return at_most(mean, real) if swap else at_most(real, mean)


# -- A.6 -----------------------------------------------------------------------------


def longer_is_looser(problem, weight="printed", swap=False, rate=True):
    parts = bound_parts(problem.mdp, problem.agent, problem.horizon)
    if not rate:
        parts = replace(parts, log_reward=parts.log_reward / (1 - parts.gamma)[:, None])
    bounds = parts.bounds(weight)
    near, far = bounds[:, :-1], bounds[:, 1:]
    return at_most(near, far) if swap else at_most(far, near)


def one_step_inequality(problem, kl_power=1, value_power=1):
    """``log Q >= (1 - gamma) log r - w KL + gamma E[log Q']`` for each (s, z, a)."""
    mdp, agent = problem.mdp, problem.agent
    gamma = mdp.gamma[:, None, None, None]
    log_q = q_values(mdp, agent.state_policy).log()
    table = latent_kl(agent.model, agent.encoder)
    kl = expectation("bsap,bzap->bsza", mdp.kernel, table)
    following = einsum("bza,bsa->bsz", agent.policy, log_q)
    following = einsum("bsap,bzaw,bpw->bsza", mdp.kernel, agent.model, following)
    reward = (1 - gamma) * mdp.reward.log()[:, :, None]
    right = reward - weighted(gamma**kl_power, kl) + gamma**value_power * following
    return at_most(right, log_q[:, :, None].expand_as(right))


# -- A.7 -----------------------------------------------------------------------------


def offline(problem, form="amended", cloning=True, first_action=False):
    mdp, behaviour, horizon = problem.mdp, problem.behaviour, problem.horizon
    bound = offline_bound(mdp, problem.agent, behaviour, horizon, form=form)
    terms = cloning_terms(mdp, problem.agent, behaviour, horizon)
    if not cloning:
        powers = mdp.gamma[:, None].pow(torch.arange(horizon + 1))
        bound = bound + (powers * terms).sum(-1)
    if first_action:
        bound = bound - terms[:, 0]
    return at_most(bound, expected_return(mdp, behaviour).log())


# -- A.8 and what goes beyond the paper ----------------------------------------------

SHIFT = 1e4


def log_omission(problem, factor=0.5):
    reward = problem.mdp.reward
    limit = factor * reward.square() / SHIFT
    error = log_omission_error(reward, SHIFT)
    scale = 1 + reward
    return torch.stack([error / scale, (limit - error) / scale])


def shifted_objective(problem, factor=0.5):
    agent = problem.agent
    gap = log_omission_gap(problem.mdp, agent, problem.horizon, SHIFT)
    most = problem.mdp.reward.amax((-2, -1))
    parts = bound_parts(problem.mdp, agent, problem.horizon)
    size = (parts.discounts[:, :-1] * parts.kl).sum(-1)
    scale = 1 + most + SHIFT * (1 + size)
    return torch.stack([gap / scale, (factor * most.square() / SHIFT - gap) / scale])


def shifted_values(problem, normalised=True):
    mdp, policy = problem.mdp, problem.agent.state_policy
    shift = SHIFT if normalised else SHIFT / (1 - mdp.gamma)[:, None, None]
    shifted = q_values(shift_reward(mdp, SHIFT), policy)
    return equal(shifted, q_values(mdp, policy) + shift)


def excess(problem, kl_coef=1.0, factor=1.0):
    mdp, agent = problem.mdp, problem.agent
    bound = surrogate_bound(mdp, agent, problem.horizon, logs=False, kl_coef=kl_coef)
    truth = expected_return(mdp, agent.state_policy)
    return at_most(bound, truth + factor * excess_limit(mdp, 1.0))


def optimum(problem, swap=False):
    mdp = problem.mdp
    truth = expected_return(mdp, problem.agent.state_policy).log()
    best = optimal_return(mdp).log()
    return at_most(best, truth) if swap else at_most(truth, best)


def classifier_hides_divergence(problem, swap=False):
    """On the classifier's own data its mean log ratio is at least the true one."""
    mdp, agent, data = problem.mdp, problem.agent, problem.data
    joint = einsum("bsa,bsz,bsap->bzap", data, agent.encoder, mdp.kernel)
    joint = joint / joint.sum(-1, keepdim=True)
    true = expectation("bzap,bzap->bza", joint, latent_kl(agent.model, agent.encoder))
    merged = latent_dynamics(mdp, agent.encoder, data)
    seen = torch.xlogy(agent.model, agent.model) - torch.xlogy(agent.model, merged)
    seen = seen.sum(-1)
    return at_most(true, seen) if swap else at_most(seen, true)
