"""What the ALM objective does with its networks: encode, step, act, score, imagine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, TypeVar, cast

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from tensordict.nn import (
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictParams,
    TensorDictSequential,
)
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.parameter import is_lazy
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import LossModule
from torchrl.objectives.utils import _cache_values

from alm_torchrl.distributions import draw
from alm_torchrl.networks.layers import AlwaysSample, NoiseSchedule
from alm_torchrl.objectives.acting import EncodedPolicy
from alm_torchrl.objectives.binding import Loan, lendable
from alm_torchrl.objectives.calls import Inputs, as_tensordict, call_network
from alm_torchrl.objectives.inputs import entry_names, misfit

Parameters = Literal["live", "frozen", "target"]
Method = TypeVar("Method", bound=Callable[..., Any])

PARTS = ("encoder", "model", "actor", "qvalue", "reward", "classifier", "decoder")


def sampling(method: Method) -> Method:
    """Runs a method under the sampling mode of the loss, like ``*_loss`` methods."""

    @wraps(method)
    def wrapped(self: LossModule, *args: object, **kwargs: object) -> object:
        with set_exploration_type(self.deterministic_sampling_mode):
            return method(self, *args, **kwargs)

    return cast("Method", wrapped)


class ALMNetworks(LossModule):
    """The networks of ALM, bound to parameters and keys; base of ``ALMLoss``.

    Its methods are the verbs that the loss terms are written in. Each runs with one
    of three sets of parameters: ``"live"`` (trained by this term), ``"frozen"`` (the
    same values; gradient reaches the inputs only) or ``"target"`` (the slow copy of
    the encoder and the critic). Sequences are ``[B, K, ...]``.
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that ``set_keys`` accepts.

        Attributes:
            latent: what the networks read as latent; the classifier reads the next
                one under ``("next", latent)``. Default: ``"latent"``.
            action: action. Default: ``"action"``.
            reward: reward under ``"next"``. Default: ``"reward"``.
            terminated: termination under ``"next"``; a time limit is not one.
                Default: ``"terminated"``.
            predicted_reward: output of the reward model.
                Default: ``"predicted_reward"``.
            state_action_value: output of the critics, one entry each.
                Default: ``"state_action_value"``.
            logits: output of the classifier. Default: ``"logits"``.
            reconstruction: output of the decoder. Default: ``"reconstruction"``.
            imagined: optional boolean entry of the transitions: the rows whose next
                latent comes from the model in the classifier's loss.
                Default: ``"imagined"``.
            slice: slices of a two-draw batch. Default: ``"slice"``.
            transition: transitions of a two-draw batch. Default: ``"transition"``.
        """

        latent: NestedKey = "latent"
        action: NestedKey = "action"
        reward: NestedKey = "reward"
        terminated: NestedKey = "terminated"
        predicted_reward: NestedKey = "predicted_reward"
        state_action_value: NestedKey = "state_action_value"
        logits: NestedKey = "logits"
        reconstruction: NestedKey = "reconstruction"
        imagined: NestedKey = "imagined"
        slice: NestedKey = "slice"
        transition: NestedKey = "transition"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    deterministic_sampling_mode = ExplorationType.RANDOM

    encoder: TensorDictModule
    encoder_params: TensorDictParams
    target_encoder_params: TensorDictParams
    model: TensorDictModule
    model_params: TensorDictParams
    target_model_params: TensorDictParams
    actor: TensorDictModule
    actor_params: TensorDictParams
    target_actor_params: TensorDictParams
    qvalue: TensorDictModule
    qvalue_params: TensorDictParams
    target_qvalue_params: TensorDictParams
    reward: TensorDictModule
    reward_params: TensorDictParams
    target_reward_params: TensorDictParams
    classifier: TensorDictModule | None
    classifier_params: TensorDictParams
    target_classifier_params: TensorDictParams
    decoder: TensorDictModule | None
    decoder_params: TensorDictParams
    target_decoder_params: TensorDictParams

    noise_clip: float | None
    log_alpha: nn.Parameter | None

    def _bind(self, **parts: TensorDictModuleBase | None) -> None:
        for name, part in parts.items():
            if part is None:
                self.__dict__[name] = None
                continue
            if not isinstance(part, TensorDictModuleBase):
                raise TypeError(
                    f"{name} must be a TensorDictModule, got {type(part).__name__}."
                )
            if name in ("encoder", "model") and not hasattr(part, "get_dist"):
                raise TypeError(
                    f"{name} must be probabilistic (have get_dist), for example a "
                    f"ProbabilisticTensorDictSequential, got {type(part).__name__}."
                )
            if any(is_lazy(parameter) for parameter in part.parameters()):
                raise ValueError(
                    f"{name}: expected parameters of known shape, got a lazy module; "
                    "call it once on a batch before."
                )
            self.convert_to_functional(
                part, name, create_target_params=name in ("encoder", "qvalue")
            )
            params = getattr(self, f"{name}_params")
            if not isinstance(params, TensorDictParams):
                # What TorchRL keeps of a network without parameters is no module.
                setattr(self, f"{name}_params", TensorDictParams(params))

    def _tie(self) -> None:
        """Makes the modules hold the parameters and buffers of the loss itself."""
        self._erase_cache()
        for part in PARTS:
            module = self.__dict__.get(part)
            if module is not None:
                self._modules[f"{part}_params"].to_module(module)

    def _apply(self, fn: Callable[[Tensor], Tensor]) -> ALMNetworks:
        # Parameters are cast in place, but buffers (the noise schedule) replaced.
        super()._apply(fn)
        self._tie()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copying and unpickling separate the modules from the parameters.
        super().__setstate__(state)
        self._tie()

    @_cache_values
    def _frozen(self, part: str) -> TensorDict:
        return getattr(self, f"{part}_params").detach()

    def _bound(
        self, part: str, parameters: Parameters
    ) -> AbstractContextManager[object]:
        """Context in which the network of a part holds a set of parameters."""
        name = f"{part}_params" if parameters != "target" else f"target_{part}_params"
        if torch.compiler.is_compiling():
            params = self._frozen(part) if parameters == "frozen" else None
            params = getattr(self, name) if params is None else params
            return params.to_module(getattr(self, part), preserve_module_state=False)
        params = self._modules[name]
        cache = self.__dict__.setdefault("_cache", {})
        loans = cache.setdefault("loans", {})
        loan = loans.get((part, parameters))
        if loan is None or not loan.holds(params):
            module, frozen = getattr(self, part), parameters == "frozen"
            if not lendable(module):
                params = params.detach() if frozen else params
                return params.to_module(module, preserve_module_state=False)
            loan = loans[part, parameters] = Loan(module, params, detach=frozen)
        return loan

    def _inputs(self, **tensors: Tensor) -> dict[NestedKey, Tensor]:
        """Network inputs by accepted key; ``next_latent`` goes under ``"next"``."""
        keys = self.tensor_keys
        return {
            unravel_key(
                ("next", keys.latent) if name == "next_latent" else getattr(keys, name)
            ): tensor
            for name, tensor in tensors.items()
        }

    def _sample(self, dist: Distribution) -> Tensor:
        # The density of an entropy bonus is that of noise without a clip.
        return draw(dist, self.noise_clip if self.log_alpha is None else None)

    @sampling
    def sample(self, dist: Distribution) -> Tensor:
        """Draws from a distribution as the terms do.

        Args:
            dist (Distribution): what :meth:`encode` or :meth:`step` returned.

        Returns:
            Tensor: a reparameterised sample, or the mean where
            ``deterministic_sampling_mode`` says so.
        """
        return self._sample(dist)

    def _check_observations(self, tensordict: TensorDictBase) -> list[NestedKey]:
        """The keys that the encoder reads."""
        keys = self.encoder.in_keys
        if any(tensordict.get(key, default=None) is None for key in keys):
            raise KeyError(
                f"tensordict: expected the encoder's in_keys {keys}, also under "
                f"'next', got {entry_names(tensordict)}."
            )
        return keys

    def _observations(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What the encoder reads."""
        return tensordict.select(*self._check_observations(tensordict))

    def _run(self, part: str, inputs: Inputs) -> Any:  # noqa: ANN401
        """Outputs or distribution of a network; an error that names what is amiss."""
        module = getattr(self, part)
        try:
            return call_network(module, inputs)
        except (KeyError, RuntimeError) as error:
            reason = misfit(part, module, as_tensordict(inputs), error)
            if reason is error:
                raise
            raise reason from error

    def _output(
        self,
        part: str,
        inputs: Mapping[NestedKey, Tensor],
        key: NestedKey,
        size: int | None = None,
    ) -> Tensor:
        """One output ``[*, size]`` of a network."""
        output = self._run(part, inputs).get(unravel_key(key), None)
        if output is None:
            written = getattr(self, part).out_keys
            raise KeyError(f"{part}: expected the output {key!r}, got {written}.")
        shape, batch_size = output.shape, next(iter(inputs.values())).shape[:-1]
        if shape[:-1] != batch_size or size not in (None, shape[-1]):
            expected = [*batch_size, "N" if size is None else size]
            raise ValueError(
                f"{part}: expected {key!r} of shape {expected}, got {list(shape)}."
            )
        return output

    def encode(
        self, tensordict: TensorDictBase, parameters: Parameters = "target"
    ) -> Distribution:
        """Distribution of the encoder, ``e(z | s)``.

        Args:
            tensordict (TensorDictBase): holds the encoder's ``in_keys``, ``[*]``.
            parameters (str): ``"live"``, ``"frozen"`` or ``"target"``.
                Default: ``"target"``.

        Returns:
            Distribution: over latents ``[*, L]``.
        """
        self._check_observations(tensordict)
        with self._bound("encoder", parameters):
            return self._run("encoder", tensordict)

    def step(
        self, latent: Tensor, action: Tensor, parameters: Parameters = "frozen"
    ) -> Distribution:
        """Distribution of the latent model, ``m(z' | z, a)``.

        Args:
            latent (Tensor): ``[*, L]``.
            action (Tensor): ``[*, A]``.
            parameters (str): ``"live"`` or ``"frozen"``. Default: ``"frozen"``.

        Returns:
            Distribution: over next latents ``[*, L]``.
        """
        with self._bound("model", parameters):
            return self._step(latent, action)

    def _step(self, latent: Tensor, action: Tensor) -> Distribution:
        dist = self._run("model", self._inputs(latent=latent, action=action))
        shape = dist.batch_shape + dist.event_shape
        if shape != latent.shape:
            raise ValueError(
                "model: expected next latents of the shape of the latents, "
                f"{list(latent.shape)}, got {list(shape)}."
            )
        return dist

    @sampling
    def act(self, latent: Tensor, parameters: Parameters = "frozen") -> Tensor:
        """Action of the actor, with the noise clipped as in the losses.

        An actor with a :class:`~alm_torchrl.distributions.ClampedNormal` gets
        ``noise_clip`` (the clamped mean in deterministic mode; no clip with an entropy
        bonus), one with another
        distribution a reparameterised sample, one without its plain output.

        Args:
            latent (Tensor): ``[*, L]``.
            parameters (str): ``"live"`` or ``"frozen"``. Default: ``"frozen"``.

        Returns:
            Tensor: action, ``[*, A]``.
        """
        with self._bound("actor", parameters):
            return self._act(latent)

    def _act(self, latent: Tensor) -> Tensor:
        inputs = self._inputs(latent=latent)
        if hasattr(self.actor, "get_dist"):
            return self._sample(self._run("actor", inputs))
        return self._output("actor", inputs, self.tensor_keys.action)

    def state_action_value(
        self, latent: Tensor, action: Tensor, parameters: Parameters = "frozen"
    ) -> Tensor:
        """Values of all critics, ``Q_i(z, a)``.

        Args:
            latent (Tensor): ``[*, L]``.
            action (Tensor): ``[*, A]``.
            parameters (str): ``"live"``, ``"frozen"`` or ``"target"``.
                Default: ``"frozen"``.

        Returns:
            Tensor: ``[*, number of critics]``; the smallest is used as the value.
        """
        inputs = self._inputs(latent=latent, action=action)
        with self._bound("qvalue", parameters):
            key = self.tensor_keys.state_action_value
            return self._output("qvalue", inputs, key)

    def predict_reward(
        self, latent: Tensor, action: Tensor, parameters: Parameters = "frozen"
    ) -> Tensor:
        """Reward model, ``r(z, a)``.

        Args:
            latent (Tensor): ``[*, L]``.
            action (Tensor): ``[*, A]``.
            parameters (str): ``"live"`` or ``"frozen"``. Default: ``"frozen"``.

        Returns:
            Tensor: predicted reward, ``[*]``.
        """
        inputs = self._inputs(latent=latent, action=action)
        with self._bound("reward", parameters):
            key = self.tensor_keys.predicted_reward
            return self._output("reward", inputs, key, 1).squeeze(-1)

    def classify(
        self,
        latent: Tensor,
        action: Tensor,
        next_latent: Tensor,
        parameters: Parameters = "frozen",
    ) -> Tensor:
        """Logits of the classifier, ``C(z, a, z')``.

        Args:
            latent (Tensor): ``[*, L]``.
            action (Tensor): ``[*, A]``.
            next_latent (Tensor): ``[*, L]``.
            parameters (str): ``"live"`` or ``"frozen"``. Default: ``"frozen"``.

        Returns:
            Tensor: ``[*, 2]``; index 1 is "real".
        """
        inputs = self._inputs(latent=latent, action=action, next_latent=next_latent)
        with self._bound("classifier", parameters):
            return self._output("classifier", inputs, self.tensor_keys.logits, 2)

    def decode(self, latent: Tensor, parameters: Parameters = "frozen") -> Tensor:
        """Mean of the decoder, ``d(s | z)``.

        Args:
            latent (Tensor): ``[*, L]``.
            parameters (str): ``"live"`` or ``"frozen"``. Default: ``"frozen"``.

        Returns:
            Tensor: reconstructed observation, ``[*, S]``.
        """
        with self._bound("decoder", parameters):
            key = self.tensor_keys.reconstruction
            return self._output("decoder", self._inputs(latent=latent), key)

    def acting_policy(self) -> TensorDictSequential:
        """The policy that acts: online encoder, then actor.

        It shares the loss's modules, so it follows every update. The latent is always
        sampled; the action is the actor's mean under a deterministic exploration type
        and carries noise, not clipped, under a random one.

        Returns:
            TensorDictSequential: reads the encoder's ``in_keys``, writes the action.

        Raises:
            KeyError: if the encoder does not write what the actor reads, or the actor
                no action.
        """
        key = self.tensor_keys.action
        for part, written, needed in (
            ("encoder", self.encoder.out_keys, self.actor.in_keys),
            ("actor", self.actor.out_keys, [key]),
        ):
            missing = [entry for entry in needed if unravel_key(entry) not in written]
            if missing:
                raise KeyError(
                    f"{part}: expected the outputs {missing}, got {written}."
                )
        return EncodedPolicy(
            AlwaysSample(self.encoder),
            self.actor,
            selected_out_keys=[key],
        )

    @property
    def noise_schedule(self) -> NoiseSchedule | None:
        """The schedule inside the actor, or ``None`` where the actor has none."""
        for module in self.actor.modules():
            if isinstance(module, NoiseSchedule):
                return module
        return None

    def reset_parameters_recursive(self) -> None:
        """Draws all parameters anew; the targets are copies again."""
        super().reset_parameters_recursive()
        for part in ("encoder", "qvalue"):
            online = getattr(self, f"{part}_params").data
            self._modules[f"target_{part}_params"].data.update_(online)
