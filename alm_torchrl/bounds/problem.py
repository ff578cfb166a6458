"""Finite Markov decision processes, agents with a finite latent space, random ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "FiniteMDP",
    "LatentAgent",
    "random_agent",
    "random_mdp",
    "random_policy",
]

ROW_SUM_TOLERANCE = 1e-8


@dataclass(frozen=True, eq=False)
class FiniteMDP:
    """A Markov decision process with finitely many states and actions, or many of them.

    All tensors are float64 and share the batch shape ``*``, which may be empty. Every
    function of this package is exact and differentiable in them.

    Args:
        initial (Tensor): ``p_0(s)``, ``[*, S]``.
        kernel (Tensor): ``p(s'|s, a)``, ``[*, S, A, S]``, indexed ``[s, a, s']``.
        reward (Tensor): ``r(s, a) > 0``, ``[*, S, A]``.
        gamma (Tensor): discount in ``[0, 1)``, ``[*]``.

    Raises:
        ValueError: if a type or shape is not as stated, if the rows of ``initial`` or
            ``kernel`` are not distributions, if a reward is not positive and finite, or
            if ``gamma`` leaves ``[0, 1)``.

    Examples:
        >>> coin = torch.full((2, 1, 2), 0.5, dtype=torch.float64)
        >>> mdp = FiniteMDP(
        ...     initial=torch.tensor([1.0, 0.0], dtype=torch.float64),
        ...     kernel=coin,
        ...     reward=torch.tensor([[1.0], [3.0]], dtype=torch.float64),
        ...     gamma=torch.tensor(0.5, dtype=torch.float64),
        ... )
        >>> mdp.states, mdp.actions, mdp.batch_shape
        (2, 1, torch.Size([]))
    """

    initial: Tensor
    kernel: Tensor
    reward: Tensor
    gamma: Tensor

    def __post_init__(self) -> None:
        batch, sizes = self.reward.shape[:-2], self.reward.shape[-2:]
        if len(sizes) != 2:
            raise ValueError(
                f"reward should be [*, S, A], got {list(self.reward.shape)}."
            )
        states, actions = sizes
        _check("reward", self.reward, (*batch, states, actions))
        _check("initial", self.initial, (*batch, states), rows=True)
        _check("kernel", self.kernel, (*batch, states, actions, states), rows=True)
        _check("gamma", self.gamma, batch)
        if not bool(((self.reward > 0) & self.reward.isfinite()).all()):
            raise ValueError(
                "reward should be positive and finite, got values from "
                f"{self.reward.min().item()} to {self.reward.max().item()}."
            )
        if not bool(((self.gamma >= 0) & (self.gamma < 1)).all()):
            raise ValueError(
                "gamma should lie in [0, 1), got values from "
                f"{self.gamma.min().item()} to {self.gamma.max().item()}."
            )

    @property
    def states(self) -> int:
        """Number of states ``S``."""
        return self.reward.shape[-2]

    @property
    def actions(self) -> int:
        """Number of actions ``A``."""
        return self.reward.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """The shape ``*``."""
        return self.reward.shape[:-2]


@dataclass(frozen=True, eq=False)
class LatentAgent:
    """Tabular encoder, latent model and policy over ``Z`` latents (section 3.1, 3.2).

    All tensors are float64; the batch shape ``*`` is that of the problem they act in.

    Args:
        encoder (Tensor): ``e(z|s)``, ``[*, S, Z]``.
        model (Tensor): ``m(z'|z, a)``, ``[*, Z, A, Z]``, indexed ``[z, a, z']``.
        policy (Tensor): ``pi(a|z)``, ``[*, Z, A]``.

    Raises:
        ValueError: if a type or shape is not as stated or a row is not a distribution.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> agent = random_agent(7, states=3, latents=2, actions=4, generator=generator)
        >>> agent.latents, agent.state_policy.shape
        (2, torch.Size([7, 3, 4]))
    """

    encoder: Tensor
    model: Tensor
    policy: Tensor

    def __post_init__(self) -> None:
        batch, sizes = self.policy.shape[:-2], self.policy.shape[-2:]
        if len(sizes) != 2:
            raise ValueError(
                f"policy should be [*, Z, A], got {list(self.policy.shape)}."
            )
        latents, actions = sizes
        states = self.encoder.shape[-2] if self.encoder.dim() > 1 else 0
        _check("policy", self.policy, (*batch, latents, actions), rows=True)
        _check("model", self.model, (*batch, latents, actions, latents), rows=True)
        _check("encoder", self.encoder, (*batch, states, latents), rows=True)

    @property
    def latents(self) -> int:
        """Number of latents ``Z``."""
        return self.policy.shape[-2]

    @property
    def state_policy(self) -> Tensor:
        """The actions in each state: ``sum_z e(z|s) pi(a|z)``, ``[*, S, A]``."""
        return self.encoder @ self.policy


def check_pair(mdp: FiniteMDP, agent: LatentAgent) -> None:
    """Refuses an agent whose numbers of states or actions are not the problem's."""
    have = (agent.encoder.shape[-2], agent.policy.shape[-1])
    if have != (mdp.states, mdp.actions):
        raise ValueError(
            f"agent should know {mdp.states} states and {mdp.actions} actions as mdp "
            f"does, got {have[0]} and {have[1]}."
        )


