"""What the paper prints and does not hold, each with the smallest example at hand.

Named after the verdicts in the docstring of `alm_torchrl.bounds`.
"""

from __future__ import annotations

import math

import pytest
import torch

from alm_torchrl.bounds import (
    FiniteMDP,
    LatentAgent,
    bound_parts,
    classifier_log_ratio,
    discount_bound,
    discounted_visits,
    expected_return,
    horizon_terms,
    latent_q_values,
    latent_reward,
    log_omission_gap,
    lower_bound,
    model_rollout,
    offline_bound,
    optimal_dynamics,
    q_values,
    random_agent,
    random_mdp,
    shift_reward,
    surrogate_bound,
)
from alm_torchrl.bounds.exact import latent_kl
from tests.bounds.enumeration import Enumeration, double

TELLS_ALL = [[1.0, 0.0], [0.0, 1.0]]


def make(initial, kernel, reward, gamma):
    return FiniteMDP(double(initial), double(kernel), double(reward), double(gamma))


def log_return(mdp, agent):
    return expected_return(mdp, agent.state_policy).log().item()


def coin(gamma=0.5):
    """A fair choice of the state at the start, which then stays; one action."""
    stay = [[[1.0, 0.0]], [[0.0, 1.0]]]
    return make([0.5, 0.5], stay, [[1.0], [4.0]], gamma)


def sees_all(actions=1):
    """An agent that knows the state and predicts that it stays."""
    stay = double(TELLS_ALL)[:, None].expand(2, actions, 2)
    policy = torch.full((2, actions), 1 / actions, dtype=torch.float64)
    return LatentAgent(double(TELLS_ALL), stay.contiguous(), policy)


# -- Theorem 3.1 ---------------------------------------------------------------------


def test_weight_gamma_to_the_t_plus_one_cannot_be_lowered():
    """The bound with that weight is attained here, at a KL that is not zero.

    From state 0 on to state 1, which stays. There, two latents and an action for each.
    The model is the encoder reweighted by the value, and r(0) is the mean value.
    """
    gamma, share = 0.5, 0.1
    kernel = [[[0.0, 1.0]] * 2] * 2
    mean = (1 - share) * 1.0 + share * 41.0
    values = [(1 - gamma) * r + gamma * mean for r in (1.0, 41.0)]
    start = (1 - share) * values[0] + share * values[1]
    mdp = make([1.0, 0.0], kernel, [[start] * 2, [1.0, 41.0]], gamma)
    encoder = double([[1 - share, share]] * 2)
    weighted = double([(1 - share) * values[0], share * values[1]])
    model = (weighted / weighted.sum()).expand(2, 2, 2).contiguous()
    agent = LatentAgent(encoder, model, double(TELLS_ALL))

    truth = log_return(mdp, agent)
    tight = lower_bound(mdp, agent, 1, kl_weight="tight").item()
    assert tight == pytest.approx(truth, abs=1e-14)
    kl = bound_parts(mdp, agent, 1).kl.item()
    assert kl > 0.05
    printed = lower_bound(mdp, agent, 1).item()
    assert printed == pytest.approx(truth - (1 - gamma) * kl, abs=1e-14)


def test_bound_is_not_equation_3_with_equation_4_put_in():
    """Their difference has either sign: logs inside the sum, and discounted KL."""
    signs = set()
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        mdp = random_mdp(1, 2, 1, generator=generator, log10_reward=(-2, 2), gamma=0.8)
        agent = random_agent(
            1, 2, 2, 1, generator=generator, sharpness=0.3 + 0.7 * (seed % 2)
        )
        mdp = FiniteMDP(
            *(x[0] for x in (mdp.initial, mdp.kernel, mdp.reward, mdp.gamma))
        )
        agent = LatentAgent(agent.encoder[0], agent.model[0], agent.policy[0])
        oracle = Enumeration(mdp, agent, 2)

        def gain(path, oracle=oracle):
            ratio = oracle.real(path) / oracle.imagined(path)
            return math.log(oracle.k_step_return(path) * ratio)

        direct = oracle.mean(oracle.imagined, 2, gain)
        signs.add(direct > lower_bound(mdp, agent, 2).item() + 1e-3)
        assert direct <= log_return(mdp, agent)
    assert signs == {True, False}


def test_equation_3_says_nothing_of_endless_trajectories():
    """Its KL is not discounted and grows without end, while the bound converges."""
    generator = torch.Generator().manual_seed(0)
    mdp = random_mdp(1, 3, 2, generator=generator, gamma=0.5)
    agent = random_agent(1, 3, 3, 2, generator=generator)
    kl = bound_parts(mdp, agent, 400).kl[0]
    assert kl[200:].sum() > 0.99 * kl[:200].sum() > 10
    bounds = bound_parts(mdp, agent, 400).bounds()[0]
    assert bounds[200] == pytest.approx(bounds[400].item(), abs=1e-12)


