"""``alm-torchrl train --num-envs``."""

from __future__ import annotations

from alm_torchrl.runs.folder import read_metrics
from tests.runs.small_runs import refused, run, same_end

MANY = ("--num-envs", "3", "--updates-per-step", "0.5", "--reward-scale", "returns")


def test_a_run_in_several_environments_continues_where_it_stopped(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, *MANY, steps=12) == 0
    assert "21 random environment steps" in capsys.readouterr().out
    rows = read_metrics(whole / "metrics.csv")
    # The updates that are due after each turn of the three: 1, 3, 4, 6, 7, 9, 10, 12.
    assert [row["training_step"] for row in rows] == [0, 3, 6, 9, 12]
    assert [row["environment_step"] for row in rows] == [21, 27, 33, 39, 45]
    assert run(parts, *MANY, steps=6) == 0
    assert run(parts, *MANY, steps=12) == 0
    assert same_end(whole, parts)
    assert run(parts, *MANY, steps=12) == 0
    assert "is complete: 12 training steps" in capsys.readouterr().out


def test_another_number_of_environments_is_another_run(tmp_path, capsys):
    assert run(tmp_path / "run", *MANY) == 0
    line = refused(capsys, run, tmp_path / "run", "--num-envs", "2", *MANY[2:])
    assert "num_envs: 3 in the run, 2 now" in line
