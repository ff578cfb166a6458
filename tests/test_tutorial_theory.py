"""`tutorials/theory.py` runs as a script of its own, and leaves its two figures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tutorial_runs(tmp_path):
    environment = os.environ | {
        "ALM_SMOKE": "1",
        "ALM_OUTPUT": str(tmp_path / "out"),
        "PYTHONPATH": str(ROOT),
    }
    script = ROOT / "tutorials" / "theory.py"
    done = subprocess.run(
        [sys.executable, script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert figures == ["ascent.png", "gaps.png"]
    assert all((tmp_path / "out" / name).stat().st_size > 10_000 for name in figures)
