"""The sections of the benchmark: what each measures, its record and its table.

A record is made of plain values, ready for JSON. Times are in seconds.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alm_torchrl.checks import check_integer
from alm_torchrl.runs.settings import TrainConfig
from benchmarks.authors import authors_update
from benchmarks.loop import PARTS, compare_loops
from benchmarks.measures import matrix_products
from benchmarks.peers import peer_updates
from benchmarks.sizes import Sizes
from benchmarks.timing import (
    Clock,
    Contender,
    LeftOut,
    Timing,
    interleave,
    synchronizer,
)
from benchmarks.updates import ModeName, modes_of, our_updates

__all__ = [
    "BenchSettings",
    "growth_table",
    "loop_section",
    "loop_table",
    "peers_section",
    "rows_of",
    "rows_table",
    "updates_section",
]

WARMUP = 1
REPLAY_ROWS = 5000
NO_CUDA = "needs a CUDA device"
NO_AUTHORS = "no --authors PATH with a checkout of github.com/RajGhugare19/alm"


@dataclass(frozen=True)
class BenchSettings:
    """How long and where to measure.

    Raises:
        ValueError: if a number is not positive, or no mode is left for the device.
    """

    device: str
    """``"cpu"`` or ``"cuda"``."""
    modes: Sequence[ModeName]
    """How to run our update; the first is what peers are compared with."""
    repeats: int
    """Timed calls of each update."""
    loop_steps: int
    """Environment steps of each measurement of a loop."""
    loop_rounds: int
    """Measurements of each loop."""
    clock: Clock = time.perf_counter
    """Gives seconds."""

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("repeats", "loop_steps", "loop_rounds"):
            check_integer(name, getattr(self, name))
        if not modes_of(self.modes, self.device)[0]:
            raise ValueError(
                f"modes: expected at least one for {self.device}, got {self.modes}."
            )


def updates_section(
    config: TrainConfig, settings: BenchSettings, authors: Path | None
) -> dict[str, Any]:
    """Our update in all modes next to the authors' and to the matrix rate.

    Args:
        config: task and sizes.
        settings: how long and where to measure.
        authors: checkout of the authors' code; without it its row is left out.

    Returns:
        dict: ``task``; ``sizes``; ``rows``, each with the fields of
        :meth:`~benchmarks.timing.Timing.to_dict`, ``kind`` (``"update"``,
        ``"draw"`` or ``"matrix product"``), ``precision``, ``flop`` of one update,
        ``flop_per_second``, ``share_of_matrix_rate`` (in its precision),
        ``memory`` (bytes at the peak) and ``speed`` (the reference's median over its
        own), null where they do not apply; ``reference``, the row that ``speed``
        compares with: the authors' code where it ran, else our first mode; and
        ``left_out``, each with ``name`` and ``reason``.
    """
    sizes = Sizes.of(config)
    modes, needing = modes_of(settings.modes, settings.device)
    contenders, left_out = our_updates(
        sizes, modes, device=settings.device, rows=REPLAY_ROWS
    )
    left_out += [LeftOut(f"alm, {name}", NO_CUDA) for name in needing]
    reference = contenders[0].name
    if authors is None:
        left_out.append(LeftOut("authors' code", NO_AUTHORS))
    else:
        theirs = authors_update(
            authors, sizes, device=settings.device, rows=REPLAY_ROWS
        )
        contenders = contenders + theirs
        reference = theirs[0].name
    contenders = contenders + matrix_products(sizes, settings.device)
    return {
        "task": config.task,
        "sizes": dataclasses.asdict(sizes),
        "reference": reference,
        "rows": _measure(contenders, settings, reference),
        "left_out": [dataclasses.asdict(row) for row in left_out],
    }


def peers_section(config: TrainConfig, settings: BenchSettings) -> dict[str, Any]:
    """Our update (the first mode) next to a step's worth of SAC's, TD3's and REDQ's.

    Returns:
        dict: as :func:`updates_section`; ``speed`` above 1 is faster than ours.
    """
    sizes = Sizes.of(config)
    first = modes_of(settings.modes, settings.device)[0][:1]
    ours, left_out = our_updates(sizes, first, device=settings.device, rows=REPLAY_ROWS)
    peers = peer_updates(sizes, device=settings.device, rows=REPLAY_ROWS)
    return {
        "task": config.task,
        "sizes": dataclasses.asdict(sizes),
        "reference": ours[0].name,
        "rows": _measure([ours[0], *peers], settings, ours[0].name),
        "left_out": [dataclasses.asdict(row) for row in left_out],
    }


def loop_section(config: TrainConfig, settings: BenchSettings) -> dict[str, Any]:
    """Steps per second of our loop in each mode next to a hand-written one.

    Returns:
        dict: ``task``; ``loops``, each as
        :meth:`~benchmarks.loop.LoopComparison.to_dict` says; and ``left_out``.
    """
    from torch._dynamo.exc import TorchDynamoException

    loops: list[dict[str, Any]] = []
    modes, needing = modes_of(settings.modes, settings.device)
    left_out = [LeftOut(f"loop, {name}", NO_CUDA) for name in needing]
    for mode in modes:
        try:
            comparison = compare_loops(
                config,
                device=settings.device,
                mode=mode.name,
                arguments=mode.arguments,
                steps=settings.loop_steps,
                rounds=settings.loop_rounds,
                clock=settings.clock,
            )
        except (TypeError, ValueError) as error:
            if mode is modes[0]:
                raise
            reason = f"the installed make_trainer refuses it: {error}"
            left_out.append(LeftOut(f"loop, {mode.name}", reason))
        except TorchDynamoException as error:
            reason = f"cannot be compiled here: {str(error).splitlines()[0]}"
            if mode is modes[0]:
                raise ValueError(f"loop, {mode.name}: {reason}") from error
            left_out.append(LeftOut(f"loop, {mode.name}", reason))
        else:
            loops.append(comparison.to_dict())
    return {
        "task": config.task,
        "loops": loops,
        "left_out": [dataclasses.asdict(row) for row in left_out],
    }


def _measure(
    contenders: Sequence[Contender], settings: BenchSettings, reference: str
) -> list[dict[str, Any]]:
    timings = interleave(
        contenders,
        rounds=settings.repeats,
        warmup=WARMUP,
        clock=settings.clock,
        synchronize=synchronizer(settings.device),
    )
    return rows_of(contenders, timings, reference)


def rows_of(
    contenders: Sequence[Contender], timings: Sequence[Timing], reference: str
) -> list[dict[str, Any]]:
    """The records of timed contenders, see :func:`updates_section`."""
    rates = {
        contender.precision: contender.flop / timing.median
        for contender, timing in zip(contenders, timings, strict=True)
        if contender.kind == "matrix product" and contender.flop is not None
    }
    compared = next(t.median for t in timings if t.name == reference)
    rows = []
    for contender, timing in zip(contenders, timings, strict=True):
        speed = None if contender.flop is None else contender.flop / timing.median
        rate = rates.get(contender.precision)
        is_update = contender.kind == "update"
        rows.append(
            {
                **timing.to_dict(),
                "kind": contender.kind,
                "precision": contender.precision,
                "flop": contender.flop,
                "flop_per_second": speed,
                "share_of_matrix_rate": (
                    None if speed is None or rate is None else speed / rate
                ),
                "memory": contender.memory,
                "speed": compared / timing.median if is_update else None,
            }
        )
    return rows


def rows_table(section: Mapping[str, Any]) -> str:
    """The rows of a section of updates as text."""
    lines = [
        f"{'':29} {'ms':>8} {'q1':>8} {'q3':>8} {'speed':>6} {'GFLOP':>6} "
        f"{'GFLOP/s':>7} {'share':>5} {'MB peak':>7}"
    ]
    for row in section["rows"]:
        times = " ".join(f"{1e3 * row[name]:8.2f}" for name in ("median", "q1", "q3"))
        lines.append(
            f"{row['name']:29} {times} {_number(row['speed'], 1, 6)} "
            f"{_number(row['flop'], 1e9, 6)} {_number(row['flop_per_second'], 1e9, 7)} "
            f"{_percent(row['share_of_matrix_rate'])} {_number(row['memory'], 1e6, 7)}"
        )
    lines.append(f"speed: how many times as fast as {section['reference']}")
    return "\n".join(lines + _left_out(section))


def loop_table(section: Mapping[str, Any]) -> str:
    """The loops of a section as text: steps per second and where the time goes."""
    lines = []
    for loop in section["loops"]:
        ours, plain = loop["ours"], loop["hand_written"]
        lines += [
            f"{loop['mode']}: {ours['steps_per_second']:.1f} steps/s, hand-written "
            f"{plain['steps_per_second']:.1f}, ratio {loop['speed']:.2f}",
            f"  {'ms per step':12} {'ours':>8} {'share':>6} {'of update':>9} "
            f"{'hand-written':>12}",
        ]
        update = ours["parts"]["update"]
        for part in PARTS:
            value = ours["parts"][part]
            other = plain["parts"].get(part)
            shown = "-" if other is None else f"{1e3 * other:.3f}"
            lines.append(
                f"  {part:12} {1e3 * value:8.3f} {ours['shares'][part]:6.1%} "
                f"{value / update:9.1%} {shown:>12}"
            )
    return "\n".join(lines + _left_out(section))


def growth_table(points: Sequence[Mapping[str, Any]]) -> str:
    """The points of ``measure_growth`` as text."""
    lines = [f"{'':14} {'value':>9} {'ms':>8} {'q1':>8} {'q3':>8}"]
    for point in points:
        times = " ".join(f"{1e3 * point[name]:8.2f}" for name in ("median", "q1", "q3"))
        lines.append(f"{point['axis']:14} {point['value']:9,} {times}")
    return "\n".join(lines)


def _left_out(section: Mapping[str, Any]) -> list[str]:
    return [f"left out: {row['name']}: {row['reason']}" for row in section["left_out"]]


def _number(value: float | None, unit: float, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value / unit:{width}.2f}"


def _percent(value: float | None) -> str:
    return f"{'-':>5}" if value is None else f"{value:5.0%}"
