"""One update: losses, backward passes, clipping, optimizers and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.objectives import SoftUpdate

from alm_torchrl.objectives import ALMLoss

__all__ = ["Precision", "Update"]

Precision = Literal["fp32", "tf32", "bf16"]


class Update:
    """Losses, backward passes, clipping, optimizers and targets, in their order.

    It draws random numbers and changes tensors in place, and touches nothing else:
    no value is read from the device, so that a CUDA graph can hold all of it. Once a
    loss or gradient norm is not finite, all later steps do nothing.

    Args:
        loss (ALMLoss): the loss. Its targets become copies of the online networks.

    Keyword Args:
        lr (float): learning rate.
        clip_norm (float): largest global gradient norm of each step.
        weight_decay (float): decoupled weight decay of each optimizer.
        tau (float): share by which the targets move.
        precision (str): ``"fp32"``, ``"tf32"`` or ``"bf16"``.
    """

    def __init__(
        self,
        loss: ALMLoss,
        *,
        lr: float | Tensor,
        clip_norm: float,
        weight_decay: float,
        tau: float,
        precision: Precision,
    ) -> None:
        self.loss = loss
        self.clip_norm = clip_norm
        self.tau = tau
        # Copies the networks to the targets, and tells the loss that they will move.
        SoftUpdate(loss, tau=tau)
        trained = {
            "model_loss": [*self._params("encoder", "model")],
            "reward_classifier_loss": [*self._params("reward", "classifier")],
            "qvalue_loss": [*self._params("qvalue")],
            "actor_loss": [*self._params("actor")],
        }
        trained["model_loss"] += loss.model_terms.parameters()
        if loss.entropy is not None:
            trained["alpha_loss"] = [*loss.entropy.parameters()]
        self.trained: dict[str, list[nn.Parameter]] = trained
        """The parameters that each step of an update trains, by the loss's method."""
        # Only the fused implementation can skip a step on the device.
        self.optimizers: dict[str, torch.optim.Adam] = {
            name: torch.optim.AdamW(
                params, lr=lr, weight_decay=weight_decay, fused=True
            )
            for name, params in trained.items()
        }
        self.device = trained["model_loss"][0].device
        # Number of this update, from 1; the caller fills it in.
        self.count = torch.zeros((), dtype=torch.int64, device=self.device)
        # Update and position (from 1) of the first term that was not finite, or zeros.
        self.failure = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.checked: list[str] = []
        self.reduced = precision == "bf16"
        # How gradients are clipped and an optimizer steps; a compiled update records
        # other operations for the same.
        self.clip: Callable[[list[nn.Parameter], float], Tensor] = (
            nn.utils.clip_grad_norm_
        )
        self.descend: Callable[[str, Tensor], None] = self._fused_step
        self.move: Callable[[list[Tensor], list[Tensor], Tensor], None] = move

    def _params(self, *parts: str) -> Iterator[nn.Parameter]:
        for part in parts:
            if getattr(self.loss, part) is not None:
                yield from getattr(self.loss, f"{part}_params").parameters()

    def tensors(self) -> Iterator[Tensor]:
        """All that an update may change, and the buffers of the loss."""
        yield from self.loss.parameters()
        yield from self.loss.buffers()
        yield self.failure
        for optimizer in self.optimizers.values():
            for state in optimizer.state.values():
                yield from state.values()

    def numbers(self) -> list[object]:
        """What an update depends on besides tensors: numbers and flags of the loss."""
        plain = (bool, int, float, str)
        of_loss = {k: v for k, v in vars(self.loss).items() if isinstance(v, plain)}
        return [of_loss, self.clip_norm, self.tau]

    def __call__(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Makes one update.

        Args:
            batch (TensorDictBase): two-draw batch or slices ``[B, K]``.

        Returns:
            dict: detached scalars by name.
        """
        metrics: dict[str, Tensor] = {}
        checked: dict[str, Tensor] = {}
        failed = self.failure[0] > 0

        def step(name: str, *args: object) -> None:
            nonlocal failed
            value, metadata = self._compute(name, batch, *args)
            new = self._losses(name, value, metadata)
            failed = self._descend(name, value, new, failed)
            metrics.update(metadata)
            checked.update(new)

        self._compute("observe", batch, failed)
        step("model_loss")
        # The targets, and so these distributions, stay to the end.
        encoded = self._compute("encode_transitions", batch)
        step("reward_classifier_loss", encoded)
        step("qvalue_loss", encoded)
        step("actor_loss", encoded)
        if self.loss.entropy is not None:
            step("alpha_loss", encoded)
        self._move_targets(failed)
        self._note(checked, failed)
        return {**metrics, **checked}

    def _compute(self, name: str, *args: object) -> Any:  # noqa: ANN401
        """Calls a method of the loss."""
        with torch.autocast(self.device.type, torch.bfloat16, self.reduced):
            return getattr(self.loss, name)(*args)

    def _losses(
        self, name: str, value: Tensor, metadata: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The detached losses of a step, by name."""
        if name == "reward_classifier_loss":  # a sum, whose parts are in its metadata
            return {k: v for k, v in metadata.items() if k.startswith("loss_")}
        return {f"loss_{name.removesuffix('_loss')}": value.detach()}

    def _descend(
        self, name: str, value: Tensor, checked: dict[str, Tensor], failed: Tensor
    ) -> Tensor:
        """Backward pass, clipping and optimizer; returns whether the update failed."""
        for parameter in self.trained[name]:
            parameter.grad = None
        value.backward()
        norm = self.clip(self.trained[name], self.clip_norm)
        checked[f"grad_norm_{name.removesuffix('_loss')}"] = norm
        failed = failed | ~torch.stack(list(checked.values())).isfinite().all()
        self.descend(name, failed)
        return failed

    def _fused_step(self, name: str, failed: Tensor) -> None:
        optimizer = self.optimizers[name]
        # Read by the fused Adam: the step is skipped where it is 1.
        optimizer.found_inf = failed.to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()

    def _move_targets(self, failed: Tensor) -> None:
        """Moves the targets towards the online networks, or not after a failure."""
        targets, sources = [], []
        for part in ("encoder", "qvalue"):
            online = getattr(self.loss, f"{part}_params")
            held = getattr(self.loss, f"target_{part}_params")
            for key, source in online.items(include_nested=True, leaves_only=True):
                if source.requires_grad:
                    targets.append(held.get(key).data)
                    sources.append(source.data)
        self.move(targets, sources, self.tau * (~failed).to(sources[0].dtype))

    def _note(self, checked: dict[str, Tensor], failed: Tensor) -> None:
        """Notes the first term that was not finite, unless one was before."""
        self.checked = list(checked)
        position = (~torch.stack(list(checked.values())).isfinite()).int().argmax() + 1
        first = torch.stack([self.count, position])
        is_new = failed & (self.failure[0] == 0)
        self.failure.copy_(torch.where(is_new, first, self.failure))


def move(targets: list[Tensor], sources: list[Tensor], weight: Tensor) -> None:
    """Moves each target towards its source."""
    for target, source in zip(targets, sources, strict=True):
        target.lerp_(source, weight)
