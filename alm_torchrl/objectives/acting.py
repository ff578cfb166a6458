"""The policy that acts, encoder and then actor, without TensorDicts in between."""

from __future__ import annotations

from typing import cast

from tensordict import TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
    TensorDictSequential,
    dispatch,
    skip_existing,
)
from torch import Tensor
from torchrl.envs.utils import ExplorationType, exploration_type
from torchrl.modules import IndependentNormal

from alm_torchrl.distributions import ClampedNormal
from alm_torchrl.networks.layers import AlwaysSample
from alm_torchrl.objectives.calls import Inputs, call_network, is_direct, is_watched

__all__ = ["EncodedPolicy"]

MODES = (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC)


class EncodedPolicy(TensorDictSequential):
    """Samples a latent, then acts on it; made by ``ALMLoss.acting_policy``.

    It computes what a :class:`tensordict.nn.TensorDictSequential` of the same modules
    computes, and draws the same random numbers. Where encoder and actor are those of
    this library's builders, their networks are called on tensors, which takes half the
    time for one observation.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from alm_torchrl import make_actor, make_encoder
        >>> policy = EncodedPolicy(
        ...     AlwaysSample(make_encoder(3, latent_dim=2, hidden_dim=8)),
        ...     make_actor([-1.0], [1.0], latent_dim=2, hidden_dim=8),
        ...     selected_out_keys=["action"],
        ... )
        >>> policy(TensorDict(observation=torch.zeros(3)))["action"].shape
        torch.Size([1])
    """

    @dispatch(auto_batch_size=False)
    def forward(
        self,
        tensordict: TensorDictBase,
        tensordict_out: TensorDictBase | None = None,
    ) -> TensorDictBase:
        """Writes the action.

        Args:
            tensordict (TensorDictBase): observations ``[*]``.
            tensordict_out (TensorDictBase, optional): where the action is written.
                Default: ``None``, the input.

        Returns:
            TensorDictBase: the one written to.
        """
        if tensordict_out is None and self._is_direct(tensordict):
            tensordict.set(self.out_keys[0], self._act(tensordict))
            return tensordict
        return super().forward(tensordict, tensordict_out)

    def _is_direct(self, tensordict: TensorDictBase) -> bool:
        """Whether all that a call does is to draw a latent and an action."""
        if len(self) != 2 or skip_existing() or exploration_type() not in MODES:
            return False
        sampler, actor = self[0], self[1]
        if type(sampler) is not AlwaysSample or is_watched(sampler):
            return False
        encoder = sampler.module
        return (
            _draws_directly(encoder)
            and _draws_directly(actor)
            and actor.in_keys == encoder.module[1].out_keys
            and self.out_keys == actor.module[1].out_keys
            # Where an observation is missing, the modules have the better errors.
            and all(tensordict.get(key, None) is not None for key in encoder.in_keys)
        )

    def _act(self, tensordict: TensorDictBase) -> Tensor:
        sampler, actor = self[0], self[1]
        latent = _dist(sampler.module, tensordict).rsample()
        dist = _dist(actor, {actor.in_keys[0]: latent})
        if exploration_type() is ExplorationType.DETERMINISTIC:
            return dist.deterministic_sample
        return dist.rsample()


def _dist(
    module: TensorDictModuleBase, inputs: Inputs
) -> IndependentNormal | ClampedNormal:
    return cast("IndependentNormal | ClampedNormal", call_network(module, inputs))


def _draws_directly(module: TensorDictModuleBase) -> bool:
    """Whether a draw from the module's distribution is all that calling it does."""
    if not is_direct(module) or type(module) is not ProbabilisticTensorDictSequential:
        return False
    head = module.module[1]
    return (
        head.distribution_class in (IndependentNormal, ClampedNormal)
        and head.num_samples is None
        and head._generator is None
        and head._generator_key is None
        and not (is_watched(module) or is_watched(head))
    )
