"""Every experiment of the paper runs at the smallest scale, with table and figure."""

from __future__ import annotations

import csv
import dataclasses
import os
import shutil
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from torchrl.envs import TransformedEnv

from alm_torchrl.cli import main
from alm_torchrl.experiments import engine_local, execution, figures
from alm_torchrl.experiments.catalogue import EXPERIMENTS, SCALES, plan
from alm_torchrl.experiments.display import is_complete
from alm_torchrl.experiments.engine_local import run_locally
from alm_torchrl.experiments.execution import make_runs
from alm_torchrl.experiments.tables import (
    Group,
    format_scores,
    iqm_interval,
    over_seeds,
)
from alm_torchrl.experiments.worker import make_run
from alm_torchrl.runs.curves import reference_curve
from alm_torchrl.runs.folder import METRICS_FIELDS, Run
from alm_torchrl.runs.options import ReproduceOptions
from alm_torchrl.runs.settings import UserError
from tests.experiments.killed import make_killed

TASK = "InvertedPendulum-v5"
ALONE = partial(run_locally, jobs=1)
ONCE = ("--scale", "smoke", "--jobs", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("with spaces")


def command(folder: Path, *words: object) -> int:
    options = ("--runs", folder / "runs", "--output", folder / "results")
    return main(["reproduce", *map(str, (*words, *options))])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# One of each kind; the first and the last share runs.
KINDS = ("table1", "fig4", "fig7")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in KINDS else pytest.mark.slow)
        for name in EXPERIMENTS
    ],
)
def test_smoke(name, folder, capsys):
    experiment = EXPERIMENTS[name]
    assert command(folder, name, *ONCE) == 0
    printed = capsys.readouterr().out
    assert SCALES["smoke"].note in printed
    assert max(map(len, printed.replace(str(folder), "").splitlines())) <= 80
    results = folder / "results"
    assert (results / f"{name}-smoke.png").stat().st_size > 10_000
    table = read(results / f"{name}-smoke.csv")
    assert [row["variant"] for row in table] == [v.label for v in experiment.variants]
    for row, variant in zip(table, experiment.variants, strict=True):
        curves = read(results / TASK / f"{variant.name}-smoke.csv")
        assert list(curves[0]) == [*METRICS_FIELDS, "commit"]
        last = [float(r["mean_return"]) for r in curves if r["training_step"] == "6"]
        assert len(last) == int(row["seeds"]) == 2
        assert float(row["mean"]) == pytest.approx(np.mean(last))
        assert float(row["std"]) == pytest.approx(np.std(last, ddof=1))
        assert float(row["low"]) <= float(row["iqm"]) <= float(row["high"])
    if experiment.kind != "curves":
        detail = read(results / f"{name}-smoke-{experiment.kind}.csv")
        assert {row["variant"] for row in detail} == {row["variant"] for row in table}
    if experiment.kind == "bias":
        found = dict.fromkeys((row["variant"], row["estimate"]) for row in detail)
        assert [*found] == [
            *(("ALM(3)", "bound"), ("ALM(3)", "qvalue")),
            *(("REDQ", "qvalue"), ("SAC", "qvalue")),
        ]
        steps = [row["training_step"] for row in detail if row["variant"] == "SAC"]
        assert steps == ["0", "6"] * 2


def test_a_line_for_each_variant_and_estimate(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, output: drawn.append(figure))
    labels = {
        ("ALM(3)", "bound"): "ALM(3) bound",
        ("ALM(3)", "qvalue"): "ALM(3) min Q",
        ("REDQ", "qvalue"): "REDQ Q",
    }
    rows = [
        {
            **{"task": task, "variant": variant, "estimate": estimate},
            **{"seed": seed, "training_step": step, "std": 1000 + line},
            "mean": 100 * task + 10 * line + step + 2 * seed,
        }
        for task in (1, 2)
        for line, (variant, estimate) in enumerate(labels)
        for seed in (0, 1)
        for step in (0, 3)
    ]
    figures.plot_bias("a title", rows, tmp_path / "bias.png")
    (figure,) = drawn
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*labels.values()]
    for index, panel in enumerate(figure.axes):
        deviation, task = divmod(index, 2)
        curves = {line.get_label(): line.get_ydata() for line in panel.get_lines()}
        for number, label in enumerate(labels.values()):
            first = 100 * (task + 1) + 10 * number
            means = [first + 1, first + 4]
            expected = [1000 + number] * 2 if deviation else means
            assert curves[label].tolist() == expected


def test_timed_curves_are_drawn_over_minutes_too(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, output: drawn.append(figure))
    names = ("training_step", "mean_return", "wall_time")
    rows = [
        [dict(zip(names, row, strict=True)) for row in ((0, 1, 60), (5, 3, 120))],
        [dict(zip(names, row, strict=True)) for row in ((0, 5, 180),)],
    ]
    config = plan(EXPERIMENTS["fig3"], "smoke")[0][1]
    runs = [Run(tmp_path, config, metrics) for metrics in rows]
    group = Group(TASK, "alm", "ALM(3)", runs)
    figures.plot_curves("a title", [group], tmp_path / "a.png", timed=True)
    figures.plot_curves("a title", [group], tmp_path / "a.png")
    timed, plain = drawn
    lines = [panel.get_lines()[0] for panel in timed.axes]
    assert [line.get_xdata().tolist() for line in lines] == [[0, 5], [2, 2]]
    assert [line.get_ydata().tolist() for line in lines] == [[3, 3], [3, 3]]
    assert lines[0].get_label() == "ALM(3) (1 to 2 seeds at each step)"
    assert len(plain.axes) == 1


