"""Loss, policy and stepper in TorchRL's Ray learner, which needs no Ray itself."""

from __future__ import annotations

import pickle

import torch
from tensordict import TensorDict
from torchrl.trainers._ray_execution import _LearnerObjects, _RayLearnerWorker

from alm_torchrl import make_replay_buffer
from tests.helpers import make_rows
from tests.training.stepping import make_stepper


def published(loss):
    """The weights that workers expect."""
    return TensorDict.from_module(loss.acting_policy()).data


def test_a_learner_elsewhere_makes_the_same_updates():
    stepper = make_stepper(lr=1e-2)
    loss = stepper.loss
    # Not a submodule: its parameters are those of the loss.
    loss.__dict__["actor_network"] = loss.acting_policy()
    rows = make_rows(20).set(("next", "done"), torch.zeros(20, 1, dtype=torch.bool))
    buffer = make_replay_buffer(100, batch_size=4)
    buffer.extend(rows)
    objects = _LearnerObjects(loss, None, stepper, None)
    worker = _RayLearnerWorker(pickle.loads(pickle.dumps(objects)), buffer)
    worker.setup(
        rank=0,
        world_size=1,
        local_batch_size=4,
        coordinates=worker.create_store(None, 30.0),
        backend="gloo",
        generation=1,
        timeout=30.0,
        seed=0,
        clip_grad_norm=True,
        clip_norm=None,
        update_replay_priority=True,
    )
    before = published(loss).clone()
    torch.manual_seed(1)
    assert worker.step(3, 1).model_version == 3
    sent = worker.get_weights("policy", 3)
    worker.close()
    # Its networks are its own.
    assert (published(loss) == before).all()
    torch.manual_seed(1)
    for _ in range(3):
        stepper.step(None, buffer.sample())
    assert set(sent.keys(True, True)) == set(published(loss).keys(True, True))
    assert (sent == published(loss)).all()
    assert not (sent == before).all()
