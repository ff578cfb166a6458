"""Options of the commands ``diagnose`` and ``reproduce``.

This module and :mod:`alm_torchrl.runs.settings` import no PyTorch: ``--help`` reads
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from alm_torchrl.checks import check_integer

__all__ = ["DiagnoseOptions", "ReproduceOptions", "ScaleName"]

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
class ReproduceOptions:
    """Rerun an experiment of the paper: its runs, then its table and figure.

    Raises:
        ValueError: if a number is out of range.
    """

    scale: ScaleName = "small"
    """Seconds, minutes per run with reduced networks and steps, or the paper's."""
    seeds: int | None = None
    """Number of seeds; None: 2, 3 and 5 at the three scales."""
    steps: int | None = None
    """Training steps of each run; None: those of the scale."""
    tasks: tuple[str, ...] = ()
    """Some of the tasks; by default all."""
    jobs: int | None = None
    """Runs at once; None: as many as there are cores, one on a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of networks and updates; auto takes a GPU where there is one."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """Precision of the hidden layers of ALM's agents; the baselines keep fp32."""
    runs: Path = Path("runs")
    """Folder of the run folders; runs that are complete in it are not made again."""
    output: Path = Path("results")
    """Folder for the learning curves (CSV), the table (CSV) and the figure (PNG)."""
    reference: tuple[Path, ...] = ()
    """Published learning curves (the authors' scores/*.csv) to draw as well."""

    def __post_init__(self) -> None:
        """Checks what no other part checks."""
        for name in ("seeds", "steps", "jobs"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name))
