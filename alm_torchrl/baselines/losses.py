"""TorchRL's TD3, SAC and REDQ losses, with the interface that training needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor
from torchrl.objectives import LossModule, REDQLoss, SACLoss, TD3Loss
from torchrl.objectives.utils import distance_loss

from alm_torchrl.checks import check_integer
from alm_torchrl.compat import erase_cache
from alm_torchrl.distributions import ClampedNormal
from alm_torchrl.networks.layers import NoiseSchedule
from alm_torchrl.objectives.batch import explain_mismatch

__all__ = ["BaselineLoss", "REDQBaseline", "SACBaseline", "TD3Baseline"]

Metadata = dict[str, Tensor]


class BaselineLoss(LossModule):
    """What the losses of the baselines add to TorchRL's.

    ``qvalue_loss`` and ``actor_loss`` take transitions ``[B]`` and return ``(value,
    metadata)``; ``alpha_loss``, of losses with a temperature, takes the actor's log
    probabilities ``[B]``. Each reaches only its own parameters:
    ``qvalue_network_params``, ``actor_network_params``, ``log_alpha``.

    Examples:
        >>> from alm_torchrl import make_td3_loss
        >>> loss = make_td3_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> isinstance(loss, BaselineLoss), loss.agent, loss.policy_delay
        (True, 'td3', 2)
    """

    agent: str
    """Name of the algorithm."""
    updates_per_step: int = 1
    """Updates of the critics per environment step, each on its own batch."""
    policy_delay: int = 1
    """Environment steps per update of the actor and of the targets."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Computes all terms, as TorchRL's loss does."""
        # TorchRL's metaclass gives this class an abstract `forward` of its own.
        return super().forward(*args, **kwargs)

    def acting_policy(self) -> TensorDictSequential:
        """The policy that acts, which shares the loss's actor.

        Returns:
            TensorDictSequential: reads the observation, writes the action, which is
            the distribution's mode under a deterministic exploration type.
        """
        key = self.tensor_keys.action
        return TensorDictSequential(self.actor_network, selected_out_keys=[key])

    def act(self, observations: TensorDictBase) -> Tensor:
        """Acts as :meth:`acting_policy` does.

        Args:
            observations (TensorDictBase): ``[*]``.

        Returns:
            Tensor: actions ``[*, A]``.

        Raises:
            KeyError: if the actor's observation is missing.
            ValueError: if its size, type or device does not fit the actor.
        """
        policy = self.acting_policy()
        try:
            return policy(observations).get(self.tensor_keys.action)
        except (KeyError, RuntimeError) as error:
            raise explain_mismatch("actor", policy, observations, error) from error

    def state_action_value(self, tensordict: TensorDictBase) -> Tensor:
        """Values of all critics, ``Q_i(s, a)``, by the online networks.

        Args:
            tensordict (TensorDictBase): ``[*]``, observations and actions.

        Returns:
            Tensor: ``[*, number of critics]``.
        """
        inputs = tensordict.select(*self.qvalue_network.in_keys)
        values = []
        for parameters in self.qvalue_network_params.unbind(0):
            with parameters.to_module(self.qvalue_network):
                found = self.qvalue_network(inputs.copy())
            values.append(found.get(self.tensor_keys.state_action_value))
        return torch.cat(values, -1)

    def qvalue_estimate(self, tensordict: TensorDictBase) -> Tensor:
        """The critics' estimate of the return, ``min_i Q_i(s, a)``.

        Args:
            tensordict (TensorDictBase): ``[*]``, observations and actions.

        Returns:
            Tensor: ``[*]``. With a temperature it includes the later entropy bonuses.
        """
        return self.state_action_value(tensordict).amin(-1)

    @property
    def noise_schedule(self) -> NoiseSchedule | None:
        """The schedule inside the actor, or ``None`` where the actor has none."""
        for module in self.actor_network.modules():
            if isinstance(module, NoiseSchedule):
                return module
        return None

    def _set_in_keys(self) -> None:
        """Lists a transition's entries in a fixed order."""
        keys = self.tensor_keys
        observations = self.actor_network.in_keys
        ends = (keys.reward, keys.done, keys.terminated)
        following = [("next", key) for key in (*observations, *ends)]
        self._in_keys = [*observations, keys.action, *following]

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> BaselineLoss:
        # It casts parameters in place, but replaces buffers (the noise schedule).
        super()._apply(fn)
        self.actor_network_params.to_module(self.actor_network)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copying and unpickling separate the actor and TorchRL's cache of detached
        # parameters from the parameters.
        super().__setstate__(state)
        erase_cache(self)
        self.actor_network_params.to_module(self.actor_network)


