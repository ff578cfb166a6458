"""Wrong arguments: the message names the argument, what was expected and what was got.

The settings of runs and the batches of losses have tables of their own.
"""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Bernoulli

from alm_torchrl import (
    ALMOptimizationStepper,
    ClampedNormal,
    NoiseSchedule,
    evaluate_policy,
    make_actor,
    make_alm_loss,
    make_classifier,
    make_decoder,
    make_encoder,
    make_env,
    make_model,
    make_qvalue,
    make_redq_loss,
    make_replay_buffer,
    make_reward,
    make_sac_loss,
    make_stochastic_actor,
    make_td3_loss,
    make_trainer,
    zero_policy,
)
from alm_torchrl.checks import check_choice, check_integer, check_number, check_steps
from alm_torchrl.distributions import draw
from alm_torchrl.networks import make_identity_encoder
from tests.helpers import make_loss

NAN, INF, ONES = float("nan"), float("inf"), torch.ones(4)


def pendulum():
    return make_env("Pendulum-v1", action_bounds="rescale")


def hopper(**options):
    return make_env("Hopper-v5", **options)


def tiny(env):
    return make_alm_loss(env, latent_dim=3, hidden_dim=8, model_hidden_dim=8)


def train(env=None, loss=None, **options):
    env = pendulum() if env is None else env
    settings = {"total_steps": 1, "warmup_steps": 10, "batch_size": 4, **options}
    return make_trainer(env, tiny(pendulum()) if loss is None else loss, **settings)


def stepper(**options):
    return ALMOptimizationStepper(make_loss(updater=False), **options)


def evaluate(policy, **options):
    return evaluate_policy(pendulum(), policy, **options)


def store(rows):
    done = torch.zeros(rows, 1, dtype=torch.bool)
    data = TensorDict({"next": {"done": done}}, batch_size=[rows])
    return make_replay_buffer(5).extend(data)


def steps(**changed):
    sizes = {"warmup_steps": 9, "capacity": 9, "batch_size": 4, "horizon": 3}
    return check_steps(**{**sizes, **changed})


def box(make, **options):
    return make(observation_dim=3, action_low=[-1], action_high=[1], **options)


