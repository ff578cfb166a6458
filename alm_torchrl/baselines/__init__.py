"""TD3, SAC and REDQ from TorchRL's losses, trained and scored as ALM is."""

from alm_torchrl.baselines.builders import (
    make_redq_loss,
    make_sac_loss,
    make_td3_loss,
)
from alm_torchrl.baselines.losses import (
    BaselineLoss,
    REDQBaseline,
    SACBaseline,
    TD3Baseline,
)

__all__ = [
    "BaselineLoss",
    "REDQBaseline",
    "SACBaseline",
    "TD3Baseline",
    "make_redq_loss",
    "make_sac_loss",
    "make_td3_loss",
]
