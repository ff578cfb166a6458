"""The ALM objective as a TorchRL loss, its exchangeable parts, and a builder."""

from alm_torchrl.objectives.alm import ALMLoss
from alm_torchrl.objectives.builder import make_alm_loss
from alm_torchrl.objectives.critics import HLGauss, HuberError, TDTarget
from alm_torchrl.objectives.latents import Encoding
from alm_torchrl.objectives.model_terms import (
    Consistency,
    InfoNCE,
    Reconstruction,
    RewardFidelity,
    ValuePrediction,
)
from alm_torchrl.objectives.rewards import RewardScale
from alm_torchrl.objectives.variants import (
    EntropyBonus,
    Logarithms,
    QValueObjective,
    ScaledObjective,
)

__all__ = [
    "ALMLoss",
    "Consistency",
    "Encoding",
    "EntropyBonus",
    "HLGauss",
    "HuberError",
    "InfoNCE",
    "Logarithms",
    "QValueObjective",
    "Reconstruction",
    "RewardFidelity",
    "RewardScale",
    "ScaledObjective",
    "TDTarget",
    "ValuePrediction",
    "make_alm_loss",
]
