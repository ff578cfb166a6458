"""Checkpoints: what they keep, what they share, and what they refuse."""

from __future__ import annotations

import errno
import json
import random
import resource
import shutil
import signal

import numpy as np
import pytest
import torch
from torchrl.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointRotation,
    GlobalRNGState,
)
from torchrl.data import (
    LazyTensorStorage,
    ListStorage,
    ReplayBuffer,
    TensorDictReplayBuffer,
)
from torchrl.data.replay_buffers.writers import TensorDictMaxValueWriter

from alm_torchrl import make_replay_buffer
from alm_torchrl.runs.loading import load_policy, usable_checkpoints
from alm_torchrl.training import replay_segments
from alm_torchrl.training.checkpoint import (
    RandomState,
    VerifiedCheckpoint,
    clear_leftovers,
)
from alm_torchrl.training.files import read_state, write_state
from tests.training.resume_runs import finish
from tests.training.trainer_runs import (
    Counter,
    Holder,
    build,
    differing,
    numbered_rows,
    tensors,
    tiny_loss,
)

# -- files -----------------------------------------------------------------------------


def test_any_state_comes_back_as_it_was(tmp_path):
    state = {
        "tensors": [
            torch.randn(2, 3).to(dtype)
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        ],
        "other": (torch.tensor(True), torch.arange(3), torch.empty(0), None, "x"),
        3: {"nan": float("nan"), "big": 2**127 + 1, "array": np.arange(4.0)},
        "python": random.getstate(),
        "transposed": torch.arange(6).reshape(2, 3).T,
    }
    write_state(tmp_path / "state.npz", state)
    back = read_state(tmp_path / "state.npz")
    assert back.keys() == state.keys()
    for one, other in zip(back["tensors"], state["tensors"], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    assert back["other"][3:] == (None, "x")
    assert back["other"][0].dtype == torch.bool
    assert torch.equal(back["transposed"], state["transposed"])
    assert back[3]["big"] == 2**127 + 1
    assert back["python"] == state["python"]
    assert isinstance(back[3]["array"], np.ndarray)
    with pytest.raises(TypeError, match="Foo"):
        write_state(tmp_path / "other.npz", {"x": type("Foo", (), {})()})


# -- damage ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two checkpoints of a small training run."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    env = Counter()
    trainer, _ = build(
        env, tiny_loss(env), checkpoint_dir=folder, checkpoint_interval=10
    )
    trainer.train()
    assert len(list(folder.iterdir())) == 2
    return folder


def _trainer(folder):
    env = Counter()
    return build(env, tiny_loss(env, seed=1), checkpoint_dir=folder)[0]


def _state(trainer):
    return tensors(trainer.loss_module.state_dict())


def test_every_file_is_checked_before_anything_is_loaded(checkpoints, tmp_path):
    shutil.copytree(checkpoints, tmp_path / "checkpoints")
    older, newest = sorted((tmp_path / "checkpoints").iterdir())
    trainer = _trainer(tmp_path / "checkpoints")
    before = _state(trainer)
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) >= 10
    for path in files:
        content = path.read_bytes()
        half = len(content) // 2
        flipped = bytearray(content)
        flipped[half] ^= 1
        for damaged, message in (
            (content[:half], rf"{len(content)} bytes, got {half}"),
            (bytes(flipped), r"SHA-256 \w{64}.*, got \w{64}"),
            (None, "cannot be read"),
        ):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            expected = newest.name if path.suffix == ".json" else message
            with pytest.raises(CheckpointError, match=expected):
                trainer.checkpoint.load(newest)
            with pytest.warns(UserWarning, match=newest.name):
                found = next(usable_checkpoints(tmp_path / "checkpoints"))
            assert found == older
            if damaged is None:
                path.touch()
        path.write_bytes(content)
    assert differing(_state(trainer), before) == []
    trainer.load_from_file(newest)
    assert differing(_state(trainer), before) != []


