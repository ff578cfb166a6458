"""Learning curves: which runs share one, and what the picture shows."""

from __future__ import annotations

import numpy as np
import pytest

from alm_torchrl.runs.curves import curves_of, plot_runs
from alm_torchrl.runs.folder import Run
from alm_torchrl.runs.settings import preset_config


def run(returns, steps=(0, 1000, 2000), **changes):
    config = preset_config("quick", **changes)
    rows = [
        {"training_step": step, "mean_return": value}
        for step, value in zip(steps, returns, strict=True)
    ]
    return Run(config.run_path, config, rows)


def test_curves_group_seeds_and_nothing_else():
    runs = [
        run([0.0, 100.0, 300.0], seed=0),
        run([10.0, 200.0, 500.0], seed=1, threads=1, compile="on", log_interval=7),
        run([20.0, 600.0, 700.0], seed=2),
        run([1.0, 2.0, 3.0], seed=0, lr=3e-4),
    ]
    seeds, changed = curves_of(runs)
    assert seeds.label == "quick, lr=0.001, 3 seeds"
    np.testing.assert_array_equal(seeds.steps, [0, 1000, 2000])
    np.testing.assert_allclose(seeds.mean, [10.0, 300.0, 500.0])
    np.testing.assert_allclose(seeds.std, [10.0, np.sqrt(70000.0), 200.0])  # n - 1
    assert changed.label == "quick, lr=0.0003, seed 0"
    assert changed.std is None
    others = [run([0, 1, 2], task="Ant-v5"), run([0, 1, 2], agent="sac", lr=3e-4)]
    assert [curve.label for curve in curves_of([*runs, *others])] == [
        "HalfCheetah-v5, alm, quick, lr=0.001, 3 seeds",
        "HalfCheetah-v5, alm, quick, lr=0.0003, seed 0",
        "Ant-v5, alm, quick, lr=0.001, seed 0",
        "HalfCheetah-v5, sac, quick, lr=0.0003, seed 0",
    ]
    assert curves_of(runs[:3])[0].label == "quick, 3 seeds"
    assert curves_of(runs[3:])[0].label == "quick, seed 0"


def test_each_step_is_the_mean_of_the_seeds_that_have_it():
    runs = [
        run([0.0, 100.0, 300.0, 7.0], (0, 1000, 2000, 3000), seed=0),
        run([10.0, 200.0, 500.0], seed=1),
        run([20.0, 600.0], (0, 1500), seed=2),
    ]
    (curve,) = curves_of(runs)
    assert curve.label == "quick, 3 seeds (1 to 3 seeds at each step)"
    assert curve.steps.tolist() == [0, 1000, 1500, 2000, 3000]
    assert curve.mean.tolist() == [10.0, 150.0, 600.0, 400.0, 7.0]
    deviations = [10.0, np.sqrt(5000.0), np.nan, np.sqrt(20000.0), np.nan]
    np.testing.assert_allclose(curve.std, deviations)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([run([0, 1, 2]), run([0, 1, 2])], "appears twice"),
        ([run([], steps=())], "no evaluation yet"),
    ],
)
def test_runs_that_cannot_be_averaged_are_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        curves_of(runs)


def test_the_picture_shows_a_line_and_a_band(tmp_path):
    from matplotlib.image import imread

    runs = [run([0.0, 100.0, 300.0], seed=0), run([10.0, 200.0, 500.0], seed=1)]
    one = imread(plot_runs(runs[:1], tmp_path / "pictures" / "one.png"))
    two = imread(plot_runs(runs, tmp_path / "pictures" / "two.png"))
    assert one.shape == two.shape
    # Share of pixels that are neither white, grey nor black.
    line, band = (np.mean(np.ptp(p[..., :3], axis=-1) > 0.1) for p in (one, two))
    assert line > 0.002
    assert band > 3 * line  # the shaded deviation
