"""Environment steps per second of ``make_trainer``'s loop and of a hand-written one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torchrl.record.loggers import Logger

from alm_torchrl.envs import make_env
from alm_torchrl.runs.settings import TrainConfig
from alm_torchrl.training.trainer import ALMTrainer, make_trainer
from benchmarks.plain import PlainLoop
from benchmarks.sizes import Sizes
from benchmarks.timing import Clock, Timing, synchronizer

__all__ = ["PARTS", "LoopComparison", "Meter", "compare_loops"]

WARMUP_STEPS = 100
"""Random steps before the first update: enough to draw from."""

PARTS = ("env", "policy", "collector", "extend", "sample", "update", "log")
"""Where the time of a step goes.

``env`` is the environment's step, ``policy`` the action, ``collector`` what TorchRL's
collector adds to both, ``extend`` and ``sample`` the replay, ``update`` the stepper;
``log`` is all the rest: logging, hooks and the loop itself.
"""


class Meter:
    """Adds up the time that functions take, by part, while it is active.

    Args:
        clock: gives seconds. Default: ``time.perf_counter``.
        synchronize: waits for the device before each reading. Default: ``None``.

    Examples:
        >>> ticks = iter(range(10))
        >>> meter = Meter(clock=lambda: next(ticks))
        >>> work = meter.timed("work", lambda: None)
        >>> meter.active = True
        >>> work()
        >>> meter.seconds
        {'work': 1}
    """

    def __init__(
        self,
        clock: Clock = time.perf_counter,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self.clock = clock
        self.synchronize = synchronize or (lambda: None)
        self.active = False
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        """Reads the clock once the device is done."""
        self.synchronize()
        return self.clock()

    def add(self, part: str, began: float) -> None:
        """Adds the time since ``began`` to a part."""
        self.seconds[part] = self.seconds.get(part, 0) + self.now() - began

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed while the meter is active."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if not self.active:
                return function(*args, **kwargs)
            began = self.now()
            result = function(*args, **kwargs)
            self.add(part, began)
            return result

        return wrapper


@dataclass(frozen=True)
class LoopComparison:
    """Two loops over the same task and sizes, measured in turn."""

    mode: str
    """How our updates ran."""
    ours: Timing
    """Seconds of an environment step in our loop, by round."""
    plain: Timing
    """The same in the hand-written loop."""
    our_parts: Mapping[str, float]
    """Seconds of a step by part, in the rounds that measured parts."""
    plain_parts: Mapping[str, float]
    """The same in the hand-written loop; it has no collector."""

    @property
    def speed(self) -> float:
        """Our steps per second over those of the hand-written loop, by medians."""
        return self.plain.median / self.ours.median

    def to_dict(self) -> dict[str, Any]:
        """Medians, steps per second, their ratio, and the parts with their shares."""
        loops = {}
        for name, timing, parts in (
            ("ours", self.ours, self.our_parts),
            ("hand_written", self.plain, self.plain_parts),
        ):
            total = sum(parts.values())
            loops[name] = {
                **timing.to_dict(),
                "steps_per_second": 1 / timing.median,
                "parts": dict(parts),
                "shares": {part: value / total for part, value in parts.items()},
            }
        return {"mode": self.mode, "speed": self.speed, **loops}


def compare_loops(
    config: TrainConfig,
    *,
    device: str,
    mode: str,
    arguments: Mapping[str, Any],
    steps: int,
    rounds: int,
    clock: Clock = time.perf_counter,
) -> LoopComparison:
    """Runs both loops by turns in this process.

    Our loop is ``make_trainer``'s, logging included, without evaluations and
    checkpoints. In each round it makes ``steps`` steps, then the hand-written loop
    does; then both do so again with the parts measured. A round before these is not
    counted.

    Args:
        config: task, sizes and schedule.

    Keyword Args:
        device: where to compute.
        mode: how the record calls ``arguments``.
        arguments: further keyword arguments of ``make_trainer``.
        steps: environment steps of each measurement.
        rounds: measurements of each loop.
        clock: gives seconds. Default: ``time.perf_counter``.

    Raises:
        TypeError: if ``make_trainer`` does not know an argument.
        ValueError: if it refuses one.
    """
    warmup = max(WARMUP_STEPS, config.batch_size, config.horizon)
    config = dataclasses.replace(config, warmup_steps=warmup)
    sizes = Sizes.of(config)
    meter = Meter(clock, synchronizer(device))
    total = 4 * steps * (rounds + 1)
    trainer = _trainer(config, sizes, device, arguments, total)
    _meter_trainer(trainer, meter)
    plain = PlainLoop(config, sizes, device)
    _meter_plain(plain, meter)
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    parts: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}

    def note(loop: str, elapsed: float) -> None:
        if meter.active:
            parts[loop].append(_parts(meter.seconds, elapsed, steps))
        else:
            seconds[loop].append(elapsed / steps)
        meter.seconds = {}

    began = 0.0

    def turn() -> None:
        nonlocal began
        done = trainer.collected_frames - config.warmup_steps
        if done < 0 or done % steps:
            return
        if done:
            note("ours", meter.now() - began)
            began = meter.now()
            plain.run(steps)
            note("plain", meter.now() - began)
            meter.active = not meter.active
        if len(parts["ours"]) > rounds:
            trainer.request_stop("measured")
        began = meter.now()

    trainer.register_op("post_steps", turn)
    trainer.train()
    plain.env.close()
    return LoopComparison(
        mode=mode,
        ours=Timing("make_trainer", tuple(seconds["ours"][1:])),
        plain=Timing("hand-written loop", tuple(seconds["plain"][1:])),
        our_parts=_median_parts(parts["ours"][1:]),
        plain_parts=_median_parts(parts["plain"][1:]),
    )


class _KeepLast(Logger):
    """A logger that keeps the last value of each name."""

    def __init__(self) -> None:
        super().__init__(exp_name="bench", log_dir="")
        self.last: dict[str, float] = {}

    def _create_experiment(self) -> None:
        return None

    def log_scalar(self, name: str, value: float, step: int | None = None) -> None:
        self.last[name] = value

    def log_video(self, name: str, video: Any, step: int | None = None) -> None:  # noqa: ANN401
        raise NotImplementedError

    def log_hparams(self, cfg: Any) -> None:  # noqa: ANN401
        raise NotImplementedError

    def log_histogram(self, name: str, data: Any, **kwargs: Any) -> None:  # noqa: ANN401
        raise NotImplementedError

    def __repr__(self) -> str:
        return "KeepLast()"


def _trainer(
    config: TrainConfig,
    sizes: Sizes,
    device: str,
    arguments: Mapping[str, Any],
    total_steps: int,
) -> ALMTrainer:
    torch.manual_seed(config.seed)
    return make_trainer(
        make_env(config.task, action_bounds=config.action_bounds),
        sizes.make_loss(device),
        total_steps=total_steps,
        warmup_steps=config.warmup_steps,
        batch_size=config.batch_size,
        horizon=config.horizon,
        capacity=config.replay_capacity,
        lr=config.lr,
        clip_norm=config.clip_norm,
        tau=config.tau,
        logger=_KeepLast(),
        log_interval=config.log_interval,
        seed=config.seed,
        **arguments,
    )


def _meter_trainer(trainer: ALMTrainer, meter: Meter) -> None:
    collector, buffer = trainer.collector, trainer.replay_buffer
    stepper = trainer.optimization_stepper
    collector.rollout = meter.timed("collector", collector.rollout)
    env = collector.env
    env.step_and_maybe_reset = meter.timed("env", env.step_and_maybe_reset)
    policy = collector.policy
    policy.forward = meter.timed("policy", policy.forward)
    buffer.extend = meter.timed("extend", buffer.extend)
    # The draw, and the batch's way to the device.
    operations = trainer._process_optim_batch_ops
    operations[:] = [(meter.timed("sample", op), kwargs) for op, kwargs in operations]
    stepper.step = meter.timed("update", stepper.step)


def _meter_plain(loop: PlainLoop, meter: Meter) -> None:
    for owner, name, part in (
        (loop.env, "step", "env"),
        (loop.networks, "act", "policy"),
        (loop.replay, "add", "extend"),
        (loop.replay, "sample", "sample"),
        (loop.networks, "update", "update"),
    ):
        setattr(owner, name, meter.timed(part, getattr(owner, name)))


def _parts(
    seconds: Mapping[str, float], elapsed: float, steps: int
) -> dict[str, float]:
    """Seconds of a step by part; what the collector calls is taken out of it."""
    parts = dict(seconds)
    if "collector" in parts:
        parts["collector"] -= parts["env"] + parts["policy"]
    parts["log"] = elapsed - sum(parts.values())
    return {part: parts[part] / steps for part in PARTS if part in parts}


def _median_parts(rounds: list[dict[str, float]]) -> dict[str, float]:
    timings = {part: Timing(part, tuple(r[part] for r in rounds)) for part in rounds[0]}
    return {part: timing.median for part, timing in timings.items()}