class ClampedMeanNormal(ClampedNormal):
    """A :class:`~alm_torchrl.ClampedNormal` whose deterministic sample is clamped too.

    Examples:
        >>> ClampedMeanNormal(torch.tensor([5.0]), torch.ones(1)).deterministic_sample
        tensor([1.0000])
    """

    @property
    def deterministic_sample(self) -> Tensor:
        """The mean within the bounds, with the gradient of the mean."""
        return self.rsample(noise_clip=0.0)


class TD3Baseline(BaselineLoss, TD3Loss):
    """TD3 (https://arxiv.org/abs/1802.09477) whose target noise follows a schedule.

    Made by :func:`make_td3_loss`.

    Args:
        *args: as in :class:`torchrl.objectives.TD3Loss`.

    Keyword Args:
        policy_delay (int): environment steps per update of actor and targets.
            Default: ``2``.
        **kwargs: as in :class:`torchrl.objectives.TD3Loss`.

    Raises:
        ValueError: if ``policy_delay`` is no positive integer.

    Examples:
        >>> from alm_torchrl import NoiseSchedule, make_td3_loss
        >>> loss = make_td3_loss(
        ...     observation_dim=3,
        ...     action_low=[-1.0],
        ...     action_high=[1.0],
        ...     hidden_dim=8,
        ...     noise_schedule=NoiseSchedule(initial=0.5),
        ... )
        >>> loss.noise_schedule.std
        tensor(0.5000)
    """

    agent = "td3"

    def __init__(self, *args: Any, policy_delay: int = 2, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.policy_delay = check_integer("policy_delay", policy_delay)

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metadata]:
        """Squared TD errors of both critics against their smaller target.

        Args:
            tensordict (TensorDictBase): transitions ``[B]``.

        Returns:
            tuple: the loss, summed over the critics, and detached ``td_error``,
            ``next_state_value``, ``pred_value`` and ``target_value``.
        """
        schedule = self.noise_schedule
        if schedule is not None:
            # Detached, so that the loss does not register the buffer twice.
            self.policy_noise = schedule.std.detach()
        return self.value_loss(tensordict)


class SACBaseline(BaselineLoss, SACLoss):
    """SAC with a tuned temperature (https://arxiv.org/abs/1812.05905).

    Made by :func:`make_sac_loss`; arguments as in :class:`torchrl.objectives.SACLoss`.

    Examples:
        >>> from alm_torchrl import make_sac_loss
        >>> loss = make_sac_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> loss.alpha_loss(torch.tensor([-2.0, 1.0])).shape
        torch.Size([2])
    """

    agent = "sac"

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metadata]:
        """Squared soft TD errors of both critics against their smaller target.

        Args:
            tensordict (TensorDictBase): transitions ``[B]``.

        Returns:
            tuple: the loss, summed over the critics, and detached ``td_error``.
        """
        return self.qvalue_v2_loss(tensordict)


