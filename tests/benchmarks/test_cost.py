"""What a return costs: when the clock runs, and what the table says."""

from __future__ import annotations

import pytest

from benchmarks import cost


def row(step: int, seconds: float, value: float) -> dict[str, object]:
    return {
        "agent": "sac",
        "task": "HalfCheetah-v4",
        "seed": 100,
        "environment_step": step,
        "core_seconds": seconds,
        "mean_return": value,
    }


def test_the_table_has_the_price_of_the_first_evaluation_at_a_level():
    rows = [row(1000, 20.0, 10.0), row(2000, 44.0, 2100.0), row(3000, 60.0, 1900.0)]
    line = cost.table(rows).splitlines()[1].split()
    expected = "sac HalfCheetah-v4 100 20.0 44 (2,000) not by 3,000"
    assert line == expected.split()


def test_evaluations_cost_nothing_and_the_highest_level_ends_the_run(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(cost, "_core_seconds", lambda: clock[0])
    meter = cost.Meter(cost.Options("sac", output=None))

    def evaluate(value: float) -> float:
        clock[0] += 100.0
        return value

    clock[0] += 2.0
    meter.note(10, lambda: evaluate(1.0))
    clock[0] += 3.0
    with pytest.raises(cost.Reached):
        meter.note(20, lambda: evaluate(5000.0))
    assert [row["core_seconds"] for row in meter.rows] == [2.0, 5.0]
