"""The networks: sizes, initialisation, keys and heads."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import IndependentNormal

from alm_torchrl import ClampedNormal, NoiseSchedule
from alm_torchrl.distributions import PointNormal
from alm_torchrl.networks import (
    RunningNorm,
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
from alm_torchrl.networks.layers import OutputLinear

# Sizes of HalfCheetah; those of latent and layers are the paper's.
S, A, L, H, M = 17, 6, 50, 512, 1024
LOW, HIGH = [-1.0] * A, [1.0] * A
NORM = [(nn.LayerNorm, H), (nn.Tanh, None)]
ELU = [(nn.ELU, None)]


def dense(*sizes):
    return [(nn.Linear, sizes)]


def layers_of(module):
    """Kind and size of each layer with or without parameters, in order."""
    layers = []
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            assert layer.bias is not None
            layers.append((nn.Linear, (layer.in_features, layer.out_features)))
        elif isinstance(layer, nn.LayerNorm):
            assert layer.eps == 1e-5
            layers.append((nn.LayerNorm, *layer.normalized_shape))
        elif type(layer).__module__.startswith("torch.nn.modules.activation"):
            layers.append((type(layer), None))
    return layers


ELU_LAYERS = {
    "encoder": (lambda: make_encoder(S), S, H, 2 * L),
    "model": (lambda: make_model(A), L + A, M, 2 * L),
    "actor": (lambda: make_actor(LOW, HIGH), L, H, A),
    "stochastic": (lambda: make_stochastic_actor(LOW, HIGH), L, H, 2 * A),
    "decoder": (lambda: make_decoder(S), L, H, S),
}
NORM_LAYERS = {
    "reward": (lambda: make_reward(A), L + A, H, 1),
    "qvalue": (lambda: make_qvalue(A), L + A, H, 1),
    "classifier": (lambda: make_classifier(A), 2 * L + A, H, 2),
}
PAPER = {
    name: (build, dense(i, h) + first + dense(h, h) + ELU + dense(h, o))
    for table, first in ((ELU_LAYERS, ELU), (NORM_LAYERS, NORM))
    for name, (build, i, h, o) in table.items()
}
PAPER["qvalue"] = PAPER["qvalue"][0], 2 * PAPER["qvalue"][1]
PAPER["linear"] = lambda: make_classifier(A, linear=True), dense(2 * L + A, 2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# -- architecture ---------------------------------------------------------------------


@pytest.mark.parametrize("part", PAPER)
def test_default_networks_are_the_papers(part):
    build, layers = PAPER[part]
    module = build()
    assert layers_of(module) == layers
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            assert (layer.bias == 0).all()
            weight = layer.weight.detach()
            wide = weight if weight.shape[0] < weight.shape[1] else weight.T
            identity = torch.eye(len(wide))
            torch.testing.assert_close(wide @ wide.T, identity, atol=1e-4, rtol=0)
        elif isinstance(layer, nn.LayerNorm):
            assert (layer.weight == 1).all()
            assert (layer.bias == 0).all()


LN = [(nn.LayerNorm, H)]
NORMED = {
    name: (kind, LN + ELU, i, h, o)
    for name, kind, i, h, o in (
        ("encoder", make_encoder, S, H, 2 * L),
        ("model", make_model, L + A, H, 2 * L),
        ("actor", make_actor, L, H, A),
        ("stochastic", make_stochastic_actor, L, H, 2 * A),
    )
}
NORMED |= {
    name: (kind, NORM, i, h, o)
    for name, kind, i, h, o in (
        ("reward", make_reward, L + A, H, 1),
        ("qvalue", make_qvalue, L + A, H, 1),
        ("classifier", make_classifier, 2 * L + A, H, 2),
    )
}


@pytest.mark.parametrize("part", NORMED)
def test_layer_norm_stands_before_each_activation(part):
    build, first, i, h, o = NORMED[part]
    sizes = (
        (LOW, HIGH) if "actor" in build.__name__ else (S if part == "encoder" else A,)
    )
    expected = dense(i, h) + first + dense(h, h) + LN + ELU + dense(h, o)
    module = build(*sizes, hidden_dim=H, layer_norm=True)
    assert layers_of(module) == expected * (2 if part == "qvalue" else 1)


@pytest.mark.parametrize("part", PAPER)
def test_reset_parameters_draws_the_same_kind_again(part):
    module = PAPER[part][0]()
    old = [p.detach().clone() for p in module.parameters()]
    for param in module.parameters():
        param.data.fill_(7.0)
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.LayerNorm):
            layer.reset_parameters()
    for before, after in zip(old, module.parameters(), strict=True):
        assert not (after == 7.0).any()
        if before.ndim == 1:
            assert torch.equal(before, after)
        else:
            assert not torch.equal(before, after)
            # Orthogonal as before: the Frobenius norm is that of the smaller side.
            torch.testing.assert_close(after.norm(), before.norm())


def test_twin_critics_differ():
    state = make_qvalue(A).state_dict()
    first = [value for name, value in state.items() if ".q1." in name]
    second = [value for name, value in state.items() if ".q2." in name]
    assert len(first) == len(second) == 8
    assert sum(not torch.equal(a, b) for a, b in zip(first, second, strict=True)) == 3


SMALL = {"latent_dim": 4, "hidden_dim": 8}
LATENT = {"latent_loc": 4, "latent_scale": 4, "latent": 4}
PAIR = {"latent": 4, "action": 2}
TRIPLE = {**PAIR, ("next", "latent"): 4}
ACTION = {f"action_{name}": 2 for name in ("loc", "scale", "low", "high")}
ACTION |= {"action": 2}
BOUNDS = [-1, -1], [1, 1]
KEYS = {
    "encoder": (make_encoder(5, **SMALL), {"observation": 5}, LATENT),
    "own key": (
        make_encoder(5, observation_key=("deep", "state"), **SMALL),
        {("deep", "state"): 5},
        LATENT,
    ),
    "two entries": (
        make_encoder(5, observation_key=["x", ("deep", "v")], normalize=True, **SMALL),
        {"x": 2, ("deep", "v"): 3},
        LATENT,
    ),
    "identity": (make_identity_encoder(4), {"observation": 4}, LATENT),
    "identity of two": (
        make_identity_encoder(4, observation_key=["x", "v"], latent_key=("a", "z")),
        {"x": 1, "v": 3},
        {("a", "z_loc"): 4, ("a", "z_scale"): 4, ("a", "z"): 4},
    ),
    "model": (
        make_model(2, **SMALL),
        PAIR,
        {"next_latent_loc": 4, "next_latent_scale": 4, ("next", "latent"): 4},
    ),
    "actor": (make_actor(*BOUNDS, **SMALL), {"latent": 4}, ACTION),
    "stochastic": (make_stochastic_actor(*BOUNDS, **SMALL), {"latent": 4}, ACTION),
    "qvalue": (make_qvalue(2, **SMALL), PAIR, {"state_action_value": 2}),
    "reward": (make_reward(2, **SMALL), PAIR, {"predicted_reward": 1}),
    "classifier": (make_classifier(2, **SMALL), TRIPLE, {"logits": 2}),
    "linear": (make_classifier(2, linear=True, **SMALL), TRIPLE, {"logits": 2}),
    "decoder": (make_decoder(5, **SMALL), {"latent": 4}, {"reconstruction": 5}),
}
OWN = {"latent_key": ("a", "z"), "action_key": ("a", "u"), **SMALL}
OWN_PAIR = {("a", "z"): 4, ("a", "u"): 2}
OWN_ACTION = {("a", f"u_{name}"): 2 for name in ("loc", "scale", "low", "high")}
OWN_ACTION |= {("a", "u"): 2}
KEYS |= {
    "own model": (
        make_model(2, **OWN),
        OWN_PAIR,
        {("a", "next_z_loc"): 4, ("a", "next_z_scale"): 4, ("next", "a", "z"): 4},
    ),
    "own actor": (make_actor(*BOUNDS, **OWN), {("a", "z"): 4}, OWN_ACTION),
    "own stochastic": (
        make_stochastic_actor(*BOUNDS, **OWN),
        {("a", "z"): 4},
        OWN_ACTION,
    ),
    "own qvalue": (
        make_qvalue(2, state_action_value_key=("a", "q"), **OWN),
        OWN_PAIR,
        {("a", "q"): 2},
    ),
    "own reward": (
        make_reward(2, predicted_reward_key="r", **OWN),
        OWN_PAIR,
        {"r": 1},
    ),
    "own classifier": (
        make_classifier(2, logits_key=("a", "c"), **OWN),
        {**OWN_PAIR, ("next", "a", "z"): 4},
        {("a", "c"): 2},
    ),
    "own decoder": (
        make_decoder(5, latent_key=("a", "z"), reconstruction_key="s", **SMALL),
        {("a", "z"): 4},
        {"s": 5},
    ),
}


@pytest.mark.parametrize("part", KEYS)
def test_keys_and_shapes(part):
    module, reads, writes = KEYS[part]
    assert module.in_keys == list(reads)
    assert module.out_keys == list(writes)
    for batch in ((), (3,), (2, 3)):
        inputs = TensorDict(batch_size=batch)
        for key, size in reads.items():
            inputs.set(key, torch.randn(*batch, size))
        output = module(inputs)
        assert set(output.keys(True, True)) == {*reads, *writes}
        for key, size in writes.items():
            assert output[key].shape == (*batch, size)
            assert output[key].isfinite().all()


# -- heads ----------------------------------------------------------------------------


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def bounded_std(raw, low, high):
    """The bounds as the paper's description prints them, in plain numbers."""
    return low + softplus(high - softplus(high - raw) - low)


