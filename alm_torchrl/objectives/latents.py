"""The verbs of ALM: encode, step, act, score and imagine, over bound networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import TensorDictModuleBase, TensorDictSequential, dispatch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import IndependentNormal

from alm_torchrl import functional
from alm_torchrl.checks import check_integer
from alm_torchrl.distributions import ClampedNormal, PointNormal, draw, is_random
from alm_torchrl.networks import AlwaysSample
from alm_torchrl.objectives.batch import entry_names, explain_mismatch
from alm_torchrl.objectives.binding import can_swap, swapped_params

__all__ = ["Encoding", "Latents", "Rollout", "normal_parameters"]

Parameters = Literal["live", "frozen", "target"]
SPLITTABLE: tuple[type, ...] = (IndependentNormal, PointNormal)


class Encoding(NamedTuple):
    """The target encoder's distributions for transitions, flattened to ``[N]``.

    They hold until a target network moves.
    """

    now: Distribution
    """``e'(z | s)``, over latents ``[N, L]``."""
    next: Distribution
    """``e'(z' | s')``, over latents ``[N, L]``."""


class Rollout(NamedTuple):
    """The policy in the latent model, K steps from ``[B]`` starts."""

    latent: Tensor
    """``z_0`` to ``z_K``, ``[B, K+1, L]``."""
    action: Tensor
    """``a_0`` to ``a_K``, ``[B, K+1, A]``."""
    log_prob: Tensor | None
    """``log pi(a | z)``, ``[B, K+1]``, where it was asked for."""


