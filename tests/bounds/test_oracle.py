"""The dynamic programmes against loops over every trajectory of tiny problems."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alm_torchrl.bounds import (
    FiniteMDP,
    bound_parts,
    classifier_log_ratio,
    discounted_visits,
    expected_return,
    horizon_terms,
    lambda_bound,
    latent_dynamics,
    latent_q_values,
    latent_reward,
    lower_bound,
    model_rollout,
    offline_bound,
    optimal_dynamics,
    optimal_return,
    payoffs,
    practical_estimate,
    q_values,
    random_agent,
    random_mdp,
    random_policy,
    real_rollout,
    surrogate_bound,
)
from tests.bounds.enumeration import Enumeration, double

HORIZON = 2
SHARPNESS = {"soft": 1.0, "sharp": 4.0, "deterministic kernel": float("inf")}


def tiny(seed, *, states=2, latents=2, actions=2, kind="soft", gamma=0.6):
    """One problem without a batch dimension, and whatever else the tests need."""
    generator = torch.Generator().manual_seed(seed)
    sharp = SHARPNESS[kind]
    mdp = random_mdp(
        1, states, actions, generator=generator, sharpness=sharp, gamma=gamma
    )
    soft = min(sharp, 4.0)
    agent = random_agent(
        1, states, latents, actions, generator=generator, sharpness=soft
    )
    behaviour = random_policy(1, states, actions, generator=generator, sharpness=soft)
    first = [getattr(mdp, name)[0] for name in ("initial", "kernel", "reward", "gamma")]
    agent = type(agent)(agent.encoder[0], agent.model[0], agent.policy[0])
    return FiniteMDP(*first), agent, behaviour[0]


def few(test):
    """Six problems, of all kinds; a handful of them with three states or latents."""
    sizes = st.sampled_from([(2, 2, 2), (3, 2, 1), (2, 3, 1), (2, 1, 2)])
    drawn = given(st.integers(0, 2**31), sizes, st.sampled_from(list(SHARPNESS)))
    return settings(max_examples=6)(drawn(test))


def problem(seed, sizes, kind):
    states, latents, actions = sizes
    return tiny(seed, states=states, latents=latents, actions=actions, kind=kind)


def same(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@few
def test_returns_and_values(seed, sizes, kind):
    mdp, agent, _ = problem(seed, sizes, kind)
    oracle = Enumeration(mdp, agent, HORIZON)
    same(q_values(mdp, agent.state_policy), oracle.qvalue)
    truth = expected_return(mdp, agent.state_policy)
    same(truth, oracle.mean(oracle.real, HORIZON, oracle.k_step_return))
    # Lemma A.2, second line.
    terms = [oracle.mean(oracle.real, last, oracle.payoff) for last in range(3)]
    same(payoffs(mdp, agent, HORIZON), terms)
    mean = sum(p * x for p, x in zip(oracle.geometric(), terms, strict=True))
    same(truth, mean)


@few
def test_rollouts_and_visits(seed, sizes, kind):
    mdp, agent, behaviour = problem(seed, sizes, kind)
    oracle = Enumeration(mdp, agent, HORIZON)
    joint = torch.zeros(HORIZON + 1, oracle.states, oracle.latents).double()
    visits = torch.zeros(HORIZON + 1, oracle.states, oracle.actions).double()
    for path in oracle.paths(HORIZON):
        for t, (s, z, a) in enumerate(path):
            joint[t, s, z] += oracle.imagined(path)
            visits[t, s, a] += oracle.real(path)
    same(model_rollout(mdp, agent, HORIZON), joint)
    same(real_rollout(mdp, agent.state_policy, HORIZON), visits)
    long = real_rollout(mdp, behaviour, 100)
    weight = (1 - mdp.gamma) * mdp.gamma ** torch.arange(101)
    same(discounted_visits(mdp, behaviour), (weight[:, None, None] * long).sum(0))


@few
def test_bound_as_printed_and_as_the_proof_has_it(seed, sizes, kind):
    mdp, agent, _ = problem(seed, sizes, kind)
    oracle = Enumeration(mdp, agent, HORIZON)
    for steps in (1, 2):
        same(lower_bound(mdp, agent, steps), oracle.printed(steps))
    same(bound_parts(mdp, agent, HORIZON).bounds()[0], oracle.printed(0))
    terms = [oracle.term(last) for last in range(HORIZON + 1)]
    same(horizon_terms(mdp, agent, HORIZON), terms)
    # Step (e) of the proof: the mean over H of the log ratio of whole trajectories.
    step_e = sum(p * x for p, x in zip(oracle.geometric(), terms, strict=True))
    same(lower_bound(mdp, agent, HORIZON, kl_weight="tight"), step_e)


@few
def test_lambda_average(seed, sizes, kind):
    mdp, agent, _ = problem(seed, sizes, kind)
    oracle = Enumeration(mdp, agent, HORIZON)
    expected = 0.3 * oracle.printed(1) + 0.7 * oracle.printed(2)
    same(lambda_bound(mdp, agent, 0.7, horizon=HORIZON), expected)


@pytest.mark.parametrize("weight", ["printed", "tight"])
@pytest.mark.parametrize("lmbda", [0.0, 0.5, 0.95, 1.0])
def test_endless_lambda_average_is_the_limit(lmbda, weight):
    mdp, agent, _ = tiny(3, states=3, latents=4)
    far = lambda_bound(mdp, agent, lmbda, horizon=200, kl_weight=weight)
    same(lambda_bound(mdp, agent, lmbda, kl_weight=weight), far)


@few
def test_evidence_bound_of_whole_returns(seed, sizes, kind):
    """Eq. 3 for K-step trajectories, whose return ends in the value."""
    mdp, agent, _ = problem(seed, sizes, kind)
    oracle = Enumeration(mdp, agent, HORIZON)

    def gain(path):
        ratio = oracle.real(path) / oracle.imagined(path)
        return math.log(oracle.k_step_return(path) * ratio)

    truth = expected_return(mdp, agent.state_policy).log().item()
    assert oracle.mean(oracle.imagined, HORIZON, gain) <= truth + 1e-12


@few
def test_optimal_dynamics_reweight_whole_trajectories(seed, sizes, kind):
    mdp, agent, _ = problem(seed, sizes, kind)
    oracle = Enumeration(mdp, agent, HORIZON)
    for stop in range(HORIZON + 1):
        tables = optimal_dynamics(mdp, agent, HORIZON, stop)
        start, choice = tables.initial.tolist(), tables.choice.tolist()
        kernel = tables.kernel.tolist()
        mean = oracle.mean(oracle.real, stop, oracle.payoff)
        for path in oracle.paths(stop):
            chance = start[path[0][0]]
            for t, (s, z, a) in enumerate(path):
                chance *= choice[t][s][z][a]
                if t < stop:
                    chance *= kernel[t][s][a][path[t + 1][0]]
            expected = oracle.real(path) * oracle.payoff(path) / mean
            assert chance == pytest.approx(expected, rel=1e-10, abs=1e-14)


def test_optimal_mixture_reweights_by_the_return():
    """Over H, with what follows H left as it is, q* is p times the K-step return."""
    mdp, agent, _ = tiny(0)
    oracle = Enumeration(mdp, agent, HORIZON)
    truth = expected_return(mdp, agent.state_policy).item()
    for path in oracle.paths(HORIZON):
        mixture = 0.0
        for last, weight in enumerate(oracle.geometric()):
            mean = oracle.mean(oracle.real, last, oracle.payoff)
            discount = weight * mean / truth
            mixture += (
                discount * oracle.real(path) * oracle.payoff(path[: last + 1]) / mean
            )
        expected = oracle.real(path) * oracle.k_step_return(path) / truth
        assert mixture == pytest.approx(expected, rel=1e-10)


@few
def test_offline_bound(seed, sizes, kind):
    mdp, agent, behaviour = problem(seed, sizes, kind)
    oracle = Enumeration(mdp, agent, HORIZON, behaviour)
    terms = [oracle.term(last) for last in range(HORIZON + 1)]
    expected = sum(p * x for p, x in zip(oracle.geometric(), terms, strict=True))
    same(offline_bound(mdp, agent, behaviour, HORIZON), expected)

    def cloning(path):
        return sum(
            oracle.gamma**t
            * math.log(
                behaviour[path[t + 1][0]][path[t + 1][2]].item()
                / oracle.policy[path[t + 1][1]][path[t + 1][2]]
            )
            for t in range(HORIZON)
        )

    printed = oracle.printed(HORIZON) + oracle.mean(oracle.imagined, HORIZON, cloning)
    same(offline_bound(mdp, agent, behaviour, HORIZON, form="printed"), printed)


@few
def test_learned_tables_are_the_optima_on_their_data(seed, sizes, kind):
    mdp, agent, _ = problem(seed, sizes, kind)
    states, latents, actions = sizes
    generator = torch.Generator().manual_seed(seed)
    data = torch.rand(states, actions, generator=generator, dtype=torch.float64)
    data = data / data.sum()
    shape = (latents, actions)
    mass, reward = torch.zeros(shape).double(), torch.zeros(shape).double()
    real = torch.zeros(latents, actions, latents).double()
    imagined = torch.zeros(latents, actions, latents).double()
    for s, z, a in product(*map(range, sizes)):
        weight = (data[s, a] * agent.encoder[s, z]).item()
        mass[z, a] += weight
        reward[z, a] += weight * mdp.reward[s, a]
        for s2, z2 in product(range(states), range(latents)):
            real[z, a, z2] += weight * mdp.kernel[s, a, s2] * agent.encoder[s2, z2]
        for y, z2 in product(range(latents), range(latents)):
            imagined[z, a, z2] += weight * agent.encoder[s, y] * agent.model[y, a, z2]
    shared = mass[..., None] * agent.model
    same(latent_reward(mdp, agent.encoder, data), reward / mass)
    same(latent_dynamics(mdp, agent.encoder, data), real / mass[..., None])
    # The best classifier is Bayes' rule on equally many real and imagined latents.
    ratio = classifier_log_ratio(mdp, agent, data)
    same(ratio.sigmoid(), real / (real + shared))
    other = classifier_log_ratio(mdp, agent, data, shared_latent=False)
    same(other.sigmoid(), real / (real + imagined))

    learned = torch.zeros(shape).double()
    for _ in range(200):
        value = (agent.policy * learned).sum(-1)
        following = (real / mass[..., None]) @ value
        learned = (1 - mdp.gamma) * reward / mass + mdp.gamma * following
    same(latent_q_values(mdp, agent.encoder, agent.policy, data), learned)


@few
def test_practical_estimate(seed, sizes, kind):
    _, agent, _ = problem(seed, sizes, kind)
    _, latents, actions = sizes
    generator = torch.Generator().manual_seed(seed)
    shapes = ((latents, actions), (latents, actions), (latents, actions, latents))
    reward, value, ratio = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    gamma = double(0.7)
    actual = practical_estimate(
        agent.model, agent.policy, reward, value, ratio, gamma, 2, classifier_coef=0.3
    )
    for z, a in product(range(latents), range(actions)):
        total = 0.0
        pairs = list(product(range(latents), range(actions)))
        for (y, b), (x, c) in product(pairs, pairs):
            chance = agent.model[z, a, y] * agent.policy[y, b]
            chance = chance * agent.model[y, b, x] * agent.policy[x, c]
            first = reward[z, a] + 0.3 * ratio[z, a, y]
            second = reward[y, b] + 0.3 * ratio[y, b, x]
            total += chance * (first + 0.7 * second + 0.49 * value[x, c])
        same(actual[z, a], total)


@few
def test_surrogate_with_everything_replaced(seed, sizes, kind):
    mdp, agent, _ = problem(seed, sizes, kind)
    oracle = Enumeration(mdp, agent, HORIZON)
    other = tiny(seed + 1, states=sizes[0], latents=sizes[1], actions=sizes[2])[1]
    reward, qvalue = other.policy + 1, other.policy + 2
    log_ratio = other.model.log()

    def along(path, *, log, ratio):
        total = 0.0
        for t in range(HORIZON):
            _, z, a = path[t]
            s2, z2, _ = path[t + 1]
            extrinsic = (1 - oracle.gamma) * log(reward[z, a].item())
            if ratio:
                x = log_ratio[z, a, z2].item()
            else:
                x = math.log(other.encoder[s2, z2].item() / oracle.model[z][a][z2])
            total += oracle.gamma**t * (extrinsic + 0.3 * x)
        _, z, a = path[HORIZON]
        return total + oracle.gamma**HORIZON * log(qvalue[z, a].item())

    tables = {"kl_coef": 0.3, "reward": reward, "qvalue": qvalue}
    same(
        surrogate_bound(mdp, agent, HORIZON, target_encoder=other.encoder, **tables),
        oracle.mean(
            oracle.imagined, HORIZON, lambda x: along(x, log=math.log, ratio=False)
        ),
    )
    same(
        surrogate_bound(mdp, agent, HORIZON, logs=False, log_ratio=log_ratio, **tables),
        oracle.mean(
            oracle.imagined, HORIZON, lambda x: along(x, log=float, ratio=True)
        ),
    )


@few
def test_optimal_return_beats_every_deterministic_policy(seed, sizes, kind):
    mdp, agent, _ = problem(seed, sizes, kind)
    oracle = Enumeration(mdp, agent, HORIZON)
    best = 0.0
    for choices in product(range(sizes[2]), repeat=sizes[0]):
        policy = [[float(a == c) for a in range(sizes[2])] for c in choices]
        value = oracle.values(policy)
        got = sum(oracle.start[s] * value[s][c] for s, c in enumerate(choices))
        best = max(best, got)
    same(optimal_return(mdp), best)


def test_small_values_are_accurate_beside_large_ones():
    """Rewards twelve orders apart and gamma near 1, against exact fractions."""
    gamma = 1 - 2.0**-16
    kernel = [[0.5, 0.25, 0.25], [0.0, 0.75, 0.25], [0.0, 0.0, 1.0]]
    reward = [1e6, 1.0, 1e-6]
    mdp = FiniteMDP(
        initial=double([1.0, 0.0, 0.0]),
        kernel=double(kernel)[:, None],
        reward=double(reward)[:, None],
        gamma=double(gamma),
    )
    g, v = Fraction(gamma), [Fraction(0)] * 3
    for s in (2, 1, 0):
        ahead = sum(Fraction(kernel[s][p]) * v[p] for p in range(3) if p != s)
        own = 1 - g * Fraction(kernel[s][s])
        v[s] = ((1 - g) * Fraction(reward[s]) + g * ahead) / own
    actual = q_values(mdp, double([[1.0]] * 3))[:, 0].tolist()
    for got, exact in zip(actual, v, strict=True):
        assert got == pytest.approx(float(exact), rel=1e-10)
