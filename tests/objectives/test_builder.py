"""make_alm_loss: sizes from arguments or specs, replaced parts, what it shares."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.objectives import SoftUpdate

from alm_torchrl import ALMLoss, make_alm_loss
from alm_torchrl.networks import RunningNorm
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
        (
            {"pixels": Unbounded((3, 8, 8))},
            bounded_action(),
            r"^observation_key: .* flat .*\['observation'\] of .*'pixels': \[3, 8, 8\]",
        ),
        (observations(3, 8, 8), bounded_action(), r"flat .*\[3, 8, 8\]"),
        (observations(), bounded_action(), r"flat .*: \[\]"),
        (observations(5), Unbounded((2,)), "bounded continuous action .* Unbounded"),
        (observations(5), Bounded(-1, 1, (2, 2)), r"continuous action .*\[2, 2\]"),
        (observations(5), Binary(2), "continuous action"),
    ],
)
def test_environments_that_do_not_fit(observation, action, match):
    with pytest.raises(ValueError, match=match):
        make_alm_loss(SpecEnv(observation, action))


class NestedEnv(EnvBase):
    """A point that the action pushes; keys are nested, observations are two entries."""

    def __init__(self, batch_size=()):
        batch = torch.Size(batch_size)
        super().__init__(batch_size=batch)
        flat = {name: Unbounded((*batch, size)) for name, size in (("x", 2), ("v", 3))}
        self.observation_spec = Composite(
            robot=Composite(x=flat["x"], shape=batch), v=flat["v"], shape=batch
        )
        robot = {"push": bounded_action(*batch)}
        self.action_spec = Composite(robot=Composite(robot, shape=batch), shape=batch)
        robot = {"pay": Unbounded((*batch, 1))}
        self.reward_spec = Composite(robot=Composite(robot, shape=batch), shape=batch)
        flags = {
            name: Categorical(2, dtype=torch.bool, shape=(*batch, 1))
            for name in ("done", "terminated", "truncated")
        }
        self.done_spec = Composite(robot=Composite(flags, shape=batch), shape=batch)

    def _reset(self, tensordict):
        return self.observation_spec.zero().update(self.full_done_spec.zero())

    def _step(self, tensordict):
        push = tensordict["robot", "push"]
        following = self.full_done_spec.zero()
        following["robot", "x"] = tensordict["robot", "x"] + push
        following["v"] = torch.cat([push, push.sum(-1, keepdim=True)], -1)
        following["robot", "pay"] = -push.square().sum(-1, keepdim=True)
        return following

    def _set_seed(self, seed):
        pass


@pytest.mark.parametrize("batch", [(), (3,)])
def test_keys_of_the_environment_are_used(batch):
    torch.manual_seed(0)
    env = NestedEnv(batch)
    observed = [("robot", "x"), "v"]
    loss = make_alm_loss(
        env,
        observation_key=observed,
        latent_key=("robot", "z"),
        normalize=True,
        **NETWORK_SIZES,
    )
    assert loss.encoder.in_keys == observed
    assert loss.encoder.out_keys[-1] == ("robot", "z")
    keys = loss.tensor_keys
    assert (keys.action, keys.reward) == (("robot", "push"), ("robot", "pay"))
    assert keys.terminated == ("robot", "terminated")
    SoftUpdate(loss, tau=0.005)
    data = env.rollout(4, loss.acting_policy()).reshape(-1, 4)
    assert data["robot", "push"].abs().max() > 0
    assert set(loss.in_keys) <= set(data.keys(True, True))
    loss.observe(data)
    [norm] = [m for m in loss.encoder.modules() if isinstance(m, RunningNorm)]
    seen = torch.cat([data["robot", "x"], data["v"]], -1).reshape(-1, 5)
    torch.testing.assert_close(norm.mean, seen.double().mean(0))
    losses = loss(data)
    assert all(value.isfinite().all() for value in losses.values())
    sum(losses[f"loss_{name}"] for name in ("model", "actor")).backward()
    first = loss.encoder_params["module", "0", "module", "1", "weight"]
    assert (first.grad.abs().sum(0) > 0).sum() >= 3


def test_several_rewards_need_a_key():
    env = SpecEnv(observations(5), bounded_action())
    env.reward_spec = Composite(a=Unbounded((1,)), b=Unbounded((1,)))
    with pytest.raises(ValueError, match=r"reward_key: expected one of \['a', 'b'\]"):
        make_alm_loss(env)
    assert make_alm_loss(env, reward_key="b").tensor_keys.reward == "b"


def test_nothing_is_asked_that_a_given_part_answers():
    built = make_alm_loss(**SIZES)
    parts = {name: getattr(built, name) for name in PARTS}
    pixels = SpecEnv({"pixels": Unbounded((3, 8, 8))}, bounded_action())
    loss = make_alm_loss(pixels, encoder=parts["encoder"], **NETWORK_SIZES)
    assert loss.encoder is parts["encoder"]
    check_sizes(loss)
    unbounded = SpecEnv(observations(5), Unbounded((2,)))
    check_sizes(make_alm_loss(unbounded, actor=parts["actor"], **NETWORK_SIZES))
    check_sizes(make_alm_loss(**parts))
    bounds = {name: SIZES[name] for name in ("action_low", "action_high")}
    check_sizes(make_alm_loss(encoder=parts["encoder"], **bounds, **NETWORK_SIZES))
    with pytest.raises(ValueError, match="needs either env or all of observation"):
        make_alm_loss(actor=parts["actor"], observation_dim=5)


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
