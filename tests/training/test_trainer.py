"""What a training run does, in which order, and what leaves it as it was."""

from __future__ import annotations

import functools
import statistics
from unittest import mock

import pytest
import torch
from torchrl.envs import ExplorationType, StepCounter, TransformedEnv
from torchrl.envs.utils import exploration_type

from alm_torchrl import make_env
from tests.training.trainer_runs import (
    LIMIT,
    TOTAL,
    WARMUP,
    Capture,
    Counter,
    build,
    differing,
    tensors,
    tiny_loss,
)


def task_env(task):
    return make_env(task, action_bounds="rescale", max_episode_steps=20)


def run(task, hook=None, drawn_before=0, **options):
    """All that a training run on a Gymnasium task leaves behind."""
    env = task_env(task)
    loss = tiny_loss(env)
    torch.rand(drawn_before)
    trainer, buffer = build(env, loss, **options)
    if hook is not None:
        trainer.register_op("post_steps", hook)
    trainer.train()
    return tensors(
        {
            "loss": trainer.loss_module.state_dict(),
            "stepper": trainer.optimization_stepper.state_dict(),
            "replay": buffer[:].flatten_keys("/").to_dict(),
            "generator": torch.get_rng_state(),
        }
    )


@functools.cache
def plain_run(task):
    return run(task)


# -- what changes the training, and what does not --------------------------------------

TASKS = ["Pendulum-v1", "InvertedPendulum-v5"]


@pytest.mark.parametrize("task", TASKS)
def test_watching_a_run_leaves_it_bit_equal(task, tmp_path):
    seen, logger = [], Capture()
    watched = run(
        task,
        eval_env=task_env(task),
        eval_interval=6,
        eval_episodes=2,
        on_evaluation=seen.append,
        logger=logger,
        log_interval=1,
        checkpoint_dir=tmp_path / "saved",
        checkpoint_interval=3,
        progress_bar=True,
    )
    plain = plain_run(task)
    assert differing(watched, plain) == []
    assert plain["/replay/next/terminated"].any() == (task == TASKS[1])
    assert [row["training_step"] for row in seen] == [0, 6, 12]
    assert len(logger.values["loss_model"]) == TOTAL
    assert len(list((tmp_path / "saved").iterdir())) >= 2


def test_same_seed_gives_the_same_run_and_another_number_another():
    plain = plain_run(TASKS[0])
    assert differing(run(TASKS[0], drawn_before=7), plain) == []
    changed = differing(run(TASKS[0], hook=lambda: torch.rand(1)), plain)
    assert "/generator" in changed
    assert any(name.startswith("/stepper/optimizers") for name in changed)
    changed = differing(run(TASKS[0], seed=1), plain)
    assert "/replay/observation" in changed  # the seed of the environment
    assert "/replay/action" in changed  # and of the actions
    assert any(name.startswith("/loss/qvalue_params") for name in changed)


def test_memmap_replay_trains_the_same_and_lies_in_its_directory(tmp_path):
    assert differing(run(TASKS[0], memmap_dir=tmp_path), plain_run(TASKS[0])) == []
    assert any(tmp_path.rglob("*.memmap"))


# -- order and counts ------------------------------------------------------------------


def test_order_of_actions_updates_and_evaluations(monkeypatch):
    env, eval_env = Counter(), Counter()
    loss = tiny_loss(env)
    events: list = []
    make_policy = loss.acting_policy

    def spied_policy():
        policy = make_policy()

        def note(module, args):
            if exploration_type() is not ExplorationType.DETERMINISTIC:
                events.append(("act", round(loss.noise_schedule.std.item(), 4)))

        policy.register_forward_pre_hook(note)
        return policy

    monkeypatch.setattr(loss, "acting_policy", spied_policy)
    trainer, _ = build(
        env,
        loss,
        total_steps=5,
        warmup_steps=3,
        batch_size=3,
        eval_env=eval_env,
        eval_interval=2,
        on_evaluation=lambda row: events.append(("evaluate", row["training_step"])),
    )
    update = trainer.optimization_stepper.step
    env_step = env._step

    def spied_update(*args):
        events.append(("update", round(loss.noise_schedule.std.item(), 4)))
        return update(*args)

    def spied_env_step(tensordict):
        events.append("step")
        return env_step(tensordict)

    monkeypatch.setattr(trainer.optimization_stepper, "step", spied_update)
    monkeypatch.setattr(env, "_step", spied_env_step)
    events.clear()
    trainer.train()
    assert events == [
        *("step", "step", "step", ("evaluate", 0)),
        *(("act", 1.0), "step", ("update", 0.8)),
        *(("act", 0.8), "step", ("update", 0.6), ("evaluate", 2)),
        *(("act", 0.6), "step", ("update", 0.4)),
        *(("act", 0.4), "step", ("update", 0.2), ("evaluate", 4)),
        *(("act", 0.2), "step", ("update", 0.2), ("evaluate", 5)),
    ]
    assert trainer.optimization_stepper.optimizer_step_count == 5
    assert trainer._optim_count == 5
    assert trainer.collected_frames == len(env.history) == 8


