"""Wrong arguments, each with the message that it gets.

A message names the argument, what was expected and what was given. Wrong networks and
batches are in ``test_bad_batches.py``.
"""

from __future__ import annotations

import re

import gymnasium
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from alm_torchrl import (
    ALMOptimizationStepper,
    ClampedNormal,
    NoiseSchedule,
    evaluate_policy,
    make_actor,
    make_alm_loss,
    make_encoder,
    make_env,
    make_replay_buffer,
    make_trainer,
    zero_policy,
)
from alm_torchrl.cli import main
from alm_torchrl.runs.settings import TrainConfig, preset_config
from tests.helpers import (
    make_loss,
)

FLAT, UNIT = spaces.Box(-9.0, 9.0, (3,)), spaces.Box(-1.0, 1.0, (2,))


class Spaces(gymnasium.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space = observation_space
        self.action_space = action_space


@pytest.fixture
def task():
    """Makes the environment of a task with the given spaces."""
    name = "WrongSpaces-v0"
    gymnasium.register(name, entry_point=Spaces, order_enforce=False)
    yield lambda *given: make_env(
        name, observation_space=given[0], action_space=given[1]
    )
    del gymnasium.registry[name]


def pendulum():
    return make_env("Pendulum-v1", action_bounds="rescale")


def tiny(env=None):
    env = pendulum() if env is None else env
    return make_alm_loss(env, latent_dim=3, hidden_dim=8, model_hidden_dim=8)


def train(env=None, loss=None, **options):
    env = pendulum() if env is None else env
    settings = {"total_steps": 1, "warmup_steps": 10, "batch_size": 4, **options}
    return make_trainer(env, tiny() if loss is None else loss, **settings)


def draw(stored, **options):
    """A sample from a replay that holds one episode of ``stored`` steps."""
    buffer = make_replay_buffer(100, **{"batch_size": 4, **options})
    done = torch.zeros(stored, 1, dtype=torch.bool)
    buffer.extend(TensorDict({"next": {"done": done}}, batch_size=[stored]))
    return buffer.sample()


TASKS = {
    "misspelt task": (
        lambda: make_env("HalfCheeta-v5"),
        ValueError,
        r"task: expected .* such as HalfCheetah-v\d or .*, got 'HalfCheeta-v5'",
    ),
    "task without version": (
        lambda: make_env("Hopper"),
        ValueError,
        r"task: .* with its version, such as Hopper-v\d.*, got 'Hopper'",
    ),
    "version that never was": (
        lambda: make_env("Walker2d-v99"),
        ValueError,
        r"task: expected .* such as Walker2d-v\d.*, got 'Walker2d-v99'",
    ),
    "unknown task": (
        lambda: make_env("zzz"),
        ValueError,
        r"task: expected the id of a registered .* with its version, got 'zzz'",
    ),
    "task that is no name": (
        lambda: make_env(5),
        ValueError,
        "task: expected the id of a registered Gymnasium task .*, got 5 ",
    ),
    "discrete actions": (
        lambda: make_env("CartPole-v1"),
        ValueError,
        r"supported actions are continuous vectors .* CartPole-v1 are Discrete\(2\)",
    ),
    "discrete observations": (
        lambda: make_env("FrozenLake-v1"),
        ValueError,
        r"supported observations are flat vectors .* FrozenLake-v1 are Discrete\(16\)",
    ),
    "action bounds by another name": (
        lambda: make_env("Hopper-v5", action_bounds="squash"),
        ValueError,
        "action_bounds: expected 'clamp' or 'rescale', got 'squash'",
    ),
    "no CUDA here": (
        lambda: make_env("Hopper-v5", device="cuda:99"),
        ValueError,
        r"device: expected 'cpu' or one of the \d+ CUDA devices .*, got 'cuda:99'",
    ),
    "no device": (
        lambda: make_env("Hopper-v5", device="gpu"),
        ValueError,
        "device: expected the name of a PyTorch device, got 'gpu'",
    ),
    "negative seed": (
        lambda: make_env("Hopper-v5", seed=-1),
        ValueError,
        "seed: expected an integer >= 0 and <= 4294967295, got -1",
    ),
    "argument that the task has not": (
        lambda: make_env("Hopper-v5", gravity=3),
        ValueError,
        r"gym_kwargs: expected arguments of task 'Hopper-v5', got \{'gravity': 3\}",
    ),
}

SETTINGS = {
    "gamma of one": (
        lambda: make_loss(gamma=1.0),
        ValueError,
        r"gamma: expected a number >= 0 and < 1, got 1\.0",
    ),
    "negative gamma": (
        lambda: make_loss(gamma=-0.1),
        ValueError,
        r"gamma: expected a number >= 0 and < 1, got -0\.1",
    ),
    "gamma of one, TorchRL's way": (
        lambda: make_loss().make_value_estimator(gamma=1),
        ValueError,
        "gamma: expected a number >= 0 and < 1, got 1",
    ),
    "lambda above one": (
        lambda: make_loss(lmbda=1.01),
        ValueError,
        r"lmbda: expected a number >= 0 and <= 1, got 1\.01",
    ),
    "negative coefficient": (
        lambda: make_loss(kl_coef=-1.0),
        ValueError,
        r"kl_coef: expected a number >= 0, got -1\.0",
    ),
    "coefficient that is no number": (
        lambda: make_loss(value_coef="1"),
        ValueError,
        "value_coef: expected a number >= 0, got '1'",
    ),
    "infinite coefficient": (
        lambda: make_loss(classifier_coef=float("inf")),
        ValueError,
        "classifier_coef: expected a number >= 0, got inf",
    ),
    "misspelt argument": (
        lambda: make_loss(gama=0.9),
        TypeError,
        "unexpected keyword argument 'gama'",
    ),
    "reduction by another name": (
        lambda: make_loss(reduction="avg"),
        ValueError,
        "reduction: expected None or 'mean' or 'sum' or 'none', got 'avg'",
    ),
    "no classifier": (
        lambda: make_loss(classifier=None),
        ValueError,
        r"classifier may be None only with classifier_coef=0, got .*=0\.1",
    ),
    "gymnasium environment": (
        lambda: make_alm_loss(gymnasium.make("Pendulum-v1")),
        TypeError,
        r"env: expected EnvBase, got TimeLimit \(make_env makes one",
    ),
    "size that is no integer": (
        lambda: make_encoder(3, latent_dim=2.5),
        ValueError,
        r"latent_dim: expected an integer >= 1, got 2\.5",
    ),
    "bounds that are no numbers": (
        lambda: make_actor(["a"], [1.0]),
        ValueError,
        r"action_low: expected a vector of numbers, got \['a'\]",
    ),
    "bounds of different length": (
        lambda: make_actor([-1.0], [1.0, 1.0]),
        ValueError,
        r"action_low and action_high must be .* same size, got shapes \(1,\) and \(2,",
    ),
    "noise that is no schedule": (
        lambda: make_actor([-1.0], [1.0], noise_schedule=0.3),
        TypeError,
        "noise_schedule: expected NoiseSchedule, got float",
    ),
    "noise that is not a number": (
        lambda: NoiseSchedule(initial=float("nan")),
        ValueError,
        "initial: expected a number >= 0, got nan",
    ),
    "noise over no steps": (
        lambda: NoiseSchedule(steps=0),
        ValueError,
        "steps: expected an integer >= 1, got 0",
    ),
    "shapes that do not broadcast": (
        lambda: ClampedNormal(torch.zeros(2, 3), torch.ones(2)),
        ValueError,
        r"loc and scale: expected .* got shape \[2, 3\] and shape \[2\]",
    ),
    "bounds larger than the mean": (
        lambda: ClampedNormal(torch.zeros(2), torch.ones(2), low=torch.zeros(3, 2)),
        ValueError,
        r"low: expected a shape that broadcasts to .* \[2\], got \[3, 2\]",
    ),
    "mean of integers": (
        lambda: ClampedNormal(torch.zeros(2, dtype=torch.int64), torch.ones(2).long()),
        ValueError,
        r"loc: expected a floating-point tensor, got torch\.int64",
    ),
    "preset by another name": (
        lambda: preset_config("fast"),
        ValueError,
        r"preset: expected one of \['paper', 'quick'\], got 'fast'",
    ),
    "preset without a task": (
        lambda: preset_config("paper"),
        ValueError,
        "task: expected one, as the preset 'paper' names none, got None",
    ),
    "batch larger than what is stored": (
        lambda: preset_config("quick", batch_size=2001),
        ValueError,
        "batch_size: expected at most warmup_steps=2000, got 2001",
    ),
    "capacity below the warm-up": (
        lambda: TrainConfig(task="Hopper-v5", capacity=4999),
        ValueError,
        "capacity: expected at least warmup_steps=5000, got 4999",
    ),
    "warm-up below the horizon": (
        lambda: preset_config("quick", warmup_steps=2, batch_size=1),
        ValueError,
        "warmup_steps: expected at least horizon=3, got 2",
    ),
    "fraction of a step": (
        lambda: preset_config("quick", total_steps=1.5),
        ValueError,
        r"total_steps: expected an integer >= 1, got 1\.5",
    ),
    "logger by another name": (
        lambda: preset_config("quick", logger="mlflow"),
        ValueError,
        "logger: expected 'tensorboard' or 'wandb' or 'none', got 'mlflow'",
    ),
    "run folder that is no path": (
        lambda: preset_config("quick", run_dir="runs"),
        ValueError,
        r"run_dir: expected pathlib.*Path \| None, got 'runs'",
    ),
}

REPLAY = {
    "horizon below one": (
        lambda: make_replay_buffer(9, horizon=0),
        ValueError,
        "horizon: expected an integer >= 1, got 0",
    ),
    "horizon above the capacity": (
        lambda: make_replay_buffer(2, horizon=3),
        ValueError,
        "capacity: expected at least the horizon, 3, got 2",
    ),
    "horizon above any episode": (
        lambda: draw(4, horizon=5),
        RuntimeError,
        r"No valid window among the 4 stored rows: horizon 5 needs at least 5 consec",
    ),
    "nothing stored": (
        lambda: make_replay_buffer(9).sample(),
        RuntimeError,
        "No valid window among the 0 stored rows",
    ),
    "sample of nothing": (
        lambda: make_replay_buffer(9, batch_size=0),
        ValueError,
        "batch_size: expected an integer >= 1, got 0",
    ),
    "more rows than fit": (
        lambda: draw(101),
        ValueError,
        r"tensordicts: expected at most 100 rows \(the buffer's capacity\) .* got 101",
    ),
    "replay on a GPU that is not there": (
        lambda: make_replay_buffer(9, device="cuda:99"),
        ValueError,
        r"device: expected 'cpu' or one of the \d+ CUDA devices .*, got 'cuda:99'",
    ),
    "seed for a generator": (
        lambda: make_replay_buffer(9, generator=3),
        TypeError,
        "generator: expected Generator, got int",
    ),
}

TRAINING = {
    "replay smaller than the warm-up": (
        lambda: train(capacity=9),
        ValueError,
        "capacity: expected at least warmup_steps=10, got 9",
    ),
    "batch larger than the warm-up": (
        lambda: train(batch_size=11),
        ValueError,
        "batch_size: expected at most warmup_steps=10, got 11",
    ),
    "no training steps": (
        lambda: train(total_steps=0),
        ValueError,
        "total_steps: expected an integer >= 1, got 0",
    ),
    "environment by its name": (
        lambda: make_trainer("Pendulum-v1", tiny(), total_steps=1),
        TypeError,
        r"env: expected EnvBase, got str \(make_env makes one\)",
    ),
    "loss of another task": (
        lambda: train(loss=tiny(make_env("InvertedPendulum-v5"))),
        ValueError,
        r"encoder: expected a network for 'observation' \[3\] .*, got: .*1x3 and 4x8",
    ),
    "loss for other actions": (
        lambda: train(
            loss=make_alm_loss(
                observation_dim=3, action_low=[-1] * 2, action_high=[1] * 2
            )
        ),
        ValueError,
        r"loss: expected actions of shape \[1\], those of env, got \[2\]",
    ),
    "module for a loss": (
        lambda: train(loss=nn.Linear(1, 1)),
        TypeError,
        "loss: expected ALMLoss, got Linear",
    ),
    "stepper without a loss": (
        lambda: ALMOptimizationStepper(nn.Linear(1, 1)),
        TypeError,
        "loss: expected ALMLoss, got Linear",
    ),
    "learning rate of zero": (
        lambda: ALMOptimizationStepper(make_loss(), lr=0.0),
        ValueError,
        r"lr: expected a number > 0, got 0\.0",
    ),
    "tau above one": (
        lambda: ALMOptimizationStepper(make_loss(), tau=2),
        ValueError,
        "tau: expected a number > 0 and <= 1, got 2",
    ),
    "precision by another name": (
        lambda: ALMOptimizationStepper(make_loss(), precision="fp16"),
        ValueError,
        "precision: expected 'fp32' or 'tf32' or 'bf16', got 'fp16'",
    ),
    "no episodes": (
        lambda: evaluate_policy(pendulum(), zero_policy(pendulum()), episodes=0),
        ValueError,
        "episodes: expected an integer >= 1, got 0",
    ),
    "action for a policy": (
        lambda: evaluate_policy(pendulum(), torch.zeros(1)),
        TypeError,
        "policy: expected a callable .*, got Tensor",
    ),
    "policy without an action": (
        lambda: evaluate_policy(pendulum(), lambda tensordict: tensordict),
        KeyError,
        r"policy: expected it to write 'action', got \[.*'observation'",
    ),
    "policy of another environment": (
        lambda: evaluate_policy(
            pendulum(), TensorDictModule(nn.Linear(3, 1), ["pixels"], ["action"])
        ),
        KeyError,
        r"policy: expected in_keys among \['observation'\], .* got \['pixels'\]",
    ),
}


def _table(**groups):
    return [
        pytest.param(*case, id=f"{group}: {name}")
        for group, cases in groups.items()
        for name, case in cases.items()
    ]


@pytest.mark.filterwarnings("ignore:the actions of", "ignore:.*is out of date")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    _table(
        tasks=TASKS,
        settings=SETTINGS,
        replay=REPLAY,
        training=TRAINING,
    ),
)
def test_wrong_call(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert type(raised.value) is error


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (spaces.Dict(a=FLAT), UNIT, r"observations are flat vectors .* are Dict\('a'"),
        (spaces.Box(0, 255, (8, 8, 3), "uint8"), UNIT, r"flat vectors .*uint8.*images"),
        (FLAT, spaces.Discrete(3), r"actions are continuous vectors .* Discrete\(3\)"),
        (FLAT, spaces.Dict(a=UNIT), r"actions are continuous vectors .* Dict\('a'"),
    ],
    ids=["dictionaries", "images", "discrete actions", "dict actions"],
)
def test_wrong_spaces(task, observation_space, action_space, message):
    with pytest.raises(ValueError, match=message):
        task(observation_space, action_space)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train HalfCheeta-v5", r"task: .* such as HalfCheetah-v\d.* 'HalfCheeta-v5'"),
        ("train CartPole-v1", "supported actions are continuous vectors .* Discrete"),
        ("train FrozenLake-v1", "supported observations are flat vectors .* Discrete"),
        ("train --preset paper", "the preset 'paper' needs a task, for example: "),
        ("train --device cuda", "--device: expected one that PyTorch finds, got cuda"),
    ],
)
def test_mistake_on_the_command_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("alm-torchrl: error: ")
    assert re.search(message, line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --preset fast", r"'fast' for argument '--preset'.*'quick', 'paper'"),
        ("train --precison bf16", "Unrecognized options: --precison"),
        ("train --gamma 1", r"gamma: expected a number >= 0 and < 1, got 1\.0"),
        ("train --lmbda 1.5", r"lmbda: expected a number >= 0 and <= 1, got 1\.5"),
        ("train --kl-coef -1", r"kl_coef: expected a number >= 0, got -1\.0"),
        ("train --horizon 0", "horizon: expected an integer >= 1, got 0"),
        ("train --batch-size 2.5", r"2\.5.* --batch-size INT"),
        ("train --batch-size 4000", "batch_size: .* at most warmup_steps=2000, got 40"),
        ("train --capacity 1999", "capacity: .* at least warmup_steps=2000, got 1999"),
        ("train --seed", "Missing value for argument '--seed'. Expected 1"),
        ("evaluate", "Missing from alm-torchrl evaluate: CHECKPOINT"),
        ("fly", "Unrecognized options: fly .*train, evaluate, diagnose, plot, render"),
    ],
)
def test_flag_that_cannot_be(capsys, monkeypatch, arguments, message):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert re.search(message, shown)
