"""The arithmetic of one update: as a function, with compiled terms, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, Literal, cast

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate

from alm_torchrl.objectives import ALMLoss

__all__ = ["CapturedUpdate", "Update"]

Precision = Literal["fp32", "tf32", "bf16"]

# Runs before a capture: libraries allocate and choose their kernels in the first.
WARMUP = 3


class Update:
    """Losses, backward passes, clipping, optimizers and targets, in their order.

    It draws random numbers and changes tensors in place, and touches nothing else:
    no value is read from the device, so that a CUDA graph can hold all of it. Once a
    loss or gradient norm is not finite, all later steps do nothing.

    Args:
        loss (ALMLoss): the loss. Its targets become copies of the online networks.

    Keyword Args:
        lr (float): learning rate.
        clip_norm (float): largest global gradient norm of each step.
        tau (float): share by which the targets move.
        precision (str): ``"fp32"``, ``"tf32"`` or ``"bf16"``.
        compile (bool): run the loss's methods compiled.
    """

    def __init__(
        self,
        loss: ALMLoss,
        *,
        lr: float,
        clip_norm: float,
        tau: float,
        precision: Precision,
        compile: bool,
    ) -> None:
        self.loss = loss
        self.clip_norm = clip_norm
        self.tau = tau
        self.precision = precision
        # Copies the networks to the targets, and tells the loss that they will move.
        SoftUpdate(loss, tau=tau)
        trained = {
            "model_loss": [*self._params("encoder", "model")],
            "reward_classifier_loss": [*self._params("reward", "classifier")],
            "qvalue_loss": [*self._params("qvalue")],
            "actor_loss": [*self._params("actor")],
        }
        trained["model_loss"] += loss.model_terms.parameters()
        if loss.entropy is not None:
            trained["alpha_loss"] = [*loss.entropy.parameters()]
        self.trained: dict[str, list[nn.Parameter]] = trained
        """The parameters that each step of an update trains, by the loss's method."""
        # Only the fused implementation can skip a step on the device.
        self.optimizers = {
            name: torch.optim.Adam(params, lr=lr, fused=True)
            for name, params in trained.items()
        }
        names = ["encode_transitions", *trained]
        self._compiled = (
            {name: compile_term(getattr(loss, name)) for name in names}
            if compile
            else None
        )
        self.device = trained["model_loss"][0].device
        # Number of this update, from 1; the caller fills it in.
        self.count = torch.zeros((), dtype=torch.int64, device=self.device)
        # Update and position (from 1) of the first term that was not finite, or zeros.
        self.failure = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.checked: list[str] = []

    def _params(self, *parts: str) -> Iterator[nn.Parameter]:
        for part in parts:
            if getattr(self.loss, part) is not None:
                yield from getattr(self.loss, f"{part}_params").parameters()

    def tensors(self) -> Iterator[Tensor]:
        """All that an update may change, and the buffers of the loss."""
        yield from self.loss.parameters()
        yield from self.loss.buffers()
        yield self.failure
        for optimizer in self.optimizers.values():
            for state in optimizer.state.values():
                yield from state.values()

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Makes one update.

        Args:
            batch (TensorDictBase): two-draw batch or slices ``[B, K]``.

        Returns:
            dict: detached scalars by name.
        """
        with _matrix_products(self.precision):
            return self._run(batch)

    def _run(self, batch: TensorDictBase) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        checked: dict[str, Tensor] = {}
        failed = self.failure[0] > 0

        def step(name: str, *args: object) -> None:
            nonlocal failed
            value, metadata = self._compute(name, batch, *args)
            new = self._losses(name, value, metadata)
            failed = self._descend(name, value, new, failed)
            metrics.update(metadata)
            checked.update(new)

        step("model_loss")
        # The targets, and so these distributions, stay to the end.
        encoded = self._compute("encode_transitions", batch)
        step("reward_classifier_loss", encoded)
        step("qvalue_loss", encoded)
        step("actor_loss", encoded)
        if self.loss.entropy is not None:
            step("alpha_loss", encoded)
        self._move_targets(failed)
        self._note(checked, failed)
        return {**metrics, **checked}

    def _compute(self, name: str, *args: object) -> Any:  # noqa: ANN401
        """Calls a method of the loss, compiled if asked for."""
        methods = self._compiled
        method = getattr(self.loss, name) if methods is None else methods[name]
        reduced = self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, reduced):
            return method(*args)

    def _losses(
        self, name: str, value: Tensor, metadata: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The detached losses of a step, by name."""
        if name == "reward_classifier_loss":  # a sum, whose parts are in its metadata
            return {k: v for k, v in metadata.items() if k.startswith("loss_")}
        return {f"loss_{name.removesuffix('_loss')}": value.detach()}

    def _descend(
        self, name: str, value: Tensor, checked: dict[str, Tensor], failed: Tensor
    ) -> Tensor:
        """Backward pass, clipping and optimizer; returns whether the update failed."""
        for parameter in self.trained[name]:
            parameter.grad = None
        value.backward()
        norm = nn.utils.clip_grad_norm_(self.trained[name], self.clip_norm)
        checked[f"grad_norm_{name.removesuffix('_loss')}"] = norm
        failed = failed | ~torch.stack(list(checked.values())).isfinite().all()
        optimizer = self.optimizers[name]
        # Read by the fused Adam: the step is skipped where it is 1.
        optimizer.found_inf = failed.to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
        return failed

    def _move_targets(self, failed: Tensor) -> None:
        """Moves the targets towards the online networks, or not after a failure."""
        for part in ("encoder", "qvalue"):
            online = getattr(self.loss, f"{part}_params")
            targets = getattr(self.loss, f"target_{part}_params")
            for key, source in online.items(include_nested=True, leaves_only=True):
                if source.requires_grad:
                    weight = self.tau * (~failed).to(source.dtype)
                    targets.get(key).data.lerp_(source.data, weight)

    def _note(self, checked: dict[str, Tensor], failed: Tensor) -> None:
        """Notes the first term that was not finite, unless one was before."""
        self.checked = list(checked)
        position = (~torch.stack(list(checked.values())).isfinite()).int().argmax() + 1
        first = torch.stack([self.count, position])
        is_new = failed & (self.failure[0] == 0)
        self.failure.copy_(torch.where(is_new, first, self.failure))


