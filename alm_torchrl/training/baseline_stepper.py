"""The updates of TD3, SAC and REDQ that belong to one environment step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate
from torchrl.trainers import OptimizationStepper, Trainer

from alm_torchrl.baselines.losses import BaselineLoss
from alm_torchrl.checks import check_number, check_type
from alm_torchrl.training.state_checks import check_stepper
from alm_torchrl.training.stepper import NonFiniteError, deepcopy_stepper

__all__ = ["BaselineOptimizationStepper"]


class BaselineOptimizationStepper(OptimizationStepper):
    """Makes the updates that belong to one environment step.

    ``loss.updates_per_step`` times: the critics on a batch of their own, then the
    targets. On the last of these batches, before the targets, the actor and then the
    temperature, if there is one. With ``loss.policy_delay`` above 1, actor and
    targets wait for every so many calls. Critics, actor and temperature each have
    their own Adam and their own clip of the global gradient norm.

    A loss or gradient norm that is not finite raises before its optimizer steps.

    Args:
        loss (BaselineLoss): the loss. Its targets become copies of the online networks.

    Keyword Args:
        lr (float): learning rate of all Adams. Default: ``1e-4``.
        clip_norm (float): largest global gradient norm of each. Default: ``100.0``.
        tau (float): share by which targets move towards the online networks.
            Default: ``0.005``.

    Raises:
        ValueError: if ``lr``, ``clip_norm`` or ``tau`` is out of range.
        TypeError: if ``loss`` is no :class:`BaselineLoss`.

    Examples:
        >>> from alm_torchrl.baselines.builders import (make_sac_loss)
        >>> loss = make_sac_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> stepper = BaselineOptimizationStepper(loss, lr=1e-3)
        >>> flags = torch.zeros(4, 1, dtype=torch.bool)
        >>> transitions = TensorDict(
        ...     {
        ...         "observation": torch.randn(4, 3),
        ...         "action": torch.rand(4, 1),
        ...         ("next", "observation"): torch.randn(4, 3),
        ...         ("next", "reward"): torch.randn(4, 1),
        ...         ("next", "done"): flags,
        ...         ("next", "terminated"): flags,
        ...     },
        ...     batch_size=[4],
        ... )
        >>> metrics = stepper.step(None, transitions)
        >>> bool(metrics["grad_norm_actor"] > 0)
        True
    """

    def __init__(
        self,
        loss: BaselineLoss,
        *,
        lr: float = 1e-4,
        clip_norm: float = 100.0,
        tau: float = 0.005,
    ) -> None:
        check_type("loss", loss, BaselineLoss)
        lr = check_number("lr", lr, open_low=True)
        self.clip_norm = check_number("clip_norm", clip_norm, open_low=True)
        tau = check_number("tau", tau, 0, 1, open_low=True)
        self.loss = loss
        self._options = {"lr": lr, "clip_norm": self.clip_norm, "tau": tau}
        self.target_update = SoftUpdate(loss, tau=tau)
        self._parameters = dict(_parts(loss))
        self.optimizers = {
            part: torch.optim.Adam(parameters, lr=lr, fused=True)
            for part, parameters in self._parameters.items()
        }
        self._metrics: dict[str, Tensor] = {}
        self._count = 0
        self._failed: str | None = None

    __deepcopy__ = deepcopy_stepper

    @property
    def optimizer_step_count(self) -> int:
        """Number of environment steps whose updates were made."""
        return self._count

    def step(
        self, trainer: Trainer | None, sub_batch: TensorDictBase
    ) -> TensorDictBase:
        """Makes the updates of one environment step.

        Args:
            trainer (Trainer, optional): the trainer that runs the loop, or ``None``.
            sub_batch (TensorDictBase): transitions ``[updates_per_step * B]``, the
                batches one after the other, or a batch with them as
                ``"transition"``.

        Returns:
            TensorDict: detached scalars of the last update of each part: the losses,
            means of their metrics and ``grad_norm_*`` before clipping.

        Raises:
            ValueError: if the transitions cannot be split into equal batches.
            NonFiniteError: if a loss or gradient norm is not finite.
        """
        self.raise_if_nonfinite()
        loss = self.loss
        transitions = sub_batch.get("transition", default=sub_batch)
        rows, updates = len(transitions), loss.updates_per_step
        if rows == 0 or rows % updates:
            raise ValueError(
                f"sub_batch: expected updates_per_step={updates} batches of equal size "
                f"one after the other, got {rows} transitions."
            )
        self._count += 1
        delayed = self._count % loss.policy_delay == 0
        for number, batch in enumerate(transitions.split(rows // updates), start=1):
            self._minimise("qvalue", *loss.qvalue_loss(batch))
            if delayed and number == updates:
                value, metadata = loss.actor_loss(batch)
                self._minimise("actor", value, metadata)
                if "alpha" in self.optimizers:
                    alpha_loss = loss.alpha_loss(metadata["log_prob"]).mean()
                    self._minimise("alpha", alpha_loss, {"alpha": loss.log_alpha.exp()})
            if delayed:
                self.target_update.step()
        return TensorDict(self._metrics, batch_size=[])

    def _minimise(self, part: str, value: Tensor, metadata: dict[str, Tensor]) -> None:
        """One step of a part's optimizer."""
        optimizer = self.optimizers[part]
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters[part], self.clip_norm)
        checked = {f"loss_{part}": value.detach(), f"grad_norm_{part}": norm}
        for name, number in checked.items():
            if not number.isfinite():
                self._failed = name
                self.raise_if_nonfinite()
        for name, entry in metadata.items():
            self._metrics[name] = entry.detach().mean()
        self._metrics.update(checked)
        optimizer.step()

    def raise_if_nonfinite(self) -> None:
        """Raises if an update met a value that was not finite.

        Raises:
            NonFiniteError: naming the term and its update.
        """
        if self._failed is not None:
            raise NonFiniteError(self._failed, self._count)

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizers, the count of environment steps, the metrics."""
        return {
            "optimizers": {k: v.state_dict() for k, v in self.optimizers.items()},
            "count": self._count,
            "metrics": dict(self._metrics),
        }

    def check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ``ValueError`` where a state does not fit, and changes nothing."""
        check_stepper(state_dict, self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` saved, if all of it fits."""
        self.check_state_dict(state_dict)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict["optimizers"][name])
        self._count = state_dict["count"]
        self._metrics = dict(state_dict["metrics"])
        self._failed = None


def _parts(loss: BaselineLoss) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """The parts that are trained, in their order, and the parameters of each."""
    for part in ("qvalue", "actor"):
        yield part, list(getattr(loss, f"{part}_network_params").parameters())
    if hasattr(loss, "alpha_loss"):
        yield "alpha", [loss.log_alpha]
