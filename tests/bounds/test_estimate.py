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
DRAWS = 20_000


class Table(nn.Module):
    """Looks rows of a table up, at one-hot inputs."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table.clone())

    def forward(self, *one_hots):
        result = self.table
        row = one_hots[0] @ result.flatten(1)
        if len(one_hots) == 1:
            return row
        row = row.reshape(*row.shape[:-1], *self.table.shape[1:])
        return torch.einsum("...a,...ax->...x", one_hots[1], row)


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


class Actor(nn.Module):
    """A deterministic policy: the one-hot action of each latent."""

    def __init__(self, policy):
        super().__init__()
        self.table = nn.Parameter(policy.clone())

    def forward(self, latent):
        return latent @ self.table


@pytest.mark.parametrize("shared_latent", [True, False])
@pytest.mark.parametrize(("horizon", "coef"), [(1, 0.0), (1, 0.1), (3, 0.1), (6, 1.0)])
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

    # The ratio depends on (z, a, z'); the classifier reads all three.
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.ratio = nn.Parameter(ratio[0].clone())

        def forward(self, latent, action, next_latent):
            value = torch.einsum(
                "...z,...a,...w,zaw->...", latent, action, next_latent, self.ratio
            )
            return torch.stack([torch.zeros_like(value), value], -1)

    z_a = ["latent", "action"]
    loss = ALMLoss(
        encoder=drawn(agent.encoder[0], ["observation"], "latent"),
        model=drawn(agent.model[0], z_a, ("next", "latent")),
        actor=TensorDictModule(
            Actor(policy[0]), in_keys=["latent"], out_keys=["action"]
        ),
        qvalue=TensorDictModule(
            Table(qvalue[0].unsqueeze(-1).expand(-1, -1, 2)),
            in_keys=z_a,
            out_keys=["state_action_value"],
        ),
        reward=TensorDictModule(
            Table(reward[0].unsqueeze(-1)), in_keys=z_a, out_keys=["predicted_reward"]
        ),
        classifier=TensorDictModule(
            Classifier(), in_keys=[*z_a, ("next", "latent")], out_keys=["logits"]
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
            # Five standard errors: 64 comparisons, of fixed draws.
            assert error.abs() < 5 * deviation + 1e-9
            assert estimates.std() > 0
