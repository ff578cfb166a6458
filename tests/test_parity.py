"""The three recordings of the authors' code, and that a difference would show."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import parity

HERE = Path(__file__).parent
FILES = sorted((HERE / "data").glob("authors_*.npz"))
SMALL = HERE / "data" / "authors_k1.npz"
GROUPS = {
    "kl",
    "predicted_reward",
    "terminal_value",
    "z",
    "z_next",
    "z_next_model",
    "classifier_logits",
    "target_value",
    "q1",
    "q2",
    "imagined_z",
    "imagined_action",
    "imagined_reward",
    "imagined_log_ratio",
    "imagined_q",
    "lambda_return",
    "loss_reward",
    "loss_classifier",
    "after1",
    "after2",
    "after3",
    "lower_bound",
    *(
        f"{kind}_{name}"
        for kind in ("grad", "grad_norm")
        for name in ("encoder_model", "reward_classifier", "qvalue", "actor")
    ),
    *(f"loss_{name}" for name in ("encoder_model", "qvalue", "actor")),
}


def edited(tmp_path, edit):
    """A copy of a recording after ``edit`` has changed its dictionary of arrays."""
    with np.load(SMALL) as file:
        data = {key: file[key] for key in file.files}
    edit(data)
    path = tmp_path / "edited.npz"
    np.savez(path, **data)
    return str(path)


def test_there_are_three_recordings():
    names = [file.stem for file in FILES]
    assert names == ["authors_k1", "authors_k3", "authors_k4_clipped"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recorded_number_is_reproduced(file):
    replayed = parity.Parity(str(file))
    assert replayed.updates == 3
    differences = replayed.run()
    assert set(differences) == GROUPS
    for group, difference in differences.items():
        assert difference <= 1e-5, group
    assert replayed.missed() == set()
    with np.load(file) as data:
        inputs = [k for k in data.files if re.search("^init/|/slice/|/transition/", k)]
        std = [k for k in data.files if k.endswith("/std")]
        assert len(replayed.compared) == len(data.files) - len(inputs) - len(std)


def shift(array):
    return array + 1e-3 * (1 + np.abs(array).max())


def groups_in_excess(table):
    pattern = r"^  (\w+) +\S+  > 1e-5$"
    return set(re.findall(pattern, table, re.MULTILINE))


def test_changed_results_are_found(tmp_path, capsys):
    changed = {
        "update0/kl": "kl",
        "update2/lambda_return": "lambda_return",
        "update1/loss_actor": "loss_actor",
        "update1/grad_qvalue/critic/Q1.0.weight": "grad_qvalue",
        "update2/grad_norm_actor": "grad_norm_actor",
        "after1/encoder/encoder.0.weight": "after1",
        "after3/critic_target/Q2.0.weight": "after3",
        "lower_bound": "lower_bound",
    }

    def edit(data):
        for key in changed:
            data[key] = shift(data[key])
        # A NaN is a difference and stays one.
        data["update0/z"][0, 0] = np.nan
        data["update1/something_else"] = np.zeros(3)

    assert parity.main([edited(tmp_path, edit), str(SMALL)]) == 1
    table = capsys.readouterr().out
    assert groups_in_excess(table) == {*changed.values(), "z"}
    assert "update1/something_else was not compared" in table
    assert table.rstrip().endswith("FAILED")


@pytest.mark.parametrize(
    ("key", "edit", "group"),
    [
        ("init/reward/reward.5.bias", shift, "loss_reward"),
        ("update0/transition/reward", shift, "target_value"),
        ("update0/transition/terminated", np.logical_not, "target_value"),
        (
            "update0/transition/imagined",
            lambda rows: np.setdiff1d(np.arange(16), rows),
            "loss_classifier",
        ),
    ],
)
def test_changed_inputs_are_found(tmp_path, key, edit, group, capsys):
    path = edited(tmp_path, lambda data: data.update({key: edit(data[key])}))
    assert parity.main([path]) == 1
    assert group in groups_in_excess(capsys.readouterr().out)


def test_what_is_missing_or_has_another_shape_fails(tmp_path):
    for key in ("update0/kl", "lower_bound"):
        with pytest.raises(KeyError, match=key):
            parity.main([edited(tmp_path, lambda data, key=key: data.pop(key))])
    path = edited(
        tmp_path, lambda data: data.update({"update0/kl": data["update0/kl"][..., 0]})
    )
    with pytest.raises(ValueError, match="update0/kl: shape"):
        parity.main([path])


def test_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parity.py", str(SMALL)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(HERE / "parity.py"), run_name="__main__")
    assert end.value.code == 0
    assert "442 tensors compared" in capsys.readouterr().out
