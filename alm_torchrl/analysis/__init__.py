"""What a trained agent has learned: its bound, its latent model and its latents.

The functions take an environment and a loss, and return TensorDicts. Like
:func:`~alm_torchrl.evaluate_policy` they use their own random stream and leave no trace
in a training run. :mod:`alm_torchrl.analysis.figures` draws what they return.
"""

from alm_torchrl.analysis.bias import bias_summary, bound_bias, normalised_bias
from alm_torchrl.analysis.rollouts import latent_rollout, record_transitions
from alm_torchrl.analysis.statistics import (
    calibration_error,
    latent_statistics,
    participation_ratio,
    reliability,
)

__all__ = [
    "bias_summary",
    "bound_bias",
    "calibration_error",
    "latent_rollout",
    "latent_statistics",
    "normalised_bias",
    "participation_ratio",
    "record_transitions",
    "reliability",
]
