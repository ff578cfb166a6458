"""The tables of `alm_torchrl.metrics` name what training logs, and nothing else."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from alm_torchrl import (
    make_alm_loss,
    make_redq_loss,
    make_sac_loss,
    make_td3_loss,
    make_trainer,
    metrics,
)
from tests.training.trainer_runs import Capture, Counter

SIZES = {"latent_dim": 3, "hidden_dim": 8, "model_hidden_dim": 8}
# Agents, and the tables that have all of their metrics.
ALM = ("Of every agent", "Of ALM", "Of some agents")
BASELINE = ("Of every agent", "Of some agents")
AGENTS = {
    "alm": (lambda env: make_alm_loss(env, **SIZES), ALM),
    "qvalue": (lambda env: make_alm_loss(env, actor_objective="qvalue", **SIZES), ALM),
    "variants": (
        lambda env: make_alm_loss(
            env,
            alpha_init=0.1,
            reconstruction_coef=1.0,
            value_prediction="model",
            log_terms="bound",
            **SIZES,
        ),
        (*ALM, "Of variants of ALM"),
    ),
    "td3": (lambda env: make_td3_loss(env, hidden_dim=8), BASELINE),
    "sac": (lambda env: make_sac_loss(env, hidden_dim=8), BASELINE),
    "redq": (lambda env: make_redq_loss(env, hidden_dim=8), BASELINE),
}


def tables(text):
    """The cells of each row by its name, for each table by the line above it."""
    found, title, edges, name = {}, "", [], ""
    for line in text.splitlines():
        if re.fullmatch(r"=+(  =+)+", line):
            edges = [match.span() for match in re.finditer(r"=+", line)]
        elif not line:
            edges = []
        elif edges:
            cells = [line[start:end].strip() for start, end in edges]
            if cells[0]:
                name = cells[0]
                assert name not in found.setdefault(title, {}), name
                found[title][name] = [""] * (len(edges) - 1)
            below = zip(found[title][name], cells[1:], strict=True)
            found[title][name] = [f"{old} {new}".strip() for old, new in below]
        elif line.endswith(":"):
            title = line[:-1]
    for table in found.values():
        assert table.pop("name") == ["what it is", "unit", "healthy"]
    return found


@pytest.fixture(scope="module")
def documented():
    return tables(inspect.cleandoc(metrics.__doc__))


@pytest.fixture(scope="module")
def logged():
    """The names that a short training of each agent logs."""
    found = {}
    for name, (make, _) in AGENTS.items():
        torch.manual_seed(0)
        env, log = Counter(), Capture()
        make_trainer(
            env,
            make(env),
            total_steps=3,
            warmup_steps=8,
            batch_size=4,
            horizon=2,
            logger=log,
            log_interval=1,
            eval_env=Counter(),
            eval_episodes=1,
        ).train()
        found[name] = set(log.values)
    return found


def test_the_tables_name_what_is_logged(documented, logged):
    named = [name for table in documented.values() for name in table]
    assert len(named) == len(set(named))
    assert set(named) == set().union(*logged.values())


@pytest.mark.parametrize("agent", AGENTS)
def test_each_agent_logs_what_its_tables_say(agent, documented, logged):
    names = logged[agent]
    assert names >= set(documented["Of every agent"])
    assert names <= {name for title in AGENTS[agent][1] for name in documented[title]}
    if agent in ("alm", "variants"):
        assert names >= set(documented["Of ALM"])
    if agent == "variants":
        assert names >= set(documented["Of variants of ALM"])


def test_not_all_agents_log_what_only_some_do(documented, logged):
    for name in documented["Of some agents"]:
        assert any(name not in names for names in logged.values()), name
        assert any(name in names for names in logged.values()), name


def test_every_metric_has_a_meaning_a_unit_and_a_range(documented):
    assert set(documented) == {
        title for _, titles in AGENTS.values() for title in titles
    }
    for table in documented.values():
        for name, cells in table.items():
            assert len(cells) == 3, name
            assert all(cells), name


def test_the_reader_of_tables_sees_rows_and_their_continuations():
    rule = "====  ==========  ====  ======="
    head = f"T:\n\n{rule}\nname  what it is  unit  healthy\n{rule}\n"
    rows = f"a     one         m     0:\n      two               1\n{rule}\n"
    assert tables(head + rows) == {"T": {"a": ["one two", "m", "0: 1"]}}
    with pytest.raises(AssertionError):
        tables(head.replace("unit", "    ") + rows)
    with pytest.raises(AssertionError, match="a"):
        tables(head + rows.replace("      two", "a     two"))