def test_damage_elsewhere_does_not_matter(checkpoints, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(min(checkpoints.iterdir()), path)
    (file,) = path.glob("components/*-loss_module/state.npz")
    file.unlink()
    VerifiedCheckpoint().verify(path, components=["collector"])
    with pytest.raises(CheckpointError, match="cannot be read"):
        VerifiedCheckpoint().verify(path)


def _edit_manifest(path, edit):
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_foreign_and_older_checkpoints_are_refused(tmp_path):
    holder = Holder({"x": 1})
    Checkpoint(part=holder).save(tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="not written by alm_torchrl"):
        VerifiedCheckpoint(part=holder).load(tmp_path / "foreign")
    VerifiedCheckpoint(part=holder).save(tmp_path / "older")

    def edit(manifest):
        manifest["alm_torchrl"]["format_version"] = 1

    _edit_manifest(tmp_path / "older", edit)
    with pytest.raises(CheckpointError, match=r"format version 1; .* reads version 2"):
        VerifiedCheckpoint(part=holder).load(tmp_path / "older")
    (tmp_path / "file").write_text("{}")
    for path in (tmp_path / "file", tmp_path / "nowhere", tmp_path):
        with pytest.raises(
            CheckpointError, match=r"no readable manifest|not a TorchRL"
        ):
            VerifiedCheckpoint(part=holder).load(path)


# -- replay ----------------------------------------------------------------------------


@pytest.fixture
def _short_segments(monkeypatch):
    monkeypatch.setattr(replay_segments, "SEGMENT_ROWS", 8)


def _segments(path):
    return {file.name: file for file in path.glob("components/*/rows-*.npz")}


@pytest.mark.usefixtures("_short_segments")
@pytest.mark.parametrize(
    ("written", "memmap"),
    [(1, False), (8, False), (30, True), (50, False), (51, True), (93, False)],
)
def test_a_buffer_comes_back_and_draws_the_same(written, memmap, tmp_path):
    buffer = make_replay_buffer(
        50,
        batch_size=6,
        horizon=1,
        memmap_dir=tmp_path / "one" if memmap else None,
        generator=torch.Generator().manual_seed(3),
    )
    for first in range(written):
        buffer.extend(numbered_rows(first, 1))
    buffer.sample()
    path = VerifiedCheckpoint(replay=buffer).save(tmp_path / "saved")
    other = make_replay_buffer(
        50,
        batch_size=6,
        horizon=1,
        memmap_dir=tmp_path / "other" if memmap else None,
        generator=torch.Generator(),
    )
    other.extend(numbered_rows(1000, 20))
    VerifiedCheckpoint(replay=other).load(path)
    for first in range(written, written + 60):
        assert len(other) == len(buffer)
        for key in ("observation", ("next", "done"), ("collector", "traj_ids")):
            assert torch.equal(other[:][key], buffer[:][key])
        one, two = (b.sample() for b in (buffer, other))
        assert torch.equal(one["slice", "observation"], two["slice", "observation"])
        assert torch.equal(
            one["transition", "observation"], two["transition", "observation"]
        )
        for each in (buffer, other):
            each.extend(numbered_rows(first, 1))


@pytest.mark.usefixtures("_short_segments")
def test_complete_segments_are_shared_and_outdated_ones_dropped(tmp_path):
    buffer = make_replay_buffer(20, horizon=1)
    checkpoint = VerifiedCheckpoint(replay=buffer)
    rotation = CheckpointRotation(tmp_path, keep_last=2)
    inodes = {}
    for step in range(0, 60, 6):
        buffer.extend(numbered_rows(step, 6))
        path = rotation.save(checkpoint, step=step)
        files = _segments(path)
        first, last = max(step + 6 - 20, 0) // 8, (step + 5) // 8
        assert sorted(files) == [f"rows-{n:06d}.npz" for n in range(first, last + 1)]
        for name, file in files.items():
            if (int(name[5:11]) + 1) * 8 <= step + 6:
                assert inodes.setdefault(name, file.stat().st_ino) == file.stat().st_ino
        fresh = make_replay_buffer(20, horizon=1)
        other = VerifiedCheckpoint(replay=fresh)
        other.load(path)
        assert torch.equal(fresh[:]["observation"], buffer[:]["observation"])
        if step == 30:
            # A run that continues goes on sharing.
            buffer, checkpoint = fresh, other
    assert len(inodes) == 7


@pytest.mark.usefixtures("_short_segments")
@pytest.mark.parametrize("reason", ["no links", "previous checkpoint removed"])
def test_without_links_segments_are_copied_or_written(reason, tmp_path, monkeypatch):
    buffer = make_replay_buffer(20, horizon=1)
    buffer.extend(numbered_rows(0, 16))
    checkpoint = VerifiedCheckpoint(replay=buffer)
    checkpoint.save(tmp_path / "one")
    if reason == "no links":

        def refuse(source, target):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr("os.link", refuse)
    else:
        shutil.rmtree(tmp_path / "one")
    path = checkpoint.save(tmp_path / "two")
    assert all(file.stat().st_nlink == 1 for file in _segments(path).values())
    fresh = make_replay_buffer(20, horizon=1)
    VerifiedCheckpoint(replay=fresh).load(path)
    assert torch.equal(fresh[:]["observation"], buffer[:]["observation"])


def test_buffers_that_do_not_fit_are_refused(tmp_path):
    buffer = make_replay_buffer(20, horizon=1)
    buffer.extend(numbered_rows(0, 5))
    path = VerifiedCheckpoint(replay=buffer).save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="saved capacity 20, got 30"):
        VerifiedCheckpoint(replay=make_replay_buffer(30, horizon=1)).load(path)
    with pytest.raises(TypeError, match=r"storage: expected a TensorStorage.*ListStor"):
        VerifiedCheckpoint(replay=ReplayBuffer(storage=ListStorage(5))).save(
            tmp_path / "a"
        )
    other = TensorDictReplayBuffer(
        storage=LazyTensorStorage(5), writer=TensorDictMaxValueWriter()
    )
    with pytest.raises(TypeError, match=r"writer: expected a RoundRobinWriter.*MaxVal"):
        VerifiedCheckpoint(replay=other).save(tmp_path / "b")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["saved"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda index: index["segments"].pop(0), "expected row 0, got row 4"),
        (
            lambda index: index.update(written=9, stored=9, cursor=9),
            "expected 9 rows, got 8",
        ),
        (lambda index: index["segments"].pop(), "expected 8 rows, got 4"),
        (lambda index: index["segments"][0].__setitem__(2, 3), "expected 3 rows"),
    ],
)
def test_another_count_of_rows_is_refused(break_it, message, tmp_path, monkeypatch):
    monkeypatch.setattr(replay_segments, "SEGMENT_ROWS", 4)
    buffer = make_replay_buffer(20, horizon=1)
    buffer.extend(numbered_rows(0, 8))
    path = VerifiedCheckpoint(replay=buffer).save(tmp_path / "saved")
    (folder,) = (path / "components").iterdir()
    index = read_state(folder / "replay.npz")
    break_it(index)
    (folder / "replay.npz").unlink()
    write_state(folder / "replay.npz", index)
    fresh = make_replay_buffer(20, horizon=1)
    with pytest.raises(ValueError, match=message):
        replay_segments.ReplayAdapter(lambda: None).load(fresh, folder)


