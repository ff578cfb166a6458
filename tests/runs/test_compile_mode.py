"""``--compile auto``: when the update is compiled, and that a run keeps its mode."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from alm_torchrl.runs import train as training
from alm_torchrl.runs.folder import harmful_differences
from alm_torchrl.runs.settings import UserError, preset_config
from alm_torchrl.runs.start import Start


def mode(monkeypatch, *, compiler=True, device="cpu", start=None, **settings):
    monkeypatch.setattr(training, "has_compiler", lambda: compiler)
    config = preset_config("quick", **{"compile": "auto", **settings})
    return training._compile_mode(config, device, start or Start())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"total_steps": 2500}, "on"),
        ({"total_steps": 2499}, "off"),
        ({"total_steps": 10_000, "compiler": False}, "off"),
        ({"total_steps": 10_000, "agent": "sac"}, "off"),
        ({"total_steps": 10_000, "device": "cuda"}, "off"),
        ({"total_steps": 10, "compile": "on"}, "on"),
        ({"total_steps": 10_000, "compile": "off"}, "off"),
    ],
)
def test_auto(settings, expected, monkeypatch):
    assert mode(monkeypatch, **settings) == expected


@pytest.mark.parametrize("before", ["on", "off"])
def test_a_run_that_continues_keeps_its_mode(before, monkeypatch):
    monkeypatch.setattr(
        training, "checkpoint_metadata", lambda _: {"settings": {"compile": before}}
    )
    start = Start(Path("checkpoint"), 10)
    for steps in (10, 5000):
        assert mode(monkeypatch, start=start, total_steps=steps) == before
    config = preset_config("quick", compile="auto")
    stored = dataclasses.replace(config, compile=before)
    assert harmful_differences(stored.to_dict(), config) == {}
    other = dataclasses.replace(config, compile={"on": "off", "off": "on"}[before])
    assert list(harmful_differences(stored.to_dict(), other)) == ["compile"]
    assert stored.run_name == other.run_name == config.run_name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"agent": "sac"}, "expected auto or off with sac, got on"),
        ({"compiler": False}, r"needs a C\+\+ compiler .*--compile off runs without"),
    ],
)
def test_on_is_refused_where_nothing_can_be_compiled(settings, message, monkeypatch):
    with pytest.raises(UserError, match=message):
        mode(monkeypatch, compile="on", **settings)
