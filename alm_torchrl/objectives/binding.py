"""Lends a module other tensors for a while, without TensorDict's bookkeeping."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, nn

__all__ = ["Loan", "lendable"]


class Loan:
    """Context in which a module holds other parameters and buffers than its own.

    It does what ``params.to_module(module)`` does as a context manager, in a tenth of
    the time: where each tensor goes is looked up once, when the loan is made.

    Args:
        module (nn.Module): the borrower, for which :func:`lendable` is true.
        params (TensorDictParams): what it holds inside the context, with the nested
            keys of its parameters and buffers.

    Keyword Args:
        detach (bool): lend detached tensors on the same memory. Default: ``False``.

    Examples:
        >>> import torch
        >>> from tensordict.nn import TensorDictParams
        >>> from tensordict import TensorDict
        >>> layer = nn.Linear(1, 1)
        >>> held = TensorDict.from_module(layer).detach()
        >>> zeros = TensorDictParams(held.apply(torch.zeros_like))
        >>> with Loan(layer, zeros):
        ...     layer(torch.ones(1)).item()
        0.0
        >>> bool(layer.weight == 0)
        False
    """

    def __init__(
        self, module: nn.Module, params: TensorDictParams, *, detach: bool = False
    ) -> None:
        self._source = params._param_td
        self._lent = [
            (slots, name, tensor.detach() if detach else tensor)
            for slots, name, tensor in _places(module, params)
        ]
        self._kept: list[list[Any]] = []

    def holds(self, params: TensorDictParams) -> bool:
        """Whether it would lend these parameters, which a functional call replaces."""
        return self._source is params._param_td

    def __enter__(self) -> None:
        self._kept.append([slots[name] for slots, name, _ in self._lent])
        for slots, name, tensor in self._lent:
            slots[name] = tensor

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for (slots, name, _), tensor in zip(self._lent, self._kept.pop(), strict=True):
            slots[name] = tensor


def lendable(module: nn.Module) -> bool:
    """Whether tensors can be put in place behind the back of all submodules.

    Not where one of them, such as ``nn.LSTM``, acts when an attribute is set.
    """
    return all(
        type(part).__setattr__ is nn.Module.__setattr__ for part in module.modules()
    )


def _places(
    module: nn.Module, params: TensorDictBase
) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for key, tensor in params.items(include_nested=True, leaves_only=True):
        *path, name = (key,) if isinstance(key, str) else key
        part = module.get_submodule(".".join(path))
        is_parameter = name in part._parameters
        yield part._parameters if is_parameter else part._buffers, name, tensor
