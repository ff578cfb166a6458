"""Find a run's checkpoints and load the networks in them to act or evaluate."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    InteractionType,
    TensorDictModuleBase,
    set_interaction_type,
)
from torchrl.checkpoint import CheckpointError
from torchrl.envs import EnvBase
from torchrl.objectives import SoftUpdate

from alm_torchrl.baselines.builders import make_redq_loss, make_sac_loss, make_td3_loss
from alm_torchrl.baselines.losses import BaselineLoss
from alm_torchrl.functional import floored_log, shifted_log
from alm_torchrl.networks import make_decoder, make_identity_encoder
from alm_torchrl.networks.layers import NoiseSchedule
from alm_torchrl.objectives import (
    ALMLoss,
    EntropyBonus,
    Logarithms,
    QValueObjective,
    Reconstruction,
    ValuePrediction,
    make_alm_loss,
)
from alm_torchrl.objectives.variants import ModelTerm
from alm_torchrl.training.checkpoint import VerifiedCheckpoint, read_manifest

__all__ = [
    "ActingPolicy",
    "build_loss",
    "checkpoint_metadata",
    "describe_spaces",
    "find_checkpoint",
    "load_loss",
    "load_policy",
    "usable_checkpoints",
]

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

_REWARD_TRANSFORMS = {"plain": floored_log, "shifted": shifted_log}


def describe_spaces(env: EnvBase) -> dict[str, Any]:
    """What networks need to know of an environment, as plain values.

    Args:
        env: with a flat ``"observation"`` and a bounded continuous action.

    Returns:
        dict: ``observation_dim``, and ``action_low`` and ``action_high`` as lists.

    Example:
        >>> from alm_torchrl import make_env
        >>> describe_spaces(make_env("Pendulum-v1", action_bounds="rescale"))
        {'observation_dim': 3, 'action_low': [-1.0], 'action_high': [1.0]}
    """
    space = env.action_spec_unbatched.space
    return {
        "observation_dim": env.observation_spec["observation"].shape[-1],
        "action_low": space.low.tolist(),
        "action_high": space.high.tolist(),
    }


def build_loss(
    settings: Mapping[str, Any], spaces: Mapping[str, Any]
) -> ALMLoss | BaselineLoss:
    """Networks and losses from the settings of a run.

    Args:
        settings: a mapping with the names of
            ``TrainConfig``; those about the agent, networks,
            losses and noise are read. One that the version of the run did not have yet
            takes its default.
        spaces: see :func:`describe_spaces`.

    Returns:
        ALMLoss or BaselineLoss: that of the agent, freshly initialised.

    Raises:
        ValueError: if a setting is out of range.
        KeyError: if one that every version of a run has is missing.

    Example:
        >>> from alm_torchrl.runs.settings import preset_config
        >>> settings = preset_config("quick", agent="sac", gamma=0.9).to_dict()
        >>> spaces = {"observation_dim": 3, "action_low": [-1.0], "action_high": [1.0]}
        >>> build_loss(settings, spaces).agent
        'sac'
    """
    agent = settings.get("agent", "alm")
    if agent == "alm":
        return _alm_loss(settings, spaces)
    common = {**_sizes(spaces), "hidden_dim": settings["hidden_dim"]}
    common["gamma"] = settings["gamma"]
    if agent == "sac":
        return make_sac_loss(**common)
    if agent == "redq":
        return make_redq_loss(**common)
    return make_td3_loss(
        **common,
        noise_clip=settings["noise_clip"],
        noise_schedule=_noise_schedule(settings),
    )


def _alm_loss(settings: Mapping[str, Any], spaces: Mapping[str, Any]) -> ALMLoss:
    arguments: dict[str, Any] = {name: settings[name] for name in _LOSS_ARGUMENTS}
    sizes = _sizes(spaces)
    observation_dim = spaces["observation_dim"]
    if settings["entropy"]:
        arguments["entropy"] = EntropyBonus()
    else:
        arguments["noise_schedule"] = _noise_schedule(settings)
    if settings["encoder"] == "identity":
        arguments["latent_dim"] = observation_dim
        arguments["encoder"] = make_identity_encoder(observation_dim)
    if settings["actor_objective"] == "qvalue":
        arguments["policy_objective"] = QValueObjective()
    terms: list[ModelTerm] = []
    if settings["model_objective"] == "likelihood":
        decoder = make_decoder(
            observation_dim,
            latent_dim=arguments["latent_dim"],
            hidden_dim=settings["hidden_dim"],
        )
        terms.append(Reconstruction(decoder))
        arguments.update(reward_coef=0.0, value_coef=0.0)
    if settings["value_prediction"] != "none":
        terms.append(ValuePrediction(settings["value_prediction"]))
    log_reward = settings["log_reward"]
    if log_reward in ("model", "bound"):
        arguments["logarithms"] = Logarithms(log_reward)
    elif log_reward in _REWARD_TRANSFORMS:
        arguments["reward_transform"] = _REWARD_TRANSFORMS[log_reward]
    return make_alm_loss(
        **sizes,
        linear_classifier=settings["classifier"] == "linear",
        model_terms=terms,
        **arguments,
    )


def _sizes(spaces: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "observation_dim": spaces["observation_dim"],
        "action_low": torch.tensor(spaces["action_low"]),
        "action_high": torch.tensor(spaces["action_high"]),
    }


def _noise_schedule(settings: Mapping[str, Any]) -> NoiseSchedule:
    return NoiseSchedule(
        settings["noise_initial"], settings["noise_final"], settings["noise_steps"]
    )


def usable_checkpoints(
    directory: Path, components: Collection[str] | None = None
) -> Iterator[Path]:
    """The checkpoints in a directory that are not damaged, the newest first.

    Args:
        directory: where a :class:`~torchrl.checkpoint.CheckpointRotation` keeps them.
        components: those that will be loaded, whose files are checked.
            Default: ``None``, all.

    Warns:
        UserWarning: for each damaged one that is passed over, saying what is wrong.

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
    if not directory.is_dir():
        return
    found = [
        (int(number), path)
        for path in directory.iterdir()
        if (number := path.name.removeprefix("checkpoint-")).isdigit()
    ]
    for _, path in sorted(found, reverse=True):
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
            has no checkpoint that can be used.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as run:
        ...     for number in (2, 10):
        ...         saved = VerifiedCheckpoint(loss_module=torch.nn.Linear(2, 1))
        ...         _ = saved.save(f"{run}/checkpoints/checkpoint-{number}")
        ...     find_checkpoint(run).name
        'checkpoint-10'
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if (path / "manifest.json").is_file():
        return path
    directory = path / "checkpoints"
    if not (path / "config.json").is_file() and not directory.is_dir():
        raise FileNotFoundError(
            f"{path} is neither a checkpoint nor a run folder, which would have a "
            "config.json and a folder named checkpoints"
        )
    newest = next(usable_checkpoints(directory, components), None)
    if newest is None:
        best = directory / "best"
        hint = f" (but {best}, to act with)" if best.is_dir() else ""
        raise FileNotFoundError(f"{path} holds no usable checkpoint yet{hint}")
    return newest


