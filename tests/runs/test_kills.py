"""A killed run loses no row, and its command then ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import pytest

from alm_torchrl.cli import main
from tests.runs.scripted_env import scripted_task
from tests.runs.small_runs import TINY, rows_of, same_end
from tests.training.resume_runs import in_process

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link")
WAYS = ["fresh", "resumed", "elsewhere", "older"]
KEEP = 2  # kept by the runs to continue


@pytest.fixture(scope="module", autouse=True)
def task():
    with scripted_task(max_episode_steps=10**6) as name:
        yield name


def train(words):
    """Runs the command quietly, in a process of its own."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        code = main([str(word) for word in words])
    sys.stdout.flush()
    os._exit(code)


def killed_at(event, folder, counter, words):
    """Kills itself at an event in the folder; counts them."""

    def hook(name, arguments):
        if name in EVENTS and str(folder) in str(arguments[:2]):
            counter.value += 1
            if counter.value == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    train(words)


def finish(words):
    process = in_process(train, words)
    process.join()
    assert process.exitcode == 0


def words_for(way, keep, task, folder, source):
    """A command, whose folder is prepared so far that it has six of twelve steps."""
    words = ["train", *TINY, "--total-steps", 12, "--keep-checkpoints", keep]
    if way == "fresh":
        return [*words, task, "--run-dir", folder]
    if way == "elsewhere":
        return [*words, "--run-dir", folder, "--resume", source]
    shutil.copytree(source, folder)
    resume = folder
    if way == "older":
        resume = sorted((folder / "checkpoints").glob("checkpoint-*"))[0]
    return [*words, "--resume", resume]


@pytest.fixture(scope="module")
def source(tmp_path_factory, task):
    """A run of six training steps."""
    folder = tmp_path_factory.mktemp("runs") / "six"
    words = ["train", task, *TINY, "--total-steps", 6, "--keep-checkpoints", KEEP]
    finish([*words, "--run-dir", folder])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, task):
    """A run of twelve training steps that went through, and its events by way."""
    folder = tmp_path_factory.mktemp("runs") / "twelve"
    finish(words_for("fresh", KEEP, task, folder, None))
    return folder


@pytest.fixture(scope="module")
def events(tmp_path_factory, task, source):
    """How many events a run has, by its way."""
    found = {}
    for way in WAYS:
        folder = tmp_path_factory.mktemp("counted") / "run"
        counter = multiprocessing.get_context("fork").Value("i", 0)
        words = words_for(way, KEEP, task, folder, source)
        process = in_process(killed_at, -1, folder, counter, words)
        process.join()
        assert process.exitcode == 0
        found[way] = counter.value
    return found


def all_rows(folder):
    return rows_of(*folder.glob("metrics*.csv"))


def cases(count):
    return [(number, WAYS[number % 4], 1 + number // 4 % 2) for number in range(count)]


def marked(count, first, mark):
    return [pytest.param(*case, marks=mark) for case in cases(count)[first:]]


@pytest.mark.parametrize(
    ("number", "way", "keep"),
    [
        *cases(2),
        *marked(12, 2, pytest.mark.slow),
        *marked(60, 12, pytest.mark.exhaustive),
    ],
)
def test_killed_at_a_file_system_event(
    tmp_path, task, source, whole, events, number, way, keep
):
    folder = tmp_path / "run"
    words = words_for(way, keep, task, folder, source)
    event = random.Random(number).randint(1, events[way] - 1)
    counter = multiprocessing.get_context("fork").Value("i", 0)
    process = in_process(killed_at, event, folder, counter, words)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    _continue_and_compare(folder, words, whole)


@pytest.mark.parametrize(
    ("number", "way", "keep"),
    [*marked(8, 0, pytest.mark.slow), *marked(40, 8, pytest.mark.exhaustive)],
)
def test_killed_at_a_random_moment(tmp_path, task, source, whole, number, way, keep):
    folder = tmp_path / "run"
    words = words_for(way, keep, task, folder, source)
    process = in_process(train, words)
    time.sleep(random.Random(number).uniform(0.1, 2.0))
    process.kill()
    process.join()
    _continue_and_compare(folder, words, whole)


def _continue_and_compare(folder, words, whole):
    written = all_rows(folder)
    if folder in getattr(words[-1], "parents", ()):
        words = [*words[:-1], folder]  # the older checkpoint may be deleted by now
    finish(words)
    assert same_end(folder, whole)
    assert written.items() <= all_rows(folder).items()
    finish(["verify", folder])
