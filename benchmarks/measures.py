"""What is measured besides time: operations, memory, matrix rate, the machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from alm_torchrl.runs.folder import provenance
from benchmarks.sizes import Sizes
from benchmarks.timing import Contender

__all__ = ["count_flop", "machine", "matrix_products", "measured", "peak_memory"]

GEMM_FLOP = {"cpu": 1e9, "cuda": 1e11}
"""Operations that one call of a matrix-rate contender makes by device, about ..."""
GEMM_REPEATS = {"cpu": 100, "cuda": 10_000}
"""... in at most as many products."""


def count_flop(call: Callable[[], Any]) -> int:
    """Operations in the matrix products of a call, a multiply-add being two.

    Examples:
        >>> count_flop(lambda: torch.ones(2, 3) @ torch.ones(3, 5))
        60
    """
    with _Counter() as counter:
        call()
    return counter.flop


class _Counter(TorchDispatchMode):
    """Adds up PyTorch's formulas; ``FlopCounterMode`` fails on TensorDict's modules."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flop += formula(*args, **kwargs, out_val=output)
        return output


def peak_memory(call: Callable[[], Any], device: str) -> int:
    """Bytes of tensors at the peak of a call, above what was there before.

    On a CPU PyTorch's profiler gives the allocations, on CUDA its allocator.

    Examples:
        >>> peak_memory(lambda: torch.ones(10) + torch.ones(10), "cpu")
        120
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    kineto = profile.profiler.kineto_results
    events = [
        (event.start_ns(), event.nbytes())
        for event in kineto.events()
        if event.name() == "[memory]"
    ]
    now, peak = 0, 0
    for _, change in sorted(events, key=lambda event: event[0]):
        now += change
        peak = max(peak, now)
    return peak


def measured(
    name: str,
    call: Callable[[], Any],
    device: str,
    *,
    per: int = 1,
    flop: int | None = None,
    precision: str = "fp32",
    captured: bool = False,
) -> Contender:
    """A contender with its operations and peak memory, after a first call.

    Args:
        name: what the table calls it.
        call: does ``per`` units of work.
        device: where it computes.

    Keyword Args:
        per: units of work in a call. Default: ``1``.
        flop: operations of one unit where they cannot be counted, as in compiled
            code. Default: ``None``, count them.
        precision: type of its matrix products. Default: ``"fp32"``.
        captured: whether its first call captures a CUDA graph, which allocates what
            all later calls use. Default: ``False``.
    """
    if captured:
        memory = _reserved(call)
    else:
        call()
        memory = peak_memory(call, device)
    counted = count_flop(call) // per if flop is None else flop
    return Contender(name, call, per, counted, memory, precision=precision)


def _reserved(call: Callable[[], Any]) -> int:
    """Bytes of CUDA memory that a call leaves reserved."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() - before


def matrix_products(sizes: Sizes, device: str) -> list[Contender]:
    """The update's dominant matrix product, a hidden layer of the latent model.

    ``[B, M] x [M, M]`` with batch size B and width M of the latent model, in each
    precision, repeated to take milliseconds; on CUDA as one graph, so that the rate is
    the device's and not that of launches.

    Returns:
        list[Contender]: one a precision; ``flop / seconds`` is the matrix rate.
    """
    batch, width = sizes.batch_size, sizes.model_hidden_dim
    flop = 2 * batch * width * width
    times = min(max(1, round(GEMM_FLOP[device] / flop)), GEMM_REPEATS[device])
    precisions = ["fp32", "bf16"] + ["tf32"] * (device == "cuda")
    return [
        Contender(
            f"matrix product, {precision}",
            _product(batch, width, device, precision, times),
            times,
            flop,
            kind="matrix product",
            precision=precision,
        )
        for precision in precisions
    ]


def _product(
    batch: int, width: int, device: str, precision: str, times: int
) -> Callable[[], None]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    inputs = torch.randn(batch, width, device=device).to(dtype)
    weight = torch.randn(width, width, device=device).to(dtype)

    @torch.no_grad()
    def call() -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        try:
            for _ in range(times):
                linear(inputs, weight)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    if device == "cpu":
        return call
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def machine(device: str) -> dict[str, Any]:
    """Versions, commit, hardware, instruction set and load of the machine."""
    record = provenance(device)
    record["hardware"]["instructions"] = torch.backends.cpu.get_cpu_capability()
    load = getattr(os, "getloadavg", None)
    record["hardware"]["load_average"] = None if load is None else list(load())
    return record
