"""Each tutorial runs as a script in a process of its own, and writes to its folder."""

from __future__ import annotations

import matplotlib
import matplotlib.font_manager
import pytest

from tests.documentation.scripts import ROOT, run_script

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
    run_script(
        script,
        home,
        ALM_SMOKE="1",
        ALM_OUTPUT=str(output),
        PYTHONDONTWRITEBYTECODE="1",
        TMPDIR=str(scratch),
        # Its list of fonts, which importing it here has made.
        MPLCONFIGDIR=matplotlib.get_cachedir(),
    )
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
