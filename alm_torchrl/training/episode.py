"""The complete state of a collector, its environment in mid-episode included."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.collectors import Collector

from alm_torchrl.env_state import (
    EnvironmentStateError,
    environment_state,
    load_environment_state,
)

__all__ = ["CollectorState"]


class CollectorState:
    """A collector as a checkpoint component from which it continues exactly.

    TorchRL's own state of a collector leaves out where the environment is, so that a
    resumed run starts a fresh episode. This one adds the simulator's state, what the
    collector carries from one step to the next, and the numbers of the trajectories;
    the policy is left to the loss module that it belongs to.

    An environment that cannot give its state (:func:`~alm_torchrl.environment_state`
    says why) is saved without it: loading starts a fresh episode, with a seed that
    follows from the steps collected, and warns.

    Args:
        collector: a :class:`torchrl.collectors.Collector` with one environment.

    Warns:
        UserWarning: by ``load_state_dict``, if the environment's state is not in it.

    Examples:
        >>> from torchrl.collectors import Collector
        >>> from alm_torchrl import make_env, random_policy
        >>> def collector(seed):
        ...     env = make_env("Pendulum-v1", action_bounds="rescale", seed=seed)
        ...     return Collector(env, random_policy(env), frames_per_batch=3,
        ...                      auto_register_policy_transforms=False)
        >>> one, other = collector(0), collector(1)
        >>> _ = one.next()
        >>> CollectorState(other).load_state_dict(CollectorState(one).state_dict())
        >>> [int(c.next()["collector", "traj_ids"][0]) for c in (one, other)]
        [0, 0]
    """

    def __init__(self, collector: Collector) -> None:
        self.collector = collector

    def state_dict(self) -> dict[str, Any]:
        """State of the collector, its transforms and, if possible, the environment."""
        state = dict(self.collector.state_dict())
        state.pop("policy_state_dict", None)
        state["carrier"] = _leaves(self.collector._carrier)
        try:
            state["environment"] = environment_state(self.collector.env)
        except EnvironmentStateError as error:
            state["environment"] = None
            state["reason"] = str(error)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues where :meth:`state_dict` was taken.

        Args:
            state_dict: the saved state.

        Raises:
            EnvironmentStateError: if it belongs to another environment.
        """
        collector = self.collector
        # Gives the collector a trajectory number of its own, which a fresh episode
        # needs and a continued one does not.
        collector.load_state_dict(
            {key: state_dict[key] for key in _OWN_KEYS if key in state_dict},
            strict=False,
        )
        if state_dict["environment"] is None:
            fresh = collector._carrier.get("collector").clone()
            steps = state_dict["frames"]
            seed = (torch.initial_seed() + 1_000_003 * (steps + 1)) % 2**31
            collector.env.set_seed(seed)
            collector._carrier = collector.env.reset()
            if collector._carrier_has_no_device:
                collector._carrier.clear_device_()
            collector._carrier.set("collector", fresh)
            warnings.warn(
                "the run continues with a fresh episode, since its environment could "
                f"not be saved: {state_dict['reason']}",
                UserWarning,
                stacklevel=2,
            )
            return
        load_environment_state(collector.env, state_dict["environment"])
        collector._traj_pool.load_state_dict(state_dict["traj_pool"])
        carrier = collector._carrier
        saved = TensorDict({}, batch_size=carrier.batch_size)
        for key, value in state_dict["carrier"]:
            saved.set(tuple(key), value)
        device = carrier.device
        collector._carrier = saved if device is None else saved.to(device)


# What the collector's own load_state_dict reads.
_OWN_KEYS = ("env_state_dict", "frames", "iter", "traj_pool", "policy_version")


def _leaves(carrier: TensorDictBase) -> list[tuple[tuple[str, ...], torch.Tensor]]:
    return [
        ((key,) if isinstance(key, str) else tuple(key), value.clone())
        for key, value in carrier.items(include_nested=True, leaves_only=True)
    ]
