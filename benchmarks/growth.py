"""How the cost of an update and of a draw grows with their sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from alm_torchrl.training.stepper import ALMOptimizationStepper
from benchmarks.sizes import Sizes
from benchmarks.timing import Clock, Contender, interleave, synchronizer

__all__ = ["AXES", "measure_growth"]

AXES = ("horizon", "batch_size", "latent_dim", "width", "buffer_size")
"""What varies: ``width`` scales all hidden layers, ``buffer_size`` is of the draw."""

HORIZONS = (1, 2, 3, 5, 8)
FACTORS = (0.25, 0.5, 1.0, 2.0)


def measure_growth(
    sizes: Sizes, *, device: str, rounds: int, buffer_sizes: Sequence[int], clock: Clock
) -> list[dict[str, Any]]:
    """Times updates with one size changed at a time, and draws from fuller buffers.

    Updates run in the stepper's default mode on one batch, without its draw. All
    points take turns.

    Args:
        sizes: those from which one is changed: ``horizon`` to each of
            :data:`HORIZONS`, the others by each of :data:`FACTORS`.

    Keyword Args:
        device: where to compute.
        rounds: timed updates of each point; draws are timed ten times as often.
        buffer_sizes: transitions in the buffers that are drawn from.
        clock: gives seconds.

    Returns:
        list of dict: for each point the record of its times, see
        :meth:`~benchmarks.timing.Timing.to_dict`, with its ``axis`` (one of
        :data:`AXES`) and ``value``: of ``width`` the hidden layers' size.
    """
    points: list[tuple[str, int]] = []
    updates: list[Contender] = []
    for axis in AXES[:-1]:
        for value, changed in _changed(sizes, axis):
            points.append((axis, value))
            updates.append(Contender(f"{axis} {value}", _update(changed, device)))
    synchronize = synchronizer(device)
    timings = interleave(updates, rounds=rounds, clock=clock, synchronize=synchronize)
    draws = [
        Contender(f"buffer_size {size}", sizes.make_draw(size, "cpu"))
        for size in buffer_sizes
    ]
    points += [("buffer_size", size) for size in buffer_sizes]
    if draws:
        timings += interleave(draws, rounds=10 * rounds, clock=clock)
    return [
        {"axis": axis, "value": value, **timing.to_dict()}
        for (axis, value), timing in zip(points, timings, strict=True)
    ]


def _changed(sizes: Sizes, axis: str) -> list[tuple[int, Sizes]]:
    """The values of an axis, and the sizes with each of them."""
    if axis == "horizon":
        return [(k, dataclasses.replace(sizes, horizon=k)) for k in HORIZONS]
    fields = ("hidden_dim", "model_hidden_dim") if axis == "width" else (axis,)
    result = []
    for factor in FACTORS:
        values = {f: max(1, round(factor * getattr(sizes, f))) for f in fields}
        result.append((values[fields[0]], dataclasses.replace(sizes, **values)))
    return result


def _update(sizes: Sizes, device: str) -> Callable[[], Any]:
    torch.manual_seed(0)
    stepper = ALMOptimizationStepper(sizes.make_loss(device))
    batch = sizes.make_draw(4 * sizes.horizon, device)()
    return lambda: stepper.step(None, batch)
