"""The checks for users' losses: they pass on ALMLoss and see what is broken."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from hypothesis import Phase, find, given, settings
from torchrl.envs.utils import ExplorationType

from alm_torchrl import ALMLoss
from alm_torchrl import testing as t
from alm_torchrl.objectives.batch import read_slices

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


@settings(max_examples=6)
@given(t.cases())
def test_alm_loss_passes_on_any_problem(case):
    t.check_loss(*case)


@settings(max_examples=4)
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


def test_float64_passes():
    batch = BATCHES["two draws"].apply(
        lambda x: x.double() if x.is_floating_point() else x
    )
    t.check_loss(t.make_loss(SIZES).double(), batch)


# -- what fails ----------------------------------------------------------------------


def broken(method, change):
    """A loss whose method's output is changed by ``change(loss, output, batch)``."""

    def changed(self, tensordict, *args):
        output = getattr(ALMLoss, method)(self, tensordict, *args)
        return change(self, output, tensordict)

    return type("Broken", (ALMLoss,), {method: changed})


def scaled(reduction, factor):
    """``model_loss`` times a factor with one of the reductions."""

    def change(loss, output, batch):
        value, metadata = output
        return value * factor if loss.reduction == reduction else value, metadata

    return broken("model_loss", change)


def set_entry(key, entry):
    return broken("forward", lambda loss, output, batch: output.set(key, entry(output)))


def live_latent(loss, output, batch):
    rows = batch.get("transition", batch)
    latent = loss.latents.sample(loss.latents.encode(rows, "live"))
    return latent.reshape(-1, latent.shape[-1])


def first_of(params):
    return next(params.parameters()).sum()


def through_targets(loss, output, batch):
    latents = loss.latents
    latent = latents.sample(latents.encode(batch["next"]))
    value = latents.state_action_value(latent, latents.act(latent), "target")
    return batch["next", "reward"].squeeze(-1) + loss.gamma * value.amin(-1)


def change_reward(loss, output, batch):
    batch.get("transition", batch)["next", "reward"].mul_(2)
    return output


def add_weight(loss, output, batch):
    batch["weight"] = torch.ones(batch.batch_size)
    return output


def by_position(loss, output, batch):
    return output * torch.arange(len(output), dtype=output.dtype)


def add_gradient(loss, output, batch):
    """The value of forward is right, its gradient is not."""
    extra = first_of(loss.reward_params)
    return output.set("loss_reward", output["loss_reward"] + extra - extra.detach())


def extra_term(loss, output, batch):
    loss.out_keys = [*output.keys(), "loss_extra"]
    return output.set("loss_extra", output["loss_actor"].square())


class UnknownMetadata(ALMLoss):
    def reward_loss(self, tensordict, encoded=None, latent=None):
        value, metadata = super().reward_loss(tensordict, encoded, latent)
        return value, {**metadata, "reward_error": value.detach()}

    def forward(self, tensordict):
        return super().forward(tensordict).exclude("reward_error")


