"""A small ALMLoss and random batches for it, shared by the tests of the loss."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torchrl.envs.utils import ExplorationType
from torchrl.modules import IndependentNormal
from torchrl.objectives import SoftUpdate

from alm_torchrl import ALMLoss, NoiseSchedule, make_alm_loss

OBSERVATION, ACTION, LATENT, HIDDEN = 3, 2, 4, 8
B, K = 6, 3

PARTS = ("encoder", "model", "actor", "qvalue", "reward", "classifier")
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


def make_loss(
    *,
    updater: bool = True,
    noise: float = 0.2,
    deterministic: bool = False,
    bound: float = 1.0,
    **kwargs,
) -> ALMLoss:
    """A tiny loss whose targets differ from the online networks."""
    learned = kwargs.get("alpha_init") is not None
    loss = make_alm_loss(
        observation_dim=OBSERVATION,
        action_low=[-bound] * ACTION,
        action_high=[bound] * ACTION,
        hidden_dim=HIDDEN,
        model_hidden_dim=HIDDEN,
        noise_schedule=None if learned else NoiseSchedule(noise, 0.0, steps=10),
        **{"latent_dim": LATENT, **kwargs},
    )
    if updater:
        SoftUpdate(loss, tau=0.005)
    for target in targets(loss).values():
        target.data.add_(0.05 * torch.randn_like(target))
    if deterministic:
        loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    return loss


def variant(loss: ALMLoss, **kwargs) -> ALMLoss:
    """Another loss on the same networks, targets and sampling mode, but ``kwargs``."""
    other = ALMLoss(**{**{part: getattr(loss, part) for part in PARTS}, **kwargs})
    SoftUpdate(other, tau=0.005)
    for name, target in targets(other).items():
        if name.split("_")[0] not in kwargs:
            target.data.copy_(targets(loss)[name])
    other.deterministic_sampling_mode = loss.deterministic_sampling_mode
    return other


class Concatenated(nn.Linear):
    """A linear layer on all of its inputs."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.cat(inputs, -1))


class Gaussian(Concatenated):
    """Mean and scale from a linear layer."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, 2 * out_dim)
        self.split = NormalParamExtractor()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.split(super().forward(*inputs))


def probabilistic(
    net: nn.Module, in_keys: list, out_key, distribution: type = IndependentNormal
) -> ProbabilisticTensorDictSequential:
    """A stochastic part of one's own from a network of mean and scale."""
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, in_keys, ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            ["loc", "scale"], [out_key], distribution_class=distribution
        ),
    )


def network(loss: ALMLoss, part: str) -> nn.Module:
    """The plain network inside a part."""
    module = getattr(loss, part)
    return module[0].module if hasattr(module, "get_dist") else module.module


def targets(loss: ALMLoss) -> dict[str, torch.Tensor]:
    """Target parameters by the name of their online twin."""
    prefix = "target_"
    return {
        name.removeprefix(prefix): buffer
        for name, buffer in loss.named_buffers()
        if name.startswith(prefix)
    }


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


def alternate(rows: TensorDict) -> TensorDict:
    """The rows with the classifier's half fixed."""
    order = torch.arange(rows.numel()).reshape(rows.shape)
    return rows.copy().set("imagined", order % 2 == 0)


def make_batch(batch: int = B, horizon: int = K) -> TensorDict:
    """A two-draw batch with the classifier's half fixed."""
    return TensorDict(
        slice=make_rows(batch, horizon),
        transition=alternate(make_rows(batch)),
        batch_size=[batch],
    )


def seeded(function, *args, seed: int = 0, **kwargs):
    """The function's value under a seed of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return function(*args, **kwargs)


def total(losses: TensorDict) -> torch.Tensor:
    """Sum of the terms that ``forward`` returned."""
    return sum(losses[name].sum() for name in TRAINS if name in losses)


def gradients(value: torch.Tensor, loss: ALMLoss) -> dict[str, torch.Tensor]:
    """Gradient of every parameter that the value depends on, by name."""
    names, params = zip(*loss.named_parameters(), strict=True)
    grads = torch.autograd.grad(value, params, allow_unused=True, retain_graph=True)
    pairs = zip(names, grads, strict=True)
    return {name: grad for name, grad in pairs if grad is not None}


def part_of(name: str) -> str:
    """The part that a parameter's name belongs to."""
    return name.split(".")[0].removesuffix("_params")


def assert_equal(actual, expected, exact: bool = True) -> None:
    """Compares the entries of two dictionaries or TensorDicts."""
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
    assert set(actual.keys()) == set(expected.keys())
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, **tolerance)