class REDQBaseline(BaselineLoss, REDQLoss):
    """REDQ (https://arxiv.org/abs/2101.05982) with terms that can be called alone.

    Made by :func:`make_redq_loss`. TorchRL computes critics, actor and temperature in
    one, but most of REDQ's updates are of the critics alone.

    Args:
        *args: as in :class:`torchrl.objectives.REDQLoss`.

    Keyword Args:
        updates_per_step (int): updates of the critics per environment step.
            Default: ``20``.
        **kwargs: as in :class:`torchrl.objectives.REDQLoss`.

    Raises:
        ValueError: if ``updates_per_step`` is no positive integer.

    Examples:
        >>> from alm_torchrl import make_redq_loss
        >>> loss = make_redq_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> loss.alpha_loss(torch.tensor([-2.0, 1.0])).shape
        torch.Size([2])
    """

    agent = "redq"

    def __init__(self, *args: Any, updates_per_step: int = 20, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.updates_per_step = check_integer("updates_per_step", updates_per_step)
        # The first read makes it a buffer, and so part of the state.
        _ = self.target_entropy

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metadata]:
        """Squared soft TD errors of all critics, summed over the critics.

        Their target is the smallest value of a random subset of the target critics.

        Args:
            tensordict (TensorDictBase): transitions ``[B]``.

        Returns:
            tuple: the loss, and detached ``pred_value`` and ``target_value``
            ``[N, B]``.
        """
        transitions = tensordict.select(*self.in_keys).copy()
        with torch.no_grad():
            following, log_prob = self._draw(transitions.get("next"))
            subset = torch.randperm(self.num_qvalue_nets)[: self.sub_sample_len]
            values = self._values(following, self.target_qvalue_network_params[subset])
            soft = values.min(0)[0] - self.alpha * log_prob
            key = ("next", self.tensor_keys.value)
            transitions.set(key, soft.unsqueeze(-1))
            target = self.value_estimator.value_estimate(transitions).squeeze(-1)
        predicted = self._values(transitions, self.qvalue_network_params)
        target = target.expand_as(predicted)
        loss = distance_loss(predicted, target, self.loss_function).sum(0)
        metadata = {"pred_value": predicted.detach(), "target_value": target}
        return self._reduce_loss(loss, tensordict=tensordict), metadata

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, Metadata]:
        """``alpha log pi - mean_i Q_i`` over all critics.

        Args:
            tensordict (TensorDictBase): transitions ``[B]``.

        Returns:
            tuple: the loss, and detached ``log_prob`` ``[B]``.
        """
        acted, log_prob = self._draw(tensordict)
        values = self._values(acted, self._cached_detach_qvalue_network_params)
        loss = self.alpha * log_prob - values.mean(0)
        loss = self._reduce_loss(loss, tensordict=tensordict)
        return loss, {"log_prob": log_prob.detach()}

    def qvalue_estimate(self, tensordict: TensorDictBase) -> Tensor:
        """The mean over all critics, as in the paper's study of their bias.

        Args:
            tensordict (TensorDictBase): ``[*]``, observations and actions.

        Returns:
            Tensor: ``[*]``, a soft value.
        """
        return self.state_action_value(tensordict).mean(-1)

    def alpha_loss(self, log_prob: Tensor) -> Tensor:
        """``- log alpha (log pi + target entropy)``.

        Args:
            log_prob (Tensor): ``log pi(a | s)`` of drawn actions, any shape.

        Returns:
            Tensor: loss of each action, shape of ``log_prob``.
        """
        return -self.log_alpha * (log_prob + self.target_entropy)

    def _draw(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, Tensor]:
        """Observations with a drawn action each, and its log probability."""
        acted = tensordict.select(*self.actor_network.in_keys)
        action, log_prob = self.actor_network.get_dist(acted).rsample_and_log_prob()
        return acted.set(self.tensor_keys.action, action), log_prob

    def _values(
        self, tensordict: TensorDictBase, params: TensorDictModuleBase
    ) -> Tensor:
        """Values ``[N, B]`` of the critics whose parameters are stacked."""
        inputs = tensordict.select(*self.qvalue_network.in_keys)
        inputs = inputs.expand(params.shape[0], *inputs.batch_size)
        outputs = self._vmap_qvalue_network00(inputs, params)
        return outputs.get(self.tensor_keys.state_action_value).squeeze(-1)
