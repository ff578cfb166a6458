"""Each row of the catalogue and each flag of ``train`` reaches what it names.

The tables are written by hand: a new row or a new flag fails until it stands here.
"""

from __future__ import annotations

import dataclasses
from functools import partial, wraps
from pathlib import Path

import pytest
import torch
from torch import nn

from alm_torchrl import make_env
from alm_torchrl.cli import main
from alm_torchrl.experiments.catalogue import EXPERIMENTS, SCALES, plan
from alm_torchrl.functional import floored_log, shifted_log
from alm_torchrl.networks.running_norm import RunningNorm
from alm_torchrl.runs import agents
from alm_torchrl.runs import train as training
from alm_torchrl.runs.agents import build_loss
from alm_torchrl.runs.settings import TrainConfig

SPACES = {"observation_dim": 7, "action_low": [-1.0] * 2, "action_high": [1.0] * 2}
NETWORKS = ("encoder", "model", "actor", "qvalue", "reward", "classifier")

# The paper's ALM, with the widths of linear layers from input to output.
ALM = {
    "loss": "ALMLoss",
    "horizon": 3,
    "dynamics_noise": 0.0,
    "gamma": 0.99,
    "lmbda": 0.95,
    "classifier_coef": 0.1,
    "kl_coef": 1.0,
    "value_coef": 1.0,
    "reward_coef": 1.0,
    "noise_clip": 0.3,
    "discount_model_loss": False,
    "reduction": "mean",
    "reward_transform": None,
    "logarithms": "None",
    "model_terms": [],
    "entropy": "None",
    "policy_objective": "None",
    "pessimism": 1.0,
    "critic_target": (1, 1.0, None, 0.3),
    "value_head": "SquaredError()",
    "normalised": (0, 0),
    "schedule": (1.0, 0.1, 100_000),
    "encoder": "7>512 512>512 512>100",
    "model": "52>1024 1024>1024 1024>100",
    "actor": "50>512 512>512 512>2",
    "qvalue": "52>512 512>512 512>1 52>512 512>512 512>1",
    "reward": "52>512 512>512 512>1",
    "classifier": "102>512 512>512 512>2",
    "decoder": None,
}
BASELINE = {
    "horizon": 3,
    "dynamics_noise": 0.0,
    "gamma": 0.99,
    "num_qvalue_nets": 2,
    "sub_sample_len": None,
    "updates_per_step": 1,
    "policy_delay": 1,
    "noise_clip": None,
    "schedule": None,
    "actor": "7>512 512>512 512>4",
    "qvalue": "9>512 512>512 512>1",
}
REDQ = {"num_qvalue_nets": 10, "sub_sample_len": 2, "updates_per_step": 20}
ROWS = {
    "alm": ALM,
    "alm-ent": ALM
    | {
        "entropy": "EntropyBonus(alpha_init=0.1, target_entropy=None)",
        "noise_clip": None,
        "schedule": None,
        "actor": "50>512 512>512 512>4",
    },
    "alm-k1": ALM | {"horizon": 1},
    "alm-k5": ALM | {"horizon": 5},
    "alm-no-kl": ALM | {"kl_coef": 0.0},
    "alm-no-value": ALM | {"value_coef": 0.0},
    "alm-no-classifier": ALM | {"classifier_coef": 0.0, "classifier": None},
    "alm-td3-actor": ALM
    | {
        "policy_objective": "QValueObjective()",
        "classifier_coef": 0.0,
        "classifier": None,
    },
    "alm-c0.01": ALM | {"classifier_coef": 0.01},
    "alm-c0.5": ALM | {"classifier_coef": 0.5},
    "alm-c1": ALM | {"classifier_coef": 1.0},
    "alm-log": ALM | {"reward_transform": floored_log},
    "alm-log-model": ALM | {"logarithms": "Logarithms('model')"},
    "alm-log-shifted": ALM | {"reward_transform": shifted_log},
    "alm-identity": ALM
    | {
        "encoder": "",
        "model": "9>1024 1024>1024 1024>14",
        "actor": "7>512 512>512 512>2",
        "qvalue": "9>512 512>512 512>1 9>512 512>512 512>1",
        "reward": "9>512 512>512 512>1",
        "classifier": "16>512 512>512 512>2",
    },
    "alm-likelihood": ALM
    | {
        "model_terms": [("Reconstruction", 1.0, None)],
        "decoder": "50>512 512>512 512>7",
        "reward_coef": 0.0,
        "value_coef": 0.0,
    },
    "alm-linear": ALM | {"classifier": "102>2"},
    "alm-noise0.05": ALM | {"dynamics_noise": 0.05},
    "alm-noise0.1": ALM | {"dynamics_noise": 0.1},
    "alm-noise0.2": ALM | {"dynamics_noise": 0.2},
    "alm-value-encoder": ALM | {"model_terms": [("ValuePrediction", 1.0, "encoder")]},
    "alm-value-model": ALM | {"model_terms": [("ValuePrediction", 1.0, "model")]},
    "sac": BASELINE | {"loss": "SACBaseline"},
    "redq": BASELINE | {"loss": "REDQBaseline"} | REDQ,
    "td3": BASELINE
    | {
        "loss": "TD3Baseline",
        "policy_delay": 2,
        "noise_clip": 0.3,
        "schedule": (1.0, 0.1, 100_000),
        "actor": "7>512 512>512 512>2",
    },
}
# The other scales have sizes and schedules of their own.
OF_THE_PAPER_SCALE = {*NETWORKS, "decoder", "schedule"}

