"""Options of the commands ``diagnose``, ``reproduce`` and ``sweep``.

This module and :mod:`alm_torchrl.runs.settings` import no PyTorch: ``--help`` reads
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from alm_torchrl.checks import check_choice, check_integer, check_number
from alm_torchrl.runs.settings import Agent, Preset

__all__ = [
    "DiagnoseOptions",
    "ExecutionOptions",
    "ReproduceOptions",
    "ScaleName",
    "SweepOptions",
]

Section = Literal["bias", "history", "rollout", "statistics", "terms"]
ScaleName = Literal["smoke", "small", "paper"]


@dataclass(frozen=True)
class DiagnoseOptions:
    """Look into a trained agent: bias of its bound, latent model, latents, losses.

    Raises:
        ValueError: if nothing is asked for or ``pairs`` is below 2.
    """

    checkpoint: Path
    """A run folder (its newest checkpoint) or one of its checkpoints."""
    output: Path = Path("diagnostics")
    """Folder for the tables (CSV) and pictures (PNG)."""
    which: tuple[Section, ...] = ("bias", "rollout", "statistics", "terms")
    """What to look into; history: bias of each checkpoint (baselines: bias only)."""
    pairs: int = 1000
    """State-action pairs for the bias, and transitions for the statistics."""
    steps: int = 50
    """Steps of the latent rollouts."""
    seed: int = 0
    """Seed of the episodes and of the latent samples."""

    def __post_init__(self) -> None:
        """Checks what no other part checks."""
        if not self.which:
            sections = ", ".join(get_args(Section))
            raise ValueError(f"which: expected some of {sections}, got none.")
        check_integer("pairs", self.pairs, 2)


@dataclass(frozen=True)
class ExecutionOptions:
    """How and where the runs of ``reproduce`` and ``sweep`` are made.

    Raises:
        ValueError: if a number is out of range, or an option does not fit the engine.
    """

    engine: Literal["local", "ray", "slurm"] = "local"
    """Where runs are made: in processes here, or as Ray tasks or Slurm jobs."""
    address: str | None = None
    """Address of the Ray cluster; None: RAY_ADDRESS, or one that runs here."""
    jobs: int | None = None
    """Runs at once; None: one for each core, one on a GPU, or what a cluster takes."""
    gpus: float | None = None
    """GPUs of each run on ray (0.5: half of one) or slurm; None: 1 if --device cuda."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of networks and updates; auto takes a GPU where there is one."""
    runs: Path = Path("runs")
    """Folder of the run folders; runs that are complete in it are not made again."""
    output: Path = Path("results")
    """Folder for the learning curves (CSV), the table (CSV) and the figure (PNG)."""
    reference: tuple[Path, ...] = ()
    """Published learning curves (the authors' scores/*.csv) to draw as well."""

    def __post_init__(self) -> None:
        """Checks what no other part checks."""
        if self.jobs is not None:
            check_integer("jobs", self.jobs)
        if self.gpus is not None:
            check_number("gpus", self.gpus)
        if self.address is not None and self.engine != "ray":
            raise ValueError(
                f"address: expected none with --engine {self.engine}, got "
                f"{self.address!r}."
            )
        if self.gpus is not None and self.engine == "local":
            raise ValueError(
                f"gpus: expected none with --engine local, got {self.gpus}."
            )


@dataclass(frozen=True)
class ReproduceOptions(ExecutionOptions):
    """Rerun an experiment of the paper: its runs, then its table and figure."""

    scale: ScaleName = "small"
    """Seconds, minutes per run with reduced networks and steps, or the paper's."""
    seeds: int | None = None
    """Number of seeds; None: 2, 3 and 5 at the three scales."""
    steps: int | None = None
    """Training steps of each run; None: those of the scale."""
    tasks: tuple[str, ...] = ()
    """Some of the tasks; by default all."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the hidden layers of ALM's agents; the baselines keep fp32."""

    def __post_init__(self) -> None:
        """Checks what no other part checks."""
        super().__post_init__()
        for name in ("seeds", "steps"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))


@dataclass(frozen=True)
class SweepOptions(ExecutionOptions):
    """Make runs for each combination of tasks, agents, settings and seeds."""

    tasks: tuple[str, ...] = ()
    """Gymnasium tasks; by default that of the preset."""
    agents: tuple[Agent, ...] = ("alm",)
    """Algorithms."""
    seeds: int = 3
    """Number of seeds."""
    preset: Preset = "quick"
    """Other settings: a run of minutes, the paper's Table 3, or one in development."""
    set: tuple[str, ...] = ()
    """Settings of train with their values, such as lr=1e-4,3e-4."""

    def __post_init__(self) -> None:
        """Checks what no other part checks."""
        super().__post_init__()
        check_integer("seeds", self.seeds)
        check_choice("engine", self.engine, ("local", "ray", "slurm"))
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        if not self.agents:
            raise ValueError("agents: expected at least one, got none.")
