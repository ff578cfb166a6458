"""The help of `alm-torchrl` is meant for readers: sentences, and defaults they know."""

from __future__ import annotations

import itertools
import re

import pytest

from alm_torchrl.cli import main
from alm_torchrl.runs import commands

NAMES = sorted({*commands.__all__} - {"list_experiments"})
# Traces of the code in what users read.
TRACES = (
    *("(default: )", " object at ", "PosixPath", "Literal[", "typing.", "<class"),
    *("functools", "Annotated", "MISSING", "TrainConfig", "``", ":class:", ":func:"),
)


@pytest.fixture
def show(monkeypatch, capsys):
    """The lines of a help text."""
    monkeypatch.setenv("COLUMNS", "80")

    def helped(*words):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        return capsys.readouterr().out.splitlines()

    return helped


def descriptions(lines):
    """The wrapped lines behind each flag or argument, and the width they have."""
    # With a frame or without: the terminal's encoding decides.
    rows = [line.replace("│", " ") for line in lines]
    rows = [line[2:].rstrip() for line in rows if line.startswith("  ")]
    starts = [len(row) - len(row.lstrip()) for row in rows if row]
    # The names of flags stand at the left, all else in a column of its own.
    column = min(start for start in starts if start > 0)
    found, last = {}, ""
    for row in filter(None, rows):
        if row[0] != " ":
            last = row.split()[0]
            found[last] = []
        if row[:column].endswith("  ") and row[column:]:
            found[last].append(row[column:])
    return found, max(map(len, rows)) - column


def ragged(lines):
    """Lines that end although the next word would have fitted."""
    found, width = descriptions(lines)
    return [
        line
        for description in found.values()
        for line, following in itertools.pairwise(description)
        if len(line) + 1 + len(following.split()[0]) <= width
    ]


def test_the_root_lists_every_command(show):
    lines = show()
    assert sorted(lines[0].partition("{")[2].rstrip("}").split(",")) == NAMES
    assert sorted(re.findall(r"• (\w+) +[A-Z]", "\n".join(lines))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_no_code_and_is_wrapped_evenly(name, show):
    lines = show(name)
    assert [trace for trace in TRACES if trace in "\n".join(lines)] == []
    if name != "tasks":
        assert ragged(lines) == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "tasks"])
def test_every_flag_is_described_in_a_sentence(name, show):
    found, _ = descriptions(show(name))
    assert len(found) > 2
    for flag, description in found.items():
        text = " ".join(description)
        assert flag == "-h," or re.fullmatch(
            r"[A-Z].*[\w)*/]\. \((default: \S.*|required.*|see .*)\)", text
        ), (flag, text)


def test_broken_help_is_seen():
    even = [
        "  --flag N    Some words that go on to the     ",
        "              end. (default: 3)                ",
    ]
    uneven = [
        "│ --long-flag N {a,b}                           │",
        "│             Some words that go                │",
        "│             on to the end. (default: 3)       │",
    ]
    assert ragged(even) == []
    assert ragged(uneven) == ["Some words that go"]
    assert descriptions(uneven)[0] == {
        "--long-flag": ["Some words that go", "on to the end. (default: 3)"]
    }
