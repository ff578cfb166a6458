"""From the settings of a run to its environment and its loss."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import mujoco
import torch
from torchrl.envs import EnvBase, TransformedEnv

from alm_torchrl.baselines.builders import make_redq_loss, make_sac_loss, make_td3_loss
from alm_torchrl.baselines.losses import BaselineLoss
from alm_torchrl.checks import check_integer
from alm_torchrl.envs import LockstepEnv, make_env
from alm_torchrl.functional import floored_log, shifted_log
from alm_torchrl.networks import NoiseSchedule, make_decoder, make_identity_encoder
from alm_torchrl.objectives import (
    ALMLoss,
    Consistency,
    EntropyBonus,
    HuberError,
    InfoNCE,
    Logarithms,
    QValueObjective,
    Reconstruction,
    RewardFidelity,
    RewardScale,
    ScaledObjective,
    TDTarget,
    ValuePrediction,
    make_alm_loss,
)
from alm_torchrl.objectives.model_terms import ModelTerm
from alm_torchrl.runs.settings import TrainConfig

__all__ = ["build_env", "build_eval_env", "build_loss", "describe_spaces"]

# More environments side by side hardly save time, and each holds a simulation.
_MOST_EVAL_ENVS = 16
_REWARD_TRANSFORMS = {"plain": floored_log, "shifted": shifted_log}


def build_env(
    settings: Mapping[str, Any], *, trust: bool = False, **kwargs: Any
) -> TransformedEnv:
    """The environment of a run.

    Args:
        settings: fields of ``TrainConfig``.

    Keyword Args:
        trust: import the module of a task ``"module:Task-v0"``, which runs what is in
            it. Default: ``False``, as the settings may come from another person.
        **kwargs: further arguments of :func:`~alm_torchrl.make_env`, such as ``seed``.

    Returns:
        TransformedEnv: the environment.

    Raises:
        ValueError: if the task names a module and ``trust`` is ``False``.

    Example:
        >>> build_env({"task": "Pendulum-v1", "action_bounds": "rescale"}).batch_size
        torch.Size([])
    """
    mujoco.set_mju_user_warning(_warn_of_mujoco)
    config = TrainConfig.from_dict(settings)
    module, colon, _ = config.task.rpartition(":")
    if colon and not trust:
        raise ValueError(
            f"task: expected one without a module, or trust=True (--trust), got "
            f"{config.task!r}, which imports and runs the module {module!r}"
        )
    return make_env(
        config.task,
        action_bounds=config.action_bounds,
        dynamics_noise=config.dynamics_noise,
        max_episode_steps=config.max_episode_steps,
        **kwargs,
    )


def build_eval_env(
    settings: Mapping[str, Any], episodes: int, *, trust: bool = False
) -> LockstepEnv:
    """The environment in which the episodes of an evaluation run side by side.

    Args:
        settings: fields of ``TrainConfig``.
        episodes: episodes of an evaluation.

    Keyword Args:
        trust: as in :func:`build_env`. Default: ``False``.

    Returns:
        LockstepEnv: of batch size [E], an environment for each episode, at most 16.

    Raises:
        ValueError: as :func:`build_env`, and if ``episodes`` is out of range.

    Example:
        >>> build_eval_env({"task": "Pendulum-v1"}, episodes=3).batch_size
        torch.Size([3])
    """
    num_envs = min(check_integer("episodes", episodes), _MOST_EVAL_ENVS)
    return LockstepEnv([build_env(settings, trust=trust) for _ in range(num_envs)])


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
    """The networks and losses of a run's agent.

    Args:
        settings: fields of ``TrainConfig``; those left out have their defaults.
        spaces: see :func:`describe_spaces`.

    Returns:
        ALMLoss or BaselineLoss: freshly initialised.

    Raises:
        ValueError: if a setting is unknown or out of range.

    Example:
        >>> settings = {"agent": "sac", "hidden_dim": 8, "gamma": 0.9}
        >>> spaces = {"observation_dim": 3, "action_low": [-1.0], "action_high": [1.0]}
        >>> build_loss(settings, spaces).agent
        'sac'
    """
    config = TrainConfig.from_dict(settings)
    sizes = {
        "observation_dim": spaces["observation_dim"],
        "action_low": torch.tensor(spaces["action_low"]),
        "action_high": torch.tensor(spaces["action_high"]),
    }
    schedule = NoiseSchedule(
        config.noise_initial, config.noise_final, config.noise_steps
    )
    if config.agent == "alm":
        return _build_alm(config, sizes, schedule)
    sizes |= {"hidden_dim": config.hidden_dim, "gamma": config.gamma}
    if config.agent == "sac":
        return make_sac_loss(**sizes)
    if config.agent == "redq":
        return make_redq_loss(**sizes)
    return make_td3_loss(**sizes, noise_clip=config.noise_clip, noise_schedule=schedule)


def _build_alm(
    config: TrainConfig, sizes: Mapping[str, Any], schedule: NoiseSchedule
) -> ALMLoss:
    observation_dim = sizes["observation_dim"]
    latent_dim, terms = config.latent_dim, list[ModelTerm]()
    parts: dict[str, Any] = {
        "value_coef": config.value_coef,
        "reward_coef": config.reward_coef,
    }
    if config.entropy:
        parts["entropy"] = EntropyBonus()
    else:
        parts["noise_schedule"] = schedule
    if config.encoder == "identity":
        latent_dim = observation_dim
        parts["encoder"] = make_identity_encoder(observation_dim)
    if config.model_objective == "likelihood":
        width = {"latent_dim": latent_dim, "hidden_dim": config.hidden_dim}
        terms.append(Reconstruction(make_decoder(observation_dim, **width)))
        parts |= {"reward_coef": 0.0, "value_coef": 0.0}
    terms += [
        Consistency(coef=config.consistency_coef),
        RewardFidelity(coef=config.reward_fidelity_coef),
        InfoNCE(coef=config.info_nce_coef),
    ]
    if config.value_prediction != "none":
        terms.append(ValuePrediction(config.value_prediction))
    if config.log_reward in ("model", "bound"):
        parts["logarithms"] = Logarithms(config.log_reward)
    elif config.log_reward != "none":
        parts["reward_transform"] = _REWARD_TRANSFORMS[config.log_reward]
    if config.reward_scale != "none":
        parts["reward_transform"] = RewardScale(
            config.reward_scale, gamma=config.gamma, num_envs=config.num_envs
        )
    if config.actor_objective != "bound":
        parts["policy_objective"] = QValueObjective()
    if config.actor_objective == "scaled_qvalue":
        parts["policy_objective"] = ScaledObjective(
            parts["policy_objective"], coef=config.action_penalty
        )
    if config.critic_loss == "huber":
        parts["value_head"] = HuberError()
    return make_alm_loss(
        **sizes,
        latent_dim=latent_dim,
        hidden_dim=config.hidden_dim,
        model_hidden_dim=config.model_hidden_dim,
        reward_hidden_dim=config.reward_hidden_dim,
        linear_classifier=config.classifier == "linear",
        latent=config.latent,
        latent_layers=config.latent_layers,
        normalize=config.normalize_observations,
        layer_norm=config.layer_norm,
        pessimism=config.pessimism,
        critic_target=TDTarget(n_step=config.n_step, pessimism=config.target_pessimism),
        gamma=config.gamma,
        lmbda=config.lmbda,
        classifier_coef=config.classifier_coef,
        kl_coef=config.kl_coef,
        noise_clip=config.noise_clip,
        discount_model_loss=config.discount_model_loss,
        model_terms=terms,
        **parts,
    )


def _warn_of_mujoco(text: str) -> None:
    """MuJoCo itself prints a warning and writes it into the working directory."""
    kind = DeprecationWarning if "deprecated" in text else UserWarning
    warnings.warn(f"MuJoCo: {text}", kind, stacklevel=1)
