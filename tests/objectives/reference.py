"""One whole update of ALM, slowly: row by row, step by step, on plain tensors.

Written from the description of the algorithm, without any code of the package. Every
draw of noise is passed in. ``Settings.without`` leaves one ingredient out, to show
that a comparison notices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Layers of each network; a parameter list holds weight and bias of each in turn.
NETS = ("encoder", "model", "actor", "reward", "classifier", "qvalue")
TARGETS = ("encoder", "qvalue")
STEPS = {
    "model": ("encoder", "model"),
    "reward_classifier": ("reward", "classifier"),
    "qvalue": ("qvalue",),
    "actor": ("actor",),
}
Parameters = dict[str, list[Tensor]]
Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """What the update depends on besides parameters, batch and noise."""

    low: float = -0.4
    high: float = 0.4
    gamma: float = 0.99
    lmbda: float = 0.95
    classifier_coef: float = 0.1
    kl_coef: float = 1.0
    value_coef: float = 1.0
    reward_coef: float = 1.0
    noise_clip: float | None = 0.3
    discount_model_loss: bool = False
    lr: float = 1e-4
    clip_norm: float = 100.0
    tau: float = 0.005
    without: str = ""


def draw_noise(batch: int, rows: int, horizon: int, latent: int, action: int) -> Rows:
    """All the noise of one update: ``batch`` slices, ``rows`` transitions."""

    def latents(*shape: int) -> Tensor:
        return torch.randn(*shape, latent)

    def actions(*shape: int) -> Tensor:
        return torch.randn(*shape, action)

    return {
        "slice_z": latents(batch),
        "slice_step": latents(horizon, batch),
        "slice_action": actions(batch),
        "shared_z": latents(rows),
        "imagination_z": latents(rows),
        "imagination_step": latents(rows),
        "classifier_next_z": latents(rows),
        "imagined": torch.randperm(rows) < rows // 2,
        "critic_z": latents(rows),
        "critic_next_z": latents(rows),
        "critic_action": actions(rows),
        "policy_z": latents(rows),
        "policy_step": latents(horizon, rows),
        "policy_action": actions(horizon + 1, rows),
    }


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return weight @ x + bias


def elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.exp(x.clamp(max=0)) - 1)


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.sum() / len(x)
    variance = (x - mean).pow(2).sum() / len(x)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def elu_net(x: Tensor, params: list[Tensor]) -> Tensor:
    first, second, last = params[:2], params[2:4], params[4:]
    return linear(elu(linear(elu(linear(x, *first)), *second)), *last)


def value_net(x: Tensor, params: list[Tensor]) -> Tensor:
    first, norm, second, last = params[:2], params[2:4], params[4:6], params[6:]
    hidden = torch.tanh(layer_norm(linear(x, *first), *norm))
    return linear(elu(linear(hidden, *second)), *last)


def gaussian_net(x: Tensor, params: list[Tensor]) -> tuple[Tensor, Tensor]:
    output = elu_net(x, params)
    size = len(output) // 2
    mean, std = output[:size], output[size:]
    std = 10 - softplus(10 - std)
    return 30 * torch.tanh(mean / 30), 0.1 + softplus(std - 0.1)


def frozen(params: list[Tensor]) -> list[Tensor]:
    return [p.detach() for p in params]


class Reference:
    """Losses and updates from parameter lists; ``std`` is the noise of the moment."""

    def __init__(self, online: Parameters, target: Parameters, settings: Settings):
        self.online = online
        self.target = target
        self.settings = settings
        self.std = 1.0
        self.moments = {
            net: [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
            for net, params in online.items()
        }
        self.updates = 0
        # Of each action so far: was its noise clipped, was it clamped?
        self.clipped: list[bool] = []
        self.clamped: list[bool] = []

    # -- single rows -----------------------------------------------------------------

    def sample(self, dist: tuple[Tensor, Tensor], eps: Tensor) -> Tensor:
        mean, std = dist
        if self.settings.without == "gradient of the mean":
            mean = mean.detach()
        if self.settings.without == "gradient of the std":
            std = std.detach()
        return mean + std * eps

    def act(self, z: Tensor, eps: Tensor, params: list[Tensor]) -> Tensor:
        s = self.settings
        noise = self.std * eps
        if s.noise_clip is not None and s.without != "noise clip":
            self.clipped += (noise.abs() > s.noise_clip).tolist()
            noise = noise.clamp(-s.noise_clip, s.noise_clip)
        action = torch.tanh(elu_net(z, params)) + noise
        if s.without == "clamp":
            return action
        inside = action.clamp(s.low + 1e-6, s.high - 1e-6)
        self.clamped += (inside != action).tolist()
        if s.without == "straight-through gradient":
            return inside
        return action + (inside - action).detach()

    def values(self, z: Tensor, a: Tensor, params: list[Tensor]) -> Tensor:
        x, half = torch.cat([z, a]), len(params) // 2
        return torch.cat([value_net(x, params[:half]), value_net(x, params[half:])])

    # -- the five losses -------------------------------------------------------------

    def model_loss(self, slices: Rows, noise: Rows) -> dict[str, Tensor]:
        s, net = self.settings, self.online
        batch, horizon = slices["reward"].shape
        losses, kls, rewards, ends = [], [], [], []
        for b in range(batch):
            start = gaussian_net(slices["observation"][b, 0], net["encoder"])
            z = self.sample(start, noise["slice_z"][b])
            loss = torch.zeros(())
            for t in range(horizon):
                x = torch.cat([z, slices["action"][b, t]])
                mean, std = gaussian_net(x, net["model"])
                next_mean, next_std = gaussian_net(
                    slices["next_observation"][b, t], self.target["encoder"]
                )
                kl = torch.zeros(())
                for i in range(len(z)):
                    ratio = next_std[i] / std[i]
                    squares = std[i] ** 2 + (mean[i] - next_mean[i]) ** 2
                    kl = kl + ratio.log() + squares / (2 * next_std[i] ** 2) - 0.5
                reward = value_net(x, frozen(net["reward"]))[0]
                weight = s.gamma**t if s.discount_model_loss else 1.0
                loss = loss + weight * (s.kl_coef * kl - s.reward_coef * reward)
                kls.append(kl.detach())
                rewards.append(reward.detach())
                z = self.sample((mean, std), noise["slice_step"][t, b])
            action = self.act(z.detach(), noise["slice_action"][b], net["actor"])
            end = self.values(z, action.detach(), frozen(net["qvalue"])).min()
            weight = s.gamma**horizon if s.discount_model_loss else 1.0
            losses.append(loss - weight * s.value_coef * end)
            ends.append(end.detach())
        return {
            "loss_model": mean_of(losses),
            "kl": mean_of(kls),
            "model_reward": mean_of(rewards),
            "terminal_value": mean_of(ends),
        }

    def reward_classifier_loss(self, rows: Rows, noise: Rows) -> dict[str, Tensor]:
        errors, entropies, correct = [], [], []
        for n in range(len(rows["reward"])):
            dist = gaussian_net(rows["observation"][n], self.target["encoder"])
            after = gaussian_net(rows["next_observation"][n], self.target["encoder"])
            action = rows["action"][n]
            z = self.sample(dist, noise["shared_z"][n]).detach()
            predicted = value_net(torch.cat([z, action]), self.online["reward"])[0]
            errors.append((predicted - rows["reward"][n]) ** 2)

            start = self.sample(dist, noise["imagination_z"][n]).detach()
            if self.settings.without == "own latent of the imagined step":
                start = z
            step = gaussian_net(torch.cat([start, action]), self.online["model"])
            imagined = self.sample(step, noise["imagination_step"][n]).detach()
            real = self.sample(after, noise["classifier_next_z"][n]).detach()
            is_real = not noise["imagined"][n]
            x = torch.cat([z, action, real if is_real else imagined])
            logits = value_net(x, self.online["classifier"])
            label = int(is_real)
            total = torch.log(torch.exp(logits[0]) + torch.exp(logits[1]))
            entropies.append(total - logits[label])
            correct.append((logits[label] > logits[1 - label]).to(logits))
        return {
            "loss_reward": mean_of(errors),
            "loss_classifier": mean_of(entropies),
            "classifier_accuracy": mean_of(correct),
        }

    def qvalue_loss(self, rows: Rows, noise: Rows) -> dict[str, Tensor]:
        losses, predictions, targets, errors = [], [], [], []
        for n in range(len(rows["reward"])):
            after = gaussian_net(rows["next_observation"][n], self.target["encoder"])
            next_z = self.sample(after, noise["critic_next_z"][n])
            action = self.act(next_z, noise["critic_action"][n], self.online["actor"])
            value = self.values(next_z, action, self.target["qvalue"]).min()
            if rows["terminated"][n] and self.settings.without != "termination":
                value = torch.zeros(())
            target = (rows["reward"][n] + self.settings.gamma * value).detach()
            now = gaussian_net(rows["observation"][n], self.target["encoder"])
            z = self.sample(now, noise["critic_z"][n]).detach()
            q1, q2 = self.values(z, rows["action"][n], self.online["qvalue"])
            losses.append(((q1 - target) ** 2 + (q2 - target) ** 2) / 2)
            predictions.append(((q1 + q2) / 2).detach())
            targets.append(target)
            errors.append((((q1 - target).abs() + (q2 - target).abs()) / 2).detach())
        return {
            "loss_qvalue": mean_of(losses),
            "pred_value": mean_of(predictions),
            "target_value": mean_of(targets),
            "td_error": mean_of(errors),
        }

    def actor_loss(self, rows: Rows, horizon: int, noise: Rows) -> dict[str, Tensor]:
        s, net = self.settings, self.online
        objectives, rewards, ratios, values, returns = [], [], [], [], []
        for n in range(len(rows["reward"])):
            start = gaussian_net(rows["observation"][n], self.target["encoder"])
            z = self.sample(start, noise["policy_z"][n]).detach()
            zs, actions = [z], []
            for t in range(horizon + 1):
                eps = noise["policy_action"][t, n]
                actions.append(self.act(zs[t].detach(), eps, net["actor"]))
                if t < horizon:
                    x = torch.cat([zs[t], actions[t]])
                    step = gaussian_net(x, frozen(net["model"]))
                    zs.append(self.sample(step, noise["policy_step"][t, n]))
            q = [
                self.values(z, a.detach(), frozen(net["qvalue"])).min()
                for z, a in zip(zs, actions, strict=True)
            ]
            objective, g = torch.zeros(()), q[horizon]
            for t in reversed(range(horizon)):
                x = torch.cat([zs[t], actions[t]])
                reward = value_net(x, frozen(net["reward"]))[0]
                x = torch.cat([x, zs[t + 1].detach()])
                logits = value_net(x, frozen(net["classifier"]))
                ratio = logits[1] - logits[0]
                g = (reward + s.classifier_coef * ratio) + s.gamma * (
                    (1 - s.lmbda) * q[t + 1] + s.lmbda * g
                )
                objective = objective + s.gamma**t * g / horizon
                rewards.append(reward.detach())
                ratios.append(ratio.detach())
                values.append(q[t + 1].detach())
                returns.append(g.detach())
            objectives.append(objective)
        return {
            "loss_actor": -mean_of(objectives),
            "imagined_reward": mean_of(rewards),
            "imagined_log_ratio": mean_of(ratios),
            "imagined_value": mean_of(values),
            "lambda_return": mean_of(returns),
        }

    def group(
        self, name: str, slices: Rows, rows: Rows, noise: Rows
    ) -> dict[str, Tensor]:
        """Losses of one optimizer step at the present parameters, and their metrics."""
        if name == "model":
            return self.model_loss(slices, noise)
        if name == "reward_classifier":
            return self.reward_classifier_loss(rows, noise)
        if name == "qvalue":
            return self.qvalue_loss(rows, noise)
        return self.actor_loss(rows, slices["reward"].shape[1], noise)

    def losses(self, slices: Rows, rows: Rows, noise: Rows) -> dict[str, Tensor]:
        """All losses at the present parameters, and their metrics."""
        results: dict[str, Tensor] = {}
        for name in STEPS:
            results.update(self.group(name, slices, rows, noise))
        return results

    def term(self, term: str, slices: Rows, rows: Rows, noise: Rows) -> Tensor:
        """One of the losses at the present parameters."""
        name = next(name for name in STEPS if term.removeprefix("loss_") in name)
        return self.group(name, slices, rows, noise)[term]

    # -- one update ------------------------------------------------------------------

    def optimizer_step(self, loss: Tensor, nets: tuple[str, ...]) -> Tensor:
        """Adam on the clipped gradient; returns the norm before the clip."""
        s = self.settings
        params = [p for net in nets for p in self.online[net]]
        moments = [m for net in nets for m in self.moments[net]]
        grads = torch.autograd.grad(loss, params)
        norm = torch.sqrt(sum(g.pow(2).sum() for g in grads))
        # The small constant is that of PyTorch's clip.
        scale = min(1.0, s.clip_norm / (norm.item() + 1e-6))
        for param, (first, second), grad in zip(params, moments, grads, strict=True):
            first.copy_(0.9 * first + 0.1 * scale * grad)
            second.copy_(0.999 * second + 0.001 * (scale * grad) ** 2)
            mean = first / (1 - 0.9**self.updates)
            square = second / (1 - 0.999**self.updates)
            param.data -= s.lr * mean / (square.sqrt() + 1e-8)
        return norm

    def update(self, slices: Rows, rows: Rows, noise: Rows) -> dict[str, Tensor]:
        """The four optimizer steps in order, then the targets; returns the metrics."""
        self.updates += 1
        metrics: dict[str, Tensor] = {}
        for name, nets in STEPS.items():
            results = self.group(name, slices, rows, noise)
            loss = sum(v for k, v in results.items() if k.startswith("loss_"))
            metrics.update(results)
            metrics[f"grad_norm_{name}"] = self.optimizer_step(loss, nets)
        for net in TARGETS:
            for old, new in zip(self.target[net], self.online[net], strict=True):
                old.copy_((1 - self.settings.tau) * old + self.settings.tau * new.data)
        return metrics


def mean_of(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum() / len(values)


def scheduled_std(initial: float, final: float, steps: int, n: int) -> float:
    """Linear schedule at training step ``n``."""
    return initial + (final - initial) * min(n / steps, 1.0)


def clip_share(flags: list[bool]) -> float:
    """Share of True, in [0, 1]; NaN where nothing was noted."""
    return sum(flags) / len(flags) if flags else math.nan
