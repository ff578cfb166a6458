"""Measures speed: ``python -m benchmarks --help``."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro
from torchrl import torchrl_logger

from alm_torchrl.checks import check_output
from alm_torchrl.runs.settings import UserError
from alm_torchrl.runs.train import find_device, user_errors
from benchmarks.suite import BenchOptions, run_bench
from benchmarks.updates import MODES, ModeName


@dataclass(frozen=True)
class Bench(BenchOptions):
    """Measure speed: updates next to the authors' and peers', the loop, growth."""

    modes: Annotated[tuple[ModeName, ...], tyro.conf.arg(metavar="MODE...")] = tuple(
        MODES
    )
    """Ways to run our update; peers are compared with the first."""


def main() -> None:
    """Measures, prints the tables and writes the files that were asked for."""
    options = tyro.cli(Bench, config=(tyro.conf.OmitArgPrefixes,))
    torchrl_logger.setLevel(logging.WARNING)
    try:
        with user_errors():
            for name, path in (("json", options.json), ("plot", options.plot)):
                if path is not None:
                    check_output(name, path)
            run_bench(
                options,
                find_device(options.device),
                lambda text: print(text, flush=True),
            )
    except UserError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    if options.json is not None:
        print(f"Record in {options.json}")


if __name__ == "__main__":
    main()
