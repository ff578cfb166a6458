from .baselines.builders import make_redq_loss, make_sac_loss, make_td3_loss
from .distributions import ClampedNormal
from .envs import make_env
from .envs.dynamics_noise import DynamicsNoise
from .evaluation import evaluate_policy, random_policy, zero_policy
from .networks.actors import make_actor, make_stochastic_actor
from .networks.builders import (
    make_classifier,
    make_decoder,
    make_encoder,
    make_identity_encoder,
    make_model,
    make_qvalue,
    make_reward,
)
from .networks.layers import AlwaysSample, NoiseSchedule, OrthogonalLinear
from .objectives import ALMLoss, make_alm_loss
from .replay import UniformWindowSampler, make_replay_buffer
from .runs.loading import ActingPolicy, load_policy
from .training.alm_trainer import ALMTrainer
from .training.baseline_stepper import BaselineOptimizationStepper
from .training.checkpoint import VerifiedCheckpoint
from .training.episode import CollectorState, EpisodeEnv
from .training.stepper import (
    ALMOptimizationStepper,
    NonFiniteError,
)
from .training.trainer import make_trainer

__version__: str

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
