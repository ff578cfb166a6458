"""The private names of PyTorch, TorchRL and TensorDict that this library needs.

``tests/test_compat.py`` says which feature breaks when one of them goes.
"""

from __future__ import annotations

import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torchrl.collectors import Collector
from torchrl.data import ReplayBuffer
from torchrl.data.replay_buffers.storages import Storage
from torchrl.envs import EnvBase, GymWrapper, SerialEnv
from torchrl.objectives import LossModule
from torchrl.trainers import Trainer

__all__ = [
    "compile_graph",
    "erase_cache",
    "generator_of",
    "get_carrier",
    "gymnasium_env",
    "keep_last_logs",
    "last_written",
    "mask_keys",
    "serial_workers",
    "set_carrier",
    "set_trajectories",
    "storage_revision",
    "stored_rows",
    "tensors_of",
    "uncount_update",
]


def get_carrier(collector: Collector) -> TensorDictBase:
    """What a collector carries from one step to the next."""
    carrier: TensorDictBase = collector._carrier
    return carrier


def set_carrier(collector: Collector, carrier: TensorDictBase) -> None:
    """Has a collector go on from ``carrier``."""
    collector._carrier = carrier


def set_trajectories(collector: Collector, state: Mapping[str, Any]) -> None:
    """Sets a collector's count of trajectories."""
    collector._traj_pool.load_state_dict(state)


def gymnasium_env(env: GymWrapper) -> Any:  # noqa: ANN401
    """The environment that a ``GymWrapper`` wraps."""
    return env._env


def serial_workers(env: SerialEnv) -> list[EnvBase]:
    """The environments of a ``SerialEnv`` that has been started."""
    workers: list[EnvBase] = env._envs
    return workers


def generator_of(buffer: ReplayBuffer) -> torch.Generator | None:
    """The generator that a replay buffer draws with, if it has one of its own."""
    generator: torch.Generator | None = buffer._rng
    return generator


def stored_rows(storage: Storage) -> Any:  # noqa: ANN401
    """The rows of a tensor storage, its whole capacity; ``None`` before the first."""
    return storage._storage


def storage_revision(storage: Storage) -> int:
    """A number that changes with every write to a storage."""
    revision: int = storage._mutation_revision
    return revision


def last_written(storage: Storage) -> int | None:
    """Where the last row was written to a storage, if that is known."""
    index: int | None = storage._last_cursor_index
    return index


def tensors_of(params: TensorDictParams) -> TensorDictBase:
    """The TensorDict in parameters, which a cast or a functional call replaces."""
    return params._param_td


def erase_cache(loss: LossModule) -> None:
    """Forgets what a loss derived from its parameters."""
    loss._erase_cache()


def mask_keys(loss: LossModule) -> Sequence[NestedKey]:
    """The entries of a batch in which a loss looks for masks."""
    keys: Sequence[NestedKey] = loss._loss_mask_keys()
    return keys


def keep_last_logs(trainer: Trainer) -> None:
    """Has a trainer keep the last logged value of each name only.

    By default it keeps every value, and shares the times of the last log with all
    trainers of the process.
    """
    logs: defaultdict[str, Any] = defaultdict(lambda: deque(maxlen=1))
    trainer._log_dict = logs
    trainer._last_log = {}


def uncount_update(trainer: Trainer) -> None:
    """Takes back one from a trainer's count of updates."""
    trainer._optim_count -= 1


def compile_graph(
    graph: fx.GraphModule, example: Sequence[Tensor]
) -> Callable[..., Any]:
    """Compiles a graph of operations on tensors like those of ``example``.

    It draws the random numbers of eager mode. What is compiled is cached on disk.
    """
    options: dict[str, Any] = {"fallback_random": True}
    if all(tensor.device.type == "cpu" for tensor in example):
        # Calls the kernels from C++. All of them are in one file, which takes a third
        # of the time that a file for each takes to compile.
        options |= {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
    for node in graph.graph.find_nodes(op="placeholder"):
        node.meta.pop("val", None)  # Made while recording; the example counts.
    # Inductor's caches are off outside of such a context.
    shapes = ShapeEnv(assume_static_by_default=True)
    context = TracingContext(FakeTensorMode(shape_env=shapes))
    context.params_flat = []
    with tracing(context), warnings.catch_warnings():
        # PyTorch's own decompositions call it.
        warnings.filterwarnings("ignore", ".*_prims_common.check", FutureWarning)
        return torch._inductor.compile(graph, list(example), options=options)
