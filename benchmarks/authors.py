"""The authors' update, run from a checkout of their repository.

Their code (https://github.com/RajGhugare19/alm) imports an old Gym, wandb and a
MuJoCo binding at module level for parts that an update does not use. Stand-ins
take the place of those packages while its modules are imported; nothing of the code
itself is changed or kept here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.problem import Problem
from benchmarks.timing import Contender, count_flop, first_call

OWN_MODULES = ("agents", "agents.alm", "models", "utils")


def check_checkout(path: Path) -> Path:
    """Checks that a folder is a checkout of the authors' repository.

    Raises:
        FileNotFoundError: if it is not.
    """
    for name in ("agents/alm.py", "models.py", "utils/__init__.py"):
        if not (path / name).is_file():
            raise FileNotFoundError(
                "--authors: expected a checkout of github.com/RajGhugare19/alm, got "
                f"{path}, which has no {name}"
            )
    return path


def authors_update(path: Path, problem: Problem, rows: int) -> Contender:
    """Their update, the draws of its batches included.

    Args:
        path: the checkout.
        problem: sizes of networks and batches, and the device.
        rows: transitions in their replay buffer.
    """
    agent_class = _agent_class(path)
    config = problem.config

    def make() -> Callable[[], Any]:
        with contextlib.redirect_stdout(io.StringIO()):
            agent = agent_class(
                device=torch.device(problem.device),
                action_low=problem.low[0].item(),
                action_high=problem.high[0].item(),
                num_states=problem.observation_dim,
                num_actions=len(problem.low),
                env_buffer_size=2 * rows,
                gamma=0.99,
                tau=0.005,
                target_update_interval=1,
                lr=dict.fromkeys(("model", "reward", "critic", "actor"), 1e-4),
                max_grad_norm=100.0,
                batch_size=config.batch_size,
                seq_len=config.horizon,
                lambda_cost=0.1,
                expl_start=1.0,
                expl_end=0.1,
                expl_duration=100_000,
                stddev_clip=0.3,
                latent_dims=config.latent_dim,
                hidden_dims=config.hidden_dim,
                model_hidden_dims=config.model_hidden_dim,
                log_wandb=False,
                log_interval=1000,
            )
        data = problem.make_rows(rows)
        following = data["next"]
        for row in zip(
            data["observation"],
            data["action"],
            following["reward"].squeeze(-1),
            following["observation"],
            following["terminated"].squeeze(-1),
            strict=True,
        ):
            agent.env_buffer.push(tuple(value.numpy() for value in row))
        steps = itertools.count(1)
        return lambda: agent.update(next(steps))

    call, memory = first_call(make, problem.device)
    return Contender("authors' code", call, flop=count_flop(call), memory=memory)


def _agent_class(path: Path) -> Any:  # noqa: ANN401
    with _importing(path), warnings.catch_warnings():
        return importlib.import_module("agents.alm").AlmAgent


@contextlib.contextmanager
def _importing(path: Path) -> Iterator[None]:
    """Their modules and the stand-ins can be imported inside, and nothing stays."""
    stand_ins = _stand_ins()
    hidden = {name: sys.modules.pop(name, None) for name in (*OWN_MODULES, *stand_ins)}
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(path.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(path.resolve()))
        for name in list(sys.modules):
            if name.partition(".")[0] in (*OWN_MODULES, *stand_ins):
                del sys.modules[name]
        sys.modules.update({k: v for k, v in hidden.items() if v is not None})


def _stand_ins() -> dict[str, types.ModuleType]:
    """Empty modules with the names that theirs mention when they are imported."""
    modules = {
        name: types.ModuleType(name)
        for name in ("wandb", "gym", "gym.utils", "gym.envs", "gym.envs.mujoco")
    }
    mujoco_env = types.SimpleNamespace(MujocoEnv=type("MujocoEnv", (), {}))
    vars(modules["gym"]).update(Wrapper=object, utils=modules["gym.utils"])
    vars(modules["gym.utils"]).update(EzPickle=type("EzPickle", (), {}))
    vars(modules["gym.envs.mujoco"]).update(mujoco_env=mujoco_env)
    return modules
