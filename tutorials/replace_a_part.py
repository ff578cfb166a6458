"""Replace a part: your own encoder for your own environment.

**What you will learn**

- to write, check and register a Gymnasium environment, so that every part of this
  library accepts it;
- what each part of the agent must read and write, and how to replace the encoder by
  your own network;
- to use an actor that learns its noise, and a classifier without hidden layers;
- to check on one batch, before training, that the parts fit and that each loss trains
  the right networks;
- to train the agent, and to compare it with policies whose scores are known.

You need to know the parts (`parts.py`) and the Trainer (`trainer.py`). The next
tutorial, `property_tests.py`, changes the mathematics of the loss.

Run it as `python tutorials/replace_a_part.py`: under a minute on one processor core.
The figure goes to `runs/tutorial-replace-a-part`, or to the folder in `ALM_OUTPUT`.
`ALM_SMOKE=1` makes everything small for a quick check.
"""

# %%
from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from matplotlib.figure import Figure
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import Tensor, nn
from torchrl.modules import IndependentNormal

from alm_torchrl import (
    OrthogonalLinear,
    evaluate_policy,
    make_alm_loss,
    make_classifier,
    make_env,
    make_stochastic_actor,
    make_trainer,
    random_policy,
    zero_policy,
)
from alm_torchrl.functional import bound_loc, bound_scale
from alm_torchrl.objectives import EntropyBonus
from alm_torchrl.runs.loading import ActingPolicy
from alm_torchrl.testing import check_loss

torch.set_num_threads(1)
SMOKE = os.environ.get("ALM_SMOKE") == "1"
OUTPUT = Path(os.environ.get("ALM_OUTPUT", "runs/tutorial-replace-a-part"))
OUTPUT.mkdir(parents=True, exist_ok=True)
UPDATES = 5 if SMOKE else 350
WARMUP = 40 if SMOKE else 500
EPISODES = 2 if SMOKE else 20
SEED = 0

# %% [markdown]
# ## An environment
#
# A round robot moves on a dark floor of two metres by two with a lamp somewhere. Twelve
# sensors on the rim of the robot, like the hours of a clock, read the brightness. The
# robot knows neither its own position nor that of the lamp. Each step costs its
# distance to the lamp, in metres.

# %%
SENSORS, RADIUS = 12, 0.3


class Lamp(gymnasium.Env[np.ndarray, np.ndarray]):
    """Find the lamp with a ring of light sensors."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-3.0, 3.0, (SENSORS,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
        angles = 2 * np.pi * np.arange(SENSORS) / SENSORS
        self.directions = np.stack([np.cos(angles), np.sin(angles)], -1)

    def observe(self) -> np.ndarray:
        """The readings of the sensors: the logarithm of the brightness."""
        gaps = self.lamp - self.position - RADIUS * self.directions
        return -np.log(0.1 + np.square(gaps).sum(-1)).astype(np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Puts robot and lamp at random positions."""
        super().reset(seed=seed)
        self.position, self.lamp = self.np_random.uniform(-1, 1, (2, 2))
        return self.observe(), {}

    def step(
        self, action: np.ndarray
    ) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Moves by up to 0.2 m in both directions; the walls stop the robot."""
        move = 0.2 * np.clip(action, -1, 1)
        self.position = np.clip(self.position + move, -1, 1)
        distance = float(np.linalg.norm(self.lamp - self.position))
        return self.observe(), -distance, False, False, {}


# %% [markdown]
# `check_env` is Gymnasium's own check. Once registered, the task is like any other:
# `make_env`, `alm-torchrl train` and the rest accept its name. The time limit belongs
# to the registration. It truncates an episode and does not terminate it: the lamp would
# still be there.

# %%
check_env(Lamp(), skip_render_check=True)
gymnasium.register("Lamp-v0", entry_point=Lamp, max_episode_steps=20)
env = make_env("Lamp-v0", seed=SEED)
test_env = make_env("Lamp-v0")
assert env.rollout(100)["next", "truncated"].sum() == 1

# %% [markdown]
# Three policies give known scores. One moves at random, one stands still, and one
# triangulates: the brightness at a sensor tells its distance from the lamp. A trained
# agent should come close to the last.

# %%
directions = torch.as_tensor(Lamp().directions, dtype=torch.float32)


def triangulate(tensordict: TensorDict) -> TensorDict:
    """Moves towards the lamp, found by triangulation."""
    squared_distance = (-tensordict["observation"]).exp()
    gap = -squared_distance @ directions / (RADIUS * SENSORS)
    return tensordict.set("action", (gap / 0.2).clamp(-1, 1))


def score(policy: Any) -> float:  # noqa: ANN401
    """Mean return over whole episodes, the same ones for every policy."""
    scores = evaluate_policy(test_env, policy, episodes=EPISODES, seed=1)
    return scores["return"].mean().item()


known = {
    "random moves": score(random_policy(test_env)),
    "standing still": score(zero_policy(test_env)),
    "triangulation": score(triangulate),
}
if not SMOKE:
    assert known["standing still"] < -15 < -4 < known["triangulation"]

# %% [markdown]
# ## An encoder of your own
#
# The paper's encoder reads the observation as a plain vector, in which the order of the
# sensors has no meaning. But they form a ring, and all sensors work alike. A circular
# convolution uses this. It is an ordinary `nn.Module`. Three things make it an encoder:
#
# - it returns the mean and standard deviation of a diagonal Gaussian, since the KL of
#   Eq. 7 is computed in closed form;
# - both are bounded (`bound_loc` and `bound_scale` are the paper's bounds); otherwise
#   large standard deviations would make the KL small;
# - it accepts any leading dimensions. The robot acts on `[12]`, the one-step losses
#   read `[B, 12]` and the model's loss `[B, K, 12]`.


# %%
class RingEncoder(nn.Module):
    """Mean and standard deviation of the latent from a ring of sensors."""

    def __init__(self, latent_dim: int, channels: int = 8) -> None:
        super().__init__()
        self.ring = nn.Conv1d(1, channels, 5, padding=2, padding_mode="circular")
        self.mix = OrthogonalLinear(channels * SENSORS, 64)
        self.head = OrthogonalLinear(64, 2 * latent_dim)

    def forward(self, light: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters of the Gaussian, each `[*, latent_dim]`."""
        rows = light.reshape(-1, 1, SENSORS)
        seen = nn.functional.elu(self.ring(rows)).reshape(*light.shape[:-1], -1)
        mixed = nn.functional.elu(self.mix(seen))
        loc, scale = self.head(mixed).chunk(2, -1)
        return bound_loc(loc), bound_scale(scale)


