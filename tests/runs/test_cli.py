"""The command line: help, mistakes, and a whole small run."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import mujoco
import numpy as np
import pytest

from alm_torchrl.cli import main
from alm_torchrl.runs.curves import plot_runs
from alm_torchrl.runs.film import _write_gif, _write_mp4, render_headless
from alm_torchrl.runs.folder import read_metrics, read_run
from alm_torchrl.runs.settings import preset_config

render_headless()

RESCALE = ["--action-bounds", "rescale"]
TINY = [
    *("--warmup-steps", "60", "--batch-size", "8", "--latent-dim", "4"),
    *("--hidden-dim", "16", "--model-hidden-dim", "16", "--eval-episodes", "1"),
    *("--device", "cpu", "--threads", "1"),
]


def _train(folder, *arguments):
    return main(["train", *TINY, "--run-dir", str(folder), *arguments])


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    """A finished run on Pendulum-v1, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("runs") / "a pendulum"
    arguments = "Pendulum-v1 --action-bounds rescale --total-steps 40"
    code = _train(folder, *arguments.split(), "--eval-interval", "15")
    assert code == 0
    return folder


@pytest.fixture(scope="module")
def inverted(tmp_path_factory):
    """Two runs on InvertedPendulum-v5 that differ in the seed."""
    folders = [tmp_path_factory.mktemp("runs") / f"seed {seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        arguments = "InvertedPendulum-v5 --action-bounds rescale --total-steps 3"
        arguments += f" --seed {seed} --logger none"
        assert _train(folder, *arguments.split()) == 0
    return folders


def _fails(capsys, *arguments):
    """The one line that a mistake is answered with."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in arguments])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("alm-torchrl: error: ")
    return lines[0]


@pytest.mark.parametrize(
    "command",
    [
        *("", "train", "evaluate", "diagnose", "plot", "render", "tasks"),
        *("reproduce", "bench"),
    ],
)
def test_help_fits_80_columns(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    captured = capsys.readouterr()
    assert stop.value.code == 0
    assert captured.out.startswith(f"usage: alm-torchrl {command}".rstrip())
    # The first line names all commands, which tyro does not wrap.
    lines = captured.out.splitlines()[0 if command else 1 :]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("preset", ["quick", "paper"])
def test_train_help_states_each_setting_with_the_presets_value(
    capsys, monkeypatch, preset
):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["train", "--help", f"--preset={preset}"])
    words = capsys.readouterr().out.replace("│", " ").split()
    descriptions = " ".join(words).split(" --")
    shown = {text.split()[0]: text for text in descriptions}
    config = preset_config(preset, task="HalfCheetah-v5")
    for name, value in config.to_dict().items():
        if name != "task":
            flag = name.replace("_", "-")
            text = shown[f"no-{flag}" if isinstance(value, bool) else flag]
            assert text.split(" ╰")[0].endswith(f"(default: {value})")


def test_paper_needs_a_task(capsys):
    message = _fails(capsys, "train", "--preset", "paper")
    assert "needs a task" in message
    assert "alm-torchrl train HalfCheetah-v5 --preset paper" in message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train NoSuchTask-v0", "NoSuchTask"),
        ("train CartPole-v1", "continuous"),
        ("evaluate nowhere", "nowhere does not exist"),
        ("diagnose nowhere", "nowhere does not exist"),
        ("render nowhere", "nowhere does not exist"),
        ("render nowhere --steps 0", "steps: expected an integer >= 1, got 0"),
        ("plot nowhere", "nowhere is not a run folder"),
        ("plot", "at least one run"),
    ],
)
def test_mistakes_get_one_line(capsys, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert expected in _fails(capsys, *arguments.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("train --lr 0", "lr: expected a number > 0"),
        ("train --warmup-steps 2", "at least horizon=3"),
        ("train --preset slow", "invalid choice 'slow'"),
        ("train --speed 3", "Unrecognized options: --speed"),
    ],
)
def test_bad_flags_are_named(capsys, monkeypatch, arguments, expected):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


def test_no_cuda_is_said(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no CUDA device" in _fails(capsys, "train", "--device", "cuda")


def test_a_missing_extra_is_named(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    extra = "pip install 'alm_torchrl[cli]'"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert extra in _fails(capsys, "train", "InvertedPendulum-v5", *RESCALE)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tyro", None)
        patch.delitem(sys.modules, "alm_torchrl.cli")
        with pytest.raises(ImportError, match=re.escape(extra)):
            importlib.import_module("alm_torchrl.cli")
    for name in ("matplotlib.backends.backend_agg", "PIL", "imageio_ffmpeg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=re.escape(extra)):
        plot_runs([], tmp_path / "a.png")
    for write in (_write_gif, _write_mp4):
        with pytest.raises(ImportError, match=re.escape(extra)):
            write(tmp_path / "film", iter(()), 20.0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_checkpoint_is_said(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "no usable checkpoint" in _fails(capsys, "evaluate", tmp_path)
    assert "neither a checkpoint" in _fails(capsys, "evaluate", tmp_path.parent)


def test_run_leaves_what_is_documented(pendulum):
    names = {path.name for path in pendulum.iterdir()}
    assert names == {
        "config.json",
        "metrics.csv",
        "learning_curve.png",
        "checkpoints",
        "tensorboard",
        ".lock",
    }
    lines = (pendulum / "metrics.csv").read_text().splitlines()
    assert lines[0] == (
        "seed,training_step,environment_step,mean_return,mean_length,wall_time,task"
    )
    rows = read_metrics(pendulum / "metrics.csv")
    assert [row["training_step"] for row in rows] == [0, 15, 30, 40]
    assert [row["environment_step"] for row in rows] == [60, 75, 90, 100]
    assert {row["mean_length"] for row in rows} == {200.0}
    assert {row["task"] for row in rows} == {"Pendulum-v1"}
    assert {row["seed"] for row in rows} == {0}
    times = [row["wall_time"] for row in rows]
    assert times == sorted(times)
    assert all(-2000 < row["mean_return"] < 0 for row in rows)
    settings = json.loads((pendulum / "config.json").read_text())["settings"]
    assert settings["hidden_dim"] == 16
    assert settings["noise_steps"] == preset_config("quick").noise_steps


def test_closing_lines_compare_scores_and_name_what_to_run(
    capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = "train InvertedPendulum-v5 --action-bounds rescale --total-steps 2"
    assert main([*arguments.split(), *TINY]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("InvertedPendulum-v5-alm-quick-s0-")
    rows = read_metrics(folder / "metrics.csv")
    text = capsys.readouterr().out
    words = [line.rsplit(maxsplit=1) for line in text.splitlines() if line[:2] == "  "]
    scores = {row[0].strip(): row[1] for row in words if len(row) == 2}
    assert float(scores["random policy"]) >= 1
    assert float(scores["standing still"]) >= 1
    assert scores["untrained agent"] == f"{rows[0]['mean_return']:.1f}"
    assert scores["trained agent"] == f"{rows[-1]['mean_return']:.1f}"
    for name in ("Device  cpu", "encoder", "classifier", "Folder  runs/"):
        assert name in text
    relative = shlex.quote(str(Path("runs") / folder.name))
    for command in ("evaluate", "plot", "render"):
        assert f"alm-torchrl {command} {relative}" in text


def test_a_complete_run_is_left_alone(capsys, pendulum):
    def times():
        files = (path for path in pendulum.rglob("*") if path.name != ".lock")
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    arguments = "Pendulum-v1 --action-bounds rescale --total-steps 40"
    assert _train(pendulum, *arguments.split(), "--eval-interval", "15") == 0
    assert "complete: 40 training steps" in capsys.readouterr().out
    assert times() == before


def test_evaluate_takes_a_run_or_a_checkpoint(capsys, pendulum):
    assert main(["evaluate", str(pendulum), "--episodes", "2"]) == 0
    of_run = capsys.readouterr().out
    (checkpoint,) = (pendulum / "checkpoints").glob("checkpoint-*")
    assert main(["evaluate", str(checkpoint), "--episodes", "2"]) == 0
    assert capsys.readouterr().out == of_run
    assert "Pendulum-v1" in of_run
    assert str(checkpoint) in of_run
    for name in ("mean -", "standard deviation", "min -", "max -", "mean 200.0"):
        assert name in of_run
    assert main(["evaluate", str(pendulum), "--episodes", "2", "--seed", "5"]) == 0
    assert capsys.readouterr().out.replace("seed 5", "seed 0") != of_run
    assert "episodes: expected an integer >= 1" in _fails(
        capsys, "evaluate", pendulum, "--episodes", 0
    )


def test_evaluate_acts_with_the_trained_parameters(inverted):
    import torch

    from alm_torchrl.envs import make_env
    from alm_torchrl.runs.loading import build_loss, describe_spaces, load_policy

    env = make_env("InvertedPendulum-v5", action_bounds="rescale")
    settings = read_run(inverted[1]).config
    torch.manual_seed(settings.seed)
    loss = build_loss(settings.to_dict(), describe_spaces(env))
    untrained = loss.acting_policy().state_dict()
    trained = load_policy(inverted[1]).policy.state_dict()
    assert trained.keys() == untrained.keys()
    changed = [name for name in trained if not trained[name].equal(untrained[name])]
    assert any(name.startswith("module.0") for name in changed)
    assert any(name.startswith("module.1") for name in changed)
    (std,) = [value for name, value in trained.items() if name.endswith(".std")]
    assert std.item() < 1.0


def test_a_loaded_policy_acts_in_gymnasium_and_in_torchrl(pendulum):
    import gymnasium
    import torch
    from tensordict import TensorDict

    from alm_torchrl import load_policy, make_env

    policy = load_policy(pendulum)
    env = gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1.0, 1.0)
    observation, _ = env.reset(seed=0)
    for _ in range(3):
        observed = torch.as_tensor(observation, dtype=torch.float32)
        action = policy(TensorDict(observation=observed))["action"].numpy()
        observation, *_ = env.step(action)
    rollout = make_env("Pendulum-v1", action_bounds="rescale").rollout(5, policy)
    assert rollout["action"].shape == (5, 1)
    assert not rollout["action"].requires_grad

    # The latent is sampled in both, the action's noise in one only.
    exploring = load_policy(pendulum, deterministic=False)
    best = load_policy(pendulum / "checkpoints" / "best")
    seen = TensorDict(observation=torch.zeros(512, 3))
    actions = [p(seen.clone())["action"] for p in (policy, exploring, best)]
    assert actions[1].std() > actions[0].std()
    assert actions[1].max() <= 1
    assert actions[2].shape == (512, 1)


def test_plot_overlays_seeds(capsys, tmp_path, inverted):
    output = tmp_path / "two seeds.png"
    folders = [str(folder) for folder in inverted]
    assert main(["plot", *folders, "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    assert output.read_bytes()[:4] == b"\x89PNG"
    message = _fails(capsys, "plot", *folders, "--output", tmp_path / "a.txt")
    assert "'txt' is not supported" in message


def _can_draw():
    try:
        context = mujoco.GLContext(64, 64)
    except Exception:
        return False
    context.free()
    return True


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_render_films_without_a_display(capsys, tmp_path, inverted, suffix):
    if not _can_draw():
        pytest.skip("MuJoCo finds no OpenGL to draw with")
    import imageio.v3

    output = tmp_path / f"a film.{suffix}"
    arguments = ["render", str(inverted[0]), "--output", str(output), "--steps", "3"]
    assert main(arguments) == 0
    assert str(output) in capsys.readouterr().out
    frames = np.asarray(imageio.v3.imread(output))
    assert 2 <= len(frames) <= 4
    assert frames.std() > 1
    assert frames.shape[1] >= 200


def test_render_knows_its_formats(capsys, tmp_path, inverted):
    message = _fails(capsys, "render", inverted[0], "--output", tmp_path / "film.avi")
    assert ".gif or .mp4" in message


def test_a_task_may_be_in_a_module_in_the_working_directory(tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    (here / "own_tasks.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n"
        "class Own(PendulumEnv):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "gymnasium.register('Own-v0', Own, max_episode_steps=9)\n"
    )
    # An installed command finds its own folder on the path, not the working directory.
    script = tmp_path / "alm-torchrl"
    script.write_text("from alm_torchrl.cli import main\nraise SystemExit(main())\n")
    train = ["train", "own_tasks:Own-v0", *RESCALE, *TINY, "--total-steps", "3"]

    def run(*command):
        return subprocess.run(
            [sys.executable, script, *command],
            cwd=here,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=False,
        )

    trained = run(*train, "--run-dir", "run")
    assert trained.returncode == 0, trained.stderr
    assert "length      mean 9.0" in run("evaluate", "run").stdout
    filmed = run("render", "run")
    assert filmed.returncode == 2
    assert "error: own_tasks:Own-v0 cannot be filmed: " in filmed.stderr


OUTPUTS = {
    "plot": "--output a.png",
    "render": "--output a.gif",
    "diagnose": "--output a",
    "reproduce": "fig5a --scale smoke --output a",
    "bench": "--json a.json",
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_where_nothing_can_be_written_nothing_is_computed(
    capsys, tmp_path, inverted, monkeypatch, command
):
    run = [inverted[0]] if command in ("plot", "render", "diagnose") else []
    monkeypatch.chdir(tmp_path)
    arguments = OUTPUTS[command].split()
    with monkeypatch.context() as context:
        # The super-user may write anywhere, so the permission is taken like this.
        context.setattr(os, "access", lambda *_: False)
        message = _fails(capsys, command, *run, *arguments)
    name = arguments[-2].removeprefix("--")
    assert f"{name}: expected a place that can be written to" in message
    (tmp_path / "file").touch()
    arguments[-1] = f"file/{arguments[-1]}"
    assert "file' is a file" in _fails(capsys, command, *run, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_tasks_lists_the_papers(capsys):
    assert main(["tasks"]) == 0
    text = capsys.readouterr().out
    for task in ("HalfCheetah-v5", "T-Ant-v5", "T-Humanoid-v5", "Pendulum-v1"):
        assert task in text
    assert max(map(len, text.splitlines())) <= 80


def test_divergence_names_the_term_and_keeps_the_curve(capsys, tmp_path):
    arguments = ["InvertedPendulum-v5", *RESCALE, "--total-steps", "9", "--lr", "1e30"]
    with pytest.raises(SystemExit) as stop:
        _train(tmp_path, *arguments, "--logger", "none")
    assert stop.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "alm-torchrl: error: training diverged: loss_" in message
    assert str(tmp_path) in message
    assert [row["training_step"] for row in read_run(tmp_path).metrics] == [0]
    assert (tmp_path / "learning_curve.png").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_is_saved_and_says_how_to_continue(capsys, tmp_path, number):
    folder = tmp_path / "stopped run"
    code = "import sys; from alm_torchrl.cli import main; sys.exit(main())"
    arguments = ["train", "InvertedPendulum-v5", *RESCALE]
    arguments += ["--total-steps", "1000000", "--eval-interval", "5", *TINY]
    arguments += ["--logger", "none"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--run-dir", str(folder)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = folder / "metrics.csv"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file() and len(metrics.read_text().splitlines()) > 2:
            break
        time.sleep(0.1)
    assert "in use" in _fails(capsys, "train", "--resume", folder)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    command = f"alm-torchrl train --resume {shlex.quote(str(folder))}"
    assert f"Continue with: {command}" in out
    run = read_run(folder)
    assert [row["training_step"] for row in run.metrics[:2]] == [0, 5]
    assert (folder / "learning_curve.png").stat().st_size > 1000
    assert main(["evaluate", str(folder), "--episodes", "1"]) == 0
    text = capsys.readouterr().out
    (newest,) = (folder / "checkpoints").glob("checkpoint-*")
    assert str(newest) in text
    steps = int(newest.name.partition("-")[2]) - 60 + 3
    assert main([*shlex.split(command)[1:], "--total-steps", str(steps)]) == 0
    assert f"Continues from {newest}" in capsys.readouterr().out
    assert read_run(folder).metrics[-1]["training_step"] == steps