def test_the_tasks_of_all_scales_are_registered():
    tasks = {task for one in EXPERIMENTS.values() for task in one.tasks}
    tasks |= {task for scale in SCALES.values() for task in scale.tasks or ()}
    assert len(tasks) > 5
    assert [task for task in sorted(tasks) if task not in gymnasium.registry] == []


def test_complete_runs_are_not_made_again(folder, monkeypatch):
    command(folder, "fig7", *ONCE)
    before = (folder / "results" / "fig7-smoke.csv").read_text()

    def never(config):
        raise AssertionError(config.run_path)

    def fails(env, **kwargs):
        raise RuntimeError("the simulator hangs")

    monkeypatch.setattr(engine_local, "make_run", never)
    # An error in closing costs no measurement.
    monkeypatch.setattr(TransformedEnv, "close", fails)
    assert command(folder, "fig7", *ONCE) == 0
    assert (folder / "results" / "fig7-smoke.csv").read_text() == before


def test_a_bias_needs_checkpoints(folder, tmp_path, capsys):
    words = (*ONCE, "--seeds", 1)
    command(folder, "fig4", *words)
    shutil.copytree(folder / "runs", tmp_path / "runs")
    for checkpoints in (tmp_path / "runs").glob("*/checkpoints"):
        shutil.rmtree(checkpoints)
    with pytest.raises(SystemExit):
        command(tmp_path, "fig4", *words)
    assert "expected runs with a usable checkpoint" in capsys.readouterr().err


def in_folder(name, folder):
    """The settings of an experiment's runs, each with a folder of its own."""
    configs = [config for _, config in plan(EXPERIMENTS[name], "smoke")]
    return [dataclasses.replace(c, run_dir=folder / c.run_name) for c in configs]


def test_runs_that_were_interrupted_are_continued(tmp_path, monkeypatch):
    first, second = in_folder("table1", tmp_path)
    assert make_run(dataclasses.replace(first, total_steps=3)) == (0, "")
    assert not is_complete(first)
    runs, failures = make_runs([first, second], ALONE)
    assert not failures
    assert [run.path for run in runs] == [first.run_path, second.run_path]
    assert "Continues from" in (first.run_path / "train.log").read_text()
    assert [row["training_step"] for row in runs[0].metrics] == [0, 3, 6]

    # Ctrl-C in a run makes the training return 130: no further run starts.
    begun = []
    monkeypatch.setattr(
        "alm_torchrl.runs.train.train", lambda c, **_: begun.append(c) or 130
    )
    with pytest.raises(KeyboardInterrupt, match="2"):
        make_runs(in_folder("fig15", tmp_path / "others"), ALONE)
    assert len(begun) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("training diverged"), "training diverged"),
        (RuntimeError("no memory"), "RuntimeError: no memory (see "),
    ],
)
def test_the_reason_of_a_failure_is_given(error, reason, folder, tmp_path, monkeypatch):
    def fails(config, **kwargs):
        raise error

    make_runs(in_folder("table1", folder / "runs"), ALONE)
    monkeypatch.setattr("alm_torchrl.runs.train.train", fails)
    complete, _ = in_folder("table1", folder / "runs")
    failing, _ = in_folder("table1", tmp_path)
    runs, failures = make_runs([complete, failing], ALONE)
    assert [run.path for run in runs] == [complete.run_path]
    assert failures[failing.run_path].startswith(reason)


def test_a_run_that_is_killed_is_named_and_the_others_are_drawn(
    folder, tmp_path, monkeypatch, capsys
):
    make_runs(in_folder("table1", folder / "runs"), ALONE)
    killed, complete = in_folder("table1", tmp_path / "runs")
    shutil.copytree(folder / "runs" / complete.run_name, complete.run_path)
    monkeypatch.setattr(engine_local, "make_run", make_killed)
    assert command(tmp_path, "table1", "--scale", "smoke", "--jobs", 2) == 1
    printed = capsys.readouterr().out
    assert f"Failed: {killed.run_path}: its process was killed" in printed
    (row,) = read(tmp_path / "results" / "table1-smoke.csv")
    assert row["seeds"] == "1"


def test_jobs_are_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 8}, raising=False)
    assert execution._default_jobs(ReproduceOptions(device="cpu")) == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert execution._default_jobs(ReproduceOptions(device="cpu")) == 64


@pytest.mark.slow
def test_several_at_once_equal_one_after_another(tmp_path):
    alone, _ = make_runs(in_folder("fig16", tmp_path / "one"), ALONE)
    several, _ = make_runs(
        in_folder("fig16", tmp_path / "many"), partial(run_locally, jobs=2)
    )
    for one, other in zip(alone, several, strict=True):
        pairs = zip(one.metrics, other.metrics, strict=True)
        assert all(a["mean_return"] == b["mean_return"] for a, b in pairs)


