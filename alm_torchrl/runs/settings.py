"""Settings of a training run, and the presets that fill them in.

Every field of :class:`TrainConfig` is a flag of ``alm-torchrl train`` with the same
name (dashes for underscores). Defaults stand here once: those of the class are the
paper's Table 3, and a preset states what it changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from alm_torchrl.checks import (
    LARGEST_SIZE,
    check_choice,
    check_integer,
    check_number,
    check_steps,
)
from alm_torchrl.training.pace import Pace

__all__ = [
    "PRESETS",
    "Agent",
    "Preset",
    "TrainConfig",
    "UserError",
    "preset_config",
    "user_errors",
]

Preset = Literal["quick", "paper", "plus"]
Agent = Literal["alm", "td3", "sac", "redq"]

# Each kind of number carries its check.
Count = Annotated[int, check_integer]
Size = Annotated[int, partial(check_integer, high=LARGEST_SIZE)]
Seed = Annotated[int, partial(check_integer, low=0, high=2**31 - 1)]
Weight = Annotated[float, check_number]
Positive = Annotated[float, partial(check_number, open_low=True)]
Share = Annotated[float, partial(check_number, high=1.0)]
PositiveShare = Annotated[float, partial(check_number, high=1.0, open_low=True)]
Discount = Annotated[float, partial(check_number, high=1.0, open_high=True)]


class UserError(Exception):
    """A mistake in what was asked for; the command line shows it as one line."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns errors that users can cause into :class:`UserError`."""
    from gymnasium.error import Error as GymnasiumError
    from torchrl.checkpoint import CheckpointError

    try:
        yield
    except BrokenPipeError:
        raise
    except (
        OSError,
        ValueError,
        ImportError,
        GymnasiumError,
        CheckpointError,
    ) as error:
        raise UserError(str(error)) from error