def test_an_empty_buffer_is_saved_too(tmp_path):
    path = VerifiedCheckpoint(replay=make_replay_buffer(20)).save(tmp_path / "saved")
    buffer = make_replay_buffer(20)
    buffer.extend(numbered_rows(0, 5))
    VerifiedCheckpoint(replay=buffer).load(path)
    assert len(buffer) == 0


# -- generators ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draw", [random.random, np.random.rand, lambda: torch.rand(())]
)
def test_each_generator_goes_on(draw, tmp_path):
    checkpoint = VerifiedCheckpoint(rng=RandomState())
    path = checkpoint.save(tmp_path / "saved")
    expected = [draw() for _ in range(3)]
    draw()
    checkpoint.load(path)
    assert [draw() for _ in range(3)] == expected


def test_generators_of_absent_devices_are_left_out_with_a_warning(tmp_path):
    count = torch.cuda.device_count()
    saved = GlobalRNGState().state_dict()
    saved["torch_cuda"] = [*saved.get("torch_cuda", []), torch.get_rng_state()]
    path = VerifiedCheckpoint(rng=Holder(saved)).save(tmp_path / "saved")
    expected = torch.rand(3)
    checkpoint = VerifiedCheckpoint(rng=RandomState())
    with pytest.warns(UserWarning, match=f"1 CUDA devices, and there are {count} here"):
        checkpoint.load(path)
    assert torch.equal(torch.rand(3), expected)


