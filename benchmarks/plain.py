"""A hand-written ALM: Gymnasium, plain torch modules and a loop, to compare with.

It computes what ``ALMLoss`` and ``ALMOptimizationStepper`` compute with their
defaults, and has none of the rest: keys, masks, checks, hooks.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from alm_torchrl.runs.settings import TrainConfig
from benchmarks.sizes import Sizes

__all__ = ["PlainALM", "PlainLoop", "PlainReplay"]

Batch = dict[str, Tensor]


def elu_net(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.ELU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.ELU(),
        nn.Linear(hidden_dim, out_dim),
    )


def value_net(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.LayerNorm(hidden_dim),
        nn.Tanh(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.ELU(),
        nn.Linear(hidden_dim, out_dim),
    )


def gaussian(net: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    loc, raw = net(torch.cat(inputs, -1)).chunk(2, -1)
    scale = 10 - softplus(10 - raw)
    return 30 * torch.tanh(loc / 30), 0.1 + softplus(scale - 0.1)


def draw(gaussian: tuple[Tensor, Tensor]) -> Tensor:
    loc, scale = gaussian
    return loc + scale * torch.randn_like(loc)


class PlainALM:
    """Six networks, two targets, four optimizers and one update.

    Args:
        sizes: sizes of the networks.
        config: learning rate, coefficients and the like.
        device: where the networks are.
    """

    def __init__(self, sizes: Sizes, config: TrainConfig, device: str) -> None:
        self.config = config
        self.device = device
        self.low = torch.tensor(sizes.action_low, device=device)
        self.high = torch.tensor(sizes.action_high, device=device)
        latent, action, hidden = sizes.latent_dim, sizes.action_dim, sizes.hidden_dim
        both = latent + action
        self.encoder = elu_net(sizes.observation_dim, hidden, 2 * latent)
        self.model = elu_net(both, sizes.model_hidden_dim, 2 * latent)
        self.actor = elu_net(latent, hidden, action)
        self.critics = nn.ModuleList([value_net(both, hidden, 1) for _ in range(2)])
        self.reward = value_net(both, hidden, 1)
        self.classifier = value_net(both + latent, hidden, 2)
        nets = (self.encoder, self.model, self.actor, self.critics)
        for net in (*nets, self.reward, self.classifier):
            net.to(device)
        self.target_encoder = copy.deepcopy(self.encoder)
        self.target_critics = copy.deepcopy(self.critics)
        self.optimizers = {
            name: torch.optim.Adam(
                itertools.chain(*(part.parameters() for part in parts)),
                lr=config.lr,
                fused=True,
            )
            for name, parts in {
                "model": (self.encoder, self.model),
                "reward": (self.reward, self.classifier),
                "qvalue": (self.critics,),
                "actor": (self.actor,),
            }.items()
        }

    @torch.no_grad()
    def act(self, observation: NDArray[np.float32], std: float) -> NDArray[np.float32]:
        """The action for one observation, with noise of this standard deviation."""
        state = torch.from_numpy(observation).to(self.device)
        mean = self.actor(draw(gaussian(self.encoder, state))).tanh()
        action = mean + std * torch.randn_like(mean)
        return action.clamp(self.low, self.high).cpu().numpy()

    def _noisy(self, latent: Tensor, std: float) -> Tensor:
        mean = self.actor(latent).tanh()
        noise = std * torch.randn_like(mean)
        clip = self.config.noise_clip
        action = mean + noise.clamp(-clip, clip)
        return action + (action.clamp(self.low, self.high) - action).detach()

    def _value(self, critics: Iterable[nn.Module], z: Tensor, a: Tensor) -> Tensor:
        inputs = torch.cat((z, a), -1)
        return torch.cat([critic(inputs) for critic in critics], -1)

    def _minimise(self, name: str, loss: Tensor) -> Tensor:
        optimizer = self.optimizers[name]
        params = optimizer.param_groups[0]["params"]
        # Only these gradients: whatever else the loss goes through is not trained.
        for param, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            param.grad = grad
        nn.utils.clip_grad_norm_(params, self.config.clip_norm)
        optimizer.step()
        return loss.detach()

    def update(self, batch: Batch, std: float) -> dict[str, Tensor]:
        """One update, from what :meth:`PlainReplay.sample` returns."""
        losses = {"model": self._minimise("model", self._model_loss(batch, std))}
        with torch.no_grad():
            now = gaussian(self.target_encoder, batch["observation"])
            after = gaussian(self.target_encoder, batch["next_observation"])
        terms = {
            "reward": lambda: self._reward_loss(batch, now, after),
            "qvalue": lambda: self._qvalue_loss(batch, now, after, std),
            "actor": lambda: self._actor_loss(draw(now), std),
        }
        for name, term in terms.items():
            losses[name] = self._minimise(name, term())
        for net, target in (
            (self.encoder, self.target_encoder),
            (self.critics, self.target_critics),
        ):
            for source, slow in zip(net.parameters(), target.parameters(), strict=True):
                slow.data.lerp_(source.data, self.config.tau)
        return losses

    def _model_loss(self, batch: Batch, std: float) -> Tensor:
        actions = batch["slice_action"]
        latents = [draw(gaussian(self.encoder, batch["slice_observation"][:, 0]))]
        steps = []
        for action in actions.unbind(1):
            steps.append(gaussian(self.model, latents[-1], action))
            latents.append(draw(steps[-1]))
        loc, scale = (torch.stack(values, 1) for values in zip(*steps, strict=True))
        z = torch.stack(latents, 1)
        with torch.no_grad():
            target_loc, target_scale = gaussian(
                self.target_encoder, batch["slice_next_observation"]
            )
            last_action = self._noisy(z[:, -1], std)
        ratio = (scale / target_scale).square()
        shift = ((loc - target_loc) / target_scale).square()
        kl = 0.5 * (ratio + shift - 1 - ratio.log()).sum((-1, -2))
        reward = self.reward(torch.cat((z[:, :-1], actions), -1)).sum((-1, -2))
        value = self._value(self.critics, z[:, -1], last_action).amin(-1)
        return (kl - reward - value).mean()

    def _reward_loss(
        self, batch: Batch, now: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]
    ) -> Tensor:
        z, action = draw(now), batch["action"]
        with torch.no_grad():
            imagined = draw(gaussian(self.model, draw(now), action))
            fake = torch.rand(len(z), device=z.device).argsort() < len(z) // 2
            z_next = torch.where(fake.unsqueeze(-1), imagined, draw(after))
        error = self.reward(torch.cat((z, action), -1)).squeeze(-1) - batch["reward"]
        logits = self.classifier(torch.cat((z, action, z_next), -1))
        return error.square().mean() + cross_entropy(logits, (~fake).long())

    def _qvalue_loss(
        self,
        batch: Batch,
        now: tuple[Tensor, Tensor],
        after: tuple[Tensor, Tensor],
        std: float,
    ) -> Tensor:
        with torch.no_grad():
            z_next = draw(after)
            action = self._noisy(z_next, std)
            value = self._value(self.target_critics, z_next, action).amin(-1)
            discount = self.config.gamma * (1 - batch["terminated"])
            target = batch["reward"] + discount * value
        value = self._value(self.critics, draw(now), batch["action"])
        return (value - target.unsqueeze(-1)).square().mean()

    def _actor_loss(self, latent: Tensor, std: float) -> Tensor:
        gamma, lmbda = self.config.gamma, self.config.lmbda
        latents, actions = [latent], []
        for _ in range(self.config.horizon):
            actions.append(self._noisy(latents[-1].detach(), std))
            latents.append(draw(gaussian(self.model, latents[-1], actions[-1])))
        with torch.no_grad():
            last_action = self._noisy(latents[-1], std)
        z, a = torch.stack(latents, 1), torch.stack(actions, 1)
        now, after = z[:, :-1], z[:, 1:]
        reward = self.reward(torch.cat((now, a), -1)).squeeze(-1)
        logits = self.classifier(torch.cat((now, a, after.detach()), -1))
        log_ratio = logits[..., 1] - logits[..., 0]
        reward = reward + self.config.classifier_coef * log_ratio
        later = torch.cat((a[:, 1:], last_action.unsqueeze(1)), 1).detach()
        value = self._value(self.critics, after, later).amin(-1)
        step = value[:, -1]
        total = torch.zeros_like(step)
        for t in reversed(range(self.config.horizon)):
            step = reward[:, t] + gamma * ((1 - lmbda) * value[:, t] + lmbda * step)
            total = step + gamma * total
        return -total.mean() / self.config.horizon


class PlainReplay:
    """Transitions in preallocated tensors; uniform windows by drawing again.

    Args:
        capacity: transitions kept.
        sizes: sizes of rows and batches.
    """

    def __init__(self, capacity: int, sizes: Sizes) -> None:
        self.sizes = sizes
        self.columns = {
            "observation": torch.zeros(capacity, sizes.observation_dim),
            "action": torch.zeros(capacity, sizes.action_dim),
            "next_observation": torch.zeros(capacity, sizes.observation_dim),
            "reward": torch.zeros(capacity),
            "terminated": torch.zeros(capacity),
        }
        # Views for writing, which NumPy does faster.
        self.arrays = {name: column.numpy() for name, column in self.columns.items()}
        self.done = torch.zeros(capacity, dtype=torch.bool)
        self.steps = torch.arange(sizes.horizon)
        self.count = 0

    def add(self, done: bool, **values: object) -> None:
        """Stores one transition over the oldest."""
        row = self.count % len(self.done)
        for name, value in values.items():
            self.arrays[name][row] = value
        self.done[row] = done
        self.count += 1

    def _windows(self) -> Tensor:
        """Rows of windows within one episode and written in one go, [B, K]."""
        capacity, stored = len(self.done), min(self.count, len(self.done))
        oldest = self.count % capacity if self.count > capacity else 0
        batch, horizon = self.sizes.batch_size, self.sizes.horizon
        starts = torch.randint(stored - horizon + 1, (batch,))
        while True:
            rows = (oldest + starts.unsqueeze(-1) + self.steps) % capacity
            crossing = self.done[rows[:, :-1]].any(-1)
            wrong = int(crossing.sum())
            if not wrong:
                return rows
            starts[crossing] = torch.randint(stored - horizon + 1, (wrong,))

    def sample(self, device: str) -> Batch:
        """Slices ``slice_*`` ``[B, K, ...]`` and transitions ``[B, ...]``."""
        windows = self._windows()
        stored = min(self.count, len(self.done))
        rows = torch.randint(stored, (self.sizes.batch_size,))
        batch = {name: column[rows] for name, column in self.columns.items()}
        for name in ("observation", "action", "next_observation"):
            batch[f"slice_{name}"] = self.columns[name][windows]
        return {name: value.to(device) for name, value in batch.items()}


class PlainLoop:
    """Environment, networks and replay, stepped one environment step at a time.

    Args:
        config: task, sizes and schedule.
        sizes: those of ``config``.
        device: where the networks are.
    """

    def __init__(self, config: TrainConfig, sizes: Sizes, device: str) -> None:
        self.config = config
        self.env = gymnasium.make(config.task, disable_env_checker=True)
        self.networks = PlainALM(sizes, config, device)
        self.replay = PlainReplay(config.replay_capacity, sizes)
        self.device = device
        self.log: list[dict[str, float]] = []
        self.updates = 0
        self.state, _ = self.env.reset(seed=config.seed)
        self.env.action_space.seed(config.seed)
        for _ in range(config.warmup_steps):
            self._take(self.env.action_space.sample())

    def _std(self, step: int) -> float:
        left = 1 - min(step / self.config.noise_steps, 1)
        final = self.config.noise_final
        return final + left * (self.config.noise_initial - final)

    def _take(self, action: NDArray[np.float32]) -> None:
        after, reward, terminated, truncated, _ = self.env.step(action)
        self.replay.add(
            terminated or truncated,
            observation=self.state,
            action=action,
            next_observation=after,
            reward=reward,
            terminated=float(terminated),
        )
        self.state = self.env.reset()[0] if terminated or truncated else after

    def run(self, steps: int) -> None:
        """Makes environment steps, each with one update."""
        for _ in range(steps):
            observation = self.state.astype(np.float32)
            self._take(self.networks.act(observation, self._std(self.updates)))
            self.updates += 1
            batch = self.replay.sample(self.device)
            losses = self.networks.update(batch, self._std(self.updates))
            if self.updates % self.config.log_interval == 0:
                self.log.append({name: loss.item() for name, loss in losses.items()})
