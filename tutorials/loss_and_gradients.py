"""The loss: each term, which parts it trains, and what each coefficient does.

**What you will learn**

- to compute each of the five terms by hand, in a few lines;
- which parameters a term trains, and which its gradient only passes through;
- that one optimizer on the sum sees the same gradients as five on the parts;
- what happens to encoder and model without the KL, and without reward and value;
- what `classifier_coef`, `lmbda`, `gamma` and `noise_clip` do.

You need to know the six parts (`parts.py`) and PyTorch's autograd. Equations are those
of Ghugare et al., "Simplifying Model-based RL" (ICLR 2023,
https://arxiv.org/abs/2209.08466).

Run it as `python tutorials/loss_and_gradients.py`: under a minute on one processor
core. The three figures go to `runs/tutorial-loss`, or to the folder in `ALM_OUTPUT`.
`ALM_SMOKE=1` makes everything small for a quick check. Before: `parts.py`. Next:
`trainer.py`.
"""

# %%
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tensordict import TensorDictBase
from torch import Tensor
from torch.distributions import kl_divergence
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from alm_torchrl import (
    ALMLoss,
    ALMOptimizationStepper,
    make_alm_loss,
    make_env,
    make_replay_buffer,
)
from alm_torchrl.functional import lambda_return

torch.set_num_threads(1)
torch.manual_seed(0)
SMOKE = os.environ.get("ALM_SMOKE") == "1"
OUTPUT = Path(os.environ.get("ALM_OUTPUT", "runs/tutorial-loss"))
OUTPUT.mkdir(parents=True, exist_ok=True)
STEPS = 100 if SMOKE else 600
UPDATES = 3 if SMOKE else 150
HORIZON = 3
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")

# %% [markdown]
# ## A loss and a batch
#
# `make_alm_loss` builds the six parts for an environment, and their loss. The batch
# comes from random steps of the pendulum.

# %%
env = make_env("Pendulum-v1", action_bounds="rescale", seed=0)
steps = env.rollout(STEPS, break_when_any_done=False)
buffer = make_replay_buffer(1000, batch_size=64, horizon=HORIZON)
buffer.extend(steps)
batch = buffer.sample()
slices, transitions = batch["slice"], batch["transition"]
SIZE = {"latent_dim": 8, "hidden_dim": 64, "model_hidden_dim": 64, "gamma": 0.95}


def make_loss(**coefficients: float) -> ALMLoss:
    """A small loss, with the same parameters for all coefficients."""
    torch.manual_seed(0)
    loss = make_alm_loss(env, **SIZE, **coefficients)
    # Moves the targets. TorchRL warns about a loss without one.
    SoftUpdate(loss, tau=0.05)
    return loss


loss = make_loss()

# %% [markdown]
# ## Each term by hand
#
# The terms sample latents and actions. To compare numbers, let the loss take each
# distribution's mean instead of a sample:


# %%
@contextmanager
def means_for_samples(loss: ALMLoss) -> Iterator[None]:
    """Inside, nothing in the loss is random."""
    loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        yield
    loss.deterministic_sampling_mode = ExplorationType.RANDOM


# %% [markdown]
# **Encoder and model** (Eq. 7). Encode the first observation of a slice and let the
# model follow the recorded actions. Each imagined latent should be where the target
# encoder puts the next observation, which the KL measures; and reward model and critics
# should expect much from it. The verbs of `loss.latents` run a network with one set of
# parameters: "live" ones are trained, "frozen" ones (the default) are not, "target"
# ones (the encoder's default) are the slow copies.


# %%
def imagine_along(loss: ALMLoss, slices: TensorDictBase) -> tuple[Tensor, ...]:
    """KL and predicted reward of each step, [B, K], and the terminal value, [B]."""
    latent = loss.latents.sample(loss.latents.encode(slices[:, 0], "live"))
    kl, reward = [], []
    for t in range(HORIZON):
        action = slices["action"][:, t]
        imagined = loss.latents.step(latent, action, "live")
        encoded = loss.latents.encode(slices["next"][:, t])
        kl.append(kl_divergence(imagined, encoded))
        reward.append(loss.latents.predict_reward(latent, action))
        latent = loss.latents.sample(imagined)
    value = loss.latents.state_action_value(latent, loss.latents.act(latent)).amin(-1)
    return torch.stack(kl, 1), torch.stack(reward, 1), value


with means_for_samples(loss):
    kl, reward, value = imagine_along(loss, slices)
    by_hand = (kl.sum(1) - reward.sum(1) - value).mean()
    assert_close(loss.model_loss(batch)[0], by_hand)

# %% [markdown]
# **Reward** (Eq. 11): a squared error. **Critics** (Eq. 10): a squared TD error, with
# the minimum of the two target critics, and no value after a termination.

