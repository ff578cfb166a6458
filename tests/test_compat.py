"""Each private name of TorchRL that is used, and what breaks when it goes."""

from __future__ import annotations

import inspect

import pytest
import torch
from torchrl.checkpoint import Checkpoint
from torchrl.collectors import Collector
from torchrl.envs import SerialEnv

from alm_torchrl import compat, make_env, make_replay_buffer, random_policy
from tests.training.trainer_runs import counter_trainer
from tests.walk_env import Walk, wrap


def make_collector():
    env = make_env("Pendulum-v1", action_bounds="rescale")
    return Collector(
        env,
        random_policy(env),
        frames_per_batch=1,
        auto_register_policy_transforms=False,
    )


def state_files():
    tensors = {}
    schema = compat.encode_state({"a": [torch.ones(2), 1]}, tensors)
    back = compat.decode_state(schema, tensors, None)
    return torch.equal(back["a"][0], torch.ones(2)) and back["a"][1] == 1


def publication():
    # VerifiedCheckpoint overrides it to write digests before a save gets its name.
    called = inspect.getsource(Checkpoint.save)
    return "self._publish_path(stage, destination)" in called


def carrier():
    collector = make_collector()
    replaced = compat.get_carrier(collector).clone()
    replaced["observation"] = torch.full((3,), 0.25)
    compat.set_carrier(collector, replaced)
    return bool((collector.next()["observation"] == 0.25).all())


def trajectories():
    collector = make_collector()
    compat.set_trajectories(collector, {"traj_id": torch.tensor(17)})
    return int(collector.state_dict()["traj_pool"]["traj_id"]) == 17


def gymnasium_environment():
    walk = Walk()
    return compat.gymnasium_env(wrap(walk).base_env) is walk


def workers():
    env = SerialEnv(2, lambda: wrap(Walk()))
    env.reset()
    return len(compat.serial_workers(env)) == 2


def replay_generator():
    generator = torch.Generator()
    buffer = make_replay_buffer(5, batch_size=1, horizon=1, generator=generator)
    return compat.generator_of(buffer) is generator


def logs():
    trainer = counter_trainer()
    trainer.train()
    kept = trainer._log_dict
    return len(kept) > 5 and all(len(values) == 1 for values in kept.values())


def update_count():
    trainer = counter_trainer()
    trainer.train()
    return trainer._optim_count == 12


@pytest.mark.parametrize(
    ("works", "broken"),
    [
        (state_files, "checkpoints: the encoding of nested state"),
        (publication, "checkpoints: digests are not written"),
        (carrier, "resume: what a collector carries"),
        (trajectories, "resume: the numbers of trajectories"),
        (gymnasium_environment, "resume: state that outlives resets"),
        (workers, "resume: the episodes of a SerialEnv"),
        (replay_generator, "resume: the draws of the replay"),
        (logs, "trainer: memory of logged values"),
        (update_count, "trainer: the count of updates"),
    ],
)
def test_private_names_do_what_they_did(works, broken):
    message = f"a private name of TorchRL changed; {broken}"
    try:
        assert works(), message
    except (AttributeError, TypeError) as error:
        raise AssertionError(message) from error
