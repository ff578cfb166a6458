"""Find a run's checkpoints and load the networks in them to act or evaluate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.envs import EnvBase

from alm_torchrl.layers import NoiseSchedule
from alm_torchrl.objectives import ALMLoss, make_alm_loss

__all__ = ["build_loss", "load_loss", "resolve_checkpoint", "run_settings"]

_LOSS_ARGUMENTS = (
    "latent_dim",
    "hidden_dim",
    "model_hidden_dim",
    "gamma",
    "lmbda",
    "classifier_coef",
    "kl_coef",
    "value_coef",
    "noise_clip",
    "discount_model_loss",
)


def build_loss(settings: Mapping[str, Any], env: EnvBase) -> ALMLoss:
    """Networks and losses for an environment, from the settings of a run.

    Args:
        settings: a mapping with the names of
            :class:`alm_torchrl.config.TrainConfig`; those about networks, losses
            and noise are read.
        env: the environment, for the sizes and the action bounds.

    Returns:
        ALMLoss: freshly initialised.
    """
    schedule = NoiseSchedule(
        settings["noise_initial"], settings["noise_final"], settings["noise_steps"]
    )
    arguments = {name: settings[name] for name in _LOSS_ARGUMENTS}
    return make_alm_loss(env=env, noise_schedule=schedule, **arguments)


def resolve_checkpoint(path: str | Path) -> tuple[Path, Path]:
    """The run folder and the checkpoint that a path stands for.

    Args:
        path: a run folder, which stands for its newest checkpoint, or a checkpoint
            in the ``checkpoints`` of a run folder.

    Returns:
        tuple: the run folder and the checkpoint.

    Raises:
        FileNotFoundError: if the path is missing, is neither of the two, or the run
            has no checkpoint yet.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if (path / "config.json").is_file():
        newest = CheckpointRotation(path / "checkpoints", keep_last=1).latest()
        if newest is None:
            raise FileNotFoundError(f"{path} holds no checkpoint yet")
        return path, newest
    run = path.absolute().parent.parent
    if not Checkpoint.is_checkpoint(path) or not (run / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} is neither a run folder nor a checkpoint inside one"
        )
    return run, path


def run_settings(run: str | Path) -> dict[str, Any]:
    """The ``settings`` of a run folder's ``config.json``."""
    text = (Path(run) / "config.json").read_text(encoding="utf-8")
    settings: dict[str, Any] = json.loads(text)["settings"]
    return settings


def load_loss(path: str | Path, env: EnvBase, *, device: str = "cpu") -> ALMLoss:
    """The networks of a checkpoint, rebuilt from the settings of its run.

    Only the networks are read; replay and optimizers stay on disk.

    Args:
        path: a run folder or a checkpoint in one, see :func:`resolve_checkpoint`.
        env: an environment of the run's task, made with its ``action_bounds``.

    Keyword Args:
        device: where the networks go, ``"cpu"`` by default.

    Returns:
        ALMLoss: with the trained parameters; ``.acting_policy()`` acts.

    Raises:
        FileNotFoundError: see :func:`resolve_checkpoint`.
        torchrl.checkpoint.CheckpointError: if the checkpoint is damaged or was
            made with other networks.
    """
    run, checkpoint = resolve_checkpoint(path)
    loss = build_loss(run_settings(run), env).to(device)
    Checkpoint(loss_module=loss).load(
        checkpoint, components=["loss_module"], map_location=device, strict="error"
    )
    return loss
