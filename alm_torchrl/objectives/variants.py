"""Exchangeable parts of :class:`~alm_torchrl.ALMLoss`, by its arguments.

- ``model_terms``: see :mod:`alm_torchrl.objectives.model_terms`
- ``logarithms``: :class:`Logarithms` (Fig. 12, Eq. 6)
- ``entropy``: :class:`EntropyBonus` (Table 5)
- ``policy_objective``: :class:`QValueObjective` (Fig. 5c), :class:`ScaledObjective`

Parts combine. A part of your own is a class with the same methods; it reads the loss
through its verbs, ``loss.latents``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from alm_torchrl import functional
from alm_torchrl.checks import LARGEST_FLOAT, check_choice, check_number
from alm_torchrl.networks import NoiseSchedule
from alm_torchrl.objectives.rollouts import policy_value

if TYPE_CHECKING:
    from alm_torchrl.objectives.alm import ALMLoss

__all__ = [
    "EntropyBonus",
    "Logarithms",
    "PolicyObjective",
    "QValueObjective",
    "ScaledObjective",
]


class PolicyObjective(Protocol):
    """What the policy maximises in place of the lower bound.

    It reads the loss, starts ``[N, L]`` without gradient, and the number of steps K
    (``None`` if unknown).
    """

    metrics: Sequence[str]
    """The names of its metrics."""

    def __call__(
        self, loss: ALMLoss, latent: Tensor, horizon: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective ``[N]``, and metrics ``[N, *]`` by name."""


