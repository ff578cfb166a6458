"""Runs what the documentation prints, as a user would: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_script(script: Path, cwd: Path, **environment: str) -> None:
    """Runs a Python file; what it writes to standard error says why it failed."""
    # Ray's sockets need short paths.
    environment = {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": "/tmp", **environment}
    done = subprocess.run(
        [sys.executable, script],
        env=os.environ | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
