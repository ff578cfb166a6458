"""The networks: layers, sizes, initialisation, keys and heads."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    set_interaction_type,
)
from torch import nn
from torchrl.envs.utils import (
    ExplorationType,
    set_exploration_type,
)
from torchrl.modules import IndependentNormal

from alm_torchrl import (
    ClampedNormal,
    NoiseSchedule,
    make_actor,
    make_classifier,
    make_encoder,
    make_model,
    make_qvalue,
    make_reward,
)

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


PAPER = {
    "encoder": (
        lambda: make_encoder(S),
        dense(S, H) + ELU + dense(H, H) + ELU + dense(H, 2 * L),
    ),
    "model": (
        lambda: make_model(A),
        dense(L + A, M) + ELU + dense(M, M) + ELU + dense(M, 2 * L),
    ),
    "actor": (
        lambda: make_actor(LOW, HIGH),
        dense(L, H) + ELU + dense(H, H) + ELU + dense(H, A),
    ),
    "reward": (
        lambda: make_reward(A),
        dense(L + A, H) + NORM + dense(H, H) + ELU + dense(H, 1),
    ),
    "qvalue": (
        lambda: make_qvalue(A),
        2 * (dense(L + A, H) + NORM + dense(H, H) + ELU + dense(H, 1)),
    ),
    "classifier": (
        lambda: make_classifier(A),
        dense(2 * L + A, H) + NORM + dense(H, H) + ELU + dense(H, 2),
    ),
}
# By hand: weights and biases of the table above.
COUNTS = {
    "encoder": (17 + 1) * 512 + 513 * 512 + 513 * 100,
    "model": (56 + 1) * 1024 + 1025 * 1024 + 1025 * 100,
    "actor": (50 + 1) * 512 + 513 * 512 + 513 * 6,
    "reward": (56 + 1) * 512 + 2 * 512 + 513 * 512 + 513,
    "qvalue": 2 * ((56 + 1) * 512 + 2 * 512 + 513 * 512 + 513),
    "classifier": (106 + 1) * 512 + 2 * 512 + 513 * 512 + 513 * 2,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# -- architecture ---------------------------------------------------------------------


@pytest.mark.parametrize("part", PAPER)
def test_default_networks_are_the_papers(part):
    build, expected = PAPER[part]
    module = build()
    assert layers_of(module) == expected
    assert sum(p.numel() for p in module.parameters()) == COUNTS[part]
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


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(
    ("module", "reads", "writes"),
    [
        (
            make_encoder(5, **SMALL),
            {"observation": 5},
            {"latent_loc": 4, "latent_scale": 4, "latent": 4},
        ),
        (
            make_model(2, **SMALL),
            {"latent": 4, "action": 2},
            {"next_latent_loc": 4, "next_latent_scale": 4, ("next", "latent"): 4},
        ),
        (
            make_actor([-1, -1], [1, 1], **SMALL),
            {"latent": 4},
            {
                "action_loc": 2,
                "action_scale": 2,
                "action_low": 2,
                "action_high": 2,
                "action": 2,
            },
        ),
        (
            make_qvalue(2, **SMALL),
            {"latent": 4, "action": 2},
            {"state_action_value": 2},
        ),
        (make_reward(2, **SMALL), {"latent": 4, "action": 2}, {"predicted_reward": 1}),
        (
            make_classifier(2, **SMALL),
            {"latent": 4, "action": 2, ("next", "latent"): 4},
            {"logits": 2},
        ),
    ],
    ids=["encoder", "model", "actor", "qvalue", "reward", "classifier"],
)
def test_keys_and_shapes(module, reads, writes, batch):
    assert module.in_keys == list(reads)
    assert module.out_keys == list(writes)
    inputs = TensorDict(batch_size=batch)
    for key, size in reads.items():
        inputs.set(key, torch.randn(*batch, size))
    output = module(inputs)
    assert set(output.keys(True, True)) == {*reads, *writes}
    for key, size in writes.items():
        assert output[key].shape == (*batch, size)
        assert output[key].isfinite().all()


def test_observation_key():
    encoder = make_encoder(5, observation_key=("sensors", "state"), **SMALL)
    assert encoder.in_keys == [("sensors", "state")]
    td = TensorDict({"sensors": {"state": torch.zeros(3, 5)}}, batch_size=[3])
    assert encoder(td)["latent"].shape == (3, 4)


# -- heads ----------------------------------------------------------------------------


def bounded(raw_mean, raw_std):
    """The bounds as printed in the description, in plain numbers."""

    def softplus(x):
        return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    std = 10 - softplus(10 - raw_std)
    return 30 * math.tanh(raw_mean / 30), 0.1 + softplus(std - 0.1)


@pytest.mark.parametrize(
    "build", [lambda: make_encoder(3, **SMALL), lambda: make_model(2, **SMALL)]
)
@pytest.mark.parametrize("raw", [-1e4, -20.0, -1.0, 0.0, 0.1, 3.0, 10.0, 40.0, 1e4])
def test_gaussian_head(build, raw):
    module = build()
    last = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    last.weight.data.zero_()
    last.bias.data[:4], last.bias.data[4:] = raw, raw / 2
    inputs = {
        key: torch.randn(6, {"observation": 3, "latent": 4, "action": 2}[key])
        for key in module.in_keys
    }
    dist = module.get_dist(TensorDict(inputs, batch_size=[6]))
    assert type(dist) is IndependentNormal
    mean, std = bounded(raw, raw / 2)
    assert 0.1 <= std < 10.001
    torch.testing.assert_close(dist.base_dist.loc, torch.full((6, 4), mean))
    torch.testing.assert_close(dist.base_dist.scale, torch.full((6, 4), std))
    assert dist.batch_shape == (6,)


def test_latents_are_reparameterised_samples():
    module = make_encoder(3, **SMALL)
    td = TensorDict(observation=torch.randn(5000, 3), batch_size=[5000])
    td = module(td)
    noise = (td["latent"] - td["latent_loc"]) / td["latent_scale"]
    assert noise.mean().abs() < 0.03
    assert abs(noise.std() - 1) < 0.03
    for key in ("latent_loc", "latent_scale"):
        [grad] = torch.autograd.grad(td["latent"].sum(), td[key], retain_graph=True)
        torch.testing.assert_close(
            grad, torch.ones_like(grad) if key == "latent_loc" else noise
        )
    with set_interaction_type(InteractionType.DETERMINISTIC):
        td = module(td.select("observation"))
    assert torch.equal(td["latent"], td["latent_loc"])


def test_actor_mean_and_std():
    schedule = NoiseSchedule(0.5, 0.1, steps=4)
    actor = make_actor([-1.0, -1.0], [1.0, 1.0], noise_schedule=schedule, **SMALL)
    net = actor[0].module
    td = TensorDict(latent=10 * torch.randn(6, 4), batch_size=[6])
    written = actor(td.copy())
    raw = td["latent"]
    for layer in net[:-1]:
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


def test_actor_without_a_schedule_has_the_default_one():
    schedules = [
        [m for m in make_actor([-1], [1]).modules() if isinstance(m, NoiseSchedule)]
        for _ in range(2)
    ]
    [first], [second] = schedules
    assert first is not second
    assert (first.initial, first.final, first.steps) == (1.0, 0.1, 100_000)


def test_bounds_other_than_one():
    low, high = [-0.4, -2.0, 0.1], [0.4, 3.0, 0.2]
    schedule = NoiseSchedule(5.0, 5.0)
    actor = make_actor(low, high, noise_schedule=schedule, **SMALL)
    td = actor(TensorDict(latent=torch.randn(500, 4), batch_size=[500]))
    for i in range(3):
        action = td["action"][:, i].detach()
        assert action.min() >= low[i]
        assert action.max() <= high[i]
        assert action.min() == pytest.approx(low[i] + 1e-6, abs=1e-6)
        assert action.max() == pytest.approx(high[i] - 1e-6, abs=1e-6)
    # The mean knows nothing of the bounds.
    assert td["action_loc"].abs().max() < 1
    assert (td["action_loc"][:, 2] < 0.1).any()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        td = actor(td.select("latent"))
    assert torch.equal(td["action"], td["action_loc"])


def test_bounds_are_copied():
    low = torch.tensor([-1.0])
    actor = make_actor(low, [1.0], **SMALL)
    low.fill_(0.5)
    td = actor(TensorDict(latent=torch.zeros(1, 4), batch_size=[1]))
    assert td["action_low"].item() == -1.0


# -- errors of the builders -----------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: make_encoder(0), "observation_dim: expected an integer >= 1, got 0"),
        (lambda: make_encoder(3, latent_dim=0), "latent_dim: expected an integer >= 1"),
        (lambda: make_encoder(3, hidden_dim=-1), "hidden_dim: expected .* got -1"),
        (lambda: make_model(0), "action_dim: expected an integer >= 1, got 0"),
        (lambda: make_model(2, hidden_dim=0), "hidden_dim: expected an integer >= 1"),
        (lambda: make_qvalue(0), "action_dim: expected an integer >= 1"),
        (lambda: make_qvalue(2, latent_dim=0), "latent_dim: expected an integer >= 1"),
        (lambda: make_reward(0), "action_dim: expected an integer >= 1"),
        (lambda: make_reward(2, hidden_dim=0), "hidden_dim: expected an integer >= 1"),
        (lambda: make_classifier(0), "action_dim: expected an integer >= 1"),
        (
            lambda: make_classifier(2, latent_dim=0),
            "latent_dim: expected an integer >= 1",
        ),
        (lambda: make_actor([], []), r"action_low: expected a vector, got .*\(0,\)"),
        (
            lambda: make_actor([-1], [1], hidden_dim=0),
            "hidden_dim: expected an integer >= 1",
        ),
        (
            lambda: make_actor([-1, -1], [1]),
            r"action_low and action_high must be vectors of the same size, got shapes "
            r"\(2,\) and \(1,\)",
        ),
        (
            lambda: make_actor([[-1]], [[1]]),
            r"action_low: expected a vector, .* \(1, 1\)",
        ),
        (lambda: make_actor([1], [-1]), r"low < high, got \[1.0\] and \[-1.0\]"),
        (lambda: make_actor([0], [0]), "low < high"),
        (lambda: make_actor([-math.inf], [1]), r"must be finite .* got \[-inf\]"),
        (lambda: make_actor([-1], [math.nan]), r"must be finite .* \[nan\]"),
        (
            lambda: NoiseSchedule(-1.0),
            "initial: expected a number >= 0, got -1.0",
        ),
        (
            lambda: NoiseSchedule(1.0, -0.1),
            "final: expected a number >= 0, got -0.1",
        ),
        (lambda: NoiseSchedule(steps=0), "steps: expected an integer >= 1, got 0"),
    ],
)
def test_builder_errors(build, match):
    with pytest.raises(ValueError, match=match):
        build()
