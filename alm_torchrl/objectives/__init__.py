"""The ALM objective as a TorchRL loss module, and a builder for it."""

from alm_torchrl.objectives.alm import ALMLoss
from alm_torchrl.objectives.builder import make_alm_loss

__all__ = ["ALMLoss", "make_alm_loss"]
