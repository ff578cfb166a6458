"""The ``alm-torchrl`` command: arguments, and errors as one line."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from alm_torchrl.experiments.reproduce import ReproduceOptions
from alm_torchrl.runs.diagnose import DiagnoseOptions
from alm_torchrl.runs.settings import PRESETS, Preset, TrainConfig, UserError

try:
    import tyro
except ImportError as error:
    raise ImportError(
        "the command line needs tyro: pip install 'alm_torchrl[cli]'"
    ) from error

__all__ = ["main"]


Count = Annotated[int, tyro.conf.arg(metavar="N")]
Curves = Annotated[
    tuple[Path, ...],
    tyro.conf.arg(metavar="CSV...", help_behavior_hint="(default: none)"),
]


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

    def run(self) -> int:
        """Train."""
        if not self.task:
            raise UserError(
                f"the preset {self.preset!r} needs a task, for example: "
                f"alm-torchrl train HalfCheetah-v5 --preset {self.preset}"
            )
        config = TrainConfig(
            **{
                field.name: getattr(self, field.name)
                for field in dataclasses.fields(TrainConfig)
            }
        )
        from alm_torchrl.runs import commands

        return commands.train(
            config,
            resume=self.resume,
            fresh=self.fresh,
            fresh_episode=self.fresh_episode,
        )


CheckpointArgument = Annotated[
    tyro.conf.Positional[Path], tyro.conf.arg(metavar="CHECKPOINT")
]


@dataclass(frozen=True)
class Evaluate:
    """Score a trained agent over whole episodes, without action noise."""

    checkpoint: CheckpointArgument
    """A run folder (its newest checkpoint) or one of its checkpoints."""
    episodes: Count = 20
    """Whole episodes to run."""
    seed: Count = 0
    """Seed of the episodes and of the latent samples."""

    def run(self) -> int:
        """Evaluate."""
        from alm_torchrl.runs import commands

        return commands.evaluate(self.checkpoint, self.episodes, self.seed)


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
        """Plot."""
        from alm_torchrl.runs import commands

        return commands.plot(self.runs, self.output, self.reference)


@dataclass(frozen=True)
class Render:
    """Film one episode of a trained agent; no display is needed."""

    checkpoint: CheckpointArgument
    """A run folder (its newest checkpoint) or one of its checkpoints."""
    output: Path = Path("film.gif")
    """Film to write, .gif or .mp4."""
    seed: Count = 0
    """Seed of the episode and of the latent samples."""
    steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Environment steps to show; None shows the whole episode."""

    def run(self) -> int:
        """Render."""
        from alm_torchrl.runs import commands

        return commands.render(self.checkpoint, self.output, self.seed, self.steps)


@dataclass(frozen=True)
class Tasks:
    """List the paper's tasks, and say what other tasks can be trained on."""

    def run(self) -> int:
        """List them."""
        from alm_torchrl.runs import commands

        return commands.tasks()


@dataclass(frozen=True)
class Diagnose(DiagnoseOptions):
    """Look into a trained agent: bias of its bound, latent model, latents, losses."""

    checkpoint: CheckpointArgument
    """A run folder (its newest checkpoint) or one of its checkpoints."""

    def run(self) -> int:
        """Diagnose."""
        from alm_torchrl.runs import commands

        return commands.diagnose(self)


@dataclass(frozen=True)
class Reproduce(ReproduceOptions):
    """Rerun an experiment of the paper: its runs, then its table and figure."""

    name: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="[NAME]", help_behavior_hint="(see --list)"),
    ] = ""
    """Experiment to rerun; runs that are complete are not made again."""
    tasks: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="TASK...", help_behavior_hint="(default: all)"),
    ] = ()
    """Some of the experiment's tasks."""
    reference: Curves = ()
    """Published learning curves (the authors' scores/*.csv) to draw as well."""
    list: bool = False
    """List the experiments, what the paper found, and stop."""

    def run(self) -> int:
        """Reproduce."""
        from alm_torchrl.runs import commands

        if self.list:
            return commands.list_experiments()
        return commands.reproduce(self.name, self)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after ``alm-torchrl``.
            Default: ``None``, those of ``sys.argv``.

    Returns:
        int: 0, or 130 after Ctrl-C.

    Raises:
        SystemExit: with code 2 after a mistake of the user's, explained on the
            standard error stream; with 0 after ``--help``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "" not in sys.path:
        sys.path.append("")  # a task's module may lie in the working directory
    try:
        command = tyro.cli(
            _commands(_train_defaults(arguments)),
            args=arguments,
            prog="alm-torchrl",
            description="Aligned Latent Models: train agents, look into them, rerun "
            "the paper.",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
        return int(command.run())
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"alm-torchrl: error: {message}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130


def _train_defaults(arguments: Sequence[str]) -> Train:
    """The flags' defaults: those of the run to resume, or else of the preset."""
    resumed = _value_of("--resume", arguments)
    settings = None if resumed is None else _run_settings(Path(resumed))
    if settings is not None:
        return Train(**settings)
    # An unknown name is refused by tyro, which knows the choices.
    named = _value_of("--preset", arguments)
    preset: Preset = "paper" if named == "paper" else "quick"
    return Train(**{"task": "", **PRESETS[preset], "preset": preset})


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """What follows the last occurrence of a flag."""
    found: str | None = None
    for index, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == flag:
            found = value if equals else "".join(arguments[index + 1 : index + 2])
    return found


def _run_settings(path: Path) -> dict[str, Any] | None:
    """Settings of a run folder, or of the one a checkpoint is in, if it has any."""
    for run in (path, *path.absolute().parents[1:2]):
        if (run / "config.json").is_file():
            try:
                record = json.loads((run / "config.json").read_text(encoding="utf-8"))
                settings = {**record["settings"], "run_dir": str(run)}
                config = TrainConfig.from_dict(settings)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{run / 'config.json'} does not hold a run's settings: {error}"
                ) from error
            return {
                field.name: getattr(config, field.name)
                for field in dataclasses.fields(config)
            }
    return None


def _commands(train: Train) -> Any:  # noqa: ANN401
    """The union of the commands, as tyro reads it."""
    return (
        Annotated[Train, tyro.conf.subcommand("train", default=train)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Diagnose, tyro.conf.subcommand("diagnose")]
        | Annotated[Plot, tyro.conf.subcommand("plot")]
        | Annotated[Render, tyro.conf.subcommand("render")]
        | Annotated[Tasks, tyro.conf.subcommand("tasks")]
        | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    )
