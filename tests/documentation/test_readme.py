"""What README.md and CONTRIBUTING.md print works: Python, commands, flags, names.

Blocks and commands are found by themselves. What cannot be run here is listed below
with the reason; anything unknown fails and says where to add it.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import glob
import importlib
import io
import itertools
import pkgutil
import re
import shlex
import shutil
import subprocess
import tomllib

import gymnasium
import pytest
import torch
from hypothesis import settings

import alm_torchrl
from alm_torchrl.cli import COMMANDS, main
from alm_torchrl.experiments.catalogue import EXPERIMENTS
from alm_torchrl.runs.film import render_headless
from tests.documentation.printed import FILES, ROOT, blocks, commands, flags, inline

render_headless()

TINY = {
    **{"--warmup-steps": "9", "--total-steps": "2", "--batch-size": "4"},
    **{"--latent-dim": "4", "--hidden-dim": "8", "--model-hidden-dim": "8"},
    **{"--eval-episodes": "1", "--log-interval": "1", "--device": "cpu"},
    **{"--threads": "1", "--action-bounds": "rescale"},
}
TASK, A_TASK = "InvertedPendulum-v5", r"[\w-]+-v\d"
# How each command is made small: flags and their values in place of the printed ones.
SMALL = {
    "train": TINY,
    "evaluate": {"--episodes": "1"},
    "plot": {},
    "render": {"--steps": "3"},
    "diagnose": {"--pairs": "20", "--steps": "3"},
    "tasks": {},
}
# Commands that are parsed only, and where they are run.
ELSEWHERE = {
    "reproduce": "tests/test_experiments.py runs every experiment",
    "bench": "tests/test_bench.py runs every section",
}
# Python that is not run as printed, by how it begins, and why.
NOT_RUN = {
    "def td_target(": "shows a docstring; its example is run below",
}
# What capital words in a command stand for.
STAND_FOR = {"RUN": "a run", "NEW": "new", "N": "1", "NAME": "table1"}
# Flags that are printed without their command, of other programs.
OTHER_FLAGS = {"--hypothesis-profile=search": "pytest", "--all-files": "pre-commit"}


def cases(find):
    """What ``find`` finds in the files, each once, for ``parametrize``."""
    found = {}
    for name, text in FILES.items():
        for item in find(text):
            key = item if isinstance(item, str) else " ".join(item)
            found.setdefault(key, pytest.param(item, id=f"{name}: {key}"[:80]))
    return list(found.values())


def ours(text):
    return [words[1:] for words in commands(text) if words[0] == "alm-torchrl"]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = [word for pair in TINY.items() for word in pair]
    assert main(["train", TASK, *options, "--run-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def filled_in(tiny_run, tmp_path, monkeypatch):
    """Puts what is there in place of what the printed words stand for."""
    monkeypatch.chdir(tmp_path)

    def fill(words):
        filled = []
        for word in words:
            assert word in STAND_FOR or not re.fullmatch(r"[A-Z][A-Z_]*", word), (
                f"add what {word} stands for to STAND_FOR"
            )
            if word == "RUN" or word.startswith("runs/"):
                shutil.copytree(tiny_run, tmp_path / "run", dirs_exist_ok=True)
                filled.append("run")
            else:
                filled.append(STAND_FOR.get(word, word))
        return filled

    return fill


# -- what finds them -------------------------------------------------------------------

PRINTED = """
```bash
A_B=1 one --x 'a b' && two \\
    three  # four
```
```console
$ five
six
```
```text
seven
```
Not `eight`, `nine ten`, but `pip
install x`, `alm-torchrl fly --wings 2` and `--wings 2`.
"""


def test_commands_are_found():
    assert [" ".join(words) for words in commands(PRINTED)] == [
        *("one --x a b", "two three", "five", "pip install x"),
        "alm-torchrl fly --wings 2",
    ]
    assert flags(PRINTED) == [["--wings", "2"]]
    assert blocks(PRINTED, "text", "console") == ["$ five\nsix\n", "seven\n"]


def test_unknown_commands_flags_and_words_fail(helps, filled_in, monkeypatch):
    with pytest.raises(AssertionError, match="alm-torchrl fly: add to SMALL"):
        small_commands(PRINTED)
    with pytest.raises(AssertionError, match="one: add to CHECKS"):
        test_other_command_can_be_run(others(PRINTED)[0])
    with pytest.raises(AssertionError, match="no command has --wings"):
        test_flag_exists(["--wings", "2"], helps, filled_in, monkeypatch)
    with pytest.raises(AssertionError, match="what FOLDER stands for"):
        filled_in(["evaluate", "FOLDER"])


# -- Python ----------------------------------------------------------------------------


def python(text):
    return blocks(text, "python", "py", "pycon")


def reason_not_to_run(code):
    return next((NOT_RUN[start] for start in NOT_RUN if code.startswith(start)), None)


@pytest.mark.parametrize("code", cases(python))
def test_python_runs_as_printed(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if reason_not_to_run(code) is not None:
        assert not unresolved(code)
        return
    for folder in re.findall(r'"(runs/[^"]*)"', code):
        task = folder.removeprefix("runs/").partition("-alm-")[0]
        options = [word for pair in TINY.items() for word in pair]
        assert main(["train", task, "--run-dir", folder, *options]) == 0
    exec(compile(code, "printed", "exec"), {"__name__": "printed"})


def unresolved(code):
    """Names that code reads, and neither defines nor finds in Python or PyTorch."""
    tree = ast.parse(code)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    read = {name.id for name in names if isinstance(name.ctx, ast.Load)}
    known = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            known |= {
                (name.asname or name.name).partition(".")[0] for name in node.names
            }
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            known.add(node.name)
        if isinstance(node, ast.arg):
            known.add(node.arg)
    return sorted(read - known - set(vars(builtins)) - {"torch"} - set(vars(torch)))


def test_unresolved_names_are_seen():
    assert unresolved("import a\ndef f(x: Tensor): return g(x, a, len(x))") == ["g"]


def test_the_list_of_what_is_not_run_is_up_to_date():
    printed = [code for text in FILES.values() for code in python(text)]
    assert printed
    for start in NOT_RUN:
        assert any(code.startswith(start) for code in printed), start


def test_the_docstring_that_is_shown_is_right():
    text = next(t for t in python(FILES["CONTRIBUTING.md"]) if t.startswith("def td_"))
    shown = ast.get_docstring(ast.parse(text).body[0])
    real = importlib.import_module("alm_torchrl.functional").td_target.__doc__
    example = shown.partition("Examples:")[2].split()
    assert example == real.partition("Examples:")[2].split()


# -- the alm-torchrl command -----------------------------------------------------------


@pytest.mark.parametrize("words", cases(ours))
def test_command_is_accepted(words, filled_in, monkeypatch, capsys):
    called = []
    for command in COMMANDS.values():
        monkeypatch.setattr(command, "run", lambda self: called.append(self) or 0)
    try:
        assert main(filled_in(words)) == 0
    except SystemExit:
        pytest.fail(f"alm-torchrl {shlex.join(words)}:\n{capsys.readouterr().err}")
    assert len(called) == 1
    tasks = [word for word in words if re.fullmatch(A_TASK, word)]
    assert [task for task in tasks if task not in gymnasium.registry] == []
    if words[0] == "reproduce" and len(words) > 1 and not words[1].startswith("--"):
        assert words[1] in {*EXPERIMENTS, "NAME"}


def small(words):
    """A command with other settings, which takes seconds, or None."""
    name, *rest = words
    if name in ELSEWHERE and rest != ["--list"]:
        return None
    assert name in SMALL or name in ELSEWHERE, (
        f"alm-torchrl {name}: add to SMALL how it is made to take seconds, or to "
        "ELSEWHERE which test runs it"
    )
    replaced = dict(SMALL.get(name, {}))
    if "--resume" in rest:
        replaced = {"--total-steps": "3"}
    for flag in replaced:
        if flag in rest:
            del rest[rest.index(flag) : rest.index(flag) + 2]
    if name == "train" and "--resume" not in rest:
        rest = [TASK, *(word for word in rest if not re.fullmatch(A_TASK, word))]
    rest = ["RUN" if word.startswith("runs/") else word for word in rest]
    return [name, *rest, *(word for pair in replaced.items() for word in pair)]


def small_commands(text):
    return [words for words in map(small, ours(text)) if words is not None]


@pytest.mark.parametrize("words", cases(small_commands))
def test_command_runs(words, filled_in, capsys):
    assert main(filled_in(words)) == 0
    assert capsys.readouterr().out


@pytest.fixture(scope="module")
def helps():
    """The help of each command by its name."""
    found = {}
    for name in (*SMALL, *ELSEWHERE):
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            main([name, "--help"])
        found[name] = out.getvalue()
    return found


def test_every_command_is_printed_and_known():
    assert COMMANDS.keys() == {*SMALL, *ELSEWHERE}
    assert {words[0] for words in ours(FILES["README.md"])} >= {*SMALL, *ELSEWHERE}


@pytest.mark.parametrize("words", cases(flags))
def test_flag_exists(words, helps, filled_in, monkeypatch):
    if words[0] in OTHER_FLAGS:
        return
    having = [
        n for n, text in helps.items() if re.search(rf"{words[0]}(?![\w-])", text)
    ]
    assert having, f"no command has {words[0]}; if another program's: OTHER_FLAGS"
    if len(words) == 1:
        return
    for command in COMMANDS.values():
        monkeypatch.setattr(command, "run", lambda self: 0)
    accepted = []
    for name in having:
        before = {"train": [TASK], "reproduce": ["table1"], "bench": []}.get(
            name, ["RUN"]
        )
        with contextlib.suppress(SystemExit):
            accepted.append(main(filled_in([name, *before, *words])))
    assert 0 in accepted


# -- other commands --------------------------------------------------------------------


def others(text):
    return [words for words in commands(text) if words[0] != "alm-torchrl"]


@pytest.mark.parametrize("words", cases(others))
def test_other_command_can_be_run(words):
    program, *rest = words
    check = CHECKS.get(program)
    assert check, f"{program}: add to CHECKS in tests/test_readme.py how to check it"
    check(rest)


def known_files(words):
    """The words that look like files of the repository are such files."""
    for word in words:
        if "/" in word and "://" not in word and not word.startswith("-"):
            assert glob.glob(word, root_dir=ROOT), f"{word} does not exist"


def check_pip(words):
    assert words[0] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = set(project["project"]["optional-dependencies"])
    for word in words:
        if match := re.fullmatch(r"(?:\.|alm[-_]torchrl)\[(.*)\]", word):
            assert set(match[1].split(",")) <= extras, word
        if word.endswith(".txt"):
            assert (ROOT / word).is_file(), word


def check_python(words):
    if words[0] == "-m":
        importlib.import_module(words[1])
        return
    known_files(words)
    compile((ROOT / words[0]).read_text(encoding="utf-8"), words[0], "exec")


def check_bash(words):
    known_files(words)
    subprocess.run(["bash", "-n", ROOT / words[0]], check=True)


def check_pytest(words):
    known_files(words)
    paths = [ROOT / word for word in words if word.endswith(".py")]
    files = "".join(path.read_text(encoding="utf-8") for path in paths)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    markers = project["tool"]["pytest"]["ini_options"]["markers"]
    for word, following in itertools.pairwise(words):
        if word == "-m":
            assert following in {marker.partition(":")[0] for marker in markers}
        if word == "-k":
            assert f"def test_{following}" in files or f"_{following}" in files
    for word in words:
        if word.startswith("--hypothesis-profile="):
            settings.get_profile(word.partition("=")[2])


def is_a_check(words):
    """The tools that .ci/run runs, with arguments of their own."""
    known_files(words)


CHECKS = {
    "pip": check_pip,
    "python": check_python,
    "bash": check_bash,
    "pytest": check_pytest,
    "ruff": is_a_check,
    "mypy": is_a_check,
    "codespell": is_a_check,
    "pre-commit": lambda words: (ROOT / ".pre-commit-config.yaml").stat(),
    "source": lambda words: None,
    "git": lambda words: None,
    "cd": lambda words: None,
}


# -- names and files -------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_names_of_the_package_exist(name):
    printed = inline(FILES[name])
    for code in printed:
        if re.fullmatch(r"alm_torchrl(\.\w+)+", code):
            pkgutil.resolve_name(code)
        if re.fullmatch(r"make_\w+|\w+_policy|ALM\w+", code):
            assert hasattr(alm_torchrl, code), code


@pytest.mark.parametrize("name", FILES)
def test_files_exist(name):
    text = FILES[name]
    folder = (ROOT / name).parent
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    missing = [file for file in linked if not (folder / file).exists()]
    for code in inline(text):
        first = code.partition("/")[0]
        homes = [home for home in (ROOT, folder) if (home / first).is_dir()]
        if re.fullmatch(r"[\w.-]+/\S+", code) and homes:
            found = [glob.glob(code, root_dir=home) for home in homes]
            missing += [] if any(found) else [code]
    assert not missing


def test_the_layout_names_every_module():
    table = FILES["CONTRIBUTING.md"].partition("## Layout")[2].partition("\n## ")[0]
    named = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", table, re.M)))
    modules = {info.name for info in pkgutil.iter_modules(alm_torchrl.__path__)}
    assert sorted(named) == sorted(modules)