# %%
action, recorded = transitions["action"], transitions["next", "reward"][:, 0]
going_on = (~transitions["next", "terminated"][:, 0]).float()
with means_for_samples(loss):
    latent = loss.latents.encode(transitions).mean
    following = loss.latents.encode(transitions["next"]).mean
    error = loss.latents.predict_reward(latent, action) - recorded
    assert_close(loss.reward_loss(batch)[0].detach(), error.square().mean().detach())
    next_values = loss.latents.state_action_value(
        following, loss.latents.act(following), "target"
    )
    target = recorded + 0.95 * going_on * next_values.amin(-1)
    values = loss.latents.state_action_value(latent, action)
    error = values - target[:, None]
    assert_close(loss.qvalue_loss(batch)[0].detach(), error.square().mean().detach())

# %% [markdown]
# **Classifier** (Eq. 9): cross entropy. A random half of the rows has an imagined next
# latent, the others an encoded one. To know which, we choose them here.

# %%
chosen = torch.arange(64) < 32
transitions["imagined"] = chosen
with means_for_samples(loss):
    imagined = loss.latents.step(latent, action).mean
    shown = torch.where(chosen[:, None], imagined, following)
    logits = loss.latents.classify(latent, action, shown)
    by_hand = cross_entropy(logits, (~chosen).long())
    assert_close(loss.classifier_loss(batch)[0].detach(), by_hand.detach())

# %% [markdown]
# **Actor** (Eq. 8, A.3): minus the return of an imagined rollout. Each step earns the
# predicted reward plus `classifier_coef` times the classifier's log ratio, which is low
# where the classifier can tell the model from the encoder. `lmbda` weights the returns
# of all lengths.

# %%
with means_for_samples(loss):
    z = latent
    earned, expected = [], []
    for _ in range(HORIZON):
        a = loss.latents.act(z)
        after = loss.latents.step(z, a).mean
        logits = loss.latents.classify(z, a, after)
        log_ratio = logits[:, 1] - logits[:, 0]
        earned.append(loss.latents.predict_reward(z, a) + 0.1 * log_ratio)
        expected.append(
            loss.latents.state_action_value(after, loss.latents.act(after)).amin(-1)
        )
        z = after
    step, total = expected[-1], torch.zeros(64)
    for t in reversed(range(HORIZON)):
        step = earned[t] + 0.95 * (0.05 * expected[t] + 0.95 * step)
        total = total + 0.95**t * step
    by_hand = -(total / HORIZON).mean()
    assert_close(loss.actor_loss(batch)[0].detach(), by_hand.detach())

# %% [markdown]
# ## Which parts a term trains
#
# Ask autograd for the gradient of each term with respect to all parameters. A term does
# not depend on the parts without an entry.

# %%
PARTS = ("encoder", "model", "reward", "classifier", "qvalue", "actor")
TERMS = ("loss_model", "loss_reward", "loss_classifier", "loss_qvalue", "loss_actor")
parameters = [
    parameter
    for part in PARTS
    for parameter in getattr(loss, f"{part}_params").parameters()
]
owners = [part for part in PARTS for _ in getattr(loss, f"{part}_params").parameters()]


def gradient(value: Tensor) -> tuple[Tensor | None, ...]:
    """Gradient with respect to each parameter, or None."""
    return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)


losses = loss(batch)
norms = {}
for term in TERMS:
    for part, grad in zip(owners, gradient(losses[term]), strict=True):
        if grad is not None:
            before = norms.get((term, part), 0.0)
            norms[term, part] = (before**2 + grad.norm().item() ** 2) ** 0.5
assert set(norms) == {
    ("loss_model", "encoder"),
    ("loss_model", "model"),
    ("loss_reward", "reward"),
    ("loss_classifier", "classifier"),
    ("loss_qvalue", "qvalue"),
    ("loss_actor", "actor"),
}

# %%
figure = Figure(figsize=(7.0, 3.4), layout="constrained")
axes = figure.subplots()
table = torch.tensor(
    [[norms.get((term, part), float("nan")) for part in PARTS] for term in TERMS]
)
axes.imshow(table.log10(), cmap="Blues", vmin=-4, vmax=4, aspect="auto")
for row, term in enumerate(TERMS):
    for column, part in enumerate(PARTS):
        text = f"{norms[term, part]:.2g}" if (term, part) in norms else "none"
        color = "black" if (term, part) in norms else "0.7"
        axes.text(column, row, text, ha="center", va="center", color=color)
axes.set_xticks(range(len(PARTS)), PARTS)
axes.set_yticks(range(len(TERMS)), TERMS)
axes.set_xlabel("parameters of")
axes.set_title("Norm of the gradient of each term, before any training")
figure.savefig(OUTPUT / "routes.png", dpi=150)

