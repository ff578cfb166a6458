"""TorchRL's own checks of a loss module, restated for ALMLoss.

Those that do not apply, and why:

- MultiStep and the batcher: n-step rewards have no place in the objective, whose K
  steps come from slices and from the latent model.
- prioritized sampling, ``priority_weight`` and the priority key: both draws of an
  update are uniform, and the loss writes nothing into its input.
- vmap of the critics, ``deactivate_vmap`` and ``vmap_randomness``: the critics are
  one module that stacks its outputs; nothing is mapped.
- a shared trunk and ``separate_losses``: no two parts share parameters, and which
  term trains which part is fixed by the method.
- keys of the value estimator: the returns are computed in the loss, which has none.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import HardUpdate, SoftUpdate, ValueEstimators

from alm_torchrl import ALMLoss, ClampedNormal
from tests.helpers import (
    METHODS,
    PARTS,
    TARGETS,
    TRAINS,
    B,
    K,
    alternate,
    assert_equal,
    make_batch,
    make_loss,
    make_rows,
    network,
    part_of,
    probabilistic,
    seeded,
    targets,
)

KEYS = {
    "latent": "latent",
    "action": "action",
    "reward": "reward",
    "terminated": "terminated",
    "predicted_reward": "predicted_reward",
    "state_action_value": "state_action_value",
    "logits": "logits",
    "imagined": "imagined",
    "slice": "slice",
    "transition": "transition",
}
RENAMED = {name: f"my_{name}" for name in KEYS}
NESTED = {name: ("group", "inner", name) for name in KEYS}

two_kinds = pytest.mark.parametrize("kind", ["two_draw", "slices"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_input(kind):
    return make_batch() if kind == "two_draw" else alternate(make_rows(B, K))


class TestParameters:
    def test_reset_parameters_recursive(self):
        loss = make_loss()
        tensors = {**dict(loss.named_parameters()), **targets(loss)}
        assert len(tensors) == len(dict(loss.named_parameters()))
        everything = [*loss.parameters(), *targets(loss).values()]
        for tensor in everything:
            tensor.data += 1000
        before = [tensor.detach().clone() for tensor in everything]
        loss.reset_parameters_recursive()
        for tensor, old in zip(everything, before, strict=True):
            assert (tensor != old).all()
        online = dict(loss.named_parameters())
        assert targets(loss)
        for name, target in targets(loss).items():
            torch.testing.assert_close(target, online[name].data, rtol=0, atol=0)

    def test_nothing_is_registered_twice(self):
        loss = make_loss()
        for named in (loss.named_parameters, loss.named_buffers):
            names, tensors = zip(*named(), strict=True)
            assert len(set(names)) == len(names)
            assert len({id(tensor) for tensor in tensors}) == len(tensors)
        assert {part_of(name) for name, _ in loss.named_parameters()} == set(PARTS)
        assert {part_of(name) for name in targets(loss)} == set(TARGETS)

    @two_kinds
    def test_state_dict_round_trip(self, kind):
        loss, other = make_loss(gamma=0.9, lmbda=0.5), make_loss()
        loss.noise_schedule.step(3)
        batch = make_input(kind)
        expected = seeded(loss, batch)
        assert not torch.equal(
            seeded(other, batch)["loss_model"], expected["loss_model"]
        )
        state = copy.deepcopy(loss.state_dict())
        other.load_state_dict(state, strict=True)
        assert_equal(other.state_dict(), state)
        assert_equal(seeded(other, batch), expected)
        observation = make_rows(B).select("observation")
        assert_equal(
            seeded(other.acting_policy(), observation.copy()),
            seeded(loss.acting_policy(), observation.copy()),
        )

    def test_cast_keeps_parameters_and_casts_all(self):
        loss = make_loss(deterministic=True)
        batch = make_batch()
        single = loss(batch)
        before = dict(loss.named_parameters())
        assert loss.to(torch.float64) is loss
        assert all(p is before[name] for name, p in loss.named_parameters())
        floats = [t for t in loss.state_dict().values() if t.is_floating_point()]
        assert {tensor.dtype for tensor in floats} == {torch.float64}
        double = loss(batch.apply(lambda x: x if x.dtype == torch.bool else x.double()))
        assert {value.dtype for value in double.values()} == {torch.float64}
        assert_equal(double.float(), single, exact=False)


class TestUpdaters:
    def test_warns_without_updater_only(self):
        batch = make_batch()
        with pytest.warns(UserWarning, match="No target network updater"):
            make_loss(updater=False)(batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make_loss()(batch)

    def test_soft_update(self):
        loss = make_loss()
        updater = SoftUpdate(loss, tau=0.25)
        for param in loss.parameters():
            param.data += torch.rand_like(param)
        before = {k: v.clone() for k, v in loss.state_dict().items()}
        updater.step()
        changed = {
            name for name, v in loss.state_dict().items() if (v != before[name]).any()
        }
        assert changed == {f"target_{name}" for name in targets(loss)}
        online = dict(loss.named_parameters())
        for name, target in targets(loss).items():
            expected = 0.75 * before[f"target_{name}"] + 0.25 * online[name].data
            torch.testing.assert_close(target, expected)

    def test_hard_update(self):
        loss = make_loss()
        updater = HardUpdate(loss, value_network_update_interval=2)
        for param in loss.parameters():
            param.data += 1
        before = {name: target.clone() for name, target in targets(loss).items()}
        # TorchRL copies in the call after ``value_network_update_interval`` others.
        for _ in range(2):
            updater.step()
            assert_equal(targets(loss), before)
        updater.step()
        online = {k: v.data for k, v in loss.named_parameters() if k in before}
        assert_equal(targets(loss), online)


class TestForward:
    @pytest.mark.parametrize("estimator", [*ValueEstimators, None])
    def test_value_estimators(self, estimator):
        loss = make_loss()
        if estimator in (None, ValueEstimators.TDLambda):
            loss.make_value_estimator(estimator, gamma=0.5, lmbda=0.25)
            assert (loss.gamma.item(), loss.lmbda.item()) == (0.5, 0.25)
        else:
            with pytest.raises(NotImplementedError, match="value_type"):
                loss.make_value_estimator(estimator)
        with pytest.raises(TypeError, match="average_gae"):
            loss.make_value_estimator(average_gae=True)

    @pytest.mark.parametrize("kind", ["two_draw", "slices", "undeclared"])
    def test_input_is_left_alone(self, kind):
        loss = make_loss()
        batch = make_input("slices" if kind == "undeclared" else kind)
        if kind == "undeclared":
            batch.batch_size = [B]
        before = batch.clone()
        loss(batch)
        assert batch.batch_size == before.batch_size
        assert set(batch.keys(True)) == set(before.keys(True))
        assert (batch == before).all()

    @two_kinds
    def test_outputs(self, kind):
        loss = make_loss()
        outputs = loss(make_input(kind))
        assert set(outputs.keys()) == set(loss.out_keys)
        for key, value in outputs.items():
            assert value.isfinite().all()
            assert value.requires_grad == key.startswith("loss_")
        assert all(param.grad is None for param in loss.parameters())

    @two_kinds
    @pytest.mark.parametrize("term", TRAINS)
    def test_each_term_reaches_its_own_parts(self, kind, term):
        loss = make_loss()
        seeded(loss, make_input(kind))[term].backward()
        own = {
            name: param
            for name, param in loss.named_parameters()
            if part_of(name) in TRAINS[term]
        }
        reached = {n for n, p in loss.named_parameters() if p.grad is not None}
        assert reached == set(own)
        for name, param in own.items():
            assert param.grad.norm() > 0, name

    @pytest.mark.parametrize("reduction", [None, "mean", "sum", "none"])
    @two_kinds
    def test_reduction(self, kind, reduction):
        batch = make_input(kind)
        loss = make_loss(reduction=reduction)
        losses = seeded(loss, batch)
        loss.reduction = "none"
        rows = seeded(loss, batch)
        for term in TRAINS:
            assert rows[term].shape == (B,)
            if reduction == "none":
                expected = rows[term]
            elif reduction == "sum":
                # Plain slices give K one-step terms to each row of "none".
                one_step = kind == "slices" and term != "loss_model"
                expected = rows[term].sum() * (K if one_step else 1)
            else:
                expected = rows[term].mean()
            torch.testing.assert_close(losses[term], expected)
        for key in set(loss.out_keys) - set(TRAINS):
            assert losses[key].shape == ()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["forward", *METHODS.values()])
def test_sampling_is_the_mode_of_the_loss_whatever_surrounds_it(name, deterministic):
    loss, batch = make_loss(deterministic=deterministic), make_batch()

    def values(seed):
        output = seeded(getattr(loss, name), batch, seed=seed)
        if name == "forward":
            return torch.stack([output[term] for term in TRAINS])
        return output[0].reshape(1)

    for surrounding in (None, *ExplorationType):
        with set_exploration_type(surrounding):
            same = values(1) == values(2)
        assert same.all() if deterministic else not same.any()


def with_keys(loss, keys):
    """The networks of the loss under other keys, with the same targets."""
    nets = {part: network(loss, part) for part in PARTS}
    latent, action = keys["latent"], keys["action"]

    parameters = ["loc", "scale", "low", "high"]
    next_latent = ("next", latent)
    inputs = [latent, action]
    other = ALMLoss(
        encoder=probabilistic(nets["encoder"], ["observation"], latent),
        model=probabilistic(nets["model"], inputs, next_latent),
        actor=ProbabilisticTensorDictSequential(
            TensorDictModule(nets["actor"], [latent], parameters),
            ProbabilisticTensorDictModule(
                parameters, [action], distribution_class=ClampedNormal
            ),
        ),
        qvalue=TensorDictModule(nets["qvalue"], inputs, [keys["state_action_value"]]),
        reward=TensorDictModule(nets["reward"], inputs, [keys["predicted_reward"]]),
        classifier=TensorDictModule(
            nets["classifier"], [*inputs, next_latent], [keys["logits"]]
        ),
    )
    other.set_keys(**keys)
    SoftUpdate(other, tau=0.005)
    other.load_state_dict(loss.state_dict())
    return other


def move(rows, keys):
    """Rows under the keys, which may be nested."""
    moved = TensorDict(
        {"observation": rows["observation"], "next": {}}, batch_size=rows.batch_size
    )
    moved["next", "observation"] = rows["next", "observation"]
    for name in ("reward", "terminated"):
        moved["next", keys[name]] = rows["next", name]
    for name in ("action", "imagined"):
        if name in rows:
            moved[keys[name]] = rows[name]
    return moved


class TestKeys:
    def test_unknown_key(self):
        with pytest.raises(ValueError, match="unknown"):
            make_loss().set_keys(unknown="entry")

    def test_each_key_alone_then_all(self):
        loss = make_loss()
        assert vars(loss.tensor_keys) == KEYS
        for name in KEYS:
            other = copy.deepcopy(loss)
            other.set_keys(**{name: ("nested", "entry")})
            assert vars(other.tensor_keys) == {**KEYS, name: ("nested", "entry")}
            other.set_keys(**{name: None})
            assert vars(other.tensor_keys) == KEYS
        other = copy.deepcopy(loss)
        other.set_keys(**NESTED)
        assert vars(other.tensor_keys) == NESTED
        assert vars(loss.tensor_keys) == KEYS

    @pytest.mark.parametrize("keys", [RENAMED, NESTED], ids=["renamed", "nested"])
    @two_kinds
    def test_runs_with_other_keys(self, kind, keys):
        loss, batch = make_loss(), make_input(kind)
        expected = seeded(loss, batch)
        if kind == "slices":
            moved = move(batch, keys)
        else:
            moved = TensorDict({}, batch_size=[B])
            for draw in ("slice", "transition"):
                moved[keys[draw]] = move(batch[draw], keys)
        assert_equal(seeded(with_keys(loss, keys), moved), expected)

    @pytest.mark.parametrize("keys", [KEYS, RENAMED, NESTED])
    def test_without_tensordict(self, keys):
        loss = with_keys(make_loss(), keys)
        rows = move(make_rows(B, K), keys)
        expected = seeded(loss, rows)
        kwargs = {}
        for key in loss.in_keys:
            kwargs[key if isinstance(key, str) else "_".join(key)] = rows[key]
        assert len(kwargs) == 5
        values = seeded(loss, **kwargs)
        assert isinstance(values, tuple)
        for key, value in zip(loss.out_keys, values, strict=True):
            torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
        loss.select_out_keys("loss_actor", "loss_model")
        actor, model = seeded(loss, **kwargs)
        assert actor == expected["loss_actor"]
        assert model == expected["loss_model"]


class TestSchedulableBuffers:
    @pytest.mark.parametrize("name", ["gamma", "lmbda"])
    def test_assignment_in_place(self, name):
        loss, batch = make_loss(deterministic=True), make_batch()
        before = loss(batch)
        buffer = getattr(loss, name)
        setattr(loss, name, 0.5)
        assert getattr(loss, name) is buffer
        assert buffer == 0.5
        after = loss(batch)
        changed = {key for key in after.keys() if after[key] != before[key]}  # noqa: SIM118
        expected = {"loss_actor", "lambda_return"}
        if name == "gamma":
            expected |= {"loss_qvalue", "target_value", "td_error"}
        assert changed == expected
