"""Damage that must not spread, and states of other shapes."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.checkpoint import CheckpointError
from torchrl.record.loggers import CSVLogger
from torchrl.record.loggers.tensorboard import TensorboardLogger

from alm_torchrl import ALMOptimizationStepper, make_alm_loss, make_replay_buffer
from alm_torchrl.baselines.builders import make_sac_loss
from alm_torchrl.training import replay_segments
from alm_torchrl.training.baseline_stepper import BaselineOptimizationStepper
from alm_torchrl.training.checkpoint import VerifiedCheckpoint, inspect_checkpoint
from alm_torchrl.training.files import read_state, write_state
from alm_torchrl.training.state_checks import check_state
from tests.training.trainer_runs import Holder, differing, numbered_rows, tensors


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch):
    monkeypatch.setattr(replay_segments, "SEGMENT_ROWS", 8)


def _flip(file, place=-200):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    stamps = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))


def _loaded(path):
    buffer = make_replay_buffer(50, horizon=1)
    VerifiedCheckpoint(replay=buffer).load(path)
    return buffer[:]


# -- segments --------------------------------------------------------------------------


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("stamp", ["kept", "changed"])
def test_a_damaged_segment_is_written_again(links, stamp, tmp_path, monkeypatch):
    buffer = make_replay_buffer(50, horizon=1)
    checkpoint = VerifiedCheckpoint(replay=buffer)
    buffer.extend(numbered_rows(0, 20))
    one = checkpoint.save(tmp_path / "one")
    damaged, whole, _ = sorted(one.glob("components/*/rows-*.npz"))
    _flip(damaged)
    if stamp == "changed":
        os.utime(damaged)
    if not links:

        def refuse(source, target):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr("os.link", refuse)
    buffer.extend(numbered_rows(20, 20))
    with pytest.warns(UserWarning, match=rf"{damaged} is damaged; its rows .* again"):
        two = checkpoint.save(tmp_path / "two")
    assert (_loaded(two) == buffer[:]).all()
    assert whole.samefile(two / whole.relative_to(one)) == links
    problems = [problem for _, problem in inspect_checkpoint(one)]
    assert [p for p in problems if p] == [problems[2]]
    assert "expected SHA-256" in problems[2]
    assert not any(problem for _, problem in inspect_checkpoint(two))
    # What is whole is shared from then on.
    three = checkpoint.save(tmp_path / "three")
    repaired = damaged.relative_to(one)
    assert (two / repaired).samefile(three / repaired) == links


def test_rows_that_were_overwritten_are_not_needed(tmp_path):
    buffer = make_replay_buffer(20, horizon=1)
    checkpoint = VerifiedCheckpoint(replay=buffer)
    buffer.extend(numbered_rows(0, 20))
    one = checkpoint.save(tmp_path / "one")
    for file in one.glob("components/*/rows-*.npz"):
        _flip(file)
    buffer.extend(numbered_rows(20, 4))
    with pytest.warns(UserWarning, match="is damaged"):
        two = checkpoint.save(tmp_path / "two")
    other = make_replay_buffer(20, horizon=1)
    VerifiedCheckpoint(replay=other).load(two)
    assert (other[:] == buffer[:]).all()


@pytest.mark.parametrize("damage", ["flipped", "removed", "link"])
def test_a_damaged_index_has_all_rows_written_again(damage, tmp_path):
    buffer = make_replay_buffer(50, horizon=1)
    checkpoint = VerifiedCheckpoint(replay=buffer)
    buffer.extend(numbered_rows(0, 20))
    one = checkpoint.save(tmp_path / "one")
    (index,) = one.glob("components/*/replay.npz")
    if damage == "flipped":
        _flip(index)
    elif damage == "removed":
        index.unlink()
    else:
        for file in one.glob("components/*/rows-*.npz"):
            file.rename(tmp_path / file.name)
            file.symlink_to(tmp_path / file.name)
    two = checkpoint.save(tmp_path / "two")
    assert all(file.stat().st_nlink == 1 for file in two.rglob("*.npz"))
    assert (_loaded(two) == buffer[:]).all()


def test_segments_are_shared_after_a_load(tmp_path):
    buffer = make_replay_buffer(50, horizon=1)
    buffer.extend(numbered_rows(0, 20))
    one = VerifiedCheckpoint(replay=buffer).save(tmp_path / "one")
    other = make_replay_buffer(50, horizon=1)
    checkpoint = VerifiedCheckpoint(replay=other)
    checkpoint.load(one)
    first = min(one.glob("components/*/rows-*.npz"))
    two = checkpoint.save(tmp_path / "two")
    assert first.samefile(two / first.relative_to(one))


# -- random damage ---------------------------------------------------------------------


def _checkpoint(seed):
    torch.manual_seed(seed)
    buffer = make_replay_buffer(50, horizon=1)
    buffer.extend(numbered_rows(seed, 20))
    parts = Holder({"numbers": [seed, 0.5], "rows": torch.randn(4, 3)})
    net = torch.nn.Linear(3, 2)
    return VerifiedCheckpoint(net=net, parts=parts, replay=buffer)


def _tensors(checkpoint):
    parts = checkpoint.components
    rows = parts["replay"][:].to_dict()
    return tensors([parts["net"].state_dict(), parts["parts"].state_dict(), rows])


CHANGES = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3)


def _change(file, changes, length):
    content = bytearray(file.read_bytes())
    for place, bits in changes:
        content[place % len(content)] ^= bits
    file.write_bytes(content[: int(length * len(content))])


def _error_of(function, path):
    try:
        function(path)
    except Exception as error:
        return error
    return None


@settings(max_examples=12)
@given(
    changes=CHANGES,
    length=st.one_of(st.just(1.0), st.floats(0, 1)),
    number=st.integers(0, 5),
)
def test_a_changed_checkpoint_is_refused_or_loads_what_was_saved(
    changes, length, number
):
    with tempfile.TemporaryDirectory() as name:
        saved, target = _checkpoint(0), _checkpoint(1)
        path = saved.save(Path(name, "saved"))
        files = sorted(file for file in path.rglob("*") if file.is_file())
        file = files[number]
        _change(file, changes, length)
        before = _tensors(target)
        error = _error_of(target.load, path)
        if error is None:
            assert differing(_tensors(target), _tensors(saved)) == []
        else:
            assert isinstance(error, CheckpointError)
            assert "\n" not in str(error)
            assert str(path) in str(error)
            assert differing(_tensors(target), before) == []


@settings(max_examples=40)
@given(changes=CHANGES, length=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_a_changed_state_file_is_refused_or_read_as_it_was(changes, length):
    state = {"a": [torch.arange(5.0), None, "x"], 2: np.arange(3), "b": (1, 2.5)}
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "state.npz")
        write_state(file, state)
        _change(file, changes, length)
        error = _error_of(read_state, file)
        if error is None:
            assert differing(tensors(read_state(file)), tensors(state)) == []
        else:
            assert isinstance(error, ValueError)
            assert "\n" not in str(error)
            assert str(file) in str(error)


# -- what a checkpoint says of itself --------------------------------------------------


def test_each_file_is_inspected(tmp_path):
    path = _checkpoint(0).save(tmp_path / "saved")
    found = dict(inspect_checkpoint(path))
    assert len(found) == 7
    assert not any(found.values())
    assert next(iter(found)) == "manifest.json"
    names = list(found)
    (path / names[1]).unlink()
    (path / names[2]).write_bytes(b"")
    (path / names[3]).unlink()
    (path / names[3]).symlink_to("/dev/zero")
    (path / "notes.txt").touch()
    found = dict(inspect_checkpoint(str(path)))
    problems = {name: problem for name, problem in found.items() if problem}
    assert set(problems) == {*names[1:4], "notes.txt"}
    for name, expected in (
        (names[1], "cannot be read"),
        (names[2], "is damaged"),
        (names[3], "is no file of the checkpoint"),
        ("notes.txt", "is not in the manifest"),
    ):
        assert problems[name].startswith(expected)
        assert "\n" not in problems[name]
    with pytest.raises(CheckpointError, match="cannot be read"):
        VerifiedCheckpoint().verify(path)
    (path / "manifest.json").write_text("{}")
    ((name, problem),) = inspect_checkpoint(path)
    assert name == "manifest.json"
    assert "not written by alm_torchrl" in problem


def test_a_checkpoint_may_lie_behind_a_link(tmp_path):
    _checkpoint(0).save(tmp_path / "saved")
    (tmp_path / "link").symlink_to("saved")
    target = _checkpoint(1)
    target.load(tmp_path / "link")
    assert differing(_tensors(target), _tensors(_checkpoint(0))) == []


# -- states that do not fit ------------------------------------------------------------


def _alm(observation):
    torch.manual_seed(0)
    loss = make_alm_loss(
        observation_dim=observation,
        action_low=[-1.0],
        action_high=[1.0],
        hidden_dim=8,
        model_hidden_dim=8,
        latent_dim=4,
    )
    rows = {
        "observation": torch.randn(4, 2, observation),
        "action": torch.rand(4, 2, 1),
        "next": {
            "observation": torch.randn(4, 2, observation),
            "reward": torch.randn(4, 2, 1),
            "terminated": torch.zeros(4, 2, 1, dtype=torch.bool),
        },
    }
    return ALMOptimizationStepper(loss), TensorDict(rows, [4, 2])


def _sac(observation):
    torch.manual_seed(0)
    loss = make_sac_loss(
        observation_dim=observation, action_low=[-1.0], action_high=[1.0], hidden_dim=8
    )
    flags = torch.zeros(4, 1, dtype=torch.bool)
    rows = {
        "observation": torch.randn(4, observation),
        "action": torch.rand(4, 1),
        "next": {
            "observation": torch.randn(4, observation),
            "reward": torch.randn(4, 1),
            "done": flags,
            "terminated": flags,
        },
    }
    return BaselineOptimizationStepper(loss), TensorDict(rows, [4])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (_alm, r"encoder_params\.\S+\.weight\.exp_avg"),
        (_sac, r"qvalue_network_params\.\S+\.weight\.exp_avg"),
    ],
)
def test_a_stepper_refuses_the_state_of_other_shapes(make, name):
    (one, batch), (other, rows) = make(1), make(3)
    one.step(None, batch)
    other.step(None, rows)
    before = tensors(other.state_dict())
    with pytest.raises(ValueError, match=rf"{name}: expected torch.float32 .*, got"):
        other.load_state_dict(one.state_dict())
    assert differing(tensors(other.state_dict()), before) == []
    same, _ = make(1)
    same.load_state_dict(one.state_dict())
    assert differing(tensors(same.state_dict()), tensors(one.state_dict())) == []


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_by_itself_is_checked_too(fused, tmp_path):
    def make(size):
        net = torch.nn.Linear(size, 1)
        return net, torch.optim.Adam(net.parameters(), fused=fused)

    (net, one), (_, other), (_, same) = make(2), make(5), make(2)
    net(torch.ones(2)).backward()
    one.step()
    one.param_groups[0]["initial_lr"] = 0.1  # as a scheduler does
    one.param_groups[0]["weight_decay"] = 0.01
    path = VerifiedCheckpoint(optimizer=one).save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"parameter 0.exp_avg.*\[1, 5\], got"):
        VerifiedCheckpoint(optimizer=other).load(path)
    assert other.state == {}
    VerifiedCheckpoint(optimizer=same).load(path)
    assert tensors(same.state_dict()).keys() == tensors(one.state_dict()).keys()


def test_one_component_that_does_not_fit_leaves_the_others(tmp_path):
    saved = {"a": torch.nn.Linear(2, 1), "b": torch.nn.Linear(3, 1)}
    path = VerifiedCheckpoint(**saved).save(tmp_path / "saved")
    fits, other = torch.nn.Linear(2, 1), torch.nn.Linear(4, 1)
    before = fits.weight.clone()
    with pytest.raises(CheckpointError, match=r"0001-b .*\[1, 4\], got .*\[1, 3\]"):
        VerifiedCheckpoint(a=fits, b=other).load(path)
    assert torch.equal(fits.weight, before)
    result = VerifiedCheckpoint(a=fits, b=other).load(path, strict="ignore")
    assert result.loaded == {"a"}
    assert torch.equal(fits.weight, saved["a"].weight)


def test_a_logger_may_be_another_one(tmp_path):
    loggers = [
        CSVLogger("x", log_dir=str(tmp_path / "csv")),
        TensorboardLogger("x", log_dir=str(tmp_path / "tensorboard")),
    ]
    loggers[0].log_scalar("a", 1.0, step=1)
    net = torch.nn.Linear(2, 1)
    for one in (None, *loggers):
        for other in (None, *loggers):
            names = {"logger": one} if one else {}
            checkpoint = VerifiedCheckpoint(net=net, **names)
            path = checkpoint.save(tmp_path / f"{type(one)}-{type(other)}")
            names = {"logger": other} if other else {}
            result = VerifiedCheckpoint(net=torch.nn.Linear(2, 1), **names).load(path)
            assert "net" in result.loaded
    with pytest.raises(CheckpointError, match="has no component 'other'"):
        VerifiedCheckpoint(net=net, other=net).load(path)


def test_a_component_may_judge_its_state_itself(tmp_path):
    class Growing(Holder):
        def check_state_dict(self, state):
            if len(state) > 3:
                raise ValueError("too\nmany")

    path = VerifiedCheckpoint(part=Holder([1, 2, 3])).save(tmp_path / "three")
    growing = Growing([0])
    VerifiedCheckpoint(part=growing).load(path)
    assert growing.state == [1, 2, 3]
    path = VerifiedCheckpoint(part=Holder([1, 2, 3, 4])).save(tmp_path / "four")
    with pytest.raises(CheckpointError, match="too many"):
        VerifiedCheckpoint(part=growing).load(path)


@pytest.mark.parametrize(
    ("saved", "own"),
    [
        (3, 2.5),
        (None, 2),
        (2.5, None),
        ({"a": 1}, {}),
        ([1, 2], []),
        (np.float64(3), np.zeros(())),
        (np.ones(2), np.ones(2, dtype=np.float32)),
    ],
)
def test_what_is_equal_enough(saved, own):
    check_state(saved, own, "state")


@pytest.mark.parametrize(
    ("saved", "own"),
    [
        (2.5, 3),
        (True, 1),
        (1, True),
        ("x", None),
        (None, "x"),
        (None, torch.ones(2)),
        ({}, {"a": 1}),
        ([], [1]),
        ((1,), [1]),
        (np.ones(2), torch.ones(2)),
        (np.ones(2), np.ones(3)),
        (np.ones(2), np.ones(2, dtype=np.int64)),
    ],
)
def test_what_differs(saved, own):
    with pytest.raises(ValueError, match=r"^state: expected"):
        check_state(saved, own, "state")
