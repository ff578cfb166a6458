"""ALMLoss: every term of Aligned Latent Models as one TorchRL loss module."""

from __future__ import annotations

from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import cross_entropy
from torchrl.objectives import ValueEstimators

from alm_torchrl import functional
from alm_torchrl.objectives.networks import (
    PARTS,
    ALMNetworks,
    normal_parameters,
    sampling,
)

Metadata = dict[str, Tensor]


class ALMLoss(ALMNetworks):
    """Aligned Latent Models: encoder, model and policy under one lower bound.

    Presented in "Simplifying Model-based RL: Learning Representations, Latent-space
    Models, and Policies with One Objective", https://arxiv.org/abs/2209.08466.

    ================== ====================================== =====================
    term               what it is                             trains
    ================== ====================================== =====================
    ``loss_model``     KL, reward and K-step value (Eq. 7)    encoder and model
    ``loss_reward``    squared error of r (Eq. 11)            reward
    ``loss_classifier`` cross entropy, real/imagined (Eq. 9)  classifier
    ``loss_qvalue``    one-step TD error (Eq. 10)             critics
    ``loss_actor``     lambda-weighted K-step return (Eq. 8)  actor
    ================== ====================================== =====================

    Each term reaches its own parameters only, so one optimizer on the sum sees the
    same gradients as five on the parts. Each is also a method that returns
    ``(value, metadata)``. Methods and ``forward`` take either the two-draw batch of
    :func:`~alm_torchrl.replay.make_replay_buffer` (``"slice"`` ``[B, K]`` and
    ``"transition"`` ``[B]``) or plain slices ``[B, K]``, whose B*K transitions then
    serve the one-step terms and the starts of the policy; the one-step methods take
    plain transitions ``[B]`` too. The horizon K is the length of the slices.

    The terms sample, whatever exploration type surrounds the call; set
    ``deterministic_sampling_mode`` to ``ExplorationType.DETERMINISTIC`` to replace
    each sample by its distribution's mean. Masks are found as in every TorchRL loss
    (``loss_mask_key``); a slice with a masked step is dropped whole from
    ``loss_model``.

    Keyword Args:
        encoder (ProbabilisticTensorDictSequential): ``e(z | s)``, a diagonal Gaussian.
        model (ProbabilisticTensorDictSequential): ``m(z' | z, a)``, likewise.
        actor (TensorDictModule): ``pi(a | z)``.
        qvalue (TensorDictModule): critics, ``[*, N]``; their minimum is the value.
        reward (TensorDictModule): ``r(z, a)``, ``[*, 1]``.
        classifier (TensorDictModule, optional): ``C(z, a, z')``, ``[*, 2]``. May be
            ``None`` where ``classifier_coef`` is zero.
        gamma (float): discount per step. Default: ``0.99``.
        lmbda (float): weight of longer horizons in the policy's return.
            Default: ``0.95``.
        classifier_coef (float): weight c of the log ratio in the policy's reward.
            Zero removes the classifier, its loss and their cost. Default: ``0.1``.
        kl_coef (float): weight of the KL in ``loss_model``. Zero removes it and its
            cost. Default: ``1.0``.
        value_coef (float): weight of the terminal value in ``loss_model``. Zero
            removes it and its cost. Default: ``1.0``.
        noise_clip (float, optional): clip of the action noise inside the losses,
            ``None`` for no clip. Default: ``0.3``.
        discount_model_loss (bool): weight step t of ``loss_model`` by gamma^t and the
            value by gamma^K, as Eq. 7 prints it; the authors' code does not.
            Default: ``False``.
        reduction (str, optional): ``"mean"``, ``"sum"`` or ``"none"``; the last gives
            ``[B]`` for each term (plain slices are averaged over K).
            Default: ``None``, which is ``"mean"``.

    Raises:
        TypeError: if a part is no TensorDictModule, or encoder or model are not
            probabilistic.
        ValueError: if a coefficient or discount is out of range, or ``classifier`` is
            ``None`` with a non-zero ``classifier_coef``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate
        >>> from alm_torchrl import make_alm_loss
        >>> loss = make_alm_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> slices = TensorDict(
        ...     {
        ...         "observation": torch.randn(4, 2, 3),
        ...         "action": torch.rand(4, 2, 1),
        ...         ("next", "observation"): torch.randn(4, 2, 3),
        ...         ("next", "reward"): torch.randn(4, 2, 1),
        ...         ("next", "terminated"): torch.zeros(4, 2, 1, dtype=torch.bool),
        ...     },
        ...     batch_size=[4, 2],
        ... )
        >>> losses = loss(slices)
        >>> sum(v for k, v in losses.items() if k.startswith("loss_")).backward()
        >>> value, metadata = loss.qvalue_loss(slices[:, 0])
        >>> sorted(metadata)
        ['pred_value', 'target_value', 'td_error']
    """

    default_value_estimator = ValueEstimators.TDLambda
    _schedulable_buffers = frozenset({"gamma", "lmbda"})

    def __init__(
        self,
        *,
        encoder: TensorDictModuleBase,
        model: TensorDictModuleBase,
        actor: TensorDictModuleBase,
        qvalue: TensorDictModuleBase,
        reward: TensorDictModuleBase,
        classifier: TensorDictModuleBase | None,
        gamma: float = 0.99,
        lmbda: float = 0.95,
        classifier_coef: float = 0.1,
        kl_coef: float = 1.0,
        value_coef: float = 1.0,
        noise_clip: float | None = 0.3,
        discount_model_loss: bool = False,
        reduction: Literal["mean", "sum", "none"] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("gamma", gamma), ("lmbda", lmbda)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}.")
        coefficients = {
            "classifier_coef": classifier_coef,
            "kl_coef": kl_coef,
            "value_coef": value_coef,
            "noise_clip": noise_clip,
        }
        for name, coefficient in coefficients.items():
            if coefficient is not None and coefficient < 0:
                raise ValueError(f"{name} must be >= 0, got {coefficient}.")
        if classifier is None and classifier_coef != 0:
            raise ValueError(
                "classifier may be None only with classifier_coef=0, got "
                f"classifier_coef={classifier_coef}."
            )
        if reduction not in (None, "mean", "sum", "none"):
            raise ValueError(
                f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}."
            )
        self.classifier_coef = classifier_coef
        self.kl_coef = kl_coef
        self.value_coef = value_coef
        self.noise_clip = noise_clip
        self.discount_model_loss = discount_model_loss
        self.reduction = "mean" if reduction is None else reduction
        self._bind(
            encoder=encoder,
            model=model,
            actor=actor,
            qvalue=qvalue,
            reward=reward,
            classifier=classifier if classifier_coef != 0 else None,
        )
        self.register_buffer("gamma", torch.tensor(float(gamma)))
        self.register_buffer("lmbda", torch.tensor(float(lmbda)))
        self.out_keys = [
            "loss_model",
            "loss_reward",
            *(["loss_classifier"] if self.classifier is not None else []),
            "loss_qvalue",
            "loss_actor",
            *(["kl"] if kl_coef != 0 else []),
            "model_reward",
            *(["terminal_value"] if value_coef != 0 else []),
            *(["classifier_accuracy"] if self.classifier is not None else []),
            "pred_value",
            "target_value",
            "td_error",
            "imagined_reward",
            *(["imagined_log_ratio"] if self.classifier is not None else []),
            "imagined_value",
            "lambda_return",
        ]

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of plain slices; what ``forward`` takes as keyword arguments."""
        keys = self.tensor_keys
        entries = [
            *self.encoder.in_keys,
            keys.action,
            *(("next", key) for key in self.encoder.in_keys),
            ("next", keys.reward),
            ("next", keys.terminated),
        ]
        return [unravel_key(entry) for entry in entries]

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """Nothing to forward: the returns are computed here."""

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams: float
    ) -> None:
        """Sets ``gamma`` and ``lmbda`` in TorchRL's way.

        Args:
            value_type (ValueEstimators, optional): only ``TDLambda``, the default.
            **hyperparams (float): ``gamma`` and ``lmbda``.

        Raises:
            NotImplementedError: for any other estimator: Eq. 8 and A.3 fix it.
            TypeError: for any other hyperparameter.
        """
        if value_type not in (None, ValueEstimators.TDLambda):
            raise NotImplementedError(
                f"ALMLoss supports value_type=TDLambda only, got {value_type}."
            )
        if unknown := set(hyperparams) - {"gamma", "lmbda"}:
            raise TypeError(
                "make_value_estimator accepts the hyperparameters gamma and lmbda, got "
                f"{sorted(unknown)}."
            )
        for name, value in hyperparams.items():
            setattr(self, name, float(value))

    # -- reading the input -----------------------------------------------------------

    def _slices(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, Tensor | None]:
        """Slices [B, K] without masked values, and which of them count, [B]."""
        slices = tensordict.get(self.tensor_keys.slice, default=None)
        slices, mask = self._read(tensordict if slices is None else slices)
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
        transitions = tensordict.get(self.tensor_keys.transition, default=None)
        transitions, mask = self._read(
            tensordict if transitions is None else transitions
        )
        shape = transitions.batch_size
        if len(shape) not in (1, 2):
            raise ValueError(
                "the one-step terms expect transitions [B] or slices [B, K], got batch "
                f"size {list(shape)}."
            )
        return transitions.reshape(-1), mask, shape

    def _read(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, Tensor | None]:
        shape = tensordict.get(self.tensor_keys.action).shape[:-1]
        if tensordict.batch_size != shape:
            tensordict = tensordict.copy()
            tensordict.batch_size = shape
        mask = None
        for key in self._loss_mask_keys():
            entry = tensordict.get(key, default=None)
            if entry is not None:
                entry = entry.reshape(shape)
                mask = entry if mask is None else mask & entry
        if mask is not None:
            # Masked entries may hold anything; NaN would survive a zero gradient.
            hidden = ~mask
            tensordict = tensordict.apply(
                lambda x: x.masked_fill(
                    hidden.reshape(shape + (1,) * (x.ndim - len(shape))), 0
                )
            )
        return tensordict, mask

    def _horizon(self, tensordict: TensorDictBase, horizon: int | None) -> int:
        slices = tensordict.get(self.tensor_keys.slice, default=tensordict)
        shape = slices.get(self.tensor_keys.action).shape[:-1]
        if horizon is None and len(shape) == 2:
            return shape[1]
        if horizon is None or horizon < 1:
            raise ValueError(
                "actor_loss takes its horizon from slices [B, K] or from horizon >= 1, "
                f"got batch size {list(shape)} and horizon={horizon}."
            )
        return horizon

    def _reduce_masked(
        self, loss: Tensor, mask: Tensor | None, shape: torch.Size | None = None
    ) -> Tensor:
        """Applies ``reduction``; "none" gives [B] and averages [B, K] over K."""
        loss = loss if shape is None else loss.reshape(shape)
        count = loss.new_ones(()) if mask is None else mask
        count = count.expand(loss.shape)
        if mask is not None:
            loss = loss.masked_fill(~mask, 0)
        if self.reduction == "sum":
            return loss.sum()
        if self.reduction == "mean":
            return loss.sum() / count.sum().clamp_min(1)
        return loss if loss.ndim == 1 else loss.sum(1) / count.sum(1).clamp_min(1)

    # -- the terms -------------------------------------------------------------------

    @sampling
    def model_rollout(self, slices: TensorDictBase) -> TensorDict:
        """Rolls the live model along the recorded actions of slices (Eq. 7).

        Args:
            slices (TensorDictBase): ``[B, K]``.

        Returns:
            TensorDict: batch size ``[B]``, with ``latent`` ``[B, K+1, L]``, ``reward``
            ``[B, K]`` and, where its coefficient is not zero, ``kl`` ``[B, K]`` and
            ``terminal_value`` ``[B]``. The gradient reaches encoder and model.
        """
        action = slices.get(self.tensor_keys.action)
        first = slices.select(*self.encoder.in_keys)[:, 0]
        latents = [self._sample(self.encode(first, "live"))]
        dists = []
        with self._bound("model", "live"):
            for action_t in action.unbind(1):
                dists.append(self._step(latents[-1], action_t))
                latents.append(self._sample(dists[-1]))
        latent = torch.stack(latents, 1)
        rollout = TensorDict(
            latent=latent,
            reward=self.predict_reward(latent[:, :-1], action),
            batch_size=[action.shape[0]],
        )
        if self.kl_coef != 0:
            with torch.no_grad():
                target = self.encode(slices.get("next"))
            locs, scales = zip(
                *(normal_parameters(dist, "model") for dist in dists), strict=True
            )
            rollout["kl"] = functional.gaussian_kl(
                torch.stack(locs, 1),
                torch.stack(scales, 1),
                *normal_parameters(target, "encoder"),
            )
        if self.value_coef != 0:
            with torch.no_grad():
                last_action = self.act(latents[-1])
            value = self.state_action_value(latents[-1], last_action)
            rollout["terminal_value"] = value.amin(-1)
        return rollout

    def model_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metadata]:
        """Encoder and model objective (Eq. 7), averaged over slices.

        ``sum_t (kl_coef kl_t - r(z_t, a_t)) - value_coef min Q(z_K, a_K)``

        Args:
            tensordict (TensorDictBase): two-draw batch or slices ``[B, K]``.

        Returns:
            tuple: the loss, which trains encoder and model, and detached means of
            ``kl``, ``model_reward`` (both per step) and ``terminal_value``.

        Raises:
            ValueError: if there are no slices ``[B, K]``.
        """
        slices, mask = self._slices(tensordict)
        rollout = self.model_rollout(slices)
        reward = rollout["reward"]
        kl = rollout.get("kl", default=torch.zeros_like(reward))
        value = rollout.get("terminal_value", default=torch.zeros_like(reward[:, 0]))
        gamma = self.gamma if self.discount_model_loss else 1.0
        loss = functional.model_objective(
            self.kl_coef * kl, reward, self.value_coef * value, gamma
        )
        metadata = {"model_reward": _mean(reward, mask)}
        if self.kl_coef != 0:
            metadata["kl"] = _mean(kl, mask)
        if self.value_coef != 0:
            metadata["terminal_value"] = _mean(value, mask)
        return self._reduce_masked(loss, mask), metadata

    def _reward_term(self, transitions: TensorDictBase, latent: Tensor) -> Tensor:
        keys = self.tensor_keys
        predicted = self.predict_reward(latent, transitions.get(keys.action), "live")
        target = transitions.get(unravel_key(("next", keys.reward))).squeeze(-1)
        return (predicted - target).square()

    def _classifier_term(
        self, transitions: TensorDictBase, encoded: Distribution, latent: Tensor
    ) -> tuple[Tensor, Tensor]:
        keys = self.tensor_keys
        action = transitions.get(keys.action)
        with torch.no_grad():
            real = self._sample(self.encode(transitions.get("next")))
            # Another draw than ``latent``: the authors imagine from a z of its own.
            imagined = self._sample(self.step(self._sample(encoded), action))
        chosen = transitions.get(keys.imagined, default=None)
        if chosen is None:
            order = torch.rand(latent.shape[0], device=latent.device).argsort()
            chosen = order < latent.shape[0] // 2
        chosen = chosen.reshape(-1, 1)
        logits = self.classify(
            latent, action, torch.where(chosen, imagined, real), "live"
        )
        label = (~chosen).squeeze(-1).long()
        loss = cross_entropy(logits, label, reduction="none")
        return loss, (logits.detach().argmax(-1) == label).to(loss.dtype)

    @torch.no_grad()
    def _encoded(self, transitions: TensorDictBase) -> tuple[Distribution, Tensor]:
        """The target encoder's distribution of ``z``, and a sample of it."""
        dist = self.encode(transitions)
        return dist, self._sample(dist)

    def reward_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metadata]:
        """Squared error of the reward model on ``z ~ e'(s)`` (Eq. 11).

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.

        Returns:
            tuple: the loss, which trains the reward model, and no metadata.
        """
        transitions, mask, shape = self._transitions(tensordict)
        _, latent = self._encoded(transitions)
        loss = self._reward_term(transitions, latent)
        return self._reduce_masked(loss, mask, shape), {}

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
        loss, correct = self._classifier_term(
            transitions, *self._encoded(transitions)
        )
        accuracy = _mean(correct.reshape(shape), mask)
        loss = self._reduce_masked(loss, mask, shape)
        return loss, {"classifier_accuracy": accuracy}

    def reward_classifier_loss(
        self, tensordict: TensorDictBase
    ) -> tuple[Tensor, Metadata]:
        """Reward and classifier loss together, on one latent as in the authors' code.

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.

        Returns:
            tuple: the sum, and its detached parts ``loss_reward`` and
            ``loss_classifier`` with the metadata of the two terms. Without a
            classifier it is the reward loss alone.
        """
        losses, metadata = self._reward_classifier(tensordict)
        metadata.update({name: loss.detach() for name, loss in losses.items()})
        return sum(losses.values()), metadata

    def _reward_classifier(
        self, tensordict: TensorDictBase
    ) -> tuple[dict[str, Tensor], Metadata]:
        transitions, mask, shape = self._transitions(tensordict)
        encoded, latent = self._encoded(transitions)
        reward = self._reward_term(transitions, latent)
        losses = {"loss_reward": self._reduce_masked(reward, mask, shape)}
        if self.classifier is None:
            return losses, {}
        loss, correct = self._classifier_term(transitions, encoded, latent)
        losses["loss_classifier"] = self._reduce_masked(loss, mask, shape)
        return losses, {"classifier_accuracy": _mean(correct.reshape(shape), mask)}

    @sampling
    @torch.no_grad()
    def td_target(self, transitions: TensorDictBase) -> Tensor:
        """Target of the critics (Eq. 10), with the target networks' minimum.

        ``R + gamma (1 - terminated) min_i Q'_i(z', pi(z'))`` with ``z' ~ e'(s')``.

        Args:
            transitions (TensorDictBase): ``[B]``.

        Returns:
            Tensor: ``[B]``, without gradient.
        """
        keys = self.tensor_keys
        reward = transitions.get(unravel_key(("next", keys.reward))).squeeze(-1)
        terminated = transitions.get(unravel_key(("next", keys.terminated)))
        latent = self._sample(self.encode(transitions.get("next")))
        value = self.state_action_value(latent, self.act(latent), "target").amin(-1)
        discount = self.gamma * (1 - terminated.squeeze(-1).to(value.dtype))
        return functional.td_target(reward, discount, value)

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
        action = transitions.get(self.tensor_keys.action)
        value = self.state_action_value(latent, action, "live")
        error = value - target
        metadata = {
            "pred_value": value.mean(-1),
            "target_value": target.squeeze(-1),
            "td_error": error.abs().mean(-1),
        }
        means = {k: _mean(v.detach().reshape(shape), mask) for k, v in metadata.items()}
        return self._reduce_masked(error.square().mean(-1), mask, shape), means

    def actor_loss(
        self, tensordict: TensorDictBase, horizon: int | None = None
    ) -> tuple[Tensor, Metadata]:
        """Negative lambda-weighted K-step return of the policy (Eq. 8, A.3).

        ``- mean_t gamma^t G_t`` from ``z_0 ~ e'(s)``; see :meth:`imagine`.

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.
            horizon (int, optional): number of steps K; needed with transitions alone.
                Default: ``None``, the length of the slices.

        Returns:
            tuple: the loss, which trains the actor, and detached means over starts and
            steps of ``imagined_reward``, ``imagined_log_ratio``, ``imagined_value`` and
            ``lambda_return``.

        Raises:
            ValueError: if the horizon is neither given nor found.
        """
        steps = self._horizon(tensordict, horizon)
        transitions, mask, shape = self._transitions(tensordict)
        _, latent = self._encoded(transitions)
        rollout = self.imagine(latent, steps)
        objective = functional.discounted_mean(rollout["lambda_return"], self.gamma)
        names = {
            "imagined_reward": "reward",
            "imagined_value": "value",
            "lambda_return": "lambda_return",
        }
        if self.classifier is not None:
            names["imagined_log_ratio"] = "log_ratio"
        metadata = {
            name: _mean(rollout[key].detach().mean(-1).reshape(shape), mask)
            for name, key in names.items()
        }
        return -self._reduce_masked(objective, mask, shape), metadata

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """All five terms and their metrics.

        Args:
            tensordict (TensorDictBase): two-draw batch or slices ``[B, K]``.

        Returns:
            TensorDict: ``loss_model``, ``loss_reward``, ``loss_classifier``,
            ``loss_qvalue``, ``loss_actor`` and the detached metrics of
            ``self.out_keys``.
        """
        model, metadata = self.model_loss(tensordict)
        losses, extra = self._reward_classifier(tensordict)
        qvalue, qvalue_metadata = self.qvalue_loss(tensordict)
        actor, actor_metadata = self.actor_loss(tensordict)
        outputs = {
            "loss_model": model,
            **losses,
            "loss_qvalue": qvalue,
            "loss_actor": actor,
            **metadata,
            **extra,
            **qvalue_metadata,
            **actor_metadata,
        }
        self._clear_weakrefs(
            tensordict,
            *(f"{part}_params" for part in PARTS),
            "target_encoder_params",
            "target_qvalue_params",
        )
        return TensorDict(outputs, batch_size=[])

    def __repr__(self) -> str:
        lines = []
        for part in PARTS:
            params = getattr(self, f"{part}_params", None)
            if params is None:
                continue
            count = sum(p.numel() for p in params.parameters())
            lines.append(f"    {part:<10} {count:>11,} parameters")
        settings = (
            f"gamma={self.gamma.item():g}, lmbda={self.lmbda.item():g}, "
            f"classifier_coef={self.classifier_coef:g}, kl_coef={self.kl_coef:g}, "
            f"value_coef={self.value_coef:g}, noise_clip={self.noise_clip}, "
            f"discount_model_loss={self.discount_model_loss}"
        )
        return "\n".join([f"{type(self).__name__}(", *lines, f"    {settings}", ")"])


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Detached mean over the rows that count."""
    values = values.detach()
    return values.mean() if mask is None else values[mask].mean()
