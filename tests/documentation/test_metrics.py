"""The tables of docs/metrics.md name what training logs, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from alm_torchrl import (
    make_alm_loss,
    make_decoder,
    make_redq_loss,
    make_sac_loss,
    make_td3_loss,
    make_trainer,
)
from alm_torchrl.objectives import (
    EntropyBonus,
    Logarithms,
    QValueObjective,
    Reconstruction,
    ValuePrediction,
)
from tests.training.trainer_runs import Capture, Counter

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
SIZES = {"latent_dim": 3, "hidden_dim": 8, "model_hidden_dim": 8}


def variants(env):
    decoder = make_decoder(env.observation_spec["observation"].shape[-1], latent_dim=3)
    return make_alm_loss(
        env,
        entropy=EntropyBonus(),
        model_terms=[Reconstruction(decoder), ValuePrediction("model")],
        logarithms=Logarithms("bound"),
        **SIZES,
    )


# Agents, and the tables that have all of their metrics.
ALM = ("Every agent", "ALM", "Some agents")
BASELINE = ("Every agent", "Some agents")
AGENTS = {
    "alm": (lambda env: make_alm_loss(env, **SIZES), ALM),
    "qvalue": (
        lambda env: make_alm_loss(env, policy_objective=QValueObjective(), **SIZES),
        ALM,
    ),
    "variants": (
        variants,
        (*ALM, "Variants of ALM"),
    ),
    "td3": (lambda env: make_td3_loss(env, hidden_dim=8), BASELINE),
    "sac": (lambda env: make_sac_loss(env, hidden_dim=8), BASELINE),
    "redq": (lambda env: make_redq_loss(env, hidden_dim=8), BASELINE),
}


def tables(text):
    """The cells of each row by its name, for each table of metrics by its heading."""
    found = {}
    for section in text.split("\n## ")[1:]:
        title, *lines = section.splitlines()
        rows = [re.split(r"(?<!\\)\|", line) for line in lines if line.startswith("|")]
        rows = [[cell.strip() for cell in row[1:-1]] for row in rows]
        if rows[0] == ["name", "what it is", "unit", "healthy"]:
            found[title] = {row[0].strip("`"): row[1:] for row in rows[2:]}
            assert len(found[title]) == len(rows) - 2, title
    return found


@pytest.fixture(scope="module")
def documented():
    return tables(PAGE.read_text(encoding="utf-8"))


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
    assert set(documented) == {title for _, own in AGENTS.values() for title in own}
    named = [name for table in documented.values() for name in table]
    assert len(named) == len(set(named))
    assert set(named) == set().union(*logged.values())
    cells = [row for table in documented.values() for row in table.values()]
    assert all(len(row) == 3 and all(row) for row in cells)


@pytest.mark.parametrize("agent", AGENTS)
def test_each_agent_logs_what_its_tables_say(agent, documented, logged):
    names, own = logged[agent], AGENTS[agent][1]
    assert names <= {name for title in own for name in documented[title]}
    # What a Q-value objective does not imagine is not logged.
    whole = set(own) - {"Some agents"} - ({"ALM"} if agent == "qvalue" else set())
    assert names >= {name for title in whole for name in documented[title]}


def test_not_all_agents_log_what_only_some_do(documented, logged):
    for name in documented["Some agents"]:
        assert any(name not in names for names in logged.values()), name
