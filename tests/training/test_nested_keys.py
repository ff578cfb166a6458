"""Environments whose entries are all nested, from the collector to the evaluation."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, SerialEnv

from alm_torchrl import ActingPolicy, evaluate_policy, make_trainer
from alm_torchrl.evaluation import random_policy, zero_policy
from alm_torchrl.objectives import RewardScale
from tests.training.resume_runs import final_state
from tests.training.trainer_runs import differing, tiny_loss

STEPS = {"warmup_steps": 24, "batch_size": 8, "total_steps": 9}


class Nested(EnvBase):
    """Walks that end after 4, 5, 6 steps and so on; ``x`` is where, ``v`` the step."""

    def __init__(self, *batch):
        super().__init__(batch_size=batch)

        def nested(**leaves):
            return Composite(agent=Composite(leaves, shape=batch), shape=batch)

        self.observation_spec = nested(
            x=Unbounded([*batch, 2]), v=Unbounded([*batch, 1])
        )
        self.action_spec = nested(push=Bounded(-1, 1, [*batch, 2]))
        self.reward_spec = nested(reward=Unbounded([*batch, 1]))
        flag = Categorical(2, dtype=torch.bool, shape=[*batch, 1])
        flags = {name: flag.clone() for name in ("done", "terminated", "truncated")}
        self.done_spec = nested(**flags)
        self.x, self.v = torch.zeros(*batch, 2), torch.zeros(*batch, 1)
        self.limit = 4 + torch.arange(self.v.numel()).reshape(self.v.shape)
        self.generator = torch.Generator()

    def _reset(self, tensordict=None):
        where = torch.ones_like(self.v, dtype=torch.bool)
        if tensordict is not None and ("agent", "_reset") in tensordict.keys(True):
            where = tensordict["agent", "_reset"]
        start = torch.randn(self.x.shape, generator=self.generator)
        self.v, self.x = self.v.masked_fill(where, 0), self.x.where(~where, start)
        return self.as_tensordict()

    def _step(self, tensordict):
        self.v, self.x = self.v + 1, self.x + 0.1 * tensordict["agent", "push"]
        ended, reward = self.v == self.limit, 1 + self.x.mean(-1, keepdim=True)
        flags = {"done": ended, "truncated": ended, "terminated": ended & False}
        return self.as_tensordict(reward=reward, **flags)

    def as_tensordict(self, **entries):
        return TensorDict(
            {"agent": {"x": self.x, "v": self.v, **entries}}, self.batch_size
        )

    def _set_seed(self, seed):
        self.generator.manual_seed(seed)


ENVS = {
    "single": Nested,
    "batched": lambda: Nested(3),
    "serial": lambda: SerialEnv(3, Nested),
}


def build(kind, folder=None, **options):
    env = ENVS[kind]()
    keys = [("agent", "x"), ("agent", "v")]
    scale = RewardScale(num_envs=env.batch_size.numel())
    loss = tiny_loss(env, observation_key=keys, reward_transform=scale)
    return make_trainer(env, loss, checkpoint_dir=folder, **STEPS, **options)


@pytest.mark.parametrize("kind", ENVS)
def test_nested_entries_train(kind):
    rows = []
    evaluation = {"eval_env": Nested(2), "eval_episodes": 3, "eval_interval": 5}
    trainer = build(kind, on_evaluation=rows.append, **evaluation)
    trainer.train()
    stored = trainer.replay_buffer[:]
    limits = [5, 6, 4] if kind == "batched" else [4, 4, 4]
    last = stored["next", "agent", "v"][stored["next", "done"]]
    assert set(last.int().tolist()) == set(limits)
    ids, done = stored["collector", "traj_ids"], stored["next", "done"].squeeze(-1)
    # Each trajectory that ended has its length, and the replay knows its end.
    _, lengths = ids.unique(return_counts=True)
    assert sorted(lengths[ids[done].sort().values].tolist()) == sorted(last.tolist())
    slices = trainer.replay_buffer.sample(200)["slice", "agent", "v"]
    assert (slices.diff(dim=1) == 1).all()
    observer = trainer.loss_module.reward_transform
    assert observer.statistics[-5] == len(stored)
    # Episodes 0, 1, 2 are of walks 0, 1, 0.
    assert [row["mean_length"] for row in rows] == [pytest.approx(13 / 3)] * len(rows)


@pytest.mark.parametrize("kind", ["single", "serial"])
def test_nested_entries_resume_bit_by_bit(tmp_path, kind):
    states = []
    for stop in (None, 30):
        trainer = build(kind, tmp_path / str(stop))
        if stop is not None:
            trainer.register_op(
                "post_steps",
                lambda trainer=trainer: (
                    trainer.collected_frames >= 30 and trainer.request_stop()
                ),
            )
            trainer.train()
            trainer = build(kind, tmp_path / str(stop))
            trainer.load_from_file(trainer.checkpoint_rotation.latest())
        trainer.register_op(
            "shutdown", lambda of=trainer: states.append(final_state(of))
        )
        trainer.train()
    assert differing(*states) == []


def test_nested_actions_are_scored_and_clamped():
    env = Nested(2)
    lengths = [4, 5, 4, 5]
    for policy in (random_policy(env), zero_policy(env)):
        scores = evaluate_policy(env, policy, episodes=4)
        assert scores["length"].tolist() == lengths
    bounds = torch.full((2,), -0.25), torch.full((2,), -0.125)
    key = ("agent", "push")
    policy = ActingPolicy(
        zero_policy(env), deterministic=True, bounds=bounds, action_key=key
    )
    assert (policy(env.reset())[key] == -0.125).all()


def test_a_serial_environment_may_have_run_before():
    env = ENVS["serial"]()
    env.rollout(3)
    loss = tiny_loss(env, observation_key=[("agent", "x"), ("agent", "v")])
    trainer = make_trainer(env, loss, **STEPS)
    trainer.train()
    assert set(trainer.replay_buffer[:3]["agent", "v"].flatten().tolist()) == {0.0}