# %% [markdown]
# A TensorDict module around it says which entries it reads and writes. The encoder's
# keys are `observation` and `latent`; the keys in between are free. (`loss.set_keys`
# tells the loss about other names; those of latents and actions must be the networks'
# own.)

# %%
LATENT = 4


def make_ring_encoder() -> ProbabilisticTensorDictSequential:
    """The network with its keys, and the distribution of its outputs."""
    parameters = ["latent_loc", "latent_scale"]
    return ProbabilisticTensorDictSequential(
        TensorDictModule(
            RingEncoder(LATENT), in_keys=["observation"], out_keys=parameters
        ),
        ProbabilisticTensorDictModule(
            in_keys=dict(zip(("loc", "scale"), parameters, strict=True)),
            out_keys=["latent"],
            distribution_class=IndependentNormal,
            default_interaction_type=InteractionType.RANDOM,
        ),
    )


# %% [markdown]
# The network treats the ring as a ring: turn the robot by one sensor, and the features
# turn with it.

# %%
torch.manual_seed(SEED)
encoder = make_ring_encoder()
ring = encoder[0].module.ring
light = torch.randn(1, 1, SENSORS)
assert ring(light.roll(1, -1)).allclose(ring(light).roll(1, -1), atol=1e-6)

# %% [markdown]
# ## Two more parts
#
# The actor of the paper has noise from a schedule. `make_stochastic_actor` makes one
# that learns its own, which needs a reason to keep any: with an `EntropyBonus`, the
# loss rewards entropy, as SAC does, at a temperature that tunes itself. And a
# classifier without hidden layers (Fig. 16 of the paper) costs less.
#
# The sizes of the parts have to fit. A part that was made for another latent is refused
# by name as soon as it runs.

# %%
actor = make_stochastic_actor([-1, -1], [1, 1], latent_dim=LATENT, hidden_dim=64)
classifier = make_classifier(2, latent_dim=LATENT, linear=True)
loss = make_alm_loss(
    env,
    encoder=encoder,
    actor=actor,
    classifier=classifier,
    latent_dim=LATENT,
    hidden_dim=64,
    model_hidden_dim=64,
    gamma=0.8,
    entropy=EntropyBonus(alpha_init=0.1),
)
assert loss.noise_schedule is None

