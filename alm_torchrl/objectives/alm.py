"""ALMLoss: the objective of Aligned Latent Models, readable from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, Literal, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import (
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictParams,
    TensorDictSequential,
    dispatch,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchrl.envs.utils import ExplorationType
from torchrl.objectives import LossModule, ValueEstimators

from alm_torchrl import functional
from alm_torchrl.checks import check_choice, check_discount, check_number, check_type
from alm_torchrl.networks import NoiseSchedule
from alm_torchrl.objectives import critics, outputs, rollouts
from alm_torchrl.objectives.batch import read_horizon, read_slices, read_transitions
from alm_torchrl.objectives.binding import bind_network, tie_networks
from alm_torchrl.objectives.latents import Encoding, Latents
from alm_torchrl.objectives.model_terms import ModelTerm, check_term
from alm_torchrl.objectives.variants import EntropyBonus, Logarithms, PolicyObjective

__all__ = ["ALMLoss"]

Metadata = dict[str, Tensor]

PARTS = ("encoder", "model", "actor", "qvalue", "reward", "classifier")
TARGETS = ("encoder", "qvalue")


class ALMLoss(LossModule):
    """Aligned Latent Models: encoder, model and policy under one lower bound.

    Presented in "Simplifying Model-based RL: Learning Representations, Latent-space
    Models, and Policies with One Objective", https://arxiv.org/abs/2209.08466.

    =================== ====================================== =====================
    term                what it is                             trains
    =================== ====================================== =====================
    ``model_loss``      KL, reward and K-step value (Eq. 7)    encoder and model
    ``reward_loss``     squared error of r (Eq. 11)            reward
    ``classifier_loss`` cross entropy, real/imagined (Eq. 9)   classifier
    ``qvalue_loss``     one-step TD error (Eq. 10)             critics
    ``actor_loss``      lambda-weighted K-step return (Eq. 8)  actor
    =================== ====================================== =====================

    Each term reaches its own parameters only, so one optimizer on the sum sees the
    same gradients as one on each part. A term takes the two-draw batch of
    :func:`~alm_torchrl.make_replay_buffer` (``"slice"`` ``[B, K]`` and
    ``"transition"`` ``[B]``) or plain slices ``[B, K]``, whose B*K transitions then
    serve the one-step terms and the starts of the policy; the one-step terms take
    plain transitions ``[B]`` too. It returns ``(value, metadata)``, the metadata being
    detached means by name. ``encoded``, what :meth:`encode_transitions` returns, saves
    a term its own run of the target encoder.

    The terms sample, whatever exploration type surrounds the call; with
    ``deterministic_sampling_mode = ExplorationType.DETERMINISTIC`` each sample is its
    distribution's mean. Masks are found as in every TorchRL loss (``loss_mask_key``);
    in ``model_loss`` a slice counts up to its first masked step, its value in whole
    slices only. Where the encoder normalises its observations, call :meth:`observe`
    once before each update.

    Keyword Args:
        encoder (ProbabilisticTensorDictSequential): ``e(z | s)``, a diagonal Gaussian.
        model (ProbabilisticTensorDictSequential): ``m(z' | z, a)``, likewise.
        actor (TensorDictModule): ``pi(a | z)``.
        qvalue (TensorDictModule): critics, ``[*, N]``; their minimum is the value.
        reward (TensorDictModule): ``r(z, a)``, ``[*, 1]``.
        classifier (TensorDictModule, optional): ``C(z, a, z')``, ``[*, 2]``; ``None``
            only where ``classifier_coef`` is zero.
        gamma (float): discount per step, in [0, 1). Default: ``0.99``.
        lmbda (float): weight of longer horizons in the policy's return, in [0, 1].
            Default: ``0.95``.
        classifier_coef (float): weight c of the log ratio in the policy's reward.
            Default: ``0.1``. A coefficient of zero removes its term and its cost.
        kl_coef, value_coef, reward_coef (float): weights of KL, value and reward in
            ``model_loss``. Default: ``1.0``.
        noise_clip (float, optional): clip of the action noise inside the losses, or
            ``None``. Not used with ``entropy``. Default: ``0.3``.
        discount_model_loss (bool): weight step t of ``model_loss`` by gamma^t and the
            value by gamma^K, as Eq. 7 is printed; the authors' code does not.
            Default: ``False``.
        reward_transform (callable, optional): applied to the rewards of a batch before
            reward model and critics learn them, such as
            :func:`~alm_torchrl.functional.shifted_log` (A.8) or
            :class:`~.rewards.RewardScale`. Default: ``None``.
        pessimism (float): weight of the critics' disagreement where their value is
            maximised: 1 takes their minimum, 0 their mean. Default: ``1.0``.
        critic_target, value_head: exchangeable parts of the critics, see
            :mod:`alm_torchrl.objectives.critics`. Default: ``None``, the one-step
            target and the squared error (Eq. 10).
        logarithms, model_terms, entropy, policy_objective: exchangeable parts, see
            :mod:`alm_torchrl.objectives.variants`. Default: none of them; the policy
            maximises the lower bound (Eq. 8).
        reduction (str, optional): ``"mean"``, the default, ``"sum"`` or ``"none"``,
            which gives ``[B]`` for each term (plain slices are averaged over K).

    Raises:
        TypeError: if a network or part is of another type, encoder or model are not
            probabilistic, or with ``entropy`` the actor does not learn its noise.
        ValueError: if a number is out of range, a classifier is missing, no term of
            ``model_loss`` is left, or a network is lazy.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.objectives import SoftUpdate
        >>> from alm_torchrl import make_alm_loss
        >>> loss = make_alm_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> updater = SoftUpdate(loss, tau=0.005)
        >>> following = {
        ...     "observation": torch.randn(4, 2, 3),
        ...     "reward": torch.randn(4, 2, 1),
        ...     "terminated": torch.zeros(4, 2, 1, dtype=torch.bool),
        ... }
        >>> slices = TensorDict(
        ...     observation=torch.randn(4, 2, 3),
        ...     action=torch.rand(4, 2, 1),
        ...     next=following,
        ...     batch_size=[4, 2],
        ... )
        >>> losses = loss(slices)
        >>> value, metadata = loss.qvalue_loss(slices[:, 0])
        >>> sorted(metadata)
        ['pred_value', 'target_value', 'td_error']
    """

    _AcceptedKeys = outputs.AcceptedKeys
    tensor_keys: outputs.AcceptedKeys
    default_keys = outputs.AcceptedKeys
    default_value_estimator = ValueEstimators.TDLambda
    deterministic_sampling_mode = ExplorationType.RANDOM
    _schedulable_buffers = frozenset({"gamma", "lmbda"})

    encoder: TensorDictModule
    encoder_params: TensorDictParams
    target_encoder_params: TensorDictParams
    model: TensorDictModule
    model_params: TensorDictParams
    target_model_params: TensorDictParams
    actor: TensorDictModule
    actor_params: TensorDictParams
    target_actor_params: TensorDictParams
    qvalue: TensorDictModule
    qvalue_params: TensorDictParams
    target_qvalue_params: TensorDictParams
    reward: TensorDictModule
    reward_params: TensorDictParams
    target_reward_params: TensorDictParams
    classifier: TensorDictModule | None
    classifier_params: TensorDictParams
    target_classifier_params: TensorDictParams
    gamma: Tensor
    lmbda: Tensor

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
        reward_coef: float = 1.0,
        noise_clip: float | None = 0.3,
        discount_model_loss: bool = False,
        reward_transform: Callable[[Tensor], Tensor] | None = None,
        pessimism: float = 1.0,
        critic_target: critics.TDTarget | None = None,
        value_head: critics.ValueHead | None = None,
        logarithms: Logarithms | None = None,
        model_terms: Sequence[ModelTerm] = (),
        entropy: EntropyBonus | None = None,
        policy_objective: PolicyObjective | None = None,
        reduction: Literal["mean", "sum", "none"] | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("gamma", torch.tensor(check_discount("gamma", gamma)))
        self.register_buffer("lmbda", torch.tensor(check_discount("lmbda", lmbda)))
        # Floats: a tensor cannot be multiplied by a large Python integer.
        self.classifier_coef = check_number("classifier_coef", classifier_coef)
        self.kl_coef = check_number("kl_coef", kl_coef)
        self.value_coef = check_number("value_coef", value_coef)
        self.reward_coef = check_number("reward_coef", reward_coef)
        if noise_clip is not None:
            noise_clip = check_number("noise_clip", noise_clip)
        check_type("discount_model_loss", discount_model_loss, bool)
        self.discount_model_loss = discount_model_loss
        if classifier is None and classifier_coef != 0:
            raise ValueError(
                "classifier: expected a network with classifier_coef="
                f"{classifier_coef}, got None."
            )
        if reward_transform is not None and not callable(reward_transform):
            got = type(reward_transform).__name__
            raise TypeError(f"reward_transform: expected a function, got {got}.")
        self.reward_transform = reward_transform
        self.pessimism = check_number("pessimism", pessimism)
        check_type("critic_target", critic_target, (critics.TDTarget, NoneType))
        self.critic_target = critic_target or critics.TDTarget()
        self.value_head = value_head or critics.SquaredError()
        self.logarithms = check_type("logarithms", logarithms, (Logarithms, NoneType))
        self.policy_objective = policy_objective
        check_choice("reduction", reduction, (None, "mean", "sum", "none"))
        self.reduction = reduction or "mean"
        classifier = classifier if classifier_coef != 0 else None
        parts = (encoder, model, actor, qvalue, reward, classifier)
        networks = dict(zip(PARTS, parts, strict=True))
        for name, network in networks.items():
            bind_network(self, name, network, target=name in TARGETS)
        terms = [term for term in model_terms if check_term(term).coef != 0]
        self.model_terms = nn.ModuleList(terms)  # type: ignore[arg-type]
        self.entropy = check_type("entropy", entropy, (EntropyBonus, NoneType))
        if entropy is not None:
            entropy.check_actor(actor)
        self.latents = Latents(
            networks,
            self._modules,
            self.tensor_keys,
            noise_clip=noise_clip if entropy is None else None,
            values=self.value_head.values,
        )
        self.out_keys = outputs.present_keys(self)

    # The terms, in the order of an update.

    def model_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metadata]:
        """Encoder and model objective (Eq. 7), averaged over slices.

        ``sum_t (kl_coef kl_t - reward_coef r(z_t, a_t)) - value_coef min Q(z_K, a_K)``
        plus the ``model_terms``; ``logarithms`` changes r and Q.

        Metadata, but for coefficients of zero: ``terminal_value``, and per step ``kl``,
        ``model_reward`` and each model term. Raises ValueError without slices [B, K].
        """
        slices = read_slices(self, tensordict)
        rollout = self.model_rollout(slices.data)
        latent = rollout["latent"]
        zero = latent.new_zeros(latent.shape[0], latent.shape[1] - 1)
        kl = rollout.get("kl", default=zero)
        reward = rollout.get("reward", default=zero)
        value = rollout.get("terminal_value", default=zero[:, 0])
        gain, end = reward, value
        if self.logarithms is not None:
            gain, end = self.logarithms.in_model_loss(reward, value, self.gamma)
        kl, gain, end = map(slices.visible, (kl, gain, end))
        gamma = self.gamma if self.discount_model_loss else 1.0
        loss = functional.model_objective(
            self.kl_coef * kl, self.reward_coef * gain, self.value_coef * end, gamma
        )
        means = {"kl": kl, "model_reward": reward, "terminal_value": value}
        for term in cast("Sequence[ModelTerm]", self.model_terms):
            steps = slices.visible(term(self, slices.data, latent))
            loss = loss + term.coef * functional.discounted_sum(steps, gamma)
            means[term.name] = steps
        metadata = {k: slices.mean(v) for k, v in means.items() if k in self.out_keys}
        return slices.reduce(loss, self.reduction), self.in_raw_units(metadata)

    def reward_loss(
        self,
        tensordict: TensorDictBase,
        encoded: Encoding | None = None,
        latent: Tensor | None = None,
    ) -> tuple[Tensor, Metadata]:
        """Squared error of the reward model on ``z ~ e'(s)`` (Eq. 11).

        The reward is that of the batch after ``reward_transform``.
        """
        rows = read_transitions(self, tensordict)
        latent = self.draw_latent(rows.data, encoded) if latent is None else latent
        action = rows.data[self.tensor_keys.action]
        predicted = self.latents.predict_reward(latent, action, "live")
        error = predicted - self.recorded_reward(rows.data, predicted)
        return rows.reduce(error.square(), self.reduction), {}

    def classifier_loss(
        self,
        tensordict: TensorDictBase,
        encoded: Encoding | None = None,
        latent: Tensor | None = None,
    ) -> tuple[Tensor, Metadata]:
        """Cross entropy of real against imagined next latents (Eq. 9).

        In a random half of the rows, or where the entry ``imagined`` is true, the next
        latent is the model's; the paper's equation uses each row as both.

        Metadata: ``classifier_accuracy`` in [0, 1]. Raises RuntimeError without a
        classifier (``classifier_coef=0``).
        """
        if self.classifier is None:
            raise RuntimeError("classifier_loss needs one, got classifier_coef=0.")
        rows = read_transitions(self, tensordict)
        if encoded is None:
            encoded = self.encode_transitions(rows.data)
        latent = self.draw_latent(rows.data, encoded) if latent is None else latent
        with torch.no_grad():
            imagined, following = rollouts.mixed_next(self, rows.data, encoded)
        action = rows.data[self.tensor_keys.action]
        logits = self.latents.classify(latent, action, following, "live")
        label = (~imagined).long()
        loss = cross_entropy(logits, label, reduction="none")
        correct = (logits.detach().argmax(-1) == label).to(loss.dtype)
        metadata = {"classifier_accuracy": rows.mean(correct)}
        return rows.reduce(loss, self.reduction), metadata

    def reward_classifier_loss(
        self, tensordict: TensorDictBase, encoded: Encoding | None = None
    ) -> tuple[Tensor, Metadata]:
        """Reward and classifier loss together, on one latent as in the authors' code.

        Metadata: ``loss_reward``, ``loss_classifier`` and theirs. Without a classifier
        it is the reward loss alone.
        """
        if encoded is None:
            encoded = self.encode_transitions(tensordict)
        latent = self.draw_latent(tensordict, encoded)
        value, metadata = self.reward_loss(tensordict, encoded, latent)
        parts = {"loss_reward": value.detach()}
        if self.classifier is not None:
            more, extra = self.classifier_loss(tensordict, encoded, latent)
            parts["loss_classifier"] = more.detach()
            value, metadata = value + more, metadata | extra
        return value, metadata | parts

    def qvalue_loss(
        self, tensordict: TensorDictBase, encoded: Encoding | None = None
    ) -> tuple[Tensor, Metadata]:
        """Loss of the critics for their target, averaged over them (Eq. 10).

        Metadata: ``pred_value``, ``target_value`` and ``td_error`` (absolute).
        """
        rows = read_transitions(self, tensordict)
        target = critics.read_target(self, rows, encoded)
        latent = self.draw_latent(rows.data, encoded)
        action = rows.data[self.tensor_keys.action]
        output = self.latents.critics_output(latent, action, "live")
        value = self.value_head.values(output)
        error = value - target.unsqueeze(-1)
        metadata = {
            "pred_value": rows.mean(value.mean(-1)),
            "target_value": rows.mean(target),
            "td_error": rows.mean(error.abs().mean(-1)),
        }
        loss = self.value_head.loss(output, target).mean(-1)
        return rows.reduce(loss, self.reduction), self.in_raw_units(metadata)

    def actor_loss(
        self,
        tensordict: TensorDictBase,
        encoded: Encoding | None = None,
        horizon: int | None = None,
    ) -> tuple[Tensor, Metadata]:
        """Negative lambda-weighted K-step return of the policy (Eq. 8, A.3).

        ``- mean_t gamma^t G_t`` from ``z_0 ~ e'(s)``, see :meth:`imagine`, or minus
        what the ``policy_objective`` gives.

        ``horizon`` is K, by default the length of the slices; transitions alone need it
        (else a ValueError). Metadata, over starts and steps: ``imagined_reward``,
        ``imagined_log_ratio``, ``imagined_value`` and ``lambda_return``, or the metrics
        of the ``policy_objective``.
        """
        horizon = read_horizon(self, tensordict) if horizon is None else horizon
        rows = read_transitions(self, tensordict)
        latent = self.draw_latent(rows.data, encoded)
        policy = self.policy_objective or rollouts.policy_bound
        objective, metrics = policy(self, latent, horizon)
        rows_of = {k: v.reshape(len(v), -1).mean(-1) for k, v in metrics.items()}
        means = {k: rows.mean(v) for k, v in rows_of.items()}
        return -rows.reduce(objective, self.reduction), self.in_raw_units(means)

    def alpha_loss(
        self, tensordict: TensorDictBase, encoded: Encoding | None = None
    ) -> tuple[Tensor, Metadata]:
        """Loss of the entropy bonus's temperature, as in SAC; see ``EntropyBonus``.

        Metadata: ``alpha`` and ``entropy``, ``-log pi`` in nats. Raises RuntimeError
        without an entropy bonus.
        """
        if self.entropy is None:
            raise RuntimeError("alpha_loss needs an entropy bonus, got entropy=None.")
        rows = read_transitions(self, tensordict)
        with torch.no_grad():
            latent = self.draw_latent(rows.data, encoded)
            action, log_prob = self.latents.act_and_score(latent)
        loss = self.entropy.alpha_loss(log_prob, action.shape[-1])
        metadata = {"alpha": self.entropy.alpha, "entropy": rows.mean(-log_prob)}
        return rows.reduce(loss, self.reduction), metadata

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """All terms (``loss_model``, ...) and metrics: the entries ``out_keys``."""
        terms = {"loss_model": self.model_loss(tensordict)}
        encoded = self.encode_transitions(tensordict)
        latent = self.draw_latent(tensordict, encoded)
        terms["loss_reward"] = self.reward_loss(tensordict, encoded, latent)
        if self.classifier is not None:
            terms["loss_classifier"] = self.classifier_loss(tensordict, encoded, latent)
        terms["loss_qvalue"] = self.qvalue_loss(tensordict, encoded)
        terms["loss_actor"] = self.actor_loss(tensordict, encoded)
        if self.entropy is not None:
            terms["loss_alpha"] = self.alpha_loss(tensordict, encoded)
        outputs = {name: value for name, (value, _) in terms.items()}
        for _, metadata in terms.values():
            outputs |= metadata
        held = (*PARTS, *(f"target_{part}" for part in TARGETS))
        self._clear_weakrefs(tensordict, *(f"{part}_params" for part in held))
        return TensorDict(outputs, batch_size=[])

    # What the terms are computed from.
    observe = rollouts.observe
    encode_transitions = rollouts.encode_transitions
    draw_latent = rollouts.draw_latent
    model_rollout = rollouts.model_rollout
    imagine = rollouts.imagine
    td_target = rollouts.td_target
    recorded_reward = rollouts.recorded_reward
    combine = rollouts.combine
    in_raw_units = outputs.in_raw_units
    lower_bound = rollouts.lower_bound

    def acting_policy(self) -> TensorDictSequential:
        """The policy that acts; see :meth:`~.latents.Latents.acting_policy`."""
        return self.latents.acting_policy()

    @property
    def noise_schedule(self) -> NoiseSchedule | None:
        """The schedule inside the actor, or ``None`` where the actor has none."""
        found = (m for m in self.actor.modules() if isinstance(m, NoiseSchedule))
        return next(found, None)

    # What TorchRL asks of a loss.

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of plain slices; what ``forward`` takes as keyword arguments."""
        return outputs.read_keys(self)

    def make_value_estimator(
        self,
        value_type: ValueEstimators | None = None,
        *,
        gamma: float | None = None,
        lmbda: float | None = None,
    ) -> None:
        """Sets ``gamma`` and ``lmbda`` in TorchRL's way; Eq. 8 fixes the estimator."""
        if value_type not in (None, ValueEstimators.TDLambda):
            raise NotImplementedError(
                f"ALMLoss supports value_type=TDLambda only, got {value_type}."
            )
        if gamma is not None:
            self.gamma = check_discount("gamma", gamma)  # type: ignore[assignment]
        if lmbda is not None:
            self.lmbda = check_discount("lmbda", lmbda)  # type: ignore[assignment]

    def reset_parameters_recursive(self) -> None:
        """Draws all parameters anew; targets and parts are as at the start."""
        super().reset_parameters_recursive()
        for part in TARGETS:
            online = getattr(self, f"{part}_params").data
            self._modules[f"target_{part}_params"].data.update_(online)
        for part in (*self.model_terms, self.entropy, self.reward_transform):
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """Nothing to forward: the returns are computed here."""

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> ALMLoss:
        super()._apply(fn)
        tie_networks(self, PARTS)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        tie_networks(self, PARTS)

    def __repr__(self) -> str:
        return outputs.describe(self, PARTS)
