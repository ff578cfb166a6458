"""Aligned Latent Models (ALM) in one file, to be read from top to bottom.

    python examples/alm.py --task Pendulum-v1

learns in two minutes on one core to swing the pendulum up, which is a return of about
-150; random actions get -1200. Ghugare et al., "Simplifying Model-based RL: Learning
Representations, Latent-space Models, and Policies with One Objective", ICLR 2023,
https://arxiv.org/abs/2209.08466. Where paper and authors' code differ, the code counts.

Symbols: observation s, latent z, action a, horizon K, batch size B; encoder e, latent
model m, policy pi, reward model r, critics Q, classifier C. e' and Q' are copies of e
and Q that follow slowly.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy, softplus


@dataclass(frozen=True)
class Args:
    """Train ALM on a Gymnasium task with flat observations and continuous actions."""

    task: str = "Pendulum-v1"
    """Gymnasium task."""
    seed: int = 0
    """Seed of networks, noise, replay and environment."""
    device: str = "cpu"
    """Device of the networks."""
    total_steps: int = 1500
    """Training steps: one environment step and one update each (paper: 300,000)."""
    warmup_steps: int = 500
    """Random environment steps before them (paper: 5000)."""
    capacity: int = 100_000
    """Transitions in the replay."""
    eval_interval: int = 250
    """Training steps between evaluations of five episodes (paper: 5000)."""
    latent_dim: int = 50
    """Size of a latent."""
    hidden_dim: int = 128
    """Units of a hidden layer (paper: 512)."""
    model_hidden_dim: int = 256
    """Units of a hidden layer of the latent model (paper: 1024)."""
    batch_size: int = 128
    """Slices of K steps, and as many single transitions, in an update (paper: 512)."""
    horizon: int = 3
    """Steps K of a slice and of an imagined rollout."""
    gamma: float = 0.99
    """Discount."""
    lmbda: float = 0.95
    """Weight of longer rollouts in the policy's return."""
    classifier_coef: float = 0.1
    """Weight c of the classifier's log ratio in the policy's reward."""
    noise_steps: int = 1500
    """Steps in which the action noise falls from 1.0 to 0.1 (paper: 100,000)."""
    noise_clip: float = 0.3
    """Largest action noise in the losses."""
    lr: float = 1e-3
    """Learning rate of all four Adams (paper: 1e-4)."""
    clip_norm: float = 100.0
    """Largest gradient norm of each optimizer step."""
    tau: float = 0.02
    """Share by which e' and Q' move in an update (paper: 0.005)."""


# --- Networks -------------------------------------------------------------------------


def mlp(in_dim: int, hidden_dim: int, out_dim: int, *first: nn.Module) -> nn.Sequential:
    """Two hidden layers: ``first`` activates one, ELU the other; orthogonal weights."""
    net = nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        *first,
        nn.Linear(hidden_dim, hidden_dim),
        nn.ELU(),
        nn.Linear(hidden_dim, out_dim),
    )
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


class GaussianNet(nn.Module):
    """e(z | s) and m(z' | z, a): mean in (-30, 30), standard deviation in [0.1, 10]."""

    def __init__(self, in_dim: int, hidden_dim: int, latent_dim: int) -> None:
        super().__init__()
        self.net = mlp(in_dim, hidden_dim, 2 * latent_dim, nn.ELU())

    def forward(self, *inputs: Tensor) -> Normal:
        """The distribution, of latents [*, L]."""
        mean, raw = self.net(torch.cat(inputs, -1)).chunk(2, -1)
        std = 0.1 + softplus(10 - softplus(10 - raw) - 0.1)
        return Normal(30 * torch.tanh(mean / 30), std, validate_args=False)


