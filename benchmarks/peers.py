"""What other algorithms compute for one environment step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import torch
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import RandomSampler

from alm_torchrl.baselines.builders import (
    make_redq_loss,
    make_sac_loss,
    make_td3_loss,
)
from alm_torchrl.training.baseline_stepper import BaselineOptimizationStepper
from benchmarks.problem import Problem
from benchmarks.timing import Contender, count_flop, first_call
from benchmarks.updates import ROWS

TORCHRL = {"SAC": make_sac_loss, "TD3": make_td3_loss, "REDQ": make_redq_loss}
"""Builders of the losses."""

STABLE_BASELINES3 = ("SAC", "TD3")
"""Names of its classes."""

OWN_SIZE = 256
"""Width and batch size in the authors' code of each of them."""


def peer_updates(problem: Problem) -> tuple[list[Contender], dict[str, str]]:
    """The peers at equal sizes (our width and batch size) and at their own.

    An update of SAC; of TD3, an update of the critics and half a one of the actor (the
    mean of two steps); 20 updates of REDQ's 10 critics and one of its actor. The draws
    of the batches are included.

    Returns:
        tuple: the contenders, and the reason for each library that is left out: it is
        not installed.
    """
    peers = list(_torchrl(problem))
    try:
        peers += _stable_baselines3(problem)
    except ModuleNotFoundError as error:
        return peers, {"Stable-Baselines3": str(error)}
    return peers, {}


def _torchrl(problem: Problem) -> Iterator[Contender]:
    rows = problem.make_rows(ROWS)
    own = problem.changed(batch_size=OWN_SIZE, hidden_dim=OWN_SIZE)
    for name, build in TORCHRL.items():
        for sizes, label in ((problem, "equal"), (own, "own")):

            def make(
                build: Callable[..., Any] = build, sizes: Problem = sizes
            ) -> Callable[[], None]:
                torch.manual_seed(0)
                loss = build(**sizes.networks()).to(sizes.device)
                buffer = TensorDictReplayBuffer(
                    storage=LazyTensorStorage(ROWS),
                    sampler=RandomSampler(),
                    batch_size=sizes.config.batch_size * loss.updates_per_step,
                )
                buffer.extend(rows)
                stepper = BaselineOptimizationStepper(loss)
                return lambda: stepper.step(None, buffer.sample().to(sizes.device))

            yield _contender(f"{name} of TorchRL, {label}", name, make, problem.device)


def _stable_baselines3(problem: Problem) -> Iterator[Contender]:
    import stable_baselines3
    from stable_baselines3.common.logger import Logger

    rows = problem.make_rows(ROWS)
    following = rows["next"]
    columns = (
        rows["observation"],
        following["observation"],
        rows["action"],
        following["reward"],
        following["terminated"],
    )
    config = problem.config
    for name in STABLE_BASELINES3:
        for label in ("equal", "own"):

            def make(name: str = name, label: str = label) -> Callable[[], None]:
                settings: dict[str, Any] = {}
                if label == "equal":
                    settings["batch_size"] = config.batch_size
                    settings["policy_kwargs"] = {"net_arch": [config.hidden_dim] * 2}
                model = getattr(stable_baselines3, name)(
                    "MlpPolicy",
                    gymnasium.make(config.task),
                    buffer_size=ROWS,
                    seed=0,
                    device=problem.device,
                    **settings,
                )
                model.set_logger(Logger(None, []))
                for row in zip(*(x.numpy() for x in columns), strict=True):
                    model.replay_buffer.add(*row, [{}])
                return lambda: model.train(1, model.batch_size)

            label = f"{name} of Stable-Baselines3, {label}"
            yield _contender(label, name, make, problem.device)


def _contender(
    label: str, name: str, make: Callable[[], Callable[[], None]], device: str
) -> Contender:
    """One call of it is two steps of TD3, whose actor is updated in every other."""
    steps = 2 if name == "TD3" else 1
    update, memory = first_call(make, device)

    def call() -> None:
        for _ in range(steps):
            update()

    return Contender(label, call, steps, flop=count_flop(call) // steps, memory=memory)
