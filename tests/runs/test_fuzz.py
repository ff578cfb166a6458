"""Random settings: a working object, or an error of this library's own. Never else."""

from __future__ import annotations

import contextlib
import io
import math
import re
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

import alm_torchrl
from alm_torchrl import (
    ALMLoss,
    ALMOptimizationStepper,
    ClampedNormal,
    NoiseSchedule,
    make_alm_loss,
    make_env,
    make_replay_buffer,
    make_trainer,
)
from alm_torchrl.cli import main
from alm_torchrl.runs.settings import TrainConfig, preset_config
from tests.helpers import make_rows

PACKAGE = str(Path(alm_torchrl.__file__).parent)

WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.floats(),
    st.integers(-3, 3),
    st.sampled_from([(), [], {}, [1.0], 10**30, 1e30, 1e300]),
)
SIZE = st.integers(1, 9)
SHARE = st.floats(0, 1)
POSITIVE = st.floats(1e-6, 10)


def settings_of(wrong=WRONG, **right):
    """Some of the arguments; about one of them has a value of any kind."""

    def spoil(values):
        return st.just(values) | st.builds(
            lambda name, value: {**values, name: value},
            st.sampled_from(sorted(right)),
            wrong,
        )

    return st.fixed_dictionaries({}, optional=right).flatmap(spoil)


def made(build, *args, **kwargs):
    """What a call makes, or None after an error that the package itself raised."""
    try:
        return build(*args, **kwargs)
    except (ValueError, TypeError, KeyError) as error:
        raised = error
    frame = traceback.extract_tb(raised.__traceback__)[-1]
    assert frame.filename.startswith(PACKAGE), f"{raised!r} from {frame}"
    assert re.search("(expected|must|needs|may) .* got", str(raised))
    return None


# -- the command line ----------------------------------------------------------------

FLAGS = {
    "--preset": st.sampled_from(["quick", "paper", "slow"]),
    "--device": st.sampled_from(["auto", "cpu", "cuda", "tpu"]),
    "--run-dir": st.text(st.characters(codec="ascii"), max_size=5),
    "--logger": st.sampled_from(["none", "wandb", "print"]),
    **dict.fromkeys(
        ("--seed", "--threads", "--capacity", "--batch-size", "--horizon"),
        st.integers(-5, 10**4).map(str),
    ),
    **dict.fromkeys(
        ("--gamma", "--lmbda", "--lr", "--tau", "--kl-coef", "--noise-clip"),
        st.floats(-1, 2).map(str) | st.sampled_from(["nan", "inf", "1e999", "one"]),
    ),
    "--discount-model-loss": st.just(""),
    "--gama": st.just("0.9"),
}
TEXT = st.text(st.characters(exclude_characters="\0"), max_size=8)
WORDS = st.one_of(
    st.sampled_from(sorted(FLAGS)).flatmap(
        lambda flag: FLAGS[flag].map(lambda value: [flag, value] if value else [flag])
    ),
    st.sampled_from(sorted(FLAGS)).map(lambda flag: [flag]),
    st.sampled_from(sorted(FLAGS)).flatmap(
        lambda flag: TEXT.map(lambda text: [f"{flag}={text}"])
    ),
    TEXT.map(lambda text: [text]),
    st.sampled_from([["--help"], ["Hopper-v5"], ["--"], ["train"]]),
)
COMMANDS = st.sampled_from(["train"] * 6 + ["evaluate", "plot", "render", "tasks", ""])


@settings(max_examples=60)
@given(COMMANDS, st.lists(WORDS, max_size=4))
@example("train", [["--preset"]])
@example("train", [["--preset=paper"], ["--preset", "quick"]])
@example("train", [["Hopper-v5"], ["Hopper-v5"]])
def test_any_command_line_is_run_or_refused(command, words):
    arguments = [*([command] if command else []), *(x for word in words for x in word)]
    called: list = []

    def run(*args, **kwargs):
        called.append(args)
        return 0

    names = ("train", "evaluate", "plot", "render", "tasks")
    commands = {name: mock.Mock(side_effect=run) for name in names}
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.multiple("alm_torchrl.runs.commands", **commands),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
            assert code in (0, 2)
            assert not called
            assert (out if code == 0 else err).getvalue().strip()
        else:
            assert code == 0
            assert len(called) == 1
    if called and commands["train"].called:
        (config, *_) = called[0]
        assert type(config) is TrainConfig
        assert TrainConfig.from_dict(config.to_dict()) == config


# -- constructors --------------------------------------------------------------------


@settings(max_examples=80)
@given(
    st.sampled_from(["quick", "paper", "slow", None]),
    settings_of(
        task=st.sampled_from(["Hopper-v5", "Humanoid-v5", "nonsense", ""]),
        seed=SIZE,
        device=st.sampled_from(["auto", "cpu", "cuda"]),
        total_steps=SIZE,
        warmup_steps=st.integers(1, 10**5),
        capacity=st.none() | st.integers(1, 10**6),
        batch_size=st.integers(1, 10**4),
        horizon=SIZE,
        gamma=SHARE,
        lmbda=SHARE,
        classifier_coef=POSITIVE,
        discount_model_loss=st.booleans(),
        lr=POSITIVE,
        logger=st.sampled_from(["tensorboard", "wandb", "none"]),
        run_dir=st.none() | st.just(Path("somewhere")),
    ),
)
def test_any_settings_of_a_run(preset, values):
    config = made(preset_config, preset, **values)
    if config is None:
        return
    assert {name: getattr(config, name) for name in values} == values
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert re.fullmatch(r"[\w.-]+", config.run_name, re.ASCII)
    assert config.horizon <= config.warmup_steps <= config.replay_capacity
    assert config.batch_size <= config.warmup_steps
    assert 0 <= config.gamma < 1


