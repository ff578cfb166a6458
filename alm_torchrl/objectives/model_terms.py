"""Terms added to the objective of encoder and model: ``ALMLoss(model_terms=[...])``.

:class:`Reconstruction` (Fig. 15), :class:`ValuePrediction` (Fig. 18, 19), and beyond
the paper :class:`Consistency`, :class:`InfoNCE` and :class:`RewardFidelity`. Terms
combine. One of your own is a module like these; it reads the loss through its verbs,
``loss.latents``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from alm_torchrl import functional
from alm_torchrl.checks import check_choice, check_number, check_type
from alm_torchrl.objectives.batch import explain_mismatch, read_entry, read_mask

if TYPE_CHECKING:
    from alm_torchrl.objectives.alm import ALMLoss

__all__ = [
    "Consistency",
    "InfoNCE",
    "ModelTerm",
    "Reconstruction",
    "RewardFidelity",
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


class Consistency(nn.Module):
    """Adds ``coef sum_t mean_i (z_{t+1} - e'(s_{t+1}))_i^2`` to the model's objective.

    The latents are the model's along the recorded actions, ``z_{t+1} = m(z_t, a_t)``;
    ``e'`` is the mean of the target encoder, without gradient. It is the
    self-predictive loss of Ni et al. (https://arxiv.org/abs/2401.08898) and TD-MPC2
    (https://arxiv.org/abs/2310.16828), for latents without noise, in place of the KL
    (``kl_coef=0``). For the kinds without noise of :func:`~alm_torchrl.make_encoder`,
    the KL is the same but for a factor: ``kl_coef=1`` is ``coef=50 L``.

    Keyword Args:
        coef (float): weight of the term. Default: ``10.0``, of Ni et al.

    Raises:
        ValueError: if ``coef`` is negative.

    Examples:
        >>> Consistency().coef
        10.0
    """

    name = "consistency"

    def __init__(self, *, coef: float = 10.0) -> None:
        super().__init__()
        self.coef = check_number("coef", coef)

    def forward(self, loss: ALMLoss, slices: TensorDictBase, latent: Tensor) -> Tensor:
        """Mean squared distance after each step, ``[B, K]``."""
        with torch.no_grad():
            after = loss.latents.encode(read_entry(slices, "next")).mean
        return (latent[:, 1:] - after).square().mean(-1)


class InfoNCE(nn.Module):
    """Adds ``- coef sum_t log p_t`` to the model's objective: which next state is mine?

    ``p_t = softmax_j(cos(z_{t+1}, e'(s^j_{t+1})) / temperature)`` at the slice itself,
    among all slices j of the batch; latents and ``e'`` are those of
    :class:`Consistency`. It keeps latents of different states apart. Masked steps are
    no candidates. Source: van den Oord et al., https://arxiv.org/abs/1807.03748, Eq. 4.

    Keyword Args:
        coef (float): weight of the term. Default: ``0.1``.
        temperature (float): scale of the cosines, above 0. Default: ``0.1``.

    Raises:
        ValueError: if a number is out of range.

    Examples:
        >>> InfoNCE(temperature=0.2).name
        'info_nce'
    """

    name = "info_nce"

    def __init__(self, *, coef: float = 0.1, temperature: float = 0.1) -> None:
        super().__init__()
        self.coef = check_number("coef", coef)
        self.temperature = check_number("temperature", temperature, open_low=True)

    def forward(self, loss: ALMLoss, slices: TensorDictBase, latent: Tensor) -> Tensor:
        """Cross entropy after each step, in nats, ``[B, K]``."""
        with torch.no_grad():
            after = loss.latents.encode(read_entry(slices, "next")).mean
        mask, after_model = read_mask(loss, slices), latent[:, 1:]
        # A cosine in bfloat16 would be wrong by a tenth, over the temperature.
        with torch.autocast(latent.device.type, enabled=False):
            return functional.info_nce(after_model, after, self.temperature, mask)


class RewardFidelity(nn.Module):
    """Adds ``coef sum_t (r(z_t, a_t) - R_t)^2`` to the model's objective.

    The latents are the model's along the recorded actions, R the recorded rewards as
    the reward model learns them. The latents then tell what the reward was;
    ``reward_coef`` has them promise a high one. MR.Q predicts rewards through its model
    so (https://arxiv.org/abs/2501.16142). The reward model is frozen here:
    ``reward_loss`` trains it.

    Keyword Args:
        coef (float): weight of the term. Default: ``1.0``.

    Raises:
        ValueError: if ``coef`` is negative.

    Examples:
        >>> RewardFidelity(coef=0.5).name
        'reward_fidelity'
    """

    name = "reward_fidelity"

    def __init__(self, *, coef: float = 1.0) -> None:
        super().__init__()
        self.coef = check_number("coef", coef)

    def forward(self, loss: ALMLoss, slices: TensorDictBase, latent: Tensor) -> Tensor:
        """Squared error of each reward, ``[B, K]``."""
        action = read_entry(slices, loss.tensor_keys.action)
        predicted = loss.latents.predict_reward(latent[:, :-1], action)
        return (predicted - loss.recorded_reward(slices, predicted)).square()


def check_term(term: ModelTerm) -> ModelTerm:
    """A term of ``model_terms``, or a TypeError."""
    named = hasattr(term, "name") and hasattr(term, "coef")
    if not (isinstance(term, nn.Module) and named):
        raise TypeError(
            "model_terms: expected modules with a name and a coef, such as "
            f"Reconstruction, got {type(term).__name__}."
        )
    return term
