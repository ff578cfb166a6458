"""examples/alm.py: its update is the library's, its slices are whole, it runs."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re

import pytest
import torch
from tensordict import TensorDict

from alm_torchrl import ALMOptimizationStepper, NoiseSchedule, make_alm_loss
from benchmarks.problem import load_example

alm = load_example()
OBSERVATION, ACTION = 5, 2
TINY = alm.Args(
    latent_dim=4,
    hidden_dim=8,
    model_hidden_dim=12,
    batch_size=7,
    warmup_steps=20,
    total_steps=4,
    eval_interval=2,
)
# Of each network and target: the name in the loss, and in the example.
NETWORKS = {
    "encoder": "encoder",
    "model": "model",
    "actor": "actor",
    "reward": "reward",
    "classifier": "classifier",
    "qvalue": "critics",
    "target_encoder": "target_encoder",
    "target_qvalue": "target_critics",
}
LOSSES = {name: name for name in ("model", "reward", "classifier", "actor")}
LOSSES["critic"] = "qvalue"


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def tolerance(request):
    """Computes in a type, and gives the relative and absolute error it allows."""
    torch.set_default_dtype(request.param)
    error = 1e-12 if request.param is torch.float64 else 1e-6
    yield {"rtol": 10 * error, "atol": error}
    torch.set_default_dtype(torch.float32)


def parameters(loss, agent):
    """Name, our parameter and the example's, of all networks and targets."""
    for ours, theirs in NETWORKS.items():
        params = getattr(loss, f"{ours}_params")
        # Targets are buffers.
        tensors = params.buffers() if "target" in ours else params.parameters()
        others = getattr(agent, theirs).parameters()
        for number, pair in enumerate(zip(tensors, others, strict=True)):
            yield f"{theirs} {number}", *pair


def random_rows(*shape):
    """Entries of slices or transitions, as the example takes them."""
    return {
        "observation": torch.randn(*shape, OBSERVATION),
        "action": torch.rand(*shape, ACTION) * 2 - 1,
        "reward": torch.randn(shape),
        "next_observation": torch.randn(*shape, OBSERVATION),
        "terminated": torch.randint(2, shape).to(torch.get_default_dtype()),
    }


def as_tensordict(rows):
    """The same as the library takes them."""
    return TensorDict(
        {
            "observation": rows["observation"],
            "action": rows["action"],
            "next": {
                "observation": rows["next_observation"],
                "reward": rows["reward"].unsqueeze(-1),
                "terminated": rows["terminated"].unsqueeze(-1).bool(),
            },
        },
        batch_size=rows["reward"].shape,
    )


@pytest.mark.parametrize("horizon", [1, 3])
def test_update_is_the_librarys(horizon, tolerance):
    # Noise that meets the clip and the bounds, gradients that meet the largest norm.
    args = dataclasses.replace(TINY, horizon=horizon, clip_norm=0.5, noise_clip=0.2)
    schedule = NoiseSchedule(0.5, 0.1, steps=10)
    torch.manual_seed(0)
    loss = make_alm_loss(
        observation_dim=OBSERVATION,
        action_low=[-1.0, -0.1],
        action_high=[1.0, 0.3],
        latent_dim=args.latent_dim,
        hidden_dim=args.hidden_dim,
        model_hidden_dim=args.model_hidden_dim,
        noise_schedule=schedule,
        noise_clip=args.noise_clip,
        gamma=args.gamma,
        lmbda=args.lmbda,
        classifier_coef=args.classifier_coef,
    )
    stepper = ALMOptimizationStepper(
        loss, lr=args.lr, clip_norm=args.clip_norm, tau=args.tau
    )
    low, high = torch.tensor([-1.0, -0.1]), torch.tensor([1.0, 0.3])
    agent = alm.ALM(args, OBSERVATION, low, high)
    for _, ours, theirs in parameters(loss, agent):
        theirs.data.copy_(ours)
    for _ in range(4):
        slices, batch = random_rows(args.batch_size, horizon), random_rows(7)
        schedule.step()
        state = torch.get_rng_state()
        losses = agent.update(slices, batch, schedule.std.item())
        drawn = torch.get_rng_state()
        torch.set_rng_state(state)
        ours = stepper.step(
            None,
            TensorDict(
                {"slice": as_tensordict(slices), "transition": as_tensordict(batch)},
                batch_size=[args.batch_size],
            ),
        )
        assert torch.equal(drawn, torch.get_rng_state())
        for theirs, name in LOSSES.items():
            torch.testing.assert_close(
                losses[theirs], ours[f"loss_{name}"], **tolerance, msg=theirs
            )
        for name, our, their in parameters(loss, agent):
            torch.testing.assert_close(
                their.data,
                our.data,
                **tolerance,
                msg=lambda text, n=name: f"{n}: {text}",
            )


@pytest.mark.parametrize("steps", [40, 60, 61, 95])
def test_slices_are_uniform_over_whole_windows(steps):
    replay = alm.Replay(60, 1, 1)
    for step in range(steps):
        replay.add(step, 0.0, step, step + 1, 0.0, step % 7 == 6)
    slices, batch = replay.sample(20_000, 3, "cpu")
    time = slices["observation"][..., 0]
    assert (time.diff(dim=1) == 1).all()
    assert (slices["next_observation"][..., 0] == time + 1).all()
    oldest = max(0, steps - 60)
    starts, counts = time[:, 0].unique(return_counts=True)
    assert starts.tolist() == [t for t in range(oldest, steps - 2) if t % 7 <= 4]
    assert counts.max() < 1.5 * counts.min()
    assert batch["reward"].unique().tolist() == list(range(oldest, steps))


def test_training_prints_an_evaluation_at_each_interval(capsys):
    agent = alm.train(dataclasses.replace(TINY, task="Hopper-v5"))
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1]) for line in lines] == [0, 2, 4]
    assert all(re.search(r"return +-?\d+\.\d ", line) for line in lines)
    assert "critic" in lines[-1]
    step = agent.actor_optimizer.state_dict()["state"][0]["step"]
    assert step == TINY.total_steps


def test_noise_falls_and_stays():
    args = dataclasses.replace(TINY, noise_steps=10)
    stds = [alm.noise_std(args, step) for step in (0, 5, 10, 20)]
    assert stds == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_it_stands_alone():
    tree = ast.parse(inspect.getsource(alm))
    imported = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert "torch" in imported
    assert not any(re.match("alm_torchrl|torchrl|tensordict", n) for n in imported)
