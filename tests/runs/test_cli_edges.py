"""The command around its edges: pipes, consoles, warnings, and what help imports."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest

from alm_torchrl import cli, make_env
from alm_torchrl.cli import main
from alm_torchrl.runs.agents import build_env

COMMAND = "import sys; from alm_torchrl.cli import main; sys.exit(main(sys.argv[1:]))"


def run(*words, code=COMMAND, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **kwargs,
    )


def test_help_does_not_import_pytorch():
    code = (
        "import sys\n"
        "from alm_torchrl.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert run(code=code).returncode == 0


@pytest.mark.parametrize(
    ("words", "meant"),
    [("trai", "did you mean train?"), ("evaluat", "evaluate?"), ("xyz", "'xyz'")],
)
def test_an_unknown_command_is_named(words, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        main([words])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert meant in error
    assert len(error.splitlines()) == 1


def test_a_bad_value_points_to_the_help_of_its_command(capsys):
    with pytest.raises(SystemExit):
        main(["train", "Hopper-v5", "--tau", "x"])
    assert "alm-torchrl train --help" in capsys.readouterr().err


def test_a_console_without_unicode():
    done = run("train", "--help", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_pipe_ends_without_a_traceback():
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, "tasks"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(120) == 141
    assert error == ""


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_output(closed):
    shell = [sys.executable, "-c", COMMAND, "tasks"]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *shell],
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, "tasks"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1


def test_a_warning_is_one_line_without_source(monkeypatch):
    shown = []

    def show(_):
        warning = UserWarning("two\nlines")
        shown.append(warnings.formatwarning(warning, UserWarning, "file.py", 1))
        return 0

    monkeypatch.setattr(cli, "_run", show)
    assert main(["any"]) == 0
    assert shown == ["alm-torchrl: warning: two lines\n"]
    assert warnings.formatwarning("x", UserWarning, "file.py", 1).startswith("file.py")


def test_the_warning_about_bounds_names_the_flag():
    with pytest.warns(UserWarning, match="--action-bounds rescale"):
        make_env("Pendulum-v1")


def test_mujoco_writes_no_file(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(DeprecationWarning, match="MuJoCo: .*settotalmass"):
        build_env({"task": "HalfCheetah-v5"}).close()
    assert list(tmp_path.iterdir()) == []
    assert "settotalmass" not in capfd.readouterr().err
