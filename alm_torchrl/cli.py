"""The ``alm-torchrl`` command: one class per command, its flags and what it prints."""

from __future__ import annotations

import difflib
import errno
import io
import logging
import os
import signal
import sys
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from alm_torchrl.checks import check_integer, check_output
from alm_torchrl.runs.options import DiagnoseOptions
from alm_torchrl.runs.settings import (
    PRESETS,
    Preset,
    TrainConfig,
    UserError,
    user_errors,
)

try:
    import tyro

    from alm_torchrl.experiments.commands import (
        Curves,
        Reproduce,
        SweepCommand,
        sweep_defaults,
    )
except ImportError as error:
    raise ImportError(
        "the command line needs tyro: pip install 'alm_torchrl[cli]'"
    ) from error

__all__ = ["COMMANDS", "main"]

Count = Annotated[int, tyro.conf.arg(metavar="N")]
Checkpoint = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")]
Run = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
Trust = tyro.conf.FlagCreatePairsOff[bool]


def _say(text: str) -> None:
    print(text, flush=True)


def _task_hint(default: str) -> str:
    named = default.strip("'\"")
    return f"(default: {named})" if named else "(required with this preset)"


@dataclass(frozen=True)
class Train(TrainConfig):
    """Train an agent; the flags left out have the values of the preset."""

    task: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="[TASK]", help_behavior_hint=_task_hint),
    ]
    """Gymnasium task with flat observations and continuous actions."""
    resume: Path | None = None
    """Run folder or checkpoint to continue; its settings are the defaults then."""
    fresh: bool = False
    """Start anew; a run that is in the folder is moved aside, not deleted."""
    fresh_episode: bool = False
    """Continue with a fresh episode, not the one that was running."""
    trust: Trust = False
    """Import the module that the run to resume names in its task."""

    def run(self) -> int:
        """Trains."""
        from alm_torchrl.runs.train import train

        if not self.task:
            raise UserError(
                f"the preset {self.preset!r} needs a task, for example: "
                f"alm-torchrl train HalfCheetah-v5 --preset {self.preset}"
            )
        if self.resume is not None and ":" in self.task and not self.trust:
            raise UserError(
                f"--resume: expected --trust too, as {self.resume} names the task "
                f"{self.task!r}, which imports and runs a module"
            )
        settings = {
            field.name: getattr(self, field.name) for field in fields(TrainConfig)
        }
        return train(
            TrainConfig(**settings),
            resume=self.resume,
            fresh=self.fresh,
            fresh_episode=self.fresh_episode,
        )


@dataclass(frozen=True)
class Evaluate:
    """Score a trained agent over whole episodes, without action noise."""

    checkpoint: Checkpoint
    """A run folder (its newest checkpoint) or one of its checkpoints."""
    episodes: Count = 20
    """Whole episodes to run."""
    seed: Count = 0
    """Seed of the episodes and of the latent samples."""
    trust: Trust = False
    """Import the module that the run names in its task."""

    def run(self) -> int:
        """Evaluates, and prints the scores."""
        from alm_torchrl.evaluation import evaluate_policy
        from alm_torchrl.runs.agents import build_eval_env
        from alm_torchrl.runs.loading import (
            checkpoint_metadata,
            find_checkpoint,
            load_policy,
            use_moments,
        )

        with user_errors():
            file = find_checkpoint(self.checkpoint)
            config = TrainConfig.from_dict(checkpoint_metadata(file)["settings"])
            env = build_eval_env(config.to_dict(), self.episodes, trust=self.trust)
            use_moments(env, file)
            scores = evaluate_policy(
                env,
                load_policy(file),
                episodes=self.episodes,
                seed=self.seed,
            )
        returns = scores["return"].double()
        std = f"{returns.std().item():.1f}" if self.episodes > 1 else "-"
        print(f"task        {config.task}")
        if config.dynamics_noise:
            print(f"dynamics    noise {config.dynamics_noise:g}")
        print(f"checkpoint  {file}")
        print(f"episodes    {self.episodes}, without action noise, seed {self.seed}")
        print(f"return      mean {returns.mean():.1f}, standard deviation {std},")
        print(f"            min {returns.min():.1f}, max {returns.max():.1f}")
        print(f"length      mean {scores['length'].double().mean():.1f}")
        return 0


