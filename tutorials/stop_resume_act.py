"""Stop a run, continue it exactly, and let the agent act.

**What you will learn**

- to write checkpoints with a Trainer, to stop it at any step, and to continue it bit by
  bit as if it had never stopped;
- what a checkpoint holds, and what happens if it is damaged;
- to make a run longer than planned;
- to load only the networks, with and without the code that made them;
- to act with them in a TorchRL environment and in a plain Gymnasium loop, and to make a
  film.

You need to know the Trainer (`trainer.py`). Before: `look_inside.py`.

Run it as `python tutorials/stop_resume_act.py`: about a minute on one processor core.
It needs pygame, which comes with the cli extra. The checkpoints and the film go to
`runs/tutorial-stop-resume-act`, or to the folder in `ALM_OUTPUT`; runs that an earlier
start of this script left there are removed. `ALM_SMOKE=1` makes everything small for a
quick check.
"""

# %%
from __future__ import annotations

import os
import shutil
from pathlib import Path

import gymnasium
import torch
from tensordict import TensorDict
from torchrl.checkpoint import CheckpointError

from alm_torchrl import (
    ALMLoss,
    ALMTrainer,
    NoiseSchedule,
    VerifiedCheckpoint,
    evaluate_policy,
    load_policy,
    make_alm_loss,
    make_env,
    make_trainer,
    random_policy,
)
from alm_torchrl.runs.agents import describe_spaces
from alm_torchrl.runs.film import film_policy
from alm_torchrl.runs.loading import ActingPolicy, find_checkpoint
from alm_torchrl.runs.settings import preset_config

torch.set_num_threads(1)
SMOKE = os.environ.get("ALM_SMOKE") == "1"
OUTPUT = Path(os.environ.get("ALM_OUTPUT", "runs/tutorial-stop-resume-act"))
for run in ("straight", "run", "damaged"):
    shutil.rmtree(OUTPUT / run, ignore_errors=True)
WARMUP = 70 if SMOKE else 500
SHORT = 12 if SMOKE else 60
LONG = 16 if SMOKE else 1500
EPISODES = 1 if SMOKE else 5
FILM = 6 if SMOKE else 120

# %% [markdown]
# ## A run with checkpoints
#
# To continue a run, its parts have to be made again: task, networks, settings. So let
# one function make them all. A `checkpoint_dir` is what turns checkpoints on. They are
# written every `checkpoint_interval` steps and at the end; here the end is enough.
#
# The metadata is for later. It describes the networks with the settings of the command
# line.

# %%
NETWORKS = {"latent_dim": 16, "hidden_dim": 64, "model_hidden_dim": 64, "gamma": 0.95}
NOISE = {"noise_initial": 1.0, "noise_final": 0.1, "noise_steps": LONG}


def make_loss() -> ALMLoss:
    """Small networks and their loss."""
    torch.manual_seed(0)
    return make_alm_loss(
        make_env("Pendulum-v1", action_bounds="rescale"),
        noise_schedule=NoiseSchedule(*NOISE.values()),
        **NETWORKS,
    )


def make_run(folder: Path, steps: int) -> ALMTrainer:
    """A new Trainer that keeps its checkpoints in a folder."""
    env = make_env("Pendulum-v1", action_bounds="rescale")
    settings = preset_config("quick", **NETWORKS, **NOISE).to_dict()
    metadata = {"settings": settings, "spaces": describe_spaces(env)}
    return make_trainer(
        env,
        make_loss(),
        total_steps=steps,
        warmup_steps=WARMUP,
        batch_size=64,
        capacity=10_000,
        lr=5e-3,
        tau=0.1,
        checkpoint_dir=folder / "checkpoints",
        checkpoint_metadata=lambda: metadata,
    )


# %% [markdown]
# First the run to compare with, without a stop:

# %%
straight = make_run(OUTPUT / "straight", SHORT)
straight.train()

# %% [markdown]
# ## Stop
#
# `request_stop` ends a run after the current step, and saves it. The command line calls
# it at Ctrl-C; your own hook can call it too. Here a hook stops the run halfway, in the
# middle of an episode.

# %%
stopped = make_run(OUTPUT / "run", SHORT)


def stop_halfway() -> None:
    """A hook that runs after each step."""
    if stopped.collected_frames == WARMUP + SHORT // 2:
        stopped.request_stop("half is enough")


stopped.register_op("post_steps", stop_halfway)
stopped.train()
assert stopped.optimization_stepper.optimizer_step_count == SHORT // 2

# %% [markdown]
# A checkpoint is a folder of arrays and JSON; nothing in it is pickled. It holds all
# that the next step depends on. `collector` is the running episode: its seed and the
# actions since, from which loading replays it and compares every observation.

# %%
checkpoint = find_checkpoint(OUTPUT / "run", components=None)
manifest = VerifiedCheckpoint().verify(checkpoint)
assert {
    "collector",
    "loss_module",
    "replay_buffer",
    "rng",
    "trainer_module.optimization_stepper",
    "trainer_state",
} <= set(manifest["components"])

# %% [markdown]
# ## Continue
#
# Make all parts anew, as another process would, with other random numbers.
# `load_from_file` restores everything.

