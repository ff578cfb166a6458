"""Environment steps per second of ``make_trainer``'s loop and of a hand-written one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torchrl.record.loggers.csv import CSVLogger

from alm_torchrl.compat import gymnasium_env
from alm_torchrl.envs import make_env
from alm_torchrl.runs.settings import TrainConfig
from alm_torchrl.training.alm_trainer import ALMTrainer
from alm_torchrl.training.trainer import make_trainer
from benchmarks.problem import Problem, load_example
from benchmarks.timing import Clock, quartiles

WARMUP_STEPS = 200
"""Random steps before the first update, at least."""

CALLS = {"collector": ("env", "policy"), "env": ("simulator",)}
"""The parts that call others, outer ones first."""


class Meter:
    """Adds up the time that functions take, by part, while it is active."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.active = False
        self.seconds: dict[str, float] = {}

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed while the meter is active."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if not self.active:
                return function(*args, **kwargs)
            began = self.clock()
            result = function(*args, **kwargs)
            elapsed = self.clock() - began
            self.seconds[part] = self.seconds.get(part, 0) + elapsed
            return result

        return wrapper

    def watch(self, **methods: tuple[object, str]) -> None:
        """Times methods: of each part the owner and the name."""
        for part, (owner, name) in methods.items():
            setattr(owner, name, self.timed(part, getattr(owner, name)))

    def parts(self, elapsed: float, steps: int) -> dict[str, float]:
        """Seconds of a step by part; ``rest`` is what no part took. Starts anew."""
        parts, self.seconds = self.seconds, {}
        for part, called in CALLS.items():
            if part in parts:
                parts[part] -= sum(parts[other] for other in called)
        parts["rest"] = elapsed - sum(parts.values())
        return {part: seconds / steps for part, seconds in parts.items()}


class HandWritten:
    """The training loop of ``examples/alm.py``, some steps at a time."""

    def __init__(self, problem: Problem) -> None:
        self.example = load_example()
        self.log_interval = problem.config.log_interval
        self.agent = problem.make_agent(self.example)
        args = self.agent.args
        self.env = self.example.make_env(args.task)
        sizes = (problem.observation_dim, len(problem.low))
        self.replay = self.example.Replay(args.capacity, *sizes)
        self.state, _ = self.env.reset(seed=args.seed)
        self.updates = 0
        for _ in range(args.warmup_steps):
            self.take(self.env.action_space.sample())

    def take(self, action: Any) -> None:  # noqa: ANN401
        """One environment step."""
        following, reward, terminated, truncated, _ = self.env.step(action)
        done = terminated or truncated
        self.replay.add(self.state, action, reward, following, terminated, done)
        self.state = self.env.reset()[0] if done else following

    def run(self, steps: int) -> None:
        """Environment steps with an update each."""
        args, noise_std = self.agent.args, self.example.noise_std
        for _ in range(steps):
            self.take(self.agent.act(self.state, noise_std(args, self.updates)))
            self.updates += 1
            batch = self.replay.sample(args.batch_size, args.horizon, args.device)
            losses = self.agent.update(*batch, noise_std(args, self.updates))
            if self.updates % self.log_interval == 0:
                self.logged = {name: loss.item() for name, loss in losses.items()}


def compare_loops(
    problem: Problem,
    arguments: Mapping[str, Any],
    *,
    steps: int,
    rounds: int,
    clock: Clock,
) -> dict[str, Any]:
    """Runs both loops by turns in this process.

    Our loop is ``make_trainer``'s, logging included, without evaluations and
    checkpoints. In each round it makes some steps, then the hand-written one does. A
    round before these is not counted, and one after them gives the parts.

    Args:
        problem: task, sizes and device.
        arguments: mode of the update, as arguments of ``make_trainer``.
        steps: environment steps of a loop in a round.
        rounds: number of rounds.
        clock: gives seconds.

    Returns:
        dict: ``ours`` and ``hand_written``, each with the quartiles of seconds per
        step, ``steps_per_second`` and ``parts`` (seconds per step), and ``speed``, our
        steps per second over the other's.
    """
    warmup = max(WARMUP_STEPS, problem.config.batch_size)
    problem = problem.changed(warmup_steps=warmup)
    meter = Meter(clock)
    plain = HandWritten(problem)
    meter.watch(
        simulator=(plain.env.unwrapped, "step"),
        env=(plain.env, "step"),
        policy=(plain.agent, "act"),
        store=(plain.replay, "add"),
        sample=(plain.replay, "sample"),
        update=(plain.agent, "update"),
    )
    seconds: dict[str, list[float]] = {"ours": [], "hand_written": []}
    parts: dict[str, dict[str, float]] = {}
    began = 0.0

    def note(loop: str) -> None:
        elapsed = clock() - began
        seconds[loop].append(elapsed / steps)
        if meter.active:
            parts[loop] = meter.parts(elapsed, steps)

    def turn() -> None:
        nonlocal began
        done = trainer.collected_frames - warmup
        if done < 0 or done % steps:
            return
        if done > 0:
            note("ours")
            began = clock()
            plain.run(steps)
            note("hand_written")
        meter.active = done == (rounds + 1) * steps
        began = clock()

    with TemporaryDirectory() as folder:
        trainer = _trainer(problem, arguments, (rounds + 2) * steps, Path(folder))
        meter.watch(
            simulator=(gymnasium_env(trainer.collector.env.base_env).unwrapped, "step"),
            env=(trainer.collector.env, "step_and_maybe_reset"),
            policy=(trainer.collector.policy, "forward"),
            collector=(trainer.collector, "rollout"),
            store=(trainer.replay_buffer, "add"),
            sample=(trainer.replay_buffer, "sample"),
            update=(trainer.optimization_stepper, "step"),
        )
        trainer.register_op("post_steps", turn)
        trainer.train()
    plain.env.close()
    record: dict[str, Any] = {}
    for loop, times in seconds.items():
        timing = quartiles(times[1:-1])
        rate = 1 / timing["median"]
        record[loop] = {**timing, "steps_per_second": rate, "parts": parts[loop]}
    record["speed"] = record["hand_written"]["median"] / record["ours"]["median"]
    return record


def _trainer(
    problem: Problem, arguments: Mapping[str, Any], total_steps: int, folder: Path
) -> ALMTrainer:
    config: TrainConfig = problem.config
    loss = problem.make_loss()
    return make_trainer(
        make_env(config.task, action_bounds=config.action_bounds),
        loss,
        total_steps=total_steps,
        warmup_steps=config.warmup_steps,
        batch_size=config.batch_size,
        horizon=config.horizon,
        capacity=config.replay_capacity,
        lr=config.lr,
        clip_norm=config.clip_norm,
        tau=config.tau,
        logger=CSVLogger("loop", log_dir=str(folder)),
        log_interval=config.log_interval,
        seed=config.seed,
        **arguments,
    )
