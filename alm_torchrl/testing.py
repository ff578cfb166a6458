"""Small problems, Hypothesis strategies and checks for variants of ALMLoss.

A variant keeps the contract of :class:`~alm_torchrl.ALMLoss` if :func:`check_loss`
passes, on one problem or, with pytest and Hypothesis, on many:

>>> class BoundedTargets(ALMLoss):
...     def td_target(self, transitions, encoded=None):
...         return super().td_target(transitions, encoded).clamp(-100, 100)
>>> check_loss(make_loss(Sizes(), BoundedTargets), make_two_draw_batch(Sizes()))
>>> from hypothesis import given, settings
>>> @settings(max_examples=3, deadline=None)
... @given(cases(BoundedTargets))
... def test_bounded_targets(case):
...     check_loss(*case)
>>> test_bounded_targets()

A check takes a loss and a batch without masks, two-draw ``[B]`` or slices ``[B, K]``.
It changes neither of them, nor the global random state. It raises an AssertionError
that names the term and the parameter or entry. ``routes`` says which parts each term
trains. Default: :data:`ROUTES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType
from torchrl.objectives import SoftUpdate

from alm_torchrl import networks
from alm_torchrl.objectives import ALMLoss

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        "alm_torchrl.testing needs Hypothesis: pip install 'alm_torchrl[test]'"
    ) from error

__all__ = [
    "ROUTES",
    "Sizes",
    "cases",
    "check_gradient_routing",
    "check_input_unmodified",
    "check_keys",
    "check_loss",
    "check_permutation_invariance",
    "check_reductions",
    "check_sum_of_parts",
    "check_targets_get_no_gradient",
    "make_loss",
    "make_slices",
    "make_two_draw_batch",
    "problem_sizes",
]

Reduction = Literal["mean", "sum", "none"]
Routes = Mapping[str, Sequence[str]]

ROUTES: Routes = {
    "loss_model": ("encoder", "model"),
    "loss_reward": ("reward",),
    "loss_classifier": ("classifier",),
    "loss_qvalue": ("qvalue",),
    "loss_actor": ("actor",),
    "loss_alpha": ("entropy",),
}
"""The parts that each term of ``ALMLoss`` trains, without a decoder."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a small problem.

    >>> Sizes(batch=2).horizon
    3
    """

    batch: int = 4
    horizon: int = 3
    latent_dim: int = 3
    observation_dim: int = 4
    action_dim: int = 2
    hidden_dim: int = 8


def make_loss(
    sizes: Sizes,
    loss_class: type[ALMLoss] = ALMLoss,
    *,
    seed: int = 0,
    linear_classifier: bool = False,
    **kwargs: Any,
) -> ALMLoss:
    """Builds a loss with the networks of the paper, for actions in [-1, 1].

    With ``entropy``, the actor learns its noise. The loss has a target updater.

    Args:
        sizes (Sizes): sizes of the networks.
        loss_class (type): ``ALMLoss`` or a subclass. Default: ``ALMLoss``.

    Keyword Args:
        seed (int): seed of the parameters. Default: ``0``.
        linear_classifier (bool): a classifier without hidden layers.
            Default: ``False``.
        **kwargs: arguments of the class; a network replaces the built one.

    Returns:
        ALMLoss: an instance of ``loss_class``.

    Examples:
        >>> make_loss(Sizes(), gamma=0.5).gamma
        tensor(0.5000)
    """
    actions, bound = sizes.action_dim, torch.ones(sizes.action_dim)
    width: Any = {"latent_dim": sizes.latent_dim, "hidden_dim": sizes.hidden_dim}
    stochastic = kwargs.get("entropy") is not None
    make_actor = networks.make_stochastic_actor if stochastic else networks.make_actor
    with _seeded(seed):
        parts: dict[str, Any] = {
            "encoder": networks.make_encoder(sizes.observation_dim, **width),
            "model": networks.make_model(actions, **width),
            "actor": make_actor(-bound, bound, **width),
            "qvalue": networks.make_qvalue(actions, **width),
            "reward": networks.make_reward(actions, **width),
            "classifier": networks.make_classifier(
                actions, linear=linear_classifier, **width
            ),
        }
        loss = loss_class(**{**parts, **kwargs})
    # A loss without an updater warns at each call.
    SoftUpdate(loss, tau=0.005)
    return loss


def make_slices(sizes: Sizes, *, seed: int = 0) -> TensorDict:
    """Draws random slices ``[B, K]``; some terminate, some reach a time limit.

    >>> make_slices(Sizes(batch=2, horizon=1))["action"].shape
    torch.Size([2, 1, 2])
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes.batch, sizes.horizon)
    states = (sizes.batch, sizes.horizon + 1, sizes.observation_dim)
    observation = torch.randn(states, generator=generator)
    action = torch.rand(*shape, sizes.action_dim, generator=generator)
    ends = torch.randint(3, (sizes.batch, 1), generator=generator)
    terminated, truncated = torch.zeros(2, *shape, 1, dtype=torch.bool)
    terminated[:, -1], truncated[:, -1] = ends == 1, ends == 2
    following = {
        "observation": observation[:, 1:].contiguous(),
        "reward": torch.randn(*shape, 1, generator=generator),
        "terminated": terminated,
        "truncated": truncated,
        "done": terminated | truncated,
    }
    return TensorDict(
        observation=observation[:, :-1].contiguous(),
        action=2 * action - 1,
        next=following,
        batch_size=shape,
    )


