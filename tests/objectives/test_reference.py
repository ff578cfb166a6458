"""The losses and whole updates against the slow reference, with the same noise."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from alm_torchrl import (
    ALMOptimizationStepper,
    NoiseSchedule,
    make_alm_loss,
    make_env,
    make_trainer,
)
from tests.objectives.reference import (
    NETS,
    TARGETS,
    Reference,
    Settings,
    clip_share,
    draw_noise,
    scheduled_std,
)

OBSERVATION, ACTION, LATENT, HIDDEN, B = 4, 2, 3, 6, 3
STD = 0.6
TERMS = ("loss_model", "loss_reward", "loss_classifier", "loss_qvalue", "loss_actor")
ABSENT = {
    "classifier_coef": ("loss_classifier", "classifier_accuracy", "imagined_log_ratio"),
    "kl_coef": ("kl",),
    "value_coef": ("terminal_value",),
    "reward_coef": ("model_reward",),
}

# Constructor arguments of the loss, horizon, and what kind of batch.
CASES = {
    "default": ({}, 3, "two-draw"),
    "one step": ({}, 1, "two-draw"),
    "discounted": ({"discount_model_loss": True}, 3, "two-draw"),
    "coefficients": (
        {
            "kl_coef": 0.5,
            "value_coef": 2.0,
            "reward_coef": 3.0,
            "classifier_coef": 0.7,
            "gamma": 0.8,
            "lmbda": 0.3,
        },
        3,
        "two-draw",
    ),
    "noise not clipped": ({"noise_clip": None}, 2, "two-draw"),
    "no classifier": ({"classifier_coef": 0.0}, 2, "two-draw"),
    "no KL": ({"kl_coef": 0.0}, 2, "two-draw"),
    "no value": ({"value_coef": 0.0}, 2, "two-draw"),
    "no reward": ({"reward_coef": 0.0}, 2, "two-draw"),
    "half given": ({}, 2, "imagined"),
    "plain slices": ({}, 2, "plain"),
}


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make_loss(schedule=None, **kwargs):
    """A loss with bounds +-0.4 whose parameters all differ from their initial ones."""
    loss = make_alm_loss(
        observation_dim=OBSERVATION,
        action_low=[-0.4] * ACTION,
        action_high=[0.4] * ACTION,
        latent_dim=LATENT,
        hidden_dim=HIDDEN,
        model_hidden_dim=HIDDEN + 1,
        noise_schedule=NoiseSchedule(STD, 0.1) if schedule is None else schedule,
        **kwargs,
    )
    SoftUpdate(loss, tau=0.005)
    perturb(loss)
    return loss


def perturb(loss):
    """Moves all parameters; whatever updates targets made them copies before."""
    for params in all_parameters(loss).values():
        for param in params:
            param.data.add_(0.2 * torch.randn_like(param))


def parameters(loss, net, target=False):
    """Parameters of a network in the order of its layers."""
    params = getattr(loss, f"{'target_' if target else ''}{net}_params")
    names = [name for name, _ in getattr(loss, net).named_parameters()]
    return [params.get(tuple(name.split("."))) for name in names]


def all_parameters(loss):
    nets = {net: parameters(loss, net) for net in NETS if getattr(loss, net)}
    return nets | {f"target {net}": parameters(loss, net, True) for net in TARGETS}


def make_reference(loss, std=STD, **settings):
    def copies(params, grad):
        return [p.detach().clone().requires_grad_(grad) for p in params]

    online = {}
    for net in NETS:
        if getattr(loss, net) is not None:
            online[net] = copies(parameters(loss, net), True)
    if loss.classifier is None:
        # Its weight is zero: any network will do.
        sizes = parameters(make_loss(), "classifier")
        online["classifier"] = copies(sizes, True)
    target = {net: copies(parameters(loss, net, True), False) for net in TARGETS}
    reference = Reference(online, target, Settings(**settings))
    reference.std = std
    return reference


def random_rows(*shape):
    return {
        "observation": torch.randn(*shape, OBSERVATION),
        "action": 0.8 * torch.rand(*shape, ACTION) - 0.4,
        "next_observation": torch.randn(*shape, OBSERVATION),
        "reward": torch.randn(*shape),
        "terminated": torch.rand(*shape) < 0.4,
    }


def as_tensordict(rows):
    return TensorDict(
        {
            "observation": rows["observation"],
            "action": rows["action"],
            "next": {
                "observation": rows["next_observation"],
                "reward": rows["reward"].unsqueeze(-1),
                "terminated": rows["terminated"].unsqueeze(-1),
            },
        },
        batch_size=rows["reward"].shape,
    )


def make_problem(horizon, kind="two-draw"):
    """Slices and transitions for the reference, noise, and the library's batch."""
    slices = random_rows(B, horizon)
    if kind == "plain":
        rows = {key: value.flatten(0, 1) for key, value in slices.items()}
        batch = as_tensordict(slices)
    else:
        rows = random_rows(B)
        # A row of each kind at least, and no use of the slices' own.
        rows["terminated"][:1], rows["terminated"][1:2] = True, False
        slices["reward"].fill_(torch.nan)
        batch = TensorDict(
            slice=as_tensordict(slices), transition=as_tensordict(rows), batch_size=[B]
        )
    noise = draw_noise(B, len(rows["reward"]), horizon, LATENT, ACTION)
    if kind == "imagined":
        batch["transition", "imagined"] = noise["imagined"]
    return slices, rows, noise, batch