def set_output(module, *halves):
    """Makes the last layer's output constant: one number for each half."""
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    last.weight.data.zero_()
    for bias, value in zip(last.bias.data.chunk(len(halves)), halves, strict=True):
        bias.fill_(value)


@pytest.mark.parametrize("part", ["encoder", "model", "stochastic"])
@pytest.mark.parametrize("raw", [-1e4, -20.0, -1.0, 0.0, 0.1, 3.0, 10.0, 40.0, 1e4])
def test_means_and_standard_deviations_are_bounded(part, raw):
    module, reads, _ = KEYS[part]
    set_output(module, raw, raw / 2)
    inputs = {key: torch.randn(6, size) for key, size in reads.items()}
    dist = module.get_dist(TensorDict(inputs, batch_size=[6]))
    if part == "stochastic":
        assert type(dist) is ClampedNormal
        mean, std = math.tanh(raw), bounded_std(raw / 2, math.exp(-5), math.exp(2))
    else:
        assert type(dist) is IndependentNormal
        assert dist.batch_shape == (6,)
        mean, std = 30 * math.tanh(raw / 30), bounded_std(raw / 2, 0.1, 10)
        assert 0.1 <= std < 10.001
    torch.testing.assert_close(dist.mean, torch.full_like(dist.mean, mean))
    torch.testing.assert_close(dist.stddev, torch.full_like(dist.mean, std))


