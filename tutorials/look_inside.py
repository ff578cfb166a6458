"""Look inside a trained agent.

**What you will learn**

- how far its latent model predicts, without seeing anything;
- whether the bound that it maximises is one, and how it compares with its critics;
- how much of the state is in its latent, and in how many dimensions;
- what its classifier knows, and what it could know.

Everything is measured on two agents: one that has been trained for a minute, and its
own copy from before. A number alone says little.

It assumes that you know the parts (`parts.py`) and the terms of the loss
(`loss_and_gradients.py`). The theory of the bound is in `theory.py`. The tutorial after
it is `stop_resume_act.py`.

Run it as `python tutorials/look_inside.py`: about a minute on one processor core. The
four figures go to `runs/tutorial-look-inside`, or to the folder in `ALM_OUTPUT`.
`ALM_SMOKE=1` makes everything small, to see that it runs.
"""

# %%
from __future__ import annotations

import copy
import os
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from alm_torchrl import (
    ALMLoss,
    NoiseSchedule,
    evaluate_policy,
    make_alm_loss,
    make_classifier,
    make_env,
    make_trainer,
)
from alm_torchrl.analysis.bias import bias_summary, bound_bias
from alm_torchrl.analysis.figures import plot_bias, plot_reliability, plot_rollout
from alm_torchrl.analysis.recording import record_transitions
from alm_torchrl.analysis.rollouts import latent_rollout
from alm_torchrl.analysis.statistics import latent_statistics

torch.set_num_threads(1)
SMOKE = os.environ.get("ALM_SMOKE") == "1"
OUTPUT = Path(os.environ.get("ALM_OUTPUT", "runs/tutorial-look-inside"))
OUTPUT.mkdir(parents=True, exist_ok=True)
UPDATES = 5 if SMOKE else 800
WARMUP = 70 if SMOKE else 300
PROBES = 5 if SMOKE else 300
TRANSITIONS = 200 if SMOKE else 1000
PAIRS = 50 if SMOKE else 300
SEED = 0

# %% [markdown]
# ## An agent
#
# A pendulum has to be swung up and held there. The state is its angle and its speed;
# the observation is cosine and sine of the angle, and the speed. The discount is such
# that the reward 100 steps ahead counts less than 1 %, so that a return can be measured
# within an episode of 200 steps.

# %%
env = make_env("Pendulum-v1", action_bounds="rescale")
test_env = make_env("Pendulum-v1", action_bounds="rescale")
torch.manual_seed(SEED)
loss = make_alm_loss(
    env,
    latent_dim=16,
    hidden_dim=64,
    model_hidden_dim=64,
    noise_schedule=NoiseSchedule(1.0, 0.1, steps=800),
    gamma=0.95,
)
trainer = make_trainer(
    env,
    loss,
    total_steps=UPDATES,
    warmup_steps=WARMUP,
    batch_size=64,
    capacity=10_000,
    lr=2e-3,
    tau=0.1,
    seed=SEED,
)
untrained = copy.deepcopy(loss)
trainer.train()
agents = {"before": untrained, "trained": loss}
scores = {
    name: evaluate_policy(test_env, agent.acting_policy(), episodes=1 if SMOKE else 3)[
        "return"
    ].mean()
    for name, agent in agents.items()
}
if not SMOKE:
    # A pendulum that hangs costs about 1000, one that is swung up at once 150.
    assert scores["before"] < -700
    assert scores["trained"] > -600

# %% [markdown]
# ## How far does the model see?
#
# The latent model gets one latent, then its own predictions, and the actions that were
# taken. What it says after t steps is compared with the latent that the encoder gives
# for what was really observed then. The error is in units of the spread of the latents:
# at 1, the mean of all latents would do as well.

# %%
rollouts = {name: latent_rollout(test_env, agent) for name, agent in agents.items()}
plot_rollout(rollouts["trained"], "Trained agent, open loop", OUTPUT / "rollout.png")
errors = {
    name: found["normalised_error"].median(0).values for name, found in rollouts.items()
}
if not SMOKE:
    assert errors["before"][1] > 0.8
    # Three steps are what it was trained to imagine. Fifty are too many.
    assert errors["trained"][3] < 0.3
    assert errors["trained"][50] > errors["trained"][3]

# %% [markdown]
# ## Is the bound one?
#
# Along whole episodes without action noise the return of each step is known. Next to it
# stand the two estimates that the agent has: the K-step bound that its policy
# maximises, and the smaller of its critics. (The weight of what the time limit cuts off
# is in `missing`.)

# %%
bias = {
    name: bound_bias(test_env, agent, pairs=PAIRS, cutoff=100)
    for name, agent in agents.items()
}
plot_bias(bias["trained"], "Trained agent, K = 3", OUTPUT / "bias.png")
assert bias["trained"]["missing"].max() < 0.01


def correlation(pairs: TensorDictBase, estimate: str) -> float:
    """Correlation of an estimate with the return."""
    return torch.corrcoef(torch.stack([pairs["monte_carlo"], pairs[estimate]]))[0, 1]


# %% [markdown]
# An untrained agent estimates nothing, and its returns are far below that, so its
# "bound" is above all of them. The trained one knows which states are better, and its
# bound lies below the returns: nothing in practice makes it a bound (`theory.py`), but
# here it is one on average. So are the critics, which lag behind an agent that gets
# better. The bound, whose first three rewards are predicted, lags less.

# %%
summary = {name: bias_summary(pairs) for name, pairs in bias.items()}
if not SMOKE:
    assert summary["before"]["bound", "bias", "mean"] > 0
    assert correlation(bias["before"], "bound") < 0.5
    assert correlation(bias["trained"], "bound") > 0.8
    assert summary["trained"]["bound", "bias", "mean"] < 0

