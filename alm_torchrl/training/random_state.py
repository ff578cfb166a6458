"""The generators of a process, for machines with other accelerators too."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torchrl.checkpoint import GlobalRNGState

__all__ = ["RandomState"]


class RandomState(GlobalRNGState):
    """The generators of Python, NumPy and PyTorch as a checkpoint component.

    :class:`torchrl.checkpoint.GlobalRNGState` refuses the state of CUDA generators on
    a machine that has fewer of them. This one leaves those out, and warns.

    Warns:
        UserWarning: by ``load_state_dict``, if states of CUDA generators are left out.

    Examples:
        >>> import torch
        >>> state = RandomState().state_dict()
        >>> number = torch.rand(())
        >>> RandomState().load_state_dict(state)
        >>> bool(torch.rand(()) == number)
        True
    """

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Puts the generators back where :meth:`state_dict` was taken.

        Args:
            state_dict: the saved state.
        """
        state = dict(state_dict)
        saved = state.pop("torch_cuda", [])
        here = torch.cuda.device_count()
        if len(saved) > here:
            warnings.warn(
                f"the checkpoint has the generators of {len(saved)} CUDA devices, and "
                f"there are {here} here: what is drawn on a GPU goes on with other "
                "random numbers.",
                UserWarning,
                stacklevel=2,
            )
        if saved[:here]:
            state["torch_cuda"] = saved[:here]
        super().load_state_dict(state)
