"""The networks of ALMLoss: stopped gradients, networks of your own, acting, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Normal
from torch.testing import assert_close
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import TanhNormal

from alm_torchrl import AlwaysSample
from tests.helpers import (
    ACTION,
    LATENT,
    OBSERVATION,
    TRAINS,
    B,
    Concatenated,
    Gaussian,
    K,
    assert_equal,
    gradients,
    make_loss,
    make_rows,
    part_of,
    probabilistic,
    seeded,
    targets,
    variant,
)


class Only(nn.Module):
    """A network that reads one of its inputs, called by its position."""

    def __init__(self, position, out_dim):
        super().__init__()
        self.position = position
        self.weight = nn.Parameter(torch.arange(1.0, out_dim + 1))

    def forward(self, *inputs):
        return inputs[self.position].sum(-1, keepdim=True).tanh() * self.weight


@pytest.mark.parametrize(
    ("part", "position", "out_dim", "key", "flows"),
    [
        ("qvalue", 0, 2, "value", True),
        ("qvalue", 1, 2, "value", False),
        ("reward", 0, 1, "reward", True),
        ("reward", 1, 1, "reward", True),
        ("classifier", 0, 2, "log_ratio", True),
        ("classifier", 1, 2, "log_ratio", True),
        ("classifier", 2, 2, "log_ratio", False),
    ],
)
def test_which_inputs_have_a_gradient_in_imagination(
    part, position, out_dim, key, flows
):
    """A network that reads only one input tells if that has a gradient."""
    loss = make_loss()
    module = getattr(loss, part)
    own = TensorDictModule(Only(position, out_dim), module.in_keys, module.out_keys)
    loss = variant(loss, **{part: own})
    value = loss.imagine(torch.randn(B, LATENT), K)[key].sum()
    grads = gradients(value, loss) if value.requires_grad else {}
    reached = {part_of(name) for name, grad in grads.items() if grad.any()}
    assert reached == ({"actor"} if flows else set())


class TestOwnParts:
    @pytest.mark.parametrize("random", [True, False])
    def test_actor(self, batch, random):
        """One with another distribution, one without any."""
        if random:
            net = Gaussian(LATENT, ACTION)
            actor = probabilistic(net, ["latent"], "action", TanhNormal)
        else:
            net = nn.Sequential(nn.Linear(LATENT, ACTION), nn.Tanh())
            actor = TensorDictModule(net, ["latent"], ["action"])
        loss, z = make_loss(actor=actor), torch.randn(B, LATENT)
        assert loss.noise_schedule is None
        assert torch.equal(loss.latents.act(z), loss.latents.act(z)) == (not random)
        grads = gradients(loss(batch)["loss_actor"], loss)
        assert {part_of(name) for name in grads} == {"actor"}
        assert all(grad.norm() > 0 for grad in grads.values())
        assert loss.acting_policy()(make_rows(B))["action"].shape == (B, ACTION)

    @pytest.mark.parametrize("critics", [1, 3])
    def test_any_number_of_critics(self, batch, critics):
        net = Concatenated(LATENT + ACTION, critics)
        qvalue = TensorDictModule(net, ["latent", "action"], ["state_action_value"])
        loss = make_loss(qvalue=qvalue, deterministic=True)
        grads = gradients(loss(batch)["loss_qvalue"], loss)
        assert all(
            (grad.reshape(critics, -1) != 0).any(1).all() for grad in grads.values()
        )
        nn.init.normal_(net.weight)
        rollout = loss.imagine(torch.randn(64, LATENT), K)
        values = net(rollout["latent"][:, 1:], rollout["action"][:, 1:])
        assert len(values.argmin(-1).unique()) == critics
        assert_close(rollout["value"], values.min(-1).values)

    def test_encoder_that_reads_two_entries(self):
        net = Gaussian(OBSERVATION, LATENT)
        keys = ["position", ("sensor", "velocity")]
        encoder = probabilistic(net, keys, "latent", Normal)
        loss = make_loss(encoder=encoder)
        rows = make_rows(B, K)
        for part in (rows, rows["next"]):
            observation = part.pop("observation")
            part["position"] = observation[..., :1]
            part["sensor", "velocity"] = observation[..., 1:]
        assert ("next", "sensor", "velocity") in loss.in_keys
        grads = gradients(loss(rows)["loss_model"], loss)
        assert {part_of(name) for name in grads} == TRAINS["loss_model"]

    @pytest.mark.parametrize("part", ["encoder", "model"])
    def test_kl_needs_gaussians(self, batch, part):
        in_keys = {"encoder": ["observation"], "model": ["latent", "action"]}[part]
        out_key = "latent" if part == "encoder" else ("next", "latent")
        size = OBSERVATION if part == "encoder" else LATENT + ACTION
        own = probabilistic(Gaussian(size, LATENT), in_keys, out_key, TanhNormal)
        with pytest.raises(TypeError, match=f"{part} must return a diagonal Gaussian"):
            make_loss(**{part: own})(batch)
        make_loss(kl_coef=0.0, **{part: own})(batch)


class TestActing:
    def test_samples_the_latent_and_adds_noise_that_is_not_clipped(self):
        loss = make_loss(noise=5.0, bound=100.0)
        policy = loss.acting_policy()
        assert (policy.in_keys, policy.out_keys) == (["observation"], ["action"])
        rows = make_rows(64).select("observation")
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            mean = seeded(policy, rows.copy())["action"]
            latent = seeded(AlwaysSample(loss.encoder), rows.copy())
            assert torch.equal(mean, loss.actor(latent)["action_loc"])
        assert (latent["latent"] != latent["latent_loc"]).all()
        with set_exploration_type(ExplorationType.RANDOM):
            noisy = policy(rows.copy())
        assert set(noisy.keys()) == {"observation", "action"}
        assert (noisy["action"] - mean).abs().max() > 2

    def test_policy_follows_updates(self):
        loss = make_loss()
        policy = loss.acting_policy()
        rows = make_rows(B).select("observation")
        before = seeded(policy, rows.copy())["action"]
        for part in ("encoder", "actor"):
            old = seeded(policy, rows.copy())["action"]
            next(loss._modules[f"{part}_params"].parameters()).data.add_(0.5)
            assert (seeded(policy, rows.copy())["action"] != old).any()
        for target in targets(loss).values():
            target.data.add_(1)
        after = seeded(policy, rows.copy())["action"]
        assert (after != before).any()
        assert torch.equal(seeded(policy, rows.copy())["action"], after)


def restored(loss):
    other = make_loss(noise=loss.noise_schedule.initial)
    other.load_state_dict(loss.state_dict())
    return other


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "state_dict": restored,
}


class TestCopies:
    """A loss on the move: its modules, caches and noise go with it."""

    @pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
    def test_copy_is_whole_and_on_its_own(self, batch, make):
        loss = make_loss(gamma=0.9, lmbda=0.5)
        loss.noise_schedule.step(3)
        expected = seeded(loss, batch)
        other = make(loss)
        assert_equal(seeded(other, batch), expected)
        # The frozen networks of the copy are the copy's: they follow its parameters.
        with torch.no_grad():
            for param in other.parameters():
                param.add_(0.1 * torch.randn_like(param))
        fresh = make_loss()
        fresh.load_state_dict(other.state_dict())
        assert_close(seeded(other, batch).to_dict(), seeded(fresh, batch).to_dict())
        rows = make_rows(B).select("observation")
        actions = [
            seeded(module.acting_policy(), rows.copy())["action"]
            for module in (other, fresh, loss)
        ]
        assert torch.equal(actions[0], actions[1])
        assert (actions[0] != actions[2]).any()
        assert_close(seeded(loss, batch).to_dict(), expected.to_dict())

    @pytest.mark.parametrize("make", [lambda x: x, *COPIES.values()])
    def test_noise_is_one_for_loss_and_policy(self, make):
        dtype = torch.float64
        source = make_loss(noise=5.0, bound=100.0)
        loss = make(source).to(dtype)
        loss.latents.noise_clip = None
        z = torch.randn(B, LATENT, dtype=dtype)
        inputs = TensorDict(latent=z, batch_size=[B])
        for std in (5.0, 2.5, 0.0):
            assert_close(loss.noise_schedule.std, torch.tensor(std, dtype=dtype))
            assert loss.actor.get_dist(inputs).scale.unique() == std
            noise = seeded(loss.latents.act, z, seed=1) - seeded(
                loss.latents.act, z, seed=2
            )
            assert (noise.abs().max() > std / 4) == (std > 0)
            loss.noise_schedule.step(5)
        assert source.noise_schedule.std == (5.0 if source is not loss else 0.0)

    def test_policy_goes_where_the_loss_goes(self):
        loss = make_loss()
        policy = loss.acting_policy()
        loss.to(torch.float64)
        tensors = [*policy.parameters(), *policy.buffers()]
        assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float64}
        rows = make_rows(B).select("observation").double()
        assert policy(rows)["action"].dtype == torch.float64
