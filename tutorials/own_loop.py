"""A loop of your own: ALMLoss without a Trainer, and the same agent as a result.

**What you will learn**

- to train with the loss and plain PyTorch optimizers, in about sixty lines;
- the order of the steps of an update;
- that `make_trainer` does the same: both agree in every bit;
- what else the Trainer does that your own loop may need.

You need to know the parts (`parts.py`) and the terms of the loss
(`loss_and_gradients.py`). The settings are those of `trainer.py`, which explains them.

Run it as `python tutorials/own_loop.py`: under a minute on one processor core. The
figure goes to `runs/tutorial-own-loop`, or to the folder in `ALM_OUTPUT`. `ALM_SMOKE=1`
makes everything small for a quick check; nothing is learned then. Before: `trainer.py`.
Next: `replace_a_part.py`.
"""

# %%
from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam
from torchrl.data import ReplayBuffer
from torchrl.envs import EnvBase
from torchrl.objectives import SoftUpdate

from alm_torchrl import (
    ALMLoss,
    EpisodeEnv,
    NoiseSchedule,
    evaluate_policy,
    make_alm_loss,
    make_env,
    make_replay_buffer,
    make_trainer,
)

torch.set_num_threads(1)
SMOKE = os.environ.get("ALM_SMOKE") == "1"
OUTPUT = Path(os.environ.get("ALM_OUTPUT", "runs/tutorial-own-loop"))
OUTPUT.mkdir(parents=True, exist_ok=True)
SEED = 0
WARMUP, TOTAL, INTERVAL = (40, 10, 5) if SMOKE else (1000, 500, 250)
# Training steps of the comparison. TOTAL compares all; it takes twice the time.
COMPARED = 5 if SMOKE else 50
BATCH = 32 if SMOKE else 256
EPISODE = 20 if SMOKE else 200
LR, TAU, CLIP = 3e-3, 0.05, 100.0

# %% [markdown]
# ## The loop
#
# The loop is a generator: it yields after each training step, so that the caller can
# evaluate, draw, save or stop.


