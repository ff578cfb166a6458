"""CITATION.cff names the paper as what to cite, and the software with its version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import alm_torchrl

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"( *)(- )?(?:([\w-]+):(?: (.+))?|(.+))")


def read(text):
    """The values of a YAML file of mappings, lists and folded text, by their path."""
    values, path, folded = {}, [], None
    for line in text.splitlines():
        indent, dash, key, value, rest = LINE.fullmatch(line).groups()
        depth = len(indent)
        if folded is not None and depth > folded[0]:
            values[folded[1]] = f"{values[folded[1]]} {line.strip()}".strip()
            continue
        folded = None
        assert depth % 2 == 0, line
        path = [entry for entry in path if entry[0] < depth]
        if dash:
            above = tuple(name for _, name in path)
            below = (
                found[len(above)] for found in values if found[: len(above)] == above
            )
            path += [(depth, len({name for name in below if name != ""}))]
            depth += 2
        if key is None:
            assert dash, f"expected a key or an entry of a list, got {line!r}"
            values[tuple(name for _, name in path)] = rest
            continue
        path.append((depth, key))
        where = tuple(name for _, name in path)
        assert where not in values, f"{line!r} is there twice"
        if value == ">-":
            folded, values[where] = (depth, where), ""
        elif value is not None:
            assert value[0] in "\"'" or ": " not in value, f"{line!r} needs quotes"
            values[where] = value.strip("\"'")
    return values


@pytest.fixture(scope="module")
def citation():
    return read((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_paper_is_what_to_cite(citation):
    paper = {
        path[1:]: v for path, v in citation.items() if path[0] == "preferred-citation"
    }
    authors = [
        f"{paper['authors', n, 'given-names']} {paper['authors', n, 'family-names']}"
        for n in range(5)
    ]
    assert authors == [
        *("Raj Ghugare", "Homanga Bharadhwaj", "Benjamin Eysenbach", "Sergey Levine"),
        "Ruslan Salakhutdinov",
    ]
    assert ("authors", 5, "family-names") not in paper
    assert paper["title",] == (
        "Simplifying Model-based RL: Learning Representations, Latent-space Models, "
        "and Policies with One Objective"
    )
    assert paper["type",] == "conference-paper"
    assert paper["year",] == "2023"
    assert paper["conference", "name"] == "ICLR 2023"
    assert paper["url",].endswith("arxiv.org/abs/2209.08466")
    assert paper["identifiers", 0, "value"] == "arXiv:2209.08466"


def test_the_software_is_this_version(citation):
    assert citation["cff-version",] == "1.2.0"
    assert citation["message",]
    assert citation["authors", 0, "name"]
    assert citation["title",] == "alm_torchrl"
    assert citation["version",] == alm_torchrl.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{citation['version',]}] - {citation['date-released',]}" in changes
    assert (ROOT / "LICENSE").read_text().startswith(citation["license",])


@pytest.mark.parametrize(
    "wrong", ["a: 1\na: 2", "a: b: c", "a:\n   b: 1", "just words"]
)
def test_what_is_no_yaml_is_refused(wrong):
    with pytest.raises((AssertionError, AttributeError)):
        read(wrong)


def test_the_reader_reads():
    text = "a: 1\nb:\n  - c: 2\n    d: '3'\n  - c: 4\ne: >-\n  f\n  g\nh:\n  - i\n"
    assert read(text) == {
        ("a",): "1",
        ("b", 0, "c"): "2",
        ("b", 0, "d"): "3",
        ("b", 1, "c"): "4",
        ("e",): "f g",
        ("h", 0): "i",
    }
