"""The ALM objective as a TorchRL loss module, and a builder for it."""

from alm_torchrl.objectives.alm import ALMLoss
from alm_torchrl.objectives.builder import make_alm_loss
from alm_torchrl.objectives.networks import ALMNetworks

__all__ = ["ALMLoss", "ALMNetworks", "make_alm_loss"]
