"""x."""

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
