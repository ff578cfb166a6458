"""The Python of README.md runs as printed, and its commands are the real ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from alm_torchrl.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs_as_printed(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in re.findall(r'"(runs/[^"]*)"', code):
        task = folder.removeprefix("runs/").partition("-alm-")[0]
        sizes = "--latent-dim 4 --hidden-dim 8 --model-hidden-dim 8 --eval-episodes 1"
        steps = "--warmup-steps 9 --total-steps 1 --batch-size 4 --device cpu"
        arguments = f"train {task} --run-dir {folder} {steps} {sizes}"
        assert main(arguments.split()) == 0
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    found = [line.split("#")[0].strip() for line in lines]
    found += re.findall(r"`(alm-torchrl [^`]*)`", README)
    return [line.split("&&")[-1].strip() for line in found if "alm-torchrl" in line]


def test_readme_names_every_command():
    named = {command.split()[1] for command in commands()}
    assert named == {"train", "evaluate", "plot", "render", "tasks", "bench"}


@pytest.mark.parametrize("command", commands())
def test_flags_of_printed_commands_exist(command, capsys):
    words = shlex.split(command)[1:]
    flags = [word for word in words if word.startswith("--")]
    with pytest.raises(SystemExit) as stop:
        main([words[0], "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in flags), (flags, text)
