"""One update of ALM: four optimizers in the authors' order, then the targets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate
from torchrl.trainers import OptimizationStepper, Trainer

from alm_torchrl.checks import check_choice, check_number, check_type
from alm_torchrl.objectives import ALMLoss

__all__ = ["ALMOptimizationStepper", "ALMTargetUpdate", "NonFiniteError"]

# Each step of an update: the loss method, and the parts it trains.
STEPS = (
    ("model_loss", ("encoder", "model")),
    ("reward_classifier_loss", ("reward", "classifier")),
    ("qvalue_loss", ("qvalue",)),
    ("actor_loss", ("actor",)),
)


class NonFiniteError(RuntimeError):
    """Something was NaN or infinite; no parameter changed after it.

    Args:
        term (str): name of the loss, gradient norm or stored entry.
        step (int): update or environment step, counted from 1, in which it happened.

    Keyword Args:
        unit (str): what ``step`` counts. Default: ``"update"``.
        checkpoint (Path, optional): the last checkpoint before it, if there is one.
            Default: ``None``.

    Examples:
        >>> error = NonFiniteError("loss_model", 7)
        >>> error.term, error.step, error.unit
        ('loss_model', 7, 'update')
    """

    def __init__(
        self,
        term: str,
        step: int,
        *,
        unit: Literal["update", "environment step"] = "update",
        checkpoint: Path | None = None,
    ) -> None:
        saved = "" if checkpoint is None else f" Last good checkpoint: {checkpoint}."
        super().__init__(
            f"{term} was not finite in {unit} {step}; no parameter was changed after "
            "it. Check rewards and observations, or lower the learning rate." + saved
        )
        self.term = term
        self.step = step
        self.unit = unit
        self.checkpoint = checkpoint


class ALMTargetUpdate(SoftUpdate):
    """Soft update of the targets that stands still after a failed update.

    Args:
        loss_module (ALMLoss): loss with target parameters.
        tau (float): share of the online parameters, in (0, 1]. Default: ``0.005``.

    Examples:
        >>> from alm_torchrl import make_alm_loss
        >>> loss = make_alm_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> ALMTargetUpdate(loss, tau=0.01).step()
    """

    def __init__(self, loss_module: ALMLoss, *, tau: float = 0.005) -> None:
        super().__init__(loss_module, tau=tau)
        self.failed: Tensor | None = None

    def _step(self, p_source: Tensor, p_target: Tensor) -> None:
        weight: Tensor | float = 1 - self.eps
        if self.failed is not None:
            weight = weight * (~self.failed).to(p_target.dtype)
        p_target.data.lerp_(p_source.data, weight)


class ALMOptimizationStepper(OptimizationStepper):
    """Performs one whole update of ALM, with a Trainer or in a loop of one's own.

    In order: encoder and model; reward and classifier; critics; actor, each with its
    own Adam and its own clip of the global gradient norm; then the targets move.
    (The paper's Algorithm 1 updates the policy earlier; this is the authors' code.)

    Loss and gradient norm of each step are checked on their device. Where one is not
    finite, that optimizer step and all later ones, target updates included, do
    nothing; :meth:`raise_if_nonfinite` reads the verdict. On a CPU it is read in each
    update, elsewhere whoever logs calls it (``make_trainer`` does).

    Args:
        loss (ALMLoss): the loss; without a Trainer its methods are called directly,
            with one through ``trainer.compute_loss``.

    Keyword Args:
        lr (float): learning rate of all four Adams. Default: ``1e-4``.
        clip_norm (float): largest global gradient norm of each step.
            Default: ``100.0``.
        tau (float): share by which targets move towards the online networks.
            Default: ``0.005``.
        precision (str): ``"fp32"`` (the parameters' own) or ``"bf16"``: matrix
            products of the hidden layers in bfloat16 by autocast; parameters, last
            layers, KL, returns, losses and optimizers keep full precision.
            Default: ``"fp32"``.

    Raises:
        ValueError: if ``lr``, ``clip_norm``, ``tau`` or ``precision`` is out of range.
        TypeError: if ``loss`` is no :class:`~alm_torchrl.ALMLoss`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from alm_torchrl import make_alm_loss
        >>> loss = make_alm_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> stepper = ALMOptimizationStepper(loss, lr=1e-3)
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
        >>> metrics = stepper.step(None, slices)
        >>> bool(metrics["grad_norm_actor"] > 0)
        True
    """

    def __init__(
        self,
        loss: ALMLoss,
        *,
        lr: float = 1e-4,
        clip_norm: float = 100.0,
        tau: float = 0.005,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        check_type("loss", loss, ALMLoss)
        lr = check_number("lr", lr, open_low=True)
        clip_norm = check_number("clip_norm", clip_norm, open_low=True)
        tau = check_number("tau", tau, 0, 1, open_low=True)
        check_choice("precision", precision, ("fp32", "bf16"))
        self.loss = loss
        self.clip_norm = clip_norm
        self.precision = precision
        self.target_update = ALMTargetUpdate(loss, tau=tau)
        self.optimizers: dict[str, torch.optim.Adam] = {}
        self._parameters: dict[str, list[nn.Parameter]] = {}
        for method, parts in STEPS:
            params = list(self._part_parameters(parts))
            self._parameters[method] = params
            # Only the fused implementation can skip a step on the device.
            self.optimizers[method] = torch.optim.Adam(params, lr=lr, fused=True)
        device = self._parameters["model_loss"][0].device
        # Update and position (from 1) of the first term that was not finite, or zeros.
        self._failure = torch.zeros(2, dtype=torch.int64, device=device)
        self._terms: list[str] = []
        self._count = 0

    def _part_parameters(self, parts: tuple[str, ...]) -> Iterator[nn.Parameter]:
        for part in parts:
            params = getattr(self.loss, f"{part}_params", None)
            if params is not None:
                yield from params.parameters()

    @property
    def optimizer_step_count(self) -> int:
        """Number of updates made."""
        return self._count

    def step(
        self, trainer: Trainer | None, sub_batch: TensorDictBase
    ) -> TensorDictBase:
        """Makes one update.

        Args:
            trainer (Trainer, optional): the trainer that runs the loop, or ``None``.
            sub_batch (TensorDictBase): two-draw batch or slices ``[B, K]``.

        Returns:
            TensorDict: detached scalars: the losses, their metrics and
            ``grad_norm_*`` before clipping.

        Raises:
            NonFiniteError: on a CPU, if a loss or gradient norm is not finite.
        """
        self._count += 1
        metrics: dict[str, Tensor] = {}
        checked: dict[str, Tensor] = {}
        for method, _ in STEPS:
            with torch.autocast(
                self._failure.device.type, torch.bfloat16, self.precision == "bf16"
            ):
                if trainer is None:
                    value, metadata = getattr(self.loss, method)(sub_batch)
                else:
                    value, metadata = trainer.compute_loss(sub_batch, method=method)
            optimizer = self.optimizers[method]
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            norm = nn.utils.clip_grad_norm_(self._parameters[method], self.clip_norm)
            name = method.removesuffix("_loss")
            if method != "reward_classifier_loss":
                checked[f"loss_{name}"] = value.detach()
            checked.update(
                {key: loss for key, loss in metadata.items() if key.startswith("loss_")}
            )
            checked[f"grad_norm_{name}"] = norm
            metrics.update(metadata)
            # Read by the fused Adam: the step is skipped where it is 1.
            skip = self._check(checked).to(torch.float32)
            optimizer.found_inf = skip  # type: ignore[attr-defined]
            optimizer.step()
        self.target_update.failed = self._failure[0] > 0
        self.target_update.step()
        self._terms = list(checked)
        if self._failure.device.type == "cpu":
            self.raise_if_nonfinite()
        return TensorDict({**metrics, **checked}, batch_size=[])

    def _check(self, checked: dict[str, Tensor]) -> Tensor:
        """Notes the first term that is not finite; True where there ever was one."""
        finite = torch.stack(list(checked.values())).isfinite()
        first = torch.stack(
            [
                torch.full_like(self._failure[0], self._count),
                (~finite).int().argmax() + 1,
            ]
        )
        seen = self._failure[0] > 0
        fails = ~finite.all() & ~seen
        self._failure.copy_(torch.where(fails, first, self._failure))
        return seen | fails

    def raise_if_nonfinite(self) -> None:
        """Raises if any update so far met a value that was not finite.

        Reads one tensor from the device.

        Raises:
            NonFiniteError: naming the first such term and its update.
        """
        step, position = self._failure.tolist()
        if step:
            raise NonFiniteError(self._terms[position - 1], step)

    def state_dict(self) -> dict[str, Any]:
        """State of the four optimizers, the count of updates and any failure."""
        return {
            "optimizers": {k: v.state_dict() for k, v in self.optimizers.items()},
            "count": self._count,
            "failure": self._failure.clone(),
            "terms": self._terms,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` saved."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict["optimizers"][name])
        self._count = state_dict["count"]
        self._failure.copy_(state_dict["failure"])
        self._terms = state_dict["terms"]
