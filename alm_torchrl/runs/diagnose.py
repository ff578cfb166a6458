"""The ``diagnose`` command: measures a trained agent, prints and writes the results."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from alm_torchrl import analysis
from alm_torchrl.analysis import figures
from alm_torchrl.baselines.losses import BaselineLoss
from alm_torchrl.runs.loading import (
    checkpoint_metadata,
    find_checkpoint,
    load_loss,
    usable_checkpoints,
    use_moments,
)
from alm_torchrl.runs.options import DiagnoseOptions
from alm_torchrl.runs.settings import TrainConfig

__all__ = [
    "bias_history",
    "read_logged",
    "run_diagnose",
    "write_columns",
]

MakeEnv = Callable[[dict[str, Any]], EnvBase]
Say = Callable[[str], None]

_OF_BASELINES = ("bias", "history")
_KINDS = {
    "bias": "estimate - return",
    "per_pair": "over max(|return|, 10)",
    "overall": "over |mean return|",
}
_STATISTICS = {
    "kl": "KL, latent model to target encoder (nats)",
    "effective_dim": "effective dimension of the latent",
    "latent_deviation": "RMS deviation of the latents' means",
    "latent_noise": "RMS standard deviation of the encoder",
    "classifier_accuracy": "classifier accuracy (0.5 is chance)",
    "calibration_error": "classifier calibration error",
}


def run_diagnose(options: DiagnoseOptions, make_env: MakeEnv, say: Say) -> list[Path]:
    """Measures what the options ask for, and writes tables and figures.

    Args:
        options: what to look into.
        make_env: makes the environment of a run from its settings.
        say: receives each table as text as soon as it is measured.

    Returns:
        list[Path]: the files written.

    Raises:
        FileNotFoundError: if there is no checkpoint, or only the terms are asked for
            and the run logged none.
        ValueError: if a number is out of range, or the agent is a baseline and lacks
            what is asked for.
        CheckpointError: if the checkpoint is damaged or of another program.
        ImportError: if a package for figures or logs is missing.
    """
    diagnosis = _Diagnosis(options, make_env, say)
    sections = {
        "bias": diagnosis.bias,
        "history": diagnosis.history,
        "rollout": diagnosis.rollout,
        "statistics": diagnosis.statistics,
        "terms": diagnosis.terms,
    }
    for section in options.which:
        sections[section]()
    say("\nWritten\n" + "\n".join(f"  {path}" for path in diagnosis.written))
    diagnosis.env.close()
    return diagnosis.written


class _Diagnosis:
    """An agent, with one method for each section."""

    def __init__(self, options: DiagnoseOptions, make_env: MakeEnv, say: Say) -> None:
        self.options, self.say = options, say
        self.written: list[Path] = []
        self.checkpoint = find_checkpoint(options.checkpoint)
        metadata = checkpoint_metadata(self.checkpoint)
        self.settings, self.step = metadata["settings"], _training_step(metadata)
        # Of ALM or a baseline: the check below leaves a baseline its own sections.
        self.loss: Any = load_loss(self.checkpoint)
        self.estimator = f"K = {self.settings['horizon']}"
        if isinstance(self.loss, BaselineLoss):
            self.estimator = self.loss.agent.upper()
            if not set(options.which) <= set(_OF_BASELINES):
                raise ValueError(
                    f"which: expected some of {', '.join(_OF_BASELINES)} for a run of "
                    f"{self.loss.agent}, which has no latent model"
                )
        kept = options.checkpoint / "checkpoints"
        if "history" in options.which and not kept.is_dir():
            raise ValueError(
                "which: expected a run folder for the history, with a folder named "
                f"checkpoints, got {options.checkpoint}"
            )
        noise = self.settings.get("dynamics_noise", 0.0)
        noisy = f", dynamics noise {noise:g}" if noise else ""
        self.task = self.settings["task"]
        self.title = f"{self.task}{noisy}, training step {self.step:,}"
        say(f"{self.title}\n{self.checkpoint}")
        self.env = make_env(self.settings)
        use_moments(self.env, self.checkpoint)
        self.measured: dict[str, Any] = {
            "env": self.env,
            "horizon": self.settings["horizon"],
            "pairs": options.pairs,
            "seed": options.seed,
        }

    def bias(self) -> None:
        pairs = analysis.bound_bias(loss=self.loss, **self.measured)
        summary, labels = analysis.bias_summary(pairs), figures.estimate_labels(pairs)
        episodes, missing = int(pairs["episode"].max()) + 1, pairs["missing"]
        rows = {"mean and deviation": labels.values()} | {
            text: [_cell(summary, name, kind) for name in labels]
            for kind, text in _KINDS.items()
        }
        self.say(
            f"\nBias: {len(pairs):,} pairs of {episodes} episodes, {self.estimator}"
        )
        for text, cells in rows.items():
            self.say(f"  {text:24}" + "".join(f"{cell:>20}" for cell in cells))
        self.say(
            f"  Mean return {pairs['monte_carlo'].mean():.2f}. "
            "Weight of what the time limit cuts off:\n"
            f"  mean {missing.mean():.4f}, largest {missing.max():.4f}."
        )
        for note in _notes(self.loss):
            self.say(f"  {note}")
        columns = ("episode", "step", "monte_carlo", *labels, "missing")
        self._write("bias.csv", {name: pairs[name].tolist() for name in columns})
        self._write_summaries("bias_summary.csv", {self.step: summary})
        title = f"{self.title}, {self.estimator}"
        self._draw(figures.plot_bias, pairs, title, "bias.png")

    def history(self) -> None:
        self.say("\nBias over training: estimate - return, over |mean return|")
        summaries = {}
        for step, summary in bias_history(self.options.checkpoint, **self.measured):
            summaries[step] = summary
            labels = figures.estimate_labels(summary)
            cells = (f"{text} {_cell(summary, name)}" for name, text in labels.items())
            self.say(f"  training step {step:>9,}   " + "   ".join(cells))
        use_moments(self.env, self.checkpoint)
        self._write_summaries("bias_history.csv", summaries)
        title = f"{self.task}, {self.estimator}"
        self._draw(figures.plot_history, summaries, title, "bias_history.png")

    def rollout(self) -> None:
        steps, seed = self.options.steps, self.options.seed
        found = analysis.latent_rollout(self.env, self.loss, steps=steps, seed=seed)
        starts, length = found.shape
        columns: dict[str, Sequence[Any]] = {"predicted_steps": range(length)} | {
            f"{name}_{quantile}": found[name].quantile(share, 0).tolist()
            for name in ("error", "normalised_error")
            for quantile, share in figures.QUANTILES.items()
        }
        self.say(
            f"\nOpen-loop rollouts of the latent model: {starts} starts along one "
            "episode\n  steps   median RMS error   "
            "over the latents' deviation (1: constant guess)"
        )
        for step in sorted({1, 2, 5, 10, 20, length - 1} & set(range(length))):
            error = columns["error_median"][step]
            normalised = columns["normalised_error_median"][step]
            self.say(f"  {step:>5}   {error:>16.4f}   {normalised:.3f}")
        self._write("rollout.csv", columns)
        self._draw(figures.plot_rollout, found, self.title, "rollout.png")

    def statistics(self) -> None:
        count, seed = self.options.pairs, self.options.seed
        transitions = analysis.record_transitions(
            self.env, self.loss, transitions=count, seed=seed
        )
        found = analysis.latent_statistics(self.loss, transitions, seed=seed)
        values = {name: found[name].item() for name in _STATISTICS if name in found}
        self.say(f"\nLatents and classifier: {count:,} transitions")
        for name, value in values.items():
            of = f" (of {found['latent_dim']})" if name == "effective_dim" else ""
            self.say(f"  {_STATISTICS[name] + of:48} {value:10.4g}")
        columns = {"name": list(values), "value": list(values.values())}
        self._write("statistics.csv", columns)
        if "reliability" in found:
            names, table = ("confidence", "frequency", "count"), found["reliability"]
            self._write("reliability.csv", {n: table[n].tolist() for n in names})
            self._draw(figures.plot_reliability, found, self.title, "reliability.png")
        else:
            self.say("  The agent has no classifier (classifier_coef 0).")

    def terms(self) -> None:
        run = self.checkpoint.resolve().parents[1]
        try:
            logged = read_logged(run)
        except FileNotFoundError as error:
            if self.options.which == ("terms",):
                raise
            self.say(f"\nTerms of the objective: {error}.")
            return
        self.say(f"\nTerms of the objective, logged in {run}")
        self.say(f"  {'':36} {'first':>10} {'last':>10}")
        shown = [name for name in figures.TERMS if name in logged]
        for name in shown:
            first, last = logged[name]["value"][[0, -1]].tolist()
            self.say(f"  {figures.TERMS[name]:36} {first:>10.4g} {last:>10.4g}")
        pace = TrainConfig.from_dict(self.settings).pace
        steps = torch.cat([e["step"] for e in logged.values()]).unique().tolist()
        columns = {
            "training_step": [pace.updates(step) for step in steps],
            "environment_step": steps,
        }
        for name, entry in logged.items():
            at, values = entry["step"].tolist(), entry["value"].tolist()
            by_step = dict(zip(at, values, strict=True))
            columns[name] = [by_step.get(step, "") for step in steps]
            due = [pace.updates(step) for step in entry["step"].tolist()]
            entry["step"] = torch.tensor(due)
        self._write("terms.csv", columns)
        if shown:
            title = f"{self.task}: terms of the objective"
            self._draw(figures.plot_terms, logged, title, "terms.png")

    def _write(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        self.written.append(write_columns(columns, self.options.output / name))

    def _write_summaries(self, name: str, summaries: dict[int, TensorDict]) -> None:
        rows = [
            (step, estimate, kind, entry["mean"].item(), entry["std"].item())
            for step, summary in summaries.items()
            for estimate, kinds in summary.items()
            for kind, entry in kinds.items()
        ]
        names = ("training_step", "estimate", "bias", "mean", "std")
        self._write(name, dict(zip(names, zip(*rows, strict=True), strict=True)))

    def _draw(
        self, plot: Callable[..., Path], shown: object, title: str, name: str
    ) -> None:
        self.written.append(plot(shown, title, self.options.output / name))


def bias_history(
    run: Path, env: EnvBase, *, horizon: int, pairs: int, seed: int
) -> Iterator[tuple[int, TensorDict]]:
    """Measures the bias at each checkpoint that a run kept, the oldest first.

    Args:
        run: the run folder.
        env: as for :func:`~alm_torchrl.analysis.bound_bias`.

    Keyword Args:
        horizon: steps K of ALM's bound.
        pairs: smallest number of pairs.
        seed: seed of the environment and of the latent samples.

    Yields:
        tuple: the training step, and the ``bias_summary``.
    """
    # All checkpoints of the warm-up are alike; the oldest, which comes last, stays.
    by_step = {
        _training_step(checkpoint_metadata(path)): path
        for path in usable_checkpoints(run / "checkpoints", ("loss_module",))
    }
    for step, path in sorted(by_step.items()):
        use_moments(env, path)
        found = analysis.bound_bias(
            env, load_loss(path), horizon=horizon, pairs=pairs, seed=seed
        )
        yield step, analysis.bias_summary(found)


def write_columns(columns: Mapping[str, Sequence[Any]], path: Path) -> Path:
    """Writes columns of one length as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def read_logged(run: Path) -> dict[str, TensorDict]:
    """Reads all that a run logged to TensorBoard; the latest value of a step counts.

    Returns:
        dict: by name, ``[N]`` with ``step`` (int64, environment steps, warm-up
        included) and ``value`` (float64).

    Raises:
        FileNotFoundError: if the run logged nothing.
        ImportError: if tensorboard is missing.
    """
    try:
        from tensorboard.backend.event_processing import event_accumulator
    except ImportError as error:
        raise ImportError(
            "reading logs needs tensorboard: pip install 'alm_torchrl[cli]'"
        ) from error
    folder = run / "tensorboard"
    logged = {}
    if folder.is_dir():
        # Zero keeps all events, not a sample of them.
        events = event_accumulator.EventAccumulator(str(folder), {"scalars": 0})
        events.Reload()
        for name in events.Tags()["scalars"]:
            scalars = events.Scalars(name)
            logged[name] = TensorDict(
                step=torch.tensor([scalar.step for scalar in scalars]),
                value=torch.tensor([scalar.value for scalar in scalars]).double(),
                batch_size=[len(scalars)],
            )
    if not logged:
        raise FileNotFoundError(
            f"{run} logged nothing to TensorBoard: there are no scalars in {folder}. "
            "Train with --logger tensorboard, and for longer than --log-interval"
        )
    return logged


def _training_step(metadata: Mapping[str, Any]) -> int:
    """Updates before a checkpoint; the run's best checkpoint has another entry."""
    frames = metadata.get("environment_step", metadata.get("collected_frames"))
    return TrainConfig.from_dict(metadata["settings"]).pace.updates(frames)


def _notes(loss: Any) -> Iterator[str]:  # noqa: ANN401
    """What is compared, where it is not the sum of rewards and the bound itself."""
    if transform := getattr(loss, "reward_transform", None):
        name = getattr(transform, "__name__", repr(transform))
        yield f"Returns: of rewards after {name}, as the agent learns them."
    logarithms = getattr(loss, "logarithms", None)
    if logarithms is not None and logarithms.where == "bound":
        yield "The bound of logarithms L stands as exp(L) / (1 - gamma) (Theorem 3.1)."


def _cell(summary: TensorDictBase, name: str, kind: str = "overall") -> str:
    entry = summary[name, kind]
    return f"{entry['mean'].item():.3f} +- {entry['std'].item():.3f}"
