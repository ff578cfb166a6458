"""Find a run's checkpoints and load the networks in them to act or evaluate."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.checkpoint import CheckpointError
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from alm_torchrl.baselines.losses import BaselineLoss
from alm_torchrl.envs import Normalizers
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.runs.agents import build_loss
from alm_torchrl.training.checkpoint import VerifiedCheckpoint, read_manifest
from alm_torchrl.training.rotation import numbered_checkpoints

__all__ = [
    "ActingPolicy",
    "all_checkpoints",
    "checkpoint_metadata",
    "find_checkpoint",
    "load_loss",
    "load_policy",
    "usable_checkpoints",
    "use_moments",
]


def usable_checkpoints(
    directory: Path, components: Collection[str] | None = None
) -> Iterator[Path]:
    """The checkpoints in a directory that are not damaged, the newest first.

    Args:
        directory: the ``checkpoints`` of a run.
        components: those that will be loaded, whose files are checked.
            Default: ``None``, all.

    Warns:
        UserWarning: for each damaged checkpoint that is skipped.

    Yields:
        Path: each of them, checked when it is asked for.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for number in (2, 10):
        ...         saved = VerifiedCheckpoint(net=torch.nn.Linear(2, 1))
        ...         _ = saved.save(f"{folder}/checkpoint-{number}")
        ...     [path.name for path in usable_checkpoints(Path(folder))]
        ['checkpoint-10', 'checkpoint-2']
    """
    for _, path in reversed(numbered_checkpoints(directory)):
        try:
            VerifiedCheckpoint().verify(path, components=components)
        except CheckpointError as error:
            warnings.warn(
                f"{error}. The checkpoint before it is used, if there is one.",
                UserWarning,
                stacklevel=3,
            )
        else:
            yield path


def all_checkpoints(path: Path) -> list[Path]:
    """All checkpoints that a path stands for, ``best`` and those set aside included.

    Args:
        path: a run folder, or a checkpoint, which stands for itself.

    Raises:
        FileNotFoundError: if it is neither, or the run has no checkpoint.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     for name in ("best", "checkpoint-2"):
        ...         saved = VerifiedCheckpoint(net=torch.nn.Linear(2, 1))
        ...         _ = saved.save(f"{run}/checkpoints/{name}")
        ...     [path.name for path in all_checkpoints(Path(run))]
        ['checkpoint-2', 'best']
    """
    if (path / "manifest.json").is_file():
        return [path]
    directory = path / "checkpoints"
    found = []
    for folder in (*sorted(directory.glob("set-aside-*")), directory):
        found += [checkpoint for _, checkpoint in numbered_checkpoints(folder)]
        if (folder / "best").is_dir():
            found.append(folder / "best")
    if not found:
        raise FileNotFoundError(
            f"{path} is neither a checkpoint nor a run folder with checkpoints"
        )
    return found


def find_checkpoint(
    path: str | Path, components: Collection[str] | None = ("loss_module",)
) -> Path:
    """The checkpoint that a path stands for.

    Args:
        path: a checkpoint, or a run folder, which stands for its newest checkpoint
            that is not damaged.
        components: those that will be loaded.
            Default: ``("loss_module",)``, the networks.

    Returns:
        Path: the checkpoint.

    Raises:
        FileNotFoundError: if the path is missing, is neither of the two, or the run
            has no usable checkpoint.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     saved = VerifiedCheckpoint(loss_module=torch.nn.Linear(2, 1))
        ...     _ = saved.save(f"{run}/checkpoints/checkpoint-2")
        ...     find_checkpoint(run).name
        'checkpoint-2'
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if (path / "manifest.json").is_file():
        return path
    directory = path / "checkpoints"
    if not (path / "config.json").is_file() and not directory.is_dir():
        raise FileNotFoundError(
            f"{path} is neither a checkpoint nor a run folder, which has a config.json "
            "and a folder named checkpoints"
        )
    newest = next(usable_checkpoints(directory, components), None)
    if newest is None:
        best = directory / "best"
        hint = f" (but {best}, to act with)" if best.is_dir() else ""
        raise FileNotFoundError(f"{path} has no usable checkpoint yet{hint}")
    return newest


def checkpoint_metadata(path: Path) -> dict[str, Any]:
    """What a training run wrote beside its state: settings, spaces, progress.

    Args:
        path: a checkpoint.

    Returns:
        dict: ``settings`` (fields of ``TrainConfig``), ``spaces`` (see
        :func:`~alm_torchrl.runs.agents.describe_spaces`), ``wall_time`` in seconds,
        and ``collected_frames``, environment steps with the warm-up.

    Raises:
        CheckpointError: if the checkpoint is damaged or has no settings, because
            ``alm-torchrl train`` did not write it.

    Example:
        >>> import tempfile
        >>> metadata = {"settings": {"task": "Hopper-v5"}, "spaces": {}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = VerifiedCheckpoint(net=torch.nn.Linear(2, 1))
        ...     path = saved.save(f"{folder}/saved", metadata=metadata)
        ...     checkpoint_metadata(path)["settings"]
        {'task': 'Hopper-v5'}
    """
    metadata: dict[str, Any] = read_manifest(path)["metadata"]
    if "settings" not in metadata or "spaces" not in metadata:
        raise CheckpointError(
            f"{path} does not say how its networks are built. Build the loss as for "
            "the training and use VerifiedCheckpoint(loss_module=loss).load(path)"
        )
    return metadata


