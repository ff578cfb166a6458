"""What the Markdown files print works: Python runs, commands and links are valid."""

from __future__ import annotations

import inspect
import itertools
import re
import shlex
import tomllib

import mujoco
import pytest
import torch
import tyro

from alm_torchrl import cli
from benchmarks.__main__ import Options
from benchmarks.problem import load_example
from tests.documentation.scripts import ROOT, run_script

FILES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in ("", "docs", "results")
    for path in sorted((ROOT / folder).glob("*.md"))
}
GUIDES = ("README.md", "CONTRIBUTING.md")
# Its Python is one script.
DISTRIBUTED = "docs/distributed.md"
# A run of a second, where Python that is printed opens one.
TINY = (
    "--warmup-steps 9 --total-steps 2 --batch-size 4 --latent-dim 4 --hidden-dim 8 "
    "--model-hidden-dim 8 --eval-episodes 1 --device cpu --threads 1"
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTEST = PROJECT["tool"]["pytest"]["ini_options"]


def blocks(text, *languages):
    """The fenced blocks in one of some languages."""
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.M | re.S)
    return [code for language, code in fenced if language in languages]


def commands(text):
    """The commands of all shell blocks, as lists of words."""
    found = [[]]
    for line in "\n".join(blocks(text, "bash", "sh")).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split = True
        for word in [*lexer, ";"]:
            if word.strip("&|;"):
                found[-1].append(word)
            else:
                found.append([])
    return [words for words in found if words]


def ours(text):
    """The ``alm-torchrl`` commands, those within sentences too."""
    inline = re.findall(r"(?<!`)`(alm-torchrl [^`]+)`(?!`)", text)
    lines = [" ".join(code.split()) for code in inline]
    return [
        *(words for words in commands(text) if words[0] == "alm-torchrl"),
        *(shlex.split(line) for line in lines),
    ]


def cases(find, names=FILES):
    """Each thing that is found in some files, once, for ``parametrize``."""
    found = {}
    for name in names:
        for item in find(FILES[name]):
            label = item if isinstance(item, str) else " ".join(item)
            found.setdefault(label, pytest.param(item, id=f"{name}: {label}"[:70]))
    return list(found.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    cases(lambda text: blocks(text, "python"), [n for n in FILES if n != DISTRIBUTED]),
)
def test_python_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in re.findall(r'"(runs/[^"]+)"', code):
        task = folder.removeprefix("runs/").partition("-alm-")[0]
        assert cli.main(["train", task, "--run-dir", folder, *TINY.split()]) == 0
    space = {"__name__": "printed", "torch": torch, "Tensor": torch.Tensor}
    exec(compile(code, "printed", "exec"), space)


@pytest.mark.slow
@pytest.mark.parametrize("code", cases(lambda text: blocks(text, "py")))
def test_python_with_a_package_of_its_own_runs(code):
    pytest.importorskip("dm_control.suite", exc_type=ImportError)
    if mujoco.__version__ >= "4":
        pytest.skip("dm_control 1.0.50 fails with MuJoCo 4")
    exec(compile(code, "printed", "exec"), {"__name__": "printed"})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_python_on_ray_runs(tmp_path):
    pytest.importorskip("ray")
    script = tmp_path / "script.py"
    script.write_text("\n".join(blocks(FILES[DISTRIBUTED], "python")))
    # By default, Ray's workers let all other processes go first.
    run_script(script, tmp_path, RAY_worker_niceness="0")


@pytest.fixture
def parse(monkeypatch, capsys):
    """Runs the ``alm-torchrl`` command, which only reads its arguments here."""
    called = []
    kinds = [kind for kind in vars(cli).values() if inspect.isclass(kind)]
    for kind in kinds:
        if "run" in vars(kind):
            monkeypatch.setattr(kind, "run", lambda self: called.append(self) or 0)

    def run(words):
        try:
            assert cli.main(words) == 0
            assert called or words == ["--help"]
        except SystemExit as end:
            if end.code != 0:
                pytest.fail(capsys.readouterr().err)

    return run


@pytest.mark.parametrize("words", cases(ours, GUIDES))
def test_our_command_is_accepted(words, parse):
    # An upper-case word stands for a value.
    parse([re.sub(r"^[A-Z]+$", "1", word) for word in words[1:]])


def check_python(words):
    if words[:2] == ["-m", "benchmarks"]:
        tyro.cli(Options, args=words[2:], config=(tyro.conf.OmitArgPrefixes,))
    elif words[0] == "examples/alm.py":
        tyro.cli(load_example().Args, args=words[1:])
    elif words[0] != "-m":
        compile((ROOT / words[0]).read_text(encoding="utf-8"), words[0], "exec")


def check_pip(words):
    extras = PROJECT["project"]["optional-dependencies"]
    for word in words:
        if named := re.fullmatch(r"(?:\.|alm_torchrl)\[(.*)\]", word):
            assert set(named[1].split(",")) <= set(extras)


def check_pytest(words):
    markers = {line.partition(":")[0] for line in PYTEST["markers"]}
    for flag, value in itertools.pairwise(words):
        if flag == "-m":
            assert set(re.findall(r"\w+", value)) <= {*markers, "not", "and", "or"}


CHECKS = {"python": check_python, "pip": check_pip, "pytest": check_pytest}


@pytest.mark.parametrize(
    "words", cases(lambda text: [w for w in commands(text) if w[0] != "alm-torchrl"])
)
def test_other_command_names_what_exists(words):
    program, *rest = words
    CHECKS.get(program, lambda words: None)(rest)
    for word in rest:
        if re.fullmatch(r"[\w.]+(/[\w.*-]+)+|[\w-]+\.(py|txt|md)", word):
            assert list(ROOT.glob(word)) or word.startswith(".venv"), word


@pytest.mark.parametrize("name", FILES)
def test_links_lead_to_files(name):
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", FILES[name])
    assert [one for one in linked if not ((ROOT / name).parent / one).exists()] == []


def test_the_test_command_of_the_readme_is_that_of_ci():
    command = "pip install -c constraints.txt '.[cli,test]' && pytest -n 2"
    assert command in "\n".join(blocks(FILES["README.md"], "bash"))
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
