"""Property-based tests for a loss of your own.

**What you will learn**

- to write a variant of `ALMLoss` that changes one formula only;
- to check with `alm_torchrl.testing` that the variant keeps the contract of the loss:
  keys, gradients, reductions, an unchanged batch;
- to state properties of your own formula, and let Hypothesis search for problems of any
  size where they fail;
- to check your tests: break the variant on purpose, and see which test notices.

It assumes that you know the terms of the loss (`loss_and_gradients.py`). The tutorial
before it, `replace_a_part.py`, changes networks; this one changes the mathematics.

Run it as `python tutorials/property_tests.py`: under a minute on one processor core. It
needs the test extra (`pip install 'alm_torchrl[cli,test]'`). The figure goes to
`runs/tutorial-property-tests`, or to the folder in `ALM_OUTPUT`. `ALM_SMOKE=1` tries a
few problems only, for a quick check.
"""

# %%
from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from tensordict import TensorDictBase
from torch import Tensor

from alm_torchrl import ALMLoss, functional
from alm_torchrl.objectives import Encoding
from alm_torchrl.testing import (
    Sizes,
    cases,
    check_loss,
    make_loss,
    make_two_draw_batch,
    problem_sizes,
)

torch.set_num_threads(1)
SMOKE = os.environ.get("ALM_SMOKE") == "1"
OUTPUT = Path(os.environ.get("ALM_OUTPUT", "runs/tutorial-property-tests"))
OUTPUT.mkdir(parents=True, exist_ok=True)
EXAMPLES = 1 if SMOKE else 12

# %% [markdown]
# ## A variant
#
# The critics of ALM learn from a target that takes the minimum of two values (Eq. 10),
# which is cautious. Make the caution a number: 1 is the minimum of the critics, 0 their
# mean, and other numbers interpolate. Only one method changes. It uses the verbs of the
# loss: `encode`, `sample`, `act`, `state_action_value`.


# %%
class CautiousTargets(ALMLoss):
    """Targets between the mean of the critics (0) and their minimum (1)."""

    def __init__(self, *, caution: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.caution = caution

    def blend(self, values: Tensor) -> Tensor:
        """One value from those of all critics, `[*, N]` to `[*]`."""
        return torch.lerp(values.mean(-1), values.amin(-1), self.caution)

    @torch.no_grad()
    def td_target(
        self, transitions: TensorDictBase, encoded: Encoding | None = None
    ) -> Tensor:
        """`R + gamma (1 - terminated) blend(Q'(z', pi(z')))`."""
        following, latents = transitions["next"], self.latents
        dist = latents.encode(following) if encoded is None else encoded.next
        latent = latents.sample(dist)
        values = latents.state_action_value(latent, latents.act(latent), "target")
        reward = following["reward"].squeeze(-1)
        live = 1 - following["terminated"].squeeze(-1).to(reward.dtype)
        return functional.td_target(reward, self.gamma * live, self.blend(values))


# %% [markdown]
# ## The contract
#
# A loss promises more than a number. Each term trains its own part only, no gradient
# passes through a target network, `forward` returns the keys in `out_keys`, the batch
# stays unchanged, the reductions agree, and the order of the rows does not matter.
# `check_loss` checks all of this, here on a small problem from `make_loss` and
# `make_two_draw_batch`:

# %%
check_loss(make_loss(Sizes(), CautiousTargets), make_two_draw_batch(Sizes()))

# %% [markdown]
# One problem proves little. A *property* is a statement about all problems, and
# Hypothesis draws them: `cases` gives batches of one row, latents of one dimension,
# horizons of one step and other rare cases. Arguments that are not in `@given`, here
# the class, are left to the caller.

# %%
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,  # the same examples in each run
    phases=[Phase.generate],  # no search for a simpler example: see below
)


@SETTINGS
@given(data=st.data())
def keeps_the_contract(loss_class: type[ALMLoss], data: st.DataObject) -> None:
    """The loss passes every check on any problem."""
    loss, batch = data.draw(cases(loss_class))
    check_loss(loss, batch)


keeps_the_contract(CautiousTargets)

# %% [markdown]
# ## Properties of the formula
#
# The contract says nothing about the right value of a target. You say that, and three
# kinds of statement nearly always exist:
#
# - a **limit**: at one end of the new argument, all terms are those of the old loss;
# - an **order**: more caution never gives a higher target;
# - a **special case** with a known answer: after a termination nothing follows, so the
#   target is the reward, whatever the critics' values.
#
# With the same seed before both calls, they draw the same noise.

