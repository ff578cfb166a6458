"""The diagnose command: what it writes is what the library measures."""

from __future__ import annotations

import csv
import re
import shutil

import matplotlib.image
import pytest
import torch
from tensordict import TensorDict
from torch.utils.tensorboard import SummaryWriter
from torchrl.envs import TransformedEnv

from alm_torchrl.analysis import (
    bias_summary,
    bound_bias,
    latent_rollout,
    latent_statistics,
    record_transitions,
)
from alm_torchrl.analysis.figures import TERMS, plot_bias
from alm_torchrl.cli import main
from alm_torchrl.envs import make_env
from alm_torchrl.functional import floored_log
from alm_torchrl.objectives.variants import Logarithms
from alm_torchrl.runs import diagnose as diagnosing
from alm_torchrl.runs import loading
from alm_torchrl.runs.diagnose import read_logged

TASK = "InvertedPendulum-v5"
TINY = [
    *("--warmup-steps", "60", "--batch-size", "8", "--latent-dim", "4"),
    *("--hidden-dim", "16", "--model-hidden-dim", "16", "--eval-episodes", "1"),
    *("--device", "cpu", "--threads", "1", "--action-bounds", "rescale"),
    *("--checkpoint-interval", "30", "--keep-checkpoints", "9"),
    *("--log-interval", "5", "--dynamics-noise", "0.01", "--horizon", "2"),
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


def assert_drawn(path):
    image = matplotlib.image.imread(path)
    assert image.shape[1] >= 900
    assert 0.01 < (image[..., :3] < 0.9).any(-1).mean() < 0.5


def test_tables_hold_what_the_library_measures(run, env, tmp_path, capsys):
    assert diagnose(run, tmp_path, "--pairs", "60", "--steps", "3", "--seed", "2") == 0
    text = capsys.readouterr().out
    loss = loading.load_loss(run)
    pairs = bound_bias(env, loss, horizon=2, pairs=60, seed=2)
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
        assert_drawn(tmp_path / name)
    for path in tmp_path.iterdir():
        assert str(path) in text


def test_terms_are_those_that_were_logged(run, tmp_path, capsys):
    assert diagnose(run, tmp_path, "--which", "terms") == 0
    logged = read_logged(run)
    assert set(TERMS) < set(logged)
    for name in ("kl", "loss_qvalue", "eval/return"):
        table = [row for row in rows(tmp_path / "terms.csv") if row[name]]
        assert [float(row[name]) for row in table] == logged[name]["value"].tolist()
        steps = [int(row["environment_step"]) for row in table]
        assert steps == logged[name]["step"].tolist()
        assert [int(row["training_step"]) + 60 for row in table] == steps
    first, last = logged["kl"]["value"][[0, -1]].tolist()
    assert f"{first:10.4g} {last:10.4g}" in capsys.readouterr().out


def test_history_covers_every_checkpoint(run, env, tmp_path):
    assert diagnose(run, tmp_path, "--which", "history", "--pairs", "20") == 0
    table = rows(tmp_path / "bias_history.csv")
    assert [int(row["training_step"]) for row in table[::6]] == [0, 30, 40]
    oldest, *_ = sorted((run / "checkpoints").glob("checkpoint-*"))
    assert oldest.name.endswith("030")  # and another one at 60, both in the warm-up
    pairs = bound_bias(env, loading.load_loss(oldest), horizon=2, pairs=20)
    first = bias_summary(pairs)["bound", "overall", "mean"].item()
    assert first in [float(row["mean"]) for row in table[:6]]
    assert (tmp_path / "bias_history.png").is_file()


def test_a_run_without_logs_skips_the_terms(run, tmp_path, capsys):
    silent = tmp_path / "silent run"
    newest = "checkpoints/checkpoint-000000000100"
    shutil.copytree(run / newest, silent / newest)
    with pytest.raises(SystemExit):
        diagnose(silent, tmp_path / "out", "--which", "terms")
    assert f"{silent} logged nothing" in capsys.readouterr().err
    arguments = ["--which", "terms", "statistics", "--pairs", "10"]
    assert diagnose(silent, tmp_path / "out", *arguments) == 0
    text = capsys.readouterr().out
    assert "logged nothing" in text
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
    pairs = bound_bias(env, loading.load_loss(sac_run), pairs=20)
    assert column(tmp_path / "bias.csv", "qvalue") == pairs["qvalue"].tolist()
    assert "bound" not in rows(tmp_path / "bias.csv")[0]
    table = rows(tmp_path / "bias_history.csv")
    assert [int(row["training_step"]) for row in table] == [0, 0, 0, 10, 10, 10]
    assert {row["estimate"] for row in table} == {"qvalue"}
    overall = bias_summary(pairs)["qvalue", "overall", "mean"].item()
    (last,) = (row for row in table[3:] if row["bias"] == "overall")
    assert float(last["mean"]) == overall
    for name in ("bias.png", "bias_history.png"):
        assert_drawn(tmp_path / name)


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
    assert logged["step"].tolist() == [*range(8)]
    assert logged["value"].tolist() == [0, 1, 2, 3, 4, 10, 12, 14]


def test_what_is_compared_is_said(run, tmp_path, capsys, monkeypatch):
    def changed(path):
        loss = loading.load_loss(path)
        loss.logarithms, loss.reward_transform = Logarithms("bound"), floored_log
        return loss

    monkeypatch.setattr(diagnosing, "load_loss", changed)
    assert diagnose(run, tmp_path, "--which", "bias", "--pairs", "2") == 0
    text = capsys.readouterr().out
    assert "Returns: of rewards after floored_log, as the agent learns them." in text
    assert "The bound of logarithms L stands as exp(L) / (1 - gamma)" in text


def test_an_error_in_closing_costs_nothing(run, tmp_path, capsys, monkeypatch):
    def fails(env, **kwargs):
        raise RuntimeError("the simulator hangs")

    monkeypatch.setattr(TransformedEnv, "close", fails)
    with pytest.raises(RuntimeError, match="the simulator hangs"):
        diagnose(run, tmp_path, "--which", "bias", "--pairs", "2")
    assert str(tmp_path / "bias.png") in capsys.readouterr().out


def test_returns_of_zero_can_be_drawn(tmp_path):
    zero = torch.zeros(3, dtype=torch.float64)
    pairs = TensorDict(monte_carlo=zero, bound=zero + 1, qvalue=zero, batch_size=[3])
    assert_drawn(plot_bias(pairs, "zero", tmp_path / "bias.png"))


@pytest.mark.parametrize(
    ("agent", "arguments", "expected"),
    [
        ("run", ["--pairs", "1"], "pairs: expected an integer >= 2, got 1"),
        ("run", ["--which", "rollout", "--steps", "0"], "steps: .* >= 1, got 0"),
        ("run/checkpoints/best", ["--which", "history"], "a run folder.*got .*best"),
        ("sac_run", [], "which: expected some of bias, history for a run of sac"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(
    request, tmp_path, capsys, agent, arguments, expected
):
    fixture, _, inner = agent.partition("/")
    with pytest.raises(SystemExit) as stop:
        diagnose(request.getfixturevalue(fixture) / inner, tmp_path / "out", *arguments)
    assert stop.value.code == 2
    assert re.search(expected, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "out").exists()