class ActingPolicy(TensorDictModuleBase):
    """A policy that acts in one way, whatever exploration type surrounds it.

    Args:
        policy: reads observations and writes actions.

    Keyword Args:
        deterministic: take the mode of the policy's action, or else draw it.
        bounds: smallest and largest action, ``[action_dim]`` each, to clamp to: the
            mean of ALM's actor is not clamped. Default: ``None``, as they come.
        action_key: entry of the action, which may be nested. Default: ``"action"``.

    Example:
        >>> from tensordict import TensorDict
        >>> from alm_torchrl import make_alm_loss
        >>> loss = make_alm_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> policy = ActingPolicy(loss.acting_policy(), deterministic=True)
        >>> policy(TensorDict(observation=torch.zeros(3)))["action"].shape
        torch.Size([1])
    """

    def __init__(
        self,
        policy: TensorDictModuleBase,
        *,
        deterministic: bool,
        bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
        action_key: NestedKey = "action",
    ) -> None:
        super().__init__()
        self.policy = policy
        self.deterministic = deterministic
        self.bounds = bounds
        self.action_key = action_key
        self.in_keys = policy.in_keys
        self.out_keys = policy.out_keys

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the action."""
        types = (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC)
        with set_exploration_type(types[self.deterministic]):
            acted = self.policy(tensordict)
        if self.bounds is not None:
            action = acted.get(self.action_key)
            low, high = (bound.to(action) for bound in self.bounds)
            acted.set(self.action_key, action.clamp(low, high))
        return acted


def load_policy(
    path: str | Path,
    *,
    deterministic: bool = True,
    device: torch.device | str = "cpu",
) -> ActingPolicy:
    """A trained policy, ready to act.

    Reads the networks only: no replay, no optimizers, and no environment is made.
    Actions are in the bounds of the training environment: for a run with
    ``action_bounds="rescale"``, act in ``make_env(task, action_bounds="rescale")`` or
    wrap the Gymnasium task in ``gymnasium.wrappers.RescaleAction(env, -1.0, 1.0)``.

    Args:
        path: a run folder, which stands for its newest checkpoint, or a checkpoint;
            ``RUN/checkpoints/best`` scored best in the run's evaluations.

    Keyword Args:
        deterministic: take the actor's mean, or else add the exploration noise of
            the checkpoint (SAC and REDQ: or draw from it). ALM samples the latent
            state in both. Default: ``True``.
        device: where the networks go. Default: ``"cpu"``.

    Returns:
        ActingPolicy: a TensorDictModule that reads ``"observation"``
        ``[*, observation_dim]`` (float32) and writes ``"action"`` ``[*, action_dim]``.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if it is damaged or foreign.

    Examples:
        In a Gymnasium loop::

            policy = load_policy("runs/HalfCheetah-v5-alm-quick-s0")
            observation, _ = env.reset()
            observed = torch.as_tensor(observation, dtype=torch.float32)
            action = policy(TensorDict(observation=observed))["action"].numpy()
            observation, reward, terminated, truncated, _ = env.step(action)

        In a TorchRL environment: ``make_env(task).rollout(1000, policy)``. From a
        checkpoint with the settings and spaces of a run:

        >>> import tempfile
        >>> from tensordict import TensorDict
        >>> settings = {"task": "Pendulum-v1", "hidden_dim": 8}
        >>> spaces = {"observation_dim": 3, "action_low": [-1.0], "action_high": [1.0]}
        >>> metadata = {"settings": settings, "spaces": spaces}
        >>> saved = VerifiedCheckpoint(loss_module=build_loss(settings, spaces))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     policy = load_policy(saved.save(f"{folder}/one", metadata=metadata))
        >>> policy(TensorDict(observation=torch.zeros(3)))["action"].shape
        torch.Size([1])
    """
    checkpoint = find_checkpoint(path)
    spaces = checkpoint_metadata(checkpoint)["spaces"]
    low, high = (torch.tensor(spaces[f"action_{side}"]) for side in ("low", "high"))
    policy = load_loss(checkpoint, device=device).acting_policy()
    return ActingPolicy(policy, deterministic=deterministic, bounds=(low, high))


def load_loss(
    path: str | Path, *, device: torch.device | str = "cpu"
) -> ALMLoss | BaselineLoss:
    """The networks and losses of a trained agent, to look into.

    Args:
        path: a run folder, which stands for its newest checkpoint, or a checkpoint.

    Keyword Args:
        device: where the networks go. Default: ``"cpu"``.

    Returns:
        ALMLoss or BaselineLoss: with the targets of the checkpoint.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if it is damaged or foreign.

    Example:
        >>> import tempfile
        >>> settings = {"task": "Pendulum-v1", "hidden_dim": 8}
        >>> spaces = {"observation_dim": 3, "action_low": [-1.0], "action_high": [1.0]}
        >>> metadata = {"settings": settings, "spaces": spaces}
        >>> saved = VerifiedCheckpoint(loss_module=build_loss(settings, spaces))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     loss = load_loss(saved.save(f"{folder}/one", metadata=metadata))
        >>> loss.classifier_coef
        0.1
    """
    checkpoint = find_checkpoint(path)
    metadata = checkpoint_metadata(checkpoint)
    loss = build_loss(metadata["settings"], metadata["spaces"]).to(device)
    # It never steps: TorchRL warns when targets are used that no updater knows.
    SoftUpdate(loss, tau=0.005)
    VerifiedCheckpoint(loss_module=loss).load(checkpoint, map_location=device)
    return loss


def use_moments(env: EnvBase, path: str | Path) -> None:
    """Gives an environment the moments with which an agent was trained.

    Those of Gymnasium's normalising wrappers in it; they move no more. Without such
    wrappers nothing happens.

    Args:
        env: an environment of the agent's task.
        path: a run folder, which stands for its newest checkpoint, or a checkpoint.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if the checkpoint is damaged, or has no such moments.
    """
    normalizers = Normalizers(env)
    if normalizers.names:
        VerifiedCheckpoint(normalizers=normalizers).load(find_checkpoint(path))
        normalizers.freeze()
