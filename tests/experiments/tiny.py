"""Settings of runs of seconds, on engines."""

from __future__ import annotations

from alm_torchrl.experiments.worker import where_it_runs
from alm_torchrl.runs.settings import preset_config
from tests.runs.small_runs import steps_saved

TINY = {
    **{"task": "Pendulum-v1", "action_bounds": "rescale", "max_episode_steps": 20},
    **{"device": "cpu", "threads": 1, "logger": "none", "compile": "off"},
    **{"warmup_steps": 20, "batch_size": 4, "latent_dim": 4, "hidden_dim": 8},
    **{"model_hidden_dim": 8, "eval_episodes": 1, "eval_interval": 50},
    **{"checkpoint_interval": 20, "total_steps": 100},
}


def tiny(folder, seed, **changes):
    config = preset_config("quick", **{**TINY, "seed": seed, **changes})
    return preset_config(
        "quick",
        **{**TINY, "seed": seed, **changes, "run_dir": folder / config.run_name},
    )


def worker_that_has_saved(config, until):
    """Process of a run in mid-training, or None before it has saved."""
    where, saved = where_it_runs(config.run_path), steps_saved(config.run_path)
    inside = saved and saved[-1] < until
    return int(where.rpartition(":")[2]) if where and inside else None