# Each call with a part of its message, by the kind of the error.
VALUES = [
    # checks
    (lambda: check_integer("n", 2.0), r"n: expected an integer >= 1, got 2\.0"),
    (lambda: check_integer("n", True), "n: expected an integer >= 1, got True"),
    (lambda: check_integer("n", 7, 0, 6), "n: expected an integer >= 0 and <= 6, got"),
    (
        lambda: check_integer("n", 2**63, 1, INF),
        "n: expected an integer >= 1, got 9223",
    ),
    (lambda: check_number("x", "1"), "x: expected a number >= 0, got '1'"),
    (lambda: check_number("x", True), "x: expected a number >= 0, got True"),
    (lambda: check_number("x", NAN), "x: expected a number >= 0, got nan"),
    (lambda: check_number("x", INF), "x: expected a number >= 0, got inf"),
    (lambda: check_number("x", 1e39), "x: expected a number >= 0, got 1e"),
    (lambda: check_number("x", 0, open_low=True), "x: expected a number > 0, got 0"),
    (lambda: check_number("x", 1, 0, 1, open_high=True), "x: .* >= 0 and < 1, got 1"),
    (lambda: check_choice("x", 1, (True, "1")), "x: expected True or '1', got 1"),
    (lambda: steps(horizon=0), "horizon: expected an integer >= 1, got 0"),
    (lambda: steps(horizon=10), "warmup_steps: expected at least horizon=10, got 9"),
    (lambda: steps(batch_size=10), "batch_size: expected at most warmup_steps=9, got"),
    (lambda: steps(capacity=8), "capacity: expected at least warmup_steps=9, got 8"),
    # distributions
    (lambda: ClampedNormal(ONES, ONES[:2]), r"loc and scale: .* \[4\] and shape \[2\]"),
    (lambda: ClampedNormal(ONES, ONES, torch.ones(3, 4)), r"low: .* got \[3, 4\]"),
    (lambda: ClampedNormal(ONES, ONES, high="one"), "high: expected .*, got 'one'"),
    (lambda: ClampedNormal(ONES.long(), 1), r"loc: expected .*, got torch\.int64"),
    # networks
    (
        lambda: make_encoder(0),
        "observation_dim: expected an integer >= 1 and <= 65536, got 0",
    ),
    (lambda: make_encoder(3, latent_dim=2.5), r"latent_dim: expected .*, got 2\.5"),
    (lambda: make_encoder(3, hidden_dim=-1), "hidden_dim: expected .* got -1"),
    (lambda: make_identity_encoder(3, scale=0), "scale: expected a number > 0, got 0"),
    (lambda: make_decoder(3, latent_dim=0), "latent_dim: expected an integer >= 1"),
    (lambda: make_model(2, hidden_dim=0), "hidden_dim: expected an integer >= 1"),
    (lambda: make_qvalue(0), "action_dim: expected an integer >= 1"),
    (lambda: make_reward(2, latent_dim=0), "latent_dim: expected an integer >= 1"),
    (lambda: make_classifier(2, hidden_dim=0), "hidden_dim: expected an integer >= 1"),
    (lambda: make_actor([-1], [1], hidden_dim=0), "hidden_dim: expected an integer"),
    (lambda: make_actor(["a"], [1]), r"action_low: expected a vector of .*got \['a'\]"),
    (lambda: make_actor([], []), r"action_low: expected a vector, got .*\(0,\)"),
    (lambda: make_actor([-1], [[1]]), r"action_high: expected a vector, .*\(1, 1\)"),
    (lambda: make_actor([-1], [1, 1]), r"of the same size, got .*\(1,\) and \(2,\)"),
    (lambda: make_actor([1], [-1]), r"low < high, got \[1\.0\] and \[-1\.0\]"),
    (lambda: make_actor([0], [0]), "low < high"),
    (lambda: make_stochastic_actor([-INF], [1]), r"expected finite .* got \[-inf\]"),
    (lambda: make_actor([-1], [NAN]), r"expected finite .* \[nan\]"),
    (lambda: NoiseSchedule(-1.0), r"initial: expected a number >= 0, got -1\.0"),
    (lambda: NoiseSchedule(1.0, NAN), "final: expected a number >= 0, got nan"),
    (lambda: NoiseSchedule(steps=0), "steps: expected an integer >= 1, got 0"),
    # replay
    (lambda: make_replay_buffer(10.0), r"capacity: expected an integer .* got 10\.0"),
    (lambda: make_replay_buffer(2), "capacity: expected at least horizon=3, got 2"),
    (lambda: make_replay_buffer(9, batch_size=0), "batch_size: .* got 0"),
    (lambda: make_replay_buffer(9, horizon=0), "horizon: .* got 0"),
    (lambda: make_replay_buffer(9, device="cuda:99"), "device: .*, got 'cuda:99'"),
    (lambda: make_replay_buffer(9, memmap_dir="x", device="meta"), "device: .* 'meta'"),
    (lambda: store(6), r"tensordicts: expected at most 5 rows .* got 6"),
    # environments
    (lambda: make_env("Hopprr-v5"), r"task: .* such as Hopper-v\d.*, got 'Hopprr-v5'"),
    (lambda: make_env("Hopper"), r"such as Hopper-v\d.*, got 'Hopper'"),
    (lambda: make_env("Ant-v99"), r"such as Ant-v\d.*, got 'Ant-v99'"),
    (lambda: make_env("zzz"), "with its version, got 'zzz' .*`alm-torchrl tasks`"),
    (lambda: make_env(5), "task: expected the id of a registered .*, got 5 "),
    (lambda: make_env("no_module:X-v1"), "task: expected a module .*got 'no_module:X"),
    (lambda: make_env("CartPole-v1"), r"expected actions .* got Discrete\(2\) from Ca"),
    (lambda: make_env("FrozenLake-v1"), r"expected observations .* got Discrete\(16\)"),
    (lambda: hopper(action_bounds="squash"), "action_bounds: expected 'clamp' or 're"),
    (lambda: hopper(device="gpu"), "device: expected .* PyTorch device, got 'gpu'"),
    (lambda: hopper(seed=-1), "seed: expected an integer >= 0 and <= 42949.*, got -1"),
    (lambda: hopper(gravity=3), r"gym_kwargs: .* 'Hopper-v5', got \{'gravity': 3\}"),
    (lambda: hopper(dynamics_noise=-1), "dynamics_noise: expected .* >= 0, got -1"),
    (lambda: make_env("Pendulum-v1", dynamics_noise=1), "dynamics_noise: .*Pendulum"),
    # losses
    (lambda: make_loss(gamma=1.0), r"gamma: expected a number >= 0 and < 1, got 1\.0"),
    (lambda: make_loss().make_value_estimator(gamma=1), "gamma: .* and < 1, got 1"),
    (lambda: make_loss(lmbda=1.01), r"lmbda: expected .* <= 1, got 1\.01"),
    (lambda: make_loss(kl_coef=-1.0), r"kl_coef: expected a number >= 0, got -1\.0"),
    (lambda: make_loss(reduction="avg"), "reduction: expected None or .*, got 'avg'"),
    (lambda: box(make_td3_loss, policy_delay=0), "policy_delay: expected .* got 0"),
    (lambda: box(make_td3_loss, noise_clip=-1), "noise_clip: expected .* got -1"),
    (lambda: box(make_sac_loss, hidden_dim=0), "hidden_dim: expected .* got 0"),
    (lambda: box(make_sac_loss, gamma=1), "gamma: expected .* < 1, got 1"),
    (lambda: box(make_redq_loss, num_qvalue_nets=1), "num_qvalue_nets: .* got 1"),
    (lambda: box(make_redq_loss, sub_sample_len=10), "sub_sample_len: .* <= 9, got 10"),
    (lambda: box(make_redq_loss, updates_per_step=0), "updates_per_step: .* got 0"),
    # steppers
    (lambda: stepper(cudagraph=True), "cudagraph: True expects .* got cpu"),
    (lambda: stepper(precision="tf32"), "precision: 'tf32' expects .* got cpu"),
    (lambda: stepper(precision="fp16"), "precision: expected .* got 'fp16'"),
    (lambda: stepper(clip_norm=-1.0), "clip_norm: expected .* got -1"),
    (lambda: stepper(tau=0.0), "tau: expected .* got 0"),
    (
        lambda: ALMOptimizationStepper(make_loss(updater=False, reduction="none")),
        r"loss: .* got reduction='none'",
    ),
    # training and evaluation
    (lambda: train(total_steps=0), "total_steps: expected an integer >= 1, got 0"),
    (lambda: train(capacity=9), "capacity: expected at least warmup_steps=10, got 9"),
    (
        lambda: train(loss=tiny(make_env("InvertedPendulum-v5"))),
        r"encoder: expected a network for 'observation' \[3\] .*, got: .*1x3 and 4x8",
    ),
    (
        lambda: train(make_env("Swimmer-v5"), box(make_sac_loss)),
        r"actor: expected a network for 'observation' \[8\] .*, got: .*1x8 and 3x256",
    ),
    (lambda: train(loss=make_loss()), r"loss: expected .* \[1\], .*, got \[2\]"),
    (lambda: evaluate(zero_policy(pendulum()), episodes=0), "episodes: .*, got 0"),
    (lambda: evaluate(zero_policy(pendulum()), seed=-1), "seed: expected .*, got -1"),
]
TYPES = [
    (lambda: stepper(compile="yes"), "compile: expected bool, got str"),
    (lambda: stepper(cudagraph=1), "cudagraph: expected bool, got int"),
    (lambda: draw(Bernoulli(0.5)), r"expected .* \(has_rsample\), got Bernoulli"),
    (
        lambda: make_actor([-1], [1], noise_schedule=0.3),
        "noise_schedule: .*, got float",
    ),
    (lambda: make_replay_buffer(9, generator=3), "generator: expected Gen.*, got int"),
    (lambda: make_loss(gama=0.9), "unexpected keyword argument 'gama'"),
    (lambda: tiny(gymnasium.make("Hopper-v5")), r"env: .*, got TimeLimit \(make_env"),
    (lambda: train("Pendulum-v1"), r"env: expected EnvBase, got str \(make_env makes"),
    (lambda: train(loss=nn.Linear(1, 1)), "loss: expected ALMLoss, got Linear"),
    (lambda: evaluate(torch.zeros(1)), "policy: expected a callable .*, got Tensor"),
]
IMPORTS = [(lambda: make_env("Ant-v2"), "task: .* got 'Ant-v2'.*`alm-torchrl tasks`")]
KEYS = [
    (lambda: evaluate(lambda td: td), r"policy: .* 'action', got \[.*'observation'"),
    (
        lambda: evaluate(TensorDictModule(nn.Linear(3, 1), ["pixels"], ["action"])),
        r"policy: expected in_keys among \['observation'\], .* got \['pixels'\]",
    ),
]


