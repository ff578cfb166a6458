"""The command line: mistakes, whole small runs, and what each command makes of them."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from alm_torchrl import load_policy, make_env
from alm_torchrl.cli import main
from alm_torchrl.runs.agents import build_loss, describe_spaces
from alm_torchrl.runs.curves import plot_runs
from alm_torchrl.runs.film import _write_gif, _write_mp4, render_headless
from alm_torchrl.runs.folder import Run, read_metrics, read_run
from alm_torchrl.runs.settings import preset_config
from alm_torchrl.runs.train import train
from tests.runs.test_film import can_draw
from tests.training.resume_runs import in_process

render_headless()

TINY = [
    *("--warmup-steps", "20", "--batch-size", "4", "--latent-dim", "4"),
    *("--hidden-dim", "8", "--model-hidden-dim", "8", "--eval-episodes", "1"),
    *("--device", "cpu", "--threads", "1", "--action-bounds", "rescale"),
]
TRAIN = ["train", "InvertedPendulum-v5", *TINY]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, in a folder with a space in its name, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "seed 0"
    words = ["--total-steps", "10", "--eval-interval", "4", "--run-dir", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*TRAIN, *words]) == 0
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def folder(run):
    return run[0]


def sys_exit_with_main(words):
    sys.exit(main(words))


def fails(capsys, *arguments):
    """What a mistake is answered with: one line, but for the box of a wrong flag."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    lines = captured.err.replace("│", " ").split("\n")
    assert len(lines) == 2 or not lines[0].startswith("alm-torchrl: error: ")
    return " ".join(" ".join(lines).split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # The task and the machine
        ("train --preset paper", "preset 'paper' needs a task, for example: alm-torch"),
        ("train NoSuchTask-v0", "NoSuchTask"),
        ("train HalfCheeta-v5", "task: .* such as HalfCheetah-v5.* 'HalfCheeta-v5'"),
        ("train --device cuda", "--device: expected .* got cuda, but there is no CUDA"),
        # Settings
        ("train --lr 0", r"lr: expected a number > 0, got 0\.0"),
        ("train --batch-size 4000", "batch_size: .* most warmup_steps=2000, got 4000"),
        # Flags
        ("train --batch-size 2.5", r"2\.5.* --batch-size INT"),
        ("train --preset slow", "'slow' for argument '--preset'.*'quick', 'paper'"),
        ("train --precison bf16", "Unrecognized options: --precison"),
        ("train --seed", "Missing value for argument '--seed'. Expected 1"),
        ("train --resume nowhere --fresh", "choose one"),
        ("fly", "expected a command, one of train, .* got .fly"),
        # Folders and numbers of other commands
        ("train Pendulum-v1 --resume nowhere", "nowhere does not exist"),
        ("evaluate", "Missing from alm-torchrl evaluate: CHECKPOINT"),
        ("evaluate nowhere", "nowhere does not exist"),
        ("evaluate .", "neither a checkpoint nor a run folder"),
        ("diagnose nowhere", "nowhere does not exist"),
        ("render nowhere", "nowhere does not exist"),
        ("render nowhere --steps 0", "steps: expected an integer >= 1, got 0"),
        ("render nowhere --output film.avi", "expected a name in .gif or .mp4"),
        ("plot nowhere", "nowhere is not a run folder"),
        ("plot", "at least one run"),
        ("reproduce nothing", "expected one of .* got 'nothing'"),
    ],
)
def test_a_mistake_is_named_before_anything_is_written(
    capsys, tmp_path, monkeypatch, arguments, expected
):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert re.search(expected, fails(capsys, *arguments.split()))
    assert list(tmp_path.iterdir()) == []