def uniform_for(imagined):
    """Uniform numbers from which the library draws exactly these rows."""
    rank = torch.empty(len(imagined), dtype=torch.int64)
    half = int(imagined.sum())
    rank[imagined] = torch.arange(half)
    rank[~imagined] = torch.arange(half, len(imagined))
    return rank.argsort().to(torch.get_default_dtype()) / len(imagined)


def draws_of(noise, terms=TERMS, *, half=True, value=True, classifier=True):
    """The noise in the order in which the library asks for it."""
    order = []
    if "loss_model" in terms:
        order += [noise["slice_z"], *noise["slice_step"]]
        order += [noise["slice_action"]] if value else []
    if "loss_reward" in terms or "loss_classifier" in terms:
        order += [noise["shared_z"]]
    if "loss_classifier" in terms and classifier:
        next_z, step = noise["classifier_next_z"], noise["imagination_step"]
        if half:
            # Each row is either encoded or imagined.
            order += [uniform_for(noise["imagined"])]
            rows = order[-1].argsort().argsort()
            count = len(rows) // 2
            next_z, step = next_z[rows[count:]], step[rows[:count]]
        order += [next_z, noise["imagination_z"], step]
    if "loss_qvalue" in terms:
        order += [noise["critic_next_z"], noise["critic_action"], noise["critic_z"]]
    if "loss_actor" in terms:
        order += [noise["policy_z"]]
        for action, step in zip(
            noise["policy_action"], noise["policy_step"], strict=False
        ):
            order += [action, step]
        order += [noise["policy_action"][-1]]
    return order


@contextmanager
def injected(draws):
    """Feeds these draws to the library: all of them, in order, and no other."""
    queue = deque(draws)

    def pop(kind, dims):
        def draw(*shape, **_):
            shape = shape[0] if isinstance(shape[0], torch.Size | list) else shape
            assert queue, f"a draw too many, of shape {tuple(shape)}"
            noise = queue.popleft()
            assert noise.ndim == dims, f"the next draw should not be {kind}"
            assert noise.shape == torch.Size(shape)
            return noise

        return draw

    state = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        normal = pop("normal", 2)
        patch.setattr(
            "torch.distributions.normal._standard_normal",
            lambda shape, dtype, device: normal(shape),
        )
        patch.setattr(torch, "randn", normal)
        patch.setattr(torch, "rand", pop("uniform", 1))
        yield
    assert not queue, f"{len(queue)} draws were not used"
    assert torch.equal(torch.get_rng_state(), state), "something else was drawn"


