"""The one-step terms of the objective: reward, classifier and critics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import cross_entropy
from torchrl.modules import IndependentNormal

from alm_torchrl import functional
from alm_torchrl.checks import check_integer
from alm_torchrl.objectives.inputs import (
    entry_names,
    masked_mean,
    read_column,
    read_entry,
    read_masked,
    reduce_masked,
)
from alm_torchrl.objectives.rollouts import ENCODED, ALMRollouts, normal_parameters

Metadata = dict[str, Tensor]


class OneStepTerms(ALMRollouts):
    """Reads batches, and computes the terms that look one step ahead.

    Each public method returns ``(value, metadata)`` and takes the two-draw batch,
    slices ``[B, K]`` or transitions ``[B]``.
    """

    target_entropy: float | None

    def _read(
        self, tensordict: TensorDictBase, key: NestedKey
    ) -> tuple[TensorDictBase, Tensor | None]:
        rows, mask = read_masked(
            self._part(tensordict, key), self.tensor_keys.action, self._loss_mask_keys()
        )
        if 0 in rows.batch_size:
            raise ValueError(
                "tensordict: expected at least one row and step, got batch size "
                f"{list(rows.batch_size)}."
            )
        return rows, mask

    def _part(self, tensordict: TensorDictBase, key: NestedKey) -> TensorDictBase:
        """The entry ``key`` of a two-draw batch, or the plain batch itself."""
        part = tensordict.get(key, default=tensordict)
        action_key = self.tensor_keys.action
        if part.get(action_key, default=None) is None:
            raise KeyError(
                f"tensordict: expected the entry {action_key!r}, alone or under "
                f"{key!r}, got {entry_names(tensordict)}."
            )
        return part

    def _slices(
        self, tensordict: TensorDictBase
    ) -> tuple[TensorDictBase, Tensor | None]:
        """Slices [B, K] without masked values, and which of them count, [B]."""
        slices, mask = self._read(tensordict, self.tensor_keys.slice)
        if slices.ndim != 2:
            raise ValueError(
                "model_loss expects slices with batch size [B, K], alone or under the "
                f"key {self.tensor_keys.slice!r}, got batch size "
                f"{list(slices.batch_size)}."
            )
        return slices, None if mask is None else mask.all(1)

    def _transitions(
        self, tensordict: TensorDictBase
    ) -> tuple[TensorDictBase, Tensor | None, torch.Size]:
        """Transitions [N] without masked values, which count, and the input's shape."""
        transitions, mask = self._read(tensordict, self.tensor_keys.transition)
        shape = transitions.batch_size
        if len(shape) not in (1, 2):
            raise ValueError(
                "the one-step terms expect transitions [B] or slices [B, K], got batch "
                f"size {list(shape)}."
            )
        return transitions.reshape(-1), mask, shape

    def _horizon(self, tensordict: TensorDictBase, horizon: int | None) -> int:
        slices = self._part(tensordict, self.tensor_keys.slice)
        shape = slices[self.tensor_keys.action].shape[:-1]
        if horizon is None and len(shape) == 2:
            return shape[1]
        if horizon is None:
            raise ValueError(
                "actor_loss takes its horizon from slices [B, K] or from horizon >= 1, "
                f"got batch size {list(shape)} and horizon={horizon}."
            )
        return check_integer("horizon", horizon)

    def _reduce(
        self, loss: Tensor, mask: Tensor | None, shape: torch.Size | None = None
    ) -> Tensor:
        loss = loss if shape is None else loss.reshape(shape)
        return reduce_masked(loss, mask, self.reduction)

    def _mixed_next(
        self, transitions: TensorDictBase, encoded: Distribution
    ) -> tuple[Tensor, Tensor]:
        """Which next latents are imagined, [N], and the next latents, [N, L]."""
        keys = self.tensor_keys
        action = transitions[keys.action]
        half, rest = None, None
        if transitions.get(keys.imagined, default=None) is None:
            # Each row runs through one of the networks only.
            rank = torch.rand(action.shape[0], device=action.device).argsort()
            half, rest = rank.argsort().tensor_split([action.shape[0] // 2])
        real = self._sample(self._target_encoding(transitions, "next", rest))
        # Another draw than that of the reward: the authors imagine from a z of its own.
        latent = self._sample(encoded)
        if half is not None:
            imagined = self._sample(self.step(latent[half], action[half]))
            return rank < len(half), torch.cat([imagined, real])[rank]
        imagined = self._sample(self.step(latent, action))
        chosen = read_column(transitions, keys.imagined, latent)
        if chosen.dtype != torch.bool:
            raise ValueError(
                f"tensordict: expected booleans {keys.imagined!r}, got {chosen.dtype}."
            )
        return chosen, torch.where(chosen.unsqueeze(-1), imagined, real)

    @torch.no_grad()
    def _encoded(self, transitions: TensorDictBase) -> tuple[Distribution, Tensor]:
        """The target encoder's distribution of ``z``, and a sample of it."""
        dist = self._target_encoding(transitions)
        latent = transitions.get((ENCODED, "latent"), default=None)
        return dist, self._sample(dist) if latent is None else latent

    @torch.no_grad()
    def encode_transitions(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Runs the target encoder once for all one-step terms and the policy's.

        They draw their samples from what this leaves in the transitions, and otherwise
        run the encoder themselves. It holds until a target moves.

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.

        Returns:
            TensorDictBase: a shallow copy with an entry more in the transitions; the
            input itself if the encoder's distribution is no
            :class:`torchrl.modules.IndependentNormal`.
        """
        transitions, _, shape = self._transitions(tensordict)
        following = read_entry(transitions, "next")
        seen = [self._observations(rows) for rows in (transitions, following)]
        dist = self.encode(torch.cat(seen))
        if type(dist) is not IndependentNormal:
            return tensordict
        loc, scale = (
            parameter.reshape(2, *shape, -1)
            for parameter in normal_parameters(dist, "encoder")
        )
        encoded = {
            when: TensorDict({"loc": loc[i], "scale": scale[i]}, batch_size=shape)
            for i, when in enumerate(("now", "next"))
        }
        return self._with_encoded(tensordict, encoded)

    def _with_encoded(
        self, tensordict: TensorDictBase, entries: Mapping[str, Tensor | TensorDict]
    ) -> TensorDictBase:
        """A shallow copy whose transitions hold more for the terms to read."""
        key = self.tensor_keys.transition
        rows = self._read(tensordict, key)[0].copy()
        for name, entry in entries.items():
            rows.set((ENCODED, name), entry)
        if tensordict.get(key, default=None) is None:
            return rows
        return tensordict.copy().set(key, rows)

    def reward_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metadata]:
        """Squared error of the reward model on ``z ~ e'(s)`` (Eq. 11).

        The reward is that of the batch after ``reward_transform``.

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.

        Returns:
            tuple: the loss, which trains the reward model, and no metadata.
        """
        transitions, mask, shape = self._transitions(tensordict)
        _, latent = self._encoded(transitions)
        action = transitions[self.tensor_keys.action]
        predicted = self.predict_reward(latent, action, "live")
        error = predicted - self._recorded_reward(transitions, predicted)
        return self._reduce(error.square(), mask, shape), {}

    def classifier_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metadata]:
        """Cross entropy of real against imagined next latents (Eq. 9).

        In a random half of the rows, or where the entry ``imagined`` says so, the next
        latent is the model's. Rows are one or the other; the paper's equation uses
        each row as both.

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.

        Returns:
            tuple: the loss, which trains the classifier, and
            ``classifier_accuracy`` in [0, 1].

        Raises:
            RuntimeError: if the loss has no classifier (``classifier_coef=0``).
        """
        if self.classifier is None:
            raise RuntimeError(
                "classifier_loss needs a classifier, got classifier_coef=0."
            )
        transitions, mask, shape = self._transitions(tensordict)
        encoded, latent = self._encoded(transitions)
        with torch.no_grad():
            chosen, following = self._mixed_next(transitions, encoded)
        action = transitions[self.tensor_keys.action]
        logits = self.classify(latent, action, following, "live")
        label = (~chosen).long()
        loss = cross_entropy(logits, label, reduction="none")
        correct = (logits.detach().argmax(-1) == label).to(loss.dtype)
        metadata = {"classifier_accuracy": masked_mean(correct.reshape(shape), mask)}
        return self._reduce(loss, mask, shape), metadata

    def reward_classifier_loss(
        self, tensordict: TensorDictBase
    ) -> tuple[Tensor, Metadata]:
        """Reward and classifier loss together, on one latent as in the authors' code.

        They come from :meth:`reward_loss` and :meth:`classifier_loss`, so a subclass
        that overrides one of these changes it here and in :meth:`forward` too.

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.

        Returns:
            tuple: the sum, and its detached parts ``loss_reward`` and
            ``loss_classifier`` with the metadata of the two terms. Without a
            classifier it is the reward loss alone.
        """
        losses, metadata = self._reward_classifier(tensordict)
        metadata.update({name: loss.detach() for name, loss in losses.items()})
        return torch.stack(list(losses.values())).sum(0), metadata

    def _reward_classifier(
        self, tensordict: TensorDictBase
    ) -> tuple[dict[str, Tensor], Metadata]:
        transitions, _, shape = self._transitions(tensordict)
        latent = self._encoded(transitions)[1].reshape(*shape, -1)
        tensordict = self._with_encoded(tensordict, {"latent": latent})
        reward, metadata = self.reward_loss(tensordict)
        if self.classifier is None:
            return {"loss_reward": reward}, metadata
        classifier, more = self.classifier_loss(tensordict)
        losses = {"loss_reward": reward, "loss_classifier": classifier}
        return losses, {**metadata, **more}

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metadata]:
        """Squared TD error of the critics, averaged over them (Eq. 10).

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.

        Returns:
            tuple: the loss, which trains the critics, and detached means of
            ``pred_value``, ``target_value`` and ``td_error`` (absolute).
        """
        transitions, mask, shape = self._transitions(tensordict)
        target = self.td_target(transitions).unsqueeze(-1)
        _, latent = self._encoded(transitions)
        action = transitions[self.tensor_keys.action]
        value = self.state_action_value(latent, action, "live")
        error = value - target
        metadata = {
            "pred_value": value.mean(-1),
            "target_value": target.squeeze(-1),
            "td_error": error.abs().mean(-1),
        }
        means = {
            k: masked_mean(v.detach().reshape(shape), mask) for k, v in metadata.items()
        }
        return self._reduce(error.square().mean(-1), mask, shape), means

    def alpha_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metadata]:
        """Loss of the entropy bonus's temperature, as in SAC.

        ``- alpha (log pi(a | z) + target_entropy)`` with ``a ~ pi(z)``, ``z ~ e'(s)``.

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.

        Returns:
            tuple: the loss, which trains ``log_alpha``, and detached ``alpha`` and mean
            ``entropy``, ``-log pi`` in nats.

        Raises:
            RuntimeError: if the loss has no entropy bonus (``alpha_init=None``).
        """
        if self.log_alpha is None:
            raise RuntimeError(
                "alpha_loss needs an entropy bonus, got alpha_init=None."
            )
        transitions, mask, shape = self._transitions(tensordict)
        _, latent = self._encoded(transitions)
        with torch.no_grad(), self._bound("actor", "frozen"):
            action, log_prob = self._scored_action(latent)
        target = self.target_entropy
        if target is None:
            target = -float(action.shape[-1])
        loss = functional.temperature_loss(self.log_alpha, log_prob, target)
        metadata = {
            "alpha": self.log_alpha.detach().exp(),
            "entropy": masked_mean(-log_prob.reshape(shape), mask),
        }
        return self._reduce(loss, mask, shape), metadata
