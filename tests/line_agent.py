"""A linear task with a linear agent: returns, bounds and rollouts known by hand.

``x' = 0.5 x + a``, reward ``x + 2 a``, ``a = 0.3 x``: so ``x_t = 0.8^t x_0`` and the
reward at ``x`` is ``1.6 x``.
"""

from __future__ import annotations

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Independent, Normal
from torchrl.envs import GymWrapper
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import SoftUpdate, ValueEstimators

from alm_torchrl import ALMLoss
from alm_torchrl.baselines.losses import REDQBaseline, SACBaseline, TD3Baseline
from tests.helpers import probabilistic

GAMMA = 0.9
# Value of a state, and of a pair, where the task never ends.
VALUE = 1.6 / (1 - 0.8 * GAMMA)
QVALUE = (1 + 0.5 * GAMMA * VALUE, 2 + GAMMA * VALUE)


class Line(gymnasium.Env):
    """Starts at 1, 2, ...; episodes of given lengths in turn end by termination."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def __init__(self, lengths=(None,)):
        self.lengths = lengths
        self.episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        # TorchRL seeds with a reset of its own: the one after it starts at 1.
        self.episodes = 0 if seed is not None else self.episodes + 1
        self.length = self.lengths[(self.episodes - 1) % len(self.lengths)]
        self.x, self.steps = float(self.episodes), 0
        return np.array([self.x], np.float32), {}

    def step(self, action):
        reward = self.x + 2 * float(action[0])
        self.x = 0.5 * self.x + float(action[0])
        self.steps += 1
        observation = np.array([self.x], np.float32)
        return observation, reward, self.steps == self.length, False, {}


def make_line(lengths=(None,), limit=None):
    env = Line(lengths)
    if limit is not None:
        env = gymnasium.wrappers.TimeLimit(env, limit)
    return GymWrapper(env)


class Affine(nn.Linear):
    """A linear map of all inputs with given weights."""

    def __init__(self, weight, bias=0.0):
        weight = torch.tensor(weight, dtype=torch.float32).reshape(-1, len(weight[-1]))
        super().__init__(weight.shape[1], weight.shape[0])
        self.weight.data = weight
        self.bias.data = torch.as_tensor(bias).expand(weight.shape[0]).clone()

    def forward(self, *inputs):
        return super().forward(torch.cat(inputs, -1))


class AffineGaussian(Affine):
    """A linear mean with one standard deviation."""

    def __init__(self, weight, scale, bias=0.0):
        super().__init__(weight, bias)
        self.scale = scale

    def forward(self, *inputs):
        loc = super().forward(*inputs)
        return loc, torch.full_like(loc, self.scale)


def make_line_loss(
    *, scale=0.0, model=(0.5, 1.0), shift=0.0, reward_bias=0.0, logits=None, **kwargs
):
    """The exact agent, or one that errs in a known way; its latent is ``x``."""
    latent, action, following = "latent", "action", ("next", "latent")
    pair = [latent, action]
    classifier = Affine([[0.0] * 3] * 2, torch.tensor(logits or [0.0, 0.0]))
    loss = ALMLoss(
        encoder=probabilistic(AffineGaussian([[1.0]], scale), ["observation"], latent),
        model=probabilistic(AffineGaussian([model], scale, shift), pair, following),
        actor=TensorDictModule(Affine([[0.3]]), [latent], [action]),
        qvalue=TensorDictModule(
            Affine([QVALUE] * 2, torch.tensor([0.0, 1.0])), pair, ["state_action_value"]
        ),
        reward=TensorDictModule(
            Affine([[1.0, 2.0]], reward_bias), pair, ["predicted_reward"]
        ),
        classifier=TensorDictModule(classifier, [*pair, following], ["logits"]),
        **{"gamma": GAMMA, "classifier_coef": 0.0 if logits is None else 0.5, **kwargs},
    )
    SoftUpdate(loss, tau=0.5)
    return loss


BASELINES = {"td3": TD3Baseline, "sac": SACBaseline, "redq": REDQBaseline}


def make_line_baseline(agent, errors):
    """The exact policy, with wide noise, and critics that err by ``errors``."""
    actor = ProbabilisticActor(
        TensorDictModule(
            AffineGaussian([[0.3]], 5.0), ["observation"], ["loc", "scale"]
        ),
        in_keys=["loc", "scale"],
        distribution_class=lambda loc, scale: Independent(Normal(loc, scale), 1),
    )
    pair = ["observation", "action"]
    critics = [
        TensorDictModule(Affine([QVALUE], error), pair, ["state_action_value"])
        for error in errors
    ]
    own = {"bounds": (-9.0, 9.0)} if agent == "td3" else {"target_entropy": -1.0}
    loss = BASELINES[agent](actor, critics, num_qvalue_nets=len(critics), **own)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=GAMMA)
    return loss
