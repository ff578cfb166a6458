"""Settings, presets, run folders and learning curves, without training."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from alm_torchrl.runs.curves import curves_of, plot_runs
from alm_torchrl.runs.folder import (
    METRICS_FIELDS,
    PACKAGES,
    MetricsWriter,
    Run,
    create_run,
    harmful_differences,
    lock_run,
    read_metrics,
    read_run,
    refuse_other_files,
)
from alm_torchrl.runs.settings import PRESETS, TrainConfig, preset_config


def test_paper_preset_is_table_3():
    config = preset_config("paper", task="Hopper-v5")
    table = {
        "latent_dim": 50,
        "hidden_dim": 512,
        "model_hidden_dim": 1024,
        "batch_size": 512,
        "horizon": 3,
        "gamma": 0.99,
        "lmbda": 0.95,
        "classifier_coef": 0.1,
        "lr": 1e-4,
        "clip_norm": 100.0,
        "tau": 0.005,
        "warmup_steps": 5000,
        "noise_initial": 1.0,
        "noise_final": 0.1,
        "noise_steps": 100_000,
        "noise_clip": 0.3,
        "total_steps": 300_000,
        "eval_interval": 5000,
        "eval_episodes": 5,
        "discount_model_loss": False,
        "action_bounds": "clamp",
    }
    assert {name: getattr(config, name) for name in table} == table
    assert config.changes == {}


def test_quick_preset_needs_no_task_and_paper_does():
    assert preset_config("quick").task == "HalfCheetah-v5"
    assert preset_config("quick").changes == {}
    with pytest.raises(ValueError, match="'paper' names none"):
        preset_config("paper")
    with pytest.raises(ValueError, match="expected one of"):
        preset_config("fast")


@pytest.mark.parametrize(
    ("task", "capacity"),
    [
        ("Humanoid-v5", 1_000_000),
        ("Humanoid-v2", 1_000_000),
        ("T-Humanoid-v5", 100_000),
        ("HumanoidStandup-v5", 100_000),
        ("HalfCheetah-v5", 100_000),
    ],
)
def test_capacity_follows_the_task(task, capacity):
    assert preset_config("paper", task=task).replay_capacity == capacity
    assert preset_config("paper", task=task, capacity=7777).replay_capacity == 7777


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.0),
        ("lr", float("nan")),
        ("gamma", 1.5),
        ("horizon", 0),
        ("seed", -1),
        ("eval_episodes", 0),
        ("tau", 0.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got {value}\\.$"):
        preset_config("quick", **{name: value})


def test_every_number_has_a_range():
    config = preset_config("quick")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            with pytest.raises(ValueError, match=f"^{field.name}:"):
                preset_config("quick", **{field.name: -1})


def test_run_name_counts_only_what_can_change_a_result():
    base = preset_config("quick")
    assert base.run_name == "HalfCheetah-v5-alm-quick-s0"
    elsewhere = preset_config("quick", device="cpu", threads=1, logger="none")
    assert elsewhere.run_name == base.run_name
    changed = preset_config("quick", lr=3e-4, seed=2)
    assert re.fullmatch(r"HalfCheetah-v5-alm-quick-s2-[0-9a-f]{8}", changed.run_name)
    same = preset_config("quick", lr=3e-4, seed=3, run_dir=Path("x"))
    assert same.run_name[-8:] == changed.run_name[-8:]
    assert preset_config("quick", lr=2e-4).run_name[-8:] != changed.run_name[-8:]
    assert preset_config("quick", task="pkg:some/Task-v0").run_name.startswith(
        "pkg-some-Task-v0-alm-"
    )
    assert base.run_path == Path("runs") / base.run_name
    assert same.run_path == Path("x")


def test_settings_survive_json():
    for preset in PRESETS:
        config = preset_config(preset, task="Hopper-v5", run_dir=Path("a b"))
        text = json.dumps(config.to_dict())
        assert TrainConfig.from_dict(json.loads(text)) == config
    with pytest.raises(ValueError, match=r"got also \['speed'\]"):
        TrainConfig.from_dict({**config.to_dict(), "speed": 1})


def _row(seed=0, step=0, mean_return=0.0):
    return {
        "seed": seed,
        "training_step": step,
        "environment_step": step + 2000,
        "mean_return": mean_return,
        "mean_length": 1000.0,
        "wall_time": 1.5,
        "task": "HalfCheetah-v5",
    }


def test_run_folder_holds_what_is_documented(tmp_path):
    config = preset_config("quick", run_dir=tmp_path / "a run")
    path = config.run_path
    with lock_run(path):
        create_run(config, "cpu")
        message = "another process trains in it"
        with pytest.raises(BlockingIOError, match=message), lock_run(path):
            pass
    record = json.loads((path / "config.json").read_text())
    assert set(record) == {
        "settings",
        "agent",
        "versions",
        "commit",
        "hardware",
        "started",
        "continued",
    }
    assert record["settings"] == config.to_dict()
    assert set(record["versions"]) == {"python", *PACKAGES}
    assert record["versions"]["torchrl"].count(".") >= 1
    assert record["hardware"]["cpu"]
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["device"] == "cpu"
    with pytest.raises(FileNotFoundError, match=r"has no metrics\.csv"):
        read_run(path)


def test_a_lock_leaves_no_folder_of_its_own(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new/deep"):
        with pytest.raises(RuntimeError), lock_run(tmp_path / name):
            raise RuntimeError
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]
    with lock_run(tmp_path / "new/deep"):
        (tmp_path / "new/deep/config.json").write_text("{}")
    assert (tmp_path / "new/deep/config.json").exists()
    with lock_run(tmp_path / "new/other"):
        pass
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["deep"]


@pytest.mark.parametrize("name", ["metrics.csv", "checkpoints"])
def test_a_folder_with_files_of_another_kind_is_refused(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match="--run-dir"):
        refuse_other_files(tmp_path)


def test_only_settings_that_leave_the_training_alone_may_change(tmp_path):
    config = preset_config("quick", run_dir=tmp_path)
    for name, value in {"total_steps": 9999, "logger": "none", "threads": 2}.items():
        changed = dataclasses.replace(config, **{name: value})
        assert harmful_differences(config.to_dict(), changed) == {}
    changed = dataclasses.replace(config, lr=0.5, total_steps=9999, horizon=2)
    assert harmful_differences(config.to_dict(), changed) == {
        "lr": (config.lr, 0.5),
        "horizon": (3, 2),
    }
    older = {k: v for k, v in config.to_dict().items() if k != "lr"}
    # As if it had been left at its default, which is not that of the preset.
    assert harmful_differences(older, config) == {"lr": (1e-4, config.lr)}


def test_metrics_are_on_disk_at_once_and_read_back_equal(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [_row(step=0, mean_return=-0.1), _row(step=1000, mean_return=1 / 3)]
    with MetricsWriter(path) as writer:
        for count, row in enumerate(rows, start=1):
            writer.write(row)
            assert read_metrics(path) == rows[:count]
        with pytest.raises(ValueError, match="row: expected"):
            writer.write({"seed": 0})
    assert path.read_text().splitlines()[0] == (
        "seed,training_step,environment_step,mean_return,mean_length,wall_time,task"
    )
    assert ",".join(METRICS_FIELDS) == path.read_text().splitlines()[0]
    with path.open("a") as file:
        file.write("0,20")  # by a process that was killed
    with MetricsWriter(path, until=rows[0]["environment_step"]) as writer:
        assert writer.rows == read_metrics(path) == rows[:1]
        writer.write(rows[1])
    assert read_metrics(path) == rows
    MetricsWriter(path).close()
    assert read_metrics(path) == []


def test_foreign_csv_is_refused(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,reward\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns seed"):
        read_metrics(path)


def _run(returns, steps=(0, 1000, 2000), **changes):
    config = preset_config("quick", **changes)
    rows = [
        _row(config.seed, step, value)
        for step, value in zip(steps, returns, strict=True)
    ]
    return Run(config.run_path, config, rows)


def test_curves_group_seeds_and_nothing_else():
    runs = [
        _run([0.0, 100.0, 300.0], seed=0),
        _run([10.0, 200.0, 500.0], seed=1, threads=1, compile=True, log_interval=7),
        _run([20.0, 600.0, 700.0], seed=2, steps=(0, 1000, 3000)),
        _run([1.0, 2.0, 3.0], seed=0, lr=3e-4),
    ]
    seeds, changed = curves_of(runs)
    assert seeds.label == "quick, lr=0.001, 3 seeds"
    np.testing.assert_array_equal(seeds.steps, [0, 1000])
    np.testing.assert_allclose(seeds.mean, [10.0, 300.0])
    np.testing.assert_allclose(seeds.std, [10.0, np.sqrt(70000.0)])  # n - 1
    assert changed.label == "quick, lr=0.0003, seed 0"
    assert changed.std is None
    labels = [c.label for c in curves_of([*runs, _run([0, 1, 2], task="Ant-v5")])]
    assert labels[-1] == "Ant-v5, quick, lr=0.001, seed 0"
    assert labels[0] == "HalfCheetah-v5, quick, lr=0.001, 3 seeds"
    assert curves_of(runs[:3])[0].label == "quick, 3 seeds"
    assert curves_of(runs[3:])[0].label == "quick, seed 0"


def test_curves_refuse_what_cannot_be_averaged():
    with pytest.raises(ValueError, match="appears twice"):
        curves_of([_run([0, 1, 2]), _run([0, 1, 2])])
    with pytest.raises(ValueError, match="share no training step"):
        curves_of([_run([0, 1, 2]), _run([0, 1, 2], steps=(1, 2, 3), seed=1)])
    with pytest.raises(ValueError, match="no evaluation yet"):
        curves_of([_run([], steps=())])


def test_plot_shows_a_line_and_a_band(tmp_path):
    from matplotlib.image import imread

    runs = [_run([0.0, 100.0, 300.0], seed=0), _run([10.0, 200.0, 500.0], seed=1)]
    one = imread(plot_runs(runs[:1], tmp_path / "pictures" / "one.png"))
    two = imread(plot_runs(runs, tmp_path / "pictures" / "two.png"))
    assert one.shape == two.shape

    def coloured(picture):
        """Share of pixels that are neither white, grey nor black."""
        return float(np.mean(np.ptp(picture[..., :3], axis=-1) > 0.1))

    assert coloured(one) > 0.002
    assert coloured(two) > 3 * coloured(one)  # the shaded deviation
