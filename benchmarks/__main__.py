"""Measures speed: ``python -m benchmarks --help``."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch._dynamo.exc import TorchDynamoException
from torchrl import torchrl_logger

from alm_torchrl.checks import check_integer, check_output
from alm_torchrl.runs.settings import Preset, preset_config
from benchmarks.authors import authors_update, check_checkout
from benchmarks.growth import measure_growth, plot_growth
from benchmarks.loop import compare_loops
from benchmarks.peers import peer_updates
from benchmarks.problem import Problem
from benchmarks.timing import (
    compare,
    machine,
    make_clock,
    matrix_products,
)
from benchmarks.updates import (
    MODES,
    ROWS,
    Mode,
    example_update,
    our_updates,
    possible,
)

Section = Literal["updates", "peers", "loop", "growth"]


@dataclass(frozen=True)
class Options:
    """Measure speed: updates next to others' and peers', the loop, growth."""

    task: tuple[str, ...] = ("HalfCheetah-v5",)
    """Tasks whose sizes to measure; growth is that of the first."""
    preset: Preset = "paper"
    """Preset whose sizes to measure."""
    sections: tuple[Section, ...] = ("updates", "peers", "loop", "growth")
    """What to measure."""
    modes: tuple[Mode, ...] = tuple(MODES)
    """Ways to run our update; peers are compared with the first."""
    authors: Path | None = None
    """Checkout of github.com/RajGhugare19/alm, whose update is measured too."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of networks and updates."""
    threads: int = 1
    """CPU threads of PyTorch."""
    clock: Literal["wall", "cpu"] = "wall"
    """Time that passes, or that this process computes (on a shared machine)."""
    repeats: int = 20
    """Rounds in which everything is timed by turns."""
    loop_steps: int = 20
    """Environment steps of a loop in a round."""
    json: Path | None = None
    """File for the record of everything measured."""
    plot: Path | None = None
    """Picture of the growth; its ending chooses the format."""


def run(options: Options) -> dict[str, Any]:
    """Measures all that the options ask for, and prints it.

    Returns:
        dict: ``options``, ``machine``, ``tasks`` (of each the sections) and
        ``growth``, with all times in seconds.

    Raises:
        ValueError: if a number is not positive, a task cannot be used, or none of the
            modes can run on the device.
        FileNotFoundError: if ``authors`` is no checkout of the authors' code.
    """
    clock = make_clock(options.clock, options.device)
    for name in ("repeats", "loop_steps", "threads"):
        check_integer(name, getattr(options, name))
    for name, path in (("json", options.json), ("plot", options.plot)):
        if path is not None:
            check_output(name, path)
    if options.authors is not None:
        check_checkout(options.authors)
    modes = possible(options.modes, options.device)
    if not modes:
        raise ValueError(
            f"modes: expected at least one for {options.device}, got {options.modes}."
        )
    torch.set_num_threads(options.threads)
    record: dict[str, Any] = {
        "options": dataclasses.asdict(options),
        "machine": machine(options.device),
        "tasks": [],
    }
    print(_described(record["machine"]["hardware"], options.clock))
    for task in options.task:
        problem = Problem(preset_config(options.preset, task=task), options.device)
        title = f"\n{task}, {options.preset} sizes:"
        entry: dict[str, Any] = {"task": task}
        record["tasks"].append(entry)
        if "updates" in options.sections:
            contenders, left_out = our_updates(problem, options.modes)
            contenders.append(example_update(problem))
            reference = "examples/alm.py"
            if options.authors is not None:
                contenders.append(authors_update(options.authors, problem, ROWS))
                reference = contenders[-1].name
            contenders += matrix_products(problem)
            rows = compare(contenders, reference, options.repeats, clock)
            entry["updates"] = {"rows": rows, "left_out": left_out}
            print(f"{title} one update\n{rows_table(rows, reference)}")
            _print_left_out(left_out)
        if "peers" in options.sections:
            contenders, _ = our_updates(problem, list(modes)[:1])
            reference = contenders[0].name
            peers, left_out = peer_updates(problem)
            rows = compare(contenders + peers, reference, options.repeats, clock)
            entry["peers"] = {"rows": rows, "left_out": left_out}
            table = rows_table(rows, reference)
            print(f"{title} updates for one environment step\n{table}")
            _print_left_out(left_out)
        if "loop" in options.sections:
            entry["loop"] = {}
            steps, rounds = options.loop_steps, options.repeats
            for mode, arguments in modes.items():
                try:
                    loop = compare_loops(
                        problem, arguments, steps=steps, rounds=rounds, clock=clock
                    )
                except TorchDynamoException as error:
                    print(f"left out: loop, {mode}: {str(error).splitlines()[0]}")
                    continue
                entry["loop"][mode] = loop
                print(f"{title} training loop, {mode}\n{loop_table(loop)}")
        _save(record, options.json)
    if "growth" in options.sections:
        problem = Problem(
            preset_config(options.preset, task=options.task[0]), options.device
        )
        record["growth"] = measure_growth(problem, options.repeats, clock)
        title = f"{options.task[0]}, {options.preset} sizes: growth"
        print(f"\n{title}\n{growth_table(record['growth'])}")
        if options.plot is not None:
            plot_growth(record["growth"], title, options.plot)
    record["machine"]["after"] = machine(options.device)["hardware"]["load_average"]
    _save(record, options.json)
    return record


