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

__all__ = ["STEPS", "ALMTargetUpdate", "CapturedUpdate", "Update"]

Precision = Literal["fp32", "tf32", "bf16"]
Term = Callable[[TensorDictBase], tuple[Tensor, dict[str, Tensor]]]
ComputeLoss = Callable[[TensorDictBase, str], tuple[Tensor, dict[str, Tensor]]]

STEPS = (
    ("model_loss", ("encoder", "model", "decoder")),
    ("reward_classifier_loss", ("reward", "classifier")),
    ("qvalue_loss", ("qvalue",)),
    ("actor_loss", ("actor",)),
)
"""Each step of an update: the loss method, and the parts it trains.

With an entropy bonus, that of its temperature follows.
"""

# Runs before a capture: libraries allocate and choose their kernels in the first.
WARMUP = 3


class ALMTargetUpdate(SoftUpdate):
    """Soft update of the targets that stands still after a failed update.

    Args:
        loss_module (ALMLoss): loss with target parameters.

    Keyword Args:
        tau (float): share of the online parameters, in (0, 1]. Default: ``0.005``.

    Examples:
        >>> from alm_torchrl import make_alm_loss
        >>> loss = make_alm_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> updater = ALMTargetUpdate(loss, tau=1.0)
        >>> online = loss.qvalue_params.flatten_keys()
        >>> _ = online.data.apply_(lambda values: values.fill_(2.0))
        >>> updater.step()
        >>> target = loss.target_qvalue_params.flatten_keys()
        >>> all(bool((values == 2).all()) for values in target.values())
        True
    """

    def __init__(self, loss_module: ALMLoss, *, tau: float = 0.005) -> None:
        super().__init__(loss_module, tau=tau)
        self.failed: Tensor | None = None

    def _step(self, p_source: TensorDictBase, p_target: TensorDictBase) -> None:
        weights: dict[torch.dtype, Tensor | float] = {}
        for key, target in p_target.items(include_nested=True, leaves_only=True):
            dtype = target.dtype
            if dtype not in weights:
                # TensorDict's own lerp_ would wait for a number of the device.
                moves = 1 if self.failed is None else (~self.failed).to(dtype)
                weights[dtype] = (1 - self.eps) * moves
            target.data.lerp_(p_source.get(key).data, weights[dtype])


class Update:
    """Losses, backward passes, clipping, optimizers and targets, in their order.

    It draws random numbers and changes tensors in place, and touches nothing else:
    no value is read from the device, so that a CUDA graph can hold all of it.

    Args:
        loss (ALMLoss): the loss.
        target_update (ALMTargetUpdate): moves the targets.

    Keyword Args:
        lr (float): learning rate.
        clip_norm (float): largest global gradient norm of each step.
        precision (str): ``"fp32"``, ``"tf32"`` or ``"bf16"``.
        compile (bool): run the loss's methods compiled.
    """

    def __init__(
        self,
        loss: ALMLoss,
        target_update: ALMTargetUpdate,
        *,
        lr: float,
        clip_norm: float,
        precision: Precision,
        compile: bool,
    ) -> None:
        self.loss = loss
        self.target_update = target_update
        self.clip_norm = clip_norm
        self.precision = precision
        self.optimizers: dict[str, torch.optim.Adam] = {}
        self._parameters: dict[str, list[nn.Parameter]] = {}
        steps = {method: list(self._part_parameters(parts)) for method, parts in STEPS}
        if loss.log_alpha is not None:
            steps["alpha_loss"] = [loss.log_alpha]
        for method, params in steps.items():
            self._parameters[method] = params
            # Only the fused implementation can skip a step on the device.
            self.optimizers[method] = torch.optim.Adam(params, lr=lr, fused=True)
        names = ["encode_transitions", *self.optimizers]
        self._terms = (
            {name: compile_term(getattr(loss, name)) for name in names}
            if compile
            else None
        )
        self.device = self._parameters["model_loss"][0].device
        # Number of this update, from 1; whoever calls fills it in.
        self.count = torch.zeros((), dtype=torch.int64, device=self.device)
        # Update and position (from 1) of the first term that was not finite, or zeros.
        self.failure = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.checked: list[str] = []

    def _part_parameters(self, parts: tuple[str, ...]) -> Iterator[nn.Parameter]:
        for part in parts:
            params = getattr(self.loss, f"{part}_params", None)
            if params is not None:
                yield from params.parameters()

    def tensors(self) -> Iterator[Tensor]:
        """All that an update may change, and the buffers of the loss."""
        yield from self.loss.parameters()
        yield from self.loss.buffers()
        yield self.failure
        for optimizer in self.optimizers.values():
            for state in optimizer.state.values():
                yield from state.values()

    def __call__(
        self, batch: TensorDictBase, compute_loss: ComputeLoss | None = None
    ) -> dict[str, Tensor]:
        """Makes one update.

        Args:
            batch (TensorDictBase): two-draw batch or slices ``[B, K]``.
            compute_loss (callable, optional): runs the loss method of a name on a
                batch. Default: ``None``, the loss itself does.

        Returns:
            dict: detached scalars by name.
        """
        with _matrix_products(self.precision):
            return self._run(batch, compute_loss or self._compute_loss)

    def _term(self, name: str) -> Callable[..., Any]:
        return getattr(self.loss, name) if self._terms is None else self._terms[name]

    def _compute_loss(
        self, batch: TensorDictBase, method: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return cast("Term", self._term(method))(batch)

    def _autocast(self) -> torch.autocast:
        reduced = self.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, reduced)

    def _run(
        self, batch: TensorDictBase, compute_loss: ComputeLoss
    ) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = {}
        checked: dict[str, Tensor] = {}
        failed = self.failure[0] > 0
        for method, optimizer in self.optimizers.items():
            with self._autocast():
                value, metadata = compute_loss(batch, method)
            for parameter in self._parameters[method]:
                parameter.grad = None
            value.backward()
            norm = nn.utils.clip_grad_norm_(self._parameters[method], self.clip_norm)
            name = method.removesuffix("_loss")
            new = {k: loss for k, loss in metadata.items() if k.startswith("loss_")}
            if method != "reward_classifier_loss":  # the sum of those in its metadata
                new[f"loss_{name}"] = value.detach()
            new[f"grad_norm_{name}"] = norm
            failed = failed | ~torch.stack(list(new.values())).isfinite().all()
            # Read by the fused Adam: the step is skipped where it is 1.
            optimizer.found_inf = failed.to(torch.float32)  # type: ignore[attr-defined]
            optimizer.step()
            metrics.update(metadata)
            checked.update(new)
            if method == "model_loss":
                # The targets, and so these distributions, stay to the end.
                with self._autocast():
                    batch = self._term("encode_transitions")(batch)
        self.target_update.failed = failed
        self.target_update.step()
        self._note(checked, failed)
        return {**metrics, **checked}

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