class Logarithms:
    """Takes logarithms of reward and value, floored at 0.01.

    Metrics stay without logarithms.

    Args:
        where (str): ``"model"``: of the predicted reward, ``log r``, in the objective
            of encoder and model (Fig. 12). ``"bound"``: as in Theorem 3.1,
            ``(1 - gamma) log r`` and ``log (1 - gamma) Q`` wherever reward and value
            are summed: in that objective, in the policy's return and in the lower
            bound.

    Raises:
        ValueError: if ``where`` is neither of the two.

    Examples:
        >>> reward, value = torch.ones(1, 2), torch.full((1,), 10.0)
        >>> Logarithms("bound").in_return(reward, value, torch.tensor(0.5))
        (tensor([[0., 0.]]), tensor([1.6094]))
    """

    def __init__(self, where: Literal["model", "bound"]) -> None:
        check_choice("where", where, ("model", "bound"))
        self.where = where

    def in_model_loss(
        self, reward: Tensor, value: Tensor, gamma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Reward ``[B, K]`` and terminal value ``[B]`` in the model's objective."""
        if self.where == "model":
            return functional.floored_log(reward), value
        return self.in_return(reward, value, gamma)

    def in_return(
        self, reward: Tensor, value: Tensor, gamma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Reward and value ``[B, *]`` in the policy's return and the bound."""
        if self.where == "model":
            return reward, value
        share = 1 - gamma
        logs = functional.floored_log(reward), functional.floored_log(share * value)
        return share * logs[0], logs[1]

    def __repr__(self) -> str:
        return f"Logarithms({self.where!r})"


class EntropyBonus(nn.Module):
    """Adds ``- alpha log pi(a | z)`` to what an action earns, as in SAC.

    The paper's ALM-ENT (Table 5) rewards the policy's entropy; its loss was not
    published. Here the bonus enters wherever the reward or value of an action enters
    the policy's return or the critics' target. :meth:`alpha_loss` tunes ``alpha`` (https://arxiv.org/abs/1812.05905).

    The actor must learn its noise: :func:`~alm_torchrl.make_stochastic_actor` makes
    one, and any reparameterised distribution with a density will do, such as
    :class:`torchrl.modules.TanhNormal`. The noise in the losses is not clipped.

    Keyword Args:
        alpha_init (float): temperature at the start, above 0. Default: ``0.1``, not
            published; an Adam of lr 1e-4 needs over 20,000 updates from SAC's 1.0 to
            there.
        target_entropy (float, optional): entropy that the temperature keeps, in nats.
            Default: ``None``, minus the number of actions.

    Raises:
        ValueError: if a number is out of range.

    Examples:
        >>> EntropyBonus(alpha_init=0.5).alpha
        tensor(0.5000)
    """

    def __init__(
        self, *, alpha_init: float = 0.1, target_entropy: float | None = None
    ) -> None:
        super().__init__()
        self.alpha_init = check_number("alpha_init", alpha_init, open_low=True)
        if target_entropy is not None:
            low = -LARGEST_FLOAT
            target_entropy = check_number("target_entropy", target_entropy, low)
        self.target_entropy = target_entropy
        self.log_alpha = nn.Parameter(torch.tensor(math.log(self.alpha_init)))

    @property
    def alpha(self) -> Tensor:
        """The temperature, a scalar without gradient."""
        return self.log_alpha.detach().exp()

    def add(self, value: Tensor, log_prob: Tensor) -> Tensor:
        """The value of an action with its bonus, both ``[*]``."""
        return functional.soft_value(value, log_prob, self.alpha)

    def alpha_loss(self, log_prob: Tensor, action_dim: int) -> Tensor:
        """``- alpha (log pi + target_entropy)`` for log densities ``[*]``, ``[*]``."""
        target = self.target_entropy
        target = -float(action_dim) if target is None else target
        return functional.temperature_loss(self.log_alpha, log_prob, target)

    def check_actor(self, actor: TensorDictModuleBase) -> None:
        """Raises a TypeError where an actor does not learn its noise."""
        got = None
        if not hasattr(actor, "get_dist"):
            got = type(actor).__name__
        elif any(isinstance(module, NoiseSchedule) for module in actor.modules()):
            got = "one with a NoiseSchedule"
        if got is not None:
            raise TypeError(
                "actor: expected one that learns its noise with an entropy bonus, as "
                f"make_stochastic_actor makes, got {got}."
            )

    def reset_parameters(self) -> None:
        """Sets the temperature to that of the start."""
        self.log_alpha.data.fill_(math.log(self.alpha_init))

    def __repr__(self) -> str:
        target = self.target_entropy
        return f"EntropyBonus(alpha_init={self.alpha_init:g}, target_entropy={target})"


class QValueObjective:
    """The policy maximises the critics' value of its action, as in TD3 (Fig. 5c).

    ``min_i Q_i(z, pi(z))`` on ALM's representation, with the noise clipped as in all
    losses; with an entropy bonus SAC's objective, ``min_i Q_i(z, a) - alpha log pi``.
    The loss's ``pessimism`` may exchange the minimum. The gradient reaches the actor
    through the action. Nothing reads the classifier then: ``classifier_coef=0`` saves
    its cost.

    Examples:
        >>> from alm_torchrl import make_alm_loss
        >>> bounds = {"action_low": [-1.0], "action_high": [1.0]}
        >>> loss = make_alm_loss(
        ...     observation_dim=3, **bounds, policy_objective=QValueObjective()
        ... )
        >>> "lambda_return" in loss.out_keys
        False
    """

    metrics = ()

    def __call__(
        self, loss: ALMLoss, latent: Tensor, horizon: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The value of each start ``[N, L]``, ``[N]``, and no metrics."""
        pessimism = loss.pessimism
        return policy_value(loss, latent, "live", "frozen", pessimism=pessimism), {}

    def __repr__(self) -> str:
        return "QValueObjective()"


class ScaledObjective:
    """Another objective in units of its own size, less a penalty on large actions.

    ``J(z) / max(mean |J|, 0.01) - coef mean_i max(|x_i| - limit, 0)^2``, the mean over
    the batch without gradient (TD3+BC, https://arxiv.org/abs/2106.06860). The actor's
    mean is ``tanh(x)``; the second term keeps it off the ends, where it has no
    gradient, as MR.Q's ``coef mean_i x_i^2`` does (https://arxiv.org/abs/2501.16142).

    Args:
        objective (PolicyObjective): the objective J, such as :class:`QValueObjective`.

    Keyword Args:
        coef (float): weight of the penalty. Default: ``1e-2``.
        limit (float): size of x from which on there is a penalty. Default: ``1.5``,
            a mean action of 0.905.

    Raises:
        TypeError: if the objective has no ``metrics`` or cannot be called.
        ValueError: if a number is negative.

    Examples:
        >>> ScaledObjective(QValueObjective()).metrics
        ('raw_action',)
    """

    def __init__(
        self, objective: PolicyObjective, *, coef: float = 1e-2, limit: float = 1.5
    ) -> None:
        if not callable(objective) or not hasattr(objective, "metrics"):
            raise TypeError(
                "objective: expected a callable with metrics, such as QValueObjective, "
                f"got {type(objective).__name__}."
            )
        self.objective = objective
        self.coef = check_number("coef", coef)
        self.limit = check_number("limit", limit)
        self.metrics = (*objective.metrics, "raw_action")

    def __call__(
        self, loss: ALMLoss, latent: Tensor, horizon: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective ``[N]``, and ``raw_action``, the mean of ``|x|``, ``[N]``."""
        value, metrics = self.objective(loss, latent, horizon)
        size = loss.latents.raw_action(latent, "live").abs()
        scaled = value / value.detach().abs().mean().clamp_min(0.01)
        penalty = self.coef * (size - self.limit).clamp_min(0).square().mean(-1)
        return scaled - penalty, {**metrics, "raw_action": size.detach().mean(-1)}

    def __repr__(self) -> str:
        numbers = f"coef={self.coef:g}, limit={self.limit:g}"
        return f"ScaledObjective({self.objective!r}, {numbers})"