class CapturedUpdate:
    """An update as one CUDA graph, captured at the first batch.

    Before the capture the update runs a few times, and everything is put back as it
    was: what :meth:`Update.tensors` gives, and the generators.

    Args:
        update (Update): what to capture.
    """

    def __init__(self, update: Update) -> None:
        self._update = update
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: TensorDictBase
        self._outputs: Tensor
        self._names: list[str]

    def reset(self) -> None:
        """Forgets the graph: the next batch is captured anew."""
        self._graph = None

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Makes one update.

        Args:
            batch (TensorDictBase): two-draw batch or slices ``[B, K]``, with the
                entries of the first.

        Returns:
            dict: detached scalars by name.

        Raises:
            ValueError: if it has other entries, shapes, types or devices.
            RuntimeError: if the update cannot be captured.
        """
        if self._graph is None:
            self._capture(batch)
        expected, given = _entries(self._inputs), _entries(batch)
        if given != expected:
            keys = [k for k in expected | given if expected.get(k) != given.get(k)]
            key = min(keys, key=str)
            raise ValueError(
                f"sub_batch: expected {key!r} as it was captured, {expected.get(key)}, "
                f"got {given.get(key)}; cudagraph=False takes any batch."
            )
        self._inputs.update_(batch)
        cast("torch.cuda.CUDAGraph", self._graph).replay()
        # The next replay writes over what this one returns.
        return dict(zip(self._names, self._outputs.clone().unbind(), strict=True))

    def _capture(self, batch: TensorDictBase) -> None:
        device = self._update.device
        self._inputs = batch.clone()
        with torch.cuda.device(device):
            with _restored(self._update.tensors), torch.random.fork_rng([device]):
                current, side = torch.cuda.current_stream(), torch.cuda.Stream()
                side.wait_stream(current)
                with torch.cuda.stream(side):
                    for _ in range(WARMUP):
                        self._update(self._inputs)
                current.wait_stream(side)
            # Gradients must be the graph's own memory.
            for optimizer in self._update.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            optimizers = self._update.optimizers.values()
            try:
                with _capturable(optimizers), torch.cuda.graph(graph, stream=side):
                    outputs = self._update(self._inputs)
                    self._names = list(outputs)
                    self._outputs = torch.stack(list(outputs.values()))
            except RuntimeError as error:
                raise RuntimeError(
                    "the update cannot be captured as a CUDA graph. A network or "
                    "distribution may read a value from the device or copy one to it, "
                    "as bounds given as numbers are; cudagraph=False runs it as it is."
                ) from error
        self._graph = graph


def compile_term(method: Callable[..., Any]) -> Callable[..., Any]:
    """A loss method compiled as one graph, forward and backward.

    It draws the random numbers that the method itself would.

    Args:
        method (callable): method of the loss.

    Returns:
        callable: the compiled method.
    """

    def term(*args: object) -> Any:  # noqa: ANN401
        return method(*args)

    # What is compiled is kept, up to a limit, by the code object, which all losses of a
    # process share, and all methods under one decorator.
    term.__code__ = term.__code__.replace()
    return torch.compile(
        term, fullgraph=True, dynamic=False, options={"fallback_random": True}
    )


def _entries(batch: TensorDictBase) -> dict[NestedKey, tuple[object, ...]]:
    return {
        key: (tuple(entry.shape), entry.dtype, entry.device)
        for key, entry in batch.items(include_nested=True, leaves_only=True)
    }


@contextmanager
def _matrix_products(precision: Precision) -> Iterator[None]:
    if precision != "tf32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _restored(tensors: Callable[[], Iterator[Tensor]]) -> Iterator[None]:
    """Puts tensors back in place; those that came into being last become zeros."""
    before = [tensor.detach().clone() for tensor in tensors()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, saved in zip_longest(tensors(), before):
                tensor.zero_() if saved is None else tensor.copy_(saved)


@contextmanager
def _capturable(optimizers: Iterable[torch.optim.Adam]) -> Iterator[None]:
    """Lets optimizers be captured, which would warn outside a capture."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
