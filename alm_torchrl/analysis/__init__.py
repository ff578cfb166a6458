"""What a trained agent has learned: its bound, its latent model, its latents.

The functions read modules and return TensorDicts. Like
:func:`~alm_torchrl.evaluate_policy` they have a random stream of their own and leave no
trace in a training run.
"""

from alm_torchrl.analysis.bias import (
    bias_summary,
    bound_bias,
    normalised_bias,
)
from alm_torchrl.analysis.recording import record_transitions
from alm_torchrl.analysis.rollouts import latent_rollout
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
