"""The private names of TorchRL that checkpoints and the trainer need.

``tests/test_compat.py`` says which feature breaks when one of them goes.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import torch
from torchrl.checkpoint._checkpoint import _decode_state_dict_value as decode_state
from torchrl.checkpoint._checkpoint import _encode_state_dict_value as encode_state
from torchrl.data import ReplayBuffer
from torchrl.trainers import Trainer

__all__ = [
    "decode_state",
    "encode_state",
    "generator_of",
    "keep_last_logs",
    "uncount_update",
]


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