def check_horizon(horizon: int) -> None:
    """Refuses a horizon below one step."""
    if horizon < 1:
        raise ValueError(f"horizon should be at least 1, got {horizon}.")


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], *, rows: bool = False
) -> None:
    if tensor.dtype != torch.float64:
        raise ValueError(f"{name} should be float64, got {tensor.dtype}.")
    if tensor.shape != shape:
        raise ValueError(
            f"{name} should have shape {list(shape)}, got {list(tensor.shape)}."
        )
    if not rows:
        return
    error = (tensor.sum(-1) - 1).abs().max()
    if not bool(error <= ROW_SUM_TOLERANCE) or bool((tensor < 0).any()):
        raise ValueError(
            f"{name} should hold distributions over its last dimension, got a smallest "
            f"entry of {tensor.min().item()} and a row sum wrong by {error.item()}."
        )


def random_mdp(
    batch: int,
    states: int,
    actions: int,
    *,
    generator: torch.Generator,
    sharpness: Tensor | float = 1.0,
    log10_reward: tuple[float, float] = (-1.0, 1.0),
    gamma: Tensor | float = 0.9,
) -> FiniteMDP:
    """Random problems: softmax of Gaussian logits, log-uniform rewards.

    Args:
        batch (int): how many.
        states (int): number of states ``S``.
        actions (int): number of actions ``A``.

    Keyword Args:
        generator (torch.Generator): source of randomness.
        sharpness (Tensor or float): standard deviation of the logits, one number or
            ``[batch]``. Infinity makes the kernel deterministic. Default: ``1.0``.
        log10_reward (tuple): smallest and largest power of ten of a reward.
            Default: ``(-1.0, 1.0)``.
        gamma (Tensor or float): discount, one number or ``[batch]``. Default: ``0.9``.

    Returns:
        FiniteMDP: batch shape ``[batch]``.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> mdp = random_mdp(100, 5, 2, generator=generator, sharpness=float("inf"))
        >>> bool((mdp.kernel.max(-1).values == 1).all())
        True
    """
    low, high = log10_reward
    power = torch.rand(batch, states, actions, generator=generator, dtype=torch.float64)
    discount = torch.as_tensor(gamma, dtype=torch.float64).expand(batch).clone()
    return FiniteMDP(
        initial=_rows((batch, states), sharpness, generator),
        kernel=_rows((batch, states, actions, states), sharpness, generator),
        reward=10 ** (low + (high - low) * power),
        gamma=discount,
    )


def random_agent(
    batch: int,
    states: int,
    latents: int,
    actions: int,
    *,
    generator: torch.Generator,
    sharpness: Tensor | float = 1.0,
) -> LatentAgent:
    """Random encoder, model and policy: softmax of Gaussian logits.

    Args:
        batch (int): how many.
        states (int): number of states ``S``.
        latents (int): number of latents ``Z``.
        actions (int): number of actions ``A``.

    Keyword Args:
        generator (torch.Generator): source of randomness.
        sharpness (Tensor or float): see :func:`random_mdp`. Default: ``1.0``.

    Returns:
        LatentAgent: batch shape ``[batch]``.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> random_agent(9, 4, 3, 2, generator=generator).model.shape
        torch.Size([9, 3, 2, 3])
    """
    return LatentAgent(
        encoder=_rows((batch, states, latents), sharpness, generator),
        model=_rows((batch, latents, actions, latents), sharpness, generator),
        policy=_rows((batch, latents, actions), sharpness, generator),
    )


def random_policy(
    batch: int,
    states: int,
    actions: int,
    *,
    generator: torch.Generator,
    sharpness: Tensor | float = 1.0,
) -> Tensor:
    """A random ``pi(a|s)``, such as the behaviour that collected a data set (A.7).

    Args:
        batch (int): how many.
        states (int): number of states ``S``.
        actions (int): number of actions ``A``.

    Keyword Args:
        generator (torch.Generator): source of randomness.
        sharpness (Tensor or float): see :func:`random_mdp`. Default: ``1.0``.

    Returns:
        Tensor: ``[batch, S, A]``.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> random_policy(9, 4, 2, generator=generator).shape
        torch.Size([9, 4, 2])
    """
    return _rows((batch, states, actions), sharpness, generator)


def _rows(
    shape: tuple[int, ...], sharpness: Tensor | float, generator: torch.Generator
) -> Tensor:
    """Random distributions over the last dimension."""
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    spread = torch.as_tensor(sharpness, dtype=torch.float64).expand(shape[0])
    spread = spread.reshape(-1, *[1] * (len(shape) - 1))
    soft = (logits * spread.where(spread.isfinite(), 0)).softmax(-1)
    hard = torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1)
    return hard.where(spread.isinf(), soft)