def make_two_draw_batch(sizes: Sizes, *, seed: int = 0) -> TensorDict:
    """Draws ``"slice"`` ``[B, K]`` and other ``"transition"`` ``[B]``, like the replay.

    >>> sorted(make_two_draw_batch(Sizes()).keys())
    ['slice', 'transition']
    """
    single = make_slices(replace(sizes, horizon=1), seed=seed + 1)
    draws = {"slice": make_slices(sizes, seed=seed), "transition": single[:, 0]}
    return TensorDict(draws, batch_size=[sizes.batch])


def problem_sizes() -> st.SearchStrategy[Sizes]:
    """Strategy of sizes from 1 to 5, with hidden layers 4 to 12 wide.

    >>> from hypothesis import find
    >>> find(problem_sizes(), lambda sizes: sizes.horizon > 2).horizon
    3
    """
    # The normalised output of fewer hidden units hardly depends on the input.
    few, wide = st.integers(1, 5), st.integers(4, 12)
    return st.builds(Sizes, few, few, few, few, few, wide)


def cases(
    loss_class: type[ALMLoss] = ALMLoss, **kwargs: Any
) -> st.SearchStrategy[tuple[ALMLoss, TensorDict]]:
    """Strategy of pairs: a loss, with the arguments of the class, and a batch for it.

    >>> from hypothesis import given, settings
    >>> @settings(max_examples=1, deadline=None)
    ... @given(cases(gamma=0.5))
    ... def test_case(case):
    ...     check_keys(*case)
    >>> test_case()
    """
    seeds = st.integers(0, 2**31)

    def pairs(sizes: Sizes) -> st.SearchStrategy[tuple[ALMLoss, TensorDict]]:
        return st.tuples(
            seeds.map(lambda seed: make_loss(sizes, loss_class, seed=seed, **kwargs)),
            seeds.map(lambda seed: make_two_draw_batch(sizes, seed=seed))
            | seeds.map(lambda seed: make_slices(sizes, seed=seed)),
        )

    return problem_sizes().flatmap(pairs)


@contextmanager
def _seeded(seed: int = 0) -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def _without_noise(loss: ALMLoss, reduction: Reduction) -> Iterator[None]:
    before = loss.deterministic_sampling_mode, loss.reduction
    loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
    loss.reduction = reduction
    try:
        with _seeded():
            yield
    finally:
        loss.deterministic_sampling_mode, loss.reduction = before


def _with_halves(loss: ALMLoss, batch: TensorDictBase) -> TensorDictBase:
    """A copy in which the classifier takes every other row for an imagined one."""
    keys, batch = loss.tensor_keys, batch.clone()
    transitions = batch.get(keys.transition, default=batch)
    rows = torch.arange(transitions.numel(), device=transitions.device) % 2 == 0
    transitions[keys.imagined] = rows.reshape(transitions.batch_size)
    return batch


