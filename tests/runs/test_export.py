"""Exported policies: they act as the policy does, elsewhere, or are not written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import NormalizeObservation, RescaleAction
from tensordict import TensorDict

from alm_torchrl import VerifiedCheckpoint, load_policy, make_env
from alm_torchrl.envs import Normalizers
from alm_torchrl.runs import export
from alm_torchrl.runs.agents import build_loss, describe_spaces
from alm_torchrl.runs.export import MeanPolicy, export_policy
from tests.runs.small_runs import command, refused

EXAMPLE = Path(__file__).parents[2] / "examples" / "act_onnx.py"
SETTINGS = {
    "task": "Pendulum-v1",
    "action_bounds": "rescale",
    "max_episode_steps": 20,
    "latent_dim": 8,
    "hidden_dim": 8,
    "model_hidden_dim": 8,
}
VARIANTS = [
    {"normalize_observations": True},
    {"encoder": "identity"},
    {"entropy": True, "layer_norm": True},
    {"latent": "layernorm"},
    {"latent": "simnorm"},
    {"latent": "rms", "latent_layers": 1},
]
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
path, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(path, run_name="__main__")
"""


def saved(folder, **settings):
    """A checkpoint of networks whose weights and moments are no initial ones."""
    settings = SETTINGS | settings
    spaces = {"observation_dim": 3, "action_low": [-0.5], "action_high": [1.0]}
    torch.manual_seed(0)
    loss = build_loss(settings, spaces)
    if settings.get("normalize_observations"):
        rows = TensorDict(observation=torch.randn(64, 3) * 2 + 1, batch_size=[64])
        loss.observe(rows.set("action", torch.zeros(64, 1)))
    for parameter in loss.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    metadata = {"settings": settings, "spaces": spaces}
    return VerifiedCheckpoint(loss_module=loss).save(folder / "one", metadata=metadata)


def means(checkpoint, observation):
    """The action by the plain networks, without TensorDict or distributions."""
    policy = load_policy(checkpoint)
    sampler, actor = policy.policy.module
    latent, _ = sampler.module.module[0].module(observation)
    action, *_ = actor.module[0].module(latent)
    return action.clamp(-0.5, 1.0).detach()


def mean_policy(checkpoint):
    sampler, actor = load_policy(checkpoint).policy.module
    return MeanPolicy(
        sampler.module, actor, torch.tensor([-0.5]), torch.tensor([1.0])
    ).requires_grad_(False)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_mean_policy_is_made_of_means(settings, tmp_path):
    checkpoint = saved(tmp_path, **settings)
    observation = torch.randn(50, 3)
    action = mean_policy(checkpoint)(observation)
    torch.testing.assert_close(action, means(checkpoint, observation))
    assert action.std() > 0.01
    acted = load_policy(checkpoint)(TensorDict(observation=observation, batch_size=50))
    same = torch.allclose(acted["action"], action)
    # Bounded latents have no noise: there the policy's samples are the means.
    assert same == ("latent" in settings)


def check_export(checkpoint, output):
    assert export_policy(checkpoint, output, seed=1) <= 1e-5
    observation = torch.randn(7, 3)
    expected = means(checkpoint, observation).numpy()
    if output.suffix == ".pt2":
        notes = {"notes.json": ""}
        program = torch.export.load(output, extra_files=notes)
        got = program.module()(observation).numpy()
        notes = json.loads(notes["notes.json"])
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(output)
        (got,) = session.run(["action"], {"observation": observation.numpy()})
        stored = session.get_modelmeta().custom_metadata_map
        notes = {name: json.loads(text) for name, text in stored.items()}
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert notes == {
        "task": "Pendulum-v1",
        "action_bounds": "rescale",
        "max_episode_steps": 20,
        "latent": "mean",
    }


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_an_exported_file_is_the_mean_policy(ending, tmp_path):
    if ending == "onnx":
        pytest.importorskip("onnxruntime")
    output = tmp_path / "new folder" / f"policy.{ending}"
    check_export(saved(tmp_path, **VARIANTS[0]), output)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


