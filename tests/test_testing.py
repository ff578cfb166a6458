"""The checks for users' losses: they pass on ALMLoss and see what is broken."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torchrl.envs.utils import ExplorationType

from alm_torchrl import ALMLoss
from alm_torchrl import testing as t

SIZES = t.Sizes(batch=4, horizon=2)
BATCHES = {"two draws": t.make_two_draw_batch(SIZES), "slices": t.make_slices(SIZES)}
CHECKS = (
    t.check_keys,
    t.check_input_unmodified,
    t.check_gradient_routing,
    t.check_targets_get_no_gradient,
    t.check_sum_of_parts,
    t.check_reductions,
    t.check_permutation_invariance,
)


# -- what passes ---------------------------------------------------------------------


@settings(max_examples=12)
@given(t.cases())
def test_alm_loss_passes_on_any_problem(case):
    t.check_loss(*case)


@settings(max_examples=6)
@given(
    t.cases(
        gamma=0.9,
        lmbda=0.5,
        classifier_coef=0.0,
        kl_coef=0.5,
        value_coef=2.0,
        noise_clip=None,
        discount_model_loss=True,
        reduction="sum",
    )
)
def test_other_settings_pass_too(case):
    t.check_loss(*case)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("batch", BATCHES)
def test_each_check_passes_alone(check, batch):
    check(t.make_loss(SIZES), BATCHES[batch])


def test_float64_passes():
    batch = BATCHES["two draws"].apply(
        lambda x: x.double() if x.is_floating_point() else x
    )
    t.check_loss(t.make_loss(SIZES).double(), batch)


# -- what fails ----------------------------------------------------------------------


class LiveEncoderEverywhere(ALMLoss):
    def _encoded(self, transitions):
        dist = self.encode(transitions, "live")
        return dist, self._sample(dist)


class FrozenReward(ALMLoss):
    def predict_reward(self, latent, action, parameters="frozen"):
        return super().predict_reward(latent, action, "frozen")


class ActorTrainsCritic(ALMLoss):
    def actor_loss(self, tensordict, horizon=None):
        value, metadata = super().actor_loss(tensordict, horizon)
        extra = next(self.qvalue_params.parameters()).sum()
        return value + 0.1 * extra, metadata


class TargetsWithGradient(ALMLoss):
    def td_target(self, transitions):
        latent = self._sample(self.encode(transitions["next"]))
        value = self.state_action_value(latent, self.act(latent), "target").amin(-1)
        return transitions["next", "reward"].squeeze(-1) + self.gamma * value


class AddsAnEntry(ALMLoss):
    def forward(self, tensordict):
        output = super().forward(tensordict)
        tensordict["weight"] = torch.ones(tensordict.batch_size)
        return output


class ChangesInPlace(ALMLoss):
    def qvalue_loss(self, tensordict):
        output = super().qvalue_loss(tensordict)
        tensordict.get("transition", tensordict)["next", "reward"].mul_(2)
        return output


class AlwaysMean(ALMLoss):
    def _reduce(self, loss, mask, shape=None):
        return loss.mean()


class MeanForSum(ALMLoss):
    def _reduce(self, loss, mask, shape=None):
        value = super()._reduce(loss, mask, shape)
        return value / loss.numel() if self.reduction == "sum" else value


class SumForMean(ALMLoss):
    def _reduce(self, loss, mask, shape=None):
        value = super()._reduce(loss, mask, shape)
        return value * loss.numel() if self.reduction == "mean" else value


class WeighsByPosition(ALMLoss):
    def td_target(self, transitions):
        target = super().td_target(transitions)
        return target * torch.arange(len(target), dtype=target.dtype)


class ForwardDoubles(ALMLoss):
    def forward(self, tensordict):
        output = super().forward(tensordict)
        output["loss_qvalue"] = 2 * output["loss_qvalue"]
        return output


class ForwardAddsGradient(ALMLoss):
    """The value of forward is right, its gradient is not."""

    def forward(self, tensordict):
        output = super().forward(tensordict)
        extra = next(self.reward_params.parameters()).sum()
        output["loss_reward"] = output["loss_reward"] + extra - extra.detach()
        return output


class AttachedMetric(ALMLoss):
    def forward(self, tensordict):
        output = super().forward(tensordict)
        output["kl"] = output["loss_model"] + 1
        return output


class UnknownOutput(ALMLoss):
    def forward(self, tensordict):
        return super().forward(tensordict).set("entropy", torch.zeros(()))


class UnknownMetadata(ALMLoss):
    def reward_loss(self, tensordict):
        value, metadata = super().reward_loss(tensordict)
        return value, {**metadata, "reward_error": value.detach()}

    def forward(self, tensordict):
        return super().forward(tensordict).exclude("reward_error")


class NotFinite(ALMLoss):
    def td_target(self, transitions):
        return super().td_target(transitions) / 0


class TermWithoutMethod(ALMLoss):
    """A sixth term that trains the actor."""

    def forward(self, tensordict):
        output = super().forward(tensordict)
        self.out_keys = [*output.keys(), "loss_extra"]
        return output.set("loss_extra", output["loss_actor"].square())


BROKEN = [
    (
        t.check_gradient_routing,
        LiveEncoderEverywhere,
        "loss_reward should not reach encod",
    ),
    (t.check_gradient_routing, FrozenReward, "loss_reward has no gradient"),
    (t.check_gradient_routing, ActorTrainsCritic, "loss_actor should not reach qvalue"),
    (t.check_gradient_routing, TermWithoutMethod, "loss_extra is not in routes"),
    (t.check_targets_get_no_gradient, TargetsWithGradient, "loss_qvalue .* target_"),
    (t.check_input_unmodified, AddsAnEntry, "forward added or removed .*weight"),
    (t.check_input_unmodified, ChangesInPlace, r"changed .*'next', 'reward'"),
    (t.check_reductions, AlwaysMean, 'loss_model has shape .* "none"'),
    (t.check_reductions, MeanForSum, 'loss_model is not the sum .* "sum"'),
    (t.check_reductions, SumForMean, 'loss_model is not the mean .* "mean"'),
    (t.check_permutation_invariance, WeighsByPosition, "loss_qvalue changes"),
    (t.check_sum_of_parts, ForwardDoubles, "loss_qvalue differs"),
    (t.check_sum_of_parts, ForwardAddsGradient, "loss_reward .* d/d reward_params"),
    (t.check_keys, AttachedMetric, "kl is not detached"),
    (t.check_keys, UnknownOutput, r"differ in \['entropy'\]"),
    (t.check_keys, UnknownMetadata, r"loss_reward has metadata .*reward_error"),
    (t.check_keys, NotFinite, "loss_qvalue is not finite"),
    (t.check_keys, TermWithoutMethod, "loss_extra has no method extra_loss"),
]
IDS = [f"{check.__name__}-{broken.__name__}" for check, broken, _ in BROKEN]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("check", "broken", "message"), BROKEN, ids=IDS)
def test_a_check_names_what_is_broken(check, broken, message, batch):
    data = BATCHES[batch].clone()
    with pytest.raises(AssertionError, match=message):
        check(t.make_loss(SIZES, broken), data)
    with pytest.raises(AssertionError):
        t.check_loss(t.make_loss(SIZES, broken), data)


def test_every_check_has_a_broken_variant():
    assert {check for check, _, _ in BROKEN} == set(CHECKS)


def test_a_part_without_gradient_is_named():
    routes = {**t.ROUTES, "loss_reward": ("reward", "classifier")}
    with pytest.raises(AssertionError, match="loss_reward does not reach classifier"):
        t.check_gradient_routing(t.make_loss(SIZES), t.make_slices(SIZES), routes)


class ExtraTerm(ALMLoss):
    """A sixth term with a method of its own; it trains the actor as well."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.out_keys = [*self.out_keys, "loss_size"]

    def size_loss(self, tensordict):
        weights = self.actor_params.parameters()
        size = torch.stack([weight.square().sum() for weight in weights]).sum()
        rows, mask = self._read(tensordict, self.tensor_keys.slice)
        return self._reduce(size.expand(len(rows)), mask), {}

    def forward(self, tensordict):
        value, _ = self.size_loss(tensordict)
        return super().forward(tensordict).set("loss_size", value)


