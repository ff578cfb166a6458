"""``alm-torchrl sweep``: tasks x agents x settings x seeds, from flags or a file."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from alm_torchrl.experiments.catalogue import Variant
from alm_torchrl.experiments.sweep import Sweep
from alm_torchrl.runs.options import SweepOptions
from alm_torchrl.runs.settings import TrainConfig, preset_config

__all__ = ["plan_grid", "sweep_options"]

# Those that a sweep has flags of its own for, or that a run folder's name needs.
_OWN = {"task", "agent", "seed", "preset", "device", "run_dir"}


def plan_grid(options: SweepOptions, name: str = "sweep") -> Sweep:
    """The runs of a sweep, by task, then agent and settings, then seed.

    Args:
        options: what is varied. A setting with one value is the same in all runs.
        name: of the table and the figure. Default: ``"sweep"``.

    Raises:
        ValueError: if a setting is unknown or a value is out of range.

    Examples:
        >>> options = SweepOptions(seeds=2, set=("lr=1e-4,3e-4", "horizon=5"))
        >>> [(line.label, run.lr, run.seed) for line, run in plan_grid(options).runs]
        [('lr=0.0001', 0.0001, 0), ('lr=0.0001', 0.0001, 1),
         ('lr=0.0003', 0.0003, 0), ('lr=0.0003', 0.0003, 1)]
    """
    values = dict(map(_parse, options.set))
    if len(values) < len(options.set):
        raise ValueError(f"--set: expected each setting once, got {options.set}")
    varied = {setting for setting, given in values.items() if len(given) > 1}
    runs = []
    for task in options.tasks or (None,):
        for agent in options.agents:
            for changes in _combinations(values):
                line = {one: changes[one] for one in changes if one in varied}
                variant = _variant(agent, line, several=len(options.agents) > 1)
                given = {"agent": agent, "device": options.device, **changes}
                if task is not None:
                    given["task"] = task
                for seed in range(options.seeds):
                    config = preset_config(options.preset, seed=seed, **given)
                    runs.append((variant, config))
    what = [*(["agents"] if len(options.agents) > 1 else []), *sorted(varied)]
    title = f"{name}: {', '.join(what) or options.agents[0]}"
    changed = {one: given[0] for one, given in values.items() if one not in varied}
    constant = "".join(f", {_text(one, value)}" for one, value in changed.items())
    return Sweep(name, title, f"preset {options.preset}{constant}", runs)


def sweep_options(file: Path) -> dict[str, Any]:
    """The flags of ``alm-torchrl sweep`` that a TOML file gives.

    Its keys are the flags; ``set`` is a table with a value or a list for each setting.

    Raises:
        ValueError: if it is not TOML, or has another key.
    """
    try:
        given = tomllib.loads(file.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file}: expected TOML, got {error}") from error
    names = {field.name for field in fields(SweepOptions)}
    if unknown := sorted(set(given) - names):
        raise ValueError(f"{file}: expected some of {sorted(names)}, got {unknown}")
    if not isinstance(given.get("set", {}), dict):
        raise ValueError(f"{file}: expected a table [set], got {given['set']!r}")
    settings = given.pop("set", {})
    found: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
    }
    for name in {"runs", "output"} & set(found):
        found[name] = Path(found[name])
    if "reference" in found:
        found["reference"] = tuple(map(Path, found["reference"]))
    found["set"] = tuple(
        f"{name}={','.join(map(_word, value if isinstance(value, list) else [value]))}"
        for name, value in settings.items()
    )
    return found


def _combinations(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for chosen in itertools.product(*values.values()):
        yield dict(zip(values, chosen, strict=True))


def _variant(agent: str, changes: Mapping[str, Any], *, several: bool) -> Variant:
    """A line of the figure; its label tells the agent if there are several."""
    words = [_text(name, value) for name, value in changes.items()]
    label = ", ".join([agent, *words] if several or not words else words)
    name = re.sub(r"[^A-Za-z0-9._=-]+", "_", "-".join([agent, *words]))
    return Variant(name, label, dict(changes))


def _text(name: str, value: object) -> str:
    return f"{name}={_word(value)}"


def _word(value: object) -> str:
    """A value as it is written behind ``--set``."""
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def _parse(text: str) -> tuple[str, list[Any]]:
    """A setting and its values."""
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    settings = {field.name for field in fields(TrainConfig)} - _OWN
    if not equals or not values:
        raise ValueError(f"--set: expected NAME=VALUE,VALUE, got {text!r}")
    if name not in settings:
        raise ValueError(f"--set: expected a setting of train, got {name!r}")
    return name, [_value(name, word.strip()) for word in values.split(",")]


def _value(name: str, word: str) -> Any:  # noqa: ANN401
    """A number or truth value as TOML writes it, None, or else a word."""
    if word.lower() == "none" and type(None) in get_args(_HINTS[name]):
        return None
    try:
        return tomllib.loads(f"value = {word.lower()}")["value"]
    except tomllib.TOMLDecodeError:
        return word


_HINTS = get_type_hints(TrainConfig)
