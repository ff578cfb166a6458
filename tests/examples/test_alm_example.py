"""examples/alm.py: its update is the library's, its slices are whole, it runs."""

from __future__ import annotations

import ast
import dataclasses
import re

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from alm_torchrl import ALMOptimizationStepper, make_alm_loss
from benchmarks.sizes import EXAMPLE, alm

OBSERVATION, ACTION = 5, 2
TINY = alm.Args(
    latent_dim=4,
    hidden_dim=8,
    model_hidden_dim=12,
    batch_size=7,
    warmup_steps=20,
    total_steps=4,
    eval_interval=2,
    eval_episodes=1,
)
# Parts of the loss, and the example's networks.
NETWORKS = {
    "encoder": "encoder",
    "model": "model",
    "actor": "actor",
    "reward": "reward",
    "classifier": "classifier",
    "qvalue": "critics",
    "target_encoder": "target_encoder",
    "target_qvalue": "target_critics",
}


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    """The type of all numbers, also of the coefficients in the loss."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def pairs(loss, agent):
    """Name, the library's parameter and the example's, of networks and targets."""
    for part, name in NETWORKS.items():
        ours = getattr(loss, f"{part}_params").parameters()
        if part.startswith("target_"):
            ours = getattr(loss, f"{part}_params").flatten_keys().values()
            order = getattr(loss, f"{part[7:]}_params").flatten_keys().keys()
            values = getattr(loss, f"{part}_params").flatten_keys()
            ours = [values[key] for key in order]
        theirs = getattr(agent, name).parameters()
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            yield f"{name} {number}", *pair