# %% [markdown]
# Each column has one entry: each parameter learns from one term. So one optimizer on
# the sum sees the same gradients as an optimizer for each term, as in the paper:

# %%
alone = [gradient(losses[term]) for term in TERMS]
together = gradient(sum(losses[term] for term in TERMS))
for several, one in zip(zip(*alone, strict=True), together, strict=True):
    (single,) = [grad for grad in several if grad is not None]
    assert_close(one, single)

# %% [markdown]
# A term may run parts that it does not train. The actor's term runs model, reward
# model, classifier and critics with frozen parameters: its gradient passes through them
# to the action. And only the encoder's own term shapes the latents; reward model and
# critics do not.
#
# ## What the coefficients of encoder and model do
#
# `kl_coef`, `reward_coef` and `value_coef` weigh what the encoder and the model learn
# from. Train the whole agent on the random steps with four settings, and look at the
# model's rollouts: how far it is from the encoder, what reward it predicts, and whether
# the classifier can tell its latents from encoded ones.

# %%
SETTINGS: dict[str, dict[str, float]] = {
    "default": {},
    "kl_coef = 0.1": {"kl_coef": 0.1},
    "kl_coef = 0": {"kl_coef": 0.0},
    "reward_coef = value_coef = 0": {"reward_coef": 0.0, "value_coef": 0.0},
}


def train(coefficients: dict[str, float]) -> dict[str, Tensor]:
    """KL per step, predicted reward and the classifier's accuracy in each update."""
    loss = make_loss(**coefficients)
    stepper = ALMOptimizationStepper(loss, lr=2e-3, tau=0.05)
    rows = []
    for _ in range(UPDATES):
        drawn = buffer.sample()
        metrics = stepper.step(None, drawn)
        with torch.no_grad():
            kl, reward, _ = imagine_along(loss, drawn["slice"])
        accuracy = metrics["classifier_accuracy"]
        rows.append(torch.stack([kl.mean(), reward.mean(), accuracy]))
    names = ("kl", "reward", "accuracy")
    return dict(zip(names, torch.stack(rows, 1).unbind(), strict=True))


curves = {label: train(coefficients) for label, coefficients in SETTINGS.items()}
paid = steps["next", "reward"]

# %%
figure = Figure(figsize=(10.0, 3.6), layout="constrained")
panels = figure.subplots(1, 3)
window = min(10, UPDATES)
for color, (label, curve) in zip(COLORS, curves.items(), strict=True):
    for axes, values in zip(panels, curve.values(), strict=True):
        smooth = values.unfold(0, window, 1).mean(-1)
        axes.plot(range(window, UPDATES + 1), smooth, color=color, label=label)
for axes, name in zip(
    panels,
    (
        "KL of model and encoder, nats per step",
        "predicted reward per step",
        "accuracy of the classifier",
    ),
    strict=True,
):
    axes.set_xlabel("updates")
    axes.set_ylabel(name)
    axes.grid(alpha=0.3)
panels[0].set_yscale("log")
panels[1].axhline(paid.mean(), color="black", linestyle=":", label="paid, on average")
panels[2].axhline(0.5, color="black", linestyle=":")
handles, labels = panels[1].get_legend_handles_labels()
figure.legend(handles, labels, ncols=5, loc="outside upper center", fontsize="small")
figure.savefig(OUTPUT / "coefficients.png", dpi=150)

# %% [markdown]
# Without the KL, encoder and model move the latents to where reward model and critics
# predict most, whatever really happens: the pendulum never pays more than zero, and for
# a while this model predicts more. The classifier notices at once. With a tenth of the
# KL's weight the model takes longer to become accurate. Without reward and value it is
# as accurate here as with them; they matter where parts of the observation are
# irrelevant.

# %%
assert bool((paid <= 0).all())
last = {
    label: {name: values[-25:].mean().item() for name, values in curve.items()}
    for label, curve in curves.items()
}
if not SMOKE:
    for label in ("default", "reward_coef = value_coef = 0"):
        assert abs(last[label]["reward"] - paid.mean().item()) < 1.5
        assert last[label]["kl"] < 20
        assert last[label]["accuracy"] < 0.75
    hopeful = last["kl_coef = 0"]
    assert curves["kl_coef = 0"]["reward"].max() > 0
    assert hopeful["reward"] > paid.mean().item() + 3
    assert hopeful["kl"] > 20 * last["default"]["kl"]
    assert hopeful["accuracy"] > 0.9
    assert last["default"]["kl"] < last["kl_coef = 0.1"]["kl"] < hopeful["kl"]

