"""The terms of encoder and model for one slice at a time, without noise, by hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from alm_torchrl import ALMLoss
from tests.helpers import gradients, network, targets
from tests.objectives.reference import elu_net, gaussian_net, value_net


def live(loss: ALMLoss, part: str) -> list[Tensor]:
    return list(network(loss, part).parameters())


def frozen(loss: ALMLoss, part: str) -> list[Tensor]:
    return [param.detach() for param in live(loss, part)]


def target(loss: ALMLoss, part: str) -> list[Tensor]:
    found = targets(loss)
    prefix = f"{part}_params.module." + "0.module." * (part == "encoder")
    return [found[prefix + name] for name, _ in network(loss, part).named_parameters()]


def encoded(params: list[Tensor], observation: Tensor) -> tuple[Tensor, Tensor]:
    if not params:  # The identity encoder.
        return observation, torch.full_like(observation, 0.1)
    return gaussian_net(observation, params)


def smallest(params: list[Tensor], z: Tensor, a: Tensor) -> Tensor:
    x, half = torch.cat([z, a]), len(params) // 2
    return torch.cat([value_net(x, params[:half]), value_net(x, params[half:])]).min()


def policy(loss: ALMLoss, z: Tensor) -> Tensor:
    return torch.tanh(elu_net(z.detach(), frozen(loss, "actor")))


def divergence(p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor]) -> Tensor:
    squares = (p[1] ** 2 + (p[0] - q[0]) ** 2) / (2 * q[1] ** 2)
    return ((q[1] / p[1]).log() + squares - 0.5).sum()


def slice_terms(loss: ALMLoss, row) -> dict[str, list[Tensor]]:
    """Latents, KLs, rewards, values and TD targets of one slice ``[K]``."""
    observed = [row["observation"][0], *row["next", "observation"]]
    z = [encoded(live(loss, "encoder"), observed[0])[0]]
    terms: dict[str, list[Tensor]] = {
        name: [] for name in ("kl", "reward", "qvalue", "td_target")
    }
    for t, action in enumerate(row["action"]):
        x = torch.cat([z[-1], action])
        after = encoded(target(loss, "encoder"), observed[t + 1])
        step = gaussian_net(x, live(loss, "model"))
        terms["kl"].append(divergence(step, after))
        terms["reward"].append(value_net(x, frozen(loss, "reward"))[0])
        terms["qvalue"].append(smallest(frozen(loss, "qvalue"), z[-1], action))
        following = smallest(
            target(loss, "qvalue"), after[0], policy(loss, after[0])
        ).detach()
        goes_on = 1 - row["next", "terminated"][t].float()
        terms["td_target"].append(
            row["next", "reward"][t] + loss.gamma * goes_on * following
        )
        z.append(step[0])
    end = smallest(frozen(loss, "qvalue"), z[-1], policy(loss, z[-1]))
    return {**terms, "latent": z, "observed": observed, "end": [end]}


def mean_over_slices(loss: ALMLoss, slices, objective) -> Tensor:
    """Mean of ``objective(terms)`` over slices ``[B, K]``."""
    return sum(objective(slice_terms(loss, row)) for row in slices) / len(slices)


def assert_same_model_loss(loss: ALMLoss, slices, objective) -> None:
    """Value and gradients of ``model_loss`` are those of the formula."""
    expected = mean_over_slices(loss, slices, objective)
    value, _ = loss.model_loss(slices)
    assert_close(value, expected)
    ours, theirs = gradients(value, loss), gradients(expected, loss)
    assert set(ours) >= set(theirs)
    assert all(not grad.any() for name, grad in ours.items() if name not in theirs)
    same = {name: ours[name] for name in theirs}
    assert_close(same, theirs, rtol=1e-5, atol=1e-5)


def discounted(values: list[Tensor], gamma: float) -> Tensor:
    return sum(gamma**t * value for t, value in enumerate(values))