def checkpoint_metadata(path: Path) -> dict[str, Any]:
    """What a training run wrote beside its state: settings, spaces, progress.

    Args:
        path: a checkpoint.

    Returns:
        dict: ``settings`` (see ``TrainConfig``), ``spaces``
        (see :func:`describe_spaces`), ``wall_time`` in seconds, and
        ``collected_frames``, environment steps with the warm-up.

    Raises:
        CheckpointError: if the checkpoint is damaged, or holds no settings since it
            was not written by ``alm-torchrl train``.

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

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> loss = make_alm_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> policy = ActingPolicy(loss.acting_policy(), deterministic=True)
        >>> policy(TensorDict(observation=torch.zeros(3)))["action"].shape
        torch.Size([1])
    """

    def __init__(self, policy: TensorDictModuleBase, *, deterministic: bool) -> None:
        super().__init__()
        self.policy = policy
        self.deterministic = deterministic
        self.in_keys = policy.in_keys
        self.out_keys = policy.out_keys

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the action."""
        mode = (
            InteractionType.DETERMINISTIC
            if self.deterministic
            else InteractionType.RANDOM
        )
        with set_interaction_type(mode):
            return self.policy(tensordict)


def load_policy(
    path: str | Path,
    *,
    deterministic: bool = True,
    device: torch.device | str = "cpu",
) -> ActingPolicy:
    """A trained policy, ready to act.

    Reads the networks only: no replay, no optimizers, and no environment is made.
    Actions are in the bounds that the training environment had: for a run with
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
        torchrl.checkpoint.CheckpointError: if it is damaged or foreign.

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
        >>> from alm_torchrl.runs.settings import preset_config
        >>> settings = preset_config("quick", hidden_dim=8).to_dict()
        >>> spaces = {"observation_dim": 3, "action_low": [-1.0], "action_high": [1.0]}
        >>> metadata = {"settings": settings, "spaces": spaces}
        >>> saved = VerifiedCheckpoint(loss_module=build_loss(settings, spaces))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     policy = load_policy(saved.save(f"{folder}/one", metadata=metadata))
        >>> policy(TensorDict(observation=torch.zeros(3)))["action"].shape
        torch.Size([1])
    """
    checkpoint = find_checkpoint(path)
    metadata = checkpoint_metadata(checkpoint)
    loss = build_loss(metadata["settings"], metadata["spaces"]).to(device)
    VerifiedCheckpoint(loss_module=loss).load(checkpoint, map_location=device)
    return ActingPolicy(loss.acting_policy(), deterministic=deterministic)


@overload
def load_loss(
    path: str | Path,
    *,
    device: torch.device | str = ...,
    baselines: Literal[False] = ...,
) -> ALMLoss: ...


@overload
def load_loss(
    path: str | Path, *, device: torch.device | str = ..., baselines: Literal[True]
) -> ALMLoss | BaselineLoss: ...


def load_loss(
    path: str | Path, *, device: torch.device | str = "cpu", baselines: bool = False
) -> ALMLoss | BaselineLoss:
    """The networks and losses of a trained agent, to look into.

    Args:
        path: a run folder, which stands for its newest checkpoint, or a checkpoint.

    Keyword Args:
        device: where the networks go. Default: ``"cpu"``.
        baselines: accept TD3, SAC and REDQ too, which have no latent model and no
            bound. Default: ``False``.

    Returns:
        ALMLoss or BaselineLoss: with the targets of the checkpoint.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it holds an agent that is not accepted.
        torchrl.checkpoint.CheckpointError: if it is damaged or foreign.

    Example:
        >>> import tempfile
        >>> from alm_torchrl.runs.settings import preset_config
        >>> settings = preset_config("quick", hidden_dim=8).to_dict()
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
    agent = metadata["settings"].get("agent", "alm")
    if agent != "alm" and not baselines:
        raise ValueError(
            f"{checkpoint}: expected an agent of ALM, which has a latent model and a "
            f"lower bound, got {agent!r}"
        )
    loss = build_loss(metadata["settings"], metadata["spaces"]).to(device)
    # TorchRL warns when the targets of a loss are used that nothing updates.
    SoftUpdate(loss, tau=metadata["settings"]["tau"])
    VerifiedCheckpoint(loss_module=loss).load(checkpoint, map_location=device)
    return loss
