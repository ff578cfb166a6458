"""The Trainer: swing up a pendulum, with its learning curve and TensorBoard.

**What you will learn**

- to train an agent with `make_trainer`, which builds a standard TorchRL `Trainer`;
- what one training step does, and that an evaluation does not change training;
- to add a hook of your own to the Trainer;
- to read what was logged, in TensorBoard or in Python;
- which settings of the paper a small and short run changes, and why.

It helps to know the parts and the loss (`parts.py`, `loss_and_gradients.py`).

Run it as `python tutorials/trainer.py`: under a minute on one processor core. Three
figures and the TensorBoard log go to `runs/tutorial-trainer`, or to the folder in
`ALM_OUTPUT`. `ALM_SMOKE=1` makes everything small for a quick check; nothing is learned
then. Before: `loss_and_gradients.py`. Next: `own_loop.py`.
"""

# %%
from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensordict import TensorDictBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.record.loggers.tensorboard import TensorboardLogger
from torchrl.trainers import Trainer

from alm_torchrl import (
    NoiseSchedule,
    make_alm_loss,
    make_env,
    make_trainer,
)

torch.set_num_threads(1)
SMOKE = os.environ.get("ALM_SMOKE") == "1"
OUTPUT = Path(os.environ.get("ALM_OUTPUT", "runs/tutorial-trainer"))
OUTPUT.mkdir(parents=True, exist_ok=True)
SEED = 0
WARMUP, TOTAL, INTERVAL = (40, 10, 5) if SMOKE else (1000, 500, 125)
BATCH = 32 if SMOKE else 256
EPISODE = 20 if SMOKE else 200

# %% [markdown]
# ## The task
#
# A pendulum hangs from a hinge whose motor is too weak to lift it directly. The reward
# is minus the squared angle from upright, minus a little for speed and torque: an
# episode of 200 steps returns about -1200 with random actions, and -150 if the pendulum
# is swung up and held. Training and evaluation have an environment each.

# %%
env, eval_env = (
    make_env("Pendulum-v1", action_bounds="rescale", max_episode_steps=EPISODE)
    for _ in range(2)
)

# %% [markdown]
# ## The agent
#
# The paper's networks have 512 and 1024 units and learn from 300,000 steps. This run
# has 500 steps, so it uses narrow networks, a learning rate of 0.003 instead of 0.0001,
# targets that move by 5 %, noise that falls within the run, and a discount that looks
# about ten steps ahead. The algorithm is unchanged.