def rows_table(rows: Sequence[Mapping[str, Any]], reference: str) -> str:
    """Compared contenders as text."""
    lines = [
        f"{'':32} {'ms':>8} {'q1':>8} {'q3':>8} {'speed':>6} {'GFLOP':>7} "
        f"{'GFLOP/s':>8} {'share':>6} {'MB':>6}"
    ]
    for row in rows:
        share = row["share_of_matrix_rate"]
        lines.append(
            f"{row['name']:32} {_milliseconds(row)} {_number(row['speed'], 1, 6)} "
            f"{_number(row['flop'], 1e9, 7)} {_number(row['flop_per_second'], 1e9, 8)} "
            f"{_number(share, 1, 6)} {_number(row['memory'], 1e6, 6)}"
        )
    lines.append(f"speed: how many times as fast as {reference}")
    return "\n".join(lines)


def loop_table(loop: Mapping[str, Any]) -> str:
    """Steps per second of both loops, and where their time goes."""
    ours, plain, outside = loop["ours"], loop["hand_written"], ("update", "simulator")
    lines = [
        f"{ours['steps_per_second']:.1f} steps/s, hand-written "
        f"{plain['steps_per_second']:.1f}, ratio {loop['speed']:.2f}",
        f"{'ms per step':12} {'ours':>8} {'hand-written':>12}",
    ]
    for part, seconds in ours["parts"].items():
        other = _number(plain["parts"].get(part), 1e-3, 12)
        lines.append(f"{part:12} {1e3 * seconds:8.2f} {other}")
    own, other = (
        sum(t for part, t in loop["parts"].items() if part not in outside)
        for loop in (ours, plain)
    )
    lines.append(f"{'overhead':12} {1e3 * own:8.2f} {1e3 * other:12.2f}")
    lines.append("overhead: all but update and simulator")
    return "\n".join(lines)


def growth_table(points: Sequence[Mapping[str, Any]]) -> str:
    """Points of the growth as text."""
    lines = [f"{'':12} {'value':>9} {'ms':>8} {'q1':>8} {'q3':>8}"]
    for point in points:
        lines.append(f"{point['axis']:12} {point['value']:9,} {_milliseconds(point)}")
    return "\n".join(lines)


def _print_left_out(reasons: Mapping[str, str]) -> None:
    for name, reason in reasons.items():
        print(f"left out: {name}: {reason}")


def _milliseconds(row: Mapping[str, Any]) -> str:
    return " ".join(f"{1e3 * row[name]:8.2f}" for name in ("median", "q1", "q3"))


def _number(value: float | None, unit: float, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value / unit:{width}.2f}"


def _described(hardware: Mapping[str, Any], clock: str) -> str:
    device = hardware["gpu"] or f"{hardware['cpu']} ({hardware['instructions']})"
    threads = f"{hardware['threads']} threads on {hardware['cores']} cores"
    return f"{device}, {threads}, {clock} time"


def _save(record: Mapping[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2, default=str) + "\n")


if __name__ == "__main__":
    torchrl_logger.setLevel(logging.WARNING)
    try:
        run(tyro.cli(Options))
    except (ImportError, OSError, ValueError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