TARGETS_WITH_GRADIENT = broken("td_target", through_targets)
ALWAYS_MEAN = broken("model_loss", lambda loss, out, batch: (out[0].mean(), out[1]))
ADDS_TERM = broken("forward", extra_term)
# The check that sees it, the loss, and a part of the message.
BROKEN = [
    (
        t.check_gradient_routing,
        broken("draw_latent", live_latent),
        "loss_reward should not reach encod",
    ),
    (
        t.check_gradient_routing,
        broken("reward_loss", lambda loss, out, batch: (out[0].detach(), out[1])),
        "loss_reward has no gradient",
    ),
    (
        t.check_gradient_routing,
        broken(
            "actor_loss",
            lambda loss, out, batch: (out[0] + first_of(loss.qvalue_params), out[1]),
        ),
        "loss_actor should not reach qvalue",
    ),
    (t.check_gradient_routing, ADDS_TERM, "loss_extra is not in routes"),
    (
        t.check_targets_get_no_gradient,
        TARGETS_WITH_GRADIENT,
        "loss_qvalue .* target_",
    ),
    (
        t.check_input_unmodified,
        broken("forward", add_weight),
        "forward added or removed .*weight",
    ),
    (
        t.check_input_unmodified,
        broken("qvalue_loss", change_reward),
        r"changed .*'next', 'reward'",
    ),
    (t.check_reductions, ALWAYS_MEAN, 'loss_model has shape .* "none"'),
    (t.check_reductions, scaled("sum", 0.25), 'loss_model is not the sum .* "sum"'),
    (t.check_reductions, scaled("mean", 4), 'loss_model is not the mean .* "mean"'),
    (
        t.check_permutation_invariance,
        broken("td_target", by_position),
        "loss_qvalue changes",
    ),
    (
        t.check_sum_of_parts,
        set_entry("loss_qvalue", lambda output: 2 * output["loss_qvalue"]),
        "loss_qvalue differs",
    ),
    (
        t.check_sum_of_parts,
        broken("forward", add_gradient),
        "loss_reward .* d/d reward_params",
    ),
    (
        t.check_keys,
        set_entry("kl", lambda output: output["loss_model"] + 1),
        "kl is not detached",
    ),
    (
        t.check_keys,
        set_entry("entropy", lambda output: torch.zeros(())),
        r"differ in \['entropy'\]",
    ),
    (t.check_keys, UnknownMetadata, r"loss_reward has metadata .*reward_error"),
    (
        t.check_keys,
        broken("td_target", lambda loss, out, batch: out / 0),
        "loss_qvalue is not finite",
    ),
    (t.check_keys, ADDS_TERM, "loss_extra has no method extra_loss"),
]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("check", "loss_class", "message"), BROKEN)
def test_a_check_names_what_is_broken(check, loss_class, message, batch):
    data = BATCHES[batch].clone()
    with pytest.raises(AssertionError, match=message):
        check(t.make_loss(SIZES, loss_class), data)
    if batch == "slices":
        with pytest.raises(AssertionError):
            t.check_loss(t.make_loss(SIZES, loss_class), data)


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
        rows = read_slices(self, tensordict)
        return rows.reduce(size.expand(len(rows.data)), self.reduction), {}

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


@pytest.mark.parametrize("loss_class", [ALMLoss, TARGETS_WITH_GRADIENT, ALWAYS_MEAN])
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


@settings(max_examples=8)
@given(t.cases(ExtraTerm, gamma=0.5))
def test_cases_fit_together(case):
    loss, batch = case
    assert isinstance(loss, ExtraTerm)
    assert loss.gamma == 0.5
    slices = batch.get("slice", default=batch)
    if slices is not batch:
        rows = batch["transition"]
        assert rows.batch_size == slices.batch_size[:1]
        assert not torch.equal(slices["action"][:, 0], rows["action"])
    assert slices["action"].abs().max() <= 1
    steps = slices["observation"][:, 1:], slices["next", "observation"][:, :-1]
    assert torch.equal(*steps)
    latent = loss.latents.encode(slices, "live").rsample()
    assert loss.latents.act(latent).shape == slices["action"].shape


@pytest.mark.parametrize("field", t.Sizes.__dataclass_fields__)
def test_the_smallest_sizes_are_drawn(field):
    smallest = 4 if field == "hidden_dim" else 1
    found = find(
        t.problem_sizes(),
        lambda sizes: getattr(sizes, field) == smallest,
        settings=settings(phases=[Phase.generate]),
    )
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
    same, other = (
        [t.make_loss(SIZES, seed=n).encoder for n in p] for p in ((3, 3), (3, 4))
    )
    for pair, equal in ((same, True), (other, False)):
        first, second = (next(iter(net.parameters())) for net in pair)
        assert torch.equal(first, second) == equal
    batches = [t.make_two_draw_batch(SIZES, seed=seed) for seed in (3, 3, 4)]
    assert (batches[0] == batches[1]).all()
    assert not (batches[0] == batches[2]).all()


def test_without_hypothesis_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "alm_torchrl.testing")
    with pytest.raises(ImportError, match=r"pip install 'alm_torchrl\[test\]'"):
        importlib.import_module("alm_torchrl.testing")
