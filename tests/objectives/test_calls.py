"""Networks called on tensors compute what their TensorDictModules compute."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.distributions import Distribution
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl import (
    make_actor,
    make_classifier,
    make_decoder,
    make_encoder,
    make_identity_encoder,
    make_model,
    make_qvalue,
    make_reward,
    make_stochastic_actor,
)
from alm_torchrl.networks.layers import AlwaysSample
from alm_torchrl.objectives.acting import MODES, EncodedPolicy
from alm_torchrl.objectives.calls import call_network, is_direct
from tests.helpers import make_batch, make_loss, probabilistic

SIZES = {"latent_dim": 2, "hidden_dim": 8}
PARTS = {
    "encoder": make_encoder(3, **SIZES),
    "identity": make_identity_encoder(3),
    "model": make_model(1, **SIZES),
    "actor": make_actor([-1.0], [1.0], **SIZES),
    "stochastic_actor": make_stochastic_actor([-1.0], [1.0], **SIZES),
    "qvalue": make_qvalue(1, **SIZES),
    "reward": make_reward(1, **SIZES),
    "classifier": make_classifier(1, **SIZES),
    "linear_classifier": make_classifier(1, linear=True, **SIZES),
    "decoder": make_decoder(3, **SIZES),
}
TENSORS = {
    "observation": torch.randn(5, 3),
    "latent": torch.randn(5, 2),
    "action": torch.rand(5, 1),
    ("next", "latent"): torch.randn(5, 2),
}


def numbers(result) -> list[torch.Tensor]:
    """All numbers of a distribution, or of outputs by key, in order."""
    if not isinstance(result, Distribution):
        return [result[key] for key in sorted(result.keys(), key=str)]
    extra = [getattr(result, name, result.mean) for name in ("low", "high")]
    return [result.mean, result.stddev, *extra]


@pytest.mark.parametrize("part", PARTS)
def test_builders_parts_are_called_without_a_tensordict(part):
    module = PARTS[part]
    inputs = {key: TENSORS[key] for key in module.in_keys}
    assert is_direct(module)
    tensordict = TensorDict(inputs, batch_size=[5])
    expected = getattr(module, "get_dist", module)(tensordict.copy())
    for given in (inputs, tensordict):
        result = call_network(module, given)
        assert type(result) is type(expected) or not isinstance(result, Distribution)
        if isinstance(result, dict):
            expected = expected.select(*module.out_keys)
        for value, other in zip(numbers(result), numbers(expected), strict=True):
            assert torch.equal(value, other)
    assert set(tensordict.keys()) == set(TensorDict(inputs).keys())


@pytest.mark.parametrize("kind", ["hook", "pre_hook", "forward", "type", "names"])
def test_whoever_watches_or_replaces_a_part_gets_its_tensordicts(kind):
    module, seen = make_reward(1, **SIZES), []

    def see(*arguments):
        seen.append(arguments[1])

    if kind == "hook":
        module.register_forward_hook(see)
    elif kind == "pre_hook":
        module.register_forward_pre_hook(see)
    elif kind == "forward":
        forward = module.forward
        module.forward = lambda td: (see(module, td), forward(td))[1]
    else:
        keys = list(module.in_keys)
        if kind == "names":
            keys = {"latent": "latent", "action": "action"}

        class Watched(nn.Module):
            def forward(self, latent, action):
                see(self, latent)
                return (latent + action).sum(-1, keepdim=True)

        module = TensorDictModule(Watched(), keys, module.out_keys)
    inputs = {key: TENSORS[key] for key in ("latent", "action")}
    assert not is_direct(module)
    assert call_network(module, inputs)["predicted_reward"].shape == (5, 1)
    assert len(seen) == 1


def test_a_distribution_of_ones_own_comes_from_its_module():
    module = probabilistic(nn.Identity(), ["latent"], "action")
    module[0].module.forward = lambda x: (x, x.exp())
    assert not is_direct(module)
    dist = call_network(module, {"latent": TENSORS["latent"]})
    assert torch.equal(dist.mean, TENSORS["latent"])


@pytest.mark.parametrize(
    "term", ["model", "reward", "classifier", "reward_classifier", "qvalue", "actor"]
)
def test_terms_and_gradients_are_the_same_either_way(term):
    loss, batch, results = make_loss(), make_batch(), []
    parts = ("encoder", "model", "actor", "qvalue", "reward", "classifier")
    for watched in (False, True):
        for module in (getattr(loss, part) for part in parts):
            network = module[0] if hasattr(module, "get_dist") else module
            if watched:
                network.register_forward_hook(lambda *_: None)
            assert is_direct(module) is not watched
        torch.manual_seed(0)
        loss.zero_grad()
        value, metadata = getattr(loss, f"{term}_loss")(batch)
        value.backward()
        gradients = [p.grad.clone() for p in loss.parameters() if p.grad is not None]
        results.append([value.detach(), *metadata.values(), *gradients])
    for plain, through_tensordict in zip(*results, strict=True):
        assert torch.equal(plain, through_tensordict)


# -- the acting policy -----------------------------------------------------------------


def acting(kind: str):
    """A policy, and the plain sequence of the same modules."""
    encoder, actor = {
        "default": (PARTS["encoder"], PARTS["actor"]),
        "identity": (
            PARTS["identity"],
            make_actor([-1.0], [1.0], latent_dim=3, hidden_dim=8),
        ),
        "stochastic": (PARTS["encoder"], PARTS["stochastic_actor"]),
    }[kind]
    modules = AlwaysSample(encoder), actor
    return (
        EncodedPolicy(*modules, selected_out_keys=["action"]),
        TensorDictSequential(*modules, selected_out_keys=["action"]),
    )


@pytest.mark.parametrize("shape", [(), (5,), (2, 4)])
@pytest.mark.parametrize("mode", [*MODES, None, ExplorationType.MEAN])
@pytest.mark.parametrize("kind", ["default", "identity", "stochastic"])
def test_policy_acts_as_the_sequence_of_its_modules(kind, mode, shape):
    observations = TensorDict(observation=torch.randn(*shape, 3), batch_size=shape)
    results, states = [], []
    for policy in acting(kind):
        torch.manual_seed(0)
        with set_exploration_type(mode):
            given = observations.clone()
            assert policy(given) is given
            results += [given, TensorDict(action=policy(observations["observation"]))]
        states.append(torch.get_rng_state())
    direct, dispatched, expected, expected_dispatched = results
    assert set(direct.keys()) == set(expected.keys()) == {"observation", "action"}
    assert torch.equal(direct["action"], expected["action"])
    assert torch.equal(dispatched["action"], expected_dispatched["action"])
    assert torch.equal(*states)


@pytest.mark.parametrize("place", ["sampler", "encoder", "actor", "head"])
def test_whoever_watches_a_policy_sees_its_modules_called(place):
    policy, _ = acting("default")
    places = {
        "sampler": policy[0],
        "encoder": policy[0].module,
        "actor": policy[1],
        "head": policy[1][1],
    }
    calls = []
    hook = places[place].register_forward_hook(lambda *_: calls.append(place))
    with hook, set_exploration_type(ExplorationType.RANDOM):
        policy(TensorDict(observation=torch.zeros(3)))
    assert calls == [place]


def test_policy_can_be_cut_and_write_elsewhere():
    policy, sequence = acting("default")
    observation = TensorDict(observation=torch.zeros(3))
    with set_exploration_type(ExplorationType.RANDOM):
        assert policy[:](observation.clone())["latent_loc"].shape == (2,)
        assert policy[:1](observation.clone())["latent"].shape == (2,)
        out = TensorDict()
        assert policy(observation, tensordict_out=out) is out
        assert set(out.keys()) == {"action"}
        for each in (policy, sequence):
            with pytest.raises(KeyError, match="observation"):
                each(TensorDict(state=torch.zeros(3)))
