"""Each state of a run folder and what ``train`` does with it, row by row.

The tables are those of :mod:`alm_torchrl.runs.start`.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
from filelock import FileLock
from torchrl.checkpoint import CheckpointError

from alm_torchrl.runs.folder import read_record
from alm_torchrl.training.alm_trainer import ALMTrainer
from alm_torchrl.training.rotation import numbered_checkpoints
from tests.runs.small_runs import (
    PENDULUM,
    TINY,
    command,
    contents,
    refused,
    rows_of,
    run,
    same_end,
    steps_saved,
)

START, END = 20, 32  # environment steps


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """A run of twelve training steps that went through."""
    folder = tmp_path_factory.mktemp("runs") / "twelve"
    assert run(folder, steps=12) == 0
    return folder


@pytest.fixture
def copy(twelve, tmp_path):
    return shutil.copytree(twelve, tmp_path / "copy")


def checkpoint_of(folder, index=-1):
    return numbered_checkpoints(folder / "checkpoints")[index][1]


def damage(checkpoint):
    (file,) = checkpoint.glob("components/*-loss_module/state.npz")
    content = file.read_bytes()
    file.unlink()  # it may be linked to that of another checkpoint
    file.write_bytes(content[:-100])


def set_aside(folder):
    found = (folder / "checkpoints").glob("set-aside-*/*")
    return {path.name.partition("-")[2] or path.name for path in found}


@pytest.mark.parametrize("made", [None, [], ["notes.txt", "data/x.csv"]])
def test_missing_empty_or_with_other_files_begins(tmp_path, made):
    folder = tmp_path / "run"
    for name in made or []:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    if made == []:
        folder.mkdir()
    assert run(folder, steps=2) == 0
    assert all((folder / name).read_text() == "mine" for name in made or [])


@pytest.mark.parametrize("name", ["checkpoints", "metrics.csv", "learning_curve.png"])
@pytest.mark.parametrize("resume", [False, True])
def test_files_of_a_run_without_config_are_refused(
    tmp_path, twelve, capsys, name, resume
):
    folder = tmp_path / "run"
    (folder / name).mkdir(parents=True)
    words = ["--resume", twelve] if resume else []
    assert f"has a {name} but no config.json" in refused(capsys, run, folder, *words)
    assert {path.name for path in folder.iterdir()} <= {name, ".lock"}


def test_config_alone_begins_with_any_settings(tmp_path, copy):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(copy / "config.json", folder)
    assert run(folder, "--seed", 5, steps=2) == 0
    assert read_record(folder)["settings"]["seed"] == 5


def test_killed_before_its_first_checkpoint_begins_again(tmp_path, capsys):
    folder, words = tmp_path / "run", ["--checkpoint-interval", 1000]
    assert run(folder, *words) == 0
    before = rows_of(folder / "metrics.csv")
    shutil.rmtree(folder / "checkpoints")
    assert run(folder, *words) == 0
    (aside,) = folder.glob("metrics-*.csv")
    assert str(aside) in capsys.readouterr().out
    assert rows_of(aside) == rows_of(folder / "metrics.csv") == before


def test_removed_checkpoints_are_refused_and_nothing_changes(copy, capsys):
    shutil.rmtree(copy / "checkpoints")
    before = contents(copy)
    for words in ((), ("--resume", copy)):
        message = refused(capsys, run, copy, *words, steps=12)
        assert "has no checkpoints any more" in message
        assert f"environment step {END}" in message
        assert "--fresh" in message
    assert contents(copy) == before
    assert run(copy, "--fresh", steps=2) == 0
    (aside,) = copy.parent.glob("copy-replaced-*")
    assert contents(aside) == before


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newest_checkpoint_is_set_aside(tmp_path, twelve, recwarn, keep):
    folder, words = tmp_path / "run", ["--keep-checkpoints", keep]
    assert run(folder, "--keep-checkpoints", 2) == 0
    damage(checkpoint_of(folder))
    newest = checkpoint_of(folder).name
    rows = rows_of(folder / "metrics.csv")
    assert run(folder, *words, steps=12) == 0
    assert any("is damaged" in str(warning.message) for warning in recwarn)
    assert same_end(folder, twelve)
    assert newest.partition("-")[2] in set_aside(folder)
    assert steps_saved(folder) == [30, 32][-keep:]
    assert rows.items() <= rows_of(folder / "metrics.csv").items()


def test_a_checkpoint_that_fails_to_load_is_set_aside(
    tmp_path, twelve, monkeypatch, recwarn
):
    folder = tmp_path / "run"
    assert run(folder) == 0
    newest, load = checkpoint_of(folder), ALMTrainer.load_from_file

    def fail(trainer, file):
        load(trainer, file)
        if file == newest:
            raise CheckpointError("of other shapes")
        return trainer

    monkeypatch.setattr(ALMTrainer, "load_from_file", fail)
    assert run(folder, steps=12) == 0
    message = f"{newest} does not load: of other shapes"
    assert any(message in str(warning.message) for warning in recwarn)
    assert newest.name.partition("-")[2] in set_aside(folder)
    assert same_end(folder, twelve)


@pytest.mark.parametrize("kind", ["damaged", "unloadable", "foreign"])
def test_without_a_usable_checkpoint_nothing_moves(copy, capsys, monkeypatch, kind):
    for path in (copy / "checkpoints").glob("checkpoint-*"):
        if kind == "damaged":
            damage(path)
        elif kind == "foreign":
            (path / "manifest.json").write_text("{}")
    if kind == "unloadable":

        def fail(trainer, file):
            raise CheckpointError("of other shapes")

        monkeypatch.setattr(ALMTrainer, "load_from_file", fail)
    before = contents(copy)
    with pytest.warns(UserWarning, match="The checkpoint before it is used"):
        message = refused(capsys, run, copy, steps=15)
    assert "no checkpoint in" in message
    assert "--fresh" in message
    assert contents(copy) == before


@pytest.mark.parametrize("keep", [1, 2])
def test_an_older_checkpoint_sets_what_is_newer_aside(tmp_path, twelve, capsys, keep):
    folder = tmp_path / "run"
    assert run(folder, "--keep-checkpoints", 9) == 0
    before, best = rows_of(folder / "metrics.csv"), folder / "checkpoints" / "best"
    step_of_best = json.loads((best / "manifest.json").read_text())["metadata"]
    older = checkpoint_of(folder, -3)
    assert steps_saved(folder)[-3:] == [22, 24, 26]
    words = ["--keep-checkpoints", keep, "--total-steps", 12]
    assert command("train", "--resume", older, *words) == 0
    text = capsys.readouterr().out
    assert f"Continues from {older}" in text
    assert same_end(folder, twelve)
    assert steps_saved(folder) == [30, 32][-keep:]
    moved = {"000000000024", "000000000026"}
    if step_of_best["environment_step"] > 22:
        moved.add("best")
    assert moved <= set_aside(folder)
    (aside,) = folder.glob("metrics-*.csv")
    assert list(rows_of(aside)) == [23, 26]
    assert rows_of(aside).items() <= before.items()
    assert str(aside) in text


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_command_printed_for_a_complete_run_continues_it(
    copy, tmp_path, capsys, monkeypatch, elsewhere
):
    monkeypatch.chdir(tmp_path)
    words = ["--run-dir", copy]
    if elsewhere:
        saved = shutil.copytree(checkpoint_of(copy), tmp_path / "a saved one")
        words = ["--run-dir", "new", "--resume", saved]
    before = contents(copy)
    assert command("train", *PENDULUM, *TINY, "--total-steps", 12, *words) == 0
    text = capsys.readouterr().out
    assert "complete: 12 training steps" in text
    assert contents(copy) == before
    assert not (tmp_path / "new").exists()
    (line,) = re.findall(r"^ *alm-torchrl (train .*)$", text, re.MULTILINE)
    assert command(*shlex.split(line)) == 0
    text = capsys.readouterr().out
    assert "Continues from" in text
    folder = next((tmp_path / "runs").iterdir()) if elsewhere else copy
    assert steps_saved(folder)[-1] == START + 24
    assert rows_of(copy / "metrics.csv").keys() >= {START, END}


def test_a_complete_run_without_its_last_row_evaluates(copy, twelve):
    lines = (copy / "metrics.csv").read_text().splitlines(keepends=True)
    (copy / "metrics.csv").write_text("".join(lines[:-1]))
    assert run(copy, steps=12) == 0
    assert same_end(copy, twelve)


def test_a_folder_in_use_is_refused(copy, capsys):
    with FileLock(copy / ".lock"):
        assert "in use" in refused(capsys, run, copy, steps=12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("format"), "expected .* format 2.* got .* format 1"),
        (lambda record: record["settings"].update(lr=0.5), "lr: 0.5 in the run"),
    ],
)
def test_another_format_and_other_settings_are_refused(copy, capsys, change, message):
    record = read_record(copy)
    change(record)
    (copy / "config.json").write_text(json.dumps(record))
    before = contents(copy)
    assert re.search(message, refused(capsys, run, copy, steps=15))
    assert contents(copy) == before


def test_a_malformed_row_is_refused_before_anything_moves(copy, capsys):
    with (copy / "metrics.csv").open("a") as file:
        file.write("1,2,3\n")
    damage(checkpoint_of(copy))
    before = contents(copy)
    message = refused(capsys, run, copy, steps=15)
    assert f"{copy / 'metrics.csv'}, line 7" in message
    assert contents(copy) == before


def test_strays_do_not_block_a_start(copy, twelve):
    directory = copy / "checkpoints"
    (directory / ".checkpoint-5.stage-x").write_text("mine")
    (directory / ".checkpoint-5.backup-x").write_text("mine")
    shutil.copytree(checkpoint_of(copy), directory / "checkpoint-\N{SUPERSCRIPT TWO}")
    (directory / "checkpoint-new").mkdir()
    (directory / "checkpoint-000000000099").write_text("mine")
    (copy / "metrics-notes.txt").write_text("mine")
    older = checkpoint_of(copy, -2)
    assert command("train", "--resume", older) == 0
    assert same_end(copy, twelve)
    assert (directory / ".checkpoint-5.stage-x").read_text() == "mine"


def test_a_copied_checkpoint_continues_with_its_own_settings(
    twelve, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    saved = shutil.copytree(checkpoint_of(twelve), tmp_path / "backup" / "saved")
    message = refused(
        capsys, command, "train", "Hopper-v5", "--resume", saved, "--lr", 0.5
    )
    assert "task: 'Pendulum-v1' in the run, 'Hopper-v5' now" in message
    assert "lr: 0.001 in the run, 0.5 now" in message
    assert {path.name for path in tmp_path.iterdir()} == {"backup"}
    words = ["train", "--resume", saved, "--total-steps", 15]
    for folder, extra in ((tmp_path / "new", ["--run-dir", "new"]), (None, [])):
        assert command(*words, *extra) == 0
        if folder is None:
            (folder,) = (tmp_path / "runs").iterdir()
        record = read_record(folder)
        assert record["settings"]["task"] == "Pendulum-v1"
        assert record["settings"]["action_bounds"] == "rescale"
        assert record["origin"] == str(saved)
        assert steps_saved(folder)[-1] == START + 15
        assert list(rows_of(folder / "metrics.csv")) == [END, START + 15]
        # The same command again.
        assert command(*words, *extra) == 0
        assert "complete: 15 training steps" in capsys.readouterr().out


def test_another_run_in_the_folder_is_refused(copy, twelve, tmp_path, capsys):
    other = tmp_path / "other"
    assert run(other, steps=2) == 0
    words = ["--resume", copy, "--run-dir", other]
    assert "already holds a run" in refused(capsys, command, "train", *words)
    best = copy / "checkpoints" / "best"
    assert "networks only" in refused(capsys, command, "train", "--resume", best)


def test_strange_things_to_resume_are_refused(tmp_path, twelve, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("empty", "file", "nowhere"):
        words = ["--resume", tmp_path / name, "--run-dir", tmp_path / "new"]
        assert str(tmp_path / name) in refused(capsys, run, tmp_path / "new", *words)
    record = tmp_path / "empty" / "config.json"
    shutil.copy(twelve / "config.json", record)
    words = ["--resume", record.parent, "--run-dir", tmp_path / "new"]
    assert "no checkpoint to continue" in refused(capsys, command, "train", *words)
    assert not (tmp_path / "new").exists()
