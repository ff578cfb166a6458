"""The theory's own objective, L^K, as one combination of arguments of the loss."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Normal
from torch.testing import assert_close
from torchrl.objectives import SoftUpdate

from alm_torchrl import ALMLoss
from alm_torchrl.objectives import Logarithms
from tests.helpers import B, K, make_loss, make_rows, network, probabilistic
from tests.objectives.model_rows import assert_same_model_loss, discounted, live

THEORY = {
    "logarithms": Logarithms("bound"),
    "discount_model_loss": True,
    "classifier_coef": 1.0,
}
GAMMA, REWARD, CHOSEN = 0.8, 2.0, 0.3
ENCODER_STD, MODEL_STD = 0.7, 0.5
ROWS = 20_000


class Constant(nn.Module):
    """The same numbers for every row."""

    def __init__(self, *values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, first, *_):
        return self.values.expand(*first.shape[:-1], -1)


class Around(Constant):
    """A Gaussian around zero."""

    def forward(self, first, *_):
        std = super().forward(first)
        return torch.zeros_like(std), std


class Rewarded(nn.Module):
    """The action and a constant."""

    def forward(self, latent, action):
        return REWARD + action


class BestClassifier(nn.Module):
    """Knows the densities of model and encoder."""

    def __init__(self, model_std):
        super().__init__()
        self.model_std = model_std

    def forward(self, latent, action, following):
        stds = (self.model_std, ENCODER_STD)
        logs = [Normal(0.0, std).log_prob(following) for std in stds]
        return torch.cat(logs, -1)


def one_state_loss(model_std):
    """A task with one state, where the policy always chooses the same action.

    Encoder, model, reward, critic and classifier are exact.
    """
    z_a = ["latent", "action"]
    value = (REWARD + CHOSEN) / (1 - GAMMA)
    loss = ALMLoss(
        encoder=probabilistic(Around(ENCODER_STD), ["observation"], "latent"),
        model=probabilistic(Around(model_std), z_a, ("next", "latent")),
        actor=TensorDictModule(Constant(CHOSEN), ["latent"], ["action"]),
        qvalue=TensorDictModule(
            Constant(value, value + 5), z_a, ["state_action_value"]
        ),
        reward=TensorDictModule(Rewarded(), z_a, ["predicted_reward"]),
        classifier=TensorDictModule(
            BestClassifier(model_std), [*z_a, ("next", "latent")], ["logits"]
        ),
        gamma=GAMMA,
        lmbda=1.0,
        **THEORY,
    )
    SoftUpdate(loss, tau=0.005)
    return loss


def lower_bound(model_std, horizon):
    """L^K of that task in closed form: log r is the same in each step."""
    ratio = (model_std / ENCODER_STD) ** 2
    kl = 0.5 * (ratio - 1 - math.log(ratio))
    log_reward = math.log(REWARD + CHOSEN)
    step = (1 - GAMMA) * log_reward - kl
    return sum(GAMMA**t * step for t in range(horizon)) + GAMMA**horizon * log_reward


@pytest.mark.parametrize("horizon", [1, 4])
def test_all_three_estimates_are_the_lower_bound(horizon):
    loss = one_state_loss(MODEL_STD)
    expected = lower_bound(MODEL_STD, horizon)
    rows = TensorDict(
        observation=torch.zeros(ROWS, 1),
        action=torch.full((ROWS, 1), CHOSEN),
        batch_size=[ROWS],
    )
    estimates = loss.lower_bound(rows, horizon)
    # Four standard errors.
    margin = 4 * (estimates.std() / ROWS**0.5).item()
    assert 0 < margin < 0.02
    assert abs(estimates.mean() - expected) < margin
    returns = loss.imagine(torch.zeros(ROWS, 1), horizon)["lambda_return"]
    assert abs(returns[:, 0].mean() - expected) < margin

    slices = rows[:8].unsqueeze(1).expand(8, horizon).contiguous()
    slices["next", "observation"] = slices["observation"]
    value, metadata = loss.model_loss(slices)
    assert_close(value, torch.tensor(-expected))
    # What is reported stays without logarithms.
    assert_close(metadata["model_reward"], torch.tensor(REWARD + CHOSEN))
    assert_close(
        metadata["terminal_value"], torch.tensor((REWARD + CHOSEN) / (1 - GAMMA))
    )


def test_it_bounds_the_return_and_is_tight_where_nothing_is_lost():
    true = (REWARD + CHOSEN) / (1 - GAMMA)
    rows = TensorDict(
        observation=torch.zeros(4, 1), action=torch.full((4, 1), CHOSEN), batch_size=[4]
    )
    exact = one_state_loss(ENCODER_STD).lower_bound(rows, K)
    assert_close(exact.exp() / (1 - GAMMA), torch.full((4,), true))
    assert math.exp(lower_bound(MODEL_STD, K)) / (1 - GAMMA) < 0.9 * true


def test_model_objective_with_the_networks_of_the_paper():
    loss = make_loss(deterministic=True, **THEORY)
    with torch.no_grad():
        # The theory is about positive rewards.
        live(loss, "reward")[-1].add_(3.0)
        for critic in (network(loss, "qvalue").q1, network(loss, "qvalue").q2):
            list(critic.parameters())[-1].add_(300.0)
    gamma = loss.gamma.item()

    def objective(terms):
        logs = [(1 - gamma) * reward.log() for reward in terms["reward"]]
        end = ((1 - gamma) * terms["end"][0]).log()
        return discounted(terms["kl"], gamma) - discounted(logs, gamma) - gamma**K * end

    slices = make_rows(B, K)
    assert_same_model_loss(loss, slices, objective)
