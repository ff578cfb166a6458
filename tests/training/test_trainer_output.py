"""What a trainer writes and logs, and the errors that stop it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.envs import SerialEnv

from alm_torchrl import NonFiniteError
from tests.training.stepping import without_reading
from tests.training.trainer_runs import (
    TOTAL,
    WARMUP,
    Capture,
    Counter,
    build,
    counter_trainer,
    tiny_loss,
)

# -- a Trainer like any other ----------------------------------------------------------


def test_request_stop_ends_training_early(tmp_path):
    trainer = counter_trainer(checkpoint_dir=tmp_path)

    def stop():
        if trainer.optimization_stepper.optimizer_step_count == 3:
            trainer.request_stop("enough")

    trainer.register_op("post_steps", stop)
    trainer.train()
    assert trainer.collected_frames == WARMUP + 3
    newest = CheckpointRotation(tmp_path, keep_last=1).latest()
    assert Checkpoint.manifest(newest)["metadata"]["optim_steps"] == 3


def test_checkpoints_are_saved_at_intervals_and_the_latest_kept(tmp_path):
    options = {"checkpoint_dir": tmp_path, "keep_checkpoints": 2}
    counter_trainer(checkpoint_interval=5, **options).train()
    saved = [path for path in tmp_path.iterdir() if Checkpoint.is_checkpoint(path)]
    metadata = [Checkpoint.manifest(path)["metadata"] for path in saved]
    counts = sorted((m["collected_frames"], m["optim_steps"]) for m in metadata)
    # At each multiple of 5 environment steps, and at the end.
    assert counts == [(20, 10), (22, 12)]
    # A complete run does not go on.
    other = counter_trainer(**options)
    other.load_from_file(CheckpointRotation(tmp_path, keep_last=2).latest())
    other.train()
    assert other.collected_frames == WARMUP + TOTAL


# -- logging ---------------------------------------------------------------------------


def test_logged_values_and_steps():
    logger, rows = Capture(), []
    trainer = counter_trainer(
        logger=logger,
        log_interval=4,
        warmup_steps=8,
        total_steps=13,
        eval_env=Counter(),
        eval_interval=5,
        eval_episodes=1,
        on_evaluation=rows.append,
    )
    update = trainer.optimization_stepper.step
    outputs = {}

    def spied(*args):
        metrics = update(*args)
        outputs[trainer.collected_frames] = metrics.clone()
        return metrics

    with mock.patch.object(trainer.optimization_stepper, "step", spied):
        trainer.train()
    assert sorted(outputs) == list(range(9, 22))
    names = set(outputs[9].keys())
    assert {"loss_model", "grad_norm_actor", "kl", "td_error"} < names
    for name in names:
        expected = [(at, outputs[at][name].item()) for at in (9, 13, 17, 21)]
        assert logger.values[name] == expected
    updates = [(8, 0.0), (12, 4.0), (16, 8.0), (20, 12.0)]
    assert logger.values["optim_steps"] == updates
    for name in ("return", "length"):
        steps = [8, 13, 18, 21]
        expected = [row[f"mean_{name}"] for row in rows]
        logged = logger.values[f"eval/{name}"]
        assert logged == list(zip(steps, expected, strict=True))


def test_returns_of_training_episodes_are_logged():
    env, logger = Counter(), Capture()
    build(env, tiny_loss(env), logger=logger, log_interval=1)[0].train()
    total, length, returns, lengths = 0.0, 0, [], []
    for number, step in enumerate(env.history, 1):
        total += step["reward"].item()
        length += 1
        if step["done"]:
            returns.append((number, pytest.approx(total)))
            lengths.append((number, float(length)))
            total, length = 0.0, 0
    assert len(returns) >= 5
    assert logger.values["train/return"] == returns
    assert logger.values["train/length"] == lengths


# -- errors ----------------------------------------------------------------------------


def test_nonfinite_parameters_stop_the_training_with_term_and_update():
    trainer = counter_trainer()
    loss = trainer.loss_module

    def poison():
        if trainer.optimization_stepper.optimizer_step_count == 3:
            next(loss.reward_params.parameters()).data.fill_(torch.nan)

    trainer.register_op("post_optim", poison)
    with pytest.raises(NonFiniteError, match=r"loss_model.*update 4") as caught:
        trainer.train()
    assert (caught.value.term, caught.value.step) == ("loss_model", 4)
    assert trainer.collected_frames == WARMUP + 4


@pytest.mark.parametrize(("entry", "at"), [("observation", 5), ("reward", WARMUP + 5)])
def test_nonfinite_data_stops_the_training_before_it_is_stored(
    entry, at, monkeypatch, tmp_path
):
    env = Counter()
    trainer, buffer = build(
        env, tiny_loss(env), checkpoint_dir=tmp_path, checkpoint_interval=4
    )
    step = env._step

    def broken(tensordict):
        result = step(tensordict)
        if len(env.history) == at:
            result[entry] = torch.full_like(result[entry], torch.inf)
        return result

    monkeypatch.setattr(env, "_step", broken)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    newest = CheckpointRotation(tmp_path, keep_last=1).latest()
    assert newest.name.endswith(f"{(at - 1) // 4 * 4:012d}")
    assert str(caught.value).startswith(
        f"next/{entry} was not finite in environment step {at}; no parameter"
    )
    assert str(caught.value).endswith(f"Last good checkpoint: {newest}.")
    assert len(buffer) == at - 1
    assert trainer.optimization_stepper.optimizer_step_count == max(at - WARMUP - 1, 0)


def test_nothing_is_saved_after_an_update_that_failed(tmp_path, monkeypatch):
    """As on a GPU, where the update itself does not raise."""
    trainer = counter_trainer(
        checkpoint_dir=tmp_path,
        checkpoint_interval=4,
        eval_env=Counter(),
        eval_interval=2,
        eval_episodes=1,
    )
    stepper = trainer.optimization_stepper
    step = stepper.step

    def step_without_reading(*args):
        if stepper.optimizer_step_count == 3:
            next(trainer.loss_module.reward_params.parameters()).data.fill_(torch.nan)
        with without_reading(stepper):
            return step(*args)

    monkeypatch.setattr(stepper, "step", step_without_reading)
    with pytest.raises(NonFiniteError, match=r"update 4.*Last good .*-000000000012"):
        trainer.train()
    frames = {path.name: Checkpoint.manifest(path) for path in tmp_path.iterdir()}
    assert max(m["metadata"].get("optim_steps", 0) for m in frames.values()) <= 3


def test_environments_that_cannot_be_used_are_refused():
    env = Counter()
    loss = tiny_loss(env)
    with pytest.raises(ValueError, match="eval_env must be another environment"):
        build(env, loss, eval_env=env)
    nested = SerialEnv(2, lambda: SerialEnv(3, Counter))
    with pytest.raises(ValueError, match=r"^eval_env .*at most one batch.*\[2, 3\]"):
        build(env, loss, eval_env=nested)
    with pytest.raises(ValueError, match=r"^env must have at most one batch.*\[2, 3\]"):
        build(nested, loss)