# %%
def make_agent(seed: int) -> tuple[EnvBase, ALMLoss]:
    """An environment and a loss with small networks for it."""
    env = make_env("Pendulum-v1", action_bounds="rescale", max_episode_steps=EPISODE)
    torch.manual_seed(seed)
    loss = make_alm_loss(
        env,
        latent_dim=16,
        hidden_dim=64,
        model_hidden_dim=64,
        gamma=0.9,
        noise_schedule=NoiseSchedule(initial=1.0, final=0.1, steps=4 * TOTAL // 5),
    )
    return env, loss


def train(seed: int) -> Iterator[tuple[int, ALMLoss, ReplayBuffer, dict[str, Adam]]]:
    """Trains an agent; yields it before the first and after each training step."""
    env, loss = make_agent(seed)
    policy = loss.acting_policy()
    target_update = SoftUpdate(loss, tau=TAU)
    buffer = make_replay_buffer(10_000, batch_size=BATCH, horizon=3)
    stored = [*loss.in_keys, ("next", "done")]
    optimizers = {
        term: Adam(
            [
                parameter
                for part in parts
                for parameter in getattr(loss, f"{part}_params").parameters()
            ],
            lr=LR,
            fused=True,  # rounds as the Trainer's
        )
        for term, parts in (
            ("model_loss", ("encoder", "model")),
            ("reward_classifier_loss", ("reward", "classifier")),
            ("qvalue_loss", ("qvalue",)),
            ("actor_loss", ("actor",)),
        )
    }
    torch.manual_seed(seed)
    env = EpisodeEnv(env)  # Each episode has a seed of its own, as in the Trainer.
    env.set_seed(seed)
    now = env.reset()
    for step in range(1 - WARMUP, TOTAL + 1):
        with torch.no_grad():
            now = env.rand_action(now) if step <= 0 else policy(now)
        done, now = env.step_and_maybe_reset(now)
        buffer.add(done.select(*stored))
        if step > 0:
            loss.noise_schedule.step()
            batch = buffer.sample()
            encoded = ()
            for term, optimizer in optimizers.items():
                value, _ = getattr(loss, term)(batch, *encoded)
                optimizer.zero_grad()
                value.backward()
                for group in optimizer.param_groups:
                    clip_grad_norm_(group["params"], CLIP)
                optimizer.step()
                if term == "model_loss":
                    encoded = (loss.encode_transitions(batch),)
            target_update.step()
        if step >= 0:
            yield step, loss, buffer, optimizers


source = inspect.getsource(make_agent) + inspect.getsource(train)
assert len(source.splitlines()) <= 65

# %% [markdown]
# What matters here:
#
# - Random steps come first, without updates. Then one update follows each environment
#   step, with the noise of the next action.
# - The order of the terms: each uses what those before it have learned. The classifier
#   sees the newest model, and the policy, updated last, the newest version of all
#   parts.
# - Each term has its own optimizer and its own clip of the gradient norm. `zero_grad`
#   and `backward` of one never touch the parameters of another, as
#   `loss_and_gradients.py` shows.
# - The targets move once, at the end of an update. Until then the target encoder gives
#   the same distributions for the same transitions: `encode_transitions` runs it once
#   for the three following terms. Without it, each term runs the encoder itself.
# - The loop ignores how an episode ended: replay reads `done` to keep slices within
#   episodes, and the critics' loss reads `terminated`.
#
# `ALMOptimizationStepper(loss).step(None, batch)` does all that happens to a batch here
# in one line, and checks that all numbers are finite.
#
# ## It learns
#
# An evaluation has random numbers of its own and restores the others, so it can stand
# anywhere in the loop.


# %%
def snapshot(
    loss: ALMLoss, buffer: ReplayBuffer, optimizers: dict[str, Adam]
) -> dict[str, Tensor]:
    """Copies of everything that decides how training continues."""
    state = {key: value.clone() for key, value in loss.state_dict().items()}
    for term, optimizer in optimizers.items():
        for number, moments in enumerate(optimizer.state.values()):
            for name, value in moments.items():
                state[f"{term}.{number}.{name}"] = value.clone()
    for key in ("observation", "action", ("next", "reward")):
        state[str(key)] = buffer[:][key].clone()
    state["random"] = torch.get_rng_state()
    return state


def mean_return(loss: ALMLoss) -> float:
    """Mean return of three episodes without noise."""
    policy = loss.acting_policy()
    return evaluate_policy(eval_env, policy, episodes=3)["return"].mean().item()


eval_env, _ = make_agent(SEED)
curve = {}
for step, loss, buffer, optimizers in train(SEED):
    if step % INTERVAL == 0:
        curve[step] = mean_return(loss)
    if step == COMPARED:
        mine = snapshot(loss, buffer, optimizers)
        curve[step] = mean_return(loss)

# %% [markdown]
# As in `trainer.py`, it scores below -800 before training and above -400 after it.

# %%
assert len(buffer) == WARMUP + TOTAL
if not SMOKE:
    assert curve[0] < -800
    assert curve[TOTAL] > -400

# %% [markdown]
# ## The Trainer does the same
#
# Now use `make_trainer` with the same settings and seeds. Building it draws random
# numbers, because the policy acts once as a check. So seed again before training.

# %%
env, loss = make_agent(SEED)
trainer = make_trainer(
    env,
    loss,
    total_steps=COMPARED,
    warmup_steps=WARMUP,
    batch_size=BATCH,
    capacity=10_000,
    lr=LR,
    tau=TAU,
    clip_norm=CLIP,
    seed=SEED,
)
torch.manual_seed(SEED)
trainer.train()
theirs = snapshot(loss, trainer.replay_buffer, trainer.optimization_stepper.optimizers)

# %% [markdown]
# After 1000 random and 50 training steps the two agree in every bit: parameters,
# targets, the optimizers' moments, all stored steps, and the state of the random
# generator. So both continue in the same way. (Set `COMPARED = TOTAL` to compare them
# at the end.)

# %%
assert theirs.keys() == mine.keys()
assert [key for key in mine if not mine[key].equal(theirs[key])] == []
theirs_return = mean_return(loss)
assert theirs_return == curve[COMPARED]

# %%
figure = Figure(figsize=(7.0, 3.6), layout="constrained")
axes = figure.subplots()
axes.plot(list(curve), list(curve.values()), "o-", color="#0072b2", label="own loop")
axes.plot(
    COMPARED,
    theirs_return,
    "s",
    color="#d55e00",
    ms=12,
    mfc="none",
    mew=2,
    label=f"Trainer, after {COMPARED} training steps",
)
axes.set_xlabel("training steps")
axes.set_ylabel("mean return of 3 episodes")
axes.set_title(f"Pendulum-v1, seed {SEED}")
axes.grid(alpha=0.3)
axes.legend(loc="upper left")
figure.savefig(OUTPUT / "own_loop.png", dpi=150)

# %% [markdown]
# ## What else the Trainer does
#
# - It stops at the first loss, gradient, observation or reward that is not finite, and
#   names it. In the loop above, a NaN would spread.
# - It saves checkpoints from which a run continues exactly (`stop_resume_act.py`), and
#   keeps the best policy.
# - It logs, evaluates and shows progress.
# - On a GPU it captures the whole update as one CUDA graph.
#
# ## Conclusion
#
# The loss needs only batches. Sixty lines of PyTorch make a complete agent, and the
# Trainer adds conveniences to these lines. Use your own loop where you need control.
#
# **Next steps**
#
# - Run other seeds, and draw their curves together.
# - Replace the four optimizers by one on the sum of `loss(batch)`: each term then sees
#   the other parts as they were before the update.
# - Step several environments, or several updates per step.
# - `replace_a_part.py`: other networks in the same loss.
