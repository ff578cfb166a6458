"""`alm_torchrl.bounds`: what it refuses, gradients, limits, practice and ascent."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import alm_torchrl.bounds as bounds
from alm_torchrl import functional
from alm_torchrl.bounds import (
    FiniteMDP,
    LatentAgent,
    approximation_gaps,
    ascend,
    bound_parts,
    classifier_log_ratio,
    discounted_visits,
    expected_return,
    lambda_bound,
    latent_reward,
    log_omission_error,
    log_omission_gap,
    lower_bound,
    offline_bound,
    optimal_dynamics,
    optimal_return,
    random_agent,
    random_mdp,
    random_policy,
    surrogate_bound,
    tightened_bound,
)
from tests.bounds.enumeration import double


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    mdp = random_mdp(6, 3, 2, generator=generator, gamma=0.8)
    return mdp, random_agent(6, 3, 4, 2, generator=generator)


def same(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **tolerance)


# -- Problems ------------------------------------------------------------------------


FIELDS = {
    "reward": [
        (lambda x: x.float(), "float64, got torch.float32"),
        (lambda x: x * 0, "positive and finite"),
        (lambda x: x / 0, "positive and finite"),
        (lambda x: x[0, 0], r"\[\*, S, A\], got \[2\]"),
    ],
    "kernel": [
        (lambda x: 2 * x, "distributions"),
        (lambda x: x[..., 0], r"shape \[6, 3, 2, 3\]"),
    ],
    "initial": [(lambda x: x - 1, "distributions")],
    "gamma": [
        (lambda x: x + 0.2, r"\[0, 1\)"),
        (lambda x: x - 1, r"\[0, 1\)"),
        (lambda x: x[:1], r"shape \[6\], got \[1\]"),
    ],
    **{
        name: [(lambda x: 2 * x, "distributions"), (lambda x: x[0, 0], "")]
        for name in ("encoder", "model", "policy")
    },
}


@pytest.mark.parametrize("name", FIELDS)
def test_problem_and_agent_are_checked(pair, name):
    (whole,) = (x for x in pair if hasattr(x, name))
    for change, message in FIELDS[name]:
        with pytest.raises(ValueError, match=f"{name} should .*{message}"):
            replace(whole, **{name: change(getattr(whole, name))})


def blind(agent):
    """The agent whose encoder shows nothing."""
    encoder = torch.zeros_like(agent.encoder)
    encoder[..., 0] = 1
    return replace(agent, encoder=encoder)


def with_five_states():
    return random_agent(6, 5, 4, 2, generator=torch.Generator())


REFUSED = {
    "horizon .* got 0": lambda m, a: lower_bound(m, a, 0),
    "3 states .* got 5": lambda m, a: lower_bound(m, with_five_states(), 1),
    "kl_weight .* got 'loose'": lambda m, a: lower_bound(m, a, 1, kl_weight="loose"),
    "lmbda .* got 1.5": lambda m, a: lambda_bound(m, a, 1.5),
    "form .* got 'other'": lambda m, a: offline_bound(
        m, a, a.state_policy, 1, form="other"
    ),
    "stop .* got 3": lambda m, a: optimal_dynamics(m, a, 2, 3),
    "not both": lambda m, a: surrogate_bound(
        m, a, 1, target_encoder=a.encoder, log_ratio=a.model
    ),
    "shift .* got 0": lambda m, a: log_omission_error(m.reward, 0),
    "shift .* got -1": lambda m, a: log_omission_gap(m, a, 1, -1),
    "got 36 pairs without": lambda m, a: latent_reward(
        m, blind(a).encoder, a.state_policy / 3
    ),
    "a zero has no logit": lambda m, a: ascend(m, blind(a), 1, steps=1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_arguments_are_checked(pair, message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message](*pair)


def test_random_problems_follow_their_arguments():
    generator = torch.Generator().manual_seed(0)
    sharpness = double([0.0, 1.0, torch.inf])
    mdp = random_mdp(
        3,
        4,
        2,
        generator=generator,
        sharpness=sharpness,
        log10_reward=(-6, -5),
        gamma=double([0.0, 0.5, 0.9]),
    )
    same(mdp.kernel[0], torch.full((4, 2, 4), 0.25).double())
    assert 0.25 < mdp.kernel[1].max() < 1
    assert bool(((mdp.kernel[2] == 0) | (mdp.kernel[2] == 1)).all())
    assert mdp.reward.min() >= 1e-6
    assert mdp.reward.max() <= 1e-5
    assert mdp.gamma.tolist() == [0.0, 0.5, 0.9]


# -- Shapes, gradients, limits -------------------------------------------------------


def test_batch_is_many_single_problems(pair):
    mdp, agent = pair
    behaviour = random_policy(6, 3, 2, generator=torch.Generator().manual_seed(1))
    functions = (
        lambda m, a, b: lower_bound(m, a, 3),
        lambda m, a, b: lambda_bound(m, a, 0.9),
        lambda m, a, b: tightened_bound(m, a, 3),
        lambda m, a, b: offline_bound(m, a, b, 3),
        lambda m, a, b: optimal_return(m),
        lambda m, a, b: surrogate_bound(m, a, 3, logs=False, kl_coef=0.1),
        lambda m, a, b: approximation_gaps(
            m, a, 3, data=b / 3, target_encoder=a.encoder
        )["in practice"],
    )
    for function in functions:
        whole = function(mdp, agent, behaviour)
        for i in range(6):
            single = FiniteMDP(
                mdp.initial[i], mdp.kernel[i], mdp.reward[i], mdp.gamma[i]
            )
            alone = LatentAgent(agent.encoder[i], agent.model[i], agent.policy[i])
            same(function(single, alone, behaviour[i]), whole[i])


def test_bound_is_differentiable_in_everything():
    generator = torch.Generator().manual_seed(0)
    mdp = random_mdp(1, 2, 2, generator=generator, gamma=0.8)
    agent = random_agent(1, 2, 2, 2, generator=generator)

    def bound(encoder, model, policy, initial, kernel, reward, gamma):
        problem = FiniteMDP(
            initial.softmax(-1), kernel.softmax(-1), reward.exp(), gamma.sigmoid()
        )
        tables = (table.softmax(-1) for table in (encoder, model, policy))
        actor = LatentAgent(*tables)
        near = lower_bound(problem, actor, 2)
        return near, lambda_bound(problem, actor, 0.9, kl_weight="tight")

    tables = (agent.encoder, agent.model, agent.policy, mdp.initial, mdp.kernel)
    inputs = [table.log() for table in tables] + [mdp.reward.log(), mdp.gamma.logit()]
    assert torch.autograd.gradcheck(bound, [x.requires_grad_() for x in inputs])


def test_lambda_average_is_the_lambda_return_of_expectations(pair):
    mdp, agent = pair
    parts = bound_parts(mdp, agent, 4)
    step = (1 - mdp.gamma)[:, None] * parts.log_reward - parts.kl
    expected = functional.lambda_return(step, parts.log_value[:, 1:], mdp.gamma, 0.7)[
        :, 0
    ]
    same(lambda_bound(mdp, agent, 0.7, horizon=4), expected)
    bound = functional.k_step_bound(step, parts.log_value[:, -1], mdp.gamma)
    same(lower_bound(mdp, agent, 4), bound)


def test_gamma_zero_leaves_the_first_reward(pair):
    mdp, agent = pair
    mdp = replace(mdp, gamma=torch.zeros(6).double())
    first = (mdp.initial[..., None] * agent.state_policy * mdp.reward).sum((-2, -1))
    same(expected_return(mdp, agent.state_policy), first)
    parts = bound_parts(mdp, agent, 20)
    same(lower_bound(mdp, agent, 20, kl_weight="tight"), parts.log_reward[:, 0])
    same(lower_bound(mdp, agent, 20), parts.log_reward[:, 0] - parts.kl[:, 0])


def test_missing_support_costs_everything_unless_it_is_never_met():
    """From latent 1 the model may go where the encoder of state 1 never does."""
    kernel = double([[[1.0, 0.0]], [[0.0, 1.0]]])
    mdp = FiniteMDP(double([1.0, 0.0]), kernel, double([[1.0], [2.0]]), double(0.9))
    sure = double([[1.0, 0.0], [0.0, 1.0]])
    wanders = double([[[1.0, 0.0]], [[0.5, 0.5]]])
    agent = LatentAgent(sure, wanders, torch.ones(2, 1).double())
    assert lower_bound(mdp, agent, 5).item() == pytest.approx(0.0)
    assert lambda_bound(mdp, agent, 0.9).item() == pytest.approx(0.0)
    met = replace(mdp, initial=double([0.5, 0.5]))
    assert lower_bound(met, agent, 5).item() == -torch.inf
    assert lambda_bound(met, agent, 0.9).item() == -torch.inf
    assert lambda_bound(met, agent, 0.0).item() == -torch.inf


# -- Practice ------------------------------------------------------------------------


def test_gaps_change_one_thing_each(pair):
    mdp, agent = pair
    data = discounted_visits(mdp, agent.state_policy)
    other = random_agent(6, 3, 4, 2, generator=torch.Generator().manual_seed(9))
    gaps = approximation_gaps(mdp, agent, 3, data=data, target_encoder=other.encoder)
    exact = lower_bound(mdp, agent, 3).exp()
    truth = expected_return(mdp, agent.state_policy)
    same(gaps["exact"], exact / truth - 1)
    assert all(bool((gaps[name] != gaps["exact"]).all()) for name in list(gaps)[1:])
    # A smaller coefficient and a classifier can only raise the estimate here.
    assert bool((gaps["coefficient"] > gaps["exact"]).all())
    unchanged = approximation_gaps(
        mdp, agent, 3, data=data, target_encoder=agent.encoder, classifier_coef=1.0
    )
    same(unchanged["coefficient"], gaps["exact"])
    same(unchanged["target encoder"], gaps["exact"])


def test_latents_that_show_the_state_learn_exact_tables(pair):
    mdp, _ = pair
    agent = random_agent(6, 3, 3, 2, generator=torch.Generator().manual_seed(1))
    shows = torch.eye(3).double().expand(6, 3, 3).contiguous()
    agent = LatentAgent(shows, mdp.kernel, agent.policy)
    data = torch.full((6, 3, 2), 1 / 6, dtype=torch.float64)
    gaps = approximation_gaps(mdp, agent, 2, data=data, target_encoder=shows)
    # The true divergence is infinite, as the next state is not known; no classifier
    # can tell, and every estimate of practice is exact.
    assert bool((gaps["exact"] == -1).all())
    same(classifier_log_ratio(mdp, agent, data), torch.zeros(6, 3, 2, 3).double())
    same(gaps["in practice"], torch.zeros(6).double(), atol=1e-12, rtol=0)


# -- Ascent --------------------------------------------------------------------------


def test_ascent_reaches_the_best_bound_where_it_is_known():
    """One state: the best action for ever, and latents that foretell themselves."""
    generator = torch.Generator().manual_seed(0)
    mdp = random_mdp(5, 1, 3, generator=generator, gamma=0.8)
    agent = random_agent(5, 1, 2, 3, generator=generator)
    result = ascend(mdp, agent, 2, steps=100, lr=0.2)
    same(result.bound[:, 0], lower_bound(mdp, agent, 2))
    same(result.log_optimum, mdp.reward.amax((-2, -1)).log())
    same(result.bound[:, -1], result.log_optimum, atol=0.02, rtol=0)
    assert bool((result.efficiency > 0.98).all())
    assert bool((result.efficiency <= 1).all())


def test_ascent_raises_bound_and_return_below_the_optimum(pair):
    mdp, agent = pair
    result = ascend(mdp, agent, 3, steps=40)
    assert bool((result.bound[:, -1] > result.bound[:, 0] + 0.1).all())
    assert bool((result.bound <= result.log_return).all())
    assert bool((result.log_return <= result.log_optimum[:, None]).all())
    assert result.log_return[:, -1].mean() > result.log_return[:, 0].mean()
    last = result.agent
    same(lower_bound(mdp, last, 3), result.bound[:, -1])
    same(expected_return(mdp, last.state_policy).log(), result.log_return[:, -1])
    # The other problems of the batch have no say.
    single = FiniteMDP(*(x[:1] for x in vars(mdp).values()))
    alone = ascend(
        single, LatentAgent(*(x[:1] for x in vars(agent).values())), 3, steps=40
    )
    same(alone.bound[0], result.bound[0], atol=1e-9, rtol=1e-9)


def test_nothing_above_is_needed():
    """No part of the package imports more of the library than `functional`."""
    allowed = ("alm_torchrl.bounds", "alm_torchrl.functional")
    for path in Path(bounds.__file__).parent.glob("*.py"):
        used = re.findall(r"(?:from|import) (alm_torchrl[.\w]*)", path.read_text())
        assert all(name.startswith(allowed) for name in used)
