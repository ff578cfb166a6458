"""Grids of settings, the display, and retries."""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import threading
import time

import pytest

from alm_torchrl.cli import main
from alm_torchrl.experiments import display, worker
from alm_torchrl.experiments.engine_local import run_locally
from alm_torchrl.experiments.grid import plan_grid, sweep_options
from alm_torchrl.experiments.worker import Retries, make_run
from alm_torchrl.runs.folder import lock_run
from alm_torchrl.runs.options import SweepOptions
from tests.experiments.tiny import TINY, tiny, worker_that_has_saved
from tests.runs.small_runs import refused, same_end

FILE = """
tasks = ["Pendulum-v1"]
agents = ["alm", "sac"]
seeds = 2
device = "cpu"
[set]
capacity = ["none", 5000]
entropy = [true, false]
lr = 1e-4
log_reward = "none"
"""


def test_a_file_and_flags_give_the_same_grid(tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text(FILE)
    words = ("capacity=none,5000", "entropy=true,false", "lr=1e-4", "log-reward=none")
    flags = SweepOptions(
        tasks=("Pendulum-v1",), agents=("alm", "sac"), seeds=2, device="cpu", set=words
    )
    grids = [plan_grid(flags), plan_grid(SweepOptions(**sweep_options(file)))]
    assert grids[0] == grids[1]
    runs = [config for _, config in grids[0].runs]
    assert len(runs) == len({config.run_name for config in runs}) == 16
    assert {run.capacity for run in runs} == {None, 5000}
    assert {run.entropy for run in runs} == {True, False}
    assert {(run.lr, run.log_reward) for run in runs} == {(1e-4, "none")}
    labels = list(dict.fromkeys(line.label for line, _ in grids[0].runs))
    assert labels[:2] == [
        "alm, capacity=none, entropy=true",
        "alm, capacity=none, entropy=false",
    ]
    assert len(labels) == 8


def test_a_sweep_writes_table_and_figure_and_names_what_failed(tmp_path, capsys):
    constant = {k: v for k, v in TINY.items() if k not in ("task", "device")}
    constant |= {"total_steps": 3, "eval_interval": 3}
    words = [f"--set={name}={value}" for name, value in constant.items()]
    places = ["--runs", tmp_path / "runs", "--output", tmp_path / "out"]
    line = ["sweep", "Pendulum-v1", "Missing-v0", "--seeds", 2, "--jobs", 1, *words]
    line += ["--set", "lr=1e-3,1e-4", "--device", "cpu", *places]
    assert main(list(map(str, line))) == 1
    printed = capsys.readouterr().out
    assert printed.count("Failed: ") == 4
    with (tmp_path / "out" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["variant"], row["seeds"]) for row in rows] == [
        ("Pendulum-v1", "lr=0.001", "2"),
        ("Pendulum-v1", "lr=0.0001", "2"),
    ]
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "Pendulum-v1" / "alm-lr=0.001.csv").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "lr"], "--set: expected NAME=VALUE"),
        (["--set", "seed=1"], "--set: expected a setting of train, got 'seed'"),
        (["--set", "lr=fast"], "lr: expected a number"),
        (["--set", "lr=1e-3,1e-3"], "more than once"),
        (["--set", "lr=1e-3", "--set", "lr=1e-4"], "each setting once"),
        (["--address", "auto"], "address: expected none with --engine local"),
        (["--gpus", "0.5"], "gpus: expected none with --engine local"),
        (["--file", "missing.toml"], "missing.toml"),
    ],
)
def test_mistakes_are_named(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["sweep", *words])
    assert caught.value.code == 2
    # In a frame, where the flags are refused.
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds = ", "expected TOML"),
        ("seed = 3", "got ['seed']"),
        ("set = 3", "expected a table [set]"),
        ("engine = 'cloud'", "engine: expected"),
        ("seeds = 0", "seeds: expected"),
    ],
)
def test_mistakes_in_a_file_are_named(text, message, tmp_path, capsys):
    file = tmp_path / "grid.toml"
    file.write_text(text)
    assert message in refused(capsys, main, ["sweep", "--file", str(file)])


def row(config, failure=""):
    return display._row(config, failure)


