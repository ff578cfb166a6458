"""Times contenders by turns, and compares them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

from alm_torchrl.runs.folder import provenance
from benchmarks.problem import Problem

Clock = Callable[[], float]

ROUND_SECONDS = 0.2
"""Time for which each contender is called in each round, at least once."""


@dataclass(frozen=True)
class Contender:
    """Something to time."""

    name: str
    """What the table calls it."""
    call: Callable[[], Any]
    """Does the work once."""
    per: int = 1
    """Units of work in one call; times are for one unit."""
    kind: Literal["update", "matrix product"] = "update"
    """Updates are compared with each other, matrix products give the possible rate."""
    precision: str = "fp32"
    """Type of the matrix products: ``"fp32"``, ``"tf32"`` or ``"bf16"``."""
    flop: int | None = None
    """Operations of one unit in matrix products, where they were counted."""
    memory: int | None = None
    """Bytes that it keeps of the GPU, parameters included."""


def make_clock(kind: str, device: str) -> Clock:
    """The clock to read: ``"wall"``, which waits for the device, or ``"cpu"``.

    Raises:
        ValueError: if processor time is asked for on another device.
    """
    if kind == "cpu" and device != "cpu":
        raise ValueError(f"clock: expected 'wall' on a {device} device, got 'cpu'.")
    if kind == "cpu":
        return time.process_time
    if device == "cpu":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return clock


def quartiles(seconds: Sequence[float]) -> dict[str, Any]:
    """``median``, quartiles ``q1`` and ``q3``, and number of ``rounds``."""
    q1, median, q3 = (float(x) for x in np.percentile(seconds, (25, 50, 75)))
    return {"median": median, "q1": q1, "q3": q3, "rounds": len(seconds)}


def interleave(
    contenders: Sequence[Contender], rounds: int, clock: Clock
) -> list[dict[str, Any]]:
    """Times contenders in turn, so that all meet the same disturbances.

    In each round ``torch.utils.benchmark`` times each of them once. The next round
    begins with the next contender, so that none always follows the same one.

    Returns:
        list of dict: for each contender the :func:`quartiles` of its rounds, in
        seconds.
    """
    timers = [
        Timer(
            "call()",
            globals={"call": contender.call},
            timer=clock,
            num_threads=torch.get_num_threads(),
        )
        for contender in contenders
    ]
    seconds: list[list[float]] = [[] for _ in contenders]
    for turn in range(rounds):
        for place in range(len(contenders)):
            index = (turn + place) % len(contenders)
            measured = timers[index].blocked_autorange(min_run_time=ROUND_SECONDS)
            seconds[index].append(measured.median / contenders[index].per)
    return [quartiles(times) for times in seconds]


def compare(
    contenders: Sequence[Contender], reference: str, rounds: int, clock: Clock
) -> list[dict[str, Any]]:
    """Times contenders and compares the updates among them.

    Returns:
        list of dict: for each contender its :func:`quartiles`, ``name``, ``kind``,
        ``precision``, ``flop``, ``flop_per_second``, ``share_of_matrix_rate`` (of the
        matrix product in its precision), ``memory`` and ``speed`` (how many times as
        fast as the reference it is), None where they do not apply.
    """
    timings = interleave(contenders, rounds, clock)
    rates, medians = {}, {}
    for contender, timing in zip(contenders, timings, strict=True):
        medians[contender.name] = timing["median"]
        if contender.kind == "matrix product" and contender.flop is not None:
            rates[contender.precision] = contender.flop / timing["median"]
    rows = []
    for contender, timing in zip(contenders, timings, strict=True):
        flop, rate = contender.flop, rates.get(contender.precision)
        per_second = None if flop is None else flop / timing["median"]
        share = None if per_second is None or rate is None else per_second / rate
        compared = contender.kind == "update"
        rows.append(
            {
                "name": contender.name,
                "kind": contender.kind,
                "precision": contender.precision,
                **timing,
                "speed": medians[reference] / timing["median"] if compared else None,
                "flop": flop,
                "flop_per_second": per_second,
                "share_of_matrix_rate": share,
                "memory": contender.memory,
            }
        )
    return rows


class _FlopCounter(TorchDispatchMode):
    """Adds up PyTorch's formulas; ``FlopCounterMode`` fails on TensorDict's modules."""

    flop = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flop += formula(*args, **kwargs, out_val=output)
        return output


def count_flop(call: Callable[[], Any]) -> int:
    """Operations in the matrix products of an eager call, a multiply-add being two."""
    with _FlopCounter() as counter:
        call()
    return counter.flop


def first_call(make: Callable[[], Callable[[], Any]], device: str) -> tuple[Any, Any]:
    """Makes a contender's call and does it once.

    Returns:
        tuple: the call, and the bytes that PyTorch keeps of the GPU for it (None on a
        CPU).
    """
    if device == "cpu":
        call = make()
        call()
        return call, None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    call = make()
    call()
    torch.cuda.synchronize()
    return call, torch.cuda.memory_reserved() - before


def matrix_products(problem: Problem) -> list[Contender]:
    """The update's dominant matrix product, a hidden layer of the latent model.

    ``[B, M] x [M, M]`` with batch size B and width M of the latent model, in each
    precision. On CUDA a graph of 100, so that launches do not count.
    """
    batch, width = problem.config.batch_size, problem.config.model_hidden_dim
    cuda = problem.device != "cpu"
    return [
        Contender(
            f"matrix product, {precision}",
            _product(batch, width, problem.device, precision),
            per=100 if cuda else 1,
            kind="matrix product",
            precision=precision,
            flop=2 * batch * width * width,
        )
        for precision in ("fp32", "bf16", *(["tf32"] if cuda else []))
    ]


def _product(
    batch: int, width: int, device: str, precision: str
) -> Callable[[], object]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    inputs = torch.randn(batch, width, device=device, dtype=dtype)
    weight = torch.randn(width, width, device=device, dtype=dtype)
    if device == "cpu":
        return lambda: linear(inputs, weight)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    linear(inputs, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(100):
            linear(inputs, weight)
    torch.set_float32_matmul_precision(before)
    # The graph reads their memory, so they have to stay.
    return lambda: (graph.replay(), inputs, weight)


def machine(device: str) -> dict[str, Any]:
    """Versions, commit, hardware, instruction set and load of the machine."""
    record = provenance(device)
    record["hardware"]["instructions"] = torch.backends.cpu.get_cpu_capability()
    record["hardware"]["load_average"] = list(os.getloadavg())
    return record
