"""The hooks of a trainer, each by itself."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict

from alm_torchrl.training.hooks import (
    EpisodeLog,
    EvaluationHook,
    NonFiniteCheck,
    ProgressBar,
)
from alm_torchrl.training.pace import Pace


class FakeTrainer:
    """What the hooks read of a trainer; keeps what they register."""

    logger = None
    pace = Pace(warmup_steps=10)

    def __init__(self, total_frames=0):
        self.collected_frames = 0
        self.total_frames = total_frames
        self.ops: dict[str, list] = {}
        self.modules: dict = {}

    @property
    def training_steps(self):
        return self.pace.updates(self.collected_frames)

    def register_op(self, stage, op):
        self.ops.setdefault(stage, []).append(op)

    def register_module(self, name, module):
        self.modules[name] = module

    def setup(self):
        for op in self.ops["setup"]:
            op()

    def step(self, *args):
        """One environment step: every hook is called as at its stage."""
        self.collected_frames += 1
        results = []
        for stage, ops in self.ops.items():
            if stage not in ("setup", "shutdown"):
                arguments = args if stage.endswith("_log") else ()
                results += [op(*arguments) for op in ops]
        return results

    def shutdown(self):
        for op in self.ops["shutdown"]:
            op()


def test_evaluation_seeds_differ_by_step_and_run_and_can_be_repeated(monkeypatch):
    seeds: list[int] = []

    def evaluate(env, policy, *, episodes, seed, should_stop):
        seeds.append(seed)
        scores = {"return": torch.ones(episodes), "length": torch.ones(episodes)}
        return TensorDict(scores, batch_size=[episodes])

    monkeypatch.setattr("alm_torchrl.training.hooks.evaluate_policy", evaluate)
    found = []
    for seed in (0, 0, 1, 2, 2**40):
        seeds.clear()
        trainer = FakeTrainer(60)
        hook = EvaluationHook(None, None, interval=1, seed=seed)
        hook.register(trainer)
        for _ in range(60):
            trainer.step(None)
        found.append(set(seeds))
        assert len(set(seeds)) == len(seeds) == 51
        assert all(0 <= number < 2**32 for number in seeds)
    assert found[0] == found[1]
    assert not found[1] & found[2]
    assert not (found[1] | found[2]) & found[3]


# -- EpisodeLog ------------------------------------------------------------------------


def episode_step(trajectory, reward, *, terminated=False):
    flags = {"terminated": terminated, "truncated": False}
    following = {key: torch.tensor([[flag]]) for key, flag in flags.items()}
    following["gain"] = torch.tensor([[reward]])
    ids = {"traj_ids": torch.tensor([trajectory])}
    return TensorDict({"next": following, "collector": ids}, batch_size=[1])


def test_episode_log_continues_a_saved_episode_and_drops_one_that_was_lost():
    keys = SimpleNamespace(
        reward_key="gain", done_keys=["terminated", "truncated"], batch_size=()
    )
    first, trainer = EpisodeLog(keys), FakeTrainer()
    first.register(trainer)
    trainer.step(episode_step(4, 1.0))
    assert trainer.modules == {"episode_log": first}
    for trajectory, total, length in ((4, 3.0, 2.0), (5, 2.0, 1.0)):
        log, trainer = EpisodeLog(keys), FakeTrainer()
        log.register(trainer)
        log.load_state_dict(first.state_dict())
        (result,) = trainer.step(episode_step(trajectory, 2.0, terminated=True))
        assert result == {"train/return": total, "train/length": length}


# -- NonFiniteCheck --------------------------------------------------------------------


class FakeStepper:
    """Fails in update ``fails_at``, which is told when it is asked for."""

    def __init__(self, fails_at=math.inf):
        self.optimizer_step_count = 0
        self.fails_at = fails_at
        self.asked: list[int] = []

    def raise_if_nonfinite(self):
        self.asked.append(self.optimizer_step_count)
        if self.optimizer_step_count >= self.fails_at:
            raise FloatingPointError


def checked_run(stepper, interval=4):
    trainer = FakeTrainer()
    NonFiniteCheck(stepper, interval).register(trainer)
    for _ in range(10):
        stepper.optimizer_step_count += 1
        trainer.step()
    trainer.shutdown()


def test_deferred_check_asks_at_intervals_and_at_the_end():
    stepper = FakeStepper()
    checked_run(stepper)
    assert stepper.asked == [4, 8, 10]


@pytest.mark.parametrize(("fails_at", "told_at"), [(4, 4), (5, 8), (9, 10), (10, 10)])
def test_deferred_check_lets_the_error_out(fails_at, told_at):
    stepper = FakeStepper(fails_at)
    with pytest.raises(FloatingPointError):
        checked_run(stepper)
    assert stepper.asked[-1] == told_at


# -- ProgressBar -----------------------------------------------------------------------


def test_progress_bar_writes_to_stderr_and_closes(capsys):
    trainer = FakeTrainer(40)
    bar = ProgressBar()
    bar.register(trainer)
    trainer.collected_frames = 10  # of a run that continues
    trainer.setup()
    for _ in range(20):
        trainer.step()
    bar.show_return(-12.34)
    trainer.shutdown()
    trainer.shutdown()  # a bar that is closed can be closed again
    written = capsys.readouterr()
    assert written.out == ""
    last = written.err.rstrip().split("\r")[-1]
    assert "30/40" in last
    assert "step/s" in last
    assert "return=-12.3" in last
    assert written.err.endswith("\n")
    assert bar._bar.disable  # tqdm's mark of a closed bar


def test_progress_bar_without_tqdm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"progress_bar=True.*tqdm.*\[cli\]"):
        ProgressBar()