@dataclass(frozen=True)
class Diagnose(DiagnoseOptions):
    """Look into a trained agent: bias of its bound, latent model, latents, losses."""

    checkpoint: Checkpoint
    """A run folder (its newest checkpoint) or one of its checkpoints."""
    trust: Trust = False
    """Import the module that the run names in its task."""

    def run(self) -> int:
        """Diagnoses."""
        from alm_torchrl.runs.agents import build_env
        from alm_torchrl.runs.diagnose import run_diagnose

        with user_errors():
            check_output("output", self.output)
            run_diagnose(self, partial(build_env, trust=self.trust), _say)
        return 0


@dataclass(frozen=True)
class Plot:
    """Draw learning curves; runs that differ only in the seed become one."""

    runs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)"),
    ]
    """Run folders."""
    output: Path = Path("learning_curves.png")
    """Picture to write; its ending chooses the format."""
    reference: Curves = ()
    """Published curves to draw too, in the format of the authors' scores/*.csv."""

    def run(self) -> int:
        """Plots."""
        from alm_torchrl.runs.curves import plot_runs, reference_curve
        from alm_torchrl.runs.folder import read_run

        with user_errors():
            if not self.runs:
                raise ValueError("plot needs at least one run folder")
            check_output("output", self.output)
            references = [reference_curve(path) for path in self.reference]
            runs = [read_run(path) for path in self.runs]
            print(plot_runs(runs, self.output, references))
        return 0


@dataclass(frozen=True)
class Render:
    """Film one episode of a trained agent; no display is needed."""

    checkpoint: Run
    """A run folder (its newest checkpoint) or one of its checkpoints."""
    output: Annotated[Path, tyro.conf.arg(metavar="F")] = Path("film.gif")
    """Film to write, .gif or .mp4."""
    seed: Count = 0
    """Seed of the episode and of the latent samples."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Environment steps to show; None shows the whole episode."""
    trust: Trust = False
    """Import the module that the run names in its task."""

    def run(self) -> int:
        """Renders."""
        from alm_torchrl.runs.agents import build_env
        from alm_torchrl.runs.film import check_film_name, film_policy, render_headless
        from alm_torchrl.runs.loading import (
            checkpoint_metadata,
            find_checkpoint,
            load_policy,
            use_moments,
        )

        render_headless()
        with user_errors():
            check_film_name(self.output)
            if self.steps is not None:
                check_integer("steps", self.steps)
            check_output("output", self.output)
            file = find_checkpoint(self.checkpoint)
            settings = checkpoint_metadata(file)["settings"]
            try:
                env = build_env(settings, trust=self.trust, render_mode="rgb_array")
            except ValueError as error:
                raise ValueError(
                    f"{settings['task']} cannot be filmed: {error}"
                ) from error
            use_moments(env, file)
            policy = load_policy(file)
            _say(f"Filming {file}")
            film = film_policy(
                env, policy, self.output, seed=self.seed, max_steps=self.steps
            )
        print(
            f"{film.path}: {film.frames} frames at {film.fps:g} per second, "
            f"{film.steps} steps, return {film.episode_return:.1f}"
        )
        return 0


@dataclass(frozen=True)
class Export:
    """Write a trained policy as one file, to act without this library."""

    checkpoint: Run
    """A run folder (its newest checkpoint) or one of its checkpoints."""
    output: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """New file: .onnx for ONNX (needs the extra export) or .pt2 for torch.export."""
    trust: Trust = False
    """Import the module that the run names in its task."""

    def run(self) -> int:
        """Exports."""
        from alm_torchrl.runs.export import export_policy

        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings(), user_errors():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # PyTorch's
            error = export_policy(self.checkpoint, self.output, trust=self.trust)
        print(f"{self.output}: mean action of the mean latent, within {error:.1g}")
        return 0


@dataclass(frozen=True)
class Verify:
    """Check each file of the checkpoints of a run against its digest."""

    path: Run
    """A run folder (all its checkpoints, also best and those set aside), or one."""

    def run(self) -> int:
        """Verifies; 1 if anything is damaged."""
        from alm_torchrl.runs.loading import all_checkpoints
        from alm_torchrl.training.checkpoint import inspect_checkpoint

        with user_errors():
            damaged = 0
            for checkpoint in all_checkpoints(self.path):
                for file, wrong in inspect_checkpoint(checkpoint):
                    damaged += wrong is not None
                    print(f"{checkpoint / file}: {wrong or 'ok'}")
        print(f"{damaged} damaged" if damaged else "All is well.")
        return int(damaged > 0)