def features_of(module, inputs):
    """What the last linear layer gives."""
    features = inputs
    for layer in module[0].module:
        features = layer(features)
        if isinstance(layer, OutputLinear):
            return features
    raise AssertionError("no last layer")


@pytest.mark.parametrize("layers", [1, 3])
def test_number_of_hidden_layers(layers):
    more = (dense(H, H) + ELU) * (layers - 1)
    encoder = make_encoder(S, hidden_layers=layers)
    assert layers_of(encoder) == dense(S, H) + ELU + more + dense(H, 2 * L)
    model = make_model(A, hidden_dim=H, hidden_layers=layers)
    assert layers_of(model) == dense(L + A, H) + ELU + more + dense(H, 2 * L)
    for make in (make_encoder, make_model):
        with pytest.raises(ValueError, match="hidden_layers: expected an integer >= 1"):
            make(2, hidden_layers=0)


@pytest.mark.parametrize("kind", ["rms", "simnorm", "layernorm"])
def test_bounded_latents_have_no_noise(kind):
    size = {"latent_dim": 16, "hidden_dim": 8}
    encoder, model = (
        make_encoder(5, latent=kind, **size),
        make_model(2, latent=kind, **size),
    )
    state, action = 10 * torch.randn(6, 5), torch.randn(6, 2)
    td = TensorDict(observation=state, action=action, batch_size=[6])
    raw = features_of(encoder, state)
    if kind == "rms":
        expected = raw / (raw.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    elif kind == "layernorm":
        shifted = raw - raw.mean(-1, keepdim=True)
        std = (raw.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        expected = nn.functional.elu(shifted / std)
    else:
        groups = raw.exp().reshape(6, 2, 8)
        expected = (groups / groups.sum(-1, keepdim=True)).reshape(6, 16)
    z = encoder(td)["latent"]
    torch.testing.assert_close(z, expected)
    model(td)
    for prefix, key in (("latent", "latent"), ("next_latent", ("next", "latent"))):
        assert torch.equal(td[key], td[f"{prefix}_loc"])
        assert (td[f"{prefix}_scale"] == 0.1).all()
    assert type(encoder.get_dist(td)) is PointNormal
    after = td["next", "latent"]
    if kind == "rms":
        size = after.square().mean(-1)
        torch.testing.assert_close(size, torch.ones(6), atol=2e-3, rtol=0)
    elif kind == "simnorm":
        torch.testing.assert_close(after.reshape(6, 2, 8).sum(-1), torch.ones(6, 2))


def test_latents_that_do_not_exist_are_refused():
    for make in (make_encoder, make_model):
        with pytest.raises(ValueError, match="latent: expected 'gaussian' or 'rms'"):
            make(2, latent="delta")
        with pytest.raises(ValueError, match="latent_dim: expected a multiple of 8"):
            make(2, latent="simnorm")


def test_encoder_normalises_what_it_reads():
    torch.manual_seed(0)
    encoder = make_encoder(5, normalize=True, **SMALL)
    torch.manual_seed(0)
    plain = make_encoder(5, **SMALL)
    states = 3 + 2 * torch.randn(50, 5)
    [norm] = [m for m in encoder.modules() if isinstance(m, RunningNorm)]
    norm.update(states)
    td = TensorDict(observation=states, batch_size=[50])
    expected = (states - states.mean(0)) / states.std(0, correction=0)
    normalised = TensorDict(observation=expected, batch_size=[50])
    torch.testing.assert_close(
        encoder(td)["latent_loc"], plain(normalised)["latent_loc"]
    )
    assert torch.equal(td["observation"], states)


@pytest.mark.parametrize(("options", "scale"), [({}, 0.1), ({"scale": 0.3}, 0.3)])
def test_identity_encoder(options, scale):
    observation = torch.randn(5000, 4)
    encoder = make_identity_encoder(4, **options)
    td = encoder(TensorDict(observation=observation, batch_size=[5000]))
    assert torch.equal(td["latent_loc"], observation)
    assert (td["latent_scale"] == scale).all()
    assert (td["latent"] - observation).std().item() == pytest.approx(scale, rel=0.05)


def test_numbers_that_are_not_finite_pass_through():
    for part in ("encoder", "actor"):
        module, reads, writes = KEYS[part]
        inputs = {key: torch.full((3, size), math.nan) for key, size in reads.items()}
        output = module(TensorDict(inputs, batch_size=[3]))
        assert output[list(writes)[-1]].isnan().all()


def test_latents_are_reparameterised_samples():
    module = make_encoder(3, **SMALL)
    td = module(TensorDict(observation=torch.randn(5000, 3), batch_size=[5000]))
    noise = (td["latent"] - td["latent_loc"]) / td["latent_scale"]
    assert noise.mean().abs() < 0.03
    assert abs(noise.std() - 1) < 0.03
    for key in ("latent_loc", "latent_scale"):
        [grad] = torch.autograd.grad(td["latent"].sum(), td[key], retain_graph=True)
        torch.testing.assert_close(
            grad, torch.ones_like(grad) if key == "latent_loc" else noise
        )
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        td = module(td.select("observation"))
    assert torch.equal(td["latent"], td["latent_loc"])


def test_actor_mean_and_scheduled_std():
    schedule = NoiseSchedule(0.5, 0.1, steps=4)
    actor = make_actor(*BOUNDS, noise_schedule=schedule, **SMALL)
    td = TensorDict(latent=10 * torch.randn(6, 4), batch_size=[6])
    written = actor(td.copy())
    raw = td["latent"]
    for layer in actor[0].module[:-1]:
        raw = layer(raw)
    assert raw.abs().max() > 1
    torch.testing.assert_close(written["action_loc"], torch.tanh(raw))
    for std in (0.5, 0.4, 0.3):
        dist = actor.get_dist(td)
        assert type(dist) is ClampedNormal
        torch.testing.assert_close(dist.scale, torch.full((6, 2), std))
        assert not dist.scale.requires_grad
        schedule.step()
    # What was written does not follow the schedule.
    torch.testing.assert_close(written["action_scale"], torch.full((6, 2), 0.5))


def test_each_actor_without_a_schedule_gets_the_default_one():
    schedules = [
        [m for m in make_actor([-1], [1]).modules() if isinstance(m, NoiseSchedule)]
        for _ in range(2)
    ]
    [first], [second] = schedules
    assert first is not second
    assert (first.initial, first.final, first.steps) == (1.0, 0.1, 100_000)


def test_bounds_other_than_one():
    low, high = torch.tensor([-0.4, -2.0, 0.1]), torch.tensor([0.4, 3.0, 0.2])
    schedule = NoiseSchedule(5.0, 5.0)
    actor = make_actor(low, high, noise_schedule=schedule, **SMALL)
    expected = low.clone() + 1e-6, high.clone() - 1e-6
    low.fill_(9.0)  # The actor holds copies.
    td = actor(TensorDict(latent=torch.randn(500, 4), batch_size=[500]))
    action = td["action"].detach()
    for found, bound in zip((action.amin(0), action.amax(0)), expected, strict=True):
        torch.testing.assert_close(found, bound, atol=1e-6, rtol=0)
    # The mean knows nothing of the bounds.
    assert td["action_loc"].abs().max() < 1
    assert (td["action_loc"][:, 2] < 0.1).any()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        td = actor(td.select("latent"))
    assert torch.equal(td["action"], td["action_loc"])
