"""A deterministic environment with a record of what happened, and tiny trainers."""

from __future__ import annotations

from unittest import mock

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from alm_torchrl import NoiseSchedule, make_alm_loss, make_replay_buffer, make_trainer

LENGTHS, LIMIT = (2, 7, 1, 4), 5
WARMUP, TOTAL = 10, 12
SMALL = {
    "total_steps": TOTAL,
    "warmup_steps": WARMUP,
    "batch_size": 4,
    "horizon": 2,
    "capacity": 100,
}


class Counter(EnvBase):
    """Deterministic episodes of known lengths, all steps kept in ``history``.

    Observed are the number of the episode and of the step in it; the reward is that
    of the action plus the number of the step. Episodes terminate after ``LENGTHS``
    steps in turn, or are cut after ``LIMIT``, by themselves if ``truncates``.
    """

    def __init__(self, truncates=True):
        super().__init__()
        self.observation_spec = Composite(observation=Unbounded(2))
        self.action_spec = Bounded(torch.tensor([-1.0, -0.5]), torch.tensor([1.0, 2.0]))
        self.reward_spec = Unbounded(1)
        flags = ("done", "terminated", "truncated")
        self.full_done_spec = Composite(
            {flag: Binary(1, dtype=torch.bool) for flag in flags}
        )
        self.truncates = truncates
        self.episode, self.time = -1, 0
        self.history: list[dict] = []

    def _set_seed(self, seed):
        """Nothing is random."""

    def checkpoint_state(self):
        return {"episode": self.episode}

    def load_checkpoint_state(self, state):
        self.episode = state["episode"]

    def _observe(self):
        return torch.tensor([self.episode, self.time], dtype=torch.float32)

    def _reset(self, tensordict):
        self.episode += 1
        self.time = 0
        return TensorDict(observation=self._observe())

    def _step(self, tensordict):
        before = self._observe()
        self.time += 1
        terminated = self.time == LENGTHS[self.episode % len(LENGTHS)]
        truncated = self.time == LIMIT
        step = {
            "observation": before,
            "action": tensordict["action"].clone(),
            "next": self._observe(),
            "reward": tensordict["action"].sum(-1, keepdim=True) + self.time,
            "terminated": torch.tensor([terminated]),
            "done": torch.tensor([terminated or truncated]),
        }
        self.history.append(step)
        truncated = truncated and self.truncates
        return TensorDict(
            observation=step["next"],
            reward=step["reward"],
            terminated=step["terminated"],
            truncated=torch.tensor([truncated]),
            done=torch.tensor([terminated or truncated]),
        )


class Holder:
    """A checkpoint's component with any state."""

    def __init__(self, state=None):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def numbered_rows(first, count):
    """Rows of episodes of five steps; the observation counts them."""
    number = torch.arange(first, first + count)
    return TensorDict(
        {
            "observation": number.float().unsqueeze(-1),
            "next": {"done": number.unsqueeze(-1) % 5 == 4},
            "collector": {"traj_ids": number // 5},
        },
        batch_size=[count],
    )


class Capture:
    """A logger that keeps what it is given."""

    def __init__(self):
        self.values: dict[str, list[tuple[int, float]]] = {}

    def log_scalar(self, name, value, step=None):
        self.values.setdefault(name, []).append((step, float(value)))


def tiny_loss(env, seed=0, **parts):
    torch.manual_seed(seed)
    return make_alm_loss(
        env,
        latent_dim=3,
        hidden_dim=8,
        model_hidden_dim=8,
        noise_schedule=NoiseSchedule(1.0, 0.2, steps=4),
        **parts,
    )


def build(env, loss, **options):
    """A trainer and its replay buffer."""
    made = []

    def record(*args, **kwargs):
        made.append(make_replay_buffer(*args, **kwargs))
        return made[0]

    with mock.patch("alm_torchrl.training.trainer.make_replay_buffer", record):
        trainer = make_trainer(env, loss, **{**SMALL, **options})
    return trainer, made[0]


def counter_trainer(**options):
    env = Counter()
    return build(env, tiny_loss(env), **options)[0]


def tensors(state, prefix=""):
    """The leaves of nested state dicts as tensors by name."""
    if isinstance(state, int) and abs(state) >= 2**63:
        state = str(state)
    if isinstance(state, torch.Tensor | np.ndarray | np.generic | int | float):
        return {prefix: torch.as_tensor(state).clone()}
    if isinstance(state, str):
        state = list(state.encode())
    items = enumerate(state) if isinstance(state, list | tuple) else state.items()
    return {
        name: leaf
        for key, value in items
        if value is not None
        for name, leaf in tensors(value, f"{prefix}/{key}").items()
    }


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]