def test_warm_up_actions_are_uniform_over_the_action_space():
    env = Counter()
    steps = 200
    build(env, tiny_loss(env), warmup_steps=steps, capacity=steps, total_steps=1)[
        0
    ].train()
    actions = torch.stack([step["action"] for step in env.history[:steps]])
    low, high = env.action_spec.space.low, env.action_spec.space.high
    share = ((actions - low) / (high - low)).sort(dim=0).values
    expected = (torch.arange(steps).unsqueeze(-1) + 0.5) / steps
    # Kolmogorov-Smirnov at 1 %.
    assert (share - expected).abs().max() < 1.63 / steps**0.5
    assert torch.corrcoef(actions.T)[0, 1].abs() < 0.1


def test_evaluations_score_the_agent_as_it_is():
    env, eval_env = Counter(), Counter()
    loss = tiny_loss(env)
    rows, states, ends = [], [], [0]

    def on_evaluation(row):
        rows.append(row)
        states.append(tensors(loss.state_dict()))
        ends.append(len(eval_env.history))

    trainer, _ = build(
        env,
        loss,
        eval_env=eval_env,
        eval_interval=10,
        eval_episodes=3,
        on_evaluation=on_evaluation,
    )
    start = tensors(loss.state_dict())
    trainer.train()
    assert [row["training_step"] for row in rows] == [0, 10, 12]
    assert [row["environment_step"] for row in rows] == [10, 20, 22]
    assert differing(states[0], start) == []
    assert differing(states[1], start) != []
    assert differing(states[2], tensors(loss.state_dict())) == []
    for row, begin, end in zip(rows, ends[:-1], ends[1:], strict=True):
        steps = eval_env.history[begin:end]
        returns = [0.0]
        for step in steps:
            returns[-1] += step["reward"].item()
            returns += [0.0] * step["done"].item()
        assert len(returns) == 3 + 1
        assert row["mean_length"] == pytest.approx(len(steps) / 3)
        assert row["mean_return"] == pytest.approx(statistics.mean(returns[:3]))
        assert row["std_return"] == pytest.approx(statistics.stdev(returns[:3]))
        assert {type(value) for value in row.values()} <= {int, float}


# -- replay ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limited_by", "capacity"), [("environment", 100), ("StepCounter", 16)]
)
def test_replay_holds_what_happened(limited_by, capacity):
    inner = Counter(truncates=limited_by == "environment")
    env = inner
    if limited_by == "StepCounter":
        env = TransformedEnv(inner, StepCounter(max_steps=LIMIT))
    trainer, buffer = build(env, tiny_loss(env), capacity=capacity, total_steps=22)
    batches = []
    update = trainer.optimization_stepper.step

    def spied(trainer, batch):
        batches.append(batch.clone())
        return update(trainer, batch)

    with mock.patch.object(trainer.optimization_stepper, "step", spied):
        trainer.train()
    steps = inner.history
    assert len(steps) == WARMUP + 22
    assert len(buffer) == min(capacity, len(steps))
    kept = {number % capacity: step for number, step in enumerate(steps)}
    assert len(kept) == len(buffer)
    assert any(step["terminated"] for step in kept.values())
    assert any(step["done"] and not step["terminated"] for step in kept.values())
    for row, step in kept.items():
        stored = buffer[row]
        assert torch.equal(stored["observation"], step["observation"])
        assert torch.equal(stored["action"], step["action"])
        assert torch.equal(stored["next", "observation"], step["next"])
        for name in ("reward", "terminated", "done"):
            assert torch.equal(stored["next", name], step[name])
    trajectories = buffer[:]["collector", "traj_ids"].flatten()
    episodes = buffer[:]["observation"][:, 0]
    same_episode = episodes[:, None] == episodes
    assert torch.equal(trajectories[:, None] == trajectories, same_episode)

    assert len(batches) == 22
    happened = {tuple(step["observation"].tolist()): step for step in steps}
    for batch in batches:
        slices, transitions = batch["slice"], batch["transition"]
        assert (slices.shape, transitions.shape) == ((4, 2), (4,))
        inside = slices["observation"][:, 1:], slices["next", "observation"][:, :-1]
        assert torch.equal(*inside)
        assert not slices["next", "done"][:, :-1].any()
        for transition in transitions:
            step = happened[tuple(transition["observation"].tolist())]
            assert torch.equal(transition["action"], step["action"])
            assert torch.equal(transition["next", "observation"], step["next"])
