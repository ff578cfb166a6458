"""Aligned Latent Models as modular TorchRL components."""

from alm_torchrl.objectives import ALMLoss, make_alm_loss
from alm_torchrl.stepper import ALMOptimizationStepper