class ValueNet(nn.Module):
    """r(z, a), Q(z, a) and C(z, a, z'): the outputs of one or more networks, joined."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int, nets: int = 1) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            mlp(in_dim, hidden, out_dim, nn.LayerNorm(hidden), nn.Tanh())
            for _ in range(nets)
        )

    def forward(self, *inputs: Tensor) -> Tensor:
        """The outputs, [*, nets * out_dim]."""
        joined = torch.cat(inputs, -1)
        return torch.cat([net(joined) for net in self.nets], -1)


class Policy(nn.Module):
    """pi(a | z): a mean in (-1, 1), and noise of a given standard deviation."""

    def __init__(self, in_dim: int, hidden: int, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.net = mlp(in_dim, hidden, len(low), nn.ELU())
        self.register_buffer("low", low + 1e-6)
        self.register_buffer("high", high - 1e-6)

    def forward(self, z: Tensor, std: float, clip: float = np.inf) -> Tensor:
        """Actions [*, A]; the gradient ignores that they are kept inside the bounds."""
        mean = self.net(z).tanh()
        action = mean + (std * torch.randn_like(mean)).clamp(-clip, clip)
        inside = action.detach().clamp(self.low, self.high)
        return inside + (action - action.detach())


# --- Replay ---------------------------------------------------------------------------

Batch = dict[str, Tensor]


class Replay:
    """A ring of transitions that draws slices of K steps, and single transitions."""

    def __init__(self, capacity: int, observation_dim: int, action_dim: int) -> None:
        self.rows = {
            "observation": torch.zeros(capacity, observation_dim),
            "action": torch.zeros(capacity, action_dim),
            "reward": torch.zeros(capacity),
            "next_observation": torch.zeros(capacity, observation_dim),
            "terminated": torch.zeros(capacity),
            "done": torch.zeros(capacity, dtype=torch.bool),
        }
        self.capacity = capacity
        self.written = 0

    def add(self, *transition: np.ndarray | float) -> None:
        """Writes the entries of a transition, in the order above, over the oldest."""
        for rows, value in zip(self.rows.values(), transition, strict=True):
            rows.numpy()[self.written % self.capacity] = value
        self.written += 1

    def sample(self, batch_size: int, horizon: int, device: str) -> tuple[Batch, Batch]:
        """Slices [B, K] and, drawn independently of them, transitions [B].

        Slices are uniform over all places where K steps of one episode follow one
        another. (The authors' slices run on into the next episode after a time limit.)
        """
        stored = min(self.written, self.capacity)
        oldest = self.written - stored
        starts = torch.randint(stored - horizon + 1, (batch_size, 1))
        while True:  # Slices that leave their episode are drawn again.
            steps = (oldest + starts + torch.arange(horizon)) % self.capacity
            leaves = self.rows["done"][steps[:, :-1]].any(-1)
            if not leaves.any():
                break
            starts[leaves] = torch.randint_like(starts[leaves], stored - horizon + 1)
        single = torch.randint(stored, (batch_size,))
        slices, batch = (
            {name: rows[index].to(device) for name, rows in self.rows.items()}
            for index in (steps, single)
        )
        return slices, batch


# --- Losses and update ----------------------------------------------------------------


class ALM(nn.Module):
    """Networks, losses and optimizers; ``low`` and ``high`` bound the actions."""

    def __init__(
        self, args: Args, observation_dim: int, low: Tensor, high: Tensor
    ) -> None:
        super().__init__()
        self.args = args
        latent, hidden, action = args.latent_dim, args.hidden_dim, len(low)
        self.encoder = GaussianNet(observation_dim, hidden, latent)
        self.model = GaussianNet(latent + action, args.model_hidden_dim, latent)
        self.actor = Policy(latent, hidden, low, high)
        self.reward = ValueNet(latent + action, hidden, 1)
        self.classifier = ValueNet(latent + action + latent, hidden, 2)
        self.critics = ValueNet(latent + action, hidden, 1, nets=2)
        self.target_encoder = copy.deepcopy(self.encoder)
        self.target_critics = copy.deepcopy(self.critics)
        self.to(args.device)
        self.model_optimizer = self.adam(self.encoder, self.model)
        self.reward_optimizer = self.adam(self.reward, self.classifier)
        self.critic_optimizer = self.adam(self.critics)
        self.actor_optimizer = self.adam(self.actor)

    def adam(self, *nets: nn.Module) -> torch.optim.Adam:
        """An optimizer of some networks."""
        parameters = nn.ModuleList(nets).parameters()
        return torch.optim.Adam(parameters, lr=self.args.lr, fused=True)

    def model_loss(self, slices: Batch, std: float) -> Tensor:
        """What trains encoder and latent model (Eq. 7).

        With z_0 ~ e(s_0) and z_{t+1} ~ m(z_t, a_t), minimise
        sum_{t<K} [ KL( m(z_t, a_t) || e'(s_{t+1}) ) - r(z_t, a_t) ] - Q(z_K, pi(z_K)).
        """
        actions = slices["action"]
        latents, steps = [self.encoder(slices["observation"][:, 0]).rsample()], []
        for action in actions.unbind(1):
            steps.append(self.model(latents[-1], action))
            latents.append(steps[-1].rsample())
        mean = torch.stack([step.mean for step in steps], 1)
        deviation = torch.stack([step.stddev for step in steps], 1)
        predicted = Normal(mean, deviation, validate_args=False)
        with torch.no_grad():
            encoded = self.target_encoder(slices["next_observation"])
            last_action = self.actor(latents[-1], std, self.args.noise_clip)
        kl = kl_divergence(predicted, encoded).sum(-1)
        reward = self.reward(torch.stack(latents[:-1], 1), actions).squeeze(-1)
        value = self.critics(latents[-1], last_action).amin(-1)
        return ((kl - reward).sum(-1) - value).mean()

    def reward_classifier_loss(
        self, batch: Batch, now: Normal, after: Normal
    ) -> tuple[Tensor, Tensor]:
        """What trains reward model (Eq. 11) and classifier (Eq. 9), for z ~ e'(s).

        Reward: minimise (r(z, a) - R)^2. Classifier: z' ~ m(z, a) is imagined in a
        random half of the rows, and z' ~ e'(s') real in the others; minimise the cross
        entropy of C(z, a, z'). The difference of its logits, "real" less "imagined",
        then estimates log e(z' | s') - log m(z' | z, a).
        """
        action, half = batch["action"], len(batch["action"]) // 2
        z = now.rsample()
        with torch.no_grad():
            # Places in a random order: the first half is imagined, the rest is real.
            place = torch.rand(len(action), device=action.device).argsort()
            first, rest = place.argsort().tensor_split([half])
            real = Normal(after.mean[rest], after.stddev[rest], False).rsample()
            start = now.rsample()  # The authors imagine from a z of its own.
            imagined = self.model(start[first], action[first]).rsample()
            z_next = torch.cat([imagined, real])[place]
        error = self.reward(z, action).squeeze(-1) - batch["reward"]
        logits = self.classifier(z, action, z_next)
        return error.square().mean(), cross_entropy(logits, (place >= half).long())

    def critic_loss(
        self, batch: Batch, now: Normal, after: Normal, std: float
    ) -> Tensor:
        """What trains the critics (Eq. 10), for z ~ e'(s) and z' ~ e'(s').

        Minimise (Q_i(z, a) - y)^2 with y = R + gamma (1 - terminated) Q'(z', pi(z')).
        There are two critics, and Q is the smaller. A time limit is no termination.
        """
        with torch.no_grad():
            z_next = after.rsample()
            next_action = self.actor(z_next, std, self.args.noise_clip)
            value = self.target_critics(z_next, next_action).amin(-1)
            y = batch["reward"] + self.args.gamma * (1 - batch["terminated"]) * value
        error = self.critics(now.rsample(), batch["action"]) - y.unsqueeze(-1)
        return error.square().mean()

    def actor_loss(self, now: Normal, std: float) -> Tensor:
        """What trains the policy (Eq. 8, with the lambda weights of appendix A.3).

        With z_0 ~ e'(s), a_t = pi(z_t) and z_{t+1} ~ m(z_t, a_t), maximise the mean of
        gamma^t G_t over t < K, where G_K = Q(z_K, a_K) and
        G_t = R_t + gamma [ (1 - lmbda) Q(z_{t+1}, a_{t+1}) + lmbda G_{t+1} ],
        R_t = r(z_t, a_t) + c log ratio(z_t, a_t, z_{t+1}), the classifier's.

        The gradient runs through the actions and the chain of latents. There is none
        into the policy's input, the classifier's z_{t+1} and the critics' actions.
        """
        args, latents, actions = self.args, [now.rsample()], []
        for _ in range(args.horizon):
            actions.append(self.actor(latents[-1].detach(), std, args.noise_clip))
            latents.append(self.model(latents[-1], actions[-1]).rsample())
        with torch.no_grad():
            actions.append(self.actor(latents[-1], std, args.noise_clip))
        z, a = torch.stack(latents, 1), torch.stack(actions, 1)
        logits = self.classifier(z[:, :-1], a[:, :-1], z[:, 1:].detach())
        log_ratio = logits[..., 1] - logits[..., 0]
        reward = self.reward(z[:, :-1], a[:, :-1]).squeeze(-1)
        reward = reward + args.classifier_coef * log_ratio
        value = self.critics(z[:, 1:], a[:, 1:].detach()).amin(-1)
        g = value[:, -1]  # value[:, t] is that of z_{t+1}.
        total = torch.zeros_like(g)
        for t in reversed(range(args.horizon)):
            later = (1 - args.lmbda) * value[:, t] + args.lmbda * g
            g = reward[:, t] + args.gamma * later
            total = g + args.gamma * total
        return -(total / args.horizon).mean()

    def update(self, slices: Batch, batch: Batch, std: float) -> Batch:
        """Four optimizer steps, each on what the one before left; then e' and Q' move.

        Takes slices [B, K], transitions [B] and the standard deviation of the action
        noise; returns the losses.
        """
        model = self.model_loss(slices, std)
        self.minimise(model, self.model_optimizer)
        with torch.no_grad():
            now = self.target_encoder(batch["observation"])
            after = self.target_encoder(batch["next_observation"])
        reward, classifier = self.reward_classifier_loss(batch, now, after)
        self.minimise(reward + classifier, self.reward_optimizer)
        critic = self.critic_loss(batch, now, after, std)
        self.minimise(critic, self.critic_optimizer)
        actor = self.actor_loss(now, std)
        self.minimise(actor, self.actor_optimizer)
        for net, target in (
            (self.encoder, self.target_encoder),
            (self.critics, self.target_critics),
        ):
            for fast, slow in zip(net.parameters(), target.parameters(), strict=True):
                slow.data.lerp_(fast.data, self.args.tau)
        names = ("model", "reward", "classifier", "critic", "actor")
        losses = (model, reward, classifier, critic, actor)
        return {name: x.detach() for name, x in zip(names, losses, strict=True)}

    def minimise(self, loss: Tensor, optimizer: torch.optim.Adam) -> None:
        """One step. Networks of other optimizers get no gradient."""
        parameters = optimizer.param_groups[0]["params"]
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        limit = self.args.clip_norm
        nn.utils.clip_grad_norm_(parameters, limit, error_if_nonfinite=True)
        optimizer.step()

    @torch.no_grad()
    def act(self, observation: np.ndarray, std: float) -> np.ndarray:
        """Action for one observation, with a sample of z ~ e(s) and unclipped noise."""
        s = torch.as_tensor(observation, dtype=torch.float32, device=self.args.device)
        return self.actor(self.encoder(s).rsample(), std).cpu().numpy()


# --- Training loop and evaluation -----------------------------------------------------


def make_env(task: str) -> gym.Env:
    """The task; [-1, 1] is rescaled to bounds that lie outside of it."""
    env = gym.make(task, disable_env_checker=True)
    if (env.action_space.low < -1).any() or (env.action_space.high > 1).any():
        env = gym.wrappers.RescaleAction(env, np.float32(-1.0), np.float32(1.0))
    return env


def noise_std(args: Args, step: int) -> float:
    """Standard deviation of the action noise after some training steps."""
    return 0.1 + 0.9 * (1 - min(step / args.noise_steps, 1))


def evaluate(agent: ALM, env: gym.Env, seed: int, episodes: int = 5) -> float:
    """Mean return over whole episodes without action noise."""
    total = 0.0
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        done = False
        while not done:
            action = agent.act(observation, std=0.0)
            observation, reward, terminated, truncated, _ = env.step(action)
            total += float(reward)
            done = terminated or truncated
    return total / episodes


def train(args: Args) -> ALM:
    """Trains an agent, and prints a line for each evaluation."""
    torch.manual_seed(args.seed)
    env, eval_env = make_env(args.task), make_env(args.task)
    bounds = (env.action_space.low, env.action_space.high)
    low, high = (torch.tensor(bound, dtype=torch.float32) for bound in bounds)
    agent = ALM(args, env.observation_space.shape[0], low, high)
    replay = Replay(args.capacity, env.observation_space.shape[0], len(low))
    env.action_space.seed(args.seed)
    observation, _ = env.reset(seed=args.seed)
    losses: Batch = {}
    began = time.monotonic()
    # Steps up to 0 are random. Step 0 also evaluates the agent before any update.
    for step in range(1 - args.warmup_steps, args.total_steps + 1):
        if step < 1:
            action = env.action_space.sample()
        else:
            action = agent.act(observation, noise_std(args, step - 1))
        following, reward, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        replay.add(observation, action, reward, following, terminated, done)
        observation = env.reset()[0] if done else following
        if step >= 1:
            slices, batch = replay.sample(args.batch_size, args.horizon, args.device)
            losses = agent.update(slices, batch, noise_std(args, step))
        if step >= 0 and step % args.eval_interval == 0:
            score = evaluate(agent, eval_env, args.seed)
            shown = "  ".join(f"{name} {x.item():.3g}" for name, x in losses.items())
            seconds = time.monotonic() - began
            print(f"step {step:6d}  return {score:8.1f}  {seconds:5.0f} s  {shown}")
    return agent


if __name__ == "__main__":
    train(tyro.cli(Args))
