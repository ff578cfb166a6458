"""The claims of section 3.3 and appendix A, each with versions to be found out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from tests.bounds.problems import Problem
from tests.bounds.statements import (
    any_discount,
    best_discount,
    best_dynamics,
    classifier_hides_divergence,
    excess,
    improvement,
    lambda_average,
    lambda_average_without_kl,
    lambda_weights_that_sum_to_more,
    lemma_a1,
    lemma_a2,
    lemma_a3,
    log_omission,
    longer_is_looser,
    negative_kl,
    no_kl,
    offline,
    offline_printed_with_the_first_action,
    one_step_inequality,
    optimism,
    optimum,
    printed,
    shifted_objective,
    shifted_values,
    swapped_kl,
    theorem,
    tight,
    tight_at_the_optimum,
    tight_with_the_discount_alone,
    tight_with_the_geometric_discount,
    tight_without_horizon_zero,
    two_ways_to_the_return,
    unnormalised,
)


@dataclass(frozen=True)
class Claim:
    holds: Callable[[Problem], Tensor]
    broken: dict[str, Callable[[Problem], Tensor]]


CLAIMS = {
    "Lemma A.1": Claim(
        lemma_a1,
        {"one term fewer, same weights": partial(lemma_a1, last=1)},
    ),
    "Lemma A.1 with H terms": Claim(
        partial(lemma_a1, last=1, power=1),
        {"one term more, same weights": partial(lemma_a1, power=1)},
    ),
    "Lemma A.2": Claim(
        lemma_a2,
        {
            "gamma^(t-1) as printed": partial(lemma_a2, power=-1),
            "Q without (1 - gamma)": partial(lemma_a2, normalised=False),
        },
    ),
    "Eq. 1 = Eq. 2": Claim(
        two_ways_to_the_return,
        {"forget (1 - gamma)": partial(two_ways_to_the_return, normalised=False)},
    ),
    "Lemma A.3": Claim(lemma_a3, {"twice the entropy": partial(lemma_a3, entropy=2.0)}),
    "Theorem 3.1": Claim(
        printed,
        {
            "drop the KL": partial(theorem, kl=no_kl),
            "swap the KL": partial(theorem, kl=swapped_kl),
            "flip the KL's sign": partial(theorem, kl=negative_kl),
            "forget (1 - gamma) in r": partial(theorem, rate=False),
            "forget (1 - gamma) in Q": unnormalised,
        },
    ),
    "Theorem 3.1, gamma^(t+1)": Claim(
        tight,
        {
            "drop the KL": partial(theorem, kl=no_kl),
            "swap the KL": partial(theorem, kl=swapped_kl, kl_power=1),
            "forget (1 - gamma) in r": partial(theorem, kl_power=1, rate=False),
        },
    ),
    "improvement": Claim(
        improvement, {"forget (1 - gamma)": partial(improvement, factor=2.0)}
    ),
    "Lemma A.4": Claim(
        lambda_average,
        {
            "drop the KL": lambda_average_without_kl,
            "forget (1 - lambda)": lambda_weights_that_sum_to_more,
        },
    ),
    "Lemma A.4, cut at K": Claim(
        partial(lambda_average, cut=True),
        {"drop the KL": lambda_average_without_kl},
    ),
    "Lemma A.4, gamma^(t+1)": Claim(
        partial(lambda_average, weight="tight"),
        {"forget (1 - lambda)": lambda_weights_that_sum_to_more},
    ),
    "A.4 (c), any discount": Claim(
        any_discount,
        {
            "forget P_K": partial(any_discount, prior=False),
            "drop the KL": partial(any_discount, kl=False),
        },
    ),
    "A.4 (g), best discount": Claim(
        best_discount, {"the other way round": partial(best_discount, swap=True)}
    ),
    "A.4 (d), best dynamics": Claim(
        best_dynamics, {"the other way round": partial(best_dynamics, swap=True)}
    ),
    "A.4, optimism": Claim(
        optimism, {"the other way round": partial(optimism, swap=True)}
    ),
    "A.5": Claim(
        tight_at_the_optimum,
        {
            "geometric discount": tight_with_the_geometric_discount,
            "H = 0 left out, as printed": tight_without_horizon_zero,
            "discount alone, as in 3.3": tight_with_the_discount_alone,
        },
    ),
    "A.6": Claim(
        longer_is_looser,
        {
            "the other way round": partial(longer_is_looser, swap=True),
            "forget (1 - gamma)": partial(longer_is_looser, rate=False),
        },
    ),
    "A.6, gamma^(t+1)": Claim(
        partial(longer_is_looser, weight="tight"),
        {"the other way round": partial(longer_is_looser, weight="tight", swap=True)},
    ),
    "A.6, one step": Claim(
        one_step_inequality,
        {
            "gamma^(K+1) as printed": partial(one_step_inequality, value_power=2),
            "drop the KL": partial(one_step_inequality, kl_power=200),
        },
    ),
    "A.7": Claim(
        offline,
        {
            "without the first action, as printed": partial(offline, form="printed"),
            "drop the cloning": partial(offline, cloning=False),
        },
    ),
    "A.7, printed with the first action": Claim(
        offline_printed_with_the_first_action,
        {"without it": partial(offline, form="printed")},
    ),
    "A.8, rewards": Claim(
        log_omission, {"half the limit": partial(log_omission, factor=0.25)}
    ),
    "A.8, values": Claim(
        shifted_values,
        {"forget (1 - gamma)": partial(shifted_values, normalised=False)},
    ),
    "A.8, objective": Claim(
        shifted_objective,
        {"a tenth of the limit": partial(shifted_objective, factor=0.05)},
    ),
    "no logs": Claim(
        excess,
        {
            "a lower bound": partial(excess, factor=0.0),
            "drop the KL": partial(excess, kl_coef=0.0),
        },
    ),
    "optimal return": Claim(
        optimum, {"the other way round": partial(optimum, swap=True)}
    ),
    "classifier": Claim(
        classifier_hides_divergence,
        {"the other way round": partial(classifier_hides_divergence, swap=True)},
    ),
}
