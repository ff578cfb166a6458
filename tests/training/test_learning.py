"""Each term learns a task with a known answer, and fails with its sign flipped.

The task is linear and quadratic: ``s' = 0.9 s + 0.5 a + 0.5 w`` with a fair coin
``w = +-1``, and reward ``-s^2 - 0.5 a^2``. The values and the best policy follow from
the Riccati equation. The coin has two sides, and a Gaussian model of the next latent
lies between them: real and imagined latents differ. The log ratio counts little in
the policy's return, as no policy can make that difference go away.

Every score is 0 for the best answer that ignores the input, and 1 for the exact one.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from itertools import product

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl import (
    ALMOptimizationStepper,
    NoiseSchedule,
    NonFiniteError,
    make_actor,
)
from alm_torchrl.functional import gaussian_kl
from alm_torchrl.testing import Sizes, make_loss

STATE, ACTION, SHOCK, COST, GAMMA = 0.9, 0.5, 0.5, 0.5, 0.8
NOISE = 0.1
UPDATES = 250
SIZES = Sizes(
    batch=128, horizon=2, latent_dim=4, observation_dim=1, action_dim=1, hidden_dim=32
)
# Closer to the exact answer than to none by a factor of three.
ENOUGH = 0.75


def riccati():
    """``p`` and ``gain`` of the optimum: V(s) = -p s^2 - constant, a = -gain s."""
    p = 0.0
    for _ in range(1000):
        gain = GAMMA * p * STATE * ACTION / (COST + GAMMA * p * ACTION**2)
        p = 1 + COST * gain**2 + GAMMA * p * (STATE - ACTION * gain) ** 2
    return p, gain


P, GAIN = riccati()


def follow(state, action, coin):
    return STATE * state + ACTION * action + SHOCK * coin


def reward(state, action):
    return -state.square() - COST * action.square()


def exact_value(state, action):
    """Q of the best linear policy with the noise that the targets act with."""
    noise = NOISE**2 * (COST + GAMMA * P * ACTION**2)
    constant = (GAMMA * P * SHOCK**2 + noise) / (1 - GAMMA)
    following = P * (follow(state, action, 0).square() + SHOCK**2) + constant
    return reward(state, action) - GAMMA * following


def toss(shape, generator=None):
    return 2.0 * torch.randint(2, shape, generator=generator) - 1


def draw(rows, horizon, seed):
    """Slices from uniform states and actions."""
    generator = torch.Generator().manual_seed(seed)
    action = 2 * torch.rand(rows, horizon, 1, generator=generator) - 1
    coin = toss((rows, horizon, 1), generator)
    states = [3 * torch.rand(rows, 1, generator=generator) - 1.5]
    for t in range(horizon):
        states.append(follow(states[-1], action[:, t], coin[:, t]))
    state = torch.stack(states, 1)
    return TensorDict(
        {
            "observation": state[:, :-1],
            "action": action,
            "next": {
                "observation": state[:, 1:],
                "reward": reward(state[:, :-1], action),
                "terminated": torch.zeros(rows, horizon, 1, dtype=torch.bool),
            },
        },
        batch_size=[rows, horizon],
    )


def flip(loss, term):
    """Changes the sign of a term."""
    name = f"{term.removeprefix('loss_')}_loss"
    compute = getattr(loss, name)

    def flipped(*args):
        value, metadata = compute(*args)
        return -value, metadata

    setattr(loss, name, flipped)


def train(flipped=None, seed=0):
    torch.manual_seed(seed)
    actor = make_actor(
        [-1.0],
        [1.0],
        latent_dim=SIZES.latent_dim,
        hidden_dim=SIZES.hidden_dim,
        noise_schedule=NoiseSchedule(NOISE, NOISE, 1),
    )
    loss = make_loss(SIZES, seed=seed, actor=actor, gamma=GAMMA, classifier_coef=0.01)
    if flipped:
        flip(loss, flipped)
    stepper = ALMOptimizationStepper(loss, lr=5e-3, tau=0.1)
    data = draw(4096, SIZES.horizon, seed)
    singles = draw(4096, 1, seed + 1)[:, 0]
    # A flipped term may grow without bound: what was learned until then counts.
    with suppress(NonFiniteError) if flipped else nullcontext():
        for rows in torch.randint(4096, (UPDATES, 2, SIZES.batch)):
            batch = TensorDict(
                {"slice": data[rows[0]], "transition": singles[rows[1]]},
                batch_size=[SIZES.batch],
            )
            stepper.step(None, batch)
    return loss


def explained(predicted, exact):
    """Share of the variance of the exact answer that the prediction explains."""
    return 1 - (predicted - exact).square().mean() / exact.var()


def held_out_latents(loss):
    transitions = draw(1024, 1, 100)[:, 0]
    return transitions, loss.latents.encode(transitions, "live").rsample()


def best_gaussian(loss, states):
    """The Gaussian with the least mean KL to the encoder's over the first dimension."""
    dist = loss.latents.encode(
        TensorDict(observation=states, batch_size=states.shape[:-1])
    )
    loc, precision = dist.base_dist.loc, dist.base_dist.scale**-2
    mean = precision.mean(0)
    return (precision * loc).mean(0) / mean, mean**-0.5


