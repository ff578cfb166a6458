"""Checkpoints that were damaged or changed: one line, nothing loaded or executed."""

from __future__ import annotations

import pickle
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from torchrl.checkpoint import CheckpointError

from alm_torchrl.training import replay_segments
from tests.training.tampering import (
    Poison,
    add,
    archive,
    as_dtype,
    drop,
    elsewhere,
    fifo,
    folder,
    in_place,
    longer,
    manifest,
    manifest_text,
    npy,
    put,
    record,
    schema,
    section,
    segment,
    state,
    zipped,
)
from tests.training.trainer_runs import Counter, build, differing, tensors, tiny_loss

LOSS, STEPPER = "loss_module", "trainer_module.optimization_stepper"
WEIGHT = "encoder_params.module.0.module.0.weight"
ADAM = ("optimizers", "model_loss")
MOMENTS = (*ADAM, "state", 0, "exp_avg")
LOSS_FILE = f"components/*-{LOSS}/state.npz"
SECTION = "alm_torchrl"
HUGE = {"descr": "<f8", "fortran_order": False, "shape": (10**12,)}

# Name: what is done, and what the message says. The first 13 run always.
TAMPERED = {
    "optimizer of other shapes": (
        state(STEPPER, put(*MOMENTS, value=torch.zeros(8, 9))),
        rf"{WEIGHT}\.exp_avg: expected torch.float32 \[8, 2\], got .* \[8, 9\]",
    ),
    "rows outside of the checkpoint": (
        state("replay_buffer", put("segments", 0, 0, value="/tmp/rows-000000.npz")),
        "expected the name of a segment, got '/tmp/rows",
    ),
    "cursor below zero": (
        state("replay_buffer", put("cursor", value=-1)),
        "replay.npz: .* got written=22, stored=22, cursor=-1",
    ),
    "archive that expands": (
        archive(lambda _: zipped([("schema.npy", bytes(10**7))], zipfile.ZIP_DEFLATED)),
        r"state.npz .*its members are compressed or exceed its \d+ bytes",
    ),
    "deeply nested schema": (
        schema('{"list":[' * 20_000 + "1" + "]}" * 20_000),
        "state.npz .*RecursionError",
    ),
    "deeply nested manifest": (
        manifest_text('{"a":' * 100_000 + "1" + "}" * 100_000),
        "no readable manifest: RecursionError",
    ),
    "manifest without metadata": (
        manifest(drop("metadata")),
        "manifest.json is malformed: .*metadata: expected an object, got None",
    ),
    "name to be looked up": (
        schema({"kind": "torch_dtype", "value": "testing"}),
        "state.npz .*expected a value, got",
    ),
    "file that is not in the manifest": (
        add(f"components/*-{LOSS}/new.npz"),
        "new.npz is not in the manifest",
    ),
    "best score that is a string": (
        state("trainer_module.best_checkpoint", put("best", value="high")),
        r"state.best: expected float, got str|state.best: expected None, got str",
    ),
    "another adapter": (record(LOSS, adapter="torchrl.state_dict"), "incompatible"),
    "pickle in an archive": (
        archive(lambda _: zipped([("schema.npy", npy(np.array([Poison()])))])),
        "expected 8 bytes of object",
    ),
    "archive that is a pickle": (archive(lambda _: pickle.dumps(Poison())), "BadZip"),
    # -- files
    "longer file": (
        in_place(LOSS_FILE, lambda f: f.write_bytes(f.read_bytes() + b"x")),
        "state.npz is damaged: expected",
    ),
    "missing folder": (
        in_place(f"components/*-{LOSS}", shutil.rmtree),
        "cannot be read",
    ),
    "pipe": (in_place(LOSS_FILE, fifo), "is no file"),
    "folder as file": (in_place(LOSS_FILE, folder), "is no file"),
    "link to a file": (elsewhere(LOSS_FILE), "is no file of the checkpoint"),
    "link to a folder": (elsewhere(f"components/*-{LOSS}"), "is no file of the check"),
    "link to all folders": (elsewhere("components"), "is no file of the checkpoint"),
    # -- manifest
    "no manifest": (in_place("manifest.json", lambda f: f.unlink()), "no readable"),
    "manifest that is a pipe": (in_place("manifest.json", fifo), "no readable"),
    "manifest that is no JSON": (manifest_text("{"), "no readable manifest"),
    "manifest of bytes": (
        in_place("manifest.json", lambda f: f.write_bytes(b"\xff\xfe")),
        "no readable manifest",
    ),
    "manifest that is a list": (manifest_text("[]"), "not written by alm_torchrl"),
    "manifest with a name twice": (
        in_place(
            "manifest.json",
            lambda f: f.write_text('{"format": 1,' + f.read_text()[1:]),
        ),
        "no readable manifest: .*a name occurs twice",
    ),
    "manifest of numbers too long": (
        manifest_text('{"a": ' + "9" * 5000 + "}"),
        "no readable manifest",
    ),
    "manifest changed": (
        in_place(
            "manifest.json",
            lambda f: f.write_text(f.read_text().replace("directory", "dirty")),
        ),
        "manifest.json is damaged: expected SHA-256",
    ),
    "metadata of another type": (
        manifest(put("metadata", value=[])),
        "metadata: expected an object",
    ),
    "older format": (section(format_version=1), "version 1; .* reads version"),
    "format of another type": (section(format_version="2"), "format version '2'"),
    "digest of another manifest": (
        in_place(
            "manifest.json",
            lambda f: f.write_text(f.read_text().replace('sha256": "', 'sha256": "x')),
        ),
        "manifest.json is damaged: expected SHA-256 x",
    ),
    "files of another type": (section(files=[]), "malformed"),
    "section of another type": (
        in_place(
            "manifest.json",
            lambda f: f.write_text(f.read_text().replace('"alm_torchrl":', '"x":')),
        ),
        "was not written by alm_torchrl",
    ),
    "format of somebody else": (manifest(put("format", value="x")), "malformed"),
    "format from the future": (manifest(put("format_version", value=9)), "malformed"),
    "components of another type": (manifest(put("components", value=[])), "malformed"),
    "record of another type": (manifest(put("components", LOSS, value=3)), "malformed"),
    "record without path": (manifest(drop("components", LOSS, "path")), "malformed"),
    "absolute path": (record(LOSS, path="/tmp"), "malformed"),
    "path upwards": (record(LOSS, path="../x"), "malformed"),
    "path with backslashes": (record(LOSS, path="a\\..\\b"), "malformed"),
    "file upwards": (record(LOSS, files=["../../x"]), "malformed"),
    "file twice": (record(LOSS, files=["state.npz"] * 2), "a file twice|different"),
    "file of a number": (record(LOSS, files=[1]), "malformed"),
    "file not listed": (record(LOSS, files=[]), "name different files"),
    "file without digest": (
        manifest(lambda m: m["alm_torchrl"]["files"].popitem()),
        "name different files",
    ),
    "size of another type": (
        section(files={"a": ["1", "x"]}),
        "a: expected size and digest, got",
    ),
    "size below zero": (
        manifest(
            lambda m: [f.__setitem__(0, -1) for f in m[SECTION]["files"].values()]
        ),
        "expected -1 bytes",
    ),
    "component left out": (
        manifest(
            lambda m: m[SECTION]["files"].pop(
                m["components"].pop(LOSS)["path"] + "/state.npz"
            )
        ),
        "has no component 'loss_module'",
    ),
    "adapter of a replay": (record(LOSS, adapter="alm_torchrl.replay"), "not fit"),
    "adapter from the future": (record(LOSS, adapter_version=9), "incompatible"),
    # -- archives
    "archive that is an array": (archive(lambda _: npy(np.arange(3))), "BadZip"),
    "member twice": (
        archive(lambda a: zipped([("schema.npy", npy(a["schema"]))] * 2)),
        "occurs twice",
    ),
    "no schema": (archive(lambda _: zipped([("a.npy", npy(np.ones(2)))])), "'schema'"),
    "huge array": (
        archive(lambda _: zipped([("schema.npy", npy(np.ones(2), **HUGE))])),
        "expected 8000000000000 bytes of float64, got 16",
    ),
    "array of text": (
        archive(lambda _: zipped([("schema.npy", npy(np.array(["x"])))])),
        "expected 4 bytes of <U1",
    ),
    "array without name": (schema({"dict": []}, a=np.ones(2)), "does not name a"),
    "array used twice": (
        schema({"list": [{"array": "a"}, {"array": "a"}]}, a=np.ones(2)),
        "KeyError: 'a'",
    ),
    "tensor nowhere": (
        schema({"tensor": "a", "device": "meta"}, a=np.ones(2)),
        "expected a device, got 'meta'",
    ),
    "name twice in a state": (schema({"dict": [["a", 1], ["a", 2]]}), "occurs twice"),
    "schema of another type": (schema({"dict": 3}), "expected a value"),
    # -- components
    "parameter missing": (state(LOSS, drop(WEIGHT)), "missing are .*encoder"),
    "parameter not expected": (state(LOSS, put("x", value=1)), r"are \['x'\]"),
    "parameter of another shape": (
        state(LOSS, put(WEIGHT, value=longer)),
        r"expected torch.float32 \[8, 2\], got torch.float32 \[9, 2\]",
    ),
    "parameter of another dtype": (
        state(LOSS, put(WEIGHT, value=as_dtype(torch.float64))),
        "expected torch.float32 .* got torch.float64",
    ),
    "parameter that is a number": (state(LOSS, put(WEIGHT, value=3)), "got int"),
    "loss of another type": (state(LOSS, lambda _: [1]), "got a list"),
    "optimizer of another dtype": (
        state(STEPPER, put(*MOMENTS, value=as_dtype(torch.float16))),
        "got torch.float16",
    ),
    "optimizer without moments": (state(STEPPER, drop(*MOMENTS)), "exp_avg"),
    "optimizer step of another shape": (
        state(STEPPER, put(*ADAM, "state", 0, "step", value=torch.ones(4))),
        "step: expected",
    ),
    "optimizer of more parameters": (
        state(STEPPER, put(*ADAM, "state", 99, value={})),
        "expected no parameter 99",
    ),
    "optimizer with another option": (
        state(STEPPER, put(*ADAM, "param_groups", 0, "lr", value="fast")),
        "lr: expected float, got str",
    ),
    "optimizer missing": (state(STEPPER, drop("optimizers", "actor_loss")), "actor"),
    "count of updates": (state(STEPPER, put("count", value="7")), "expected int"),
    "failure of no term": (
        state(STEPPER, put("failure", value=torch.tensor([1, 99]))),
        "stepper.failure",
    ),
    "Python generator": (state("rng", put("python", 1, value=(1, 2))), "625 values"),
    "Python generator's words": (
        state("rng", put("python", 1, 3, value=-1)),
        "rng.*OverflowError|rng.*ValueError|rng.*negative",
    ),
    "NumPy generator": (state("rng", put("numpy", 2, value=10**6)), "position 1000000"),
    "PyTorch generator": (state("rng", put("torch_cpu", value=longer)), "uint8"),
    "generator missing": (state("rng", drop("numpy")), "numpy"),
    "carrier of another shape": (
        state("collector", put("carrier", "observation", value=longer)),
        r"carrier.observation: expected torch.float32 \[2\]",
    ),
    "carrier without observation": (
        state("collector", drop("carrier", "observation")),
        "carrier.observation: expected torch.float32",
    ),
    "digests of half a step": (
        state("collector", put("episodes", 0, "digests", value=longer)),
        "episode.digests",
    ),
    "actions of another shape": (
        state("collector", put("episodes", 0, "actions", 0, value=longer)),
        r"episode.actions: expected shapes",
    ),
    "seed of another type": (
        state("collector", put("episodes", 0, "seed", value="x")),
        "episode.seed: expected int",
    ),
    "two episodes": (
        state("collector", put("episodes", value=lambda e: e * 2)),
        "expected 2 that repeat episodes, got 1",
    ),
    "trajectories": (
        state("collector", put("traj_pool", "traj_id", value="x")),
        "traj_id: expected torch",
    ),
    "cursor too large": (
        state("replay_buffer", put("cursor", value=23)),
        "cursor=23",
    ),
    "written below zero": (state("replay_buffer", put("written", value=-5)), "n=-5"),
    "more rows than written": (state("replay_buffer", put("stored", value=30)), "=30"),
    "another capacity": (
        state("replay_buffer", put("capacity", value=10**9)),
        "saved capacity 1000000000, got 100",
    ),
    "capacity of another type": (
        state("replay_buffer", put("capacity", value=1e2)),
        "capacity: expected int",
    ),
    "rows upwards": (
        state("replay_buffer", put("segments", 0, 0, value="../rows-000000.npz")),
        "expected the name of a segment",
    ),
    "segment twice": (
        state("replay_buffer", put("segments", 1, 0, value="rows-000000.npz")),
        "expected the name of a segment",
    ),
    "segment with a gap": (
        state("replay_buffer", put("segments", 1, 1, value=9)),
        "expected row 8, got row 9",
    ),
    "segment that ends before": (
        state("replay_buffer", put("segments", 1, 2, value=8)),
        "has the rows 8 to 8",
    ),
    "segment of another type": (
        state("replay_buffer", put("segments", 1, value="x")),
        "segment: expected a list",
    ),
    "last row": (state("replay_buffer", put("sampler", "last_row", value=100)), "100"),
    "index without cursor": (state("replay_buffer", drop("cursor")), "cursor"),
    "index of another type": (state("replay_buffer", lambda _: [1]), "got a list"),
    "rows of another dtype": (
        segment(1, put("action", value=as_dtype(torch.float64))),
        "rows-000001.npz.action: expected torch.float32",
    ),
    "rows of another shape": (
        segment(1, put("action", value=lambda a: a[:, :1])),
        "rows-000001.npz.action: expected torch.float32",
    ),
    "rows left out": (segment(0, put("action", value=lambda a: a[1:])), "8 rows"),
    "rows without a key": (segment(1, drop("next", "done")), "done"),
    "rows of text": (segment(0, put("action", value="x")), "rows"),
    "frames of another type": (
        state("trainer_state", put("collected_frames", value="x")),
        "collected_frames: expected int",
    ),
    "frames missing": (state("trainer_state", drop("collected_frames")), "collected"),
    "log of another type": (
        state("trainer_module.episode_log", lambda _: [1, 2]),
        "expected a mapping",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _short_segments():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay_segments, "SEGMENT_ROWS", 8)
        yield


def _trainer(seed, **options):
    env = Counter()
    return build(env, tiny_loss(env, seed), **options)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The last two checkpoints of a small run."""
    directory = tmp_path_factory.mktemp("run")
    options = {"eval_env": Counter(), "eval_interval": 5, "eval_episodes": 1}
    _trainer(0, checkpoint_dir=directory, checkpoint_interval=10, **options).train()
    return sorted(directory.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def targets(saved, tmp_path_factory):
    """A new trainer, and one that has loaded the checkpoint before."""
    new, used = (
        _trainer(1, checkpoint_dir=tmp_path_factory.mktemp("target")) for _ in range(2)
    )
    used.load_from_file(saved[0])
    return [new, used]


def _everything(trainer):
    components = dict(trainer.checkpoint.components)
    buffer = components.pop("replay_buffer")
    state = {name: each.state_dict() for name, each in components.items()}
    if len(buffer):
        state["rows"] = buffer[:].to_dict()
    state["buffer"] = [buffer.writer.state_dict(), buffer.sampler.state_dict()]
    return tensors(state)


def _marks(name):
    return () if name in list(TAMPERED)[:13] else pytest.mark.exhaustive


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=_marks(name)) for name in TAMPERED]
)
def test_one_line_and_nothing_is_loaded_or_executed(
    name, saved, targets, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / saved[1].name
    shutil.copytree(saved[1], path)
    tamper, message = TAMPERED[name]
    tamper(path)
    for trainer in targets:
        before, modules = _everything(trainer), set(sys.modules)
        with pytest.raises(CheckpointError, match=message) as error:
            trainer.checkpoint.load(path, map_location="cpu")
        assert "\n" not in str(error.value)
        assert path.name in str(error.value)
        assert differing(_everything(trainer), before) == []
        assert set(sys.modules) == modules
    assert not (tmp_path / "executed").exists()


def test_the_checkpoint_itself_loads(saved, targets, tmp_path):
    path = tmp_path / saved[1].name
    shutil.copytree(saved[1], path)
    state("rng", lambda _: None)(path)  # Signed again, as the others are.
    trainer = _trainer(1, checkpoint_dir=tmp_path / "target")
    before = _everything(trainer)
    trainer.checkpoint.load(path, map_location="cpu")
    assert trainer.collected_frames == 22
    assert before.keys() != _everything(trainer).keys()
