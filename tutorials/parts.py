"""The parts and their keys: what flows from an observation to the loss.

**What you will learn**

- which six networks make an agent, what each of them reads and what it writes;
- that each is an ordinary TensorDictModule that you can call, replace or use elsewhere;
- how an action is chosen, in training and in an evaluation;
- what the replay buffer returns for one update, and which windows it never returns;
- which entries of a batch each term of the loss reads.

You need PyTorch, and the idea of a TensorDict: a dictionary of tensors that share their
first dimensions, the batch size. Nothing is trained here.

Run it as `python tutorials/parts.py`: seconds. The three figures go to
`runs/tutorial-parts`, or to the folder in `ALM_OUTPUT`. `ALM_SMOKE=1` makes everything
small for a quick check. Next: `loss_and_gradients.py`.
"""

# %%
from __future__ import annotations

import os
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tensordict import TensorDict, TensorDictBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from alm_torchrl import (
    ALMLoss,
    NoiseSchedule,
    make_actor,
    make_classifier,
    make_encoder,
    make_env,
    make_model,
    make_qvalue,
    make_replay_buffer,
    make_reward,
)

torch.set_num_threads(1)
torch.manual_seed(0)
SMOKE = os.environ.get("ALM_SMOKE") == "1"
OUTPUT = Path(os.environ.get("ALM_OUTPUT", "runs/tutorial-parts"))
OUTPUT.mkdir(parents=True, exist_ok=True)
DRAWS = 20 if SMOKE else 400

# %% [markdown]
# ## An environment
#
# `make_env` turns a Gymnasium task into a TorchRL environment. Each step is a
# TensorDict: observation and action, and under "next" what followed. The pendulum's
# observation has three numbers and its action one, which `rescale` maps to -1 to 1.
# Without a policy, `rollout` acts at random:

# %%
env = make_env("Pendulum-v1", action_bounds="rescale", seed=0)
steps = env.rollout(100)
assert steps.batch_size == (100,)
assert steps["observation"].shape == (100, 3)
assert steps["action"].shape == (100, 1)
assert steps["next", "reward"].shape == (100, 1)
assert bool((steps["next", "observation"][:-1] == steps["observation"][1:]).all())

# %% [markdown]
# ## Six parts
#
# The encoder turns the observation into a latent. All other parts read latents: the
# latent model predicts the next latent, the actor chooses actions, the reward model and
# the critics score them, and the classifier tells encoded next latents from imagined
# ones. The default sizes are the paper's. Here everything is small.

# %%
size = {"latent_dim": 8, "hidden_dim": 64}
schedule = NoiseSchedule(initial=1.0, final=0.1, steps=1000)
parts = {
    "encoder": make_encoder(3, **size),
    "actor": make_actor([-1.0], [1.0], noise_schedule=schedule, **size),
    "model": make_model(1, **size),
    "reward": make_reward(1, **size),
    "qvalue": make_qvalue(1, **size),
    "classifier": make_classifier(1, **size),
}

# %% [markdown]
# One TensorDict can pass through all of them. Each part reads its inputs there and adds
# its outputs:

# %%
td = steps[:5].select("observation")
for part in parts.values():
    part(td)
assert td["latent"].shape == (5, 8)
assert td["action"].shape == (5, 1)
assert td["next", "latent"].shape == (5, 8)
assert td["predicted_reward"].shape == (5, 1)
assert td["state_action_value"].shape == (5, 2)  # twin critics
assert td["logits"].shape == (5, 2)  # imagined, encoded

# %% [markdown]
# The parts depend on each other through keys only. Your own module with the same keys
# can replace any of them; `replace_a_part.py` does so.

# %%
columns: list[str | tuple[str, ...]] = ["observation"]
columns += [key for part in parts.values() for key in part.out_keys]
assert len(columns) == len(set(columns))  # nothing is written twice


def show(key: str | tuple[str, ...]) -> str:
    """A key as a reader would write it."""
    return key if isinstance(key, str) else "/".join(key)


