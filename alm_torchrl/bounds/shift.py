"""Putting the logarithm back by shifting the reward, and what that neglects (A.8)."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from alm_torchrl.bounds.gaps import surrogate_bound
from alm_torchrl.bounds.objective import lower_bound
from alm_torchrl.bounds.problem import FiniteMDP, LatentAgent

__all__ = ["log_omission_error", "log_omission_gap", "shift_reward"]


def log_omission_error(reward: Tensor, shift: float) -> Tensor:
    """What A.8 neglects: ``r - a (log(r + a) - log a)``.

    It lies between 0 and ``r^2 / (2 a)`` for ``r >= 0``.

    Args:
        reward (Tensor): ``r > -a``, any shape.
        shift (float): ``a > 0``; the paper's is 10000.

    Returns:
        Tensor: shape of ``reward``.

    Raises:
        ValueError: if ``shift`` is not positive.

    Examples:
        >>> import torch
        >>> reward = torch.tensor([0.0, 1.0, 100.0], dtype=torch.float64)
        >>> log_omission_error(reward, 1e4)
        tensor([0.0000e+00, 4.9997e-05, 4.9669e-01], dtype=torch.float64)
    """
    if not shift > 0:
        raise ValueError(f"shift should be positive, got {shift}.")
    return reward - shift * (reward / shift).log1p()


def shift_reward(mdp: FiniteMDP, shift: float) -> FiniteMDP:
    """The problem with a constant added to each reward (A.8).

    Normalised values and returns rise by the same constant; the order of policies
    stays, as no episode ends here.

    Args:
        mdp (FiniteMDP): the problem.
        shift (float): ``a``; the rewards must stay positive.

    Returns:
        FiniteMDP: with the reward ``r + a``.

    Raises:
        ValueError: if a reward is no longer positive.

    Examples:
        >>> import torch
        >>> from alm_torchrl.bounds import optimal_return, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> optimal_return(shift_reward(mdp, 7.0)).allclose(optimal_return(mdp) + 7)
        True
    """
    return replace(mdp, reward=mdp.reward + shift)


def log_omission_gap(
    mdp: FiniteMDP, agent: LatentAgent, horizon: int, shift: float
) -> Tensor:
    """How far A.8's last line is from its first: the objective's error.

    The surrogate without logs whose KL has the coefficient ``a``, minus
    ``a (L^K[r + a] - log a)``. It lies between 0 and ``(max r)^2 / (2 a)``. The
    coefficient ``c`` of the algorithm would correspond to ``a = c (1 - gamma)``, where
    nothing keeps it small.

    Args:
        mdp (FiniteMDP): the problem.
        agent (LatentAgent): encoder, model and policy, with a finite bound.
        horizon (int): ``K >= 1``.
        shift (float): ``a > 0``.

    Returns:
        Tensor: in units of the normalised return, ``[*]``.

    Raises:
        ValueError: if ``horizon`` is below 1, ``shift`` is not positive, or ``agent``
            does not fit ``mdp``.

    Examples:
        >>> import torch
        >>> from alm_torchrl.bounds import random_agent, random_mdp
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(4, 3, 2, generator=generator)
        >>> agent = random_agent(4, 3, 2, 2, generator=generator)
        >>> gap = log_omission_gap(mdp, agent, 3, 1e4)
        >>> bool(((gap >= 0) & (gap <= mdp.reward.amax((-2, -1)) ** 2 / 2e4)).all())
        True
    """
    if not shift > 0:
        raise ValueError(f"shift should be positive, got {shift}.")
    without = surrogate_bound(mdp, agent, horizon, logs=False, kl_coef=shift)
    shifted = lower_bound(shift_reward(mdp, shift), agent, horizon)
    return without - shift * (shifted - math.log(shift))
