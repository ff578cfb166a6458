"""Runs a module with other parameters, without TensorDict's bookkeeping."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictParams
from torch import Tensor, nn

__all__ = ["can_swap", "swapped_params"]


class swapped_params:
    """Context in which a module holds other parameters and buffers.

    It does what ``params.to_module(module)`` does, in a tenth of the time: the place
    of each tensor is looked up once, when the object is made. It can be entered many
    times, also within itself.

    Args:
        module (nn.Module): a module for which :func:`can_swap` is true.
        params (TensorDictParams): its parameters and buffers inside the context.

    Keyword Args:
        detach (bool): use detached tensors on the same memory. Default: ``False``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> layer = nn.Linear(1, 1)
        >>> held = TensorDict.from_module(layer).detach()
        >>> zeros = TensorDictParams(held.apply(torch.zeros_like))
        >>> with swapped_params(layer, zeros):
        ...     layer(torch.ones(1)).item()
        0.0
        >>> bool(layer.weight == 0)
        False
    """

    def __init__(
        self, module: nn.Module, params: TensorDictParams, *, detach: bool = False
    ) -> None:
        self._source = params._param_td
        self._swapped = [
            (slots, name, tensor.detach() if detach else tensor)
            for slots, name, tensor in _places(module, params)
        ]
        self._kept: list[list[Any]] = []

    def is_of(self, params: TensorDictParams) -> bool:
        """Whether these are the parameters; a cast or a functional call replaces them.

        Args:
            params (TensorDictParams): the parameters to compare with.
        """
        return self._source is params._param_td

    def __enter__(self) -> None:
        self._kept.append([slots[name] for slots, name, _ in self._swapped])
        for slots, name, tensor in self._swapped:
            slots[name] = tensor

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kept = self._kept.pop()
        for (slots, name, _), tensor in zip(self._swapped, kept, strict=True):
            slots[name] = tensor


def can_swap(module: nn.Module) -> bool:
    """Whether tensors can be exchanged without the module noticing.

    False where a part acts when an attribute is set, as ``nn.LSTM`` does.

    Args:
        module (nn.Module): the module.

    Examples:
        >>> can_swap(nn.Linear(1, 1)), can_swap(nn.LSTM(1, 1))
        (True, False)
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
