"""Whether a loss fits the environments and modes that a trainer is made with."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl.baselines.losses import BaselineLoss
from alm_torchrl.objectives import ALMLoss

__all__ = ["check_fit", "check_modes"]


def check_modes(
    agent: str, *, precision: str, compile: bool, cudagraph: bool | None
) -> None:
    """Refuses the modes of an update that only ALM has."""
    for name, value, allowed in (
        ("precision", precision, ("fp32",)),
        ("compile", compile, (False,)),
        ("cudagraph", cudagraph, (None, False)),
    ):
        if value not in allowed:
            raise ValueError(
                f"{name}: expected {allowed[-1]!r} with {agent}, whose updates run "
                f"eagerly in full precision, got {value!r}."
            )


def check_fit(name: str, env: EnvBase, loss: ALMLoss | BaselineLoss) -> None:
    """Lets the networks act once, as they will only after the warm-up."""
    device = next(loss.parameters()).device
    observation = env.observation_spec.zero().to(device)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        action = _act(loss, observation)
    expected = env.full_action_spec[env.action_key].shape
    if action.shape != expected:
        raise ValueError(
            f"loss: expected actions of shape {list(expected)}, those of {name}, got "
            f"{list(action.shape)}."
        )


def _act(loss: ALMLoss | BaselineLoss, observation: TensorDictBase) -> Tensor:
    if isinstance(loss, BaselineLoss):
        return loss.act(observation)
    # The methods of the loss have the better errors.
    latents, policy = loss.latents, loss.acting_policy()
    latents.act(latents.sample(latents.encode(observation, "live")))
    return policy(observation)[loss.tensor_keys.action]
