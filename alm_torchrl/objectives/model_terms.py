"""The objective of encoder and model, and the terms that variants of it add."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from alm_torchrl import functional
from alm_torchrl.objectives.inputs import masked_mean, read_entry
from alm_torchrl.objectives.one_step import Metadata, OneStepTerms


class ModelTerms(OneStepTerms):
    """``model_loss``: what trains encoder and model, and the decoder if there is one.

    Each term weighs step t by gamma^t where ``discount_model_loss`` is set.
    """

    reconstruction_coef: float
    value_prediction: Literal["none", "encoder", "model"]
    value_prediction_coef: float
    discount_model_loss: bool

    def model_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metadata]:
        """Encoder and model objective (Eq. 7), averaged over slices.

        ``sum_t (kl_coef kl_t - reward_coef r(z_t, a_t)) - value_coef min Q(z_K, a_K)``
        ``+ reconstruction_coef sum_{t<=K} |d(z_t) - s_t|^2 / 2``
        ``+ value_prediction_coef sum_t (min Q(z_t, a_t) - y_t)^2`` with the critics'
        target y, see :meth:`td_target`. ``log_terms`` changes r and Q.

        Args:
            tensordict (TensorDictBase): two-draw batch or slices ``[B, K]``.

        Returns:
            tuple: the loss, which trains encoder, model and decoder, and detached
            means of ``kl``, ``model_reward``, ``reconstruction``, ``value_prediction``
            (each per step) and ``terminal_value``, of those whose coefficient is not
            zero.

        Raises:
            ValueError: if there are no slices ``[B, K]``.
        """
        slices, mask = self._slices(tensordict)
        rollout = self.model_rollout(slices)
        latent = rollout["latent"]
        zero = latent.new_zeros(latent.shape[0], latent.shape[1] - 1)
        kl = rollout.get("kl", default=zero)
        reward = rollout.get("reward", default=zero)
        value = rollout.get("terminal_value", default=zero[:, 0])
        gamma = self.gamma if self.discount_model_loss else 1.0
        gain, end = self._log_bound(reward, value)
        if self.log_terms == "model":
            gain = functional.floored_log(reward)
        loss = functional.model_objective(
            self.kl_coef * kl, self.reward_coef * gain, self.value_coef * end, gamma
        )
        metadata = {}
        if self.reward_coef != 0:
            metadata["model_reward"] = masked_mean(reward, mask)
        if self.kl_coef != 0:
            metadata["kl"] = masked_mean(kl, mask)
        if self.value_coef != 0:
            metadata["terminal_value"] = masked_mean(value, mask)
        if self.reconstruction_coef != 0:
            error = self._reconstruction(slices, latent)
            total = functional.discounted_sum(error, gamma)
            loss = loss + self.reconstruction_coef * total
            metadata["reconstruction"] = masked_mean(error, mask)
        if self.value_prediction != "none" and self.value_prediction_coef != 0:
            error = self._value_prediction(slices, latent)
            total = functional.discounted_sum(error, gamma)
            loss = loss + self.value_prediction_coef * total
            metadata["value_prediction"] = masked_mean(error, mask)
        return self._reduce(loss, mask), metadata

    def _reconstruction(self, slices: TensorDictBase, latent: Tensor) -> Tensor:
        """Error of ``s_0 .. s_K`` decoded from the model's latents, [B, K+1]."""
        observed = torch.cat(
            [
                torch.cat([rows.get(key) for key in self.encoder.in_keys], -1)
                for rows in (
                    self._observations(slices)[:, :1],
                    self._observations(read_entry(slices, "next")),
                )
            ],
            1,
        )
        decoded = self.decode(latent, "live")
        if decoded.shape != observed.shape:
            raise ValueError(
                "decoder: expected the shape of the observations, "
                f"{list(observed.shape)}, got {list(decoded.shape)}."
            )
        return functional.reconstruction_error(decoded, observed)

    def _value_prediction(self, slices: TensorDictBase, latent: Tensor) -> Tensor:
        """Squared TD error at the encoder's latent, [B, 1], or the model's, [B, K]."""
        steps = 1 if self.value_prediction == "encoder" else latent.shape[1] - 1
        rows = slices[:, :steps]
        action = read_entry(rows, self.tensor_keys.action)
        value = self.state_action_value(latent[:, :steps], action).amin(-1)
        return (value - self.td_target(rows)).square()
