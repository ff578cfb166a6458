"""ALMLoss: the objective of Aligned Latent Models, readable from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, TypeVar, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import (
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictParams,
    TensorDictSequential,
    dispatch,
)
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.functional import cross_entropy
from torch.nn.parameter import is_lazy
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import IndependentNormal
from torchrl.objectives import LossModule, ValueEstimators

from alm_torchrl import functional
from alm_torchrl.checks import check_choice, check_integer, check_number, check_type
from alm_torchrl.networks import AlwaysSample, NoiseSchedule
from alm_torchrl.objectives.batch import (
    masked_mean,
    read_column,
    read_entry,
    read_part,
    read_rows,
    reduce_masked,
)
from alm_torchrl.objectives.latents import (
    Encoding,
    Latents,
    normal_parameters,
    split_dist,
    take_rows,
)
from alm_torchrl.objectives.variants import (
    EntropyBonus,
    Logarithms,
    ModelTerm,
    PolicyObjective,
)

__all__ = ["ALMLoss"]

Metadata = dict[str, Tensor]
Method = TypeVar("Method", bound=Callable[..., Any])

PARTS = ("encoder", "model", "actor", "qvalue", "reward", "classifier")
TARGETS = ("encoder", "qvalue")


def sampling(method: Method) -> Method:
    """Runs a method in the loss's sampling mode, as TorchRL runs ``*_loss`` methods."""

    @wraps(method)
    def wrapped(self: LossModule, *args: object, **kwargs: object) -> object:
        with set_exploration_type(self.deterministic_sampling_mode):
            return method(self, *args, **kwargs)

    return cast("Method", wrapped)