def test_terms_that_share_a_part_need_one_optimizer():
    loss, batch = t.make_loss(SIZES, ExtraTerm), t.make_two_draw_batch(SIZES)
    routes = {**t.ROUTES, "loss_size": ("actor",)}
    t.check_gradient_routing(loss, batch, routes)
    t.check_reductions(loss, batch)
    with pytest.raises(AssertionError, match="loss_actor alone differ"):
        t.check_sum_of_parts(loss, batch, routes)


# -- what stays as it was ------------------------------------------------------------


@pytest.mark.parametrize("loss_class", [ALMLoss, TargetsWithGradient, AlwaysMean])
def test_checks_leave_no_trace(loss_class):
    loss = t.make_loss(SIZES, loss_class, reduction="sum")
    batch = t.make_two_draw_batch(SIZES)
    copy, state = batch.clone(), torch.get_rng_state()
    parameters = {k: v.clone() for k, v in loss.state_dict().items()}
    for check in CHECKS:
        try:
            check(loss, batch)
        except AssertionError:
            assert loss_class is not ALMLoss
    assert loss.reduction == "sum"
    assert loss.deterministic_sampling_mode is ExplorationType.RANDOM
    assert torch.equal(torch.get_rng_state(), state)
    assert (batch == copy).all()
    assert set(batch.keys(True)) == set(copy.keys(True))
    for name, value in loss.state_dict().items():
        assert torch.equal(value, parameters[name]), name
    assert all(p.grad is None for p in loss.parameters())
    assert not any(b.requires_grad for b in loss.buffers())