# %% [markdown]
# ## Before training
#
# The Trainer lets the networks act once when it is built. So a part that does not fit
# is named at once, and not after the warm-up. This actor was made for a latent of
# another size:

# %%
misfit = make_alm_loss(
    env, encoder=make_ring_encoder(), latent_dim=LATENT + 1, hidden_dim=8
)
try:
    make_trainer(env, misfit, total_steps=1)
    refusal = ""
except ValueError as error:
    refusal = str(error)
assert refusal.startswith(f"actor: expected a network for 'latent' [{LATENT}]")

# %% [markdown]
# Parts that fit can still be connected wrongly. `check_loss` checks on a batch that
# each term trains all of its own part and nothing else (`property_tests.py` shows what
# else it checks). An episode of 18 steps makes six slices of three.

# %%
returns: list[tuple[int, float]] = []
trainer = make_trainer(
    env,
    loss,
    total_steps=UPDATES,
    warmup_steps=WARMUP,
    batch_size=WARMUP // 4,
    capacity=10_000,
    lr=5e-3,
    tau=0.1,
    eval_env=test_env,
    eval_interval=50,
    eval_episodes=EPISODES,
    on_evaluation=lambda row: returns.append(
        (row["training_step"], row["mean_return"])
    ),
    seed=SEED,
)
check_loss(loss, test_env.rollout(18).reshape(6, 3))

# %% [markdown]
# ## Training
#
# The networks are small and the task is short, so the learning rate and the rate of the
# targets are far above the paper's.

# %%
trainer.train()
trained = score(loss.acting_policy())
still, best = known["standing still"], known["triangulation"]
if not SMOKE:
    # Three quarters of the way from standing still to triangulation, at least.
    assert trained > still + 0.75 * (best - still)

# %% [markdown]
# The policy is an ordinary TensorDict module, so it also acts in a plain Gymnasium
# loop. A path shows more than a score:


# %%
def path_of(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The robot's path in one episode, `[T + 1, 2]`, and the position of the lamp."""
    policy = ActingPolicy(loss.acting_policy(), deterministic=True)
    task = gymnasium.make("Lamp-v0")
    observation, _ = task.reset(seed=seed)
    places, over = [task.unwrapped.position], False
    while not over:
        observed = torch.as_tensor(observation)
        action = policy(TensorDict(observation=observed))["action"].numpy()
        observation, _, _, over, _ = task.step(action)
        places.append(task.unwrapped.position)
    return np.stack(places), task.unwrapped.lamp


# %%
figure = Figure(figsize=(8.0, 3.6), layout="constrained")
left, right = figure.subplots(1, 2)
left.plot(*zip(*returns, strict=True), "o-", color="#0072b2", label="agent")
for color, (name, value) in zip(("0.75", "0.5", "#d55e00"), known.items(), strict=True):
    left.axhline(value, color=color, linestyle="--", label=name)
left.set_xlabel("training steps")
left.set_ylabel(f"return, mean of {EPISODES} episodes")
left.legend(fontsize="small", loc="lower right")
for seed, color in enumerate(("#0072b2", "#009e73", "#cc79a7", "#56b4e9")):
    places, lamp = path_of(seed)
    right.plot(*places.T, ".-", color=color, linewidth=1.5)
    right.plot(*places[0], "s", color=color)
    right.plot(*lamp, "*", color=color, markersize=15, markeredgecolor="black")
right.plot([], [], "s", color="0.4", label="start")
right.plot([], [], "*", color="0.4", markersize=12, label="lamp")
right.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
right.set_xlabel("metres")
right.set_ylabel("metres")
right.legend(fontsize="small", loc="upper right")
figure.suptitle("Your own encoder for your own environment")
figure.savefig(OUTPUT / "lamp.png", dpi=150)

# %% [markdown]
# ## Conclusion
#
# A part of the agent is a module with keys. Thirty lines that know the structure of the
# observation replaced the encoder, and other networks of the library replaced actor and
# classifier. Loss and Trainer did not change.
#
# **Next steps**
#
# - Use another distribution for the actor, such as `torchrl.modules.TanhNormal`. It
#   needs reparameterised samples and a density.
# - Give `make_alm_loss` your own `model`, `qvalue` or `reward`. The table at the top of
#   `alm_torchrl.networks.builders` lists what each reads and writes.
# - Shuffle the sensors (`np.random.default_rng(0).permutation(SENSORS)`), and compare
#   the convolution with the paper's encoder over several seeds.
# - Change the mathematics instead of the networks: `property_tests.py`.
