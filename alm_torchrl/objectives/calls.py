"""Calls the networks of this library on tensors, without a TensorDict in between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
)
from torch import Tensor, nn
from torch.distributions import Distribution

__all__ = ["Inputs", "as_tensordict", "call_network", "is_direct", "is_watched"]

Inputs: TypeAlias = TensorDictBase | Mapping[NestedKey, Tensor]


def call_network(
    module: TensorDictModuleBase, inputs: Inputs
) -> Distribution | TensorDictBase | Mapping[NestedKey, Tensor]:
    """The distribution of a probabilistic module, or the outputs of another.

    It is what ``get_dist``, or the module itself, returns for a TensorDict of the
    inputs. Where :func:`is_direct` is true, none is made: its bookkeeping costs a
    small network a good part of its own time.

    Args:
        module (TensorDictModuleBase): the module.
        inputs (TensorDictBase or mapping of NestedKey to Tensor): what it reads,
            ``[*, N]`` each.

    Returns:
        Distribution, or outputs by key.

    Raises:
        KeyError: if an input is missing.

    Examples:
        >>> import torch
        >>> from alm_torchrl import make_reward
        >>> reward = make_reward(1, latent_dim=2, hidden_dim=8)
        >>> inputs = {"latent": torch.zeros(5, 2), "action": torch.zeros(5, 1)}
        >>> call_network(reward, inputs)["predicted_reward"].shape
        torch.Size([5, 1])
    """
    if not is_direct(module):
        tensordict = as_tensordict(inputs)
        if hasattr(module, "get_dist"):
            return module.get_dist(tensordict)
        return module(tensordict)
    probabilistic = isinstance(module, ProbabilisticTensorDictSequential)
    network, head = module.module if probabilistic else (module, None)
    tensors = network.module(*[inputs[key] for key in network.in_keys])
    if isinstance(tensors, Tensor):
        tensors = (tensors,)
    outputs = dict(zip(network.out_keys, tensors, strict=True))
    return outputs if head is None else head.get_dist(outputs)


def is_direct(module: TensorDictModuleBase) -> bool:
    """Whether a network is called on tensors: none is any more."""
    return False


def is_watched(module: nn.Module) -> bool:
    """Whether somebody sees a module's calls: with hooks or another ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in module.__dict__
    )


def as_tensordict(inputs: Inputs) -> TensorDictBase:
    """Tensors ``[*, N]`` by key as a new TensorDict of batch size ``[*]``."""
    if isinstance(inputs, TensorDictBase):
        return inputs.copy()
    some = next(iter(inputs.values()))
    return TensorDict(dict(inputs), batch_size=some.shape[:-1])
