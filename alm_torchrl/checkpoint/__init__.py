"""Checkpoints that are checked, complete and shared: saving, resuming, acting."""

from alm_torchrl.checkpoint.collector import CollectorState
from alm_torchrl.checkpoint.loading import (
    ActingPolicy,
    build_loss,
    checkpoint_metadata,
    describe_spaces,
    find_checkpoint,
    load_loss,
    load_policy,
    usable_checkpoints,
)
from alm_torchrl.checkpoint.random_state import RandomState
from alm_torchrl.checkpoint.replay import ReplayAdapter
from alm_torchrl.checkpoint.verified import (
    StateAdapter,
    VerifiedCheckpoint,
    clear_leftovers,
)

__all__ = [
    "ActingPolicy",
    "CollectorState",
    "RandomState",
    "ReplayAdapter",
    "StateAdapter",
    "VerifiedCheckpoint",
    "build_loss",
    "checkpoint_metadata",
    "clear_leftovers",
    "describe_spaces",
    "find_checkpoint",
    "load_loss",
    "load_policy",
    "usable_checkpoints",
]
