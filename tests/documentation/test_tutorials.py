"""Each tutorial runs as a script in a process of its own, and writes to its folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.font_manager
import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(script, tmp_path):
    if script.stem == "tune":
        pytest.importorskip("ray.tune")
        pytest.importorskip("optuna")
    output, home, scratch = (tmp_path / name for name in ("out", "home", "scratch"))
    home.mkdir()
    scratch.mkdir()
    environment = os.environ | {
        "ALM_SMOKE": "1",
        "ALM_OUTPUT": str(output),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(scratch),
        # Where Ray's sockets are, whose paths must be short.
        "RAY_TMPDIR": "/tmp",
        # Its list of fonts, which importing it here has made.
        "MPLCONFIGDIR": matplotlib.get_cachedir(),
    }
    done = subprocess.run(
        [sys.executable, script],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = [path for path in output.iterdir() if path.suffix in (".png", ".gif")]
    assert figures
    for path in figures:
        begins = {".png": b"\x89PNG", ".gif": b"GIF8"}[path.suffix]
        assert path.read_bytes().startswith(begins), path
        # A film of few frames is smaller than a figure.
        assert path.stat().st_size > (10_000 if path.suffix == ".png" else 1000), path
    # What compiled code writes, it writes where it stands.
    assert list(home.iterdir()) == []
    assert [path for path in scratch.rglob("*") if path.is_file()] == []
