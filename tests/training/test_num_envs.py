"""Training in several environments at once."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase, ParallelEnv, SerialEnv

from alm_torchrl import make_env, make_trainer
from alm_torchrl.objectives import RewardScale
from alm_torchrl.training.pace import Pace
from tests.training.resume_runs import final_state
from tests.training.trainer_runs import differing, tiny_loss

STEPS = {"warmup_steps": 24, "batch_size": 8, "total_steps": 30}
LIMIT = 7


class Batched(EnvBase):
    """E walks in one tensor, whose observations say the walk, its episode and step."""

    def __init__(self, count=4):
        super().__init__(batch_size=[count])
        self.observation_spec = Composite(
            observation=Unbounded((count, 3)), shape=[count]
        )
        self.action_spec = Bounded(-1, 1, (count, 1))
        self.reward_spec = Unbounded((count, 1))
        self.state = torch.stack((torch.arange(count), *[-torch.ones(count)] * 2), 1)

    def _reset(self, tensordict=None):
        where = torch.ones(self.batch_size, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict:
            where = tensordict["_reset"].flatten()
        self.state[where, 1] += 1
        self.state[where, 2] = 0
        return TensorDict({"observation": self.state.clone()}, self.batch_size)

    def _step(self, tensordict):
        self.state[:, 2] += 1
        done = self.state[:, 2:] >= 5 + self.state[:, :1]
        return TensorDict(
            {
                "observation": self.state.clone(),
                "reward": self.state[:, :1] + 1,
                "terminated": done,
                "done": done,
            },
            self.batch_size,
        )

    def _set_seed(self, seed):
        pass


def worker(task="Pendulum-v1"):
    bounds = "rescale" if task == "Pendulum-v1" else "clamp"
    return make_env(task, action_bounds=bounds, max_episode_steps=LIMIT)


class Log:
    """Keeps what is logged, by name."""

    exp_name = "log"

    def __init__(self):
        self.found = {}

    def log_scalar(self, name, value, step=None):
        self.found.setdefault(name, []).append((step, value))


@pytest.mark.parametrize(
    ("count", "rate", "warmup", "expected"),
    [
        (1, 1.0, 24, [24, 25, 54]),
        (4, 1.0, 24, [24, 28, 56]),
        (16, 0.25, 24, [32, 48, 160]),
        (3, 1 / 3, 20, [21, 24, 111]),
        (4, 3.0, 24, [24, 28, 36]),
    ],
)
def test_pace(count, rate, warmup, expected):
    pace = Pace(warmup, count, rate)
    start, first, end = expected
    assert pace.warmup_steps == start
    assert pace.environment_steps(30) == end
    assert pace.updates(start) == 0
    assert pace.updates(end) >= 30 > pace.updates(end - count)
    assert pace.updates(first) == pytest.approx(count * rate)
    for name, value in (("num_envs", 0), ("updates_per_step", 0.0)):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            Pace(**{"warmup_steps": 9, name: value})


@pytest.mark.parametrize(("rate", "end"), [(1.0, 56), (0.25, 144), (0.1, 324), (3, 36)])
def test_a_natively_batched_environment_trains(rate, end):
    env, rows, log = Batched(), [], Log()
    loss = tiny_loss(env)
    trainer = make_trainer(
        env,
        loss,
        updates_per_step=rate,
        eval_env=worker("Pendulum-v1"),
        eval_interval=10,
        eval_episodes=1,
        on_evaluation=rows.append,
        logger=log,
        log_interval=4,
        **STEPS,
    )
    trainer.train()
    assert trainer.collected_frames == end == len(trainer.replay_buffer)
    assert trainer.optimization_stepper.optimizer_step_count == 30
    assert trainer._optim_count == 30
    assert int(loss.noise_schedule.count) == 30
    steps = [row["training_step"] for row in rows]
    # At the first turn of the environments that reaches a multiple of the interval.
    assert [step // 10 for step in steps] == [0, 1, 2, 3]
    assert all(row["environment_step"] % 4 == 0 for row in rows)
    sample = trainer.replay_buffer.sample(500)["slice"]
    assert (sample["observation"][..., :2].diff(dim=1) == 0).all()
    assert (sample["observation"][..., 2].diff(dim=1) == 1).all()
    # The walks end after 5, 6, 7 and 8 steps, with rewards of 1, 2, 3 and 4.
    first = [value for step, value in log.found["train/return"] if step < 40]
    assert first[:4] == [5.0, 12.0, 21.0, 32.0]


def test_serial_environments_resume_bit_by_bit(tmp_path):
    check_resume(tmp_path, "Hopper-v5")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["HalfCheetah-v5", "Ant-v5", "Walker2d-v5"])
def test_serial_mujoco_environments_resume_bit_by_bit(tmp_path, task):
    check_resume(tmp_path, task)


def check_resume(folder, task):
    def make(name):
        env = SerialEnv(3, [lambda: worker(task)] * 3)
        torch.manual_seed(0)
        loss = tiny_loss(worker(task), reward_transform=RewardScale(num_envs=3))
        return make_trainer(
            env,
            loss,
            checkpoint_dir=folder / name,
            checkpoint_interval=1000,
            log_interval=1,
            **STEPS,
        )

    states = {}
    for name in ("whole", "parts"):
        trainer = make(name)
        if name == "parts":
            trainer.register_op(
                "post_steps",
                lambda trainer=trainer: (
                    trainer.collected_frames >= 39 and trainer.request_stop()
                ),
            )
            trainer.train()
            assert trainer.collected_frames == 39
            torch.manual_seed(5)
            trainer = make(name)
            trainer.load_from_file(trainer.checkpoint_rotation.latest())
        keep = partial(lambda at, of: states.update({at: final_state(of)}), name)
        trainer.register_op("shutdown", partial(keep, trainer))
        trainer.train()
        assert trainer.collected_frames == 54
    assert differing(states["whole"], states["parts"]) == []


@pytest.mark.filterwarnings("ignore:the actions of:UserWarning")
@pytest.mark.parametrize(
    "parallel", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_others_resume_with_fresh_episodes_and_say_so(tmp_path, parallel):
    def make():
        env = ParallelEnv(2, worker) if parallel else Batched()
        loss = tiny_loss(worker() if parallel else env)
        return make_trainer(env, loss, checkpoint_dir=tmp_path, **STEPS)

    trainer = make()
    trainer.register_op(
        "post_steps", lambda: trainer.collected_frames >= 40 and trainer.request_stop()
    )
    trainer.train()
    before = trainer.replay_buffer[:]["collector", "traj_ids"]
    other = make()
    with pytest.warns(UserWarning, match="a fresh episode, since a .*Env|Batched"):
        other.load_from_file(other.checkpoint_rotation.latest())
    other.train()
    after = other.replay_buffer[:]["collector", "traj_ids"][len(before) :]
    assert not set(before.tolist()) & set(after.tolist())


def test_a_reward_scale_follows_the_episodes_of_each_environment():
    reward, done = torch.randn(40, 3), torch.rand(40, 3) < 0.2
    scale = RewardScale(gamma=0.9, num_envs=3)
    for chunk in (slice(0, 1), slice(1, 9), slice(9, 40)):
        scale.observe(reward[chunk], done[chunk])
    returns = torch.zeros(40, 3, dtype=torch.float64)
    for env in range(3):
        now = 0.0
        for step in range(40):
            now = 0.9 * now + reward[step, env].item()
            returns[step, env] = now
            now = 0.0 if done[step, env] else now
    largest = returns.abs().max() / 5
    expected = torch.maximum(returns.std(correction=0), largest)
    torch.testing.assert_close(scale.scale, expected.float())
    env = Batched()
    with pytest.raises(ValueError, match=r"^loss: expected RewardScale\(num_envs=4\)"):
        make_trainer(env, tiny_loss(env, reward_transform=scale), **STEPS)