# The settings of the flags' test beside the flag itself, with the preset "quick".
TINY = {
    "device": "cpu",
    "threads": 1,
    "latent_dim": 4,
    "hidden_dim": 8,
    "model_hidden_dim": 16,
    "eval_episodes": 1,
}
# Field: (a value, what it changes in the loss or in the calls).
FLAGS = {
    "task": ("Other-v0", {"env.task": ["Other-v0"] * 2}),
    "preset": ("paper", {"trainer.lr": 1e-4, "trainer.total_steps": 300_000}),
    "agent": ("redq", {"loss": "REDQBaseline"}),
    "seed": (5, {"trainer.seed": 5, "env.seed": [5, None], "seeded with": 5}),
    "device": ("cuda", {"device": "cuda"}),
    "threads": (2, {"threads": 2}),
    "action_bounds": ("rescale", {"env.action_bounds": ["rescale"] * 2}),
    "dynamics_noise": (0.25, {"env.dynamics_noise": [0.25] * 2}),
    "max_episode_steps": (19, {"env.max_episode_steps": [19] * 2}),
    "total_steps": (11, {"trainer.total_steps": 11}),
    "warmup_steps": (999, {"trainer.warmup_steps": 999}),
    "num_envs": (3, {"trainer.env": [3]}),
    "updates_per_step": (0.5, {"trainer.updates_per_step": 0.5}),
    "capacity": (7777, {"trainer.capacity": 7777}),
    "batch_size": (5, {"trainer.batch_size": 5}),
    "horizon": (2, {"trainer.horizon": 2}),
    "latent_dim": (6, {"encoder": "3>8 8>8 8>12", "model": "7>16 16>16 16>12"}),
    "hidden_dim": (9, {"encoder": "3>9 9>9 9>8", "actor": "4>9 9>9 9>1"}),
    "model_hidden_dim": (10, {"model": "5>10 10>10 10>8"}),
    "reward_hidden_dim": (10, {"reward": "5>10 10>10 10>1"}),
    "classifier": ("linear", {"classifier": "9>2"}),
    "encoder": ("identity", {"encoder": "", "model": "4>16 16>16 16>6"}),
    "gamma": (0.75, {"gamma": 0.75}),
    "lmbda": (0.25, {"lmbda": 0.25}),
    "classifier_coef": (0.75, {"classifier_coef": 0.75}),
    "kl_coef": (0.5, {"kl_coef": 0.5}),
    "value_coef": (0.5, {"value_coef": 0.5}),
    "short_slices": (True, {"trainer.short_slices": True}),
    "recency_decay": (0.5, {"trainer.recency_decay": 0.5}),
    "recency_floor": (0.5, {"trainer.recency_floor": 0.5}),
    "normalize_observations": (True, {"normalised": (1, 0)}),
    "latent": ("rms", {"encoder": "3>8 8>8 8>4", "model": "5>16 16>16 16>4"}),
    "latent_layers": (1, {"encoder": "3>8 8>8", "model": "5>16 16>8"}),
    "layer_norm": (True, {"normalised": (0, 2)}),
    "reward_coef": (0.5, {"reward_coef": 0.5}),
    "consistency_coef": (0.5, {"model_terms": [("Consistency", 0.5, None)]}),
    "reward_fidelity_coef": (0.5, {"model_terms": [("RewardFidelity", 0.5, None)]}),
    "info_nce_coef": (0.5, {"model_terms": [("InfoNCE", 0.5, None)]}),
    "actor_objective": ("qvalue", {"policy_objective": "QValueObjective()"}),
    "n_step": (2, {"critic_target": (2, 1.0, None, 0.3)}),
    "target_pessimism": (
        0.5,
        {"critic_target": (1, 0.5, None, 0.3)},
    ),
    "pessimism": (0.5, {"pessimism": 0.5}),
    "critic_loss": ("huber", {"value_head": "HuberError(1)"}),
    "reward_scale": (
        "rewards",
        {"transform": "RewardScale('rewards', gamma=0.99, limit=5)"},
    ),
    "discount_model_loss": (True, {"discount_model_loss": True}),
    "model_objective": (
        "likelihood",
        {
            "model_terms": [("Reconstruction", 1.0, None)],
            "decoder": "4>8 8>8 8>3",
            "value_coef": 0.0,
            "reward_coef": 0.0,
        },
    ),
    "value_prediction": ("model", {"model_terms": [("ValuePrediction", 1.0, "model")]}),
    "log_reward": ("bound", {"logarithms": "Logarithms('bound')"}),
    "entropy": (True, {"entropy": ROWS["alm-ent"]["entropy"], "schedule": None}),
    "noise_initial": (0.5, {"schedule": (0.5, 0.1, 3000)}),
    "noise_final": (0.25, {"schedule": (1.0, 0.25, 3000)}),
    "noise_steps": (7, {"schedule": (1.0, 0.1, 7)}),
    "noise_clip": (0.125, {"noise_clip": 0.125}),
    "lr": (0.5, {"trainer.lr": 0.5}),
    "lr_final": (0.25, {"trainer.lr_final": 0.25}),
    "lr_steps": (19, {"trainer.lr_steps": 19}),
    "weight_decay": (0.25, {"trainer.weight_decay": 0.25}),
    "clip_norm": (7.0, {"trainer.clip_norm": 7.0}),
    "tau": (0.75, {"trainer.tau": 0.75}),
    "precision": ("bf16", {"trainer.precision": "bf16"}),
    "compile": ("off", {"trainer.compile": False}),
    "cudagraph": (False, {"trainer.cudagraph": False}),
    "eval_interval": (13, {"trainer.eval_interval": 13}),
    "eval_episodes": (14, {"trainer.eval_episodes": 14}),
    "log_interval": (15, {"trainer.log_interval": 15}),
    "checkpoint_interval": (16, {"trainer.checkpoint_interval": 16}),
    "keep_checkpoints": (17, {"trainer.keep_checkpoints": 17}),
    "keep_every": (18, {"trainer.keep_every": 18}),
    "logger": ("none", {"trainer.logger": None}),
    "run_dir": ("here", {"trainer.checkpoint_dir": Path("here/checkpoints")}),
}
# The values of a flag with several, and of the flags that a baseline knows.
MORE_FLAGS = [
    ({"log_reward": "model"}, {"logarithms": "Logarithms('model')"}),
    ({"log_reward": "plain"}, {"reward_transform": floored_log}),
    (
        {"actor_objective": "scaled_qvalue", "action_penalty": 0.5},
        {
            "policy_objective": (
                "ScaledObjective(QValueObjective(), coef=0.5, limit=1.5)"
            )
        },
    ),
    (
        {"reward_scale": "returns", "gamma": 0.75},
        {"transform": "RewardScale('returns', gamma=0.75, limit=5)"},
    ),
    ({"log_reward": "shifted"}, {"reward_transform": shifted_log}),
    (
        {"value_prediction": "encoder"},
        {"model_terms": [("ValuePrediction", 1.0, "encoder")]},
    ),
    *(
        (
            {"agent": agent, "gamma": 0.75, "hidden_dim": 9},
            {"loss": loss, "gamma": 0.75, "qvalue": "4>9 9>9 9>1"},
        )
        for agent, loss in (("sac", "SACBaseline"), ("redq", "REDQBaseline"))
    ),
    (
        {
            **{"agent": "td3", "gamma": 0.75, "hidden_dim": 9, "noise_clip": 0.125},
            **{"noise_initial": 0.5, "noise_final": 0.25, "noise_steps": 7},
        },
        {
            **{"loss": "TD3Baseline", "gamma": 0.75, "qvalue": "4>9 9>9 9>1"},
            **{"noise_clip": 0.125, "schedule": (0.5, 0.25, 7)},
        },
    ),
]