def test_the_display_tells_the_state_of_each_run(tmp_path, monkeypatch):
    config = tiny(tmp_path, 0, total_steps=4, eval_interval=2)
    assert row(config)[1:] == ("0/4 steps", "", "waiting", "")
    seen = []

    def train(config, **_):
        seen.append(row(config)[3])
        return 0

    with monkeypatch.context() as patch:
        patch.setattr("alm_torchrl.runs.train.train", train)
        make_run(config)
    assert seen[0].endswith(f":{os.getpid()}")
    assert row(config, "no\nmemory")[3] == "failed: no memory"
    assert make_run(config) == (0, "")
    assert row(config)[3:] == ("complete", "")
    longer = tiny(tmp_path, 0, total_steps=400, eval_interval=2)
    metrics = tmp_path / config.run_name / "metrics.csv"
    monkeypatch.setattr(display, "where_it_runs", lambda _: "host:1")
    shutil.copytree(config.run_path, longer.run_path, dirs_exist_ok=True)
    metrics = longer.run_path / "metrics.csv"
    lines = metrics.read_text().splitlines()
    cells = [line.split(",") for line in lines]
    times = cells[0].index("wall_time")
    for cell, seconds in zip(cells[1:], (10, 20, 30), strict=True):
        cell[times] = str(seconds)
    metrics.write_text("".join(",".join(cell) + "\n" for cell in cells))
    # 396 steps at five seconds each.
    assert row(longer)[3:] == ("host:1", "33 min left")


def test_a_terminal_shows_a_table_and_a_file_the_changes(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "5")
    rows = [
        ("a", "0/4 steps", "", "waiting", ""),
        ("b", "4/4 steps", "return 1.0", "complete", ""),
        ("c", "2/4 steps", "return 1.0", "host:1", "3 s left"),
        ("d", "2/4 steps", "", f"failed: {'x' * 80}", ""),
    ]
    file = io.StringIO()
    table = display._Table(file)
    table(rows)
    lines = file.getvalue().removeprefix("\x1b[J").splitlines()
    assert [line[0] for line in lines] == ["c", "d", "a", "1"]
    assert lines[-1] == "1 of 4 runs complete"
    assert max(map(len, lines)) < 40
    table(rows)
    assert file.getvalue().count("\x1b[4F\x1b[J") == 1

    file = io.StringIO()
    changes = display._Lines(file)
    changes(rows)
    changes([*rows[:2], (*rows[2][:4], "2 s left"), rows[3]])
    assert len(file.getvalue().splitlines()) == 4


def test_a_lost_run_begins_again_while_it_gets_on(tmp_path, monkeypatch):
    config, other, retries = tiny(tmp_path, 0), tiny(tmp_path, 1), Retries(limit=2)
    saved = []
    monkeypatch.setattr(worker, "numbered_checkpoints", lambda _: saved)
    assert [retries.again(config) for _ in range(3)] == [True, True, False]
    assert retries.again(other)
    for step in range(5):
        saved.append((step, None))
        assert retries.again(config)
    assert [retries.again(config) for _ in range(2)] == [True, False]


def test_a_run_waits_for_the_lock(tmp_path, monkeypatch):
    config = tiny(tmp_path, 0, total_steps=2)
    monkeypatch.setattr("alm_torchrl.experiments.worker.LOCK_TIMEOUT", 0.2)
    with lock_run(config.run_path):
        code, reason = make_run(config)
    assert code == 1
    assert "in use" in reason
    monkeypatch.setattr("alm_torchrl.experiments.worker.LOCK_TIMEOUT", 60)
    held, free = threading.Event(), threading.Event()

    def hold():
        with lock_run(config.run_path):
            held.set()
            free.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    threading.Timer(0.5, free.set).start()
    assert make_run(config) == (0, "")
    holder.join()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_the_runs_in_progress(number, tmp_path):
    configs = [tiny(tmp_path, seed, total_steps=2000) for seed in (0, 1)]

    def watch():
        while not all(worker_that_has_saved(config, 2000) for config in configs):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()
    with pytest.raises(KeyboardInterrupt) as stop:
        list(run_locally(configs, jobs=2))
    assert stop.value.args == (number,)
    for config in configs:
        log = (config.run_path / "train.log").read_text()
        assert "Interrupted. Saved in" in log


def test_train_in_another_thread_is_stopped_by_a_call(tmp_path):
    from alm_torchrl.runs.train import train

    whole, stopped = tiny(tmp_path / "a", 0), tiny(tmp_path / "b", 0)
    assert make_run(whole) == (0, "")
    stop, rows, codes = threading.Event(), [], []

    def on_evaluation(row):
        rows.append(row)
        if row["training_step"] == 50:
            stop.set()

    def work():
        codes.append(train(stopped, on_evaluation=on_evaluation, stop=stop))
        stop.clear()
        codes.append(train(stopped, on_evaluation=rows.append))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert codes == [130, 0]
    assert [row["training_step"] for row in rows] == [0, 50, 100]
    assert same_end(whole.run_path, stopped.run_path)


def test_runs_are_given_as_they_end(tmp_path):
    configs = [tiny(tmp_path, seed, total_steps=2) for seed in (0, 1)]
    outcomes = run_locally(configs, jobs=1)
    assert next(outcomes) == (configs[0], "")
    assert not configs[1].run_path.exists()
    outcomes.close()
