"""The networks of ALM: layers, heads, the noise schedule, and their builders."""

from alm_torchrl.networks.builders import (
    make_actor,
    make_classifier,
    make_decoder,
    make_encoder,
    make_identity_encoder,
    make_model,
    make_qvalue,
    make_reward,
    make_stochastic_actor,
)
from alm_torchrl.networks.layers import AlwaysSample, NoiseSchedule, OrthogonalLinear

__all__ = [
    "AlwaysSample",
    "NoiseSchedule",
    "OrthogonalLinear",
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
