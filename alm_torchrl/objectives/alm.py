"""ALMLoss: every term of Aligned Latent Models as one TorchRL loss module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor, nn
from torchrl.objectives import ValueEstimators

from alm_torchrl import functional
from alm_torchrl.checks import LARGEST_FLOAT, check_choice, check_number
from alm_torchrl.objectives.inputs import masked_mean
from alm_torchrl.objectives.model_terms import ModelTerms
from alm_torchrl.objectives.networks import PARTS
from alm_torchrl.objectives.one_step import Metadata
from alm_torchrl.objectives.outputs import present_keys

# Arguments that are shown where they are not these defaults.
VARIANTS = {
    "reward_coef": 1.0,
    "reconstruction_coef": 0.0,
    "log_terms": "none",
    "value_prediction": "none",
    "value_prediction_coef": 1.0,
    "actor_objective": "bound",
    "alpha_init": None,
    "target_entropy": None,
}


class ALMLoss(ModelTerms):
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
    ``loss_alpha``     entropy against its target, if asked   log_alpha
    ================== ====================================== =====================

    Each term reaches its own parameters only, so one optimizer on the sum sees the
    same gradients as one on each part. Each is also a method that returns
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

    With ``alpha_init`` the policy is rewarded for its entropy as in SAC
    (https://arxiv.org/abs/1812.05905). So does the paper's ALM-ENT (Table 5), the loss
    of which was not published. Here ``- alpha log pi(a | z)`` is added wherever the
    reward or value of an action enters the policy's return or the critics' target, so
    that the critics' values contain all later bonuses; a loss of its own tunes
    ``alpha``. The actor must learn its noise:
    :func:`~alm_torchrl.make_stochastic_actor` makes one, and any with a
    reparameterised distribution that has a density will do, such as
    :class:`torchrl.modules.TanhNormal`.

    Keyword Args:
        encoder (ProbabilisticTensorDictSequential): ``e(z | s)``, a diagonal Gaussian.
        model (ProbabilisticTensorDictSequential): ``m(z' | z, a)``, likewise.
        actor (TensorDictModule): ``pi(a | z)``.
        qvalue (TensorDictModule): critics, ``[*, N]``; their minimum is the value.
        reward (TensorDictModule): ``r(z, a)``, ``[*, 1]``.
        classifier (TensorDictModule, optional): ``C(z, a, z')``, ``[*, 2]``. May be
            ``None`` where ``classifier_coef`` is zero.
        decoder (TensorDictModule, optional): ``d(s | z)``, the mean of a unit Gaussian
            over the encoder's ``in_keys``, one after the other. Trained with encoder
            and model by ``loss_model``, where ``reconstruction_coef`` is not zero.
            Default: ``None``.
        gamma (float): discount per step, in [0, 1). Default: ``0.99``.
        lmbda (float): weight of longer horizons in the policy's return, in [0, 1].
            Default: ``0.95``.
        classifier_coef (float): weight c of the log ratio in the policy's reward.
            Zero removes the classifier, its loss and their cost. Default: ``0.1``.
        kl_coef (float): weight of the KL in ``loss_model``. Zero removes it and its
            cost. Default: ``1.0``.
        value_coef (float): weight of the terminal value in ``loss_model``. Zero
            removes it and its cost. Default: ``1.0``.
        reward_coef (float): weight of the predicted reward in ``loss_model``. Zero
            removes it there and its cost. Default: ``1.0``.
        reconstruction_coef (float): weight of the reconstruction in ``loss_model``.
            Zero removes the decoder and its cost. With ``reward_coef=0`` and
            ``value_coef=0``, encoder and model are learned by maximum likelihood
            (Fig. 15). Default: ``0.0``.
        reward_transform (callable, optional): applied to the rewards of a batch before
            reward model and critics learn them, for example
            :func:`~alm_torchrl.functional.shifted_log` (A.8). Default: ``None``.
        log_terms (str): where logarithms are taken, floored as in
            :func:`~alm_torchrl.functional.floored_log`. ``"model"``: of the predicted
            reward in ``loss_model`` (Fig. 12). ``"bound"``: as in Theorem 3.1,
            ``(1 - gamma) log r`` and ``log (1 - gamma) Q`` for reward and value in
            ``loss_model``, in the policy's return and in :meth:`lower_bound`; metrics
            stay without. Default: ``"none"``.
        value_prediction (str): whose latents shall predict the value in ``loss_model``
            too: ``"encoder"`` adds the squared TD error of ``min Q`` at z_0 (Fig. 18),
            ``"model"`` at z_0 to z_{K-1} (Fig. 19). The critics are frozen in it.
            Default: ``"none"``.
        value_prediction_coef (float): weight of that term. Default: ``1.0``; the paper
            names none.
        noise_clip (float, optional): clip of the action noise inside the losses,
            ``None`` for no clip. Not applied with ``alpha_init``, since the densities
            are those of noise without a clip. Default: ``0.3``.
        actor_objective (str): what the policy maximises: ``"bound"``, the lower bound
            (Eq. 8), or ``"qvalue"``, the critics' value of its action, which is TD3's
            objective on ALM's representation (Fig. 5c). With the latter nothing reads
            the classifier: ``classifier_coef=0`` spares its cost. Default: ``"bound"``.
        alpha_init (float, optional): temperature of the entropy bonus at the start,
            positive. Default: ``None``, no bonus.
        target_entropy (float, optional): entropy that the temperature keeps, in nats.
            Default: ``None``, minus the number of actions.
        discount_model_loss (bool): weight step t of ``loss_model`` by gamma^t and the
            value by gamma^K, as Eq. 7 prints it; the authors' code does not.
            Default: ``False``.
        reduction (str, optional): ``"mean"``, ``"sum"`` or ``"none"``; the last gives
            ``[B]`` for each term (plain slices are averaged over K).
            Default: ``None``, which is ``"mean"``.

    Raises:
        TypeError: if a part is no TensorDictModule, encoder or model are not
            probabilistic, or ``reward_transform`` is not callable; or if, with
            ``alpha_init``, the actor is not probabilistic, or has a
            :class:`~alm_torchrl.NoiseSchedule`, whose noise is not learned.
        ValueError: if a coefficient or discount is out of range, ``classifier`` is
            ``None`` with a non-zero ``classifier_coef``, likewise the decoder, no term
            of ``loss_model`` is left, ``target_entropy`` is given without
            ``alpha_init``, or a part is lazy, its shapes being unknown.

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

        The objective of the theory, L^K, in place of that of the experiments (for
        positive rewards):

        >>> theory = make_alm_loss(
        ...     observation_dim=3,
        ...     action_low=[-1.0],
        ...     action_high=[1.0],
        ...     hidden_dim=8,
        ...     log_terms="bound",
        ...     discount_model_loss=True,
        ...     classifier_coef=1.0,
        ... )
        >>> updater = SoftUpdate(theory, tau=0.005)
        >>> theory.lower_bound(slices[:, 0], horizon=2).shape
        torch.Size([4])
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
        decoder: TensorDictModuleBase | None = None,
        gamma: float = 0.99,
        lmbda: float = 0.95,
        classifier_coef: float = 0.1,
        kl_coef: float = 1.0,
        value_coef: float = 1.0,
        reward_coef: float = 1.0,
        reconstruction_coef: float = 0.0,
        reward_transform: Callable[[Tensor], Tensor] | None = None,
        log_terms: Literal["none", "model", "bound"] = "none",
        value_prediction: Literal["none", "encoder", "model"] = "none",
        value_prediction_coef: float = 1.0,
        noise_clip: float | None = 0.3,
        actor_objective: Literal["bound", "qvalue"] = "bound",
        alpha_init: float | None = None,
        target_entropy: float | None = None,
        discount_model_loss: bool = False,
        reduction: Literal["mean", "sum", "none"] | None = None,
    ) -> None:
        super().__init__()
        gamma, lmbda = _check_discount("gamma", gamma), _check_discount("lmbda", lmbda)
        # Floats: a tensor cannot be multiplied by a large Python integer.
        classifier_coef = check_number("classifier_coef", classifier_coef)
        kl_coef = check_number("kl_coef", kl_coef)
        value_coef = check_number("value_coef", value_coef)
        reward_coef = check_number("reward_coef", reward_coef)
        reconstruction_coef = check_number("reconstruction_coef", reconstruction_coef)
        value_prediction_coef = check_number(
            "value_prediction_coef", value_prediction_coef
        )
        if noise_clip is not None:
            noise_clip = check_number("noise_clip", noise_clip)
        if alpha_init is not None:
            alpha_init = check_number("alpha_init", alpha_init, open_low=True)
        if target_entropy is not None:
            target_entropy = check_number(
                "target_entropy", target_entropy, -LARGEST_FLOAT
            )
            if alpha_init is None:
                raise ValueError(
                    "target_entropy: expected None with alpha_init=None, got "
                    f"{target_entropy}."
                )
        if classifier is None and classifier_coef != 0:
            raise ValueError(
                "classifier may be None only with classifier_coef=0, got "
                f"classifier_coef={classifier_coef}."
            )
        check_choice("actor_objective", actor_objective, ("bound", "qvalue"))
        if decoder is None and reconstruction_coef != 0:
            raise ValueError(
                "decoder may be None only with reconstruction_coef=0, got "
                f"reconstruction_coef={reconstruction_coef}."
            )
        if reward_transform is not None and not callable(reward_transform):
            raise TypeError(
                "reward_transform: expected a function of a tensor or None, got "
                f"{type(reward_transform).__name__}."
            )
        check_choice("value_prediction", value_prediction, ("none", "encoder", "model"))
        check_choice("log_terms", log_terms, ("none", "model", "bound"))
        check_choice("reduction", reduction, (None, "mean", "sum", "none"))
        self.classifier_coef = classifier_coef
        self.kl_coef = kl_coef
        self.value_coef = value_coef
        self.reward_coef = reward_coef
        self.reconstruction_coef = reconstruction_coef
        self.reward_transform = reward_transform
        self.log_terms = log_terms
        self.value_prediction = value_prediction
        self.value_prediction_coef = value_prediction_coef
        self.noise_clip = noise_clip
        self.actor_objective = actor_objective
        self.alpha_init = alpha_init
        self.target_entropy = target_entropy
        self.discount_model_loss = discount_model_loss
        self.reduction = "mean" if reduction is None else reduction
        self._bind(
            encoder=encoder,
            model=model,
            actor=actor,
            qvalue=qvalue,
            reward=reward,
            classifier=classifier if classifier_coef != 0 else None,
            decoder=decoder if reconstruction_coef != 0 else None,
        )
        self.register_buffer("gamma", torch.tensor(gamma))
        self.register_buffer("lmbda", torch.tensor(lmbda))
        log_alpha = None
        if alpha_init is not None:
            self._check_stochastic()
            log_alpha = nn.Parameter(torch.tensor(math.log(alpha_init)))
        self.register_parameter("log_alpha", log_alpha)
        self.out_keys = present_keys(self)

    def _check_stochastic(self) -> None:
        got = None
        if not hasattr(self.actor, "get_dist"):
            got = type(self.actor).__name__
        elif self.noise_schedule is not None:
            got = "one with a NoiseSchedule"
        if got is not None:
            raise TypeError(
                "actor: expected one that learns its noise (probabilistic, without "
                "NoiseSchedule, as of make_stochastic_actor) with alpha_init, got "
                f"{got}."
            )

    def reset_parameters_recursive(self) -> None:
        """Draws all parameters anew; targets and temperature are as at the start."""
        super().reset_parameters_recursive()
        if self.log_alpha is not None and self.alpha_init is not None:
            self.log_alpha.data.fill_(math.log(self.alpha_init))

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

    def actor_loss(
        self, tensordict: TensorDictBase, horizon: int | None = None
    ) -> tuple[Tensor, Metadata]:
        """Negative lambda-weighted K-step return of the policy (Eq. 8, A.3).

        ``- mean_t gamma^t G_t`` from ``z_0 ~ e'(s)``; see :meth:`imagine`. With
        ``actor_objective="qvalue"``: ``- min_i Q_i(z_0, pi(z_0))``; see
        :meth:`policy_value`. Both contain the entropy bonus, where there is one.

        Args:
            tensordict (TensorDictBase): two-draw batch, slices or transitions.
            horizon (int, optional): number of steps K; needed with transitions alone,
                and not read with ``actor_objective="qvalue"``.
                Default: ``None``, the length of the slices.

        Returns:
            tuple: the loss, which trains the actor, and detached means over starts and
            steps of ``imagined_reward``, ``imagined_log_ratio``, ``imagined_value`` and
            ``lambda_return``, which there are not with ``actor_objective="qvalue"``.

        Raises:
            ValueError: if the horizon is neither given nor found.
        """
        bound = self.actor_objective == "bound"
        steps = self._horizon(tensordict, horizon) if bound else 0
        transitions, mask, shape = self._transitions(tensordict)
        _, latent = self._encoded(transitions)
        if not bound:
            return -self._reduce(self.policy_value(latent), mask, shape), {}
        rollout = self.imagine(latent, steps)
        objective = functional.discounted_mean(rollout["lambda_return"], self.gamma)
        names = ["reward", "value"] + ["log_ratio"] * (self.classifier is not None)
        means = {f"imagined_{name}": rollout[name] for name in names}
        means["lambda_return"] = rollout["lambda_return"]
        metadata = {
            name: masked_mean(value.mean(-1).reshape(shape), mask)
            for name, value in means.items()
        }
        return -self._reduce(objective, mask, shape), metadata

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
        model, metadata = self.model_loss(tensordict)
        encoded = self.encode_transitions(tensordict)
        losses, extra = self._reward_classifier(encoded)
        qvalue, qvalue_metadata = self.qvalue_loss(encoded)
        actor, actor_metadata = self.actor_loss(encoded)
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
        if self.log_alpha is not None:
            outputs["loss_alpha"], alpha_metadata = self.alpha_loss(encoded)
            outputs.update(alpha_metadata)
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
        # An entropy bonus has no use for a clip.
        clip = f"noise_clip={self.noise_clip}, " if self.log_alpha is None else ""
        settings = (
            f"gamma={self.gamma.item():g}, lmbda={self.lmbda.item():g}, "
            f"classifier_coef={self.classifier_coef:g}, kl_coef={self.kl_coef:g}, "
            f"value_coef={self.value_coef:g}, {clip}"
            f"discount_model_loss={self.discount_model_loss}"
        )
        if self.reward_transform is not None:
            name = getattr(self.reward_transform, "__name__", self.reward_transform)
            settings += f", reward_transform={name}"
        for variant, default in VARIANTS.items():
            if (value := getattr(self, variant)) != default:
                settings += f", {variant}={value}"
        return "\n".join([f"{type(self).__name__}(", *lines, f"    {settings}", ")"])


def _check_discount(name: str, value: float) -> float:
    return check_number(name, value, 0, 1, open_high=name == "gamma")