def test_imagined_latents_do_depend_on_states_over_several_steps():
    """Independent of the next state given latent and action, but not by themselves."""
    joint = model_rollout(coin(), sees_all(), 3)[3]
    product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    assert (joint - product).abs().max() == pytest.approx(0.25)


def test_bound_is_no_function_of_latent_samples():
    """One latent, hence one and the same latent rollout, and two bounds."""
    nothing = LatentAgent(double([[1.0]] * 2), double([[[1.0]]]), double([[1.0]]))
    one, two = (
        coin(),
        make([1.0, 0.0], [[[1.0, 0.0]], [[0.0, 1.0]]], [[1.0], [4.0]], 0.5),
    )
    rollouts = [model_rollout(mdp, nothing, 3).sum(1) for mdp in (one, two)]
    assert torch.equal(*rollouts)
    assert lower_bound(one, nothing, 3) > lower_bound(two, nothing, 3) + 0.5


def test_best_bound_is_not_the_best_return():
    """A poor first reward costs its logarithm: L^1 prefers the worse policy."""
    stay = [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    kernel = [[stay[0], stay[1]], [stay[0]] * 2, [stay[1]] * 2]
    mdp = make([1.0, 0.0, 0.0], kernel, [[1.0, 1e-6], [1.0] * 2, [3.0] * 2], 0.5)
    bounds, returns = [], []
    for action in (0, 1):
        policy = torch.zeros(3, 2).double()
        policy[:, action] = 1
        model = double(kernel)
        agent = LatentAgent(torch.eye(3).double(), model, policy)
        bounds.append(lower_bound(mdp, agent, 1).item())
        returns.append(log_return(mdp, agent))
    assert bounds[0] > bounds[1] + 1
    assert returns[1] > returns[0] + 0.1


# -- A.4, A.5 ------------------------------------------------------------------------


def test_learnable_discount_alone_does_not_make_the_bound_tight():
    mdp, agent = coin(), sees_all()
    bound = discount_bound(horizon_terms(mdp, agent, 2), mdp.gamma).item()
    # The divergence is zero: what is left is the chance at the start.
    assert bound == pytest.approx(math.log(2.0))
    assert log_return(mdp, agent) == pytest.approx(math.log(2.5))


def test_optimal_dynamics_change_with_the_time_left_and_are_no_latent_model():
    generator = torch.Generator().manual_seed(0)
    mdp = random_mdp(1, 2, 1, generator=generator)
    agent = random_agent(1, 2, 2, 1, generator=generator)
    tables = optimal_dynamics(mdp, agent, horizon=3, stop=2)
    assert (tables.kernel[0, 0] - tables.kernel[0, 1]).abs().max() > 1e-3
    # Given the last latent and action, z' is not independent of s', as Eq. 4 has it.
    by_state = tables.choice[0, 1].sum(-1)
    assert (by_state[0] - by_state[1]).abs().max() > 1e-2


# -- A.6 -----------------------------------------------------------------------------


def test_step_of_a6_has_one_normalisation_too_many():
    """It writes log E[(1 - gamma) R] for log Q, and R is normalised already."""
    mdp, agent = coin(), sees_all()
    log_q = q_values(mdp, agent.state_policy)[:, 0].log()
    assert log_q.tolist() == pytest.approx([0.0, math.log(4.0)])
    scaled = (1 - mdp.gamma).log() + log_q
    right = (1 - mdp.gamma) * mdp.reward[:, 0].log() + mdp.gamma * log_q
    assert bool((log_q >= right - 1e-12).all())
    assert bool((scaled < right).all())


def test_step_of_a6_needs_the_latent_too():
    """It continues from (s_K, a_K) alone, where z_K would be the encoder's anew."""
    generator = torch.Generator().manual_seed(0)
    mdp = random_mdp(1, 3, 2, generator=generator)
    agent = random_agent(1, 3, 3, 2, generator=generator)
    joint = model_rollout(mdp, agent, 1)[:, 1, :, :, None] * agent.policy[:, None]
    anew = agent.encoder[..., None] * agent.policy[:, None]
    anew = anew / anew.sum(2, keepdim=True) * joint.sum(2, keepdim=True)
    kl = torch.einsum(
        "bsap,bzap->bsza", mdp.kernel, latent_kl(agent.model, agent.encoder)
    )
    mean, other = (joint * kl).sum(), (anew * kl).sum()
    assert mean.item() == pytest.approx(bound_parts(mdp, agent, 2).kl[0, 1].item())
    assert abs(other - mean) > 0.01


# -- A.7 -----------------------------------------------------------------------------


def test_offline_bound_as_printed_forgets_the_first_action():
    """The agent's first action pays nine times the data's, and costs nothing.

    From state 0 on to state 1, which stays, where both take action 0. Nearly all that
    counts is the first reward.
    """
    mdp = make([1.0, 0.0], [[[0.0, 1.0]] * 2] * 2, [[1.0, 9.0], [1.0, 1.0]], 0.01)
    behaviour = double([[1 - 1e-3, 1e-3], [1.0, 0.0]])
    model = double([[[0.0, 1.0]] * 2] * 2)
    agent = LatentAgent(double(TELLS_ALL), model, double([[0.0, 1.0], [1.0, 0.0]]))
    truth = expected_return(mdp, behaviour).log().item()
    printed = offline_bound(mdp, agent, behaviour, 1, form="printed").item()
    assert printed == pytest.approx(0.99 * math.log(9.0))
    assert printed > truth + 2
    amended = offline_bound(mdp, agent, behaviour, 1).item()
    assert amended == pytest.approx(printed + math.log(1e-3))


def test_offline_bound_is_about_the_behaviour_and_not_the_agent():
    """Its values are the behaviour's: it may exceed the agent's own return.

    State 0 pays until it is left for good. The agent leaves a hundred times as often.
    """
    kernel = [[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0]] * 2]
    mdp = make([1.0, 0.0], kernel, [[1.0, 1.0], [0.1, 0.1]], 0.99)
    behaviour = double([[0.999, 0.001], [0.5, 0.5]])
    model = double(kernel)
    agent = LatentAgent(double(TELLS_ALL), model, double([[0.9, 0.1], [0.5, 0.5]]))
    bound = offline_bound(mdp, agent, behaviour, 1).item()
    assert bound <= expected_return(mdp, behaviour).log().item()
    assert bound > log_return(mdp, agent) + 0.3


