"""The networks of ALM: layers, heads, the noise schedule, and their builders."""

from alm_torchrl.networks.actors import make_actor, make_stochastic_actor
from alm_torchrl.networks.builders import (
    make_classifier,
    make_decoder,
    make_encoder,
    make_identity_encoder,
    make_model,
    make_qvalue,
    make_reward,
)
from alm_torchrl.networks.layers import AlwaysSample, NoiseSchedule, OrthogonalLinear
from alm_torchrl.networks.running_norm import RunningNorm

__all__ = [
    "AlwaysSample",
    "NoiseSchedule",
    "OrthogonalLinear",
    "RunningNorm",
    "make_actor",
    "make_classifier",
    "make_decoder",
    "make_encoder",
    "make_identity_encoder",
    "make_model",
    "make_qvalue",
    "make_reward",
    "make_stochastic_actor",
]