# %% [markdown]
# ## What the coefficients of the actor do
#
# `classifier_coef`, the paper's c, weighs the log ratio. The return of imagined steps
# is linear in it:


# %%
def imagined_return(classifier_coef: float) -> Tensor:
    """Return of the same imagined steps for another weight of the log ratio."""
    torch.manual_seed(2)
    loss.classifier_coef = classifier_coef
    with torch.no_grad():
        return loss.imagine(
            loss.latents.sample(loss.latents.encode(transitions)), HORIZON
        )["lambda_return"]


assert_close(
    imagined_return(0.2) - imagined_return(0.1),
    imagined_return(0.1) - imagined_return(0.0),
    atol=1e-4,
    rtol=1e-4,
)
loss.classifier_coef = 0.1

# %% [markdown]
# `gamma` discounts, and `lmbda` says how much to trust longer imagination. At 0 the
# return is one imagined step and the critics' value after it; at 1 it is all K steps
# and the value at their end. The weights are the derivatives of the return:


# %%
def weights(lmbda: float) -> Tensor:
    """Weight of r_0 .. r_2 and Q_1 .. Q_3 in the return, for a discount of 1."""
    reward = torch.zeros(HORIZON, requires_grad=True)
    value = torch.zeros(HORIZON, requires_grad=True)
    lambda_return(reward, value, 1.0, lmbda)[0].backward()
    return torch.cat([reward.grad, value.grad])


assert_close(weights(0.0), torch.tensor([1.0, 0, 0, 1, 0, 0]))
assert_close(weights(1.0), torch.tensor([1.0, 1, 1, 0, 0, 1]))
for lmbda in (0.0, 0.5, 0.95, 1.0):
    assert_close(weights(lmbda)[HORIZON:].sum(), torch.tensor(1.0))

# %%
figure = Figure(figsize=(7.0, 3.0), layout="constrained")
axes = figure.subplots()
for number, (color, lmbda) in enumerate(
    zip(COLORS, (0.0, 0.5, 0.95, 1.0), strict=True)
):
    places = torch.arange(2 * HORIZON) + 0.2 * (number - 1.5)
    axes.bar(places, weights(lmbda), 0.18, color=color, label=f"lmbda = {lmbda:g}")
axes.set_xticks(range(6), ["$r_0$", "$r_1$", "$r_2$", "$Q_1$", "$Q_2$", "$Q_3$"])
axes.set_ylabel("weight in the return")
axes.set_ylim(0, 1.3)
axes.set_title("What the policy is judged by, K = 3, gamma = 1")
axes.legend(ncols=4, loc="upper center", fontsize="small")
figure.savefig(OUTPUT / "weights.png", dpi=150)

# %% [markdown]
# `noise_clip` bounds the action noise inside the losses, as in TD3, so that critics and
# actor score actions near the mean. The noise in the environment is not clipped:

# %%
with torch.no_grad():
    actions = loss.actor.get_dist(loss.encoder(transitions.copy()))
    latent = loss.latents.sample(loss.latents.encode(transitions, "live"))
    inside = torch.stack([loss.latents.act(latent) for _ in range(20)])
    outside = torch.stack([actions.sample() for _ in range(20)])
assert (inside.amax(0) - inside.amin(0)).max() <= 0.6 + 1e-6
assert (outside.amax(0) - outside.amin(0)).max() > 0.6

# %% [markdown]
# ## A coefficient of zero removes its term
#
# It also removes its cost: no classifier is kept, and no KL is computed.

# %%
bare = make_loss(classifier_coef=0.0, kl_coef=0.0)
assert bare.classifier is None
assert {"loss_classifier", "kl"} & set(bare(batch).keys()) == set()
assert {"loss_classifier", "kl"} <= set(losses.keys())

# %% [markdown]
# ## Conclusion
#
# There are five terms of a few lines, each with its own parameters. The KL keeps
# imagined latents close to encoded ones, which the rest of the objective needs. The
# classifier's log ratio tells the actor where they are not close.
#
# | argument | default | weighs |
# |---|---|---|
# | `kl_coef` | 1 | the KL in the objective of encoder and model |
# | `reward_coef`, `value_coef` | 1 | predicted rewards and terminal value there |
# | `classifier_coef` | 0.1 | the log ratio in the actor's reward |
# | `gamma` | 0.99 | the future, for critics and actor |
# | `lmbda` | 0.95 | long imagined returns against short ones |
# | `noise_clip` | 0.3 | bounds the action noise inside the losses |
# | `discount_model_loss` | off | Eq. 7 with gamma^t, as the paper prints it |
#
# **Next steps**
#
# - `trainer.py`: the whole agent learns to swing the pendulum up.
# - `look_inside.py`: the same quantities in a trained agent.
# - `theory.py`: why the KL makes the objective a lower bound.
