"""Settings and presets: their defaults, ranges and names."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest

from alm_torchrl import (
    ALMLoss,
    ALMOptimizationStepper,
    BaselineOptimizationStepper,
    NoiseSchedule,
    make_alm_loss,
    make_env,
    make_redq_loss,
    make_replay_buffer,
    make_sac_loss,
    make_td3_loss,
    make_trainer,
)
from alm_torchrl.runs.settings import PRESETS, TrainConfig, preset_config

TABLE_3 = {
    **{"latent_dim": 50, "hidden_dim": 512, "model_hidden_dim": 1024},
    **{"batch_size": 512, "horizon": 3, "gamma": 0.99, "lmbda": 0.95},
    **{"classifier_coef": 0.1, "lr": 1e-4, "clip_norm": 100.0, "tau": 0.005},
    **{"warmup_steps": 5000, "noise_initial": 1.0, "noise_final": 0.1},
    **{"noise_steps": 100_000, "noise_clip": 0.3, "total_steps": 300_000},
    **{"eval_interval": 5000, "eval_episodes": 5, "discount_model_loss": False},
}


def test_the_paper_preset_is_table_3():
    config = preset_config("paper", task="Hopper-v5")
    assert {name: getattr(config, name) for name in TABLE_3} == TABLE_3
    assert config.changes == {}
    assert preset_config("quick").task == "HalfCheetah-v5"
    assert preset_config("quick").changes == {}


@pytest.mark.parametrize(
    ("function", "other"),
    [
        # These parameters have the name of a setting and another meaning.
        (make_trainer, {"logger", "capacity", "compile"}),
        (make_env, {"device", "seed"}),
        (make_replay_buffer, {"device"}),
        (ALMLoss, {"entropy"}),
        *((loss, set()) for loss in (make_alm_loss, make_td3_loss)),
        # Published with narrower layers than ALM's.
        (make_sac_loss, {"hidden_dim"}),
        (make_redq_loss, {"hidden_dim", "updates_per_step"}),
        (ALMOptimizationStepper, {"compile"}),
        (BaselineOptimizationStepper, set()),
    ],
)
def test_the_library_has_the_same_defaults(function, other):
    settings = TrainConfig(task="Hopper-v5").to_dict()
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if name in settings and parameter.default is not inspect.Parameter.empty
    }
    assert defaults.keys() > other
    assert {name for name in defaults if defaults[name] != settings[name]} <= other


def test_noise_schedule_and_trainer_take_the_settings():
    config = TrainConfig(task="Humanoid-v5", lr=0.5, tau=0.25)
    schedule = NoiseSchedule()
    assert (schedule.initial, schedule.final, schedule.steps) == (
        *(config.noise_initial, config.noise_final, config.noise_steps),
    )
    arguments = config.arguments_of(make_trainer)
    assert arguments["lr"] == 0.5
    assert arguments["tau"] == 0.25
    assert arguments["capacity"] == 1_000_000
    assert arguments.keys() == inspect.signature(make_trainer).parameters.keys() & {
        field.name for field in dataclasses.fields(TrainConfig)
    }


@pytest.mark.parametrize(
    ("task", "capacity"),
    [
        ("Humanoid-v5", 1_000_000),
        ("T-Humanoid-v5", 100_000),
        ("HumanoidStandup-v5", 100_000),
        ("HalfCheetah-v5", 100_000),
    ],
)
def test_capacity_follows_the_task(task, capacity):
    assert preset_config("paper", task=task).replay_capacity == capacity
    assert preset_config("paper", task=task, capacity=7777).replay_capacity == 7777


NUMBERS = [
    field.name
    for field in dataclasses.fields(TrainConfig)
    if type(field.default) in (int, float) or field.name in ("threads", "capacity")
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, -1) for name in NUMBERS),
        *(("seed", True), ("horizon", "3"), ("kl_coef", float("nan")), ("gamma", "1")),
        *(("lr", 0.0), ("tau", 0.0), ("gamma", 1.0), ("lmbda", 1.5), ("horizon", 0)),
        *(("total_steps", 1.5), ("seed", 2**31), ("compile", 1), ("entropy", None)),
        *(("logger", "mlflow"), ("agent", "ppo"), ("precision", "fp16")),
        *(("run_dir", "runs"), ("task", None), ("preset", "fast")),
        # At most the warm-up, at least the warm-up, at least the horizon.
        *(("batch_size", 2001), ("capacity", 1999), ("warmup_steps", 2)),
    ],
)
def test_a_setting_out_of_range_is_named(name, value):
    config = preset_config("quick")
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got {value!r}\.$"):
        dataclasses.replace(config, **{name: value})


def test_a_preset_needs_its_name_and_a_task():
    with pytest.raises(ValueError, match=r"preset: expected one of .* got 'fast'"):
        preset_config("fast")
    with pytest.raises(ValueError, match=r"task: expected one, .* got None"):
        preset_config("paper")


def test_the_run_name_counts_only_what_can_change_a_result():
    base = preset_config("quick")
    assert base.run_name == "HalfCheetah-v5-alm-quick-s0"
    elsewhere = preset_config("quick", device="cpu", threads=1, logger="none")
    assert elsewhere.run_name == base.run_name
    changed = preset_config("quick", lr=3e-4, seed=2)
    assert re.fullmatch(r"HalfCheetah-v5-alm-quick-s2-[0-9a-f]{8}", changed.run_name)
    same = preset_config("quick", lr=3e-4, seed=3, run_dir=Path("x"))
    assert same.run_name[-8:] == changed.run_name[-8:]
    assert preset_config("quick", lr=2e-4).run_name[-8:] != changed.run_name[-8:]
    assert preset_config("quick", task="pkg:some/Task-v0").run_name.startswith(
        "pkg-some-Task-v0-alm-"
    )
    assert base.run_path == Path("runs") / base.run_name
    assert same.run_path == Path("x")


def test_settings_survive_json():
    for preset in PRESETS:
        config = preset_config(preset, task="Hopper-v5", run_dir=Path("a b"))
        text = json.dumps(config.to_dict())
        assert TrainConfig.from_dict(json.loads(text)) == config
    numpy = preset_config("quick", seed=np.int64(3), lr=np.float32(0.5))
    assert json.loads(json.dumps(numpy.to_dict()))["seed"] == 3
    assert TrainConfig.from_dict({"task": "a"}) == TrainConfig(task="a")
    with pytest.raises(ValueError, match=r"got also \['speed'\]"):
        TrainConfig.from_dict({**config.to_dict(), "speed": 1})
