"""Gymnasium tasks that step side by side, for evaluations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase, TransformedEnv

from alm_torchrl.compat import gymnasium_env

__all__ = ["LockstepEnv"]


class LockstepEnv(EnvBase):
    """Steps E copies of a Gymnasium task as one environment of batch size [E].

    A step costs that of the simulations and one of TorchRL, where ``SerialEnv`` pays
    TorchRL's for each. Episode i starts where the i-th of a single environment of the
    same seed does, whatever E is, unless the task draws random numbers in its steps:
    row j has the episodes j, j + E, j + 2E and so on.

    Args:
        envs: equal environments from :func:`~alm_torchrl.make_env`, without
            transforms.

    Example:
        >>> from alm_torchrl.envs import make_env
        >>> env = LockstepEnv([make_env("Pendulum-v1") for _ in range(3)])
        >>> env.rollout(5)["next", "reward"].shape
        torch.Size([3, 5, 1])
    """

    def __init__(self, envs: Sequence[TransformedEnv]) -> None:
        first, num_envs = envs[0], len(envs)
        super().__init__(device=first.device, batch_size=[num_envs])
        self.envs = list(envs)
        self._tasks = [gymnasium_env(env.base_env) for env in envs]
        self.observation_spec = first.observation_spec.expand(num_envs)
        self.action_spec = first.action_spec.expand(num_envs, *first.action_spec.shape)
        self.reward_spec = first.reward_spec.expand(num_envs, 1)
        self.done_spec = first.full_done_spec.expand(num_envs)
        shape = self.observation_spec["observation"].shape
        self._observation = np.zeros(shape, np.float32)
        # Starts that belong to other rows, before the next one of each row.
        self._others = list(range(num_envs))

    def _set_seed(self, seed: int | None) -> None:
        for task in self._tasks:
            task.reset(seed=seed)
        self._others = list(range(len(self._tasks)))

    def _reset(
        self, tensordict: TensorDictBase | None = None, **kwargs: object
    ) -> TensorDict:
        observation = self._observation.copy()
        for row in self._rows(tensordict, "_reset"):
            for _ in range(self._others[row]):
                self._tasks[row].reset()
            observation[row], _ = self._tasks[row].reset()
            self._others[row] = len(self._tasks) - 1
        self._observation = observation
        return self._as_tensordict(observation=observation)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict.get("action").cpu().numpy()
        observation = self._observation.copy()
        reward = np.zeros((len(self._tasks), 1), np.float32)
        terminated, truncated = (np.zeros(reward.shape, bool) for _ in range(2))
        for row in self._rows(tensordict, "_step"):
            observation[row], reward[row], terminated[row], truncated[row], _ = (
                self._tasks[row].step(action[row])
            )
        self._observation = observation
        return self._as_tensordict(
            observation=observation,
            reward=reward,
            done=terminated | truncated,
            terminated=terminated,
            truncated=truncated,
        )

    def _rows(self, tensordict: TensorDictBase | None, key: str) -> Sequence[int]:
        """Rows where the mask under a key is set; all without one."""
        mask = None if tensordict is None else tensordict.get(key, None)
        if mask is None:
            return range(len(self._tasks))
        rows: list[int] = mask.flatten().nonzero().flatten().tolist()
        return rows

    def _as_tensordict(self, **arrays: np.ndarray) -> TensorDict:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return TensorDict(tensors, self.batch_size, device=self.device)
