"""The private names of TorchRL that checkpoints, episodes and the trainer need.

``tests/test_compat.py`` says which feature breaks when one of them goes.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.checkpoint._checkpoint import (
    _decode_state_dict_value,
    _encode_state_dict_value,
)
from torchrl.collectors import Collector
from torchrl.data import ReplayBuffer
from torchrl.envs import EnvBase, GymWrapper, SerialEnv
from torchrl.trainers import Trainer

__all__ = [
    "decode_state",
    "encode_state",
    "generator_of",
    "get_carrier",
    "gymnasium_env",
    "keep_last_logs",
    "serial_workers",
    "set_carrier",
    "set_trajectories",
    "uncount_update",
]


def encode_state(state: Any, tensors: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """Nested state as JSON values; its tensors and arrays go to ``tensors``."""
    return _encode_state_dict_value(state, tensors)


def decode_state(
    schema: Any,  # noqa: ANN401
    tensors: Mapping[str, Tensor],
    map_location: object,
) -> Any:  # noqa: ANN401
    """Makes again what :func:`encode_state` took apart."""
    return _decode_state_dict_value(schema, tensors, map_location)


def get_carrier(collector: Collector) -> TensorDictBase:
    """What a collector carries from one step to the next."""
    carrier: TensorDictBase = collector._carrier
    return carrier


def set_carrier(collector: Collector, carrier: TensorDictBase) -> None:
    """Has a collector go on from ``carrier``."""
    collector._carrier = carrier


def set_trajectories(collector: Collector, state: Mapping[str, Any]) -> None:
    """Sets a collector's count of trajectories."""
    collector._traj_pool.load_state_dict(state)


def gymnasium_env(env: GymWrapper) -> Any:  # noqa: ANN401
    """The environment that a ``GymWrapper`` wraps."""
    return env._env


def serial_workers(env: SerialEnv) -> list[EnvBase]:
    """The environments of a ``SerialEnv`` that has been started."""
    workers: list[EnvBase] = env._envs
    return workers


def generator_of(buffer: ReplayBuffer) -> torch.Generator | None:
    """The generator that a replay buffer draws with, if it has one of its own."""
    generator: torch.Generator | None = buffer._rng
    return generator


def keep_last_logs(trainer: Trainer) -> None:
    """Has a trainer keep the last logged value of each name only.

    By default it keeps every value, and shares the times of the last log with all
    trainers of the process.
    """
    logs: defaultdict[str, Any] = defaultdict(lambda: deque(maxlen=1))
    trainer._log_dict = logs
    trainer._last_log = {}


def uncount_update(trainer: Trainer) -> None:
    """Takes back one from a trainer's count of updates."""
    trainer._optim_count -= 1
