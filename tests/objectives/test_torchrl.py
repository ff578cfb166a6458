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
from alm_torchrl.testing import check_loss
from tests.helpers import (
    LATENT,
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
    variant,
)

KEYS = {
    name: name
    for name in (
        *("latent", "action", "reward", "terminated", "predicted_reward"),
        *("state_action_value", "logits", "imagined"),
        *("lookahead", "slice", "transition"),
    )
}
NESTED = {name: ("group", "inner", name) for name in KEYS}

two_kinds = pytest.mark.parametrize("kind", ["two_draw", "slices"])


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
    def test_value_estimators(self):
        loss = make_loss()
        for gamma, estimator in ((0.5, None), (0.7, ValueEstimators.TDLambda)):
            loss.make_value_estimator(estimator, gamma=gamma, lmbda=0.25)
            assert torch.equal(loss.gamma, torch.tensor(gamma))
            assert loss.lmbda == 0.25
        for estimator in {*ValueEstimators} - {ValueEstimators.TDLambda}:
            with pytest.raises(NotImplementedError, match="value_type"):
                loss.make_value_estimator(estimator)

    @two_kinds
    def test_contract(self, kind):
        check_loss(make_loss(), make_input(kind))

    def test_slices_may_declare_their_rows_only(self):
        loss, batch = make_loss(), make_input("slices")
        expected = seeded(loss, batch)
        batch.batch_size = [B]
        assert_equal(seeded(loss, batch), expected)
        assert batch.batch_size == (B,)

    @two_kinds
    def test_reduction(self, kind):
        batch, results = make_input(kind), {}
        loss = make_loss(deterministic=True)
        for reduction in (None, "mean", "sum", "none"):
            results[reduction] = variant(loss, reduction=reduction)(batch)
        assert_equal(results[None], results["mean"])
        for term in TRAINS:
            rows = results["none"][term]
            assert rows.shape == (B,)
            # Plain slices give K one-step terms to each row of "none".
            each = K if kind == "slices" and term != "loss_model" else 1
            torch.testing.assert_close(results["sum"][term], rows.sum() * each)
            torch.testing.assert_close(results["mean"][term], rows.mean())
        for key in set(loss.out_keys) - set(TRAINS):
            for reduction in ("sum", "none"):
                assert torch.equal(results[reduction][key], results["mean"][key])


SAMPLING = {
    "forward": lambda loss, batch: torch.stack([loss(batch)[term] for term in TRAINS]),
    **{
        method: lambda loss, batch, method=method: getattr(loss, method)(batch)[0]
        for method in METHODS.values()
    },
    "draw_latent": lambda loss, batch: loss.draw_latent(batch),
    "model_rollout": lambda loss, batch: loss.model_rollout(batch["slice"])["latent"],
    "imagine": lambda loss, _: loss.imagine(torch.ones(B, LATENT), K)["lambda_return"],
    # Where an episode ends, there is nothing to sample.
    "td_target": lambda loss, batch: loss.td_target(batch["transition"]).sum(),
    "lower_bound": lambda loss, batch: loss.lower_bound(batch["transition"], K),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("call", SAMPLING.values(), ids=SAMPLING)
def test_sampling_is_the_mode_of_the_loss_whatever_surrounds_it(call, deterministic):
    loss, batch = make_loss(deterministic=deterministic), make_batch()
    for surrounding in (None, ExplorationType.RANDOM, ExplorationType.DETERMINISTIC):
        with set_exploration_type(surrounding):
            one, other = (seeded(call, loss, batch, seed=seed) for seed in (1, 2))
        assert (one == other).all() if deterministic else (one != other).all()


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
    def test_defaults(self):
        loss = make_loss()
        assert vars(loss.tensor_keys) == KEYS
        with pytest.raises(ValueError, match="unknown"):
            loss.set_keys(unknown="entry")

    @two_kinds
    def test_runs_with_other_keys(self, kind):
        keys = NESTED
        loss, batch = make_loss(), make_input(kind)
        expected = seeded(loss, batch)
        if kind == "slices":
            moved = move(batch, keys)
        else:
            moved = TensorDict({}, batch_size=[B])
            for draw in ("slice", "transition"):
                moved[keys[draw]] = move(batch[draw], keys)
        assert_equal(seeded(with_keys(loss, keys), moved), expected)

    @pytest.mark.parametrize("keys", [KEYS, NESTED])
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