@dataclass(frozen=True)
class Tasks:
    """List the paper's tasks, and say what other tasks can be trained on."""

    def run(self) -> int:
        """Lists them."""
        from alm_torchrl.envs import TASKS

        print(f"{'task':15} {'observation':>11} {'action':>6} {'steps':>5}  note")
        for task in TASKS:
            sizes = f"{task.observation_dim:11} {task.action_dim:6}"
            start = f"{task.id:15} {sizes} {task.max_episode_steps:5}  "
            print(
                textwrap.fill(start + task.note, 80, subsequent_indent=" " * len(start))
            )
        print(
            "\nAny other Gymnasium task with flat observations and continuous actions"
            "\nworks too; 'module:Task-v0' imports the module that registers it first."
        )
        return 0


COMMANDS: dict[str, type] = {
    "train": Train,
    "evaluate": Evaluate,
    "diagnose": Diagnose,
    "plot": Plot,
    "render": Render,
    "export": Export,
    "verify": Verify,
    "tasks": Tasks,
    "reproduce": Reproduce,
    "sweep": SweepCommand,
}
"""The commands by name; each is called with :meth:`run`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the words after ``alm-torchrl``.
            Default: ``None``, those of ``sys.argv``.

    Returns:
        int: 0, 1 if a run failed or a checkpoint is damaged, or 128 and the number
        of the signal that stopped it, such as 130 after Ctrl-C.

    Raises:
        SystemExit: with code 2 after a user's mistake, explained on standard error;
            with 0 after ``--help``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "" not in sys.path:
        sys.path.append("")  # a task's module may be in the working directory
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    format_before = warnings.formatwarning
    warnings.formatwarning = _format_warning
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"alm-torchrl: error: {message}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _drop_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _drop_output()
        print(f"alm-torchrl: error: {error}", file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = format_before
    return code


def _drop_output() -> None:
    """What reads the output takes no more; Python would fail again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: Sequence[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS)
        meant = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise UserError(
            f"expected a command, one of {', '.join(COMMANDS)}, got {name!r}{meant}"
        )
    options: dict[str, Any] = {}
    if name == "train":
        options["default"] = _train_defaults(rest)
    if name == "sweep" and (file := _value_of("--file", rest)):
        options["default"] = sweep_defaults(Path(file))
    command = tyro.cli(
        COMMANDS[name],
        args=rest,
        prog=f"alm-torchrl {name}",
        config=(tyro.conf.OmitArgPrefixes,),
        **options,
    )
    return int(command.run())


def _help() -> str:
    """What the commands are for: the first sentence of each."""
    lines = [
        "usage: alm-torchrl COMMAND [options]",
        "",
        "Aligned Latent Models: train agents, look into them, rerun the paper.",
        "",
    ]
    for name, command in COMMANDS.items():
        text = str(command.__doc__).partition("\n")[0]
        lines.append(
            textwrap.fill(
                text, 80, initial_indent=f"  {name:11}", subsequent_indent=" " * 13
            )
        )
    return "\n".join([*lines, "", "alm-torchrl COMMAND --help explains its options."])


def _format_warning(message: Warning | str, *_: object, **__: object) -> str:
    return f"alm-torchrl: warning: {' '.join(str(message).split())}\n"


def _train_defaults(arguments: Sequence[str]) -> Train:
    """The flags' defaults: those of the run to resume, or else of the preset."""
    resumed = _value_of("--resume", arguments)
    if resumed is not None:
        from alm_torchrl.runs.start import resumed_config

        with user_errors():
            config = resumed_config(Path(resumed))
        if config is not None:
            # Who names the task on the command line trusts its module.
            trust = config.task in arguments
            return Train(**vars(config), trust=trust)
    # tyro refuses an unknown name: it knows the choices.
    given = _value_of("--preset", arguments)
    # One that is unknown is refused when the arguments are read.
    preset: Preset = given if given in PRESETS else "quick"
    return Train(**{"task": "", **PRESETS[preset], "preset": preset})


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The word after the last occurrence of a flag."""
    found: str | None = None
    for index, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == flag:
            found = value if equals else "".join(arguments[index + 1 : index + 2])
    return found


if __name__ == "__main__":
    sys.exit(main())
