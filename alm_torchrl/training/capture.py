"""An update as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Protocol, cast

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

__all__ = ["CapturedUpdate"]

# Runs before a capture: libraries allocate and choose their kernels in the first.
WARMUP = 3


class CapturableUpdate(Protocol):
    """An update that reads no value from the device."""

    device: torch.device
    optimizers: dict[str, torch.optim.Adam]

    def tensors(self) -> Iterator[Tensor]:
        """All that an update may change."""

    def __call__(self, batch: TensorDictBase, /) -> dict[str, Tensor]:
        """Makes one update; returns detached scalars by name."""


class CapturedUpdate:
    """An update as one CUDA graph, captured at the first batch.

    Before the capture the update runs a few times, and everything is put back as it
    was: what its ``tensors`` gives, and the generators.

    Args:
        update (CapturableUpdate): what to capture.
    """

    def __init__(self, update: CapturableUpdate) -> None:
        self._update = update
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: TensorDictBase
        self._outputs: Tensor
        self._names: list[str]

    @property
    def ready(self) -> bool:
        """Whether there is a graph, which takes batches like the first one only."""
        return self._graph is not None

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
        check_entries(batch, entries_of(self._inputs), "cudagraph")
        self._inputs.update_(batch)
        cast("torch.cuda.CUDAGraph", self._graph).replay()
        # The next replay writes over what this one returns.
        return dict(zip(self._names, self._outputs.clone().unbind(), strict=True))

    def _capture(self, batch: TensorDictBase) -> None:
        device = self._update.device
        self._inputs = batch.clone()
        with torch.cuda.device(device):
            with restored(self._update.tensors), torch.random.fork_rng([device]):
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


Entries = dict[NestedKey, tuple[object, ...]]


def entries_of(batch: TensorDictBase) -> Entries:
    """Shape, type and device of each entry."""
    return {
        key: (tuple(entry.shape), entry.dtype, entry.device)
        for key, entry in batch.items(include_nested=True, leaves_only=True)
    }


def check_entries(batch: TensorDictBase, expected: Entries, option: str) -> None:
    """Raises a ValueError unless a batch is like the first one."""
    given = entries_of(batch)
    if given != expected:
        keys = [k for k in expected | given if expected.get(k) != given.get(k)]
        key = min(keys, key=str)
        raise ValueError(
            f"sub_batch: expected {key!r} as in the first batch, {expected.get(key)}, "
            f"got {given.get(key)}; {option}=False takes any batch."
        )


@contextmanager
def restored(tensors: Callable[[], Iterator[Tensor]]) -> Iterator[None]:
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