def test_mistakes_with_a_run_are_named(capsys, folder, tmp_path):
    for arguments, expected in {
        ("evaluate", folder, "--episodes", 0): "episodes: expected an integer >= 1",
        ("plot", folder, "--output", tmp_path / "a.txt"): "'txt' is not supported",
        ("train", "--resume", folder / "checkpoints" / "best"): "networks only",
    }.items():
        assert expected in fails(capsys, *arguments)
    (tmp_path / "config.json").write_text("{}")
    assert "no usable checkpoint" in fails(capsys, "evaluate", tmp_path)
    for arguments in (("plot", tmp_path), ("train", "--resume", tmp_path)):
        assert "expected a run folder of format 2" in fails(capsys, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        "plot RUN --output a.png",
        "render RUN --output a.gif",
        "diagnose RUN --output a",
        "reproduce fig5a --scale smoke --output a",
    ],
)
def test_where_nothing_can_be_written_nothing_is_computed(
    capsys, tmp_path, folder, monkeypatch, arguments
):
    monkeypatch.chdir(tmp_path)
    words = [str(folder) if word == "RUN" else word for word in arguments.split()]
    with monkeypatch.context() as context:
        # The super-user may write anywhere, so the permission is taken like this.
        context.setattr(os, "access", lambda *_: False)
        message = fails(capsys, *words)
    assert "output: expected a place that can be written to" in message
    (tmp_path / "file").touch()
    words[-1] = f"file/{words[-1]}"
    assert "file' is a file" in fails(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_missing_extra_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    extra = "pip install 'alm_torchrl[cli]'"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert extra in fails(capsys, *TRAIN)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tyro", None)
        patch.delitem(sys.modules, "alm_torchrl.cli")
        with pytest.raises(ImportError, match=re.escape(extra)):
            importlib.import_module("alm_torchrl.cli")
    for name in ("matplotlib.figure", "PIL", "imageio_ffmpeg"):
        monkeypatch.setitem(sys.modules, name, None)
    run = Run(
        tmp_path, preset_config("quick"), [{"training_step": 0, "mean_return": 1.0}]
    )
    for write in (
        lambda: plot_runs([run], tmp_path / "a.png"),
        lambda: _write_gif(tmp_path / "film", iter(()), 20.0),
        lambda: _write_mp4(tmp_path / "film", iter(()), 20.0),
    ):
        with pytest.raises(ImportError, match=re.escape(extra)):
            write()
    assert list(tmp_path.iterdir()) == []


def test_a_run_leaves_what_is_documented(run):
    folder, printed = run
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "metrics.csv", "learning_curve.png", "checkpoints"),
        *("tensorboard", ".lock"),
    }
    rows = read_metrics(folder / "metrics.csv")
    assert [row["training_step"] for row in rows] == [0, 4, 8, 10]
    assert [row["environment_step"] for row in rows] == [20, 24, 28, 30]
    assert {(row["seed"], row["task"]) for row in rows} == {(0, "InvertedPendulum-v5")}
    # One for each step but the one that fell.
    assert all(row["mean_return"] == row["mean_length"] - 1 for row in rows)
    times = [row["wall_time"] for row in rows]
    assert times == sorted(times)
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert settings["hidden_dim"] == 8
    assert settings["noise_steps"] == preset_config("quick").noise_steps

    words = [line.rsplit(maxsplit=1) for line in printed.splitlines()]
    scores = {row[0].strip(): row[1] for row in words if len(row) == 2}
    assert float(scores["random policy"]) >= 1
    assert float(scores["standing still"]) >= 1
    assert scores["untrained agent"] == f"{rows[0]['mean_return']:.1f}"
    assert scores["trained agent"] == f"{rows[-1]['mean_return']:.1f}"
    for name in ("Device  cpu", "encoder", "classifier", f"Folder  {folder}"):
        assert name in printed
    for command in ("evaluate", "plot", "render"):
        assert f"alm-torchrl {command} {shlex.quote(str(folder))}" in printed


def test_a_complete_run_is_left_alone(capsys, folder):
    def times():
        files = (path for path in folder.rglob("*") if path.name != ".lock")
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    assert main(["train", "--resume", str(folder)]) == 0
    assert "complete: 10 training steps" in capsys.readouterr().out
    assert times() == before


def test_evaluate_takes_a_run_or_a_checkpoint(capsys, folder):
    (checkpoint,) = (folder / "checkpoints").glob("checkpoint-*")
    texts = []
    for path, seed in ((folder, 0), (checkpoint, 0), (folder, 5)):
        words = ["evaluate", str(path), "--episodes", "2", "--seed", str(seed)]
        assert main(words) == 0
        texts.append(capsys.readouterr().out.replace("seed 5", "seed 0"))
    assert texts[0] == texts[1] != texts[2]
    assert str(checkpoint) in texts[0]
    for name in ("InvertedPendulum-v5", "mean ", "standard deviation", "min ", "max "):
        assert name in texts[0]


def test_a_loaded_policy_acts_in_gymnasium_and_in_torchrl(folder):
    policy = load_policy(folder)
    env = gymnasium.make("InvertedPendulum-v5")
    env = gymnasium.wrappers.RescaleAction(env, -1.0, 1.0)
    observation, _ = env.reset(seed=0)
    for _ in range(3):
        observed = torch.as_tensor(observation, dtype=torch.float32)
        action = policy(TensorDict(observation=observed))["action"].numpy()
        observation, *_ = env.step(action)
    env = make_env("InvertedPendulum-v5", action_bounds="rescale")
    rollout = env.rollout(5, policy)
    assert rollout["action"].shape[1:] == (1,)
    assert not rollout["action"].requires_grad

    # The latent is sampled in both, the action's noise in one only.
    exploring = load_policy(folder, deterministic=False)
    best = load_policy(folder / "checkpoints" / "best")
    seen = TensorDict(observation=torch.zeros(512, 4))
    actions = [p(seen.clone())["action"] for p in (policy, exploring, best)]
    assert actions[1].std() > actions[0].std()
    assert actions[1].max() <= 1
    assert actions[2].shape == (512, 1)

    config = read_run(folder).config
    torch.manual_seed(config.seed)
    loss = build_loss(config.to_dict(), describe_spaces(env))
    untrained = loss.acting_policy().state_dict()
    trained = policy.policy.state_dict()
    assert trained.keys() == untrained.keys()
    changed = [name for name in trained if not trained[name].equal(untrained[name])]
    assert any(name.startswith("module.0") for name in changed)
    assert any(name.startswith("module.1") for name in changed)
    (std,) = [value for name, value in trained.items() if name.endswith(".std")]
    assert std.item() < 1.0


