"""The sections of ``alm-torchrl diagnose``: measured, written, put into words."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from alm_torchrl.analysis.bias import bias_summary, bound_bias
from alm_torchrl.analysis.figures import (
    QUANTILES,
    estimate_labels,
    plot_bias,
    plot_history,
    plot_reliability,
    plot_rollout,
    plot_terms,
)
from alm_torchrl.analysis.logged import TERMS, read_logged
from alm_torchrl.analysis.recording import record_transitions
from alm_torchrl.analysis.rollouts import latent_rollout
from alm_torchrl.analysis.statistics import latent_statistics
from alm_torchrl.baselines.losses import BaselineLoss
from alm_torchrl.checks import check_integer
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.runs.loading import (
    checkpoint_metadata,
    find_checkpoint,
    load_loss,
    usable_checkpoints,
)

__all__ = ["DiagnoseOptions", "run_diagnose"]

Section = Literal["bias", "history", "rollout", "statistics", "terms"]
SECTIONS: tuple[Section, ...] = ("bias", "rollout", "statistics", "terms")
OF_BASELINES: tuple[Section, ...] = ("bias", "history")

KINDS = {
    "bias": "estimate - return",
    "per_pair": "over max(|return|, 10)",
    "overall": "over |mean return|",
}
STATISTICS = {
    "kl": "KL, latent model to target encoder (nats)",
    "effective_dim": "effective dimension of the latent",
    "latent_deviation": "RMS deviation of the latents' means",
    "latent_noise": "RMS standard deviation of the encoder",
    "classifier_accuracy": "classifier accuracy (0.5 is chance)",
    "calibration_error": "classifier calibration error",
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class DiagnoseOptions:
    """Look into a trained agent: bias of its bound, latent model, latents, losses.

    Raises:
        ValueError: if nothing is asked for or a number is out of range.
    """

    checkpoint: Path
    """A run folder (its newest checkpoint) or one of its checkpoints."""
    output: Path = Path("diagnostics")
    """Folder for the tables (CSV) and pictures (PNG)."""
    which: tuple[Section, ...] = SECTIONS
    """What to look into; history: bias of each checkpoint (baselines: bias only)."""
    pairs: int = 1000
    """State-action pairs for the bias, and transitions for the statistics."""
    steps: int = 50
    """Steps of the latent rollouts."""
    seed: int = 0
    """Seed of the episodes and of the latent samples."""

    def __post_init__(self) -> None:
        """Check what no other part checks."""
        if not self.which:
            raise ValueError(
                f"which: expected some of {', '.join(get_args(Section))}, got none."
            )
        check_integer("pairs", self.pairs, 2)


@dataclass(frozen=True)
class _Agent:
    """An agent and where it comes from."""

    loss: ALMLoss | BaselineLoss
    settings: dict[str, Any]
    step: int

    @classmethod
    def load(cls, checkpoint: Path) -> _Agent:
        loss = load_loss(checkpoint)
        metadata = checkpoint_metadata(checkpoint)
        return cls(loss, metadata["settings"], _training_step(metadata))

    @property
    def title(self) -> str:
        noise = self.settings.get("dynamics_noise", 0.0)
        noisy = f", dynamics noise {noise:g}" if noise else ""
        return f"{self.settings['task']}{noisy}, training step {self.step:,}"

    @property
    def measured(self) -> str:
        """Whose bias is measured: that of the bound of K steps, or of a baseline."""
        if isinstance(self.loss, BaselineLoss):
            return self.loss.agent.upper()
        return f"K = {self.settings['horizon']}"

    def require_alm(self) -> ALMLoss:
        """The loss of an agent of ALM, for what no other has."""
        if isinstance(self.loss, BaselineLoss):
            raise ValueError(
                f"which: expected some of {', '.join(OF_BASELINES)} for a run of "
                f"{self.loss.agent}; the others need an agent of ALM, which has a "
                "latent model"
            )
        return self.loss

    def bias(self, env: EnvBase, options: DiagnoseOptions) -> TensorDictBase:
        return bound_bias(
            env,
            self.loss,
            horizon=self.settings["horizon"],
            pairs=options.pairs,
            seed=options.seed,
        )


def run_diagnose(
    options: DiagnoseOptions, make_env: Callable[[dict[str, Any]], EnvBase], say: Say
) -> list[Path]:
    """Measures what the options ask for, and writes tables and pictures.

    Args:
        options: what to look into.
        make_env: makes the environment of a run from its settings.
        say: receives the tables as text, each once it is measured.

    Returns:
        list[Path]: the files that were written.

    Raises:
        FileNotFoundError: if there is no checkpoint; or if nothing but the terms is
            asked for, and the run logged none.
        ValueError: if something is asked for that only an agent of ALM has, and this
            is another; or if a number is out of range.
        CheckpointError: if the checkpoint is damaged or foreign.
        ImportError: if a package for pictures or logs is missing.
    """
    checkpoint = find_checkpoint(options.checkpoint)
    agent = _Agent.load(checkpoint)
    if not set(options.which) <= set(OF_BASELINES):
        # Before anything is measured.
        agent.require_alm()
    say(f"{agent.title}\n{checkpoint}")
    if "history" in options.which and not (options.checkpoint / "checkpoints").is_dir():
        raise ValueError(
            "which: expected a run folder for the history, which would have a folder "
            f"named checkpoints, got {options.checkpoint}"
        )
    measures = {
        "bias": _bias,
        "history": _history,
        "rollout": _rollout,
        "statistics": _statistics,
    }
    env = make_env(agent.settings)
    written: list[Path] = []
    for section in options.which:
        if section == "terms":
            written += _terms(checkpoint, options, agent, say)
        else:
            written += measures[section](env, agent, options, say)
    env.close()
    say("\nWritten\n" + "\n".join(f"  {path}" for path in written))
    return written


def _bias(
    env: EnvBase, agent: _Agent, options: DiagnoseOptions, say: Say
) -> list[Path]:
    pairs = agent.bias(env, options)
    missing = pairs["missing"]
    lines = [
        f"\nBias: {len(pairs):,} pairs of {int(pairs['episode'].max()) + 1} episodes, "
        f"{agent.measured}",
        *_bias_table(bias_summary(pairs)),
        f"  Mean return {pairs['monte_carlo'].mean():.2f}. Weight of what the time "
        "limit cuts off:",
        f"  mean {missing.mean():.4f}, largest {missing.max():.4f}.",
    ]
    say("\n".join(lines))
    columns = ("episode", "step", "monte_carlo", *estimate_labels(pairs), "missing")
    values = zip(*(pairs[name].tolist() for name in columns), strict=True)
    title = f"{agent.title}, {agent.measured}"
    return [
        _write(options.output / "bias.csv", columns, values),
        _write_summaries(
            options.output / "bias_summary.csv", {agent.step: bias_summary(pairs)}
        ),
        plot_bias(pairs, title, options.output / "bias.png"),
    ]


def _history(
    env: EnvBase, agent: _Agent, options: DiagnoseOptions, say: Say
) -> list[Path]:
    say("\nBias over training: estimate - return, over |mean return|")
    directory = options.checkpoint / "checkpoints"
    kept = list(usable_checkpoints(directory, ("loss_module",)))
    # The newest come first: of those in the warm-up, which are alike, one remains.
    by_step = {_training_step(checkpoint_metadata(path)): path for path in kept}
    summaries = {}
    for step, checkpoint in sorted(by_step.items()):
        summary = bias_summary(_Agent.load(checkpoint).bias(env, options))
        summaries[step] = summary
        labels = estimate_labels(summary)
        cells = (f"{text} {_cell(summary, name)}" for name, text in labels.items())
        say(f"  training step {step:>9,}   " + "   ".join(cells))
    title = f"{agent.settings['task']}, {agent.measured}"
    output = options.output
    return [
        _write_summaries(output / "bias_history.csv", summaries),
        plot_history(summaries, title, output / "bias_history.png"),
    ]


def _rollout(
    env: EnvBase, agent: _Agent, options: DiagnoseOptions, say: Say
) -> list[Path]:
    loss = agent.require_alm()
    rollout = latent_rollout(env, loss, steps=options.steps, seed=options.seed)
    starts, length = rollout.shape
    summary = {
        f"{name}_{quantile}": rollout[name].quantile(share, 0).tolist()
        for name in ("error", "normalised_error")
        for quantile, share in QUANTILES.items()
    }
    say(
        f"\nOpen-loop rollouts of the latent model: {starts} starts along one episode\n"
        "  steps   median RMS error   over the latents' deviation (1: constant guess)"
    )
    for step in sorted({1, 2, 5, 10, 20, length - 1}):
        if step < length:
            error, relative = (
                summary[f"{name}_median"][step]
                for name in ("error", "normalised_error")
            )
            say(f"  {step:>5}   {error:>16.4f}   {relative:.3f}")
    rows = zip(range(length), *summary.values(), strict=True)
    header = ("predicted_steps", *summary)
    return [
        _write(options.output / "rollout.csv", header, rows),
        plot_rollout(rollout, agent.title, options.output / "rollout.png"),
    ]


def _statistics(
    env: EnvBase, agent: _Agent, options: DiagnoseOptions, say: Say
) -> list[Path]:
    loss = agent.require_alm()
    transitions = record_transitions(
        env, loss, transitions=options.pairs, seed=options.seed
    )
    found = latent_statistics(loss, transitions, seed=options.seed)
    values = {name: found[name].item() for name in STATISTICS if name in found}
    of = f" (of {loss.encode(transitions[:1]).mean.shape[-1]})"
    say(f"\nLatents and classifier: {len(transitions):,} transitions")
    for name, value in values.items():
        text = STATISTICS[name] + (of if name == "effective_dim" else "")
        say(f"  {text:48} {value:10.4g}")
    written = [
        _write(options.output / "statistics.csv", ("name", "value"), values.items())
    ]
    if "reliability" not in found:
        say("  The agent has no classifier (classifier_coef 0).")
        return written
    table = found["reliability"]
    columns = ("confidence", "frequency", "count")
    rows = zip(*(table[name].tolist() for name in columns), strict=True)
    picture = options.output / "reliability.png"
    return [
        *written,
        _write(options.output / "reliability.csv", columns, rows),
        plot_reliability(found, agent.title, picture),
    ]


def _terms(
    checkpoint: Path, options: DiagnoseOptions, agent: _Agent, say: Say
) -> list[Path]:
    run = checkpoint.resolve().parents[1]
    try:
        logged = read_logged(run)
    except FileNotFoundError as error:
        if options.which == ("terms",):
            raise
        say(f"\nTerms of the objective: {error}.")
        return []
    warmup = agent.settings["warmup_steps"]
    say(f"\nTerms of the objective, logged in {run}")
    say(f"  {'':36} {'first':>10} {'last':>10}")
    shown = [name for name in TERMS if name in logged]
    for name in shown:
        first, last = logged[name].values[[0, -1]]
        say(f"  {TERMS[name]:36} {first:>10.4g} {last:>10.4g}")
    steps = np.unique(np.concatenate([entry.steps for entry in logged.values()]))
    columns = {
        name: dict(zip(entry.steps.tolist(), entry.values.tolist(), strict=True))
        for name, entry in logged.items()
    }
    rows = (
        (step - warmup, step, *(column.get(step, "") for column in columns.values()))
        for step in steps.tolist()
    )
    header = ("training_step", "environment_step", *columns)
    written = [_write(options.output / "terms.csv", header, rows)]
    if shown:
        title = f"{agent.settings['task']}: terms of the objective"
        picture = options.output / "terms.png"
        written.append(plot_terms(logged, warmup, title, picture))
    return written


def _training_step(metadata: Mapping[str, Any]) -> int:
    """Updates before a checkpoint; the best one of a run counts under another name."""
    frames = metadata.get("environment_step", metadata.get("collected_frames"))
    return max(frames - metadata["settings"]["warmup_steps"], 0)


def _bias_table(summary: TensorDictBase) -> list[str]:
    labels = estimate_labels(summary)
    lines = [f"  {'mean and deviation':24}" + _columns(labels.values())]
    for kind, text in KINDS.items():
        cells = (_cell(summary, name, kind) for name in labels)
        lines.append(f"  {text:24}" + _columns(cells))
    return lines


def _columns(cells: Iterable[str]) -> str:
    return "".join(f"{cell:>20}" for cell in cells)


def _cell(summary: TensorDictBase, name: str, kind: str = "overall") -> str:
    entry = summary[name, kind]
    return f"{entry['mean'].item():.3f} +- {entry['std'].item():.3f}"


def _write_summaries(path: Path, summaries: Mapping[int, TensorDictBase]) -> Path:
    rows = (
        (step, name, kind, *(summary[name, kind, s].item() for s in ("mean", "std")))
        for step, summary in summaries.items()
        for name in estimate_labels(summary)
        for kind in KINDS
    )
    return _write(path, ("training_step", "estimate", "bias", "mean", "std"), rows)


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path
