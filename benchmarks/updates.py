"""Our update in every mode this installation has, as contenders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from alm_torchrl.training.stepper import ALMOptimizationStepper
from benchmarks.measures import count_flop, measured
from benchmarks.sizes import Sizes
from benchmarks.timing import Contender, LeftOut

__all__ = ["MODES", "Mode", "ModeName", "modes_of", "our_updates"]


@dataclass(frozen=True)
class Mode:
    """A way of running the update."""

    name: str
    """What tables call it."""
    arguments: dict[str, Any]
    """Keyword arguments of the stepper and of ``make_trainer``."""

    @property
    def precision(self) -> str:
        """Type of the matrix products."""
        return str(self.arguments.get("precision", "fp32"))


ModeName = Literal[
    "eager",
    "compiled",
    "bf16",
    "bf16-compiled",
    "graph",
    "tf32-graph",
    "bf16-graph",
]

MODES: dict[ModeName, dict[str, Any]] = {
    "eager": {},
    "compiled": {"compile": True},
    "bf16": {"precision": "bf16"},
    "bf16-compiled": {"precision": "bf16", "compile": True},
    "graph": {"cudagraph": True},
    "tf32-graph": {"precision": "tf32", "cudagraph": True},
    "bf16-graph": {"precision": "bf16", "cudagraph": True},
}
"""Keyword arguments of the stepper and of ``make_trainer``."""


def modes_of(names: Sequence[ModeName], device: str) -> tuple[list[Mode], list[str]]:
    """The modes that a device has, and the names of those that need CUDA.

    On CUDA, where the stepper chooses a captured graph by itself, all others ask for
    none.

    Examples:
        >>> modes, others = modes_of(["compiled", "graph"], "cpu")
        >>> modes, others
        ([Mode(name='compiled', arguments={'compile': True})], ['graph'])
    """
    if device == "cpu":
        kept = [name for name in names if "cudagraph" not in MODES[name]]
        modes = [Mode(name, MODES[name]) for name in kept]
        return modes, [name for name in names if name not in kept]
    return [Mode(name, {"cudagraph": False, **MODES[name]}) for name in names], []


def our_updates(
    sizes: Sizes, modes: Sequence[Mode], *, device: str, rows: int
) -> tuple[list[Contender], list[LeftOut]]:
    """Our update in each mode, the draw of its batch included, and the draw alone.

    Args:
        sizes: sizes of networks and batches.
        modes: how to run the update.

    Keyword Args:
        device: where to compute; the replay is on the CPU.
        rows: transitions in the replay.

    Returns:
        tuple: the contenders, the draw last, and the modes that the
        installed stepper refuses or that cannot be compiled here.

    Raises:
        ValueError: if the first mode is one of these.
    """
    draw = sizes.make_draw(rows, device)
    flop = _eager_flop(sizes, draw, device)
    contenders: list[Contender] = []
    left_out: list[LeftOut] = []
    for mode in modes:
        name = f"alm, {mode.name}"
        made = _update(sizes, mode, draw, device, flop)
        if isinstance(made, Contender):
            contenders.append(made)
        elif mode is modes[0]:
            raise ValueError(f"{name} cannot be measured: {made}")
        else:
            left_out.append(LeftOut(name, made))
    draws = Contender("alm: draw of the batch", draw, kind="draw")
    return [*contenders, draws], left_out


def _eager_flop(sizes: Sizes, draw: Callable[[], Any], device: str) -> int:
    """Operations of an update in any mode: only eager ones can be counted."""
    (eager,), _ = modes_of(["eager"], device)
    stepper = ALMOptimizationStepper(sizes.make_loss(device), **eager.arguments)
    return count_flop(lambda: stepper.step(None, draw()))


def _update(
    sizes: Sizes,
    mode: Mode,
    draw: Callable[[], Any],
    device: str,
    flop: int,
) -> Contender | str:
    """The contender, or why there is none."""
    from torch._dynamo.exc import TorchDynamoException

    torch.manual_seed(0)
    loss = sizes.make_loss(device)
    try:
        stepper = ALMOptimizationStepper(loss, **mode.arguments)
    except (TypeError, ValueError) as error:
        return f"the installed stepper refuses it: {error}"
    try:
        return measured(
            f"alm, {mode.name}",
            lambda: stepper.step(None, draw()),
            device,
            flop=flop,
            precision=mode.precision,
            captured=stepper.cudagraph,
        )
    except TorchDynamoException as error:
        return f"cannot be compiled here: {str(error).splitlines()[0]}"