class Latents:
    """What an ALM agent does with latents, in terms of the networks of a loss.

    Each verb runs a network with one of three sets of parameters: ``"live"`` (a
    gradient reaches them), ``"frozen"`` (the same values; a gradient reaches the
    inputs only) or ``"target"`` (the slow copies of encoder and critics). Samples obey
    the exploration type in force: random unless it says otherwise. Latents are
    ``[*, L]``, actions ``[*, A]``. A network that does not fit its inputs raises a
    KeyError or ValueError that explains it.

    Made by :class:`~alm_torchrl.ALMLoss`, as its attribute ``latents``.

    Args:
        networks (mapping): the networks by name; ``classifier`` may be ``None``.
        params (mapping): the loss's ``encoder_params``, ``target_encoder_params`` etc.
        keys (object): the loss's ``tensor_keys``.

    Keyword Args:
        noise_clip (float, optional): clip of the action noise, or ``None``.
        values (callable): values ``[*, N]`` from the critics' output.

    Examples:
        >>> from alm_torchrl import make_alm_loss
        >>> loss = make_alm_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> observed = TensorDict(observation=torch.zeros(4, 3), batch_size=[4])
        >>> z = loss.latents.sample(loss.latents.encode(observed, "live"))
        >>> a = loss.latents.act(z)
        >>> loss.latents.state_action_value(z, a).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        networks: Mapping[str, TensorDictModuleBase | None],
        params: Mapping[str, Any],
        keys: Any,  # noqa: ANN401
        *,
        noise_clip: float | None,
        values: Callable[[Tensor], Tensor],
    ) -> None:
        self.networks = networks
        self.keys = keys
        self.noise_clip = noise_clip
        self.values = values
        self._params = params
        self._swaps: dict[tuple[str, Parameters], swapped_params] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copy has parameters of its own.
        return {**self.__dict__, "_swaps": {}}

    def encode(
        self, tensordict: TensorDictBase, parameters: Parameters = "target"
    ) -> Distribution:
        """Distribution of the encoder, ``e(z | s)``, over ``[*, L]``."""
        return self._run("encoder", parameters, self.observations(tensordict))

    def observations(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The entries ``[*]`` that the encoder reads; a KeyError if one is missing."""
        keys = self._network("encoder").in_keys
        if any(tensordict.get(key, default=None) is None for key in keys):
            raise KeyError(
                f"tensordict: expected the encoder's in_keys {keys}, also under "
                f"'next', got {entry_names(tensordict)}."
            )
        return tensordict.select(*keys)

    def step(
        self, latent: Tensor, action: Tensor, parameters: Parameters = "frozen"
    ) -> Distribution:
        """Distribution of the latent model, ``m(z' | z, a)``, over ``[*, L]``."""
        inputs = self.inputs(latent=latent, action=action)
        dist = self._run("model", parameters, inputs)
        shape = dist.batch_shape + dist.event_shape
        if shape != latent.shape:
            raise ValueError(
                "model: expected next latents of the shape of the latents, "
                f"{list(latent.shape)}, got {list(shape)}."
            )
        return dist

    def sample(self, dist: Distribution, rows: Tensor | None = None) -> Tensor:
        """Draws from a distribution (of some rows), with the loss's noise clip."""
        if rows is None:
            return draw(dist, self.noise_clip)
        if type(dist) in SPLITTABLE:
            return draw(take_rows(dist, rows), self.noise_clip)
        return draw(dist, self.noise_clip)[rows]

    def act(self, latent: Tensor, parameters: Parameters = "frozen") -> Tensor:
        """Action of the actor, ``[*, A]``, with the noise clipped as in the losses.

        An actor with a :class:`~alm_torchrl.ClampedNormal` draws with ``noise_clip``
        (outside random exploration it gives the clamped mean), one with another
        distribution draws a reparameterised sample, one without gives its output.
        """
        inputs = self.inputs(latent=latent)
        if hasattr(self._network("actor"), "get_dist"):
            return self.sample(self._run("actor", parameters, inputs))
        return self._output("actor", parameters, inputs, self.keys.action)

    def act_and_score(
        self, latent: Tensor, parameters: Parameters = "frozen"
    ) -> tuple[Tensor, Tensor]:
        """Action ``[*, A]`` and its ``log pi(a | z)``, ``[*]``."""
        dist = self._run("actor", parameters, self.inputs(latent=latent))
        if isinstance(dist, ClampedNormal):
            clip = self.noise_clip if is_random() else 0.0
            action, log_prob = dist.rsample_and_log_prob(noise_clip=clip)
        elif hasattr(dist, "rsample_and_log_prob") and is_random():
            # More exact than to invert a rounded sample.
            action, log_prob = dist.rsample_and_log_prob()
        else:
            action = self.sample(dist)
            log_prob = dist.log_prob(action)
        # Without an event dimension, each number of the action has its own density.
        return action, log_prob.sum(-1) if log_prob.ndim == action.ndim else log_prob

    def smoothed_action(self, latent: Tensor, std: float, clip: float) -> Tensor:
        """The actor's mean with noise of a given deviation, clamped, ``[*, A]``.

        Raises a TypeError where the actor has no :class:`~alm_torchrl.ClampedNormal`.
        """
        dist = self._clamped(latent, "frozen")
        scale = torch.full_like(dist.loc, std)
        return draw(ClampedNormal(dist.loc, scale, dist.low, dist.high), clip)

    def mean_action(self, latent: Tensor) -> Tensor:
        """Action under deterministic exploration, not clamped, ``[*, A]``."""
        inputs = self.inputs(latent=latent)
        deterministic = set_exploration_type(ExplorationType.DETERMINISTIC)
        with deterministic, self._bound("actor", "frozen"):
            return self._network("actor")(inputs).get(self.keys.action)

    def raw_action(self, latent: Tensor, parameters: Parameters = "frozen") -> Tensor:
        """What the actor's tanh squashes to its mean, within 7.25 of 0, ``[*, A]``.

        Raises a TypeError where the actor has no :class:`~alm_torchrl.ClampedNormal`.
        """
        loc = self._clamped(latent, parameters).loc
        return loc.clamp(-1 + 1e-6, 1 - 1e-6).atanh()

    def _clamped(self, latent: Tensor, parameters: Parameters) -> ClampedNormal:
        """The actor's distribution, whose mean is a tanh."""
        dist = None
        if hasattr(self._network("actor"), "get_dist"):
            dist = self._run("actor", parameters, self.inputs(latent=latent))
        if not isinstance(dist, ClampedNormal):
            raise TypeError(
                "actor: expected one with a ClampedNormal, whose mean is a tanh, got "
                f"{type(dist).__name__}."
            )
        return dist

    def state_action_value(
        self, latent: Tensor, action: Tensor, parameters: Parameters = "frozen"
    ) -> Tensor:
        """Values of all critics, ``Q_i(z, a)``, ``[*, number of critics]``."""
        return self.values(self.critics_output(latent, action, parameters))

    def critics_output(
        self, latent: Tensor, action: Tensor, parameters: Parameters = "frozen"
    ) -> Tensor:
        """What the critics write, from which the ``value_head`` reads the values."""
        inputs = self.inputs(latent=latent, action=action)
        return self._output("qvalue", parameters, inputs, self.keys.state_action_value)

    def predict_reward(
        self, latent: Tensor, action: Tensor, parameters: Parameters = "frozen"
    ) -> Tensor:
        """Reward model, ``r(z, a)``, ``[*]``."""
        inputs = self.inputs(latent=latent, action=action)
        key = self.keys.predicted_reward
        return self._output("reward", parameters, inputs, key, 1).squeeze(-1)

    def classify(
        self,
        latent: Tensor,
        action: Tensor,
        next_latent: Tensor,
        parameters: Parameters = "frozen",
    ) -> Tensor:
        """Logits of the classifier, ``C(z, a, z')``, ``[*, 2]``; index 1 is real."""
        inputs = self.inputs(latent=latent, action=action)
        inputs.set(("next", self.keys.latent), next_latent)
        return self._output("classifier", parameters, inputs, self.keys.logits, 2)

    def score(self, latent: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted reward and log ratio along a path, ``[B, K]`` each.

        From ``z_0..z_K`` ``[B, K+1, L]`` and ``a_0..a_{K-1}`` ``[B, K, A]``. No
        gradient reaches the latents that the classifier judges; without a classifier
        the log ratio is zero.
        """
        now, after = latent[:, :-1], latent[:, 1:].detach()
        reward = self.predict_reward(now, action)
        if self.networks["classifier"] is None:
            return reward, torch.zeros_like(reward)
        return reward, functional.log_density_ratio(self.classify(now, action, after))

    def imagine(
        self, latent: Tensor, horizon: int, *, log_prob: bool = False
    ) -> Rollout:
        """Rolls the live actor out in the frozen model for ``horizon`` steps.

        From starts ``z_0`` ``[B, L]``. The actor sees latents without gradient; the
        gradient runs through actions and the chain of latents. The last action has
        none. ``log_prob`` asks for the actions' log densities.
        """
        check_integer("horizon", horizon)
        latents, actions, log_probs = [latent], [], []

        def act(parameters: Parameters) -> None:
            now = latents[-1].detach()
            if log_prob:
                action, score = self.act_and_score(now, parameters)
                log_probs.append(score)
            else:
                action = self.act(now, parameters)
            actions.append(action)

        for _ in range(horizon):
            act("live")
            latents.append(self.sample(self.step(latents[-1], actions[-1])))
        with torch.no_grad():
            act("frozen")
        return Rollout(
            torch.stack(latents, 1),
            torch.stack(actions, 1),
            torch.stack(log_probs, 1) if log_prob else None,
        )

    def acting_policy(self) -> TensorDictSequential:
        """The policy that acts: online encoder, then actor.

        It shares the networks, so it follows every update. The latent is always
        sampled; the action is the actor's mean under a deterministic exploration type
        and carries noise, not clipped, under a random one. Raises a KeyError where the
        actor does not read what the encoder writes, or writes no action.
        """
        encoder, actor = self._network("encoder"), self._network("actor")
        for part, written, needed in (
            ("encoder", encoder.out_keys, actor.in_keys),
            ("actor", actor.out_keys, [self.keys.action]),
        ):
            missing = [key for key in needed if unravel_key(key) not in written]
            if missing:
                raise KeyError(
                    f"{part}: expected the outputs {missing}, got {written}."
                )
        return _LatentPolicy(
            AlwaysSample(encoder), actor, selected_out_keys=[self.keys.action]
        )

    def _network(self, part: str) -> TensorDictModuleBase:
        network = self.networks[part]
        if network is None:
            raise RuntimeError(f"{part}: expected a network, got None.")
        return network

    def _bound(
        self, part: str, parameters: Parameters
    ) -> AbstractContextManager[object]:
        """Context in which a network holds a set of parameters."""
        name = f"target_{part}_params" if parameters == "target" else f"{part}_params"
        network, params = self._network(part), self._params[name]
        frozen = parameters == "frozen"
        swap = self._swaps.get((part, parameters))
        if torch.compiler.is_compiling() or (swap is None and not can_swap(network)):
            held = params.detach() if frozen else params
            return held.to_module(network, preserve_module_state=False)
        if swap is None or not swap.is_of(params):
            swap = swapped_params(network, params, detach=frozen)
            self._swaps[part, parameters] = swap
        return swap

    def inputs(self, **tensors: Tensor) -> TensorDict:
        """Network inputs ``[*]`` by accepted key."""
        shape = next(iter(tensors.values())).shape[:-1]
        entries = {getattr(self.keys, name): value for name, value in tensors.items()}
        return TensorDict(entries, batch_size=shape)

    def _run(self, part: str, parameters: Parameters, inputs: TensorDictBase) -> Any:  # noqa: ANN401
        """Distribution or outputs of a network."""
        network = self._network(part)
        run = getattr(network, "get_dist", network)
        with self._bound(part, parameters):
            try:
                return run(inputs)
            except (KeyError, RuntimeError) as error:
                reason = explain_mismatch(part, network, inputs, error)
                if reason is error:
                    raise
                raise reason from error

    def _output(
        self,
        part: str,
        parameters: Parameters,
        inputs: TensorDictBase,
        key: NestedKey,
        size: int | None = None,
    ) -> Tensor:
        """One output ``[*, size]`` of a network."""
        output = self._run(part, parameters, inputs).get(unravel_key(key), None)
        if output is None:
            written = self._network(part).out_keys
            raise KeyError(f"{part}: expected the output {key!r}, got {written}.")
        shape, batch_size = output.shape, inputs.batch_size
        if shape[:-1] != batch_size or size not in (None, shape[-1]):
            expected = [*batch_size, "N" if size is None else size]
            raise ValueError(
                f"{part}: expected {key!r} of shape {expected}, got {list(shape)}."
            )
        return output


class _LatentPolicy(TensorDictSequential):
    """A sequence that looks at no entry but those it reads and writes."""

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        entries = tensordict.select(*self.in_keys)
        for module in self.module:
            entries = module(entries)
        for key in self.out_keys:
            tensordict.set(key, entries.get(key))
        return tensordict


def split_dist(dist: Distribution) -> tuple[Distribution, Distribution] | None:
    """Both halves of a diagonal Gaussian over rows; ``None`` for other types."""
    if type(dist) not in SPLITTABLE:
        return None
    half = dist.batch_shape[0] // 2
    return take_rows(dist, slice(half)), take_rows(dist, slice(half, None))


def take_rows(dist: Distribution, rows: slice | Tensor) -> Distribution:
    """Some rows of a diagonal Gaussian over rows, of a type in ``SPLITTABLE``."""
    loc, scale = normal_parameters(dist, "encoder")
    kind: type = type(dist)
    return kind(loc=loc[rows], scale=scale[rows], validate_args=False)


def normal_parameters(dist: Distribution, name: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a diagonal Gaussian.

    Args:
        dist (Distribution): ``Normal``, or ``Independent`` over one.
        name (str): the network's name, for the message.

    Returns:
        tuple of Tensor: location and scale.

    Raises:
        TypeError: if the distribution is no diagonal Gaussian.

    Examples:
        >>> normal_parameters(Normal(torch.zeros(1), torch.ones(1)), "model")
        (tensor([0.]), tensor([1.]))
    """
    base = dist.base_dist if isinstance(dist, Independent) else dist
    if not isinstance(base, Normal):
        raise TypeError(
            f"{name} must return a diagonal Gaussian (Normal or Independent Normal) "
            f"for the closed-form KL, got {type(base).__name__}."
        )
    return base.loc, base.scale
