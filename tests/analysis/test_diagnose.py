"""The diagnose command: what it writes is what the library measures."""

from __future__ import annotations

import csv
import shutil

import matplotlib.image
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch.utils.tensorboard import SummaryWriter

from alm_torchrl.analysis.bias import bias_summary, bound_bias
from alm_torchrl.analysis.figures import plot_bias
from alm_torchrl.analysis.logged import TERMS, read_logged
from alm_torchrl.analysis.recording import record_transitions
from alm_torchrl.analysis.rollouts import latent_rollout
from alm_torchrl.analysis.statistics import latent_statistics
from alm_torchrl.cli import main
from alm_torchrl.envs import make_env
from alm_torchrl.runs import loading

TASK = "InvertedPendulum-v5"
TINY = [
    *("--warmup-steps", "60", "--batch-size", "8", "--latent-dim", "4"),
    *("--hidden-dim", "16", "--model-hidden-dim", "16", "--eval-episodes", "1"),
    *("--device", "cpu", "--threads", "1", "--action-bounds", "rescale"),
    *("--checkpoint-interval", "30", "--keep-checkpoints", "9"),
    *("--log-interval", "5", "--dynamics-noise", "0.01"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a run"
    arguments = [TASK, *TINY, "--total-steps", "40", "--run-dir", str(folder)]
    assert main(["train", *arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def env():
    return make_env(TASK, action_bounds="rescale", dynamics_noise=0.01)


def diagnose(path, output, *arguments):
    return main(["diagnose", str(path), "--output", str(output), *arguments])


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(path, name):
    return [float(row[name]) for row in rows(path)]


def test_tables_hold_what_the_library_measures(run, env, tmp_path, capsys):
    assert diagnose(run, tmp_path, "--pairs", "60", "--steps", "3", "--seed", "2") == 0
    text = capsys.readouterr().out
    loss = loading.load_loss(run)
    pairs = bound_bias(env, loss, pairs=60, seed=2)
    for name in ("monte_carlo", "bound", "qvalue", "missing", "step"):
        assert column(tmp_path / "bias.csv", name) == pairs[name].tolist()
    summary = bias_summary(pairs)
    table = rows(tmp_path / "bias_summary.csv")
    assert len(table) == 6
    for row in table:
        assert row["training_step"] == "40"
        expected = summary[row["estimate"], row["bias"]]
        assert float(row["mean"]) == expected["mean"].item()
        assert float(row["std"]) == expected["std"].item()
    overall = summary["bound", "overall"]
    assert f"{overall['mean'].item():.3f} +- {overall['std'].item():.3f}" in text
    rollout = latent_rollout(env, loss, steps=3, seed=2)
    medians = column(tmp_path / "rollout.csv", "normalised_error_median")
    assert medians == rollout["normalised_error"].quantile(0.5, 0).tolist()
    batch = record_transitions(env, loss, transitions=60, seed=2)
    found = latent_statistics(loss, batch, seed=2)
    for row in rows(tmp_path / "statistics.csv"):
        assert float(row["value"]) == found[row["name"]].item()
    counts = column(tmp_path / "reliability.csv", "count")
    assert counts == found["reliability", "count"].tolist()
    assert "training step 40" in text
    assert "dynamics noise 0.01" in text
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {"bias.png", "rollout.png", "reliability.png", "terms.png"}
    for name in pictures:
        image = matplotlib.image.imread(tmp_path / name)
        assert image.shape[1] >= 900
        assert 0.01 < (image[..., :3] < 0.9).any(-1).mean() < 0.5
    for path in tmp_path.iterdir():
        assert str(path) in text


def test_terms_are_those_that_were_logged(run, tmp_path, capsys):
    assert diagnose(run, tmp_path, "--which", "terms") == 0
    logged = read_logged(run)
    assert set(TERMS) < set(logged)
    for name in ("kl", "loss_qvalue", "eval/return"):
        table = [row for row in rows(tmp_path / "terms.csv") if row[name]]
        assert [float(row[name]) for row in table] == logged[name].values.tolist()
        steps = [int(row["environment_step"]) for row in table]
        assert steps == logged[name].steps.tolist()
        assert [int(row["training_step"]) + 60 for row in table] == steps
    text = capsys.readouterr().out
    first, last = logged["kl"].values[[0, -1]]
    assert f"{first:10.4g} {last:10.4g}" in text


def test_history_covers_every_checkpoint(run, env, tmp_path, capsys):
    arguments = ["--which", "history", "--pairs", "20"]
    assert diagnose(run, tmp_path, *arguments) == 0
    table = rows(tmp_path / "bias_history.csv")
    steps = [int(row["training_step"]) for row in table[::6]]
    assert steps == [0, 30, 40]
    oldest, *_ = sorted((run / "checkpoints").glob("checkpoint-*"))
    assert oldest.name.endswith("030")  # and another one at 60, both in the warm-up
    pairs = bound_bias(env, loading.load_loss(oldest), pairs=20)
    first = bias_summary(pairs)["bound", "overall", "mean"].item()
    (cell,) = {
        row["mean"]
        for row in table[:6]
        if (row["estimate"], row["bias"]) == ("bound", "overall")
    }
    assert float(cell) == first
    assert (tmp_path / "bias_history.png").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        diagnose(oldest, tmp_path, *arguments)
    assert "expected a run folder for the history" in capsys.readouterr().err


def test_a_run_without_logs_is_said(run, tmp_path, capsys):
    (newest,) = (run / "checkpoints").glob("checkpoint-*100")
    silent = tmp_path / "silent run"
    shutil.copytree(newest, silent / "checkpoints" / newest.name)
    with pytest.raises(SystemExit):
        diagnose(silent, tmp_path / "out", "--which", "terms")
    message = capsys.readouterr().err
    assert f"{silent} logged nothing to TensorBoard" in message
    assert "--logger tensorboard" in message
    arguments = ["--which", "terms", "statistics", "--pairs", "10"]
    assert diagnose(silent, tmp_path / "out", *arguments) == 0
    text = capsys.readouterr().out
    assert "logged nothing to TensorBoard" in text
    assert "effective dimension" in text


@pytest.fixture(scope="module")
def sac_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sac"
    tiny = [*TINY, "--agent", "sac", "--total-steps", "10", "--run-dir", str(folder)]
    assert main(["train", TASK, *tiny]) == 0
    return folder


def test_bias_of_a_baseline(sac_run, env, tmp_path, capsys):
    arguments = ["--which", "bias", "history", "--pairs", "20"]
    assert diagnose(sac_run, tmp_path, *arguments) == 0
    text = capsys.readouterr().out
    assert "episodes, SAC" in text
    assert "Q(s, a)" in text
    assert "bound" not in text
    loss = loading.load_loss(sac_run)
    pairs = bound_bias(env, loss, pairs=20)
    assert column(tmp_path / "bias.csv", "qvalue") == pairs["qvalue"].tolist()
    assert "bound" not in rows(tmp_path / "bias.csv")[0]
    table = rows(tmp_path / "bias_history.csv")
    assert [int(row["training_step"]) for row in table] == [0, 0, 0, 10, 10, 10]
    assert {row["estimate"] for row in table} == {"qvalue"}
    overall = bias_summary(pairs)["qvalue", "overall", "mean"].item()
    (last,) = (row for row in table[3:] if row["bias"] == "overall")
    assert float(last["mean"]) == overall
    for name in ("bias.png", "bias_history.png"):
        image = matplotlib.image.imread(tmp_path / name)
        assert (image[..., :3] < 0.9).any(-1).mean() > 0.01


def test_baselines_have_no_latent_model(sac_run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        diagnose(sac_run, tmp_path / "out")
    message = " ".join(capsys.readouterr().err.split())
    assert "which: expected some of bias, history for a run of sac" in message
    assert not (tmp_path / "out").exists()


def test_loaded_losses_have_the_targets_of_the_run(run):
    loss = loading.load_loss(run)
    online, target = (
        getattr(loss, name).flatten_keys(".").to_dict()
        for name in ("encoder_params", "target_encoder_params")
    )
    distances = [(value - target[name]).abs().max() for name, value in online.items()]
    assert 0 < torch.stack(distances).max() < 0.1


def test_what_is_logged_again_replaces(tmp_path):
    for start, end, value in ((0, 10, 1.0), (5, 8, 2.0)):
        writer = SummaryWriter(tmp_path / "tensorboard", purge_step=start)
        for step in range(start, end):
            writer.add_scalar("kl", value * step, step)
        writer.close()
    (logged,) = read_logged(tmp_path).values()
    assert logged.steps.tolist() == [*range(8)]
    np.testing.assert_array_equal(logged.values, [0, 1, 2, 3, 4, 10, 12, 14])


def test_returns_of_zero_can_be_drawn(tmp_path):
    zero = torch.zeros(3, dtype=torch.float64)
    pairs = TensorDict(monte_carlo=zero, bound=zero + 1, qvalue=zero, batch_size=[3])
    image = matplotlib.image.imread(plot_bias(pairs, "zero", tmp_path / "bias.png"))
    assert (image[..., :3] < 0.9).any(-1).mean() > 0.01


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--pairs", "1"], "pairs: expected an integer >= 2, got 1"),
        (
            ["--which", "rollout", "--steps", "0"],
            "steps: expected an integer >= 1, got 0",
        ),
    ],
)
def test_mistakes_are_named(run, tmp_path, capsys, arguments, expected):
    with pytest.raises(SystemExit) as stop:
        diagnose(run, tmp_path, *arguments)
    assert stop.value.code == 2
    assert expected in " ".join(capsys.readouterr().err.split())