@pytest.mark.filterwarnings("ignore:task. the actions of", "ignore:.*is out of date")
@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        pytest.param(error, *case, id=case[1])
        for error, cases in (
            (ValueError, VALUES),
            (TypeError, TYPES),
            (KeyError, KEYS),
            (ImportError, IMPORTS),
        )
        for case in cases
    ],
)
def test_wrong_call(error, call, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert type(raised.value) is error


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpy_numbers_are_numbers(integer, tmp_path):
    def result(whole, real, folder):
        torch.manual_seed(0)
        env = make_env("Pendulum-v1", action_bounds="rescale", seed=whole(0))
        sizes = {"latent_dim": 3, "hidden_dim": 8, "model_hidden_dim": 8}
        loss = make_alm_loss(env, **{name: whole(n) for name, n in sizes.items()})
        numbers = {
            **{"total_steps": 4, "warmup_steps": 12, "batch_size": 4, "horizon": 3},
            **{"capacity": 100, "eval_interval": 3, "eval_episodes": 1, "seed": 7},
            **{"log_interval": 2, "checkpoint_interval": 4, "keep_checkpoints": 2},
            "keep_every": 3,
        }
        make_trainer(
            env,
            loss,
            **{name: whole(n) for name, n in numbers.items()},
            lr=real(2**-8),
            tau=real(2**-5),
            clip_norm=real(64),
            eval_env=make_env(
                "Pendulum-v1", action_bounds="rescale", max_episode_steps=5
            ),
            checkpoint_dir=folder,
        ).train()
        return sum(p.double().sum().item() for p in loss.parameters())

    plain = result(int, float, tmp_path / "plain")
    assert result(integer, np.float32, tmp_path / "numpy") == plain


def test_sizes_that_no_machine_has_are_refused():
    with pytest.raises(ValueError, match="hidden_dim: expected an integer >= 1 and <="):
        make_encoder(3, hidden_dim=10**12)
