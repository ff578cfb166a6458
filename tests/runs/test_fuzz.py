"""Any arguments give a working object, or an error that this library itself raised."""

from __future__ import annotations

import contextlib
import io
import re
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import alm_torchrl
from alm_torchrl import (
    ALMOptimizationStepper,
    ClampedNormal,
    NoiseSchedule,
    make_alm_loss,
    make_env,
    make_replay_buffer,
    make_trainer,
)
from alm_torchrl.cli import COMMANDS, main
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
SIZE, SHARE, POSITIVE = st.integers(1, 9), st.floats(0, 1), st.floats(1e-6, 10)


def arguments_of(right):
    """Some of the arguments; about one of them has a value of any kind."""

    def spoil(values):
        return st.just(values) | st.builds(
            lambda name, value: {**values, name: value},
            st.sampled_from(sorted(right)),
            WRONG,
        )

    return st.fixed_dictionaries({}, optional=right).flatmap(spoil)


def made(build, **kwargs):
    """What a call makes, or None after an error that the package itself raised."""
    try:
        return build(**kwargs)
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
    st.builds(
        lambda flag, text: [f"{flag}={text}"], st.sampled_from(sorted(FLAGS)), TEXT
    ),
    TEXT.map(lambda text: [text]),
    st.sampled_from([["--help"], ["Hopper-v5"], ["--"], ["train"]]),
)


@settings(max_examples=30)
@given(
    st.sampled_from(["train"] * 6 + ["evaluate", "plot", "render", "tasks", ""]),
    st.lists(WORDS, max_size=4),
)
@example("train", [["--preset"]])
@example("train", [["--preset=paper"], ["--preset", "quick"]])
@example("train", [["Hopper-v5"], ["Hopper-v5"]])
def test_any_command_line_is_run_or_refused(command, words):
    arguments = [*([command] if command else []), *(x for word in words for x in word)]
    called = []
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for one in COMMANDS.values():
            stub = mock.patch.object(one, "run", lambda self: called.append(self) or 0)
            stack.enter_context(stub)
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
            assert code in (0, 2)
            assert not called
            assert (out if code == 0 else err).getvalue().strip()
        else:
            assert code == 0
            # Without a command, the help is printed.
            helped = arguments[:1] in ([], ["-h"], ["--help"])
            assert len(called) == (not helped)
            assert bool(out.getvalue()) == helped


# -- constructors --------------------------------------------------------------------


@settings(max_examples=30)
@given(
    st.sampled_from(["quick", "paper", "slow", None]),
    arguments_of(
        {
            "task": st.sampled_from(["Hopper-v5", "Humanoid-v5", "nonsense", ""]),
            "seed": SIZE,
            "device": st.sampled_from(["auto", "cpu", "cuda"]),
            "total_steps": SIZE,
            "warmup_steps": st.integers(1, 10**5),
            "capacity": st.none() | st.integers(1, 10**6),
            "batch_size": st.integers(1, 10**4),
            "horizon": SIZE,
            "gamma": SHARE,
            "classifier_coef": POSITIVE,
            "discount_model_loss": st.booleans(),
            "lr": POSITIVE,
            "logger": st.sampled_from(["tensorboard", "wandb", "none"]),
            "run_dir": st.none() | st.just(Path("somewhere")),
        }
    ),
)
def test_any_settings_of_a_run(preset, values):
    config = made(preset_config, preset=preset, **values)
    if config is None:
        return
    assert {name: getattr(config, name) for name in values} == values
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert re.fullmatch(r"[\w.-]+", config.run_name, re.ASCII)
    assert config.horizon <= config.warmup_steps <= config.replay_capacity
    assert config.batch_size <= config.warmup_steps
    assert 0 <= config.gamma < 1


def loss_with_values(**values):
    sizes = {"latent_dim": 2, "hidden_dim": 2, "model_hidden_dim": 2}
    ends = {"observation_dim": 3, "action_low": [-1.0] * 2, "action_high": [1.0] * 2}
    loss = make_alm_loss(**{**sizes, **ends, **values})
    if values.keys().isdisjoint(ends):
        assert set(loss(make_rows(2, 2)).keys()) == set(loss.out_keys)
    return loss


def samples(loc=1.0, scale=1.0, low=-1.0, high=1.0):
    dist = ClampedNormal(loc, scale, low, high)
    shapes = (getattr(one, "shape", ()) for one in (loc, scale))
    assert dist.rsample((4,)).shape == (4, *torch.broadcast_shapes(*shapes))


def stepper(**values):
    return ALMOptimizationStepper(loss_with_values(), **values)


def trainer(**values):
    env = make_env("Pendulum-v1", action_bounds="rescale")
    loss = make_alm_loss(env, latent_dim=2, hidden_dim=4, model_hidden_dim=4)
    start = {"total_steps": 3, "warmup_steps": 10, "batch_size": 2, "capacity": 20}
    return make_trainer(env, loss, **{**start, **values})


BOUND = st.lists(st.floats(-2, 2), min_size=1, max_size=2)
TENSOR = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.lists(st.integers(1, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]),
)
OPTIMIZER = {
    **{"lr": POSITIVE, "clip_norm": POSITIVE, "tau": SHARE},
    "precision": st.sampled_from(["fp32", "bf16", "fp16"]),
}
CALLS = {
    loss_with_values: {
        **{"observation_dim": SIZE, "action_low": BOUND, "action_high": BOUND},
        **dict.fromkeys(("latent_dim", "hidden_dim", "model_hidden_dim"), SIZE),
        **dict.fromkeys(("gamma", "lmbda", "kl_coef", "classifier_coef"), SHARE),
        "noise_schedule": st.none() | st.builds(NoiseSchedule),
        "noise_clip": st.none() | SHARE,
        "discount_model_loss": st.booleans(),
        "reduction": st.sampled_from(["mean", "sum", "none", None]),
    },
    make_replay_buffer: {
        **{"capacity": st.integers(9, 20), "batch_size": SIZE, "horizon": SIZE},
        "device": st.sampled_from(["cpu", "meta", "cuda:99", "gpu"]),
        "generator": st.none() | st.builds(torch.Generator),
    },
    NoiseSchedule: {"initial": POSITIVE, "final": SHARE, "steps": SIZE},
    samples: dict.fromkeys(("loc", "scale", "low", "high"), TENSOR),
    stepper: OPTIMIZER,
    trainer: {
        **{"total_steps": SIZE, "horizon": SIZE, "seed": SIZE},
        **{"warmup_steps": st.integers(1, 30), "batch_size": st.integers(1, 30)},
        "capacity": st.integers(1, 40),
        **dict.fromkeys(("eval_interval", "eval_episodes", "log_interval"), SIZE),
        **dict.fromkeys(("checkpoint_interval", "keep_checkpoints"), SIZE),
        **OPTIMIZER,
    },
}


@pytest.mark.parametrize("build", CALLS)
@settings(max_examples=20)
@given(data=st.data())
def test_any_arguments_of_a_constructor(build, data):
    required = {"capacity": 9} if build is make_replay_buffer else {}
    made(build, **{**required, **data.draw(arguments_of(CALLS[build]))})


@pytest.mark.parametrize(
    ("build", "values"),
    [
        (loss_with_values, {"noise_clip": 1e300}),
        (NoiseSchedule, {"steps": 10**30}),
        (NoiseSchedule, {"final": 1e300}),
        (samples, {"low": torch.ones(3), "high": torch.full((3,), -1.0)}),
    ],
)
def test_numbers_that_tensors_cannot_hold(build, values):
    with pytest.raises(ValueError, match="got"):
        build(**values)