@dataclass(frozen=True)
class TrainConfig:
    """Train an agent on a Gymnasium task.

    The baselines use the settings that apply to them: they have no latent state,
    model, slices or classifier, and SAC and REDQ no noise schedule.

    Example:
        >>> config = preset_config("quick", seed=3)
        >>> config.task, config.seed, config.run_name
        ('HalfCheetah-v5', 3, 'HalfCheetah-v5-alm-quick-s3')

    Raises:
        ValueError: if a value is outside the range of its field.
    """

    task: str
    """Gymnasium task with flat observations and continuous actions."""
    preset: Preset = "paper"
    """Other defaults: a run of minutes, the paper's Table 3, or one in development."""
    agent: Agent = "alm"
    """Algorithm: ALM, or a baseline with ALM's settings as far as it has them."""
    seed: Seed = 0
    """Seed of networks, exploration, replay and environment."""

    # Where and how to compute
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of networks and updates; auto takes a GPU where there is one."""
    threads: Count | None = None
    """CPU threads of PyTorch; None leaves its own choice."""

    # Environment and replay
    action_bounds: Literal["clamp", "rescale"] = "clamp"
    """Bounds other than +-1: clamp actions to them, or rescale [-1, 1] to them."""
    dynamics_noise: Weight = 0.0
    """Noise on the joint velocities before each step of a MuJoCo task (Fig. 17)."""
    max_episode_steps: Count | None = None
    """Time limit of an episode in steps; None: the one that the task names."""
    total_steps: Count = 300_000
    """Training steps (updates) after the warm-up."""
    warmup_steps: Count = 5000
    """Uniformly random environment steps before the first update."""
    num_envs: Count = 1
    """Environments to train in; on a CPU no faster at one update per step."""
    updates_per_step: Positive = 1.0
    """Updates per environment step after the warm-up; less for fast simulators."""
    capacity: Count | None = None
    """Transitions kept for replay; None: 1e6 for Humanoid-v*, else 1e5."""
    batch_size: Count = 512
    """Slices, and as many single transitions, in an update (REDQ makes 20)."""
    horizon: Count = 3
    """Steps K of a slice and of the imagined rollouts."""
    short_slices: bool = False
    """Slices that start near an episode's end too, and are masked beyond it."""
    recency_decay: PositiveShare = 1.0
    """Weight of a transition for each one that is newer; 1: all are drawn alike."""
    recency_floor: PositiveShare = 0.1
    """Smallest weight of an old transition."""

    # Networks
    latent_dim: Size = 50
    """Size of the latent state."""
    hidden_dim: Size = 512
    """Units per hidden layer, but for the latent model and the reward model."""
    model_hidden_dim: Size = 1024
    """Units per hidden layer of the latent model."""
    reward_hidden_dim: Size | None = None
    """Units per hidden layer of the reward model; None: as hidden_dim."""
    classifier: Literal["mlp", "linear"] = "mlp"
    """Hidden layers in the classifier, or none."""

    encoder: Literal["gaussian", "identity"] = "gaussian"
    """Learned encoder, or the observation as latent (Fig. 13; no latent_dim then)."""
    normalize_observations: bool = False
    """Normalise observations inside the encoder by their running moments."""
    latent: Literal["gaussian", "rms", "simnorm", "layernorm"] = "gaussian"
    """Latents with noise, or bounded ones without it."""
    latent_layers: Count = 2
    """Hidden layers of encoder and latent model."""
    layer_norm: bool = False
    """A LayerNorm before each activation."""

    # Losses
    gamma: Discount = 0.99
    """Discount factor."""
    lmbda: Share = 0.95
    """Weight of longer rollouts in the policy's lambda return."""
    classifier_coef: Weight = 0.1
    """Weight of the classifier's log ratio in the policy objective."""
    kl_coef: Weight = 1.0
    """Weight of the KL term in the encoder and model objective."""
    value_coef: Weight = 1.0
    """Weight of the final value in the encoder and model objective."""
    reward_coef: Weight = 1.0
    """Weight of the predicted rewards in the encoder and model objective."""
    consistency_coef: Weight = 0.0
    """Weight of the squared distance to the target encoder's next latents in it."""
    reward_fidelity_coef: Weight = 0.0
    """Weight of the predicted rewards' squared error in it."""
    info_nce_coef: Weight = 0.0
    """Weight of telling the next state from those of other slices in it."""
    actor_objective: Literal["bound", "qvalue", "scaled_qvalue"] = "bound"
    """What the policy maximises; qvalue (TD3's) never reads the classifier."""
    action_penalty: Weight = 1e-2
    """Weight of actions beyond 1.5 before their tanh, squared; of scaled_qvalue."""
    n_step: Count = 1
    """Recorded steps in the critics' target."""
    target_pessimism: Share = 1.0
    """Value in the critics' target: 1 the smaller critic, 0 their mean."""
    pessimism: Share = 1.0
    """Likewise where the value is maximised."""
    critic_loss: Literal["mse", "huber"] = "mse"
    """Squared or Huber's error of the critics."""
    reward_scale: Literal["none", "returns", "rewards"] = "none"
    """Divide rewards by a running size of discounted returns, or of rewards."""
    discount_model_loss: bool = False
    """Discount the encoder and model objective, as in the paper's Eq. 7."""
    model_objective: Literal["bound", "likelihood"] = "bound"
    """Encoder and model: the bound, or KL and reconstruction alone (Fig. 15)."""
    value_prediction: Literal["none", "encoder", "model"] = "none"
    """Encoder, or encoder and model, also predict the value (Fig. 18, 19)."""
    log_reward: Literal["none", "model", "plain", "shifted", "bound"] = "none"
    """Logarithm of predicted or all rewards, of these + 10000, or as in Theorem 3.1."""

    # Exploration
    entropy: bool = False
    """Learn the noise, with SAC's entropy bonus, in place of its schedule and clip."""
    noise_initial: Weight = 1.0
    """Standard deviation of the action noise at the first training step."""
    noise_final: Weight = 0.1
    """Standard deviation of the action noise once the schedule has ended."""
    noise_steps: Count = 100_000
    """Training steps over which the noise falls linearly."""
    noise_clip: Weight = 0.3
    """Largest action noise inside the losses."""

    # Optimization
    lr: Positive = 1e-4
    """Learning rate of all Adam optimizers."""
    lr_final: Weight | None = None
    """Learning rate that it changes to linearly; None: it stays."""
    lr_steps: Count = 200_000
    """Training steps over which it changes."""
    weight_decay: Weight = 0.0
    """Decoupled weight decay of all parameters."""
    clip_norm: Positive = 100.0
    """Largest gradient norm of each optimizer."""
    tau: PositiveShare = 0.005
    """Step of the target networks towards the online ones."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the hidden layers in updates; all else keeps fp32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the update; auto: ALM on a CPU, from 2,500 training steps on."""
    cudagraph: bool | None = None
    """Run updates as one captured CUDA graph; None: wherever there is a GPU."""

    # Evaluation, logs and checkpoints
    eval_interval: Count = 5000
    """Training steps between evaluations."""
    eval_episodes: Count = 5
    """Whole episodes per evaluation, without action noise."""
    log_interval: Count = 1000
    """Environment steps between logged losses."""
    checkpoint_interval: Count = 5000
    """Environment steps between checkpoints; there is always one at the end."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that are kept."""
    keep_every: Count | None = None
    """Environment steps between checkpoints that stay for good; None: none do."""
    logger: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where losses and returns go besides metrics.csv."""
    run_dir: Path | None = None
    """Run folder; None: a name made of task, preset, seed and changes in runs/."""

    def __post_init__(self) -> None:
        """Checks each setting, and those that depend on each other."""
        for name, hint in _HINTS.items():
            checked = _check_setting(name, hint, getattr(self, name))
            object.__setattr__(self, name, checked)
        check_steps(
            warmup_steps=self.warmup_steps,
            capacity=self.replay_capacity,
            batch_size=self.batch_size,
            horizon=self.horizon,
        )
        if self.reward_scale != "none" and self.log_reward not in ("none", "bound"):
            raise ValueError(
                "reward_scale: expected none with log_reward="
                f"{self.log_reward}, got {self.reward_scale!r}."
            )

    @property
    def replay_capacity(self) -> int:
        """``capacity``, or the task's default."""
        if self.capacity is not None:
            return self.capacity
        return 1_000_000 if re.match(r"Humanoid-v\d", self.task) else 100_000

    @property
    def pace(self) -> Pace:
        """How environment steps and updates alternate."""
        return Pace(self.warmup_steps, self.num_envs, self.updates_per_step)

    @property
    def changes(self) -> dict[str, Any]:
        """Settings that differ from the preset and can change a result."""
        reference = preset_config(self.preset, task=self.task)
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(TrainConfig)
            if field.name not in _NOT_HASHED
            and getattr(self, field.name) != getattr(reference, field.name)
        }

    @property
    def run_name(self) -> str:
        """``<task>-<agent>-<preset>-s<seed>``, plus a hash of :attr:`changes`.

        Compiled or not, a run has the same name.
        """
        task = re.sub(r"[^A-Za-z0-9._-]+", "-", self.task)
        name = f"{task}-{self.agent}-{self.preset}-s{self.seed}"
        changes = {k: v for k, v in self.changes.items() if k != "compile"}
        if not changes:
            return name
        text = json.dumps(changes, sort_keys=True)
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def run_path(self) -> Path:
        """The run folder: ``run_dir``, or :attr:`run_name` in ``runs``."""
        return Path("runs") / self.run_name if self.run_dir is None else self.run_dir

    def arguments_of(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The settings that a function takes under the same names."""
        settings = {
            **vars(self),
            "capacity": self.replay_capacity,
            "compile": self.compile == "on",
        }
        names = inspect.signature(function).parameters
        return {name: settings[name] for name in names if name in settings}

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for JSON."""
        names = (field.name for field in dataclasses.fields(TrainConfig))
        values = {name: getattr(self, name) for name in names}
        values["run_dir"] = None if self.run_dir is None else str(self.run_dir)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`; settings left out have their defaults.

        Raises:
            ValueError: if a name is not a setting, or a value is out of range.
        """
        names = {field.name for field in dataclasses.fields(TrainConfig)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"expected the fields of TrainConfig, got also {unknown}")
        run_dir = values.get("run_dir")
        paths = {"run_dir": None if run_dir is None else Path(run_dir)}
        return cls(**{"task": "", **values, **paths})


_HINTS = get_type_hints(TrainConfig, include_extras=True)

PRESETS: dict[Preset, dict[str, Any]] = {
    "quick": {
        "task": "HalfCheetah-v5",
        # Layers this small are slower on two threads than on one.
        "threads": 1,
        "total_steps": 4000,
        "warmup_steps": 2000,
        "batch_size": 128,
        "hidden_dim": 128,
        "model_hidden_dim": 256,
        "noise_steps": 3000,
        "lr": 1e-3,
        "tau": 0.02,
        "eval_interval": 1000,
        "log_interval": 100,
        "checkpoint_interval": 1000,
    },
    "paper": {},
    "plus": {
        "threads": 1,
        "total_steps": 197_500,
        "warmup_steps": 2500,
        "capacity": 1_000_000,
        "batch_size": 128,
        "short_slices": True,
        "recency_decay": 0.9999,
        "latent_dim": 128,
        "hidden_dim": 256,
        "model_hidden_dim": 256,
        "reward_hidden_dim": 64,
        "normalize_observations": True,
        "latent": "layernorm",
        "latent_layers": 1,
        "layer_norm": True,
        "kl_coef": 0.0,
        "value_coef": 0.0,
        "reward_coef": 0.0,
        "consistency_coef": 1.0,
        "reward_fidelity_coef": 0.1,
        "info_nce_coef": 0.1,
        "classifier_coef": 0.0,
        "actor_objective": "scaled_qvalue",
        "n_step": 3,
        "target_pessimism": 0.5,
        "pessimism": 0.0,
        "critic_loss": "huber",
        "reward_scale": "rewards",
        "noise_initial": 0.2,
        "noise_final": 0.2,
        "lr": 1e-3,
        "lr_final": 3.3e-4,
        "weight_decay": 0.01,
        "clip_norm": 20.0,
        "eval_episodes": 10,
    },
}
"""What each preset changes in the defaults of :class:`TrainConfig`."""

# The first four are in the name of the run.
_NOT_HASHED = {
    *("task", "agent", "preset", "seed"),
    *("device", "threads", "logger", "keep_every", "run_dir"),
}


def preset_config(preset: Preset, **changes: Any) -> TrainConfig:
    """The settings of a preset with some of them changed.

    Args:
        preset: ``"quick"``, ``"paper"`` or ``"plus"``.
        **changes: fields of :class:`TrainConfig`. The presets but ``"quick"`` name no
            ``task``.

    Raises:
        ValueError: if the preset is unknown or no task is given.

    Example:
        >>> preset_config("paper", task="Hopper-v5", lr=3e-4).changes
        {'lr': 0.0003}
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {preset!r}")
    values = {**PRESETS[preset], "preset": preset, **changes}
    if not values.get("task"):
        raise ValueError(
            f"task: expected one, as the preset {preset!r} names none, got "
            f"{values.get('task')!r}"
        )
    return TrainConfig(**values)


def _check_setting(name: str, hint: Any, value: Any) -> Any:  # noqa: ANN401
    kinds = get_args(hint)
    if value is None and type(None) in kinds:
        return None
    if get_origin(hint) is Literal:
        check_choice(name, value, kinds)
        return value
    for kind in (hint, *kinds):
        if get_origin(kind) is Annotated:
            (check,) = kind.__metadata__
            return check(name, value)
    if not isinstance(value, hint):
        expected = getattr(hint, "__name__", hint)
        raise ValueError(f"{name}: expected {expected}, got {value!r}.")
    return value
