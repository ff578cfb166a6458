"""Tiny losses of the baselines and batches for them, shared by their tests."""

from __future__ import annotations

import functools

import torch
from tensordict import TensorDict

from alm_torchrl import NoiseSchedule
from alm_torchrl.baselines.builders import make_redq_loss, make_sac_loss, make_td3_loss

AGENTS = ("td3", "sac", "redq")
PARTS = ("actor_network_params", "qvalue_network_params", "log_alpha")
SIZES = {"observation_dim": 3, "action_low": [-1.0, -0.4], "action_high": [1.0, 0.4]}
ENSEMBLE = {"num_qvalue_nets": 4, "updates_per_step": 3}
MAKERS = {
    "td3": make_td3_loss,
    "sac": make_sac_loss,
    "redq": functools.partial(make_redq_loss, **ENSEMBLE),
}


def make_loss(agent, env=None, seed=0, **kwargs):
    torch.manual_seed(seed)
    if agent == "td3":
        kwargs = {"noise_schedule": NoiseSchedule(1.0, 0.2, steps=4), **kwargs}
    sizes = SIZES if env is None else {"env": env}
    return MAKERS[agent](**sizes, hidden_dim=8, **kwargs)


def make_batch(rows, loss=None):
    """Random transitions, enough for one step of a loss if one is given."""
    rows *= 1 if loss is None else loss.updates_per_step
    flags = torch.rand(rows, 1) < 0.3
    ends = {"reward": torch.randn(rows, 1), "terminated": flags, "done": flags}
    return TensorDict(
        {
            "observation": torch.randn(rows, 3),
            "action": torch.rand(rows, 2) * 2 - 1,
            "next": {"observation": torch.randn(rows, 3), **ends},
        },
        batch_size=[rows],
    )


def snapshot(loss):
    return {name: leaf.clone() for name, leaf in loss.state_dict().items()}


def changed(loss, before):
    """The parts of a loss whose entries differ from those in ``before``."""
    now = loss.state_dict()
    return {
        name.partition(".")[0]
        for name in now
        if not torch.equal(now[name], before[name])
    }