# %%
SEEDS = st.integers(0, 2**31)
CAUTION = st.floats(0, 1)


@SETTINGS
@given(sizes=problem_sizes(), seed=SEEDS)
def contains_the_original(
    loss_class: type[CautiousTargets], sizes: Sizes, seed: int
) -> None:
    """With a caution of 1 every term is that of ALMLoss."""
    batch = make_two_draw_batch(sizes, seed=seed)
    torch.manual_seed(seed)
    expected = make_loss(sizes, seed=seed)(batch.clone())
    torch.manual_seed(seed)
    found = make_loss(sizes, loss_class, seed=seed, caution=1.0)(batch)
    for term, value in expected.items():
        assert found[term].allclose(value, atol=1e-5), f"{term} differs"


@SETTINGS
@given(sizes=problem_sizes(), seed=SEEDS, first=CAUTION, second=CAUTION)
def caution_lowers_the_target(
    loss_class: type[CautiousTargets],
    sizes: Sizes,
    seed: int,
    first: float,
    second: float,
) -> None:
    """The target falls, or stays, as the caution grows."""
    batch = make_two_draw_batch(sizes, seed=seed)["transition"]
    loss, targets = make_loss(sizes, loss_class, seed=seed), []
    for caution in sorted((first, second)):
        loss.caution = caution
        torch.manual_seed(seed)
        targets.append(loss.td_target(batch.clone()))
    assert bool((targets[1] <= targets[0] + 1e-5).all()), "the target grew"


@SETTINGS
@given(sizes=problem_sizes(), seed=SEEDS, caution=CAUTION)
def nothing_follows_a_termination(
    loss_class: type[CautiousTargets], sizes: Sizes, seed: int, caution: float
) -> None:
    """The target of a terminated transition is its reward."""
    batch = make_two_draw_batch(sizes, seed=seed)["transition"]
    batch["next", "terminated"].fill_(True)
    loss = make_loss(sizes, loss_class, seed=seed, caution=caution)
    reward = batch["next", "reward"].squeeze(-1).clone()
    assert loss.td_target(batch).allclose(reward), "a value follows the end"


PROPERTIES: dict[str, Callable[[type[CautiousTargets]], None]] = {
    "contract": keeps_the_contract,
    "limit": contains_the_original,
    "order": caution_lowers_the_target,
    "special case": nothing_follows_a_termination,
}
for check in PROPERTIES.values():
    check(CautiousTargets)

# %% [markdown]
# ## Would the tests notice?
#
# Tests that pass may notice nothing. So break the variant with common mistakes: swapped
# branches of the blend, a forgotten termination, a lost `no_grad`, rewards clipped in
# place. None of them raises an error, and all would train.


# %%
class SwapsTheEnds(CautiousTargets):
    """Caution 0 is the minimum."""

    def blend(self, values: Tensor) -> Tensor:  # noqa: D102
        return torch.lerp(values.amin(-1), values.mean(-1), self.caution)


class ForgetsTheEnd(CautiousTargets):
    """A value follows a termination."""

    @torch.no_grad()
    def td_target(  # noqa: D102
        self, transitions: TensorDictBase, encoded: Encoding | None = None
    ) -> Tensor:
        latents = self.latents
        latent = latents.sample(latents.encode(transitions["next"]))
        values = latents.state_action_value(latent, latents.act(latent), "target")
        reward = transitions["next", "reward"].squeeze(-1)
        return functional.td_target(reward, self.gamma, self.blend(values))


class LosesNoGrad(CautiousTargets):
    """The gradient of the critics' loss passes through their target."""

    def td_target(  # noqa: D102
        self, transitions: TensorDictBase, encoded: Encoding | None = None
    ) -> Tensor:
        with torch.enable_grad():
            return CautiousTargets.td_target.__wrapped__(self, transitions)


class ClipsInPlace(CautiousTargets):
    """The call changes the rewards of the batch, and so of the replay."""

    def td_target(  # noqa: D102
        self, transitions: TensorDictBase, encoded: Encoding | None = None
    ) -> Tensor:
        transitions["next", "reward"].clamp_(-0.1, 0.1)
        return super().td_target(transitions, encoded)


def complaint(
    check: Callable[[type[CautiousTargets]], None], loss_class: type[CautiousTargets]
) -> str:
    """The message of a property that fails for a class; empty if it holds."""
    try:
        check(loss_class)
    except AssertionError as error:
        return str(error)
    return ""


