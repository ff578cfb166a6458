"""ALMLoss: every term of Aligned Latent Models as one TorchRL loss module."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor, nn
from torchrl.objectives import ValueEstimators

from alm_torchrl import functional
from alm_torchrl.checks import LARGEST_FLOAT, check_choice, check_number
from alm_torchrl.objectives.inputs import masked_mean
from alm_torchrl.objectives.networks import PARTS
from alm_torchrl.objectives.one_step import Metadata, OneStepTerms

# Metrics of the policy's rollouts.
IMAGINED_KEYS = (
    "imagined_reward",
    "imagined_log_ratio",
    "imagined_value",
    "lambda_return",
)

# Metrics of the entropy bonus.
ENTROPY_KEYS = ("alpha", "entropy")

OUT_KEYS = (
    "loss_model",
    "loss_reward",
    "loss_classifier",
    "loss_qvalue",
    "loss_actor",
    "loss_alpha",
    "kl",
    "model_reward",
    "terminal_value",
    "classifier_accuracy",
    "pred_value",
    "target_value",
    "td_error",
    *IMAGINED_KEYS,
    *ENTROPY_KEYS,
)


class ALMLoss(OneStepTerms):
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
    :func:`~alm_torchrl.modules.make_stochastic_actor` makes one, and any with a
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
        gamma (float): discount per step, in [0, 1). Default: ``0.99``.
        lmbda (float): weight of longer horizons in the policy's return, in [0, 1].
            Default: ``0.95``.
        classifier_coef (float): weight c of the log ratio in the policy's reward.
            Zero removes the classifier, its loss and their cost. Default: ``0.1``.
        kl_coef (float): weight of the KL in ``loss_model``. Zero removes it and its
            cost. Default: ``1.0``.
        value_coef (float): weight of the terminal value in ``loss_model``. Zero
            removes it and its cost. Default: ``1.0``.
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
        TypeError: if a part is no TensorDictModule, or encoder or model are not
            probabilistic; or if, with ``alpha_init``, the actor is not, or has a
            :class:`~alm_torchrl.NoiseSchedule`, whose noise is not learned.
        ValueError: if a coefficient or discount is out of range, ``classifier`` is
            ``None`` with a non-zero ``classifier_coef``, or ``target_entropy`` is given
            without ``alpha_init``.

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
        check_choice("reduction", reduction, (None, "mean", "sum", "none"))
        self.classifier_coef = classifier_coef
        self.kl_coef = kl_coef
        self.value_coef = value_coef
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
        )
        self.register_buffer("gamma", torch.tensor(gamma))
        self.register_buffer("lmbda", torch.tensor(lmbda))
        log_alpha = None
        if alpha_init is not None:
            self._check_stochastic()
            log_alpha = nn.Parameter(torch.tensor(math.log(alpha_init)))
        self.register_parameter("log_alpha", log_alpha)
        absent = {"loss_classifier", "classifier_accuracy", "imagined_log_ratio"}
        absent = absent if self.classifier is None else set()
        absent |= {"kl"} if kl_coef == 0 else set()
        absent |= {"terminal_value"} if value_coef == 0 else set()
        absent |= set(IMAGINED_KEYS) if actor_objective == "qvalue" else set()
        absent |= {"loss_alpha", *ENTROPY_KEYS} if alpha_init is None else set()
        self.out_keys = [key for key in OUT_KEYS if key not in absent]

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
            value_type (ValueEstimators, optional): only ``TDLambda``, the default.
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
        metadata = {"model_reward": masked_mean(reward, mask)}
        if self.kl_coef != 0:
            metadata["kl"] = masked_mean(kl, mask)
        if self.value_coef != 0:
            metadata["terminal_value"] = masked_mean(value, mask)
        return self._reduce(loss, mask), metadata

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
        settings = (
            f"gamma={self.gamma.item():g}, lmbda={self.lmbda.item():g}, "
            f"classifier_coef={self.classifier_coef:g}, kl_coef={self.kl_coef:g}, "
            f"value_coef={self.value_coef:g}, noise_clip={self.noise_clip}, "
            f"actor_objective={self.actor_objective!r}, alpha_init={self.alpha_init}, "
            f"target_entropy={self.target_entropy}, "
            f"discount_model_loss={self.discount_model_loss}"
        )
        return "\n".join([f"{type(self).__name__}(", *lines, f"    {settings}", ")"])


def _check_discount(name: str, value: float) -> float:
    return check_number(name, value, 0, 1, open_high=name == "gamma")
