"""Binds networks to parameters: of the loss itself, or others for a while."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchrl.objectives import LossModule

from alm_torchrl.compat import erase_cache, tensors_of

PROBABILISTIC = ("encoder", "model")


def bind_network(
    loss: LossModule, name: str, network: TensorDictModuleBase | None, *, target: bool
) -> None:
    """Gives a network and its parameters to a loss, in TorchRL's way.

    Args:
        loss (LossModule): the loss.
        name (str): attribute of the network; its parameters are ``<name>_params``.
        network (TensorDictModule, optional): the network.

    Keyword Args:
        target (bool): whether it has a target copy, ``target_<name>_params``.

    Raises:
        TypeError: if it is no TensorDictModule, or should be probabilistic.
        ValueError: if it is lazy.
    """
    if network is None:
        loss.__dict__[name] = None
        return
    if not isinstance(network, TensorDictModuleBase):
        raise TypeError(
            f"{name} must be a TensorDictModule, got {type(network).__name__}."
        )
    if name in PROBABILISTIC and not hasattr(network, "get_dist"):
        raise TypeError(
            f"{name} must be probabilistic (have get_dist), for example a "
            f"ProbabilisticTensorDictSequential, got {type(network).__name__}."
        )
    if any(is_lazy(parameter) for parameter in network.parameters()):
        raise ValueError(
            f"{name}: expected parameters of known shape, got a lazy module; call it "
            "once on a batch first."
        )
    loss.convert_to_functional(network, name, create_target_params=target)
    params = getattr(loss, f"{name}_params")
    if not isinstance(params, TensorDictParams):
        # TorchRL keeps no module for a network without parameters.
        setattr(loss, f"{name}_params", TensorDictParams(params))


def tie_networks(loss: LossModule, names: tuple[str, ...]) -> None:
    """Makes networks hold the parameters and buffers of the loss itself.

    Casting a loss replaces its buffers; copying and unpickling separate the two.
    """
    erase_cache(loss)
    for name in names:
        network = loss.__dict__.get(name)
        if network is not None:
            loss._modules[f"{name}_params"].to_module(network)


class swapped_params:
    """Context in which a module holds other parameters and buffers.

    It does what ``params.to_module(module)`` does, in a tenth of the time: the place
    of each tensor is looked up once. It can be entered many times, also within itself.

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
        self._source = tensors_of(params)
        self._swapped = [
            (slots, name, tensor.detach() if detach else tensor)
            for slots, name, tensor in _places(module, params)
        ]
        self._kept: list[list[Any]] = []

    def is_of(self, params: TensorDictParams) -> bool:
        """Whether these are the parameters; casts and functional calls replace them."""
        return self._source is tensors_of(params)

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
