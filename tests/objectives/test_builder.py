"""make_alm_loss: sizes from arguments or specs, replaced parts, what it shares."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from alm_torchrl import ALMLoss, make_alm_loss
from tests.helpers import PARTS, targets

SIZES = {
    "observation_dim": 5,
    "action_low": [-0.4, -1.0],
    "action_high": [0.4, 1.0],
    "latent_dim": 4,
    "hidden_dim": 8,
    "model_hidden_dim": 10,
}


def linear_sizes(module):
    """Inputs and outputs of each linear layer, in order."""
    return [
        (layer.in_features, layer.out_features)
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
    ]


class SpecEnv(EnvBase):
    """An environment of which only the specs matter."""

    def __init__(self, observation, action, batch_size=()):
        super().__init__(batch_size=torch.Size(batch_size))
        self.observation_spec = Composite(observation, shape=batch_size)
        self.action_spec = action
        self.reward_spec = Unbounded((*batch_size, 1))

    def _reset(self, tensordict):
        raise NotImplementedError

    _step = _reset

    def _set_seed(self, seed):
        raise NotImplementedError


def observations(*shape):
    return {"observation": Unbounded(shape)}


def bounded_action(*batch):
    low = torch.tensor([-0.4, -1.0]).expand(*batch, 2)
    return Bounded(low, -low, shape=(*batch, 2))


def check_sizes(loss):
    layers = {name: linear_sizes(getattr(loss, name)) for name in PARTS}
    assert layers["encoder"][0] == (5, 8)
    assert layers["encoder"][-1] == (8, 8)
    assert layers["model"][0] == (6, 10)
    assert layers["model"][-1] == (10, 8)
    assert layers["actor"][0] == (4, 8)
    assert layers["actor"][-1] == (8, 2)
    assert layers["reward"][0] == layers["qvalue"][0] == (6, 8)
    assert layers["classifier"][0] == (10, 8)
    dist = loss.actor.get_dist(TensorDict(latent=torch.zeros(1, 4), batch_size=[1]))
    torch.testing.assert_close(dist.low, torch.tensor([[-0.4, -1.0]]))
    torch.testing.assert_close(dist.high, torch.tensor([[0.4, 1.0]]))


NETWORK_SIZES = {
    key: SIZES[key] for key in ("latent_dim", "hidden_dim", "model_hidden_dim")
}


@pytest.mark.parametrize("batch", [None, (), (3,)])
def test_sizes_come_from_arguments_or_an_environment(batch):
    if batch is None:
        check_sizes(make_alm_loss(**SIZES))
        return
    env = SpecEnv(observations(*batch, 5), bounded_action(*batch), batch)
    check_sizes(make_alm_loss(env, **NETWORK_SIZES))


@pytest.mark.parametrize(
    ("observation", "action", "match"),
    [
        ({"pixels": Unbounded((3, 8, 8))}, bounded_action(), 'flat "observation"'),
        (observations(3, 8, 8), bounded_action(), 'flat "observation"'),
        (observations(), bounded_action(), 'flat "observation"'),
        (observations(5), Unbounded((2,)), "bounded continuous action .* Unbounded"),
        (observations(5), Bounded(-1, 1, (2, 2)), "bounded continuous action"),
    ],
)
def test_environments_that_do_not_fit(observation, action, match):
    with pytest.raises(ValueError, match=match):
        make_alm_loss(SpecEnv(observation, action))


@pytest.mark.parametrize("name", ["observation_dim", "action_low", "action_high"])
def test_sizes_are_given_once(name):
    without = {key: value for key, value in SIZES.items() if key != name}
    env = SpecEnv(observations(5), bounded_action())
    for given in (without, {"env": env, name: SIZES[name]}):
        with pytest.raises(ValueError, match="needs either env or all of observation"):
            make_alm_loss(**given)


def test_a_part_of_ones_own():
    torch.manual_seed(1)
    built = make_alm_loss(**SIZES, gamma=0.5)
    reward = TensorDictModule(nn.Bilinear(4, 2, 1), ["latent", "action"], ["predicted"])
    loss = make_alm_loss(**SIZES, reward=reward)
    assert loss.reward is reward
    assert {tuple(p.shape) for p in loss.reward_params.parameters()} == {
        (1, 4, 2),
        (1,),
    }
    assert linear_sizes(loss.encoder) == linear_sizes(built.encoder)
    loss.set_keys(predicted_reward="predicted")
    z, a = torch.randn(3, 4), torch.randn(3, 2)
    expected = reward.module(z, a).squeeze(-1)
    torch.testing.assert_close(loss.latents.predict_reward(z, a), expected)
    assert built.gamma == 0.5


def test_targets_start_as_copies():
    loss = make_alm_loss(**SIZES)
    online = dict(loss.named_parameters())
    twins = targets(loss)
    parts = {"encoder_params": 6, "qvalue_params": 16}
    assert len(twins) == sum(parts.values())
    for part, count in parts.items():
        assert sum(name.startswith(part) for name in twins) == count
    for name, target in twins.items():
        assert torch.equal(target, online[name])
        assert target.data_ptr() != online[name].data_ptr()
        assert not target.requires_grad
    assert type(loss) is ALMLoss
