"""Training runs in processes of their own that can be stopped, killed and continued."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import torch

from alm_torchrl import make_env, make_trainer
from alm_torchrl.objectives import Consistency, RewardScale, TDTarget
from alm_torchrl.runs.loading import usable_checkpoints
from alm_torchrl.training.episode import CollectorState
from tests.training.trainer_runs import tensors, tiny_loss

WARMUP, HALF, TOTAL = 10, 26, 50  # environment steps
LIMIT, CAPACITY = 9, 36


class LineLogger:
    """Appends each logged value to a file at once."""

    def __init__(self, path):
        self.path = path

    def log_scalar(self, name, value, step=None):
        with self.path.open("a") as file:
            file.write(json.dumps([step, name, float(value)]) + "\n")


def logged(path, until=TOTAL):
    """The values of a log, each at its last writing, up to an environment step."""
    values = {}
    for line in path.read_text().splitlines():
        step, name, value = json.loads(line)
        if step <= until:
            values[step, name] = repr(value)
    return values


def parts_of_plus():
    """The parts that carry state of their own, or change what a batch holds."""
    return {
        "normalize": True,
        "latent": "layernorm",
        "kl_coef": 0.0,
        "model_terms": [Consistency()],
        "critic_target": TDTarget(n_step=3, pessimism=0.5),
        "reward_transform": RewardScale("rewards"),
    }


PLUS = {
    **{"short_slices": True, "recency_decay": 0.9},
    **{"weight_decay": 0.1, "lr_final": 1e-5, "lr_steps": 30},
}


def make_run(folder, task, *, parts=None, **options):
    """A trainer on a task with short episodes, at the newest checkpoint if any."""
    env, eval_env = (
        make_env(task, action_bounds="rescale", max_episode_steps=LIMIT) for _ in "ab"
    )
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    logger = LineLogger(folder / "log.txt")
    arguments = {
        "total_steps": TOTAL - WARMUP,
        "warmup_steps": WARMUP,
        "batch_size": 4,
        "capacity": CAPACITY,
        "eval_env": eval_env,
        "eval_interval": 10,
        "eval_episodes": 1,
        "on_evaluation": lambda row: logger.log_scalar(
            "row", row["mean_return"], row["environment_step"]
        ),
        "logger": logger,
        "log_interval": 1,
        "checkpoint_dir": folder / "checkpoints",
        "checkpoint_interval": 1000,
    }
    loss = tiny_loss(env, **(parts() if parts else {}))
    trainer = make_trainer(env, loss, **{**arguments, **options})
    newest = next(usable_checkpoints(folder / "checkpoints"), None)
    if newest is not None:
        trainer.load_from_file(newest)
    return trainer


def final_state(trainer):
    """All that a run is at its end, as tensors by name."""
    buffer = trainer.replay_buffer
    return tensors(
        {
            "loss": trainer.loss_module.state_dict(),
            "stepper": trainer.optimization_stepper.state_dict(),
            "replay": buffer[:].flatten_keys("/").to_dict(),
            "sampler": buffer.sampler.state_dict(),
            "writer": buffer.writer.state_dict(),
            "generator": torch.get_rng_state(),
            "environment": CollectorState(trainer.collector).state_dict(),
            "modules": {
                name: module.state_dict()
                for name, module in trainer._modules.items()
                if name != "optimization_stepper"
            },
            "counts": [trainer.collected_frames, trainer._optim_count],
        }
    )


def keep_final_state(trainer, folder):
    """Has the trainer leave its state in ``final.pt`` before it shuts down."""
    trainer.register_op(
        "shutdown", lambda: torch.save(final_state(trainer), Path(folder) / "final.pt")
    )


def train(folder, task, stop=None, **options):
    """Trains until the end, or the first step from ``stop`` on that ends no episode.

    Leaves its state in ``final.pt``.
    """
    trainer = make_run(folder, task, **options)
    if trainer.collected_frames == TOTAL:
        # Killed after its last checkpoint.
        torch.save(final_state(trainer), Path(folder) / "final.pt")

    def check():
        frames = trainer.collected_frames
        if stop is not None and frames >= stop:
            newest = trainer.replay_buffer[(frames - 1) % CAPACITY]
            if not newest["next", "done"]:
                trainer.request_stop()

    # Evaluations and checkpoints come after this hook.
    trainer.register_op("post_steps", check)
    keep_final_state(trainer, folder)
    trainer.train()


def in_process(function, *args, **kwargs):
    """Starts a function in a process of its own."""
    process = multiprocessing.get_context("fork").Process(
        target=_quietly, args=(function, args, kwargs)
    )
    process.start()
    return process


def finish(function, *args, **kwargs):
    """Runs a function in a process of its own to its end."""
    process = in_process(function, *args, **kwargs)
    process.join()
    assert process.exitcode == 0


def kill_at(call, function, *args, **kwargs):
    """Calls ``function``; kills its process before the ``call``-th flush to disk."""
    from alm_torchrl.training import checkpoint

    flush, count = checkpoint.flush_to_disk, [0]

    def counting(path):
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)

    checkpoint.flush_to_disk = counting
    function(*args, **kwargs)


def final(folder):
    return torch.load(Path(folder) / "final.pt")


def _quietly(function, args, kwargs):
    torch.set_num_threads(1)
    function(*args, **kwargs)
