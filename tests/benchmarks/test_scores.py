"""The table of an agent over tasks: what is collected, interpolated and averaged."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from benchmarks import scores


def rows_of(task: str, seed: int, returns: list[float]) -> list[dict[str, str]]:
    """Evaluations every 10 steps from step 0 on."""
    return [
        {
            "seed": str(seed),
            "training_step": str(10 * i),
            "environment_step": str(10 * i),
            "mean_return": str(value),
            "mean_length": "5.0",
            "wall_time": "1.0",
            "task": task,
            "commit": "abc",
        }
        for i, value in enumerate(returns)
    ]


def all_tasks(*scores_of_seeds: float) -> list[dict[str, str]]:
    """Each seed has the same normalised score on all tasks."""
    return [
        row
        for task, (low, high) in scores.RANDOM_AND_TD3.items()
        for seed, score in enumerate(scores_of_seeds)
        for row in rows_of(task, seed, [0.0, low + score * (high - low)])
    ]


def test_returns_are_interpolated_and_shorter_runs_left_out():
    rows = rows_of("Ant-v4", 1, [0.0, 10.0, 30.0]) + rows_of("Ant-v4", 0, [5.0, 6.0])
    curves = scores.curves_of(rows)
    assert scores.returns_at(curves, "Ant-v4", 5).tolist() == [5.5, 5.0]
    assert scores.returns_at(curves, "Ant-v4", 15).tolist() == [20.0]
    assert scores.returns_at(curves, "Ant-v4", 21).size == 0
    assert scores.returns_at(curves, "Hopper-v4", 5).size == 0


def test_the_interquartile_mean_is_of_normalised_scores():
    pytest.importorskip("rliable")
    curves = scores.curves_of(all_tasks(0.0, 1.0, 2.0, 9.0))
    middle, low, high, seeds = scores.interquartile_mean(curves, 10)
    assert (middle, seeds) == (pytest.approx(1.5), 4)
    assert low <= middle <= high
    (row,) = scores.table(curves, [10], "name")
    lowest, highest = scores.RANDOM_AND_TD3["Hopper-v4"]
    mean = lowest + 3.0 * (highest - lowest)
    spread = np.std([0, 1, 2, 9], ddof=1) * (highest - lowest)
    assert f"{mean:.0f} +- {spread:.0f}" in row
    assert row.startswith("| name | 10 |")
    assert row.endswith("(4) |")
    assert scores.interquartile_mean(curves, 11) is None


def test_collected_files_are_read_back(tmp_path):
    pytest.importorskip("rliable")
    rows = rows_of("Ant-v4", 3, [1.0, 2.0]) + rows_of("Ant-v4", 1, [3.0, 4.0])
    scores.collect(rows, tmp_path, "plus")
    path = tmp_path / "Ant-v4-plus.csv"
    assert path.read_text().splitlines()[0] == ",".join(scores.FIELDS)
    found = scores.read_rows(path)
    assert found == rows[2:] + rows[:2]
    assert list(csv.DictReader(path.open())) == found
