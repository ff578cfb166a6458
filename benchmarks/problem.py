"""A task under the settings of a preset: networks, batches and agents of its sizes."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from alm_torchrl.envs import make_env
from alm_torchrl.objectives import ALMLoss, make_alm_loss
from alm_torchrl.replay import make_replay_buffer
from alm_torchrl.runs.settings import TrainConfig

EPISODE_STEPS = 1000


def load_example() -> ModuleType:
    """The hand-written yardstick: ``examples/alm.py``, an agent in one file."""
    path = Path(__file__).parents[1] / "examples" / "alm.py"
    spec = importlib.util.spec_from_file_location("example_alm", path)
    assert spec is not None
    assert spec.loader is not None
    # Its dataclass looks the module up.
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Problem:
    """What the cost of an update depends on.

    Args:
        config: task and sizes.
        device: where networks and updates are; replays are on the CPU.
    """

    def __init__(self, config: TrainConfig, device: str = "cpu") -> None:
        self.config = config
        self.device = device
        env = make_env(config.task, action_bounds=config.action_bounds)
        self.observation_dim = env.observation_spec["observation"].shape[-1]
        self.low, self.high = env.action_spec.space.low, env.action_spec.space.high
        env.close()

    def changed(self, **sizes: int) -> Problem:
        """The same task with other sizes."""
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, **sizes)
        return other

    def networks(self) -> dict[str, Any]:
        """The arguments that all builders of losses share."""
        return {
            "observation_dim": self.observation_dim,
            "action_low": self.low,
            "action_high": self.high,
            "hidden_dim": self.config.hidden_dim,
        }

    def make_loss(self) -> ALMLoss:
        """Our loss; the same parameters each time."""
        torch.manual_seed(0)
        config = self.config
        return make_alm_loss(
            **self.networks(),
            latent_dim=config.latent_dim,
            model_hidden_dim=config.model_hidden_dim,
        ).to(self.device)

    def make_agent(self, example: ModuleType) -> Any:  # noqa: ANN401
        """The example's agent with the same settings."""
        torch.manual_seed(0)
        settings = {"capacity": self.config.replay_capacity, "device": self.device}
        for field in dataclasses.fields(example.Args):
            settings.setdefault(
                field.name, getattr(self.config, field.name, field.default)
            )
        args = example.Args(**settings)
        return example.ALM(args, self.observation_dim, self.low, self.high)

    def make_rows(self, rows: int) -> TensorDict:
        """Random transitions [rows] in episodes, as a collector writes them."""
        count = torch.arange(rows)
        ended = (count % EPISODE_STEPS == EPISODE_STEPS - 1).unsqueeze(-1)
        return TensorDict(
            {
                "observation": torch.randn(rows, self.observation_dim),
                "action": torch.rand(rows, len(self.low)) * 2 - 1,
                "collector": {"traj_ids": count // EPISODE_STEPS},
                "next": {
                    "observation": torch.randn(rows, self.observation_dim),
                    "reward": torch.randn(rows, 1),
                    "terminated": torch.zeros_like(ended),
                    "done": ended,
                },
            },
            batch_size=[rows],
        )

    def make_draw(self, rows: int) -> Callable[[], TensorDictBase]:
        """Draws two-draw batches from a replay full of random transitions."""
        buffer = make_replay_buffer(
            rows, batch_size=self.config.batch_size, horizon=self.config.horizon
        )
        buffer.extend(self.make_rows(rows))
        return lambda: buffer.sample().to(self.device)
