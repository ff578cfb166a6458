"""Each private name of TorchRL that is used, and what breaks when it goes."""

from __future__ import annotations

import inspect

import pytest
import torch
from tensordict import TensorDict
from torchrl.checkpoint import Checkpoint
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.envs import SerialEnv
from torchrl.objectives import LossModule, REDQLoss
from torchrl.record.loggers.tensorboard import TensorboardLogger

from alm_torchrl import compat, make_env, make_replay_buffer, random_policy
from tests.helpers import make_loss
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


def storage():
    storage = LazyTensorStorage(5)
    before = compat.storage_revision(storage)
    unset = compat.stored_rows(storage) is None
    buffer = TensorDictReplayBuffer(storage=storage)
    buffer.extend(TensorDict(a=torch.arange(3.0), batch_size=[3]))
    return (
        unset
        and compat.storage_revision(storage) > before
        and len(compat.stored_rows(storage)) == 5
        and compat.last_written(storage) is not None
    )


def parameters_and_masks():
    loss = make_loss()
    held = compat.tensors_of(loss.actor_params)
    compat.erase_cache(loss)
    loss.double()
    return compat.tensors_of(loss.actor_params) is not held and (
        "collector",
        "mask",
    ) in compat.mask_keys(loss)


# Names of a base class, used in a subclass: owner, name, and what needs it.
INHERITED = [
    (LossModule, "_clear_weakrefs", "ALMLoss.forward under torch.compile"),
    (LossModule, "_reduce_loss", "REDQBaseline: masks and reductions"),
    (LossModule, "_forward_value_estimator_keys", "ALMLoss.set_keys"),
    (REDQLoss, "_make_vmap", "REDQBaseline: its critics are mapped"),
    (REDQLoss, "_cached_detach_qvalue_network_params", "REDQBaseline.actor_loss"),
    (Sampler, "_empty", "UniformWindowSampler: an emptied buffer"),
    (TensorDict, "_new_unsafe", "the replay's split of a draw"),
    (Checkpoint, "_local_path", "VerifiedCheckpoint.load"),
    (TensorboardLogger, "_create_experiment", "train: logs after a resume"),
]


@pytest.mark.parametrize(("owner", "name", "broken"), INHERITED)
def test_inherited_names_are_there(owner, name, broken):
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone; it breaks {broken}"


@pytest.mark.parametrize(
    ("works", "broken"),
    [
        (publication, "checkpoints: digests are not written"),
        (carrier, "resume: what a collector carries"),
        (trajectories, "resume: the numbers of trajectories"),
        (gymnasium_environment, "resume: state that outlives resets"),
        (workers, "resume: the episodes of a SerialEnv"),
        (replay_generator, "resume: the draws of the replay"),
        (storage, "replay: what is stored, and when it changed"),
        (parameters_and_masks, "losses: parameters of a copy or cast; masks"),
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
