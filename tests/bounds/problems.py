"""Random finite problems for the tests of `alm_torchrl.bounds`, extremes included."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from alm_torchrl.bounds import (
    FiniteMDP,
    LatentAgent,
    latent_dynamics,
    q_values,
    random_agent,
    random_mdp,
    random_policy,
)

BATCH = 25
GAMMAS = (0.0, 1e-8, 1e-3, 0.1, 0.5, 0.9, 0.99, 0.999, 1 - 1e-6)
# Softness of the rows: the last two are nearly and exactly deterministic.
KERNELS = (0.3, 1.0, 3.0, 30.0, float("inf"))
AGENTS = (0.3, 1.0, 3.0, 10.0, 30.0)
# Powers of ten between the smallest and the largest reward of a problem.
SPANS = (0.0, 0.1, 1.0, 4.0, 12.0)


# Kinds of agents: tables as drawn; a model fitted to data; one fitted and then drawn to
# valuable latents, as the optimal dynamics are; the same latents in every state; and a
# model that knows nothing, of an encoder that hardly ever shows the latents with the
# better actions.
DRAWN_AS_IS, FITTED, HOPEFUL, ALIKE, BLIND = range(5)

# Arguments of `make_problem`, drawn one by one so that a failure prints numbers only.
DRAWN = {
    "seed": st.integers(0, 2**31),
    "states": st.integers(2, 5),
    "latents": st.integers(1, 5),
    "actions": st.integers(1, 4),
    "horizon": st.integers(1, 3) | st.integers(1, 20),
    "lmbda": st.sampled_from((0.0, 0.5, 0.95, 1.0)),
}


@dataclass(frozen=True, eq=False)
class Problem:
    mdp: FiniteMDP
    agent: LatentAgent
    horizon: int
    behaviour: Tensor
    """``pi_b(a|s)``, [BATCH, S, A], positive."""
    data: Tensor
    """Distribution over (s, a), [BATCH, S, A], positive."""
    numbers: Tensor
    """Standard normal numbers for whatever a statement quantifies over, [BATCH, 21]."""
    lmbda: float


def make_problem(*, seed, states, latents, actions, horizon, lmbda=0.95):
    generator = torch.Generator().manual_seed(seed)

    def pick(values):
        index = torch.randint(len(values), (BATCH,), generator=generator)
        return torch.tensor(values, dtype=torch.float64)[index]

    mdp = random_mdp(
        BATCH,
        states,
        actions,
        generator=generator,
        sharpness=pick(KERNELS),
        log10_reward=(-0.5, 0.5),
        gamma=pick(GAMMAS),
    )
    kind = pick((DRAWN_AS_IS, FITTED, HOPEFUL, ALIKE, BLIND))
    power = mdp.reward.log10()
    # All actions but one are worth the same, and more.
    power[kind == BLIND] = (torch.arange(actions) > 0).double() - 0.5
    power = power * pick(SPANS)[:, None, None]
    room = 6 - power.abs().amax((-2, -1), keepdim=True)
    shift = torch.rand(BATCH, 1, 1, generator=generator, dtype=torch.float64) * 2 - 1
    mdp = replace(mdp, reward=10 ** (power + shift * room))
    sizes = (BATCH, states, latents, actions)
    one, two, three = (
        random_agent(*sizes, generator=generator, sharpness=pick(AGENTS))
        for _ in range(3)
    )
    agent = LatentAgent(one.encoder, two.model, three.policy)
    data = torch.rand(BATCH, states, actions, generator=generator, dtype=torch.float64)
    data = data + 0.01
    data = data / data.sum((-2, -1), keepdim=True)
    agent = _align(mdp, agent, data, kind)
    behaviour = random_policy(
        BATCH, states, actions, generator=generator, sharpness=pick(AGENTS)
    )
    # In some states the data come from what the agent would do.
    own = torch.rand(BATCH, states, 1, generator=generator) < 0.5
    return Problem(
        mdp=mdp,
        agent=agent,
        horizon=horizon,
        behaviour=agent.state_policy.where(own, behaviour),
        data=data,
        numbers=torch.randn(BATCH, 21, generator=generator, dtype=torch.float64),
        lmbda=lmbda,
    )


def _align(mdp, agent, data, how):
    """Agents as drawn, or such that the bound is close or easily wrong (see above)."""
    how = how[:, None, None]
    # Most of the time the first latent is seen, and the poor action taken with it.
    encoder = _mostly_first(agent.encoder).where(how == BLIND, agent.encoder)
    habit = torch.cat([_mostly_first(agent.policy[:, :1]), agent.policy[:, 1:]], 1)
    policy = habit.where(how == BLIND, agent.policy)
    same = encoder[:, :1]
    encoder = same.where(how == ALIKE, encoder)
    agent = LatentAgent(encoder, agent.model, policy)

    fitted = latent_dynamics(mdp, encoder, data)
    log_q = q_values(mdp, agent.state_policy).log().mean(-2)
    score = (policy * log_q[:, None]).sum(-1)
    hopeful = (fitted.log() + score[:, None, None]).softmax(-1)
    blind = torch.full_like(fitted, 1 / fitted.shape[-1])
    model = agent.model
    for code, table in (
        (FITTED, fitted),
        (HOPEFUL, hopeful),
        (ALIKE, same[:, :, None]),
        (BLIND, blind),
    ):
        model = table.where(how[..., None] == code, model)
    return replace(agent, model=model / model.sum(-1, keepdim=True))


def _mostly_first(rows):
    first = torch.zeros_like(rows)
    first[..., 0] = 1
    return 1e-5 * rows + (1 - 1e-5) * first


def at_most(low, high):
    """Relative room left in ``low <= high``; not negative where it holds."""
    size = low.abs().where(low.isfinite(), 0) + high.abs().where(high.isfinite(), 0)
    return ((high - low) / (1 + size)).where(low != -torch.inf, torch.inf)


def equal(actual, expected):
    """Minus the relative difference; zero where they agree."""
    return -(actual - expected).abs() / (1 + expected.abs())
