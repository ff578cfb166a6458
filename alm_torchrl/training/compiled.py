"""An update as one graph, compiled by Inductor.

Losses, backward passes, clipping, Adam and the moves of the targets are recorded as
one graph of ATen operations with :func:`torch.fx.experimental.proxy_tensor.make_fx`.
Whatever lies between two operations is frozen as it was at the first batch: Python
numbers, branches, counters and hooks of networks, and draws from NumPy or Python.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.adam import adam

from alm_torchrl.compat import compile_graph
from alm_torchrl.training.capture import check_entries, entries_of, restored
from alm_torchrl.training.update import move

__all__ = ["CompiledUpdate", "has_compiler"]

# Batches after the first in which the eager update is compared.
CHECKS = 2
# Largest difference of a metric from the eager one, relative to 1 + its magnitude.
TOLERANCE = {False: 1e-3, True: 5e-2}
ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")


class RecordableUpdate(Protocol):
    """An update whose operations can be recorded."""

    device: torch.device
    optimizers: dict[str, torch.optim.Adam]
    reduced: bool
    clip: Callable[[list[nn.Parameter], float], Tensor]
    descend: Callable[[str, Tensor], None]
    move: Callable[[list[Tensor], list[Tensor], Tensor], None]

    def tensors(self) -> Iterator[Tensor]:
        """All that an update may change, and the buffers of the loss."""

    def numbers(self) -> list[object]:
        """What an update depends on besides tensors."""

    def __call__(self, batch: TensorDictBase, /) -> dict[str, Tensor]:
        """Makes one update; returns detached scalars by name."""


class CompiledUpdate:
    """An update as one graph, recorded and compiled at the first batch.

    Parameters, targets, buffers, the optimizers' state and learning rates are inputs of
    the graph: they may change, be loaded or be replaced. It draws the random numbers of
    the eager update. It is recorded anew after :meth:`reset`, a change of another
    option of an optimizer, of a number or flag of the loss, or of what is trained, and
    where a tensor has another shape, type or device.

    In the next two batches the eager update runs as well, without a trace, and the
    metrics are compared.

    Args:
        update (RecordableUpdate): what to compile.
    """

    def __init__(self, update: RecordableUpdate) -> None:
        self._update = update
        self.device = update.device
        self.optimizers = update.optimizers
        self._rates = {
            name: torch.zeros((), device=update.device) for name in update.optimizers
        }
        self._graph: Callable[..., Any] | None = None
        self._unchecked = 0
        # Of the recording: names of the metrics; each input that is no entry of the
        # batch, by its position among the tensors of the update where it is one; and
        # what has to be as it was.
        self._names: list[str] = []
        self._inputs: list[int | Tensor] = []
        self._entries: dict[NestedKey, tuple[object, ...]] = {}
        self._conditions: list[object] = []

    @property
    def ready(self) -> bool:
        """Whether there is a graph, which takes batches like the first one only."""
        return self._graph is not None

    def tensors(self) -> Iterator[Tensor]:
        """All that an update may change, and the buffers of the loss."""
        return self._update.tensors()

    def reset(self) -> None:
        """Forgets the graph: the next batch is recorded anew."""
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
            RuntimeError: if the update cannot be recorded or compiled, or the graph
                differs from the eager update.
        """
        tensors = list(self.tensors())
        if self._graph is not None:
            check_entries(batch, self._entries, "compile")
        if self._graph is None or self._conditions != self._describe(tensors):
            self._compile(batch)
            tensors = list(self.tensors())
        elif self._unchecked:
            self._unchecked -= 1
            with self._traceless():
                expected = self._update(batch)
            return self._compared(self._run(batch, tensors), expected)
        return self._run(batch, tensors)

    def _run(self, batch: TensorDictBase, tensors: list[Tensor]) -> dict[str, Tensor]:
        for name, rate in self._rates.items():
            rate.fill_(self.optimizers[name].param_groups[0]["lr"])
        inputs = [tensors[x] if isinstance(x, int) else x for x in self._inputs]
        inputs += [batch.get(key) for key in self._entries]
        with torch.no_grad():
            outputs = cast("Callable[..., Any]", self._graph)(*inputs)
        return dict(zip(self._names, outputs, strict=True))

    def _describe(self, tensors: list[Tensor]) -> list[object]:
        """What a recording depends on besides the batch."""
        options = [
            {k: v for k, v in group.items() if k not in ("params", "lr")}
            for optimizer in self.optimizers.values()
            for group in optimizer.param_groups
        ]
        kinds = ((t.shape, t.dtype, t.device, t.requires_grad) for t in tensors)
        return [*options, *self._update.numbers(), *kinds]

    @contextmanager
    def _traceless(self) -> Iterator[None]:
        """Puts tensors and generators back."""
        device = self.device
        devices = [device] if device.type == "cuda" else []
        with restored(self.tensors), torch.random.fork_rng(devices):
            yield

    def _compared(
        self, metrics: dict[str, Tensor], expected: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tolerance = TOLERANCE[self._update.reduced]
        for name, eager in expected.items():
            compiled = metrics[name]
            near = (compiled - eager).abs() <= tolerance * (1 + eager.abs())
            near = near & eager.isfinite()
            # The same infinity, or NaN in both, is no difference.
            same = (compiled == eager) | (compiled.isnan() & eager.isnan())
            if not (near | same).all():
                raise RuntimeError(
                    f"compile: the graph differs from the eager update: "
                    f"{name} is {compiled.item():g} instead of {eager.item():g}. A "
                    "network may change numbers in Python or draw from NumPy, which "
                    "a graph does not follow; compile=False runs it as it is."
                )
        return metrics

    def _compile(self, batch: TensorDictBase) -> None:
        with self._traceless():
            self._update(batch)  # Makes the optimizers' state.
        entries = entries_of(batch)
        names: list[str] = []

        def run(*values: Tensor) -> list[Tensor]:
            given = batch.empty(recurse=True)
            for key, value in zip(entries, values, strict=True):
                given.set(key, value)
            metrics = self._update(given)
            names[:] = list(metrics)
            return list(metrics.values())

        values = [batch.get(key) for key in entries]
        try:
            with self._traceless(), self._one_call_each():
                recorded = make_fx(run)(*values)
            graph, held = _make_inputs(recorded)
            with torch.no_grad():
                self._graph = compile_graph(graph, [*held, *values])
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise RuntimeError(
                f"compile: the update cannot become one graph: {lines[0]} "
                "compile=False runs it as it is."
            ) from error
        tensors = list(self.tensors())
        places = {_memory(tensor): place for place, tensor in enumerate(tensors)}
        self._inputs = [places.get(_memory(tensor), tensor) for tensor in held]
        self._names, self._entries = names, entries
        self._conditions = self._describe(tensors)
        self._unchecked = CHECKS

    @contextmanager
    def _one_call_each(self) -> Iterator[None]:
        """Has the update clip, descend and move its targets in one operation each."""
        update = self._update
        before = update.clip, update.descend, update.move
        update.clip = self._clip
        update.descend = self._descend
        update.move = torch.ops.alm_torchrl.move
        try:
            yield
        finally:
            update.clip, update.descend, update.move = before
            for optimizer in update.optimizers.values():
                optimizer.zero_grad(set_to_none=True)

    def _clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        trained = [p for p in parameters if p.grad is not None]
        norm = torch.ops.alm_torchrl.global_norm(
            [cast("Tensor", p.grad) for p in trained]
        )
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        for parameter in trained:
            parameter.grad = cast("Tensor", parameter.grad) * scale
        return norm

    def _descend(self, name: str, failed: Tensor) -> None:
        optimizer = self.optimizers[name]
        group = optimizer.param_groups[0]
        wanted = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True}
        found = {key: group[key] for key in wanted}
        if len(optimizer.param_groups) > 1 or found != wanted:
            raise ValueError(
                f"optimizers[{name!r}]: expected one group of parameters with "
                f"{wanted}, got {len(optimizer.param_groups)} and {found}."
            )
        trained = [p for p in group["params"] if p.grad is not None]
        states = [optimizer.state[p] for p in trained]
        torch.ops.alm_torchrl.adam_step(
            [p.detach() for p in trained],
            [p.grad for p in trained],
            *([state[key] for state in states] for key in ADAM_STATE),
            self._rates[name],
            failed,
            *group["betas"],
            group["eps"],
            group["weight_decay"],
        )