def gradients_by_net(value, nets):
    flat = [p for params in nets.values() for p in params]
    grads = torch.autograd.grad(value, flat, allow_unused=True, retain_graph=True)
    grads = iter(
        torch.zeros_like(p) if g is None else g
        for p, g in zip(flat, grads, strict=True)
    )
    return {net: [next(grads) for _ in params] for net, params in nets.items()}


def largest_difference(ours, theirs):
    """Largest difference of two lists of tensors, in units of ``1 + max |theirs|``."""
    return max(
        ((a - b).abs().max() / (1 + b.abs().max())).item()
        for a, b in zip(ours, theirs, strict=True)
    )


def compute(kwargs, horizon, kind):
    """The library's losses, and reference and inputs to compute them again."""
    loss = make_loss(**kwargs)
    slices, rows, noise, batch = make_problem(horizon, kind)
    draws = draws_of(
        noise,
        half=kind != "imagined",
        value=loss.value_coef != 0,
        classifier=loss.classifier is not None,
    )
    with injected(draws):
        losses = loss(batch)
    return loss, losses, (slices, rows, noise)


@pytest.fixture(scope="module")
def default_problem():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    problem = compute(*CASES["default"])
    torch.set_default_dtype(torch.float32)
    return problem


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_the_reference(case):
    kwargs, horizon, kind = CASES[case]
    loss, losses, inputs = compute(kwargs, horizon, kind)
    reference = make_reference(loss, **kwargs)
    expected = reference.losses(*inputs)
    for key, value in kwargs.items():
        for absent in ABSENT.get(key, ()) if value == 0 else ():
            assert absent not in losses
            expected.pop(absent)
    assert set(losses.keys()) == set(expected)
    for key, value in expected.items():
        assert losses[key].dtype == torch.float64
        assert largest_difference([losses[key]], [value]) < 1e-9, key

    nets = {net: parameters(loss, net) for net in NETS if getattr(loss, net)}
    online = {net: reference.online[net] for net in nets}
    reached = set()
    for term in set(TERMS) & set(expected):
        ours = gradients_by_net(losses[term], nets)
        theirs = gradients_by_net(expected[term], online)
        for net in nets:
            assert largest_difference(ours[net], theirs[net]) < 1e-9, (term, net)
            if any(grad.abs().max() > 1e-3 for grad in theirs[net]):
                reached.add((term, net))
    trained = {
        ("loss_model", "encoder"),
        ("loss_model", "model"),
        *((f"loss_{net}", net) for net in nets if net not in ("encoder", "model")),
    }
    assert reached == trained


def test_noise_is_clipped_and_actions_are_clamped_in_part(default_problem):
    loss, _, inputs = default_problem
    reference = make_reference(loss)
    reference.losses(*inputs)
    assert 0.3 < clip_share(reference.clipped) < 0.9
    assert 0.2 < clip_share(reference.clamped) < 0.8


VALUE, GRADIENT = "value", "gradient"


@pytest.mark.parametrize(
    ("without", "term", "what"),
    [
        ("noise clip", "loss_actor", VALUE),
        ("noise clip", "loss_qvalue", VALUE),
        ("noise clip", "loss_model", VALUE),
        ("clamp", "loss_actor", VALUE),
        ("clamp", "loss_qvalue", VALUE),
        ("clamp", "loss_model", VALUE),
        ("straight-through gradient", "loss_actor", GRADIENT),
        ("gradient of the mean", "loss_model", GRADIENT),
        ("gradient of the mean", "loss_actor", GRADIENT),
        ("gradient of the std", "loss_model", GRADIENT),
        ("gradient of the std", "loss_actor", GRADIENT),
        ("own latent of the imagined step", "loss_classifier", VALUE),
        ("termination", "loss_qvalue", VALUE),
    ],
)
def test_each_ingredient_counts(default_problem, without, term, what):
    loss, losses, inputs = default_problem
    reference = make_reference(loss, without=without)
    wrong = reference.term(term, *inputs)
    difference = largest_difference([losses[term]], [wrong])
    if what == VALUE:
        assert difference > 1e-4
        return
    assert difference < 1e-9
    net = {"loss_model": "encoder", "loss_actor": "actor"}[term]
    ours = gradients_by_net(losses[term], {net: parameters(loss, net)})[net]
    theirs = gradients_by_net(wrong, {net: reference.online[net]})[net]
    assert largest_difference(ours, theirs) > 1e-2


