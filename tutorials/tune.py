"""Tune three settings with Ray Tune: ASHA stops poor runs early, Optuna proposes.

**What you will learn**

- to call `train` from another thread, as Ray Tune does, to receive its evaluations and
  to stop it;
- to search over settings with Optuna and to end poor runs early with ASHA;
- what a search does not tell: how much of the difference is luck of the seed.

You need to know the settings of a run (`alm-torchrl train --help`).

Run it as `python tutorials/tune.py`: under a minute on two processor cores. It needs
more packages: `pip install 'alm_torchrl[cli,tune]'`. The runs go to
`runs/tutorial-tune`, or to the folder in `ALM_OUTPUT`; those of an earlier start of
this script are removed. `ALM_SMOKE=1` makes everything small for a quick check.
"""

# %%
from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from alm_torchrl.runs.curves import plot_runs
from alm_torchrl.runs.folder import read_run
from alm_torchrl.runs.settings import preset_config
from alm_torchrl.runs.train import train

SMOKE = os.environ.get("ALM_SMOKE") == "1"
OUTPUT = Path(os.environ.get("ALM_OUTPUT", "runs/tutorial-tune")).resolve()
shutil.rmtree(OUTPUT, ignore_errors=True)
TRIALS = 3 if SMOKE else 6
STEPS = 8 if SMOKE else 200
EVALUATIONS = 4

# %% [markdown]
# ## A run that reports
# Ray Tune calls this function in a thread of a process of its own. `on_evaluation`
# receives each row of `metrics.csv`, and passes it on. ASHA ends a trial inside of
# `tune.report`.


# %%
def trial(settings: dict[str, Any]) -> None:
    """Trains with some settings, and reports each evaluation."""
    config = preset_config(
        "quick",
        task="Pendulum-v1",
        action_bounds="rescale",
        max_episode_steps=50,
        total_steps=STEPS,
        warmup_steps=60,
        batch_size=32,
        hidden_dim=32,
        model_hidden_dim=32,
        latent_dim=8,
        eval_interval=STEPS // EVALUATIONS,
        eval_episodes=2,
        checkpoint_interval=STEPS,
        device="cpu",
        logger="none",
        compile="off",
        **settings,
    )
    folder = OUTPUT / "runs" / config.run_name

    def report(row: dict[str, Any]) -> None:
        tune.report({**row, "folder": str(folder)})

    train(replace(config, run_dir=folder), on_evaluation=report)


# %% [markdown]
# ## The search
# Three settings: the learning rate, the steps of the imagined rollouts, and the weight
# of the classifier's log ratio. After the warm-up, each evaluation is a chance for ASHA
# to end a trial that is worse than half of the others at the same step.

# %%
SPACE = {
    "lr": tune.loguniform(1e-4, 1e-2),
    "horizon": tune.choice([1, 3, 5]),
    "classifier_coef": tune.uniform(0.0, 0.3),
}
SCHEDULER = ASHAScheduler(
    time_attr="training_step",
    max_t=STEPS,
    grace_period=STEPS // EVALUATIONS,
    reduction_factor=2,
)


def search() -> tune.ResultGrid:
    """Runs the trials, two at once."""
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space=SPACE,
        tune_config=tune.TuneConfig(
            metric="mean_return",
            mode="max",
            search_alg=OptunaSearch(seed=0),
            scheduler=SCHEDULER,
            num_samples=TRIALS,
            max_concurrent_trials=2,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(OUTPUT / "tune"), verbose=0
        ),
    )
    return tuner.fit()


# %% [markdown]
# ## What came out
# Each trial left a run folder as `alm-torchrl train` does: `alm-torchrl plot` draws it,
# `alm-torchrl evaluate` scores it, and `alm-torchrl train --resume` continues one that
# was stopped.

# %%
if __name__ == "__main__":
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    results = search()
    ray.shutdown()
    assert results.num_errors == 0
    for result in results:
        row, chosen = result.metrics, result.config
        print(
            f"lr {chosen['lr']:.5f}  horizon {chosen['horizon']}  "
            f"classifier_coef {chosen['classifier_coef']:.2f}: "
            f"return {row['mean_return']:7.1f} after {row['training_step']} steps"
        )
    steps = [result.metrics["training_step"] for result in results]
    assert len(steps) == TRIALS
    assert max(steps) == STEPS
    best = results.get_best_result()
    run = read_run(Path(best.metrics["folder"]))
    assert run.metrics[-1]["mean_return"] == best.metrics["mean_return"]
    print(f"Best: {best.config}, in {run.path}")
    runs = [read_run(Path(result.metrics["folder"])) for result in results]
    print(plot_runs(runs, OUTPUT / "trials.png"))

# %% [markdown]
# ## Conclusion
# Any tuner that calls a function can tune: `train` needs no main thread, gives each
# evaluation to `on_evaluation`, and `stop.set()` from another thread ends it, saved.
# The best of a few trials is partly luck. Compare what was found with the default over
# several seeds before believing it: `alm-torchrl sweep Pendulum-v1 --seeds 5 --set
# lr=1e-3,...` gives the table with intervals.