def test_the_list_tells_what_each_experiment_is(capsys):
    assert main(["reproduce", "--list"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for name, experiment in EXPERIMENTS.items():
        assert f"{name:8}{experiment.source}" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fig99"], "expected one of table1"),
        ([], "expected one of table1"),
        (["fig5a", "--tasks", "Ant-v5"], "--tasks: expected some of"),
        (["fig5a", "--seeds", "0"], "seeds"),
        (["fig5a", "--reference", "missing.csv"], "missing.csv"),
    ],
)
def test_mistakes_are_named(words, message, folder, capsys):
    with pytest.raises(SystemExit) as caught:
        command(folder, *words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def configs(name, scale):
    return [config for _, config in plan(EXPERIMENTS[name], scale)]


def test_what_is_planned():
    paper = configs("table1", "paper")
    assert len(paper) == 25
    assert {(one.total_steps, one.preset) for one in paper} == {(200_000, "paper")}
    small = configs("fig5b", "small")
    assert {one.task for one in small} == set(SCALES["small"].tasks)
    assert {one.horizon for one in small} == {1, 3, 5}
    names = {one.run_name for one in small}
    assert len(names) == len(small)
    # The lines that two figures share are the same runs.
    shared = names & {one.run_name for one in configs("fig5a", "small")}
    assert len(shared) == SCALES["small"].seeds * len(SCALES["small"].tasks)


def test_interval_of_the_interquartile_mean():
    returns = np.array([0.0, 10.0, 20.0, 30.0, 1000.0])
    found = []
    for other_seed in (1, 2):
        np.random.seed(other_seed)  # noqa: NPY002
        state = np.random.get_state()[1].copy()  # noqa: NPY002
        found.append(iqm_interval(returns))
        assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert found[0] == found[1]
    iqm, low, high = found[0]
    assert iqm == pytest.approx(20.0)
    assert low < iqm < high
    assert iqm_interval(returns, seed=1) != found[0]
    assert iqm_interval(np.array([5.0]))[0] == 5.0


def test_table_is_aligned_and_cuts_no_name():
    row = {"task": "Task-v0", "variant": "a variant", "seeds": 3, "mean": 1.0}
    row |= {"std": 2.0, "iqm": 3.0, "low": 4.0, "high": 5.0}
    long = {"task": "A-task-with-a-long-name-v0", "variant": "a variant of many words"}
    head, *lines = format_scores([row, row | long]).splitlines()
    for line in lines:
        assert line.index("3 [4, 5]") == head.index("IQM")
    assert all(name in lines[1] for name in long.values())


def test_mean_and_deviation_over_seeds():
    rows = [
        {"seed": seed, "x": x, "y": y}
        for seed, values in enumerate(([1.0, 2.0], [3.0, 6.0, 9.0]))
        for x, y in enumerate(values)
    ]
    curve = over_seeds("a line", rows, "x", "y")
    assert curve.label == "a line (1 to 2 seeds at each step)"
    assert curve.steps.tolist() == [0, 1, 2]
    assert curve.mean.tolist() == [2.0, 4.0, 9.0]
    np.testing.assert_allclose(curve.std, [2**0.5, 8**0.5, np.nan])
    assert over_seeds("a line", rows[:2], "x", "y").std is None


class TestReferenceCurve:
    def curve(self, tmp_path, text):
        path = tmp_path / "half_cheetah.csv"
        path.write_text(text)
        return reference_curve(path)

    def test_with_steps(self, tmp_path):
        curve = self.curve(tmp_path, "Step,r,r\n5000,1,3\n10000,2,2\n")
        assert curve.steps.tolist() == [5000, 10000]
        assert curve.mean.tolist() == [2.0, 2.0]
        assert curve.std.tolist() == pytest.approx([2**0.5, 0.0])
        assert curve.label == "published half_cheetah, 2 seeds"

    def test_without_steps(self, tmp_path):
        curve = self.curve(tmp_path, "r\n1\n2\n")
        assert curve.steps.tolist() == [0, 5000]
        assert curve.std is None

    @pytest.mark.parametrize(
        "text", ["", "Step,r\n", "Step\n1\n", "Step,r\n1,x\n", "Step,r\n1\n"]
    )
    def test_other_files_are_refused(self, tmp_path, text):
        with pytest.raises(ValueError, match=r"half_cheetah\.csv"):
            self.curve(tmp_path, text)


def test_plot_draws_published_curves(tmp_path, folder):
    configs = in_folder("table1", folder / "runs")
    make_runs(configs, ALONE)
    published = tmp_path / "published.csv"
    published.write_text("Step,r,r\n3,10,12\n6,20,30\n900,1,1\n")
    plain, other = tmp_path / "plain.png", tmp_path / "other.png"
    words = ["plot", str(configs[0].run_path), "--output"]
    main([*words, str(plain)])
    main([*words, str(other), "--reference", str(published)])
    assert plain.read_bytes() != other.read_bytes()
