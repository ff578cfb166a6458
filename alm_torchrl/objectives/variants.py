"""Exchangeable parts of :class:`~alm_torchrl.ALMLoss`, by its arguments.

- ``model_terms``: :class:`Reconstruction` (Fig. 15), :class:`ValuePrediction`
  (Fig. 18, 19)
- ``logarithms``: :class:`Logarithms` (Fig. 12, Eq. 6)
- ``entropy``: :class:`EntropyBonus` (Table 5)
- ``policy_objective``: :class:`QValueObjective` (Fig. 5c)

Parts combine. A part of your own is a class with the same methods; it reads the loss
through its verbs, ``loss.latents``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from alm_torchrl import functional
from alm_torchrl.checks import LARGEST_FLOAT, check_choice, check_number, check_type
from alm_torchrl.networks import NoiseSchedule
from alm_torchrl.objectives.batch import explain_mismatch, read_entry
from alm_torchrl.objectives.rollouts import policy_value

if TYPE_CHECKING:
    from alm_torchrl.objectives.alm import ALMLoss

__all__ = [
    "EntropyBonus",
    "Logarithms",
    "ModelTerm",
    "PolicyObjective",
    "QValueObjective",
    "Reconstruction",
    "ValuePrediction",
]


class ModelTerm(Protocol):
    """A term added to the objective of encoder and model; an ``nn.Module``.

    It reads the loss, slices ``[B, K]`` and the live model's latents along them,
    ``[B, K+1, L]``.
    """

    name: str
    """Its metric."""
    coef: float
    """Its weight; zero removes the term and its cost."""

    def __call__(self, loss: ALMLoss, slices: TensorDictBase, latent: Tensor) -> Tensor:
        """The term at each step, ``[B, T]``."""


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


class Reconstruction(nn.Module):
    """Adds ``coef sum_{t<=K} |d(z_t) - s_t|^2 / 2`` to the model's objective.

    With ``reward_coef=0`` and ``value_coef=0``, encoder and model are then learned by
    maximum likelihood (Fig. 15). The decoder is trained with them.

    Args:
        decoder (TensorDictModule): ``d(s | z)``, the mean of a unit Gaussian over the
            encoder's ``in_keys``, one after the other, ``[*, S]``.

    Keyword Args:
        coef (float): weight of the term. Default: ``1.0``.
        reconstruction_key (NestedKey): the decoder's output.
            Default: ``"reconstruction"``.

    Raises:
        TypeError: if the decoder is no TensorDictModule.
        ValueError: if ``coef`` is negative.

    Examples:
        >>> from alm_torchrl import make_decoder
        >>> Reconstruction(make_decoder(3, hidden_dim=8), coef=0.5).name
        'reconstruction'
    """

    name = "reconstruction"

    def __init__(
        self,
        decoder: TensorDictModuleBase,
        *,
        coef: float = 1.0,
        reconstruction_key: str | tuple[str, ...] = "reconstruction",
    ) -> None:
        super().__init__()
        check_type("decoder", decoder, TensorDictModuleBase)
        self.decoder = decoder
        self.coef = check_number("coef", coef)
        self.reconstruction_key = reconstruction_key

    def forward(self, loss: ALMLoss, slices: TensorDictBase, latent: Tensor) -> Tensor:
        """Error of ``s_0`` to ``s_K`` decoded from the latents, ``[B, K+1]``."""
        observe, keys = loss.latents.observations, loss.encoder.in_keys
        first, following = observe(slices)[:, :1], observe(read_entry(slices, "next"))
        states = [torch.cat([first.get(key), following.get(key)], 1) for key in keys]
        observed = torch.cat(states, -1)
        decoded = self.decode(loss, latent)
        if decoded.shape != observed.shape:
            raise ValueError(
                "decoder: expected the shape of the observations, "
                f"{list(observed.shape)}, got {list(decoded.shape)}."
            )
        return functional.reconstruction_error(decoded, observed)

    def decode(self, loss: ALMLoss, latent: Tensor) -> Tensor:
        """Observations ``[*, S]`` decoded from latents ``[*, L]``."""
        inputs = loss.latents.inputs(latent=latent)
        try:
            decoded = self.decoder(inputs.copy()).get(self.reconstruction_key, None)
        except (KeyError, RuntimeError) as error:
            reason = explain_mismatch("decoder", self.decoder, inputs, error)
            if reason is error:
                raise
            raise reason from error
        if decoded is None:
            raise KeyError(
                f"decoder: expected the output {self.reconstruction_key!r}, got "
                f"{self.decoder.out_keys}."
            )
        return decoded

    def reset_parameters(self) -> None:
        """Draws the decoder's parameters anew."""
        self.decoder.reset_parameters_recursive()


class ValuePrediction(nn.Module):
    """Adds ``coef sum_t (min Q(z_t, a_t) - y_t)^2`` to the model's objective.

    ``y`` is the critics' target; the critics are frozen. The latents are those of the
    encoder (Fig. 18) or of the model (Fig. 19).

    Args:
        where (str): ``"encoder"``, at ``z_0``, or ``"model"``, at ``z_0`` to
            ``z_{K-1}``.

    Keyword Args:
        coef (float): weight of the term. Default: ``1.0``; the paper names none.

    Raises:
        ValueError: if ``where`` is neither of the two, or ``coef`` is negative.

    Examples:
        >>> ValuePrediction("model").coef
        1.0
    """

    name = "value_prediction"

    def __init__(
        self, where: Literal["encoder", "model"], *, coef: float = 1.0
    ) -> None:
        super().__init__()
        check_choice("where", where, ("encoder", "model"))
        self.where = where
        self.coef = check_number("coef", coef)

    def forward(self, loss: ALMLoss, slices: TensorDictBase, latent: Tensor) -> Tensor:
        """Squared TD error, ``[B, 1]`` at the encoder's latent or ``[B, K]``."""
        steps = 1 if self.where == "encoder" else latent.shape[1] - 1
        rows = slices[:, :steps]
        action = read_entry(rows, loss.tensor_keys.action)
        value = loss.latents.state_action_value(latent[:, :steps], action).amin(-1)
        return (value - loss.td_target(rows)).square()


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


def check_term(term: ModelTerm) -> ModelTerm:
    """A term of ``model_terms``, or a TypeError."""
    named = hasattr(term, "name") and hasattr(term, "coef")
    if not (isinstance(term, nn.Module) and named):
        raise TypeError(
            "model_terms: expected modules with a name and a coef, such as "
            f"Reconstruction, got {type(term).__name__}."
        )
    return term