BOUND = st.lists(st.floats(-2, 2), min_size=1, max_size=2)


@settings(max_examples=40)
@given(
    settings_of(
        observation_dim=SIZE,
        action_low=BOUND,
        action_high=BOUND,
        latent_dim=SIZE,
        hidden_dim=SIZE,
        model_hidden_dim=SIZE,
        noise_schedule=st.none() | st.builds(NoiseSchedule),
        gamma=SHARE,
        lmbda=SHARE,
        classifier_coef=SHARE,
        kl_coef=SHARE,
        value_coef=SHARE,
        noise_clip=st.none() | SHARE,
        discount_model_loss=st.booleans(),
        reduction=st.sampled_from(["mean", "sum", "none", None]),
    )
)
@example({"noise_clip": 1e300})
@example({"noise_clip": 10**30, "classifier_coef": 10**30})
def test_any_loss(values):
    small = {"latent_dim": 2, "hidden_dim": 2, "model_hidden_dim": 2}
    ends = {"observation_dim": 3, "action_low": [-1.0] * 2, "action_high": [1.0] * 2}
    loss = made(make_alm_loss, **{**small, **ends, **values})
    if loss is None:
        return
    assert isinstance(loss, ALMLoss)
    if values.keys().isdisjoint(ends):
        assert set(loss(make_rows(2, 2)).keys()) == set(loss.out_keys)


@settings(max_examples=60)
@given(
    st.integers(-1, 20) | WRONG,
    settings_of(
        batch_size=SIZE,
        horizon=SIZE,
        device=st.sampled_from(["cpu", "meta", "cuda:99", "gpu"]),
        generator=st.none() | st.builds(torch.Generator),
    ),
    st.integers(0, 12),
)
def test_any_replay_buffer(capacity, values, stored):
    buffer = made(make_replay_buffer, capacity, **values)
    if buffer is None or buffer.storage.device.type != "cpu" or capacity > 20:
        return
    done = torch.zeros(stored, 1, dtype=torch.bool)
    rows = TensorDict({"next": {"done": done}}, batch_size=[stored])
    if stored == 0 or made(buffer.extend, rows) is None:
        return
    size, horizon = values.get("batch_size", 512), values.get("horizon", 3)
    if stored >= horizon:
        assert buffer.sample()["slice"].batch_size == (size, horizon)
    else:
        with pytest.raises(RuntimeError, match="No valid window"):
            buffer.sample()


@settings(max_examples=50)
@given(settings_of(initial=POSITIVE, final=SHARE, steps=SIZE))
@example({"steps": 10**30})
@example({"final": 1e300})
def test_any_noise_schedule(values):
    schedule = made(NoiseSchedule, **values)
    if schedule is not None:
        schedule.step(10)
        low, high = sorted([schedule.initial, schedule.final])
        assert low - 1e-6 <= schedule.std.item() <= high * (1 + 1e-6) + 1e-6


SHAPES = st.lists(st.integers(1, 3), max_size=3).map(tuple)
TENSORS = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    SHAPES,
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]),
)


@settings(max_examples=100)
@given(TENSORS | WRONG, TENSORS | WRONG, TENSORS | WRONG, TENSORS | WRONG)
@example(torch.zeros(2, 3), torch.ones(3), torch.full((3,), -1.0), 1.0)
def test_any_action_distribution(loc, scale, low, high):
    dist = made(ClampedNormal, loc, scale, low, high)
    if dist is not None:
        shapes = (getattr(x, "shape", ()) for x in (loc, scale))
        assert dist.rsample((4,)).shape == (4, *torch.broadcast_shapes(*shapes))


@pytest.fixture(scope="module")
def pendulum():
    env = make_env("Pendulum-v1", action_bounds="rescale")
    return env, make_alm_loss(env, latent_dim=2, hidden_dim=4, model_hidden_dim=4)


@settings(max_examples=60)
@given(
    values=settings_of(
        lr=POSITIVE,
        clip_norm=POSITIVE,
        tau=SHARE,
        precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    )
)
def test_any_stepper(pendulum, values):
    stepper = made(ALMOptimizationStepper, pendulum[1], **values)
    if stepper is not None:
        optimizers = stepper.optimizers.values()
        rates = {float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers}
        assert rates == {float(values.get("lr", 1e-4))}
        assert all(0 < rate < math.inf for rate in rates)


@settings(max_examples=60)
@given(
    values=settings_of(
        total_steps=SIZE,
        warmup_steps=st.integers(1, 30),
        batch_size=st.integers(1, 30),
        horizon=SIZE,
        capacity=st.integers(1, 40),
        lr=POSITIVE,
        clip_norm=POSITIVE,
        tau=SHARE,
        precision=st.sampled_from(["fp32", "bf16", "fp16"]),
        eval_interval=SIZE,
        eval_episodes=SIZE,
        log_interval=SIZE,
        checkpoint_interval=SIZE,
        keep_checkpoints=SIZE,
        seed=SIZE,
    )
)
def test_any_trainer(pendulum, values):
    start = {"total_steps": 3, "warmup_steps": 10, "batch_size": 2, "capacity": 20}
    values = {**start, **values}
    trainer = made(make_trainer, *pendulum, **values)
    if trainer is not None:
        frames = values["total_steps"] + values["warmup_steps"]
        assert trainer.total_frames == frames
        assert values["batch_size"] <= values["warmup_steps"] <= values["capacity"]
