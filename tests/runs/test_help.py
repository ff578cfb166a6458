"""The help of `alm-torchrl`: every flag, in sentences, with its default."""

from __future__ import annotations

import re

import pytest

from alm_torchrl.cli import COMMANDS, main
from alm_torchrl.runs.settings import PRESETS, preset_config

# Traces of the code in what users read.
TRACES = (
    *("(default: )", " object at ", "PosixPath", "Literal[", "typing.", "<class"),
    *("functools", "Annotated", "MISSING", "TrainConfig", "``", ":class:", ":func:"),
)


@pytest.fixture
def show(monkeypatch, capsys):
    """A help text."""
    monkeypatch.setenv("COLUMNS", "80")

    def helped(*words):
        try:
            code = main([*words, "--help"])
        except SystemExit as stop:
            code = stop.code
        assert code == 0
        return capsys.readouterr().out

    return helped


def descriptions(text):
    """The text behind each flag or argument, by its name."""
    # With a frame or without: the terminal's encoding decides.
    rows = [line.replace("│", " ") for line in text.splitlines()]
    rows = [line[2:].rstrip() for line in rows if line.startswith("  ")]
    starts = [len(row) - len(row.lstrip()) for row in rows if row]
    # The names of flags stand at the left, all else in a column of its own.
    column = min(start for start in starts if start > 0)
    found, last = {}, ""
    for row in filter(None, rows):
        if row[0] != " ":
            last = row.split()[0].rstrip(",")
            found[last] = []
        if row[:column].endswith("  ") and row[column:]:
            found[last].append(row[column:])
    return {flag: " ".join(lines) for flag, lines in found.items()}


def test_the_root_lists_every_command(show):
    text = show()
    assert re.findall(r"^  (\w+) +[A-Z]", text, re.MULTILINE) == list(COMMANDS)
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_described_in_a_sentence(name, show):
    text = show(name)
    assert text.startswith(f"usage: alm-torchrl {name}")
    assert max(map(len, text.splitlines())) <= 80
    assert [trace for trace in TRACES if trace in text] == []
    found = {} if name == "tasks" else descriptions(text)
    assert name == "tasks" or len(found) > 1
    for flag, sentence in found.items():
        assert flag == "-h" or re.fullmatch(
            r"[A-Z].*[\w)*/]\. \((default: \S.*|required.*|see .*)\)", sentence
        ), (flag, sentence)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_setting_is_a_flag_with_the_presets_value(preset, show):
    found = descriptions(show("train", f"--preset={preset}"))
    config = preset_config(preset, task="HalfCheetah-v5")
    for name, value in config.to_dict().items():
        flag = "[TASK]" if name == "task" else f"--{name.replace('_', '-')}"
        required = name == "task" and preset != "quick"
        expected = "required with this preset" if required else f"default: {value}"
        assert found[flag].endswith(f"({expected})")