def _require(condition: bool | Tensor, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _terms(loss: ALMLoss, batch: TensorDictBase) -> dict[str, Tensor]:
    terms = {k: v for k, v in loss(batch).items() if k.startswith("loss_")}
    _require(bool(terms), "forward returns no key that starts with loss_")
    for term, value in terms.items():
        _require(value.requires_grad, f"{term} has no gradient")
    return terms


def _method(loss: ALMLoss, term: str) -> Callable[..., tuple[Tensor, dict]]:
    name = f"{term.removeprefix('loss_')}_loss"
    _require(hasattr(loss, name), f"{term} has no method {name}")
    return getattr(loss, name)


def _gradients(value: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradient by name, zero where the value does not depend on the tensor."""
    leaves = list(tensors.values())
    grads = torch.autograd.grad(value.sum(), leaves, None, True, materialize_grads=True)
    return dict(zip(tensors, grads, strict=True))


def _part(name: str) -> str:
    return name.split(".")[0].removesuffix("_params")


def _route(routes: Routes, term: str) -> Sequence[str]:
    _require(term in routes, f"{term} is not in routes: say which parts it trains")
    return routes[term]


def _close(actual: Tensor, expected: Tensor) -> bool:
    bound = torch.finfo(expected.dtype).eps ** 0.5 * (1 + expected.abs().max())
    return bool((actual - expected).abs().max() <= bound)


def check_keys(loss: ALMLoss, batch: TensorDictBase) -> None:
    """``forward`` returns ``out_keys``; terms have methods, metrics no gradient.

    >>> check_keys(make_loss(Sizes()), make_slices(Sizes()))
    """
    with _seeded():
        output, expected = loss(batch), set(loss.out_keys)
        differ = sorted(set(output.keys()) ^ expected)
        _require(not differ, f"forward and out_keys differ in {differ}")
        for key, value in output.items():
            _require(value.isfinite().all(), f"{key} is not finite: {value}")
            attached = value.requires_grad and not key.startswith("loss_")
            _require(not attached, f"{key} is not detached")
        for term in _terms(loss, batch):
            _, metadata = _method(loss, term)(batch)
            extra = sorted(set(metadata) - expected)
            _require(not extra, f"{term} has metadata that out_keys lack: {extra}")


def check_gradient_routing(
    loss: ALMLoss, batch: TensorDictBase, routes: Routes = ROUTES
) -> None:
    """Each term reaches each of its parts, and no parameter elsewhere.

    >>> check_gradient_routing(make_loss(Sizes()), make_slices(Sizes()))
    """
    parameters = dict(loss.named_parameters())
    with _seeded():
        terms = _terms(loss, batch)
    for term, value in terms.items():
        route = _route(routes, term)
        reached = [k for k, grad in _gradients(value, parameters).items() if grad.any()]
        for name in reached:
            _require(_part(name) in route, f"{term} should not reach {name}")
        for part in route:
            _require(part in map(_part, reached), f"{term} does not reach {part}")


def check_targets_get_no_gradient(loss: ALMLoss, batch: TensorDictBase) -> None:
    """No term differentiates through a target network.

    >>> check_targets_get_no_gradient(make_loss(Sizes()), make_slices(Sizes()))
    """
    targets = {k: v for k, v in loss.named_buffers() if k.startswith("target_")}
    for name, target in targets.items():
        _require(not target.requires_grad, f"{name} requires a gradient")
    try:
        for target in targets.values():
            target.requires_grad_(True)
        with _seeded():
            terms = _terms(loss, batch)
        for term, value in terms.items():
            for name, grad in _gradients(value, targets).items():
                _require(not grad.any(), f"{term} has a gradient through {name}")
    finally:
        for target in targets.values():
            target.requires_grad_(False)


def check_input_unmodified(loss: ALMLoss, batch: TensorDictBase) -> None:
    """Neither ``forward`` nor the method of a term changes its input.

    >>> check_input_unmodified(make_loss(Sizes()), make_slices(Sizes()))
    """
    batch = batch.clone()
    before = dict(batch.clone().items(include_nested=True, leaves_only=True))

    def compare(call: str) -> None:
        now = dict(batch.items(include_nested=True, leaves_only=True))
        differ = set(now) ^ set(before)
        _require(not differ, f"{call} added or removed {differ}")
        for entry, old in before.items():
            same = torch.equal(now[entry].nan_to_num(), old.nan_to_num())
            _require(same, f"{call} changed {entry}")

    with _seeded():
        terms = _terms(loss, batch)
        compare("forward")
        for term in terms:
            _method(loss, term)(batch)
            compare(f"the method of {term}")


def check_sum_of_parts(
    loss: ALMLoss, batch: TensorDictBase, routes: Routes = ROUTES
) -> None:
    """One optimizer on the sum sees the same gradients as one for each method.

    >>> check_sum_of_parts(make_loss(Sizes()), make_slices(Sizes()))
    """
    batch = _with_halves(loss, batch)
    parameters = dict(loss.named_parameters())
    with _without_noise(loss, "mean"):
        terms = _terms(loss, batch)
        whole = _gradients(torch.stack(list(terms.values())), parameters)
        for term, value in terms.items():
            alone, _ = _method(loss, term)(batch)
            _require(_close(alone, value), f"{term} differs between forward and alone")
            route, grads = _route(routes, term), _gradients(alone, parameters)
            for name in filter(lambda name: _part(name) in route, grads):
                same = _close(whole[name], grads[name])
                _require(same, f"the sum and {term} alone differ in d/d {name}")


def check_reductions(loss: ALMLoss, batch: TensorDictBase) -> None:
    """``"none"`` gives ``[B]``, ``"mean"`` its mean, ``"sum"`` the sum over rows.

    >>> check_reductions(make_loss(Sizes()), make_slices(Sizes()))
    """
    batch, reduced = _with_halves(loss, batch), {}
    reductions: tuple[Reduction, ...] = ("none", "mean", "sum")
    for reduction in reductions:
        with _without_noise(loss, reduction):
            reduced[reduction] = _terms(loss, batch)
    # Of plain slices, one-step terms have B * K rows and "none" averages over K.
    counts = {batch.batch_size[0], batch.batch_size.numel()}
    for term, rows in reduced["none"].items():
        shape, mean, total = rows.shape, reduced["mean"][term], reduced["sum"][term]
        wrong = f'{term} has shape {list(shape)} with reduction "none"'
        _require(shape == batch.batch_size[:1], wrong)
        good = mean.ndim == 0 and _close(mean, rows.mean())
        _require(good, f'{term} is not the mean of its rows with reduction "mean"')
        good = total.ndim == 0 and any(_close(total, n * rows.mean()) for n in counts)
        _require(good, f'{term} is not the sum of its rows with reduction "sum"')


def check_permutation_invariance(loss: ALMLoss, batch: TensorDictBase) -> None:
    """Without noise, the order of the rows of a batch does not matter.

    >>> check_permutation_invariance(make_loss(Sizes()), make_slices(Sizes()))
    """
    batch = _with_halves(loss, batch)
    order = torch.arange(len(batch), device=batch.device).roll(1)
    with _without_noise(loss, "mean"):
        terms, permuted = _terms(loss, batch), _terms(loss, batch[order])
    for term, value in terms.items():
        _require(_close(permuted[term], value), f"{term} changes with the row order")


def check_loss(loss: ALMLoss, batch: TensorDictBase, routes: Routes = ROUTES) -> None:
    """Runs all checks of this module.

    >>> check_loss(make_loss(Sizes()), make_slices(Sizes()))
    """
    check_input_unmodified(loss, batch)
    check_keys(loss, batch)
    check_gradient_routing(loss, batch, routes)
    check_targets_get_no_gradient(loss, batch)
    check_sum_of_parts(loss, batch, routes)
    check_reductions(loss, batch)
    check_permutation_invariance(loss, batch)
