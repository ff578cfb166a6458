"""A small ALMLoss and random batches for it, shared by the tests of the loss."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from alm_torchrl import ALMLoss, NoiseSchedule, make_alm_loss

OBSERVATION, ACTION, LATENT, HIDDEN = 3, 2, 4, 8
B, K = 6, 3

# The parts that each term trains.
TRAINS = {
    "loss_model": {"encoder", "model"},
    "loss_reward": {"reward"},
    "loss_classifier": {"classifier"},
    "loss_qvalue": {"qvalue"},
    "loss_actor": {"actor"},
}
METHODS = {name: f"{name.removeprefix('loss_')}_loss" for name in TRAINS}
TARGETS = ("encoder", "qvalue")


def make_loss(*, updater: bool = True, noise: float = 0.2, **kwargs) -> ALMLoss:
    """A tiny loss whose targets differ from the online networks."""
    loss = make_alm_loss(
        observation_dim=OBSERVATION,
        action_low=[-1.0] * ACTION,
        action_high=[1.0] * ACTION,
        latent_dim=LATENT,
        hidden_dim=HIDDEN,
        model_hidden_dim=HIDDEN,
        noise_schedule=NoiseSchedule(noise, noise / 2, steps=10),
        **kwargs,
    )
    if updater:
        SoftUpdate(loss, tau=0.005)
    for part in TARGETS:
        for target in loss._modules[f"target_{part}_params"].values(True, True):
            target.data.add_(0.05 * torch.randn_like(target))
    return loss


def make_rows(*shape: int) -> TensorDict:
    """Transitions ``[*shape]``, about a third of them terminated."""
    return TensorDict(
        {
            "observation": torch.randn(*shape, OBSERVATION),
            "action": 2 * torch.rand(*shape, ACTION) - 1,
            "next": {
                "observation": torch.randn(*shape, OBSERVATION),
                "reward": torch.randn(*shape, 1),
                "terminated": torch.rand(*shape, 1) < 0.3,
            },
        },
        batch_size=shape,
    )


def make_batch(
    batch: int = B, horizon: int = K, *, imagined: bool = False
) -> TensorDict:
    """A two-draw batch, with the classifier's half fixed where ``imagined``."""
    transition = make_rows(batch)
    if imagined:
        transition["imagined"] = torch.arange(batch) % 2 == 0
    return TensorDict(
        slice=make_rows(batch, horizon), transition=transition, batch_size=[batch]
    )


def gradients(loss: ALMLoss) -> dict[str, torch.Tensor]:
    """Gradients by parameter name, copied; those that there are."""
    return {
        name: param.grad.clone()
        for name, param in loss.named_parameters()
        if param.grad is not None
    }


def total(losses: TensorDict) -> torch.Tensor:
    """Sum of the terms that ``forward`` returned, each summed up."""
    return sum(losses[key].sum() for key in losses.keys() if key[:5] == "loss_")
