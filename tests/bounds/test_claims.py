"""The claims of section 3.3 and appendix A: each holds, each broken version fails."""

from __future__ import annotations

import math
import sys
from functools import partial

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.bounds import statements as s
from tests.bounds.problems import BATCH, DRAWN, make_problem

# Rounding is amplified by up to 1 / (1 - gamma), here 1e6.
TOLERANCE = 1e-8
FLIPPED = "the other way round"

# By name: the statement, and versions of it that do not hold.
CLAIMS = {
    "Lemma A.1": (s.lemma_a1, {"one term fewer": partial(s.lemma_a1, last=1)}),
    "Lemma A.1 with H terms": (
        partial(s.lemma_a1, last=1, power=1),
        {"one term more": partial(s.lemma_a1, power=1)},
    ),
    "Lemma A.2": (
        s.lemma_a2,
        {
            "gamma^(t-1) as printed": partial(s.lemma_a2, power=-1),
            "Q without (1 - gamma)": partial(s.lemma_a2, normalised=False),
        },
    ),
    "Eq. 1 = Eq. 2": (
        s.two_ways_to_the_return,
        {"forget (1 - gamma)": partial(s.two_ways_to_the_return, normalised=False)},
    ),
    "Lemma A.3": (s.lemma_a3, {"twice the entropy": partial(s.lemma_a3, entropy=2.0)}),
    "Theorem 3.1": (
        s.printed,
        {
            "drop the KL": partial(s.theorem, kl_sign=0),
            "swap the KL": partial(s.theorem, swap_kl=True),
            "flip the KL's sign": partial(s.theorem, kl_sign=-1),
            "forget (1 - gamma) in r": partial(s.theorem, rate=False),
            "forget (1 - gamma) in Q": partial(s.theorem, normalised=False),
        },
    ),
    "Theorem 3.1, gamma^(t+1)": (
        s.tight,
        {
            "swap the KL": partial(s.theorem, swap_kl=True, kl_power=1),
            "forget (1 - gamma) in r": partial(s.theorem, kl_power=1, rate=False),
        },
    ),
    "improvement": (
        s.improvement,
        {"forget (1 - gamma)": partial(s.improvement, factor=2.0)},
    ),
    "Lemma A.4": (
        s.lambda_average,
        {
            "drop the KL": partial(s.lambda_average_by_hand, kl=False),
            "forget (1 - lambda)": partial(s.lambda_average_by_hand, share=False),
        },
    ),
    "Lemma A.4, cut at K": (partial(s.lambda_average, cut=True), {}),
    "Lemma A.4, gamma^(t+1)": (partial(s.lambda_average, weight="tight"), {}),
    "A.4 (c), any discount": (
        s.any_discount,
        {
            "forget P_K": partial(s.any_discount, prior=False),
            "drop the KL": partial(s.any_discount, kl=False),
        },
    ),
    "A.4 (g), best discount": (
        s.best_discount,
        {FLIPPED: partial(s.best_discount, swap=True)},
    ),
    "A.4 (d), best dynamics": (
        s.best_dynamics,
        {FLIPPED: partial(s.best_dynamics, swap=True)},
    ),
    "A.4, optimism": (s.optimism, {FLIPPED: partial(s.optimism, swap=True)}),
    "A.5": (
        s.tight_at_the_optimum,
        {
            "geometric discount": partial(s.tightness, geometric=True),
            "H = 0 left out, as printed": partial(s.tightness, dynamics="H >= 1"),
            "discount alone, as in 3.3": partial(s.tightness, dynamics="Eq. 4"),
        },
    ),
    "A.6": (
        s.longer_is_looser,
        {
            FLIPPED: partial(s.longer_is_looser, swap=True),
            "forget (1 - gamma)": partial(s.longer_is_looser, rate=False),
        },
    ),
    "A.6, gamma^(t+1)": (partial(s.longer_is_looser, weight="tight"), {}),
    "A.6, one step": (
        s.one_step_inequality,
        {
            "gamma^(K+1) as printed": partial(s.one_step_inequality, value_power=2),
            "drop the KL": partial(s.one_step_inequality, kl_power=200),
        },
    ),
    "A.7": (
        s.offline,
        {
            "without the first action, as printed": partial(s.offline, form="printed"),
            "drop the cloning": partial(s.offline, cloning=False),
        },
    ),
    "A.7, printed with the first action": (
        partial(s.offline, form="printed", first_action=True),
        {},
    ),
    "A.8, rewards": (
        s.log_omission,
        {"half the limit": partial(s.log_omission, factor=0.25)},
    ),
    "A.8, values": (
        s.shifted_values,
        {"forget (1 - gamma)": partial(s.shifted_values, normalised=False)},
    ),
    "A.8, objective": (
        s.shifted_objective,
        {"a tenth of the limit": partial(s.shifted_objective, factor=0.05)},
    ),
    "no logs": (
        s.excess,
        {
            "a lower bound": partial(s.excess, factor=0.0),
            "drop the KL": partial(s.excess, kl_coef=0.0),
        },
    ),
    "optimal return": (s.optimum, {FLIPPED: partial(s.optimum, swap=True)}),
    "classifier": (
        s.classifier_hides_divergence,
        {FLIPPED: partial(s.classifier_hides_divergence, swap=True)},
    ),
}


def worst_slack(statement, examples):
    """The smallest slack over ``examples * BATCH`` problems; fails where negative."""
    slacks = []

    @settings(
        max_examples=examples,
        phases=(Phase.generate,),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(**DRAWN)
    def check(**drawn):
        slack = statement(make_problem(**drawn)).min().item()
        if math.isnan(slack):
            raise ValueError("the slack is not a number")
        slacks.append(slack)
        assert slack >= -TOLERANCE, slack

    check()
    return min(slacks), len(slacks) * BATCH


@pytest.mark.parametrize("name", CLAIMS)
def test_claim_holds(name):
    worst_slack(CLAIMS[name][0], examples=4)


@pytest.mark.parametrize(
    ("name", "how"), [(name, how) for name in CLAIMS for how in CLAIMS[name][1]]
)
def test_broken_claim_fails(name, how):
    with pytest.raises(AssertionError):
        worst_slack(CLAIMS[name][1][how], examples=100)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_claim_holds_for_a_thousand_problems(name, capsys):
    worst, count = worst_slack(CLAIMS[name][0], examples=1000 // BATCH)
    assert count >= 1000
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: worst slack {worst:.1e} over {count} problems ")
