"""One update: ours in every mode, and the example's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch._dynamo.exc import TorchDynamoException

from alm_torchrl.training.compiled import CHECKS
from alm_torchrl.training.stepper import ALMOptimizationStepper
from benchmarks.problem import Problem, load_example
from benchmarks.timing import Contender, count_flop, first_call

Mode = Literal[
    "eager",
    "compiled",
    "bf16",
    "bf16-compiled",
    "graph",
    "tf32-graph",
    "bf16-graph",
]

MODES: dict[Mode, dict[str, Any]] = {
    "eager": {},
    "compiled": {"compile": True},
    "bf16": {"precision": "bf16"},
    "bf16-compiled": {"precision": "bf16", "compile": True},
    "graph": {"cudagraph": True},
    "tf32-graph": {"precision": "tf32", "cudagraph": True},
    "bf16-graph": {"precision": "bf16", "cudagraph": True},
}
"""Keyword arguments of the stepper and of ``make_trainer``."""

ROWS = 5000
"""Transitions in each replay."""


def possible(modes: Sequence[Mode], device: str) -> dict[Mode, dict[str, Any]]:
    """The modes that a device has, with their arguments.

    Each says whether it is a CUDA graph, which on CUDA is otherwise the default.
    """
    return {
        mode: {"cudagraph": False, **MODES[mode]}
        for mode in modes
        if device != "cpu" or "cudagraph" not in MODES[mode]
    }


def our_updates(
    problem: Problem, modes: Sequence[Mode]
) -> tuple[list[Contender], dict[str, str]]:
    """Our update in each mode, the draw of its batch included.

    Returns:
        tuple: the contenders, and the reason for each mode that is left out: there is
        no CUDA device, or it cannot be compiled.

    Raises:
        ValueError: if all are left out.
    """
    draw = problem.make_draw(ROWS)
    eager = ALMOptimizationStepper(problem.make_loss(), cudagraph=False)
    # Only eager operations can be counted; the other modes have as many.
    flop = count_flop(lambda: eager.step(None, draw()))
    contenders, left_out = [], {}
    arguments = possible(modes, problem.device)
    for mode in modes:
        name = f"alm, {mode}"
        if mode not in arguments:
            left_out[name] = "needs a CUDA device"
            continue

        def make(mode: Mode = mode) -> Callable[[], Any]:
            stepper = ALMOptimizationStepper(problem.make_loss(), **arguments[mode])
            # A compiled update is compared with the eager one in its first calls.
            for _ in range(CHECKS):
                stepper.step(None, draw())
            return lambda: stepper.step(None, draw())

        try:
            call, memory = first_call(make, problem.device)
        except TorchDynamoException as error:
            left_out[name] = str(error).splitlines()[0]
            continue
        precision = MODES[mode].get("precision", "fp32")
        contenders.append(
            Contender(name, call, precision=precision, flop=flop, memory=memory)
        )
    if not contenders:
        raise ValueError(f"modes: expected at least one that runs, got {left_out}.")
    return contenders, left_out


def example_update(problem: Problem) -> Contender:
    """The update of ``examples/alm.py``, the draw of its batch included."""
    example = load_example()
    config, device = problem.config, problem.device
    replay = example.Replay(ROWS, problem.observation_dim, len(problem.low))
    rows = problem.make_rows(ROWS)
    replay.rows = {
        "observation": rows["observation"],
        "action": rows["action"],
        "reward": rows["next", "reward"].squeeze(-1),
        "next_observation": rows["next", "observation"],
        "terminated": rows["next", "terminated"].squeeze(-1).float(),
        "done": rows["next", "done"].squeeze(-1),
    }
    replay.written = ROWS

    def make() -> Callable[[], Any]:
        agent = problem.make_agent(example)
        sizes = (config.batch_size, config.horizon, device)
        return lambda: agent.update(*replay.sample(*sizes), config.noise_initial)

    call, memory = first_call(make, device)
    return Contender("examples/alm.py", call, flop=count_flop(call), memory=memory)
