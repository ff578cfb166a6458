"""One update of ALM: four optimizers in the authors' order, then the targets."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.trainers import OptimizationStepper, Trainer

from alm_torchrl.checks import check_choice, check_integer, check_number, check_type
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.objectives.batch import check_batch
from alm_torchrl.training.capture import CapturedUpdate
from alm_torchrl.training.compiled import CompiledUpdate
from alm_torchrl.training.state_checks import check_stepper
from alm_torchrl.training.update import Precision, Update

__all__ = ["ALMOptimizationStepper", "NonFiniteError", "deepcopy_stepper"]


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
        unit: Literal["update", "environment step", "training step"] = "update",
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


def deepcopy_stepper(stepper: Any, memo: dict[int, Any]) -> Any:  # noqa: ANN401
    """A stepper like another one, on a copy of its loss; their ``__deepcopy__``.

    A TensorDict's own deep copy is a clone, so that copied optimizers and target
    updates would hold other tensors than the copied loss.

    Args:
        stepper (OptimizationStepper): has ``loss``, and in ``_options`` its arguments.
        memo (dict): of :func:`copy.deepcopy`.

    Returns:
        OptimizationStepper: the copy.

    Examples:
        >>> from alm_torchrl import make_alm_loss
        >>> loss = make_alm_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> stepper = ALMOptimizationStepper(loss)
        >>> copy.deepcopy(stepper).loss is loss
        False
    """
    other = type(stepper)(copy.deepcopy(stepper.loss, memo), **stepper._options)
    # A new stepper makes the targets anew.
    other.loss.load_state_dict(stepper.loss.state_dict())
    other.load_state_dict(copy.deepcopy(stepper.state_dict()))
    return other


class ALMOptimizationStepper(OptimizationStepper):
    """Performs one whole update of ALM, with a Trainer or in a loop of one's own.

    In order: encoder and model; reward and classifier; critics; actor; with an entropy
    bonus, its temperature: each with its own Adam and its own clip of the global
    gradient norm. Then the targets move. (The paper's Algorithm 1 updates the policy
    earlier; this is the authors' code.)

    Loss and gradient norm of each step are checked on their device. Where one is not
    finite, that optimizer step and all later ones, target updates included, do
    nothing; :meth:`raise_if_nonfinite` reads the verdict. On a CPU it is read in each
    update; elsewhere whoever logs calls it, as ``make_trainer`` does.

    The update runs eagerly, as one graph compiled by Inductor (``compile``), or as one
    captured CUDA graph (``cudagraph``), of the compiled one if both are set. All modes
    draw the same random numbers and agree up to rounding. Compiling takes a minute or
    so at the first update, and needs a C++ compiler on a CPU. Capture is quick. In both
    every later batch must have the first one's entries and shapes. After a change of an
    optimizer's options, the captured graph needs :meth:`recapture`; the compiled one
    notices, and takes a new ``lr`` as it is.

    A compiled update repeats the operations of the first one. A number of the loss or
    of an optimizer that changes is noticed. Numbers and branches inside the networks,
    hooks, and draws from NumPy or Python are frozen, and hooks of optimizers do not
    run, so in the two updates after it the eager update is compared, and a difference
    refused. What changes later is not seen: keep it in buffers, as
    :class:`~alm_torchrl.NoiseSchedule` does.

    Args:
        loss (ALMLoss): the loss. Its targets become copies of the online networks.

    Keyword Args:
        lr (float): learning rate of all Adams. Default: ``1e-4``.
        lr_final (float, optional): learning rate that ``lr`` changes to linearly.
            Default: ``None``, no change.
        lr_steps (int): updates until ``lr_final``. Default: ``200_000``.
        clip_norm (float): largest global gradient norm of each step.
            Default: ``100.0``.
        weight_decay (float): decoupled weight decay of all parameters, times the
            learning rate (AdamW, https://arxiv.org/abs/1711.05101). Default: ``0.0``.
        tau (float): share by which targets move towards the online networks.
            Default: ``0.005``.
        precision (str): what the matrix products of the hidden layers are computed in;
            parameters, last layers, KL, returns, losses and optimizers keep full
            precision. ``"fp32"``: the parameters' own type; ``"bf16"``: bfloat16 by
            autocast; ``"tf32"``: TF32 for all layers, on CUDA only and only while an
            update runs. Default: ``"fp32"``.
        compile (bool): run the update as one compiled graph. Default: ``False``.
        cudagraph (bool, optional): capture the update as a CUDA graph.
            Default: ``None``, on CUDA only.

    Raises:
        ValueError: if a number or ``precision`` is out of range, ``cudagraph`` or
            ``"tf32"`` is asked for without CUDA, or the loss has ``reduction="none"``.
        TypeError: if ``loss`` is no :class:`~alm_torchrl.ALMLoss`, or ``compile`` or
            ``cudagraph`` no boolean.

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
        lr_final: float | None = None,
        lr_steps: int = 200_000,
        clip_norm: float = 100.0,
        weight_decay: float = 0.0,
        tau: float = 0.005,
        precision: Literal["fp32", "tf32", "bf16"] = "fp32",
        compile: bool = False,
        cudagraph: bool | None = None,
    ) -> None:
        check_type("loss", loss, ALMLoss)
        if loss.reduction == "none":
            raise ValueError(
                "loss: expected one with a reduction, whose terms are numbers, got "
                "reduction='none'."
            )
        lr = check_number("lr", lr, open_low=True)
        if lr_final is not None:
            lr_final = check_number("lr_final", lr_final)
        lr_steps = check_integer("lr_steps", lr_steps)
        clip_norm = check_number("clip_norm", clip_norm, open_low=True)
        weight_decay = check_number("weight_decay", weight_decay)
        tau = check_number("tau", tau, 0, 1, open_low=True)
        check_choice("precision", precision, ("fp32", "tf32", "bf16"))
        check_type("compile", compile, bool)
        device = next(loss.parameters()).device
        # A captured graph reads the rate from the device.
        on_device = lr_final is not None and device.type == "cuda"
        self._update = Update(
            loss,
            lr=torch.tensor(lr, device=device) if on_device else lr,
            clip_norm=clip_norm,
            weight_decay=weight_decay,
            tau=tau,
            precision=precision,
        )
        if cudagraph is None:
            cudagraph = device.type == "cuda"
        check_type("cudagraph", cudagraph, bool)
        for name, value in (("cudagraph", cudagraph), ("precision", precision)):
            if value in (True, "tf32") and device.type != "cuda":
                raise ValueError(
                    f"{name}: {value!r} expects the loss on a CUDA device, got "
                    f"{device}."
                )
        self.loss = loss
        self._options: dict[str, Any] = {
            "lr": lr,
            "lr_final": lr_final,
            "lr_steps": lr_steps,
            "clip_norm": clip_norm,
            "weight_decay": weight_decay,
            "tau": tau,
            "precision": precision,
            "compile": compile,
            "cudagraph": cudagraph,
        }
        self.precision = precision
        self.compile = compile
        self.cudagraph = cudagraph
        self.optimizers = self._update.optimizers
        self._run: Update | CompiledUpdate | CapturedUpdate = self._update
        self._modes: list[CompiledUpdate | CapturedUpdate] = []
        if compile:
            self._run = CompiledUpdate(self._update)
            self._modes.append(self._run)
        if cudagraph:
            self._run = CapturedUpdate(self._run)
            self._modes.append(self._run)
        self._count = 0

    __deepcopy__ = deepcopy_stepper

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
            KeyError or ValueError: if the batch lacks an entry, or one does not fit;
                nothing has changed then.
            NonFiniteError: on a CPU, if a loss or gradient norm is not finite.
            ValueError: in a compiled or captured update, if the batch has other entries
                than the first one.
            RuntimeError: if the update cannot be compiled or captured, or the compiled
                one differs from the eager one. Networks must not read values from
                their tensors, and in a captured update copy none to the device.
        """
        if not any(mode.ready for mode in self._modes):
            check_batch(self.loss, sub_batch)
        self._anneal()
        self._update.count.fill_(self._count + 1)
        with _matrix_products(self.precision):
            metrics = self._run(sub_batch)
        self._count += 1
        if self._update.device.type == "cpu":
            self.raise_if_nonfinite()
        return TensorDict(metrics, batch_size=[])

    def _anneal(self) -> None:
        """Sets the learning rate of the next update."""
        start, end = self._options["lr"], self._options["lr_final"]
        if end is None:
            return
        share = min(self._count / self._options["lr_steps"], 1.0)
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                rate = start + share * (end - start)
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def recapture(self) -> None:
        """Has the next update recorded or captured anew; does nothing in eager mode."""
        for mode in self._modes:
            mode.reset()

    def raise_if_nonfinite(self) -> None:
        """Raises if any update so far met a value that was not finite.

        Reads one tensor from the device.

        Raises:
            NonFiniteError: naming the first such term and its update.
        """
        step, position = self._update.failure.tolist()
        if step:
            raise NonFiniteError(self._update.checked[position - 1], step)

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizers, the count of updates and any failure."""
        return {
            "optimizers": {k: v.state_dict() for k, v in self.optimizers.items()},
            "count": self._count,
            "failure": self._update.failure.clone(),
            "terms": self._update.checked,
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
        self._update.failure.copy_(state_dict["failure"])
        self._update.checked = state_dict["terms"]
        # The optimizers' state is in other tensors now, and their options may differ.
        self.recapture()


@contextmanager
def _matrix_products(precision: Precision) -> Iterator[None]:
    if precision != "tf32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