def widths(network: nn.Module | None) -> str | None:
    if network is None:
        return None
    layers = (m for m in network.modules() if isinstance(m, nn.Linear))
    return " ".join(f"{layer.in_features}>{layer.out_features}" for layer in layers)


def facts(loss) -> dict[str, object]:
    """What a loss is made of, as plain values."""
    schedule = loss.noise_schedule
    found: dict[str, object] = {
        "loss": type(loss).__name__,
        "schedule": schedule and (schedule.initial, schedule.final, schedule.steps),
    }
    if found["loss"] != "ALMLoss":
        names = ("num_qvalue_nets", "updates_per_step", "policy_delay")
        return found | {
            **{name: getattr(loss, name) for name in names},
            **{k: getattr(loss, k, None) for k in ("sub_sample_len", "noise_clip")},
            "gamma": round(loss.value_estimator.gamma.item(), 6),
            "actor": widths(loss.actor_network),
            "qvalue": widths(loss.qvalue_network),
        }
    names = ("classifier_coef", "kl_coef", "value_coef", "reward_coef")
    names += ("discount_model_loss", "reduction", "reward_transform", "pessimism")
    parts = ("logarithms", "entropy", "policy_objective")
    parts += ("value_head",)
    target = ("n_step", "pessimism", "noise_std", "noise_clip")
    terms = [*loss.model_terms]
    decoders = [widths(t.decoder) for t in terms if hasattr(t, "decoder")]
    return found | {
        **{name: round(getattr(loss, name).item(), 6) for name in ("gamma", "lmbda")},
        **{name: getattr(loss, name) for name in names},
        **{name: repr(getattr(loss, name)) for name in parts},
        **{name: widths(getattr(loss, name)) for name in NETWORKS},
        "noise_clip": loss.latents.noise_clip,
        "critic_target": tuple(getattr(loss.critic_target, name) for name in target),
        "transform": repr(loss.reward_transform),
        "normalised": tuple(
            sum(isinstance(m, kind) for m in loss.encoder.modules())
            for kind in (RunningNorm, nn.LayerNorm)
        ),
        "model_terms": [
            (type(t).__name__, t.coef, getattr(t, "where", None)) for t in terms
        ],
        "decoder": decoders[0] if decoders else None,
    }


