"""Look inside a trained agent.

**What you will learn**

- how far its latent model predicts without new observations;
- whether the bound that it maximises is below the return, and how it compares with its
  critics;
- how much of the state its latent holds, and in how many dimensions;
- what its classifier knows, and what it could know.

A number alone says little. So everything is measured on two agents: one trained for a
minute, and a copy of it from before the training.

You should know the parts (`parts.py`) and the terms of the loss
(`loss_and_gradients.py`). `theory.py` has the theory of the bound. The next tutorial is
`stop_resume_act.py`.

Run it with `python tutorials/look_inside.py`. It takes about a minute on one core. The
four figures go to `runs/tutorial-look-inside`, or to the folder in `ALM_OUTPUT`. With
`ALM_SMOKE=1` everything is small, to check that it runs.
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
from alm_torchrl.analysis import (
    bias_summary,
    bound_bias,
    latent_rollout,
    latent_statistics,
    record_transitions,
)
from alm_torchrl.analysis.figures import plot_bias, plot_reliability, plot_rollout

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
# The task is to swing a pendulum up and hold it there. The state is its angle and its
# speed. The observation is the cosine and sine of the angle, and the speed. With this
# discount, a reward 100 steps ahead counts less than 1 %. So the return can be measured
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
    # A hanging pendulum costs about 1000, one that is swung up at once about 150.
    assert scores["before"] < -700
    assert scores["trained"] > -600

# %% [markdown]
# ## How far does the model see?
#
# The latent model gets one latent and the actions that were taken. From then on it
# reads its own predictions. Its prediction for t steps ahead is compared with the
# latent that the encoder gives for the observation of that step. The error is in units
# of the spread of the latents: at 1, the mean of all latents is as good a guess.

# %%
rollouts = {name: latent_rollout(test_env, agent) for name, agent in agents.items()}
plot_rollout(rollouts["trained"], "Trained agent, open loop", OUTPUT / "rollout.png")
errors = {
    name: found["normalised_error"].median(0).values for name, found in rollouts.items()
}
if not SMOKE:
    assert errors["before"][1] > 0.8
    # It was trained to imagine three steps. Fifty are too many.
    assert errors["trained"][3] < 0.3
    assert errors["trained"][50] > errors["trained"][3]

# %% [markdown]
# ## Is the bound below the return?
#
# In whole episodes without action noise, the return of each step is known. It is
# compared with the agent's two estimates: the K-step bound that its policy maximises,
# and the smaller of its critics. (`missing` is the weight of what the time limit cuts
# off.)

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
# The untrained agent estimates values near zero. Its returns are far below zero, so its
# "bound" is above all of them. The trained agent knows which states are better, and its
# bound is below the returns on average. In practice nothing guarantees that
# (`theory.py`). The critics are below the returns too, because they lag behind an agent
# that improves. The bound lags less, because its first three rewards are predicted.

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
# The latent has sixteen dimensions, the state has two. `effective_dim` says how many
# are used: 16 if all directions vary alike, 1 if all latents are on a line. A linear
# map shows what can be read from a latent: here the observation behind it. The map is
# fitted to some transitions and tested on others.

# %%
data = {
    seed: record_transitions(test_env, loss, transitions=TRANSITIONS, seed=seed)
    for seed in (0, 1)
}


def explained(agent: ALMLoss) -> Tensor:
    """Explained share of the variance of cosine, sine and speed, `[3]`."""
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
# The next figure shows the latents along their two principal directions. The colors are
# the angle and the speed of the pendulum.

# %%
COLORS = {"angle, rad": "hsv", "speed, rad/s": "viridis"}
observed = data[1]["observation"]
state = {
    "angle, rad": torch.atan2(observed[:, 1], observed[:, 0]),
    "speed, rad/s": observed[:, 2],
}
figure = Figure(figsize=(9.0, 3.8), layout="constrained")
panels = figure.subplots(1, 2)
latent = loss.latents.encode(data[1]).mean
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
# The classifier says whether a latent came from the encoder or from the latent model.
# Its answer is part of the policy's reward: the logits estimate the log ratio of the
# two densities (Eq. 9). Half of the answers are right by chance. Two comparisons show
# what can be known. The first is a new classifier of the same kind, trained on the same
# latents while encoder and model stay fixed. The second is the ratio of the densities
# itself. It needs the next observation, which no classifier gets.


# %%
def questions(rows: TensorDictBase) -> tuple[TensorDict, Tensor, Tensor]:
    """Imagined and real transitions `[2, N]`, which are real, and the log ratio."""
    now, after = loss.latents.encode(rows), loss.latents.encode(rows["next"])
    latent, action = now.rsample(), rows["action"]
    imagined = loss.latents.step(latent, action)
    following = torch.stack([imagined.rsample(), after.rsample()])
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
    """Share of correct answers, where a positive logit means "real"."""
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
# The agent's own classifier is the worst of the three. Encoder and model change with
# every update, so it is always late. The figure shows whether its probabilities are
# right: a calibrated classifier has its points on the diagonal. A classifier that is
# certain and wrong would mislead the policy. The densities are better than the new
# classifier, either because they use the next observation or because the new classifier
# was trained for few steps.

# %% [markdown]
# ## Conclusion
#
# The model predicts a few steps ahead, more than the three that its bound needs. The
# bound orders the states as the returns do. The latent holds the whole state in about
# two of its sixteen dimensions. The classifier is the weak part of this agent. Whether
# the agent is better without one (`classifier_coef=0`), only another run can tell.
#
# **Next steps**
#
# - `alm-torchrl diagnose RUN` measures and draws this for any run of `alm-torchrl
#   train`; with `--which history` also the bias of each checkpoint.
# - `stop_resume_act.py`: checkpoints, and policies that act.
# - `theory.py`: when the bound holds.
# - Train the classifier for more steps between the other updates (`own_loop.py` shows
#   where), and see over several seeds whether the return changes.