class ALMLoss(LossModule):
    """Aligned Latent Models: encoder, model and policy under one lower bound.

    Presented in "Simplifying Model-based RL: Learning Representations, Latent-space
    Models, and Policies with One Objective", https://arxiv.org/abs/2209.08466.

    =================== ===================================== =====================
    term                what it is                            trains
    =================== ===================================== =====================
    ``loss_model``      KL, reward and K-step value (Eq. 7)   encoder and model
    ``loss_reward``     squared error of r (Eq. 11)           reward
    ``loss_classifier`` cross entropy, real/imagined (Eq. 9)  classifier
    ``loss_qvalue``     one-step TD error (Eq. 10)            critics
    ``loss_actor``      lambda-weighted K-step return (Eq. 8) actor
    =================== ===================================== =====================

    Each term reaches its own parameters only, so one optimizer on the sum sees the
    same gradients as one on each part. Each is also a method that returns
    ``(value, metadata)``. Methods and ``forward`` take the two-draw batch of
    :func:`~alm_torchrl.make_replay_buffer` (``"slice"`` ``[B, K]`` and
    ``"transition"`` ``[B]``) or plain slices ``[B, K]``: then all B*K transitions serve
    the one-step terms and the starts of the policy. The one-step methods take plain
    transitions ``[B]`` too. The horizon K is the length of the slices.

    The terms are written in the verbs of :attr:`latents` (encode, step, act, score,
    imagine). They sample, whatever exploration type surrounds the call; with
    ``deterministic_sampling_mode = ExplorationType.DETERMINISTIC`` each sample is its
    distribution's mean. Masks are found as in every TorchRL loss (``loss_mask_key``);
    a slice with a masked step is dropped whole from ``loss_model``.

    Keyword Args:
        encoder (ProbabilisticTensorDictSequential): ``e(z | s)``, a diagonal Gaussian.
        model (ProbabilisticTensorDictSequential): ``m(z' | z, a)``, likewise.
        actor (TensorDictModule): ``pi(a | z)``.
        qvalue (TensorDictModule): critics, ``[*, N]``; their minimum is the value.
        reward (TensorDictModule): ``r(z, a)``, ``[*, 1]``.
        classifier (TensorDictModule, optional): ``C(z, a, z')``, ``[*, 2]``. May be
            ``None`` where ``classifier_coef`` is zero.
        gamma (float): discount per step, in [0, 1). Default: ``0.99``.
        lmbda (float): weight of longer horizons in the policy's return, in [0, 1].
            Default: ``0.95``.
        classifier_coef (float): weight c of the log ratio in the policy's reward.
            Default: ``0.1``.
        kl_coef (float): weight of the KL in ``loss_model``. Default: ``1.0``.
        value_coef (float): weight of the terminal value in ``loss_model``.
            Default: ``1.0``.
        reward_coef (float): weight of the predicted reward in ``loss_model``.
            Default: ``1.0``. Each coefficient at zero removes its term and its cost.
        noise_clip (float, optional): clip of the action noise inside the losses,
            ``None`` for no clip. Not used with ``entropy``, whose densities are those
            of noise without a clip. Default: ``0.3``.
        discount_model_loss (bool): weight step t of ``loss_model`` by gamma^t and the
            value by gamma^K, as Eq. 7 is printed; the authors' code does not.
            Default: ``False``.
        reward_transform (callable, optional): applied to the rewards of a batch before
            reward model and critics learn them, for example
            :func:`~alm_torchrl.functional.shifted_log` (A.8). Default: ``None``.
        logarithms (Logarithms, optional): logarithms of reward and value.
            Default: ``None``.
        model_terms (sequence of ModelTerm): terms added to ``loss_model``, such as
            ``Reconstruction`` and ``ValuePrediction``. Default: ``()``.
        entropy (EntropyBonus, optional): entropy bonus of the policy; adds
            ``loss_alpha``, which trains its temperature. Default: ``None``.
        policy_objective (PolicyObjective, optional): what the policy maximises, such
            as ``QValueObjective``. Default: ``None``, the lower bound (Eq. 8).
        reduction (str, optional): ``"mean"``, ``"sum"`` or ``"none"``; the last gives
            ``[B]`` for each term (plain slices are averaged over K).
            Default: ``None``, which is ``"mean"``.

    The parts for ``logarithms``, ``model_terms``, ``entropy`` and ``policy_objective``
    are in :mod:`alm_torchrl.objectives.variants`.

    Raises:
        TypeError: if a network is no TensorDictModule, encoder or model are not
            probabilistic, ``reward_transform`` is not callable, a part is of another
            type, or the actor does not learn its noise with ``entropy``.
        ValueError: if a coefficient or discount is out of range, ``classifier`` is
            ``None`` with a non-zero ``classifier_coef``, no term of ``loss_model`` is
            left, or a network is lazy.

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

    @dataclass
    class _AcceptedKeys:
        """Keys that ``set_keys`` accepts.

        Attributes:
            latent: what the networks read as latent; the classifier reads the next
                one under ``("next", latent)``. Default: ``"latent"``.
            action: action. Default: ``"action"``.
            reward: reward under ``"next"``. Default: ``"reward"``.
            terminated: termination under ``"next"``; a time limit is not one.
                Default: ``"terminated"``.
            predicted_reward: output of the reward model.
                Default: ``"predicted_reward"``.
            state_action_value: output of the critics, one entry each.
                Default: ``"state_action_value"``.
            logits: output of the classifier. Default: ``"logits"``.
            imagined: optional boolean entry of the transitions: the rows whose next
                latent comes from the model in the classifier's loss.
                Default: ``"imagined"``.
            slice: slices of a two-draw batch. Default: ``"slice"``.
            transition: transitions of a two-draw batch. Default: ``"transition"``.
        """

        latent: NestedKey = "latent"
        action: NestedKey = "action"
        reward: NestedKey = "reward"
        terminated: NestedKey = "terminated"
        predicted_reward: NestedKey = "predicted_reward"
        state_action_value: NestedKey = "state_action_value"
        logits: NestedKey = "logits"
        imagined: NestedKey = "imagined"
        slice: NestedKey = "slice"
        transition: NestedKey = "transition"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
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
        logarithms: Logarithms | None = None,
        model_terms: Sequence[ModelTerm] = (),
        entropy: EntropyBonus | None = None,
        policy_objective: PolicyObjective | None = None,
        reduction: Literal["mean", "sum", "none"] | None = None,
    ) -> None:
        super().__init__()
        gamma, lmbda = _check_discount("gamma", gamma), _check_discount("lmbda", lmbda)
        # Floats: a tensor cannot be multiplied by a large Python integer.
        self.classifier_coef = check_number("classifier_coef", classifier_coef)
        self.kl_coef = check_number("kl_coef", kl_coef)
        self.value_coef = check_number("value_coef", value_coef)
        self.reward_coef = check_number("reward_coef", reward_coef)
        if noise_clip is not None:
            noise_clip = check_number("noise_clip", noise_clip)
        check_type("discount_model_loss", discount_model_loss, bool)
        if classifier is None and classifier_coef != 0:
            raise ValueError(
                "classifier: expected a network with classifier_coef="
                f"{classifier_coef}, got None."
            )
        if reward_transform is not None and not callable(reward_transform):
            raise TypeError(
                "reward_transform: expected a function of a tensor or None, got "
                f"{type(reward_transform).__name__}."
            )
        if logarithms is not None:
            check_type("logarithms", logarithms, Logarithms)
        check_choice("reduction", reduction, (None, "mean", "sum", "none"))
        self.discount_model_loss = discount_model_loss
        self.reward_transform = reward_transform
        self.logarithms = logarithms
        self.policy_objective = policy_objective
        self.reduction = "mean" if reduction is None else reduction
        networks = {
            "encoder": encoder,
            "model": model,
            "actor": actor,
            "qvalue": qvalue,
            "reward": reward,
            "classifier": classifier if classifier_coef != 0 else None,
        }
        for name, network in networks.items():
            self._bind(name, network)
        terms = [term for term in model_terms if _check_term(term).coef != 0]
        self.model_terms = nn.ModuleList(terms)  # type: ignore[arg-type]
        if entropy is not None:
            check_type("entropy", entropy, EntropyBonus)
            entropy.check_actor(actor)
        self.entropy = entropy
        self.register_buffer("gamma", torch.tensor(gamma))
        self.register_buffer("lmbda", torch.tensor(lmbda))
        self.latents = Latents(
            networks,
            self._modules,
            self.tensor_keys,
            noise_clip=noise_clip if entropy is None else None,
        )
        self.out_keys = self._present_keys()

    # The terms, in the order of an update.

    def model_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metadata]:
        """Encoder and model objective (Eq. 7), averaged over slices.

        ``sum_t (kl_coef kl_t - reward_coef r(z_t, a_t)) - value_coef min Q(z_K, a_K)``
        plus the ``model_terms``; ``logarithms`` changes r and Q.

        Args:
            tensordict (TensorDictBase): two-draw batch or slices ``[B, K]``.

        Returns:
            tuple: the loss, which trains encoder, model and the networks of
            ``model_terms``, and detached means of ``kl``, ``model_reward`` and each
            model term (per step) and of ``terminal_value``; those with a coefficient
            of zero are absent.

        Raises:
            ValueError: if there are no slices ``[B, K]``.
        """
        slices, mask = self._rows(tensordict, self.tensor_keys.slice)
        if slices.ndim != 2:
            raise ValueError(
                "model_loss expects slices with batch size [B, K], alone or under the "
                f"key {self.tensor_keys.slice!r}, got batch size "
                f"{list(slices.batch_size)}."
            )
        mask = None if mask is None else mask.all(1)
        rollout = self.model_rollout(slices)
        latent = rollout["latent"]
        zero = latent.new_zeros(latent.shape[0], latent.shape[1] - 1)
        kl = rollout.get("kl", default=zero)
        reward = rollout.get("reward", default=zero)
        value = rollout.get("terminal_value", default=zero[:, 0])
        gain, end = reward, value
        if self.logarithms is not None:
            gain, end = self.logarithms.in_model_loss(reward, value, self.gamma)
        gamma = self.gamma if self.discount_model_loss else 1.0
        loss = functional.model_objective(
            self.kl_coef * kl, self.reward_coef * gain, self.value_coef * end, gamma
        )
        means = {"kl": kl, "model_reward": reward, "terminal_value": value}
        for term in cast("Sequence[ModelTerm]", self.model_terms):
            steps = term(self, slices, latent)
            loss = loss + term.coef * functional.discounted_sum(steps, gamma)
            means[term.name] = steps
        metadata = {
            name: masked_mean(values, mask)
            for name, values in means.items()
            if name in self.out_keys
        }
        return reduce_masked(loss, mask, self.reduction), metadata

    def reward_loss(
        self,
        tensordict: TensorDictBase,
        encoded: Encoding | None = None,
        latent: Tensor | None = None,
    ) -> tuple[Tensor, Metadata]:
        """Squared error of the reward model on ``z ~ e'(s)`` (Eq. 11).

        The reward is that of the batch after ``reward_transform``.

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.
            encoded (Encoding, optional): what :meth:`encode_transitions` returned.
                Default: ``None``, computed here.
            latent (Tensor, optional): ``z``, ``[N, L]``. Default: ``None``, drawn here.

        Returns:
            tuple: the loss, which trains the reward model, and no metadata.
        """
        transitions, mask, shape = self._transitions(tensordict)
        latent = self._latent(transitions, encoded) if latent is None else latent
        action = transitions[self.tensor_keys.action]
        predicted = self.latents.predict_reward(latent, action, "live")
        error = predicted - self._recorded_reward(transitions, predicted)
        return self._reduce(error.square(), mask, shape), {}

    def classifier_loss(
        self,
        tensordict: TensorDictBase,
        encoded: Encoding | None = None,
        latent: Tensor | None = None,
    ) -> tuple[Tensor, Metadata]:
        """Cross entropy of real against imagined next latents (Eq. 9).

        In a random half of the rows, or where the entry ``imagined`` is true, the next
        latent is the model's. Each row is one or the other; the paper's equation uses
        each row as both.

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.
            encoded (Encoding, optional): what :meth:`encode_transitions` returned.
                Default: ``None``, computed here.
            latent (Tensor, optional): ``z``, ``[N, L]``. Default: ``None``, drawn here.

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
        if encoded is None:
            encoded = self.encode_transitions(transitions)
        latent = self._latent(transitions, encoded) if latent is None else latent
        with torch.no_grad():
            imagined, following = self._mixed_next(transitions, encoded)
        action = transitions[self.tensor_keys.action]
        logits = self.latents.classify(latent, action, following, "live")
        label = (~imagined).long()
        loss = cross_entropy(logits, label, reduction="none")
        correct = (logits.detach().argmax(-1) == label).to(loss.dtype)
        metadata = {"classifier_accuracy": masked_mean(correct.reshape(shape), mask)}
        return self._reduce(loss, mask, shape), metadata

    def reward_classifier_loss(
        self, tensordict: TensorDictBase, encoded: Encoding | None = None
    ) -> tuple[Tensor, Metadata]:
        """Reward and classifier loss together, on one latent as in the authors' code.

        They come from :meth:`reward_loss` and :meth:`classifier_loss`.

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.
            encoded (Encoding, optional): what :meth:`encode_transitions` returned.
                Default: ``None``, computed here.

        Returns:
            tuple: the sum, and its detached parts ``loss_reward`` and
            ``loss_classifier`` with the metadata of the two terms. Without a
            classifier it is the reward loss alone.
        """
        losses, metadata = self._reward_and_classifier(tensordict, encoded)
        metadata.update({name: loss.detach() for name, loss in losses.items()})
        return torch.stack(list(losses.values())).sum(0), metadata

    def qvalue_loss(
        self, tensordict: TensorDictBase, encoded: Encoding | None = None
    ) -> tuple[Tensor, Metadata]:
        """Squared TD error of the critics, averaged over them (Eq. 10).

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.
            encoded (Encoding, optional): what :meth:`encode_transitions` returned.
                Default: ``None``, computed here.

        Returns:
            tuple: the loss, which trains the critics, and detached means of
            ``pred_value``, ``target_value`` and ``td_error`` (absolute).
        """
        transitions, mask, shape = self._transitions(tensordict)
        target = self.td_target(transitions, encoded).unsqueeze(-1)
        latent = self._latent(transitions, encoded)
        action = transitions[self.tensor_keys.action]
        value = self.latents.state_action_value(latent, action, "live")
        error = value - target
        metadata = {
            "pred_value": value.mean(-1),
            "target_value": target.squeeze(-1),
            "td_error": error.abs().mean(-1),
        }
        means = {k: masked_mean(v.reshape(shape), mask) for k, v in metadata.items()}
        return self._reduce(error.square().mean(-1), mask, shape), means

    def actor_loss(
        self,
        tensordict: TensorDictBase,
        encoded: Encoding | None = None,
        horizon: int | None = None,
    ) -> tuple[Tensor, Metadata]:
        """Negative lambda-weighted K-step return of the policy (Eq. 8, A.3).

        ``- mean_t gamma^t G_t`` from ``z_0 ~ e'(s)``, see :meth:`imagine`, or minus
        what the ``policy_objective`` gives.

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.
            encoded (Encoding, optional): what :meth:`encode_transitions` returned.
                Default: ``None``, computed here.
            horizon (int, optional): number of steps K; needed with transitions alone.
                Default: ``None``, the length of the slices.

        Returns:
            tuple: the loss, which trains the actor, and detached means over starts and
            steps of ``imagined_reward``, ``imagined_log_ratio``, ``imagined_value`` and
            ``lambda_return``, or the metrics of the ``policy_objective``.

        Raises:
            ValueError: if the horizon is needed, and neither given nor found.
        """
        if horizon is None:
            key, action_key = self.tensor_keys.slice, self.tensor_keys.action
            steps = read_part(tensordict, key, action_key)[action_key].shape[1:-1]
            horizon = steps[0] if len(steps) == 1 else None
        transitions, mask, shape = self._transitions(tensordict)
        latent = self._latent(transitions, encoded)
        if self.policy_objective is None:
            objective, metrics = self._bound(latent, horizon)
        else:
            objective, metrics = self.policy_objective(self, latent, horizon)
        metadata = {
            name: masked_mean(value.flatten(1).mean(-1).reshape(shape), mask)
            for name, value in metrics.items()
        }
        return -self._reduce(objective, mask, shape), metadata

    def alpha_loss(
        self, tensordict: TensorDictBase, encoded: Encoding | None = None
    ) -> tuple[Tensor, Metadata]:
        """Loss of the entropy bonus's temperature, as in SAC.

        ``- alpha (log pi(a | z) + target_entropy)`` with ``a ~ pi(z)``, ``z ~ e'(s)``.

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.
            encoded (Encoding, optional): what :meth:`encode_transitions` returned.
                Default: ``None``, computed here.

        Returns:
            tuple: the loss, which trains ``entropy.log_alpha``, and detached ``alpha``
            and mean ``entropy``, ``-log pi`` in nats.

        Raises:
            RuntimeError: if the loss has no entropy bonus.
        """
        if self.entropy is None:
            raise RuntimeError("alpha_loss needs an entropy bonus, got entropy=None.")
        transitions, mask, shape = self._transitions(tensordict)
        latent = self._latent(transitions, encoded)
        with torch.no_grad():
            action, log_prob = self.latents.act_and_score(latent)
        loss = self.entropy.alpha_loss(log_prob, action.shape[-1])
        metadata = {
            "alpha": self.entropy.alpha,
            "entropy": masked_mean(-log_prob.reshape(shape), mask),
        }
        return self._reduce(loss, mask, shape), metadata

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """All terms and their metrics.

        Args:
            tensordict (TensorDictBase): two-draw batch or slices ``[B, K]``.

        Returns:
            TensorDict: ``loss_model``, ``loss_reward``, ``loss_classifier``,
            ``loss_qvalue``, ``loss_actor``, with an entropy bonus ``loss_alpha``, and
            the detached metrics of ``self.out_keys``.
        """
        outputs: dict[str, Tensor] = {}
        outputs["loss_model"], metadata = self.model_loss(tensordict)
        encoded = self.encode_transitions(tensordict)
        losses, more = self._reward_and_classifier(tensordict, encoded)
        outputs |= losses
        metadata |= more
        for name in ("qvalue", "actor", "alpha"):
            if name != "alpha" or self.entropy is not None:
                term = getattr(self, f"{name}_loss")
                outputs[f"loss_{name}"], more = term(tensordict, encoded)
                metadata |= more
        self._clear_weakrefs(
            tensordict,
            *(f"{part}_params" for part in PARTS),
            *(f"target_{part}_params" for part in TARGETS),
        )
        return TensorDict({**outputs, **metadata}, batch_size=[])

    # What the terms are computed from.

    @torch.no_grad()
    def encode_transitions(self, tensordict: TensorDictBase) -> Encoding:
        """Runs the target encoder once for all one-step terms and the policy's.

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.

        Returns:
            Encoding: the distributions of the latents before and after each
            transition. Valid until a target network moves.
        """
        transitions, _, _ = self._transitions(tensordict)
        seen = [
            self.latents.observations(rows)
            for rows in (transitions, read_entry(transitions, "next"))
        ]
        halves = split_dist(self.latents.encode(torch.cat(seen)))
        return Encoding(*(halves or map(self.latents.encode, seen)))

    @sampling
    def model_rollout(self, slices: TensorDictBase) -> TensorDict:
        """Rolls the live model along the recorded actions of slices (Eq. 7).

        Args:
            slices (TensorDictBase): ``[B, K]``.

        Returns:
            TensorDict: batch size ``[B]``, with ``latent`` ``[B, K+1, L]`` and, where
            its coefficient is not zero, ``reward`` ``[B, K]``, ``kl`` ``[B, K]`` and
            ``terminal_value`` ``[B]``. The gradient reaches encoder and model.
        """
        action = read_entry(slices, self.tensor_keys.action)
        first = self.latents.observations(slices)[:, 0]
        latents = [self.latents.sample(self.latents.encode(first, "live"))]
        dists = []
        for action_t in action.unbind(1):
            dists.append(self.latents.step(latents[-1], action_t, "live"))
            latents.append(self.latents.sample(dists[-1]))
        latent = torch.stack(latents, 1)
        rollout = TensorDict(latent=latent, batch_size=[action.shape[0]])
        if self.reward_coef != 0:
            rollout["reward"] = self.latents.predict_reward(latent[:, :-1], action)
        if self.kl_coef != 0:
            with torch.no_grad():
                target = self.latents.encode(read_entry(slices, "next"))
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
                last_action = self.latents.act(latents[-1])
            value = self.latents.state_action_value(latents[-1], last_action)
            rollout["terminal_value"] = value.amin(-1)
        return rollout

    @sampling
    def imagine(self, latent: Tensor, horizon: int) -> TensorDict:
        """Rolls the policy out in the latent model and scores it (Eq. 8, A.3).

        The gradient reaches the actor's parameters through the actions and the chain
        of latents; every other network is frozen. The actor sees latents without
        gradient, the critics see actions without gradient.

        With an entropy bonus, ``- alpha log pi`` of its action is added to each reward
        and each value of the return. In a value it has no gradient either.

        Args:
            latent (Tensor): start ``z_0``, ``[B, L]``.
            horizon (int): number of steps K, at least 1.

        Returns:
            TensorDict: batch size ``[B]``, with ``latent`` ``[B, K+1, L]``, ``action``
            ``[B, K+1, A]``, ``reward`` and ``log_ratio`` ``[B, K]`` for t = 0..K-1
            (the log ratio is zero without a classifier), ``value`` ``[B, K]`` for
            t = 1..K, and ``lambda_return`` ``[B, K]``. With an entropy bonus also
            ``log_prob`` ``[B, K+1]``, and ``value`` contains the bonus.
        """
        bonus = self.entropy
        z, a, log_prob = self.latents.imagine(
            latent, horizon, log_prob=bonus is not None
        )
        reward, log_ratio = self.latents.score(z, a[:, :-1])
        value = self.latents.state_action_value(z[:, 1:], a[:, 1:].detach()).amin(-1)
        gain, end = self._in_return(reward, value)
        total = gain + self.classifier_coef * log_ratio
        if bonus is not None and log_prob is not None:
            later = log_prob[:, 1:].detach()
            total = bonus.add(total, log_prob[:, :-1])
            value, end = bonus.add(value, later), bonus.add(end, later)
        rollout = TensorDict(
            latent=z,
            action=a,
            reward=reward,
            log_ratio=log_ratio,
            value=value,
            lambda_return=functional.lambda_return(total, end, self.gamma, self.lmbda),
            batch_size=[latent.shape[0]],
        )
        return rollout if log_prob is None else rollout.set("log_prob", log_prob)

    @sampling
    @torch.no_grad()
    def td_target(
        self, transitions: TensorDictBase, encoded: Encoding | None = None
    ) -> Tensor:
        """Target of the critics (Eq. 10), with the target networks' minimum.

        ``R + gamma (1 - terminated) min_i Q'_i(z', pi(z'))`` with ``z' ~ e'(s')`` and
        R after ``reward_transform``; with an entropy bonus, of
        ``min_i Q'_i(z', a') - alpha log pi(a' | z')``.

        Args:
            transitions (TensorDictBase): ``[*]``.
            encoded (Encoding, optional): what :meth:`encode_transitions` returned, for
                transitions ``[N]``. Default: ``None``, computed here.

        Returns:
            Tensor: ``[*]``, without gradient.
        """
        following = read_entry(transitions, "next")
        dist = self.latents.encode(following) if encoded is None else encoded.next
        latent = self.latents.sample(dist)
        if self.entropy is None:
            action = self.latents.act(latent)
            value = self.latents.state_action_value(latent, action, "target").amin(-1)
        else:
            action, log_prob = self.latents.act_and_score(latent)
            value = self.latents.state_action_value(latent, action, "target").amin(-1)
            value = self.entropy.add(value, log_prob)
        reward = self._recorded_reward(transitions, value)
        terminated = read_column(following, self.tensor_keys.terminated, value)
        discount = self.gamma * (1 - terminated.to(value.dtype))
        return functional.td_target(reward, discount, value)

    @sampling
    @torch.no_grad()
    def lower_bound(self, transitions: TensorDictBase, horizon: int) -> Tensor:
        """K-step estimate of the lower bound for given first actions (Fig. 4, 8).

        ``sum_{t<K} gamma^t (r(z_t, a_t) + c log ratio_t) + gamma^K min Q(z_K, a_K)``
        from ``z_0 ~ e'(s)``, with the given first action and the actor's mean, not
        clamped, afterwards. With ``Logarithms("bound")`` and ``classifier_coef=1`` it
        is L^K of Theorem 3.1, and ``exp(L^K) / (1 - gamma)`` bounds the return.

        Args:
            transitions (TensorDictBase): observations and first actions, ``[B]``.
            horizon (int): number of steps K, at least 1.

        Returns:
            Tensor: the estimate for each row, ``[B]``, without gradient.
        """
        check_integer("horizon", horizon)
        latents = [self.latents.sample(self.latents.encode(transitions))]
        actions = [read_entry(transitions, self.tensor_keys.action)]
        for _ in range(horizon):
            dist = self.latents.step(latents[-1], actions[-1])
            latents.append(self.latents.sample(dist))
            actions.append(self.latents.mean_action(latents[-1]))
        z, a = torch.stack(latents, 1), torch.stack(actions, 1)
        reward, log_ratio = self.latents.score(z, a[:, :-1])
        value = self.latents.state_action_value(z[:, -1], a[:, -1]).amin(-1)
        gain, end = self._in_return(reward, value)
        return functional.k_step_bound(
            gain + self.classifier_coef * log_ratio, end, self.gamma
        )

    def acting_policy(self) -> TensorDictSequential:
        """The policy that acts: online encoder, then actor.

        It shares the loss's modules, so it follows every update. The latent is always
        sampled; the action is the actor's mean under a deterministic exploration type
        and carries noise, not clipped, under a random one.

        Returns:
            TensorDictSequential: reads the encoder's ``in_keys``, writes the action.

        Raises:
            KeyError: if the encoder does not write what the actor reads, or the actor
                writes no action.
        """
        key = self.tensor_keys.action
        for part, written, needed in (
            ("encoder", self.encoder.out_keys, self.actor.in_keys),
            ("actor", self.actor.out_keys, [key]),
        ):
            missing = [entry for entry in needed if unravel_key(entry) not in written]
            if missing:
                raise KeyError(
                    f"{part}: expected the outputs {missing}, got {written}."
                )
        return TensorDictSequential(
            AlwaysSample(self.encoder), self.actor, selected_out_keys=[key]
        )

    @property
    def noise_schedule(self) -> NoiseSchedule | None:
        """The schedule inside the actor, or ``None`` where the actor has none."""
        for module in self.actor.modules():
            if isinstance(module, NoiseSchedule):
                return module
        return None

    def _bound(
        self, latent: Tensor, horizon: int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The lower bound of the policy, ``[N]``, and its metrics ``[N, K]``."""
        if horizon is None:
            raise ValueError(
                "actor_loss: expected slices [B, K] or a horizon >= 1, got transitions "
                "and horizon=None."
            )
        rollout = self.imagine(latent, horizon)
        objective = functional.discounted_mean(rollout["lambda_return"], self.gamma)
        names = ["reward", "value"] + ["log_ratio"] * (self.classifier is not None)
        metrics = {f"imagined_{name}": rollout[name] for name in names}
        return objective, metrics | {"lambda_return": rollout["lambda_return"]}

    def _in_return(self, reward: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Reward and value as they enter the policy's return and the bound."""
        if self.logarithms is None:
            return reward, value
        return self.logarithms.in_return(reward, value, self.gamma)

    def _recorded_reward(self, transitions: TensorDictBase, like: Tensor) -> Tensor:
        """The reward of transitions [*] as reward model and critics learn it, [*]."""
        following = read_entry(transitions, "next")
        reward = read_column(following, self.tensor_keys.reward, like)
        return (
            reward if self.reward_transform is None else self.reward_transform(reward)
        )

    @torch.no_grad()
    def _latent(self, transitions: TensorDictBase, encoded: Encoding | None) -> Tensor:
        """``z ~ e'(s)``, ``[N, L]``."""
        dist = self.latents.encode(transitions) if encoded is None else encoded.now
        return self.latents.sample(dist)

    def _reward_and_classifier(
        self, tensordict: TensorDictBase, encoded: Encoding | None
    ) -> tuple[dict[str, Tensor], Metadata]:
        """Both losses on one latent, and their metadata."""
        if encoded is None:
            encoded = self.encode_transitions(tensordict)
        latent = self.latents.sample(encoded.now)
        losses: dict[str, Tensor] = {}
        losses["loss_reward"], metadata = self.reward_loss(tensordict, encoded, latent)
        if self.classifier is not None:
            losses["loss_classifier"], more = self.classifier_loss(
                tensordict, encoded, latent
            )
            metadata = {**metadata, **more}
        return losses, metadata

    def _mixed_next(
        self, transitions: TensorDictBase, encoded: Encoding
    ) -> tuple[Tensor, Tensor]:
        """Which next latents are imagined, [N], and the next latents, [N, L]."""
        keys, latents = self.tensor_keys, self.latents
        action = transitions[keys.action]
        if transitions.get(keys.imagined, default=None) is None:
            # Each row runs through one of the networks only.
            rank = torch.rand(action.shape[0], device=action.device).argsort()
            half, rest = rank.argsort().tensor_split([action.shape[0] // 2])
            real = self._sample_rows(encoded.next, rest)
            # The authors imagine from a latent of its own, not that of the reward.
            latent = latents.sample(encoded.now)
            imagined = latents.sample(latents.step(latent[half], action[half]))
            return rank < len(half), torch.cat([imagined, real])[rank]
        real = latents.sample(encoded.next)
        latent = latents.sample(encoded.now)
        imagined = latents.sample(latents.step(latent, action))
        chosen = read_column(transitions, keys.imagined, latent)
        if chosen.dtype != torch.bool:
            raise ValueError(
                f"tensordict: expected booleans {keys.imagined!r}, got {chosen.dtype}."
            )
        return chosen, torch.where(chosen.unsqueeze(-1), imagined, real)

    def _sample_rows(self, dist: Distribution, rows: Tensor) -> Tensor:
        """Samples of some rows of a distribution."""
        if type(dist) is not IndependentNormal:
            return self.latents.sample(dist)[rows]
        return self.latents.sample(take_rows(dist, rows))

    # Batches.

    def _rows(
        self, tensordict: TensorDictBase, key: NestedKey
    ) -> tuple[TensorDictBase, Tensor | None]:
        action_key = self.tensor_keys.action
        return read_rows(tensordict, key, action_key, self._loss_mask_keys())

    def _transitions(
        self, tensordict: TensorDictBase
    ) -> tuple[TensorDictBase, Tensor | None, torch.Size]:
        """Transitions [N] without masked values, which count, and the input's shape."""
        transitions, mask = self._rows(tensordict, self.tensor_keys.transition)
        shape = transitions.batch_size
        if len(shape) not in (1, 2):
            raise ValueError(
                "the one-step terms expect transitions [B] or slices [B, K], got batch "
                f"size {list(shape)}."
            )
        return transitions.reshape(-1), mask, shape

    def _reduce(self, loss: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
        return reduce_masked(loss.reshape(shape), mask, self.reduction)

    # What TorchRL asks of a loss.

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

    def make_value_estimator(
        self, value_type: ValueEstimators | None = None, **hyperparams: float
    ) -> None:
        """Sets ``gamma`` and ``lmbda`` in TorchRL's way.

        Args:
            value_type (ValueEstimators, optional): ``TDLambda``. Default: ``None``.
            **hyperparams (float): ``gamma`` and ``lmbda``.

        Raises:
            NotImplementedError: for any other estimator: Eq. 8 and A.3 fix it.
            TypeError: for any other hyperparameter.
            ValueError: if a value is out of range.
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
            setattr(self, name, _check_discount(name, value))

    def reset_parameters_recursive(self) -> None:
        """Draws all parameters anew; targets and parts are as at the start."""
        super().reset_parameters_recursive()
        for part in TARGETS:
            online = getattr(self, f"{part}_params").data
            self._modules[f"target_{part}_params"].data.update_(online)
        for part in (*self.model_terms, self.entropy):
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """Nothing to forward: the returns are computed here."""

    def _present_keys(self) -> list[str]:
        """The losses and metrics that this loss computes, in order."""
        model = {
            "kl": self.kl_coef,
            "model_reward": self.reward_coef,
            "terminal_value": self.value_coef,
        }
        present = [name for name, coef in model.items() if coef != 0]
        present += [str(term.name) for term in self.model_terms]
        if not present:
            raise ValueError(
                "kl_coef, reward_coef, value_coef: expected one that is not 0, or a "
                "term in model_terms, or loss_model is empty, got 0."
            )
        classifier = [""] if self.classifier is not None else []
        alpha = [] if self.entropy is None else ["loss_alpha"]
        if self.policy_objective is not None:
            imagined = list(self.policy_objective.metrics)
        else:
            imagined = ["imagined_reward", *(classifier and ["imagined_log_ratio"])]
            imagined += ["imagined_value", "lambda_return"]
        return [
            *("loss_model", "loss_reward", *(classifier and ["loss_classifier"])),
            *("loss_qvalue", "loss_actor", *alpha),
            *present,
            *(classifier and ["classifier_accuracy"]),
            *("pred_value", "target_value", "td_error"),
            *imagined,
            *(EntropyBonus.metrics if alpha else ()),
        ]

    def _bind(self, name: str, network: TensorDictModuleBase | None) -> None:
        """Takes a network and its parameters, in TorchRL's way."""
        if network is None:
            self.__dict__[name] = None
            return
        if not isinstance(network, TensorDictModuleBase):
            raise TypeError(
                f"{name} must be a TensorDictModule, got {type(network).__name__}."
            )
        if name in ("encoder", "model") and not hasattr(network, "get_dist"):
            raise TypeError(
                f"{name} must be probabilistic (have get_dist), for example a "
                f"ProbabilisticTensorDictSequential, got {type(network).__name__}."
            )
        if any(is_lazy(parameter) for parameter in network.parameters()):
            raise ValueError(
                f"{name}: expected parameters of known shape, got a lazy module; "
                "call it once on a batch first."
            )
        self.convert_to_functional(network, name, create_target_params=name in TARGETS)
        params = getattr(self, f"{name}_params")
        if not isinstance(params, TensorDictParams):
            # TorchRL keeps no module for a network without parameters.
            setattr(self, f"{name}_params", TensorDictParams(params))

    def _tie(self) -> None:
        """Makes the networks hold the parameters and buffers of the loss itself."""
        self._erase_cache()
        for part in PARTS:
            network = self.__dict__.get(part)
            if network is not None:
                self._modules[f"{part}_params"].to_module(network)

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> ALMLoss:
        # Parameters are cast in place, but buffers (the noise schedule) replaced.
        super()._apply(fn)
        self._tie()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copying and unpickling separate the networks from the parameters.
        super().__setstate__(state)
        self._tie()

    def __repr__(self) -> str:
        counts = {
            part: sum(p.numel() for p in getattr(self, f"{part}_params").parameters())
            for part in PARTS
            if self.__dict__[part] is not None
        }
        lines = [f"    {part:<10} {n:>11,} parameters" for part, n in counts.items()]
        settings = {
            name: f"{float(getattr(self, name)):g}"
            for name in (
                *("gamma", "lmbda", "classifier_coef"),
                *("kl_coef", "value_coef", "reward_coef"),
            )
        }
        settings["noise_clip"] = str(self.latents.noise_clip)
        settings["discount_model_loss"] = str(self.discount_model_loss)
        transform = self.reward_transform
        if transform is not None:
            settings["reward_transform"] = getattr(
                transform, "__name__", str(transform)
            )
        for name in ("logarithms", "entropy", "policy_objective"):
            if getattr(self, name) is not None:
                settings[name] = repr(getattr(self, name))
        if len(self.model_terms):
            terms = (f"{type(t).__name__}(coef={t.coef})" for t in self.model_terms)
            settings["model_terms"] = f"[{', '.join(terms)}]"
        listed = ", ".join(f"{name}={value}" for name, value in settings.items())
        return "\n".join([f"{type(self).__name__}(", *lines, f"    {listed}", ")"])


def _check_discount(name: str, value: float) -> float:
    return check_number(name, value, 0, 1, open_high=name == "gamma")


def _check_term(term: ModelTerm) -> ModelTerm:
    is_term = isinstance(term, nn.Module) and hasattr(term, "name")
    if not (is_term and hasattr(term, "coef")):
        raise TypeError(
            "model_terms: expected modules with a name and a coef, such as "
            f"Reconstruction, got {type(term).__name__}."
        )
    return term