@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone_equals_the_reference(term):
    loss = make_loss()
    slices, rows, noise, batch = make_problem(2)
    with injected(draws_of(noise, [term])):
        value, _ = getattr(loss, f"{term.removeprefix('loss_')}_loss")(batch)
    expected = make_reference(loss).term(term, slices, rows, noise)
    assert largest_difference([value], [expected]) < 1e-9


@pytest.mark.parametrize(
    ("horizon", "clip_norm", "kwargs"),
    [
        (3, 100.0, {}),
        (1, 0.05, {}),
        (2, 0.5, {"discount_model_loss": True, "classifier_coef": 0.5}),
    ],
)
def test_updates_equal_the_reference(horizon, clip_norm, kwargs):
    optimizer = {"lr": 3e-3, "clip_norm": clip_norm, "tau": 0.1}
    schedule = NoiseSchedule(1.0, 0.2, steps=2)
    loss = make_loss(schedule, **kwargs)
    stepper = ALMOptimizationStepper(loss, **optimizer)
    perturb(loss)
    reference = make_reference(loss, **kwargs, **optimizer)
    for n in (1, 2, 3):
        slices, rows, noise, batch = make_problem(horizon)
        schedule.step()
        with injected(draws_of(noise)):
            metrics = stepper.step(None, batch)
        reference.std = scheduled_std(1.0, 0.2, 2, n)
        expected = reference.update(slices, rows, noise)
        assert set(metrics.keys()) == set(expected)
        for key, value in expected.items():
            assert largest_difference([metrics[key]], [value]) < 1e-9, (n, key)
        clipped = [v > clip_norm for k, v in expected.items() if k[:4] == "grad"]
        assert any(clipped) if clip_norm < 1 else not all(clipped)
        for net in NETS:
            ours = parameters(loss, net)
            assert largest_difference(ours, reference.online[net]) < 1e-9, (n, net)
        for net in TARGETS:
            ours = parameters(loss, net, target=True)
            assert largest_difference(ours, reference.target[net]) < 1e-9, (n, net)


def test_trainer_uses_the_std_of_the_step(monkeypatch):
    """Action n has the noise of step n - 1, update n that of step n."""
    torch.set_default_dtype(torch.float32)
    env = make_env("Pendulum-v1", action_bounds="rescale")
    schedule = NoiseSchedule(1.0, 0.2, steps=3)
    loss = make_alm_loss(
        env, latent_dim=2, hidden_dim=4, model_hidden_dim=4, noise_schedule=schedule
    )
    acted, updated = [], []
    rsample = type(loss.actor.get_dist(env.reset().set("latent", torch.zeros(2))))

    def record(dist, sample_shape=(), noise_clip=None, original=rsample.rsample):
        (acted if noise_clip is None else updated).append(dist.scale.unique().item())
        return original(dist, sample_shape, noise_clip)

    monkeypatch.setattr(rsample, "rsample", record)
    trainer = make_trainer(
        env, loss, total_steps=4, warmup_steps=5, batch_size=2, horizon=1
    )
    updated.clear()  # make_trainer tries the loss once
    trainer.train()
    expected = [scheduled_std(1.0, 0.2, 3, n) for n in range(5)]
    assert acted[-4:] == pytest.approx(expected[:-1])
    # One clipped action for the slices' end, one for the target, K + 1 for the policy.
    assert updated == pytest.approx([std for std in expected[1:] for _ in range(4)])