def test_plot_overlays_seeds(capsys, tmp_path, folder):
    output = tmp_path / "two seeds.png"
    other = shutil.copytree(folder, tmp_path / "seed 1")
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"seed": 0', '"seed": 1'))
    runs = [str(folder), str(other)]
    assert main(["plot", *runs, "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    assert output.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(not can_draw(), reason="MuJoCo finds no OpenGL to draw with")
def test_render_films_without_a_display(capsys, tmp_path, folder):
    import imageio.v3

    output = tmp_path / "a film.gif"
    words = ["render", str(folder), "--output", str(output), "--steps", "3"]
    assert main(words) == 0
    assert str(output) in capsys.readouterr().out
    assert np.asarray(imageio.v3.imread(output)).std() > 1


def test_tasks_lists_the_papers(capsys):
    assert main(["tasks"]) == 0
    text = capsys.readouterr().out
    for task in ("HalfCheetah-v5", "T-Ant-v5", "T-Humanoid-v5", "Pendulum-v1"):
        assert task in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_task_may_be_in_a_module_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "own_tasks.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n"
        "gymnasium.register('Own-v0', PendulumEnv, max_episode_steps=9)\n"
    )
    monkeypatch.chdir(tmp_path)
    # An installed command finds its own folder on the path, not the working directory.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    try:
        words = ["own_tasks:Own-v0", *TINY, "--total-steps", "1", "--logger", "none"]
        assert main(["train", *words]) == 0
    finally:
        gymnasium.registry.pop("Own-v0", None)
        sys.modules.pop("own_tasks", None)
    # A run without a folder gets its name.
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == read_run(folder).config.run_name
    assert {row["mean_length"] for row in read_run(folder).metrics} == {9.0}


def test_divergence_names_the_term_and_keeps_the_curve(capsys, tmp_path):
    words = ["--total-steps", "9", "--lr", "1e30", "--logger", "none"]
    with pytest.raises(SystemExit) as stop:
        main([*TRAIN, *words, "--run-dir", str(tmp_path)])
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "alm-torchrl: error: training diverged: loss_" in message
    assert str(tmp_path) in message
    assert [row["training_step"] for row in read_run(tmp_path).metrics] == [0]
    assert (tmp_path / "learning_curve.png").is_file()


def test_training_in_another_thread_leaves_signals_alone(tmp_path):
    config = preset_config(
        "quick",
        **{"task": "InvertedPendulum-v5", "action_bounds": "rescale"},
        **{"warmup_steps": 20, "batch_size": 4, "total_steps": 2, "hidden_dim": 8},
        **{"model_hidden_dim": 8, "eval_episodes": 1, "logger": "none"},
        **{"run_dir": tmp_path / "run", "device": "cpu"},
    )
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train(config)))
    thread.start()
    thread.join()
    assert codes == [0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_saved_and_says_how_to_continue(capfd, tmp_path, number):
    folder = tmp_path / "stopped run"
    words = ["--total-steps", "1000000", "--eval-interval", "5", "--logger", "none"]
    words += ["--compile", "off"]
    process = in_process(sys_exit_with_main, [*TRAIN, *words, "--run-dir", str(folder)])
    metrics = folder / "metrics.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if metrics.is_file() and len(metrics.read_text().splitlines()) > 2:
            break
        time.sleep(0.02)
    capfd.readouterr()
    assert "in use" in fails(capfd, "train", "--resume", folder)
    os.kill(process.pid, number)
    process.join(120)
    out, err = capfd.readouterr()
    assert process.exitcode == 128 + number, err
    assert "Traceback" not in err
    command = f"alm-torchrl train --resume {shlex.quote(str(folder))}"
    assert f"Continue with: {command}" in out
    assert [row["training_step"] for row in read_run(folder).metrics[:2]] == [0, 5]
    assert (folder / "learning_curve.png").stat().st_size > 1000
    (newest,) = (folder / "checkpoints").glob("checkpoint-*")
    steps = int(newest.name.partition("-")[2]) - 20 + 1
    assert main([*shlex.split(command)[1:], "--total-steps", str(steps)]) == 0
    assert f"Continues from {newest}" in capfd.readouterr().out
    assert read_run(folder).metrics[-1]["training_step"] == steps