# %% [markdown]
# ## What is in the latent?
#
# The latent has sixteen dimensions, and the state two. `effective_dim` counts those
# that are used: 16 if all directions vary alike, 1 if all latents lie on a line. And a
# linear map shows what can be read off a latent: here, the observation that it came
# from, on transitions that the map was not fitted to.

# %%
data = {
    seed: record_transitions(test_env, loss, transitions=TRANSITIONS, seed=seed)
    for seed in (0, 1)
}


def explained(agent: ALMLoss) -> Tensor:
    """Share of the variance of cosine, sine and speed that is read off, `[3]`."""
    latent = {seed: agent.encode(rows).mean for seed, rows in data.items()}
    inputs = {k: torch.nn.functional.pad(z, (0, 1), value=1) for k, z in latent.items()}
    weights = torch.linalg.lstsq(inputs[0], data[0]["observation"]).solution
    truth = data[1]["observation"]
    error = (inputs[1] @ weights - truth).square().mean(0)
    return 1 - error / truth.var(0, correction=0)


found = {name: latent_statistics(agent, data[1]) for name, agent in agents.items()}
if not SMOKE:
    assert found["trained"]["effective_dim"] < 6
    assert bool((explained(loss) > 0.8).all())

# %% [markdown]
# A picture of the same: the latents, turned so that their two widest directions lie in
# the plane, with the color of the angle and of the speed that they stand for.

# %%
COLORS = {"angle, rad": "hsv", "speed, rad/s": "viridis"}
observed = data[1]["observation"]
state = {
    "angle, rad": torch.atan2(observed[:, 1], observed[:, 0]),
    "speed, rad/s": observed[:, 2],
}
figure = Figure(figsize=(9.0, 3.8), layout="constrained")
panels = figure.subplots(1, 2)
latent = loss.encode(data[1]).mean
flat = torch.pca_lowrank(latent, 2)[0].mT
for panel, (name, values) in zip(panels, state.items(), strict=True):
    points = panel.scatter(*flat, c=values, cmap=COLORS[name], s=6)
    panel.set_xlabel("first principal direction")
    panel.set_ylabel("second principal direction")
    figure.colorbar(points, ax=panel, label=name)
figure.suptitle("Latents of the trained agent")
figure.savefig(OUTPUT / "latents.png", dpi=150)

# %% [markdown]
# ## What does the classifier know?
#
# It is asked whether a latent came from the encoder or from the latent model, and what
# it says is a part of the policy's reward: its logits stand for the log of the ratio of
# the two densities (Eq. 9). Half of its answers are right by chance. Two others show
# what there is to know. One is a new classifier of the same kind that learns from the
# same latents, but which do not change meanwhile. The other is the ratio of the
# densities itself, computed with the next observation, which no classifier gets.


# %%
def questions(rows: TensorDictBase) -> tuple[TensorDict, Tensor, Tensor]:
    """Real and imagined transitions `[2, N]`, which are real, and the log ratio."""
    now, after = loss.encode(rows), loss.encode(rows["next"])
    latent, action = loss.sample(now), rows["action"]
    imagined = loss.step(latent, action)
    following = torch.stack([loss.sample(imagined), loss.sample(after)])
    asked = TensorDict(
        {
            "latent": latent.expand_as(following),
            "action": action.expand(2, -1, -1),
            ("next", "latent"): following,
        },
        batch_size=following.shape[:-1],
    )
    real = torch.arange(2)[:, None].expand(asked.shape)
    return asked, real, after.log_prob(following) - imagined.log_prob(following)


def accuracy(logit: Tensor, real: Tensor) -> float:
    """Share of right answers, where a positive logit says "real"."""
    return ((logit > 0) == (real == 1)).float().mean().item()


torch.manual_seed(SEED)
probe = make_classifier(1, latent_dim=16, hidden_dim=64)
optimizer = torch.optim.Adam(probe.parameters(), lr=3e-3)
for _ in range(PROBES):
    with torch.no_grad():
        asked, real, _ = questions(data[0])
    logits = probe(asked)["logits"]
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), real.flatten()).backward()
    optimizer.step()
with torch.no_grad():
    asked, real, ratio = questions(data[1])
    logits = probe(asked)["logits"]
knows = {
    "the agent's": found["trained"]["classifier_accuracy"].item(),
    "a new one": accuracy(logits[..., 1] - logits[..., 0], real),
    "the densities": accuracy(ratio, real),
}
plot_reliability(found["trained"], "Trained agent", OUTPUT / "classifier.png")
if not SMOKE:
    assert 0.5 < knows["the agent's"] < knows["a new one"] < knows["the densities"] < 1

# %% [markdown]
# The agent's own classifier is the worst of the three: it learns while encoder and
# model change with every update, so it is always late. Its probabilities are modest,
# and the picture shows whether they are right: it is calibrated where the points lie on
# the diagonal. A policy that trusted a classifier which is certain and wrong would be
# led astray by it. The gap between the new one and the densities is what cannot be
# known without seeing the next observation, or what this network has not found in so
# few steps.

# %% [markdown]
# ## Conclusion
#
# The model sees a few steps ahead, and more than the three that its bound needs. The
# bound orders the states as the returns do. The latent holds the whole state in about
# two of its sixteen dimensions. The classifier is the weak part of this agent. What it
# would be without one (`classifier_coef=0`) is a question of a run, not of a picture.
#
# **Next steps**
#
# - `alm-torchrl diagnose RUN` measures and draws all of this for any run of
#   `alm-torchrl train`, and the bias over its checkpoints.
# - `stop_resume_act.py`: checkpoints, and policies that act.
# - `theory.py`: when the bound is a bound.
# - Train the classifier alone for longer between the updates of the rest (`own_loop.py`
#   shows where), and look whether the return changes, over several seeds.