# %%
torch.manual_seed(SEED)
loss = make_alm_loss(
    env,
    latent_dim=16,
    hidden_dim=64,
    model_hidden_dim=64,
    gamma=0.9,
    noise_schedule=NoiseSchedule(initial=1.0, final=0.1, steps=4 * TOTAL // 5),
)

# %% [markdown]
# ## The Trainer
#
# First come `warmup_steps` random steps. Then each environment step acts with noise,
# stores the transition, draws a batch of slices and transitions, and makes one update:
# encoder and model, reward and classifier, critics, actor, targets. Every
# `eval_interval` steps the policy acts without noise for whole episodes. The evaluation
# has random numbers of its own, so training is bit by bit the same without it.

# %%
shutil.rmtree(OUTPUT / "tensorboard", ignore_errors=True)
evaluations = []
trainer = make_trainer(
    env,
    loss,
    total_steps=TOTAL,
    warmup_steps=WARMUP,
    batch_size=BATCH,
    lr=3e-3,
    tau=0.05,
    eval_env=eval_env,
    eval_interval=INTERVAL,
    eval_episodes=3,
    on_evaluation=evaluations.append,
    logger=TensorboardLogger("tensorboard", log_dir=str(OUTPUT)),
    log_interval=10,
    seed=SEED,
)
assert isinstance(trainer, Trainer)

# %% [markdown]
# It is an ordinary Trainer and takes your own hooks. This one runs after each
# environment step and records the actor's noise:

# %%
noise = []
trainer.register_op("post_steps", lambda: noise.append(loss.noise_schedule.std.item()))

# %%
trainer.train()
trainer.logger.experiment.close()
assert trainer.collected_frames == WARMUP + TOTAL
assert trainer.optimization_stepper.optimizer_step_count == TOTAL
assert len(noise) == WARMUP + TOTAL
assert noise[0] == noise[WARMUP - 1] == 1.0
assert abs(noise[-1] - 0.1) < 1e-6

# %% [markdown]
# ## What was logged
#
# `tensorboard --logdir runs/tutorial-trainer` shows it in a browser. In Python, every
# value has its environment step, warm-up included:

# %%
events = EventAccumulator(str(OUTPUT / "tensorboard"))
events.Reload()


def logged(name: str) -> tuple[list[int], list[float]]:
    """Environment steps and values of one logged quantity."""
    scalars = events.Scalars(name)
    return [scalar.step for scalar in scalars], [scalar.value for scalar in scalars]


at, returns = logged("eval/return")
assert at == [row["environment_step"] for row in evaluations]
assert [row["training_step"] for row in evaluations] == [step - WARMUP for step in at]
assert torch.tensor(returns).allclose(
    torch.tensor([row["mean_return"] for row in evaluations])
)
assert len(logged("train/return")[0]) == (WARMUP + TOTAL) // EPISODE

# %% [markdown]
# ## The learning curve
#
# Each grey dot is the end of a training episode, with noise; the five of the warm-up
# are random. The evaluations are blue.

# %%
figure = Figure(figsize=(7.0, 3.8), layout="constrained")
axes = figure.subplots()
axes.plot(*logged("train/return"), "o", color="0.6", label="episodes of the training")
axes.errorbar(
    at,
    returns,
    yerr=[row["std_return"] for row in evaluations],
    color="#0072b2",
    marker="o",
    capsize=3,
    label="evaluations, mean and deviation of 3 episodes",
)
axes.axvspan(0, WARMUP, color="0.93", label="warm-up, no updates")
axes.set_xlim(0, WARMUP + TOTAL + 20)
axes.set_xlabel("environment steps")
axes.set_ylabel("return of an episode")
axes.set_title(f"Pendulum-v1, seed {SEED}")
axes.grid(alpha=0.3)
axes.legend(loc="upper left", fontsize="small")
figure.savefig(OUTPUT / "curve.png", dpi=150)

# %% [markdown]
# These are the quantities of `loss_and_gradients.py`, now in an agent that learns. The
# KL grows while the latents become informative; then the model catches up. The error of
# the reward falls at once. Values and imagined returns start at zero and fall to the
# value of the replayed steps, most of which were random: a better agent does not raise
# the value of its past steps.

# %%
PANELS = {
    "kl": "KL, nats per step",
    "loss_reward": "squared error of the reward",
    "classifier_accuracy": "accuracy of the classifier",
    "pred_value": "value of recorded actions",
    "lambda_return": "imagined return",
    "grad_norm_actor": "gradient norm of the actor",
}
figure = Figure(figsize=(9.0, 5.0), layout="constrained")
for axes, (name, label) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
    axes.plot(*logged(name), color="#0072b2")
    axes.set_title(label, fontsize=10)
    axes.grid(alpha=0.3)
    axes.set_xlabel("environment steps", fontsize=9)
figure.savefig(OUTPUT / "metrics.png", dpi=150)

# %% [markdown]
# ## Does it swing up?
#
# One episode, without noise. `loss.acting_policy()` is encoder and actor, and shares
# their parameters with the loss.


# %%
def angle(episode: TensorDictBase) -> torch.Tensor:
    """Degrees from upright, without jumps."""
    cosine, sine, _ = episode["observation"].unbind(-1)
    turned = torch.atan2(sine, cosine)
    steps = torch.remainder(turned.diff() + torch.pi, 2 * torch.pi) - torch.pi
    return (turned[0] + torch.cat([torch.zeros(1), steps.cumsum(0)])).rad2deg()


policy = loss.acting_policy()
eval_env.set_seed(3)
with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
    episode = eval_env.rollout(EPISODE, policy)

# %%
figure = Figure(figsize=(7.0, 3.8), layout="constrained")
upper, lower = figure.subplots(2, 1, sharex=True)
upper.plot(angle(episode), color="#0072b2")
for turn in range(-360, 361, 360):
    upper.axhline(turn, color="0.6", linewidth=1, linestyle="--")
upper.set_ylim(angle(episode).min() - 40, angle(episode).max() + 40)
upper.set_ylabel("degrees from upright")
upper.set_title("One episode of the trained policy; dashed is upright")
lower.plot(episode["action"], color="#d55e00")
lower.set_ylabel("action")
lower.set_ylim(-1.1, 1.1)
lower.set_xlabel("step of the episode")
figure.savefig(OUTPUT / "episode.png", dpi=150)

# %% [markdown]
# The checks: the last evaluation is above -400; the random episodes of the warm-up are
# below -800 on average, and so is the first evaluation; and the pendulum is within 30
# degrees of upright for most of the second half of the episode.

# %%
random = logged("train/return")[1][: WARMUP // EPISODE]
assert len(random) == WARMUP // EPISODE
if not SMOKE:
    assert sum(random) / len(random) < -800
    assert evaluations[0]["mean_return"] < -800
    assert evaluations[-1]["mean_return"] > -400
    upright = episode["observation"][100:, 0] > 0.866
    assert upright.float().mean() > 0.5

# %% [markdown]
# ## Conclusion
#
# A loss, an environment and one call make a Trainer, which evaluates and logs while it
# learns. A few hundred updates swing a pendulum up. One seed of a small task shows only
# that it works: to compare settings, run several seeds and report all.
#
# **Next steps**
#
# - The same from the command line, with checkpoints and a run folder: `alm-torchrl
#   train Pendulum-v1 --action-bounds rescale --warmup-steps 1000 --total-steps 500
#   --latent-dim 16 --hidden-dim 64 --model-hidden-dim 64 --batch-size 256 --gamma 0.9
#   --lr 0.003 --tau 0.05 --noise-steps 400`
# - `own_loop.py`: what the Trainer does, in a loop of your own.
# - `stop_resume_act.py`: checkpoints, and policies that act.
# - `alm-torchrl train` without arguments: HalfCheetah in a few minutes.