def has_compiler() -> bool:
    """Whether Inductor's C++ compiler is installed."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX", default)) is not None


# A custom_op would take twice the time of such an operator to call.
torch.library.define("alm_torchrl::global_norm", "(Tensor[] gradients) -> Tensor")
torch.library.define(
    "alm_torchrl::adam_step",
    "(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] means, "
    "Tensor(c!)[] squares, Tensor(d!)[] steps, Tensor lr, Tensor skip, float beta1, "
    "float beta2, float eps, float weight_decay) -> ()",
)
torch.library.define(
    "alm_torchrl::move", "(Tensor(a!)[] targets, Tensor[] sources, Tensor weight) -> ()"
)


@torch.library.impl("alm_torchrl::global_norm", "default")
def _global_norm(gradients: list[Tensor]) -> Tensor:
    """Norm of all gradients together, a scalar."""
    return torch.stack([g.norm() for g in gradients]).norm()


@torch.library.register_fake("alm_torchrl::global_norm")
def _fake_norm(gradients: list[Tensor]) -> Tensor:
    return gradients[0].new_empty(())


@torch.library.impl("alm_torchrl::adam_step", "default")
def _adam_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW, or none where ``skip``: what the eager update does."""
    adam(
        parameters,
        gradients,
        means,
        squares,
        [],
        steps,
        fused=True,
        found_inf=skip.to(torch.float32),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
        decoupled_weight_decay=True,
    )


torch.library.impl("alm_torchrl::move", "default", move)


def _make_inputs(recorded: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """Makes the tensors that a recording holds its first inputs, each memory once."""
    graph, held = recorded.graph, list[Tensor]()
    first = next(iter(graph.nodes))
    inputs: dict[tuple[object, ...], fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            tensor = getattr(recorded, node.target).detach()
            if _memory(tensor) not in inputs:
                with graph.inserting_before(first):
                    inputs[_memory(tensor)] = graph.placeholder(f"held_{len(held)}")
                held.append(tensor)
            node.replace_all_uses_with(inputs[_memory(tensor)])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return fx.GraphModule({}, graph), held


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