# %%
torch.manual_seed(12345)
resumed = make_run(OUTPUT / "run", SHORT)
resumed.load_from_file(checkpoint)
assert resumed.collected_frames == WARMUP + SHORT // 2
resumed.train()

# %% [markdown]
# Each parameter, target and transition is equal, not only close. (This holds for the
# same versions and number of threads on the same kind of CPU. A GPU sums in another
# order.)

# %%
parameters = straight.loss_module.state_dict()
for name, value in resumed.loss_module.state_dict().items():
    assert torch.equal(value, parameters[name]), name
assert len(resumed.replay_buffer) == WARMUP + SHORT
assert bool((resumed.replay_buffer[:] == straight.replay_buffer[:]).all())

# %% [markdown]
# ## Damage
#
# The manifest has the SHA-256 of each file. With one flipped bit, nothing is loaded:

# %%
shutil.copytree(checkpoint, OUTPUT / "damaged")
record = manifest["components"]["loss_module"]
file = OUTPUT / "damaged" / record["path"] / "state.npz"
content = bytearray(file.read_bytes())
content[len(content) // 2] ^= 1
file.write_bytes(content)
before = make_loss()
refusal = ""
try:
    VerifiedCheckpoint(loss_module=before).load(OUTPUT / "damaged")
except CheckpointError as error:
    refusal = str(error)
assert "state.npz is damaged: expected SHA-256" in refusal
for name, value in make_loss().state_dict().items():
    assert torch.equal(value, before.state_dict()[name]), name

# %% [markdown]
# ## Go on for longer
#
# `total_steps` is not part of the state, so a complete run can be made longer. (Nothing
# compares the other settings here. `alm-torchrl train --resume` does, and refuses those
# that would make it another run.)

# %%
longer = make_run(OUTPUT / "run", LONG)
longer.load_from_file(find_checkpoint(OUTPUT / "run", components=None))
longer.train()
assert longer.optimization_stepper.optimizer_step_count == LONG

# %% [markdown]
# ## Act
#
# Acting needs only the networks: no replay, no optimizers, no Trainer. If you have the
# code that makes them, load the checkpoint's `loss_module` into them. `ActingPolicy`
# fixes whether the actions have noise.

# %%
loss = make_loss()
newest = find_checkpoint(OUTPUT / "run")
VerifiedCheckpoint(loss_module=loss).load(newest)
policy = ActingPolicy(loss.acting_policy(), deterministic=True)
test_env = make_env("Pendulum-v1", action_bounds="rescale")
random = evaluate_policy(test_env, random_policy(test_env), episodes=EPISODES)
trained = evaluate_policy(test_env, policy, episodes=EPISODES)
if not SMOKE:
    # Random actions cost about 1200, hanging 1000, swinging up at once 150.
    assert random["return"].mean() < -800
    assert trained["return"].mean() > -600

# %% [markdown]
# If you do not, `load_policy` makes them from the metadata. It also loads the runs of
# `alm-torchrl train`, which write the same metadata. Both policies sample the latent,
# so with the same random numbers their actions are the same:

# %%
loaded = load_policy(OUTPUT / "run")
observation = TensorDict(observation=torch.tensor([0.0, 1.0, 0.5]))
actions = []
for acting in (policy, loaded):
    torch.manual_seed(0)
    actions.append(acting(observation.clone())["action"])
assert torch.equal(*actions)

# %% [markdown]
# Now act without TorchRL, in Gymnasium's own loop. The agent was trained with
# `rescale`, so its actions in [-1, 1] must be mapped to the torques of the task, from
# -2 to 2:

# %%
task = gymnasium.make("Pendulum-v1")
observed, _ = task.reset(seed=0)
total, over = 0.0, False
while not over:
    tensordict = TensorDict(observation=torch.as_tensor(observed))
    action = loaded(tensordict)["action"].numpy()
    observed, reward, terminated, truncated, _ = task.step(2 * action)
    total += float(reward)
    over = terminated or truncated
print(f"return of one episode: {total:.0f}")
if not SMOKE:
    assert total > -600

# %% [markdown]
# ## Film
#
# Any environment that can render works. `.mp4` works as well as `.gif`.

# %%
stage = make_env("Pendulum-v1", action_bounds="rescale", render_mode="rgb_array")
film = film_policy(stage, loaded, OUTPUT / "pendulum.gif", seed=0, max_steps=FILM)
assert (film.steps, film.frames) == (FILM, FILM + 1)

# %% [markdown]
# ## Conclusion
#
# A stopped run is not lost. To continue it, another process needs the function that
# makes the parts, and the folder. To act, it needs only the folder.
#
# **Next steps**
#
# - On the command line, all of this is `alm-torchrl train`, Ctrl-C, the same command
#   again, `alm-torchrl evaluate RUN` and `alm-torchrl render RUN --output film.gif`.
# - Give `make_trainer` an `eval_env`: `checkpoints/best` then keeps the networks that
#   scored best, for `load_policy(RUN / "checkpoints" / "best")`.
# - Write an environment with state that outlives its resets, and give it
#   `checkpoint_state()` and `load_checkpoint_state(state)`.
# - Look into the trained agent: `alm-torchrl diagnose RUN`.
