"""Aligned Latent Models as modular TorchRL components."""

from alm_torchrl.baselines.builders import make_redq_loss, make_sac_loss, make_td3_loss
from alm_torchrl.distributions import ClampedNormal
from alm_torchrl.envs import make_env
from alm_torchrl.envs.dynamics_noise import DynamicsNoise
from alm_torchrl.evaluation import evaluate_policy, random_policy, zero_policy
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
from alm_torchrl.objectives import ALMLoss, make_alm_loss
from alm_torchrl.replay import UniformWindowSampler, make_replay_buffer
from alm_torchrl.runs.loading import ActingPolicy, load_policy
from alm_torchrl.training.baseline_stepper import BaselineOptimizationStepper
from alm_torchrl.training.checkpoint import VerifiedCheckpoint
from alm_torchrl.training.episode import CollectorState, EpisodeEnv
from alm_torchrl.training.stepper import (
    ALMOptimizationStepper,
    NonFiniteError,
)
from alm_torchrl.training.trainer import ALMTrainer, make_trainer

__version__ = "0.1.0"

__all__ = [
    "ALMLoss",
    "ALMOptimizationStepper",
    "ALMTrainer",
    "ActingPolicy",
    "AlwaysSample",
    "BaselineOptimizationStepper",
    "ClampedNormal",
    "CollectorState",
    "DynamicsNoise",
    "EpisodeEnv",
    "NoiseSchedule",
    "NonFiniteError",
    "OrthogonalLinear",
    "UniformWindowSampler",
    "VerifiedCheckpoint",
    "evaluate_policy",
    "load_policy",
    "make_actor",
    "make_alm_loss",
    "make_classifier",
    "make_decoder",
    "make_encoder",
    "make_env",
    "make_identity_encoder",
    "make_model",
    "make_qvalue",
    "make_redq_loss",
    "make_replay_buffer",
    "make_reward",
    "make_sac_loss",
    "make_stochastic_actor",
    "make_td3_loss",
    "make_trainer",
    "random_policy",
    "zero_policy",
]