def draw_table(name: str, title: str, rows: list[str], heads: list[str]) -> Figure:
    """An empty table of `rows` by `heads`."""
    figure = Figure(figsize=(8.0, 1.9 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_xticks(range(len(heads)), heads, rotation=40, ha="right", fontsize=9)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlim(-0.6, len(heads) - 0.4)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_ylabel(name)
    axes.set_title(title)
    axes.grid(alpha=0.25)
    return figure


figure = draw_table(
    "part", "What each part reads and writes", list(parts), [show(k) for k in columns]
)
axes = figure.axes[0]
for row, part in enumerate(parts.values()):
    read = [columns.index(key) for key in part.in_keys]
    written = [columns.index(key) for key in part.out_keys]
    axes.plot(read, [row] * len(read), "o", color="#d55e00", ms=11, mfc="none", mew=2)
    axes.plot(written, [row] * len(written), "s", color="#0072b2", ms=10)
axes.plot([], [], "o", color="#d55e00", ms=9, mfc="none", mew=2, label="reads")
axes.plot([], [], "s", color="#0072b2", ms=8, label="writes")
axes.legend(loc="upper right")
figure.savefig(OUTPUT / "keys.png", dpi=150)

# %% [markdown]
# ## Latents are random
#
# Encoder and model are Gaussians with a mean and a standard deviation for each
# dimension. A call draws a sample, and `get_dist` returns the distribution. With the
# exploration type `DETERMINISTIC`, a call returns the mean.

# %%
encoder, actor = parts["encoder"], parts["actor"]
first, second = encoder(steps[:5].copy()), encoder(steps[:5].copy())
assert bool((first["latent"] != second["latent"]).all())
assert bool((first["latent_loc"] == second["latent_loc"]).all())
with set_exploration_type(ExplorationType.DETERMINISTIC):
    mean = encoder(steps[:5].copy())
assert bool((mean["latent"] == mean["latent_loc"]).all())
assert encoder.get_dist(steps[:5]).mean.equal(mean["latent"])

# %% [markdown]
# ## An action
#
# The actor's mean is a tanh. Its noise follows a schedule in training steps, and a
# clamp keeps the sum within the bounds:

# %%
latents = {"latent": torch.randn(1000, 8)}
acted = actor(TensorDict(latents, batch_size=[1000]))
assert bool((acted["action_scale"] == 1.0).all())
assert bool((acted["action"].abs() <= 1.0).all())
schedule.step(500)
acted = actor(TensorDict(latents, batch_size=[1000]))
assert acted["action_scale"].allclose(torch.tensor(0.55))  # half way to 0.1

# %% [markdown]
# ## The loss holds the parts
#
# `ALMLoss` takes the six parts. It shares their parameters: the modules you call are
# the ones that are trained. It also keeps slow copies of encoder and critics, the
# targets. They are buffers, which no optimizer sees; an updater moves them.

# %%
loss = ALMLoss(**parts)
updater = SoftUpdate(loss, tau=0.005)
trained = {id(parameter) for parameter in loss.parameters()}
for part in parts.values():
    assert trained >= {id(parameter) for parameter in part.parameters()}
assert trained.isdisjoint(id(target) for target in loss.buffers())
assert loss.noise_schedule is schedule

# %% [markdown]
# The acting policy is encoder and actor in one module. In an evaluation its action is
# without noise, but its latent is still a sample, as in the paper.

# %%
policy = loss.acting_policy()
assert policy.in_keys == ["observation"]
assert policy.out_keys == ["action"]
seen = steps[:5].select("observation")
with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
    once, again = policy(seen.copy())["action"], policy(seen.copy())["action"]
assert bool((once != again).any())
assert env.rollout(3, policy)["action"].shape == (3, 1)

# %% [markdown]
# ## Replay
#
# An update reads slices of K consecutive steps, for encoder and model, and single
# transitions, for all other terms. One `sample()` draws both independently.

# %%
buffer = make_replay_buffer(capacity=1000, batch_size=64, horizon=3)
buffer.extend(steps)
batch = buffer.sample()
assert batch["slice"].batch_size == (64, 3)
assert batch["transition"].batch_size == (64,)

# %% [markdown]
# All slices within an episode are equally likely, whatever the episode's length, and no
# slice crosses an episode's end. Take episodes of 20, 2 and 15 steps. The first has 18
# windows of three steps, the second none, the third 13. The two steps of the second
# episode are still drawn as transitions:

# %%
lengths = torch.tensor([20, 2, 15])
count = int(lengths.sum())
done = torch.zeros(count, 1, dtype=torch.bool)
done[lengths.cumsum(0) - 1] = True
episodes = TensorDict(
    {"number": torch.arange(count), "next": {"done": done}}, batch_size=[count]
)
short = make_replay_buffer(capacity=100, batch_size=250, horizon=3)
short.extend(episodes)
draws = [short.sample() for _ in range(DRAWS)]
starts = torch.cat([drawn["slice", "number"][:, 0] for drawn in draws])
singles = torch.cat([drawn["transition", "number"] for drawn in draws])
started = starts.bincount(minlength=count).double()
valid = started > 0
assert int(valid.sum()) == 18 + 13
assert not bool(valid[18:22].any() or valid[-2:].any())
for drawn, possible in ((started[valid], 31), (singles.bincount().double(), 37)):
    expected = 250 * DRAWS / possible
    assert len(drawn) == possible
    assert bool(((drawn - expected).abs() < 6 * expected**0.5).all())

# %%
figure = Figure(figsize=(8.0, 3.0), layout="constrained")
axes = figure.subplots()
frequency = 100 * started / started.sum()
axes.bar(range(count), frequency, color="#0072b2", label="a slice begins here")
axes.axhline(
    100 / 31, color="#d55e00", linestyle="--", label="one in 31, the valid slices"
)
for end in lengths.cumsum(0).tolist():
    axes.axvline(end - 0.5, color="black", linewidth=1)
axes.plot([], [], color="black", linewidth=1, label="an episode ends")
axes.set_xlim(-0.8, count + 0.2)
axes.set_ylim(0, 5.5)
axes.set_xlabel("stored step")
axes.set_ylabel("share of draws, %")
axes.set_title("Slices of K = 3 steps from episodes of 20, 2 and 15 steps")
axes.legend(ncols=3, loc="upper center", fontsize="small")
figure.savefig(OUTPUT / "windows.png", dpi=150)

# %% [markdown]
# ## What each term reads
#
# The loss computes five terms from the batch, each of which trains one or two parts,
# and some metrics:

# %%
losses = loss(batch)
terms = [name for name in losses.keys() if name.startswith("loss_")]  # noqa: SIM118
assert terms == [
    "loss_model",
    "loss_reward",
    "loss_classifier",
    "loss_qvalue",
    "loss_actor",
]
assert all(losses[term].requires_grad for term in terms)

# %% [markdown]
# To see what each term reads, change one entry of the batch, keep the random numbers,
# and compare the terms:

# %%
entries = [
    (draw, *key)
    for draw in ("slice", "transition")
    for key in (
        ("observation",),
        ("action",),
        ("next", "reward"),
        ("next", "observation"),
        ("next", "terminated"),
    )
]


def evaluate(batch: TensorDictBase) -> dict[str, float]:
    """Value of each term with the same random numbers in every call."""
    torch.manual_seed(1)
    with torch.no_grad():
        losses = loss(batch)
    return {term: losses[term].item() for term in terms}


def changed_by(entry: tuple[str, ...]) -> set[str]:
    """Terms whose value depends on an entry of the batch."""
    other = batch.clone()
    value = other[entry]
    other[entry] = ~value if value.dtype == torch.bool else value + 0.5
    before, after = evaluate(batch), evaluate(other)
    return {term for term in terms if before[term] != after[term]}


reads = {entry: changed_by(entry) for entry in entries}
assert evaluate(batch) == evaluate(batch)

# %%
figure = draw_table(
    "term", "What each term reads of a batch", terms, ["/".join(e) for e in entries]
)
axes = figure.axes[0]
for column, touched in enumerate(reads.values()):
    rows = [terms.index(term) for term in touched]
    axes.plot([column] * len(rows), rows, "o", color="#0072b2", ms=11)
axes.axvline(4.5, color="black", linewidth=1)
figure.savefig(OUTPUT / "reads.png", dpi=150)

# %% [markdown]
# The objective of encoder and model reads the slices, but neither their rewards nor
# their terminations: it uses the reward model and the critics instead. The actor starts
# from observations and imagines the rest. Only the critics read terminations, and no
# term reads time limits (`truncated`).

# %%
of_slices = [entry for entry in entries if reads[entry] == {"loss_model"}]
assert [entry[-1] for entry in of_slices] == ["observation", "action", "observation"]
assert reads["slice", "next", "reward"] == reads["slice", "next", "terminated"] == set()
single = {
    entry[1:]: touched for entry, touched in reads.items() if "slice" not in entry
}
assert single["observation",] == set(terms) - {"loss_model"}
assert single["action",] == set(terms) - {"loss_model", "loss_actor"}
assert single["next", "reward"] == {"loss_reward", "loss_qvalue"}
assert single["next", "observation"] == {"loss_classifier", "loss_qvalue"}
assert single["next", "terminated"] == {"loss_qvalue"}
unread = batch.exclude(
    *[(draw, "next", "truncated") for draw in ("slice", "transition")]
)
assert evaluate(unread) == evaluate(batch)

# %% [markdown]
# ## Conclusion
#
# An observation is encoded, the actor acts on the latent, the steps are stored, and an
# update draws slices and transitions from them. Parts and loss share keys only, and
# each term reads only what it needs.
#
# **Next steps**
#
# - `loss_and_gradients.py`: what each term computes, and which parts it trains.
# - `replace_a_part.py`: a part of your own.
# - `loss.set_keys(reward="my_reward")`: batches with other names.