def model_score(loss):
    """Open-loop KL between that of the best constant and the best informed Gaussian."""
    slices = draw(1024, SIZES.horizon, 100)
    outcomes = []
    for coins in product((-1.0, 1.0), repeat=SIZES.horizon):
        states = [slices["observation"][:, 0]]
        for t, coin in enumerate(coins):
            states.append(follow(states[-1], slices["action"][:, t], coin))
        outcomes.append(torch.stack(states[1:], 1))
    target = loss.latents.encode(slices["next"]).base_dist

    def divergence(states):
        return gaussian_kl(*best_gaussian(loss, states), target.loc, target.scale)

    constant = divergence(slices["next", "observation"]).mean()
    informed = divergence(torch.stack(outcomes)).mean()
    achieved = loss.model_rollout(slices)["kl"].mean()
    return (constant - achieved) / (constant - informed)


def reward_score(loss):
    transitions, latent = held_out_latents(loss)
    exact = transitions["next", "reward"].squeeze(-1)
    return explained(loss.latents.predict_reward(latent, transitions["action"]), exact)


def classifier_score(loss):
    """Accuracy, from chance to all correct."""
    _, metadata = loss.classifier_loss(draw(1024, 1, 100)[:, 0])
    return 2 * metadata["classifier_accuracy"] - 1


def qvalue_score(loss):
    transitions, latent = held_out_latents(loss)
    action = transitions["action"]
    exact = exact_value(transitions["observation"], action)
    return explained(loss.latents.state_action_value(latent, action), exact)


def actor_score(loss):
    """Discounted return, between standing still and the optimum."""
    start, coins = draw(1024, 1, 100)["observation"][:, 0], toss((25, 1024, 1))

    def discounted_return(policy):
        state, total = start, 0
        for t, coin in enumerate(coins):
            action = policy(state).clamp(-1, 1)
            total = total + GAMMA**t * reward(state, action)
            state = follow(state, action, coin)
        return total.mean()

    policy = loss.acting_policy()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        achieved = discounted_return(
            lambda s: policy(TensorDict(observation=s, batch_size=[len(s)]))["action"]
        )
    still = discounted_return(torch.zeros_like)
    best = discounted_return(lambda s: -GAIN * s)
    return (achieved - still) / (best - still)


SCORES = {
    "loss_model": model_score,
    "loss_reward": reward_score,
    "loss_classifier": classifier_score,
    "loss_qvalue": qvalue_score,
    "loss_actor": actor_score,
}


def assert_learned(loss, term):
    torch.manual_seed(0)
    with torch.no_grad():
        score = SCORES[term](loss).item()
    assert score >= ENOUGH, f"{term} has not learned: its score is {score:.3f}"


@pytest.fixture(scope="module")
def learned():
    return train()


@pytest.mark.slow
@pytest.mark.parametrize("term", SCORES)
def test_each_term_learns(learned, term):
    assert_learned(learned, term)


@pytest.mark.slow
@pytest.mark.parametrize("term", SCORES)
def test_a_flipped_sign_fails_its_own_assertion(term):
    loss = train(term)
    with pytest.raises(AssertionError, match=f"{term} has not learned"):
        assert_learned(loss, term)