def test_the_flags_are_complete():
    listed = {*FLAGS}.union(*(flags for flags, _ in MORE_FLAGS))
    assert {field.name for field in dataclasses.fields(TrainConfig)} == listed


@pytest.mark.parametrize("scale", SCALES)
def test_rows_of_the_catalogue(scale, monkeypatch):
    # Drawing orthogonal weights of the paper's size takes seconds.
    monkeypatch.setattr(nn.init, "orthogonal_", lambda weight, gain=1: weight)
    left_out = set() if scale == "paper" else OF_THE_PAPER_SCALE
    plans = [plan(one, scale, seeds=1) for one in EXPERIMENTS.values()]
    configs = {variant.name: config for runs in plans for variant, config in runs}
    assert {*configs} == {*ROWS}
    for row, config in configs.items():
        settings = config.to_dict()
        found = facts(build_loss(settings, SPACES))
        found |= {k: settings[k] for k in ("horizon", "dynamics_noise")}
        found.pop("transform", None)  # the representation of "reward_transform"
        expected = {k: v for k, v in ROWS[row].items() if k not in left_out}
        assert {k: v for k, v in found.items() if k not in left_out} == expected, row


class Stopped(Exception):
    """Raised in place of the training, once its arguments are known."""


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Runs the command with some flags up to the trainer, and tells what reached it."""

    def run(flags: dict[str, object]) -> dict[str, object]:
        found: dict[str, object] = {}

        def build(settings, spaces):
            found["seeded with"] = torch.initial_seed()
            loss = build_loss(settings, spaces)
            loss.to = lambda device: found.update(device=device) or loss
            return loss

        def environment(task, **arguments):
            for name, value in {"task": task, "seed": None, **arguments}.items():
                found.setdefault(f"env.{name}", []).append(value)
            return make_env("Pendulum-v1", action_bounds="rescale")

        @wraps(training.make_trainer)  # keeps its signature
        def trainer(env, loss, **arguments):
            found.update({f"trainer.{name}": arguments[name] for name in arguments})
            found["trainer.env"] = list(env.batch_size)
            found.update(facts(loss))
            raise Stopped

        settings = {"task": "Some-v0", **TINY, **flags}
        words = ["train", str(settings.pop("task"))]
        for name, value in settings.items():
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("train"))
            patch.setattr(training, "find_device", lambda name: name)
            patch.setattr(training, "build_loss", build)
            patch.setattr(agents, "make_env", environment)
            patch.setattr(training, "make_trainer", trainer)
            patch.setattr(
                torch, "set_num_threads", partial(found.__setitem__, "threads")
            )
            with pytest.raises(Stopped):
                main(words)
        return found

    return run


@pytest.fixture(scope="module")
def without_flags(call):
    return call({})


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({name: value}, expected) for name, (value, expected) in FLAGS.items()]
    + MORE_FLAGS,
    ids=lambda given: "-".join(given),
)
def test_flag_of_train(flags, expected, call, without_flags):
    found = call(flags)
    assert {name: found[name] for name in expected} == expected
    # An expectation that holds without the flag would test nothing.
    assert not {k for k in expected if without_flags.get(k, ...) == expected[k]}
