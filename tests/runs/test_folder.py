"""The run folder: its record, lock, metrics and format."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest

from alm_torchrl.runs.folder import (
    CHANGEABLE,
    METRICS_FIELDS,
    PACKAGES,
    MetricsWriter,
    harmful_differences,
    lock_run,
    provenance,
    read_metrics,
    read_record,
    read_run,
    write_config,
)
from alm_torchrl.runs.settings import preset_config

ROOT = Path(__file__).parents[2]


def test_the_record_holds_what_is_documented(tmp_path):
    config = preset_config("quick", run_dir=tmp_path)
    write_config(config, "cpu")
    record = json.loads((tmp_path / "config.json").read_text())
    assert set(record) == {
        *("format", "settings", "agent", "versions", "commit", "hardware"),
        *("origin", "started", "continued"),
    }
    assert record["settings"] == config.to_dict()
    assert set(record["versions"]) == {"python", *PACKAGES}
    assert record["versions"]["torchrl"].count(".") >= 1
    assert record["hardware"]["cpu"]
    assert record["hardware"]["cores"] >= 1
    assert record["hardware"]["device"] == "cpu"
    with pytest.raises(FileNotFoundError, match=r"has no metrics\.csv"):
        read_run(tmp_path)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not in a checkout")
def test_the_record_names_the_commit_of_the_source():
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert provenance("cpu")["commit"].removesuffix("-dirty") == head.strip()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("format"), "expected .* format 2.* got .* format 1"),
        (
            lambda record: record.update(format=9),
            "expected .* format 2.* got .* format 9",
        ),
        (lambda record: record.pop("settings"), "settings"),
        (lambda record: record["settings"].update(speed=1), "speed"),
        (lambda record: record["settings"].update(gamma=2), "gamma: expected"),
    ],
)
def test_a_record_of_another_form_is_refused(tmp_path, change, message):
    write_config(preset_config("quick", run_dir=tmp_path), "cpu")
    record = read_record(tmp_path)
    change(record)
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message) as raised:
        read_record(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_a_lock_keeps_others_out_and_leaves_no_folder_of_its_own(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new/deep"):
        with pytest.raises(RuntimeError), lock_run(tmp_path / name):
            raise RuntimeError
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]
    with lock_run(tmp_path / "new/deep"):
        message = "another process trains in it"
        with (
            pytest.raises(BlockingIOError, match=message),
            lock_run(tmp_path / "new/deep"),
        ):
            pass
        (tmp_path / "new/deep/config.json").write_text("{}")
    with lock_run(tmp_path / "new/other"):
        pass
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["deep"]


def test_only_settings_that_leave_the_training_alone_may_change(tmp_path):
    config = preset_config("quick", run_dir=tmp_path)
    before = config.to_dict()
    values = {"total_steps": 9999, "logger": "none", "threads": 2}
    assert values.keys() <= CHANGEABLE
    assert harmful_differences(before, dataclasses.replace(config, **values)) == {}
    changed = dataclasses.replace(config, lr=0.5, total_steps=9999, horizon=2)
    assert harmful_differences(before, changed) == {
        "lr": (config.lr, 0.5),
        "horizon": (3, 2),
    }


def row(step, mean_return):
    return {
        **{"seed": 0, "training_step": step, "environment_step": step + 2000},
        **{"mean_return": mean_return, "mean_length": 1000.0, "wall_time": 1.5},
        "task": "HalfCheetah-v5",
    }


def test_metrics_are_on_disk_at_once_and_read_back_equal(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [row(0, -0.1), row(1000, 1 / 3)]
    writer = MetricsWriter(path)
    for count, one in enumerate(rows, start=1):
        writer.write(one)
        assert read_metrics(path) == rows[:count]
    with pytest.raises(ValueError, match="row: expected"):
        writer.write({"seed": 0})
    assert path.read_text().splitlines()[0] == ",".join(METRICS_FIELDS)
    path.unlink()  # in the middle of a run
    writer.write(row(2000, 2.0))
    assert read_metrics(path) == [*rows, row(2000, 2.0)]
    path.write_text("step,reward\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns seed"):
        read_metrics(path)


def test_rows_after_a_step_are_set_aside(tmp_path):
    path = tmp_path / "metrics.csv"
    rows = [row(0, -0.1), row(1000, 1 / 3)]
    first = MetricsWriter(path)
    for one in rows:
        first.write(one)
    writer = MetricsWriter(path, until=rows[0]["environment_step"])
    assert writer.rows == read_metrics(path) == rows[:1]
    assert read_metrics(writer.aside) == rows[1:]
    assert MetricsWriter(path).aside is not None
    assert read_metrics(path) == []
    kept = [read_metrics(file) for file in sorted(tmp_path.glob("metrics-*.csv"))]
    assert kept == [rows[1:], rows[:1]]


@pytest.mark.parametrize("line", ["1,2", "0,a,1,2.0,3.0,4.0,T-v0", "1,2,3,4,5,6,7,8"])
def test_a_malformed_row_is_named_with_its_line(tmp_path, line):
    path = tmp_path / "metrics.csv"
    MetricsWriter(path).write(row(0, 1.0))
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match="expected one value for each col") as raised:
        read_metrics(path)
    assert f"{path}, line 3" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_row_that_was_cut_off_is_named_with_its_line(tmp_path):
    path = tmp_path / "metrics.csv"
    writer = MetricsWriter(path)
    for step in (0, 1000):
        writer.write(row(step, 1.0))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="line 3: expected a complete line, got '0,"):
        read_metrics(path)


def test_metrics_are_written_where_open_files_cannot_be_replaced(tmp_path, monkeypatch):
    replace = os.replace

    def replace_as_windows_does(source, target):
        numbers = os.listdir("/proc/self/fd")
        held = {os.path.realpath(f"/proc/self/fd/{number}") for number in numbers}
        if {os.path.realpath(source), os.path.realpath(target)} & held:
            raise PermissionError(13, "used by another process", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_as_windows_does)
    writer = MetricsWriter(tmp_path / "metrics.csv")
    writer.write(row(0, 1.0))
    assert read_metrics(writer.path) == [row(0, 1.0)]
