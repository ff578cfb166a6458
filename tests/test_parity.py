"""The three recordings of the authors' code, and that a difference would show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict

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


def edited(tmp_path, edit, source=SMALL):
    """A copy of a recording after ``edit`` has changed its dictionary of arrays."""
    with np.load(source) as file:
        data = {key: file[key] for key in file.files}
    edit(data)
    path = tmp_path / "edited.npz"
    np.savez(path, **data)
    return str(path)


def test_there_are_three_recordings():
    assert [file.stem for file in FILES] == [
        "authors_k1",
        "authors_k3",
        "authors_k4_clipped",
    ]


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


@pytest.mark.parametrize(
    ("name", "bound"), [("k1", 1.0), ("k3", 1.0), ("k4_clipped", 0.4)]
)
def test_sizes_and_bounds_are_read_from_the_file(name, bound):
    path = HERE / "data" / f"authors_{name}.npz"
    loss = parity.Parity(str(path)).loss
    latent = TensorDict(latent=torch.zeros(1, 6), batch_size=[1])
    dist = loss.actor.get_dist(latent)
    with np.load(path) as data:
        action_dim = data["update0/slice/action"].shape[-1]
    torch.testing.assert_close(dist.high, torch.full((1, action_dim), bound))
    torch.testing.assert_close(dist.low, torch.full((1, action_dim), -bound))


def shift(array):
    return array + 1e-3 * (1 + np.abs(array).max())


def groups_in_excess(table):
    pattern = r"^  (\w+) +\d\.\d\de-\d\d  > 1e-5$"
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

    assert parity.main([edited(tmp_path, edit)]) == 1
    table = capsys.readouterr().out
    assert groups_in_excess(table) == set(changed.values())
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


@pytest.mark.parametrize("update", [0, 2])
def test_nan_is_a_difference_and_stays_one(tmp_path, update, capsys):
    def edit(data):
        data[f"update{update}/z"][0, 0] = np.nan

    assert parity.main([edited(tmp_path, edit)]) == 1
    assert re.search(r"^  z +nan  > 1e-5$", capsys.readouterr().out, re.MULTILINE)


def test_what_is_not_compared_fails(tmp_path, capsys):
    def edit(data):
        data["update1/something_else"] = np.zeros(3)

    assert parity.main([edited(tmp_path, edit)]) == 1
    assert "update1/something_else was not compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "error"), [("update1/kl", KeyError), ("lower_bound", KeyError)]
)
def test_what_is_missing_fails(tmp_path, key, error):
    with pytest.raises(error, match=key):
        parity.main([edited(tmp_path, lambda data: data.pop(key))])


def test_another_shape_fails(tmp_path):
    def edit(data):
        data["update0/kl"] = data["update0/kl"][..., 0]

    with pytest.raises(ValueError, match="update0/kl: shape"):
        parity.main([edited(tmp_path, edit)])


class Recorder(parity.Parity):
    """Records what the library computes."""

    def _compare(self, key, value):
        self.data[key] = value.detach().clone()


def record(path, action_bound):
    """Replaces what a recording says by what the library computes."""
    recorder = Recorder(path, action_bound)
    recorder.run()
    np.savez(path, **{key: value.numpy() for key, value in recorder.data.items()})
    actions = [recorder.data[f"update{n}/imagined_action"] for n in (0, 1)]
    return torch.stack(actions).abs()


def smaller(tmp_path):
    """A recording with fewer updates, rows and units, to be recorded again."""
    # Observation, latent and its multiples, hidden layers, batch.
    sizes = {5: 4, 6: 3, 12: 6, 8: 5, 14: 8, 32: 10, 48: 14, 16: 9, 3: 2}

    def edit(data):
        for key in list(data):
            start = re.search("^init|^update[01]/(slice|transition|z$|imagined_)", key)
            array = data.pop(key)
            if start is None:
                continue
            data[key] = array[tuple(slice(sizes.get(n)) for n in array.shape)]
            if key.endswith("/imagined"):
                data[key] = np.arange(0, 8, 2)
        data["init/actor/mean.weight"] *= 30

    return edited(tmp_path, edit, HERE / "data" / "authors_k3.npz")


def test_another_size_is_replayed(tmp_path):
    path = smaller(tmp_path)
    actions = record(path, 0.3)
    assert actions.max().item() == pytest.approx(0.3 - 1e-6, abs=1e-7)
    assert parity.main([path]) == 0
    replayed = parity.Parity(path)
    assert replayed.updates == 2
    assert replayed.data["update1/imagined_z"].shape == (3, 9, 3)

    def halve(data):
        data["update0/imagined_action"] = data["update0/imagined_action"] / 2

    assert parity.main([edited(tmp_path, halve, path)]) == 1


def test_a_bound_that_one_action_reaches_can_be_given(tmp_path):
    path = smaller(tmp_path)
    first, second, *_ = record(path, 1.0).flatten().sort(descending=True).values
    bound = round((first + second).item() / 2, 3)
    assert second < bound < first
    actions = record(path, bound)
    assert int((actions > bound - 2e-6).sum()) == 1
    assert parity.main([path]) == 1
    assert parity.main(["--action-bound", str(bound), path]) == 0


def test_one_bad_file_of_two_fails(tmp_path, capsys):
    def edit(data):
        data["update0/q1"] = data["update0/q1"] + 1

    assert parity.main([edited(tmp_path, edit), str(SMALL)]) == 1
    assert capsys.readouterr().out.rstrip().endswith("FAILED")


def test_the_table_is_aligned(capsys):
    assert parity.main([str(SMALL)]) == 0
    first, *rows, last = capsys.readouterr().out.splitlines()
    assert first == f"{SMALL}: 442 tensors compared"
    assert last == "all within 1e-5 (1 + max |recorded|)"
    assert {row.split()[0] for row in rows} == GROUPS
    assert len({len(row) for row in rows}) == 1


def test_script(tmp_path):
    def run(*arguments):
        root = str(HERE.parent)
        paths = [root, os.environ.get("PYTHONPATH", "")]
        return subprocess.run(
            [sys.executable, str(HERE / "parity.py"), *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            capture_output=True,
            text=True,
            check=False,
        )

    passed = run(str(SMALL))
    assert passed.returncode == 0, passed.stderr
    assert "all within 1e-5" in passed.stdout


def test_no_file_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        parity.main([])
    assert "FILE.npz" in capsys.readouterr().err