@pytest.mark.slow
@pytest.mark.parametrize("settings", VARIANTS[1:], ids=str)
@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_every_kind_of_network_is_exported(ending, settings, tmp_path):
    if ending == "onnx":
        pytest.importorskip("onnxruntime")
    check_export(saved(tmp_path, **settings), tmp_path / f"policy.{ending}")


def test_the_example_acts_without_torch(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    checkpoint = saved(tmp_path)
    policy = tmp_path / "policy.onnx"
    assert command("export", checkpoint, policy) == 0
    assert "mean action of the mean latent, within" in capsys.readouterr().out
    words = [policy, "--episodes", "1", "--seed", "5"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, EXAMPLE, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    env = RescaleAction(
        gymnasium.make("Pendulum-v1", max_episode_steps=20),
        np.float32(-1.0),
        np.float32(1.0),
    )
    act, total = mean_policy(checkpoint), 0.0
    observation, _ = env.reset(seed=5)
    for _ in range(20):
        action = act(torch.as_tensor(observation)[None])[0].numpy()
        observation, reward, _, truncated, _ = env.step(action)
        total += reward
    assert truncated
    head, episode = done.stdout.splitlines()
    assert head == "Pendulum-v1, actions rescale"
    steps, result = episode.removeprefix("episode 0: ").split(" steps, return ")
    assert (steps, float(result)) == ("20", pytest.approx(total, abs=0.06))


def test_a_file_that_acts_otherwise_is_not_written(tmp_path, monkeypatch):
    write, read = export._FORMATS[".pt2"]

    def read_wrong(path):
        run = read(path)
        return lambda rows: run(rows) + 2e-5

    monkeypatch.setitem(export._FORMATS, ".pt2", (write, read_wrong))
    checkpoint, output = saved(tmp_path), tmp_path / "out" / "policy.pt2"
    with pytest.raises(ValueError, match=r"within 1e-05, got a difference of [12]"):
        export_policy(checkpoint, output)
    assert list(output.parent.iterdir()) == []


def test_mistakes_are_named_in_one_line(tmp_path, capsys, monkeypatch):
    checkpoint = saved(tmp_path)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "sac").mkdir()
    baseline = saved(tmp_path / "sac", agent="sac")
    old = tmp_path / "old.pt2"
    old.write_text("mine")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    before = sorted(tmp_path.iterdir())
    for run, output, expected in (
        (checkpoint, "policy.pth", "expected a name in .onnx or .pt2, got policy.pth"),
        (checkpoint, "old.pt2", "old.pt2, which exists"),
        (checkpoint, "a.onnx", "pip install 'alm_torchrl[export]'"),
        (tmp_path / "empty", "a.pt2", "empty has no usable checkpoint yet"),
        (tmp_path, "a.pt2", "neither a checkpoint nor a run folder"),
        (baseline, "a.pt2", "expected a run of the agent 'alm', got 'sac'"),
    ):
        line = refused(capsys, command, "export", run, tmp_path / output)
        assert line.startswith("alm-torchrl: error: ")
        assert expected in line
    assert sorted(tmp_path.iterdir()) == before
    assert old.read_text() == "mine"


def test_a_module_is_imported_with_trust_only(tmp_path, capsys):
    checkpoint = saved(tmp_path, task="some_module:Task-v0")
    line = refused(capsys, command, "export", checkpoint, tmp_path / "a.pt2")
    assert "some_module" in line
    assert "--trust" in line


def test_a_normalising_wrapper_is_not_exported(tmp_path):
    task = "NormalizedPendulum-v0"
    gymnasium.register(
        task,
        "gymnasium.envs.classic_control.pendulum:PendulumEnv",
        max_episode_steps=20,
        additional_wrappers=(NormalizeObservation.wrapper_spec(),),
    )
    try:
        env = make_env(task, action_bounds="rescale")
        settings = SETTINGS | {"task": task}
        spaces = describe_spaces(env)
        checkpoint = VerifiedCheckpoint(
            loss_module=build_loss(settings, spaces),
            normalizers=Normalizers(env),
        ).save(tmp_path / "one", metadata={"settings": settings, "spaces": spaces})
        with pytest.warns(UserWarning, match="NormalizeObservation, which is not exp"):
            export_policy(checkpoint, tmp_path / "policy.pt2")
    finally:
        del gymnasium.registry[task]
