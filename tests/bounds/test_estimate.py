"""The library's K-step estimate, fed with tables, has the exact mean of ``bounds``."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import nn
from torch.distributions import OneHotCategoricalStraightThrough
from torchrl.objectives import SoftUpdate

from alm_torchrl import ALMLoss
from alm_torchrl.bounds import (
    classifier_log_ratio,
    latent_q_values,
    latent_reward,
    practical_estimate,
    random_agent,
    random_mdp,
)

STATES, LATENTS, ACTIONS, GAMMA = 4, 3, 2, 0.9
DRAWS = 10_000


class Table(nn.Module):
    """Looks rows of a table up, at one-hot inputs."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table.clone())

    def forward(self, first, *others):
        row = torch.tensordot(first, self.table, 1)
        for other in others:
            ones = [1] * (row.ndim - other.ndim)
            row = (other.reshape(*other.shape, *ones) * row).sum(other.ndim - 1)
        return row


def drawn(table, in_keys, out_key):
    """A module that draws a one-hot vector from the row of a stochastic table."""
    return ProbabilisticTensorDictSequential(
        TensorDictModule(Table(table.log()), in_keys=in_keys, out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=[out_key],
            distribution_class=OneHotCategoricalStraightThrough,
        ),
    )


@pytest.mark.parametrize(
    ("horizon", "coef", "shared_latent"),
    [(1, 0.0, True), (1, 0.1, False), (3, 0.1, True), (4, 1.0, False)],
)
def test_the_estimate_agrees_with_its_exact_mean(horizon, coef, shared_latent):
    generator = torch.Generator().manual_seed(horizon)
    mdp = random_mdp(1, STATES, ACTIONS, gamma=GAMMA, generator=generator)
    agent = random_agent(1, STATES, LATENTS, ACTIONS, generator=generator)
    best = agent.policy.argmax(-1)
    policy = nn.functional.one_hot(best, ACTIONS).double()
    data = torch.full((1, STATES, ACTIONS), 1 / (STATES * ACTIONS)).double()
    reward = latent_reward(mdp, agent.encoder, data)
    qvalue = latent_q_values(mdp, agent.encoder, policy, data) / (1 - GAMMA)
    ratio = classifier_log_ratio(mdp, agent, data, shared_latent=shared_latent)
    exact = agent.encoder @ practical_estimate(
        agent.model,
        policy,
        reward,
        qvalue,
        ratio,
        mdp.gamma,
        horizon,
        classifier_coef=coef,
    )

    logits = torch.stack([torch.zeros_like(ratio[0]), ratio[0]], -1)
    z_a = ["latent", "action"]
    loss = ALMLoss(
        encoder=drawn(agent.encoder[0], ["observation"], "latent"),
        model=drawn(agent.model[0], z_a, ("next", "latent")),
        actor=TensorDictModule(Table(policy[0]), ["latent"], ["action"]),
        qvalue=TensorDictModule(
            Table(qvalue[0, :, :, None].expand(-1, -1, 2)), z_a, ["state_action_value"]
        ),
        reward=TensorDictModule(Table(reward[0, ..., None]), z_a, ["predicted_reward"]),
        classifier=TensorDictModule(
            Table(logits), [*z_a, ("next", "latent")], ["logits"]
        ),
        gamma=GAMMA,
        classifier_coef=coef,
        kl_coef=0.0,
    ).double()
    SoftUpdate(loss, tau=0.005)
    torch.manual_seed(horizon)
    for state in range(STATES):
        for action in range(ACTIONS):
            starts = TensorDict(
                {
                    "observation": torch.eye(STATES)[state].double().expand(DRAWS, -1),
                    "action": torch.eye(ACTIONS)[action].double().expand(DRAWS, -1),
                },
                batch_size=[DRAWS],
            )
            estimates = loss.lower_bound(starts, horizon)
            error = estimates.mean() - exact[0, state, action]
            deviation = estimates.std() / DRAWS**0.5
            # Five standard errors: 32 comparisons, of fixed draws.
            assert error.abs() < 5 * deviation + 1e-9
            assert estimates.std() > 0