# -- problems and strategies ---------------------------------------------------------


@settings(max_examples=20)
@given(st.data())
def test_strategies_fit_their_sizes(data):
    sizes = data.draw(t.problem_sizes())
    slices = data.draw(t.slices(sizes))
    two = data.draw(t.two_draw_batches(sizes))
    loss = data.draw(t.losses(sizes, ExtraTerm, gamma=0.5))
    shape = (sizes.batch, sizes.horizon)
    assert slices.batch_size == two["slice"].batch_size == shape
    assert two["transition"].batch_size == shape[:1]
    assert slices["observation"].shape == (*shape, sizes.observation_dim)
    assert slices["action"].shape == (*shape, sizes.action_dim)
    assert slices["action"].abs().max() <= 1
    steps = slices["observation"][:, 1:], slices["next", "observation"][:, :-1]
    assert torch.equal(*steps)
    assert not torch.equal(two["slice"]["action"][:, 0], two["transition"]["action"])
    assert isinstance(loss, ExtraTerm)
    assert loss.gamma == 0.5
    latent = loss.encode(slices, "live").rsample()
    assert latent.shape == (*shape, sizes.latent_dim)
    assert loss.act(latent).shape == slices["action"].shape


@pytest.mark.parametrize("field", t.Sizes.__dataclass_fields__)
def test_the_smallest_sizes_are_drawn(field):
    smallest = 4 if field == "hidden_dim" else 1
    found = find(t.problem_sizes(), lambda sizes: getattr(sizes, field) == smallest)
    assert getattr(found, field) == smallest


def test_slices_end_in_every_way():
    slices = t.make_slices(t.Sizes(batch=64))
    ends = slices["next", "terminated"], slices["next", "truncated"]
    for end in ends:
        assert not end[:, :-1].any()
        assert 0 < end[:, -1].sum() < 64
    assert torch.equal(slices["next", "done"], ends[0] | ends[1])
    assert not (ends[0] & ends[1]).any()


def test_seeds_decide():
    first, same, other = (t.make_loss(SIZES, seed=seed) for seed in (3, 3, 4))
    parameters = [torch.cat([p.flatten() for p in x.parameters()]) for x in (first,)]
    assert torch.equal(
        parameters[0], torch.cat([p.flatten() for p in same.parameters()])
    )
    assert not torch.equal(
        parameters[0], torch.cat([p.flatten() for p in other.parameters()])
    )
    batches = [t.make_two_draw_batch(SIZES, seed=seed) for seed in (3, 3, 4)]
    assert (batches[0] == batches[1]).all()
    assert not (batches[0] == batches[2]).all()


def test_only_this_module_needs_hypothesis():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import alm_torchrl\n"
        "assert 'alm_torchrl.testing' not in sys.modules\n"
        "try:\n"
        "    import alm_torchrl.testing\n"
        "except ImportError as error:\n"
        "    assert \"pip install 'alm_torchrl[test]'\" in str(error), error\n"
        "else:\n"
        "    raise SystemExit('no ImportError')\n"
    )
    root = t.__file__.rsplit("alm_torchrl", 1)[0]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