# -- A.8 and practice ----------------------------------------------------------------


def test_constants_of_a8_do_not_add_up_to_zero():
    """Steps (c) and (d): they add up to log a, and (d) multiplies by a."""
    mdp, agent, shift = coin(), sees_all(), 1e4
    first = lower_bound(shift_reward(mdp, shift), agent, 2).item()
    second = surrogate_bound(mdp, agent, 2, logs=False, kl_coef=shift).item() / shift
    assert first - second == pytest.approx(math.log(shift), abs=1e-6)


def test_small_coefficient_is_not_what_a8_speaks_of():
    """At a = c = 0.1 the approximation is off by as much as the return."""
    mdp, agent = coin(), sees_all()
    gap = log_omission_gap(mdp, agent, 2, 0.1).item()
    assert gap > 0.8 * expected_return(mdp, agent.state_policy).item()


def lucky():
    """One state; one latent in a hundred takes the action that pays a hundred times.

    The model expects it half of the time.
    """
    mdp = make([1.0], [[[1.0], [1.0]]], [[1.0, 100.0]], 0.9)
    model = torch.full((2, 2, 2), 0.5, dtype=torch.float64)
    return mdp, LatentAgent(double([[0.99, 0.01]]), model, double(TELLS_ALL))


@pytest.mark.parametrize(
    "changed",
    [
        {"kl_coef": 0.1},
        {"target_encoder": double([[0.5, 0.5]])},
        {"logs": False},
    ],
    ids=["coefficient", "target encoder", "no logs"],
)
def test_without_the_very_divergence_or_logs_it_is_no_lower_bound(changed):
    mdp, agent = lucky()
    truth = log_return(mdp, agent)
    assert lower_bound(mdp, agent, 1).item() < truth
    bound = surrogate_bound(mdp, agent, 1, **changed)
    assert (bound if changed.get("logs", True) else bound.log()) > truth + 0.5


def test_classifier_is_no_lower_bound():
    """Real and imagined latents look alike, and go with other states.

    The state is drawn anew each time, the latent nearly shows it, and what pays is to
    mistake it. The model guesses, and mistakes it half of the time.
    """
    mdp = make([0.5, 0.5], [[[0.5, 0.5]] * 2] * 2, [[1.0, 100.0], [100.0, 1.0]], 0.9)
    model = torch.full((2, 2, 2), 0.5, dtype=torch.float64)
    agent = LatentAgent(double([[0.99, 0.01], [0.01, 0.99]]), model, double(TELLS_ALL))
    data = discounted_visits(mdp, agent.state_policy)
    ratio = classifier_log_ratio(mdp, agent, data)
    assert ratio.abs().max() < 1e-12
    assert lower_bound(mdp, agent, 1).item() < log_return(mdp, agent)
    bound = surrogate_bound(mdp, agent, 1, log_ratio=ratio).item()
    assert bound > log_return(mdp, agent) + 0.5


def test_values_of_latents_are_no_lower_bound():
    """A latent that hides the state has the value of the states in the data."""
    mdp = coin()
    nothing = LatentAgent(double([[1.0]] * 2), double([[[1.0]]]), double([[1.0]]))
    data = double([[0.01], [0.99]])
    learned = latent_q_values(mdp, nothing.encoder, nothing.policy, data)
    assert learned.item() == pytest.approx(3.97)
    reward = latent_reward(mdp, nothing.encoder, data)
    for changed in ({"qvalue": learned}, {"reward": reward, "qvalue": learned}):
        bound = surrogate_bound(mdp, nothing, 1, **changed).item()
        assert bound > log_return(mdp, nothing) + 0.1