# -- saves that fail -------------------------------------------------------------------


def _save_with_little_room(folder, limit):
    """Saves twice; the second time no file may grow beyond ``limit`` bytes."""
    holder = Holder({"x": torch.zeros(1000)})
    checkpoint = VerifiedCheckpoint(part=holder, rng=GlobalRNGState())
    rotation = CheckpointRotation(folder, keep_last=2)
    rotation.save(checkpoint, step=1)
    holder.state = {"x": torch.ones(100_000)}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(OSError, match="File too large"):
        rotation.save(checkpoint, step=2)


@pytest.mark.parametrize("limit", [100, 5000, 300_000])
def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(limit, tmp_path):
    finish(_save_with_little_room, tmp_path, limit)
    (left,) = tmp_path.iterdir()
    holder = Holder({"x": torch.ones(1000)})
    VerifiedCheckpoint(part=holder).load(left)
    assert holder.state["x"].count_nonzero() == 0


def test_leftovers_of_killed_saves_are_cleared(tmp_path):
    checkpoint = VerifiedCheckpoint(part=Holder({"x": 1}))
    kept = checkpoint.save(tmp_path / "checkpoint-000000000004")
    checkpoint.save(tmp_path / "checkpoint-000000000008")
    (tmp_path / "checkpoint-000000000008").rename(
        tmp_path / ".checkpoint-000000000008.backup-0a"
    )
    for name in (".x.stage-1f", ".x.delete-2e"):
        shutil.copytree(kept, tmp_path / name)
    shutil.copytree(kept, tmp_path / ".checkpoint-000000000004.backup-3d")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".hidden").write_text("mine too")
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".hidden",
        "checkpoint-000000000004",
        "checkpoint-000000000008",
        "notes.txt",
    ]
    clear_leftovers(tmp_path / "nowhere")


# -- best ------------------------------------------------------------------------------


def test_the_best_networks_are_kept_without_the_replay(tmp_path):
    env = Counter()
    loss = tiny_loss(env)
    rows = []
    states = {}

    def note(row):
        rows.append(row)
        states[row["training_step"]] = tensors(loss.state_dict())

    trainer, _ = build(
        env,
        loss,
        eval_env=Counter(),
        eval_interval=2,
        eval_episodes=1,
        on_evaluation=note,
        checkpoint_dir=tmp_path,
    )
    trainer.train()
    best = max(rows, key=lambda row: row["mean_return"])
    manifest = Checkpoint.manifest(tmp_path / "best")
    assert manifest["metadata"]["mean_return"] == best["mean_return"]
    assert set(manifest["components"]) == {"loss_module"}
    fresh = tiny_loss(env, seed=1)
    VerifiedCheckpoint(loss_module=fresh).load(tmp_path / "best")
    assert differing(tensors(fresh.state_dict()), states[best["training_step"]]) == []


def test_a_policy_cannot_be_loaded_without_knowing_how_it_was_built(checkpoints):
    with pytest.raises(CheckpointError, match="does not say how its networks are"):
        load_policy(max(checkpoints.iterdir()))
    for path, message in ((checkpoints, "neither a checkpoint"), ("nowhere", "exist")):
        with pytest.raises(FileNotFoundError, match=message):
            load_policy(path)
