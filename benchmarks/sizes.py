"""The sizes of a task under a preset, and networks and batches made to them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from tensordict import TensorDict, TensorDictBase

from alm_torchrl.envs import make_env
from alm_torchrl.objectives import ALMLoss, make_alm_loss
from alm_torchrl.replay import make_replay_buffer
from alm_torchrl.runs.settings import TrainConfig

__all__ = ["EPISODE_STEPS", "Sizes", "random_rows"]

EPISODE_STEPS = 1000
"""Length of the made-up episodes."""


def load_example() -> ModuleType:
    """The agent in one file, ``examples/alm.py``: the hand-written yardstick."""
    path = Path(__file__).parents[1] / "examples" / "alm.py"
    spec = importlib.util.spec_from_file_location("example_alm", path)
    assert spec is not None
    assert spec.loader is not None
    # Its dataclass looks the module up.
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_rows(
    rows: int, observation_dim: int, action_dim: int, start: int = 0
) -> TensorDict:
    """Random transitions in episodes of :data:`EPISODE_STEPS`, as a collector writes.

    Args:
        rows: number of transitions N.
        observation_dim: size of an observation.
        action_dim: size of an action; actions lie within +-1.
        start: transitions that came before these. Default: ``0``.

    Returns:
        TensorDict: batch size [N].

    Examples:
        >>> random_rows(5, 3, 2)["next", "reward"].shape
        torch.Size([5, 1])
    """
    count = torch.arange(start, start + rows)
    ended = (count % EPISODE_STEPS == EPISODE_STEPS - 1).unsqueeze(-1)
    return TensorDict(
        {
            "observation": torch.randn(rows, observation_dim),
            "action": torch.rand(rows, action_dim) * 2 - 1,
            "collector": {"traj_ids": count // EPISODE_STEPS},
            "next": {
                "observation": torch.randn(rows, observation_dim),
                "reward": torch.randn(rows, 1),
                "terminated": torch.zeros_like(ended),
                "done": ended,
            },
        },
        batch_size=[rows],
    )


@dataclass(frozen=True)
class Sizes:
    """Everything that the cost of one update depends on."""

    observation_dim: int
    """Size of the observation."""
    action_low: tuple[float, ...]
    """Lower bounds of the action."""
    action_high: tuple[float, ...]
    """Upper bounds of the action."""
    batch_size: int
    """Slices, and as many single transitions, in an update."""
    horizon: int
    """Steps K of a slice and of the imagined rollouts."""
    latent_dim: int
    """Size of the latent state."""
    hidden_dim: int
    """Units per hidden layer of all networks but the latent model."""
    model_hidden_dim: int
    """Units per hidden layer of the latent model."""

    @classmethod
    def of(cls, config: TrainConfig) -> Sizes:
        """The sizes of a run with these settings.

        Raises:
            ValueError: if the task cannot be used.
        """
        env = make_env(config.task, action_bounds=config.action_bounds)
        space = env.action_spec.space
        sizes = cls(
            observation_dim=env.observation_spec["observation"].shape[-1],
            action_low=tuple(space.low.tolist()),
            action_high=tuple(space.high.tolist()),
            batch_size=config.batch_size,
            horizon=config.horizon,
            latent_dim=config.latent_dim,
            hidden_dim=config.hidden_dim,
            model_hidden_dim=config.model_hidden_dim,
        )
        env.close()
        return sizes

    @property
    def action_dim(self) -> int:
        """Size of the action."""
        return len(self.action_low)

    def make_loss(self, device: str) -> ALMLoss:
        """A new loss; equal seeds give equal parameters."""
        return make_alm_loss(
            observation_dim=self.observation_dim,
            action_low=self.action_low,
            action_high=self.action_high,
            latent_dim=self.latent_dim,
            hidden_dim=self.hidden_dim,
            model_hidden_dim=self.model_hidden_dim,
        ).to(device)

    def make_rows(self, rows: int, start: int = 0) -> TensorDict:
        """Random transitions of these sizes, batch size [rows]."""
        return random_rows(rows, self.observation_dim, self.action_dim, start)

    def make_draw(self, rows: int, device: str) -> Callable[[], TensorDictBase]:
        """Draws two-draw batches from a replay full of random transitions.

        Args:
            rows: transitions in the replay, which is on the CPU.
            device: where the batches go.
        """
        buffer = make_replay_buffer(
            rows, batch_size=self.batch_size, horizon=self.horizon
        )
        chunk = 50_000
        for start in range(0, rows, chunk):
            buffer.extend(self.make_rows(min(chunk, rows - start), start))
        return lambda: cast("TensorDictBase", buffer.sample()).to(device)
