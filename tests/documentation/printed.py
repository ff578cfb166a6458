"""Finds the code blocks, commands and names that a Markdown file prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md", "results/README.md")
}
SHELL = ("bash", "sh", "shell")
# What is taken for a command where it is printed within a line.
PROGRAMS = (
    *("alm-torchrl", "bash", "codespell", "git", "mypy", "pip", "pre-commit"),
    *("pytest", "python", "ruff"),
)


def blocks(text, *languages):
    """The content of the fenced blocks in one of some languages."""
    fenced = re.findall(r"^ *```([\w+-]*)[^\n]*\n(.*?)^ *```$", text, re.M | re.S)
    return [code for language, code in fenced if language in languages]


def inline(text):
    """What stands between single backticks, its line breaks as spaces."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
    found = re.findall(r"(?<!`)`([^`]+)`(?!`)", text)
    return [" ".join(code.split()) for code in found if "\n\n" not in code]


def commands(text):
    """Every command that is printed, as a list of words, once each."""
    code = "\n".join(blocks(text, *SHELL)).replace("\\\n", " ")
    lines = code.splitlines()
    sessions = "\n".join(blocks(text, "console")).replace("\\\n", " ").splitlines()
    lines += [line[2:] for line in sessions if line.startswith("$ ")]
    for code in inline(text):
        words = code.split()
        if words[0] in PROGRAMS and len(words) > 1:
            lines.append(code)
    found = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        command = []
        for word in [*lexer, "&&"]:
            if word.strip("&|;"):
                command.append(word)
                continue
            while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                del command[0]
            if command and command not in found:
                found.append(command)
            command = []
    return found


def flags(text):
    """What is printed within lines and begins with a flag, as lists of words."""
    return [code.split() for code in inline(text) if re.match(r"--[a-z]", code)]