# %% [markdown]
# The message names the term and the parameter or entry at fault:

# %%
told = complaint(keeps_the_contract, LosesNoGrad)
if not SMOKE:
    assert told.startswith("loss_qvalue has a gradient through target_")
told = complaint(keeps_the_contract, ClipsInPlace)
if not SMOKE:
    assert "'next', 'reward'" in told

# %% [markdown]
# Now test all variants with all properties. The contract knows only the form of a loss
# and misses swapped branches; the properties of the formula look only at values and
# miss a lost `no_grad`. Both kinds are needed.

# %%
VARIANTS = (CautiousTargets, SwapsTheEnds, ForgetsTheEnd, LosesNoGrad, ClipsInPlace)
caught = {
    variant: {name for name, check in PROPERTIES.items() if complaint(check, variant)}
    for variant in VARIANTS
}
assert not caught[CautiousTargets]
if not SMOKE:
    assert caught[SwapsTheEnds] == {"limit", "order"}
    assert caught[ForgetsTheEnd] == {"limit", "special case"}
    assert caught[LosesNoGrad] == {"contract"}
    assert caught[ClipsInPlace] == {"contract", "limit", "special case"}

# %%
figure = Figure(figsize=(7.0, 2.9), layout="constrained")
axes = figure.subplots()
for row, variant in enumerate(VARIANTS):
    for column, name in enumerate(PROPERTIES):
        fails = name in caught[variant]
        axes.text(
            column,
            row,
            "fails" if fails else "holds",
            ha="center",
            va="center",
            color="white" if fails else "0.35",
            bbox={
                "boxstyle": "square,pad=0.45",
                "facecolor": "#d55e00" if fails else "0.93",
                "edgecolor": "none",
            },
        )
axes.set_xlim(-0.6, len(PROPERTIES) - 0.4)
axes.set_ylim(len(VARIANTS) - 0.5, -0.5)
axes.set_xticks(range(len(PROPERTIES)), list(PROPERTIES))
axes.set_yticks(range(len(VARIANTS)), [variant.__name__ for variant in VARIANTS])
axes.tick_params(length=0, labeltop=True, labelbottom=False)
axes.spines[:].set_visible(False)
figure.suptitle(f"Which property notices, {EXAMPLES} problems each")
figure.savefig(OUTPUT / "caught.png", dpi=150)

# %% [markdown]
# ## The smallest batch that fails
#
# A failure on a large problem is tedious to read. Hypothesis shrinks it as long as it
# still fails (above, `phases` turns this off to save time; leave that line out in your
# own tests). `find` does the same for any predicate. Which terminations make the broken
# variant differ from the correct one? One terminated row is enough, and without one
# they never differ:

# %%
GOOD, BAD = make_loss(Sizes(), CautiousTargets), make_loss(Sizes(), ForgetsTheEnd)


def differ(ends: list[bool]) -> bool:
    """Whether the two targets differ on a batch with these terminations."""
    batch = make_two_draw_batch(Sizes(batch=len(ends)))["transition"]
    batch["next", "terminated"] = torch.tensor(ends).unsqueeze(-1)
    targets = []
    for loss in (GOOD, BAD):
        torch.manual_seed(0)
        targets.append(loss.td_target(batch))
    return not targets[0].allclose(targets[1])


BATCHES = st.lists(st.booleans(), min_size=1, max_size=32)
THOROUGH = settings(SETTINGS, phases=Phase, max_examples=100)
assert find(BATCHES, differ, settings=THOROUGH) == [True]
assert not differ([False] * 32)

# %% [markdown]
# ## Conclusion
#
# A variant of one formula takes a few lines. The library checks the contract, three
# properties state what the formula means, and the broken variants show that all four
# tests are needed.
#
# **In your own test suite**, the same functions are pytest tests. Name the class
# directly instead of passing it:
#
#     @given(cases(CautiousTargets))
#     def test_contract(case):
#         check_loss(*case)
#
# **Next steps**
#
# - For a variant with an additional term, tell `check_loss` which parts it trains:
#   `routes={**ROUTES, "loss_mine": ("encoder",)}`.
# - Compare your formula with a slow loop in float64 (`loss.double()`), row by row.
# - `CONTRIBUTING.md` lists what else a variant in the library needs.
# - See what a variant does to an agent: `look_inside.py` examines a trained one.
