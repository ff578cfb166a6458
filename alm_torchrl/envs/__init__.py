"""Gymnasium tasks as TorchRL environments, the paper's tasks, dynamics noise."""

from alm_torchrl.envs.dynamics_noise import DynamicsNoise
from alm_torchrl.envs.gym import TASKS, Task, make_env

__all__ = ["TASKS", "DynamicsNoise", "Task", "make_env"]
