"""Gymnasium tasks as TorchRL environments, the paper's tasks, dynamics noise."""

from alm_torchrl.envs.dynamics_noise import DynamicsNoise
from alm_torchrl.envs.gym import make_env
from alm_torchrl.envs.lockstep import LockstepEnv
from alm_torchrl.envs.normalizers import Normalizers
from alm_torchrl.envs.tasks import TASKS, Task

__all__ = ["TASKS", "DynamicsNoise", "LockstepEnv", "Normalizers", "Task", "make_env"]
