"""Every claim holds on random problems, and every broken version is found out."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.bounds.claims import CLAIMS
from tests.bounds.problems import BATCH, DRAWN, make_problem

# Rounding is amplified by up to 1 / (1 - gamma), here 1e6.
TOLERANCE = 1e-8
BROKEN = [(name, how) for name, claim in CLAIMS.items() for how in claim.broken]


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
    worst_slack(CLAIMS[name].holds, examples=4)


@pytest.mark.parametrize(("name", "how"), BROKEN)
def test_broken_claim_fails(name, how):
    with pytest.raises(AssertionError):
        worst_slack(CLAIMS[name].broken[how], examples=100)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_claim_holds_for_a_thousand_problems(name, capsys):
    worst, count = worst_slack(CLAIMS[name].holds, examples=1000 // BATCH)
    assert count >= 1000
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: worst slack {worst:.1e} over {count} problems ")
