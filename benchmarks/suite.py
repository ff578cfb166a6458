"""The whole benchmark: its options, and its sections one after the other."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from alm_torchrl.checks import check_integer
from alm_torchrl.runs.settings import Preset, TrainConfig, preset_config
from benchmarks.authors import check_checkout
from benchmarks.figure import plot_growth
from benchmarks.growth import measure_growth
from benchmarks.measures import machine
from benchmarks.report import (
    BenchSettings,
    growth_table,
    loop_section,
    loop_table,
    peers_section,
    rows_table,
    updates_section,
)
from benchmarks.sizes import Sizes
from benchmarks.updates import MODES, ModeName

__all__ = ["SECTIONS", "BenchOptions", "run_bench"]

Section = Literal["updates", "peers", "loop", "growth"]
SECTIONS: tuple[Section, ...] = ("updates", "peers", "loop", "growth")
"""What can be measured."""

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

OVERRIDES = ("batch_size", "horizon", "latent_dim", "hidden_dim", "model_hidden_dim")


@dataclass(frozen=True)
class BenchOptions:
    """Measure speed side by side: updates, peers, the training loop, growth.

    Raises:
        ValueError: if a number is out of range.
    """

    task: tuple[str, ...] = ("HalfCheetah-v5",)
    """Tasks whose sizes to measure; growth is that of the first."""
    preset: Preset = "paper"
    """Preset whose sizes to measure."""
    modes: tuple[ModeName, ...] = tuple(MODES)
    """Ways to run our update; peers are compared with the first."""
    sections: tuple[Section, ...] = SECTIONS
    """What to measure."""
    authors: Path | None = None
    """Checkout of github.com/RajGhugare19/alm; None leaves its row out."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of networks and updates; auto takes a GPU where there is one."""
    threads: int | None = None
    """CPU threads of PyTorch; None: the preset's, or else PyTorch's own choice."""
    clock: Literal["wall", "cpu"] = "wall"
    """Time that passes, or that this process computes (a shared machine's CPU)."""

    repeats: int = 20
    """Timed calls of each update."""
    loop_steps: int = 20
    """Environment steps of each measurement of a loop."""
    loop_rounds: int = 10
    """Measurements of each loop."""
    growth_repeats: int = 5
    """Timed calls of each point of the growth."""
    buffer_sizes: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000)
    """Transitions in the replay that is drawn from."""

    batch_size: int | None = None
    """In place of the preset's, like the four below."""
    horizon: int | None = None
    """Steps K of a slice and of the imagined rollouts."""
    latent_dim: int | None = None
    """Size of the latent state."""
    hidden_dim: int | None = None
    """Units per hidden layer of all networks but the latent model."""
    model_hidden_dim: int | None = None
    """Units per hidden layer of the latent model."""

    json: Path | None = None
    """File for the record of everything measured."""
    plot: Path | None = None
    """Picture of the growth; its ending chooses the format."""

    def __post_init__(self) -> None:
        """Check the numbers that no other part checks."""
        if not self.task:
            raise ValueError("task: expected at least one, got none.")
        check_integer("growth_repeats", self.growth_repeats)
        for size in self.buffer_sizes:
            check_integer("buffer_sizes", size)

    def config(self, task: str) -> TrainConfig:
        """The training settings whose speed is measured."""
        given = {name: getattr(self, name) for name in OVERRIDES}
        changes = {name: value for name, value in given.items() if value is not None}
        if self.threads is not None:
            changes["threads"] = self.threads
        return preset_config(self.preset, task=task, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values for JSON."""
        values = dataclasses.asdict(self)
        for name in ("authors", "json", "plot"):
            values[name] = None if values[name] is None else str(values[name])
        return values


def run_bench(
    options: BenchOptions, device: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measures all that the options ask for.

    Args:
        options: what to measure; where ``json`` and ``plot`` are given, those files
            are written, the first after each section.
        device: ``"cpu"`` or ``"cuda"``.
        say: receives the tables as text, each once it is measured.

    Returns:
        dict: ``options``; ``machine`` with ``versions``, ``commit``, ``hardware`` and
        ``load_average_after``; ``tasks``, for each a dictionary with ``task`` and the
        records of :func:`~benchmarks.report.updates_section` under
        ``updates``, of ``peers_section`` under ``peers`` and of ``loop_section``
        under ``loop``; and ``growth`` with ``task``, ``sizes`` and the ``points`` of
        :func:`~benchmarks.growth.measure_growth`. What ``sections`` leaves
        out is not there.

    Raises:
        FileNotFoundError: if ``authors`` is no checkout of the authors' code.
        ValueError: if a task or a number cannot be used.
        ImportError: if a package for the plot is missing.
    """
    if options.clock == "cpu" and device != "cpu":
        raise ValueError(f"clock: expected 'wall' on a {device} device, got 'cpu'.")
    if options.authors is not None:
        check_checkout(options.authors)
    configs = [options.config(task) for task in options.task]
    if configs[0].threads is not None:
        torch.set_num_threads(configs[0].threads)
    settings = BenchSettings(
        device=device,
        modes=options.modes,
        repeats=options.repeats,
        loop_steps=options.loop_steps,
        loop_rounds=options.loop_rounds,
        clock=CLOCKS[options.clock],
    )
    record: dict[str, Any] = {
        "options": options.to_dict(),
        "machine": machine(device),
        "tasks": [{"task": task} for task in options.task],
    }
    described = _describe(record["machine"]["hardware"], options.clock)
    say(described)
    for config, entry in zip(configs, record["tasks"], strict=True):
        _measure_task(config, settings, options, entry, say)
        _save(record, options.json)
    if "growth" in options.sections:
        sizes = Sizes.of(configs[0])
        points = measure_growth(
            sizes,
            device=device,
            rounds=options.growth_repeats,
            buffer_sizes=options.buffer_sizes,
            clock=settings.clock,
        )
        record["growth"] = {
            "task": configs[0].task,
            "sizes": dataclasses.asdict(sizes),
            "points": points,
        }
        say(f"\n{_title(configs[0])}: growth\n{growth_table(points)}")
        if options.plot is not None:
            title = f"{_title(configs[0])}\n{described}"
            say(f"Growth drawn in {plot_growth(points, title, options.plot)}")
    record["machine"]["load_average_after"] = machine(device)["hardware"][
        "load_average"
    ]
    _save(record, options.json)
    return record


def _measure_task(
    config: TrainConfig,
    settings: BenchSettings,
    options: BenchOptions,
    entry: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    title = _title(config)
    if "updates" in options.sections:
        entry["updates"] = updates_section(config, settings, options.authors)
        say(f"\n{title}: one update\n{rows_table(entry['updates'])}")
    if "peers" in options.sections:
        entry["peers"] = peers_section(config, settings)
        say(
            f"\n{title}: updates for one environment step\n{rows_table(entry['peers'])}"
        )
    if "loop" in options.sections:
        entry["loop"] = loop_section(config, settings)
        say(f"\n{title}: training loop\n{loop_table(entry['loop'])}")


def _title(config: TrainConfig) -> str:
    changes = ", ".join(f"{name}={value}" for name, value in config.changes.items())
    return f"{config.task}, {config.preset} sizes" + (changes and f" ({changes})")


def _describe(hardware: dict[str, Any], clock: str) -> str:
    device = hardware["gpu"] or f"{hardware['cpu']} ({hardware['instructions']})"
    threads = f"{hardware['threads']} threads on {hardware['cores']} cores"
    return f"{device}, {threads}, {'CPU' if clock == 'cpu' else 'wall'} time"


def _save(record: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
