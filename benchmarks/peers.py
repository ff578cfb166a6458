"""One environment step's worth of updates of TorchRL's SAC, TD3 and REDQ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler
from torchrl.modules import MLP, ValueOperator
from torchrl.objectives import LossModule, SoftUpdate, TD3Loss, ValueEstimators

from alm_torchrl.baselines.builders import make_redq_loss, make_sac_loss
from benchmarks.measures import measured
from benchmarks.sizes import Sizes
from benchmarks.timing import Contender

__all__ = ["OWN_BATCH_SIZES", "peer_updates"]

OWN_BATCH_SIZES = {"SAC": 256, "TD3": 100, "REDQ": 256}
"""Batch sizes in the papers: arXiv 1801.01290, 1802.09477 and 2101.05982."""

TD3_DELAY = 2

Draw = Callable[[], TensorDictBase]


def peer_updates(sizes: Sizes, *, device: str, rows: int) -> list[Contender]:
    """The peers at our batch size and at their own, draws of the batch included.

    Their networks have two hidden layers of ``sizes.hidden_dim`` ReLU units. One unit
    is what they compute for one environment step: an update of SAC; an update of
    TD3's critics and half a one of its actor (the mean of two steps); 20 updates of
    REDQ with 10 critics, each with the actor's loss, as TorchRL's loss has it.

    Args:
        sizes: sizes of networks and batches.

    Keyword Args:
        device: where to compute; the replay is on the CPU.
        rows: transitions in the replay.
    """
    data = sizes.make_rows(rows)
    contenders = []
    for name, build in (("SAC", _sac), ("TD3", _td3), ("REDQ", _redq)):
        for batch_size in dict.fromkeys((sizes.batch_size, OWN_BATCH_SIZES[name])):
            torch.manual_seed(0)
            call = build(sizes, _draw(data, batch_size, device), device)
            per = TD3_DELAY if name == "TD3" else 1
            label = f"{name}, batch {batch_size}"
            contenders.append(measured(label, call, device, per=per))
    return contenders


def _draw(data: TensorDictBase, batch_size: int, device: str) -> Draw:
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(len(data)),
        sampler=RandomSampler(),
        batch_size=batch_size,
    )
    buffer.extend(data)
    return lambda: buffer.sample().to(device)


def _mlp(sizes: Sizes, in_dim: int, out_dim: int) -> MLP:
    return MLP(
        in_dim, out_dim, num_cells=[sizes.hidden_dim] * 2, activation_class=nn.ReLU
    )


def _critic(sizes: Sizes) -> ValueOperator:
    net = _mlp(sizes, sizes.observation_dim + sizes.action_dim, 1)
    return ValueOperator(net, in_keys=["observation", "action"])


def _networks(sizes: Sizes) -> dict[str, Any]:
    return {
        "observation_dim": sizes.observation_dim,
        "action_low": sizes.action_low,
        "action_high": sizes.action_high,
        "hidden_dim": sizes.hidden_dim,
    }


def _sac(sizes: Sizes, draw: Draw, device: str) -> Callable[[], None]:
    return _summed(make_sac_loss(**_networks(sizes)), draw, device, updates=1)


def _redq(sizes: Sizes, draw: Draw, device: str) -> Callable[[], None]:
    loss = make_redq_loss(**_networks(sizes))
    return _summed(loss, draw, device, updates=loss.updates_per_step)


def _adam(parameters: Any) -> torch.optim.Adam:  # noqa: ANN401
    return torch.optim.Adam(parameters, lr=3e-4, fused=True)


def _summed(
    loss: LossModule, draw: Draw, device: str, *, updates: int
) -> Callable[[], None]:
    """Updates of a loss whose terms train parameters of their own: one backward."""
    targets = SoftUpdate(loss.to(device), tau=0.005)
    optimizer = _adam(loss.parameters())

    def call() -> None:
        for _ in range(updates):
            terms: Mapping[str, Tensor] = loss(draw())
            total = sum(terms[f"loss_{name}"] for name in ("actor", "qvalue", "alpha"))
            optimizer.zero_grad()
            total.backward()  # type: ignore[union-attr]
            optimizer.step()
            targets.step()

    return call


def _td3(sizes: Sizes, draw: Draw, device: str) -> Callable[[], None]:
    net = nn.Sequential(_mlp(sizes, sizes.observation_dim, sizes.action_dim), nn.Tanh())
    actor = TensorDictModule(net, in_keys=["observation"], out_keys=["action"])
    bounds = (torch.tensor(sizes.action_low), torch.tensor(sizes.action_high))
    loss = TD3Loss(actor, _critic(sizes), bounds=bounds, num_qvalue_nets=2)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.99)
    targets = SoftUpdate(loss.to(device), tau=0.005)
    critic_optimizer = _adam(loss.qvalue_network_params.parameters())
    actor_optimizer = _adam(loss.actor_network_params.parameters())

    def minimise(optimizer: torch.optim.Adam, value: Tensor) -> None:
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    def call() -> None:
        for step in range(TD3_DELAY):
            batch = draw()
            minimise(critic_optimizer, loss.value_loss(batch)[0])
            if step == TD3_DELAY - 1:
                minimise(actor_optimizer, loss.actor_loss(batch)[0])
                targets.step()

    return call
