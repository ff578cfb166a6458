"""What the terms are computed from: rollouts, targets and the bound they estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import IndependentNormal

from alm_torchrl import functional
from alm_torchrl.checks import check_integer
from alm_torchrl.distributions import ClampedNormal, is_random
from alm_torchrl.objectives.calls import as_tensordict
from alm_torchrl.objectives.inputs import read_column, read_entry
from alm_torchrl.objectives.networks import ALMNetworks, sampling

# Where ``encode_transitions`` leaves the target encoder's distributions.
ENCODED = "_encoded"


class ALMRollouts(ALMNetworks):
    """Rollouts of the latent model, the critics' target and the lower bound.

    Its methods sample as the loss does, whatever exploration type surrounds them.
    """

    kl_coef: float
    reward_coef: float
    value_coef: float
    classifier_coef: float
    reward_transform: Callable[[Tensor], Tensor] | None
    log_terms: Literal["none", "model", "bound"]
    gamma: Tensor
    lmbda: Tensor

    @sampling
    def model_rollout(self, slices: TensorDictBase) -> TensorDict:
        """Rolls the live model along the recorded actions of slices (Eq. 7).

        Args:
            slices (TensorDictBase): ``[B, K]``.

        Returns:
            TensorDict: batch size ``[B]``, with ``latent`` ``[B, K+1, L]`` and, where
            its coefficient is not zero, ``reward`` ``[B, K]``, ``kl`` ``[B, K]`` and
            ``terminal_value`` ``[B]``. The gradient reaches encoder and model.
        """
        action = read_entry(slices, self.tensor_keys.action)
        first = self._observations(slices)[:, 0]
        latents = [self._sample(self.encode(first, "live"))]
        dists = []
        with self._bound("model", "live"):
            for action_t in action.unbind(1):
                dists.append(self._step(latents[-1], action_t))
                latents.append(self._sample(dists[-1]))
        latent = torch.stack(latents, 1)
        rollout = TensorDict(latent=latent, batch_size=[action.shape[0]])
        if self.reward_coef != 0:
            rollout["reward"] = self.predict_reward(latent[:, :-1], action)
        if self.kl_coef != 0:
            with torch.no_grad():
                target = self.encode(read_entry(slices, "next"))
            locs, scales = zip(
                *(normal_parameters(dist, "model") for dist in dists), strict=True
            )
            rollout["kl"] = functional.gaussian_kl(
                torch.stack(locs, 1),
                torch.stack(scales, 1),
                *normal_parameters(target, "encoder"),
            )
        if self.value_coef != 0:
            with torch.no_grad():
                last_action = self.act(latents[-1])
            value = self.state_action_value(latents[-1], last_action)
            rollout["terminal_value"] = value.amin(-1)
        return rollout

    def _log_bound(self, reward: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Reward and terminal value as they enter a sum over the horizon."""
        if self.log_terms != "bound":
            return reward, value
        share = 1 - self.gamma
        logs = functional.floored_log(reward), functional.floored_log(share * value)
        return share * logs[0], logs[1]

    def _rewards_along(self, latent: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted reward and log ratio, [B, K] each, along latents [B, K+1, L]."""
        now, after = latent[:, :-1], latent[:, 1:].detach()
        reward = self.predict_reward(now, action)
        if self.classifier_coef == 0:
            return reward, torch.zeros_like(reward)
        return reward, functional.log_density_ratio(self.classify(now, action, after))

    def _scored_action(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """An action of the bound actor, and log pi(a|z) [*]."""
        dist = self._run("actor", self._inputs(latent=latent))
        if isinstance(dist, ClampedNormal):
            clip = None if is_random() else 0.0
            action, log_prob = dist.rsample_and_log_prob(noise_clip=clip)
        elif hasattr(dist, "rsample_and_log_prob") and is_random():
            # More exact than to find out what a rounded sample was made of.
            action, log_prob = dist.rsample_and_log_prob()
        else:
            action = self._sample(dist)
            log_prob = dist.log_prob(action)
        # Without an event dimension, each number of the action has its own density.
        return action, log_prob.sum(-1) if log_prob.ndim == action.ndim else log_prob

    def _act_softly(self, latent: Tensor) -> tuple[Tensor, Tensor | None]:
        """An action of the bound actor; its log pi(a|z), with an entropy bonus only."""
        if self.log_alpha is None:
            return self._act(latent), None
        return self._scored_action(latent)

    def _soft(self, value: Tensor, log_prob: Tensor | None) -> Tensor:
        """The value with the entropy bonus, where there is one."""
        if self.log_alpha is None or log_prob is None:
            return value
        return functional.soft_value(value, log_prob, self.log_alpha.detach().exp())

    @sampling
    def imagine(self, latent: Tensor, horizon: int) -> TensorDict:
        """Rolls the policy out in the latent model and scores it (Eq. 8, A.3).

        The gradient reaches the actor's parameters through the actions and the chain
        of latents; every other network is frozen. The actor sees latents without
        gradient, the critics see actions without gradient.

        With an entropy bonus, each reward and each value of the return is that of an
        action, and ``- alpha log pi`` of this action is added to it. In a value this
        has no gradient either.

        Args:
            latent (Tensor): start ``z_0``, ``[B, L]``.
            horizon (int): number of steps K, at least 1.

        Returns:
            TensorDict: batch size ``[B]``, with ``latent`` ``[B, K+1, L]``, ``action``
            ``[B, K+1, A]``, ``reward`` and ``log_ratio`` ``[B, K]`` for t = 0..K-1
            (the log ratio is zero where ``classifier_coef`` is), ``value`` ``[B, K]``
            for t = 1..K, and ``lambda_return`` ``[B, K]``. With an entropy bonus also
            ``log_prob`` ``[B, K+1]``, and ``value`` contains the bonus.
        """
        check_integer("horizon", horizon)
        latents, actions, log_probs = [latent], [], []
        with self._bound("actor", "live"), self._bound("model", "frozen"):
            for _ in range(horizon):
                action, log_prob = self._act_softly(latents[-1].detach())
                latents.append(self._sample(self._step(latents[-1], action)))
                actions.append(action)
                log_probs.append(log_prob)
            # The critics see no gradient of an action, and nothing else reads a_K.
            with torch.no_grad():
                action, log_prob = self._act_softly(latents[-1])
            actions.append(action)
            log_probs.append(log_prob)
        z, a = torch.stack(latents, 1), torch.stack(actions, 1)
        reward, log_ratio = self._rewards_along(z, a[:, :-1])
        value = self.state_action_value(z[:, 1:], a[:, 1:].detach()).amin(-1)
        gain, end = self._log_bound(reward, value)
        total = gain + self.classifier_coef * log_ratio
        scores = [score for score in log_probs if score is not None]
        log_prob = torch.stack(scores, 1) if scores else None
        if log_prob is not None:
            total = self._soft(total, log_prob[:, :-1])
            value = self._soft(value, log_prob[:, 1:].detach())
            end = self._soft(end, log_prob[:, 1:].detach())
        returns = functional.lambda_return(total, end, self.gamma, self.lmbda)
        rollout = TensorDict(
            latent=z,
            action=a,
            reward=reward,
            log_ratio=log_ratio,
            value=value,
            lambda_return=returns,
            batch_size=[latent.shape[0]],
        )
        return rollout if log_prob is None else rollout.set("log_prob", log_prob)

    @sampling
    def policy_value(self, latent: Tensor) -> Tensor:
        """The critics' value of the policy's action: TD3's actor objective (Fig. 5c).

        ``min_i Q_i(z, pi(z))``, with the noise clipped as in all losses; with an
        entropy bonus SAC's objective, ``min_i Q_i(z, a) - alpha log pi(a | z)``.
        The gradient reaches the actor's parameters through the action; the critics are
        frozen, and the latent is given.

        Args:
            latent (Tensor): ``[*, L]``.

        Returns:
            Tensor: ``[*]``.
        """
        latent = latent.detach()
        with self._bound("actor", "live"):
            action, log_prob = self._act_softly(latent)
        value = self.state_action_value(latent, action).amin(-1)
        return self._soft(value, log_prob)

    @sampling
    @torch.no_grad()
    def lower_bound(self, transitions: TensorDictBase, horizon: int) -> Tensor:
        """K-step estimate of the lower bound for given first actions (Fig. 4, 8).

        ``sum_{t<K} gamma^t (r(z_t, a_t) + c log ratio_t) + gamma^K min Q(z_K, a_K)``
        from ``z_0 ~ e'(s)``, with the given first action and the actor's mean, not
        clamped, afterwards. With ``log_terms="bound"``, reward and value are those of
        Theorem 3.1, ``(1 - gamma) log r`` and ``log (1 - gamma) Q``; with
        ``classifier_coef=1`` it is then L^K, and ``exp(L^K) / (1 - gamma)`` bounds the
        return.

        Args:
            transitions (TensorDictBase): observations and first actions, ``[B]``.
            horizon (int): number of steps K, at least 1.

        Returns:
            Tensor: the estimate for each row, ``[B]``, without gradient.
        """
        check_integer("horizon", horizon)
        latents = [self._sample(self.encode(transitions))]
        actions = [read_entry(transitions, self.tensor_keys.action)]
        for _ in range(horizon):
            latents.append(self._sample(self.step(latents[-1], actions[-1])))
            actions.append(self._mean_action(latents[-1]))
        z, a = torch.stack(latents, 1), torch.stack(actions, 1)
        reward, log_ratio = self._rewards_along(z, a[:, :-1])
        value = self.state_action_value(z[:, -1], a[:, -1]).amin(-1)
        gain, end = self._log_bound(reward, value)
        return functional.k_step_bound(
            gain + self.classifier_coef * log_ratio, end, self.gamma
        )

    def _target_encoding(
        self, transitions: TensorDictBase, when: str = "now", rows: Tensor | None = None
    ) -> Distribution:
        """``e'(z | s)``, or of ``s'`` for ``when="next"``, of all or some rows.

        From the entry of ``encode_transitions``, where there is one.
        """
        encoded = transitions.get((ENCODED, when), default=None)
        if encoded is None:
            source = transitions if when == "now" else read_entry(transitions, "next")
            source = self._observations(source)
            return self.encode(source if rows is None else source[rows])
        loc, scale = encoded.get("loc"), encoded.get("scale")
        if rows is not None:
            loc, scale = loc[rows], scale[rows]
        return IndependentNormal(loc, scale, validate_args=False)

    def _mean_action(self, latent: Tensor) -> Tensor:
        deterministic = set_exploration_type(ExplorationType.DETERMINISTIC)
        with deterministic, self._bound("actor", "frozen"):
            output = self.actor(as_tensordict(self._inputs(latent=latent)))
        return output.get(self.tensor_keys.action)

    @sampling
    @torch.no_grad()
    def td_target(self, transitions: TensorDictBase) -> Tensor:
        """Target of the critics (Eq. 10), with the target networks' minimum.

        ``R + gamma (1 - terminated) min_i Q'_i(z', pi(z'))`` with ``z' ~ e'(s')`` and
        R after ``reward_transform``; with an entropy bonus, of
        ``min_i Q'_i(z', a') - alpha log pi(a' | z')``.

        Args:
            transitions (TensorDictBase): ``[*]``.

        Returns:
            Tensor: ``[*]``, without gradient.
        """
        latent = self._sample(self._target_encoding(transitions, "next"))
        with self._bound("actor", "frozen"):
            action, log_prob = self._act_softly(latent)
        value = self.state_action_value(latent, action, "target").amin(-1)
        value = self._soft(value, log_prob)
        reward = self._recorded_reward(transitions, value)
        following = read_entry(transitions, "next")
        terminated = read_column(following, self.tensor_keys.terminated, value)
        discount = self.gamma * (1 - terminated.to(value.dtype))
        return functional.td_target(reward, discount, value)

    def _recorded_reward(self, transitions: TensorDictBase, like: Tensor) -> Tensor:
        """The reward of transitions [*] as reward model and critics learn it, [*]."""
        following = read_entry(transitions, "next")
        reward = read_column(following, self.tensor_keys.reward, like)
        if self.reward_transform is None:
            return reward
        return self.reward_transform(reward)


def normal_parameters(dist: Distribution, name: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a diagonal Gaussian.

    Args:
        dist (Distribution): ``Normal``, or ``Independent`` over one.
        name (str): what the error calls it.

    Returns:
        tuple of Tensor: location and scale.

    Raises:
        TypeError: if the distribution is no diagonal Gaussian.
    """
    base = dist.base_dist if isinstance(dist, Independent) else dist
    if not isinstance(base, Normal):
        raise TypeError(
            f"{name} must return a diagonal Gaussian (Normal or Independent Normal) "
            f"for the closed-form KL, got {type(base).__name__}."
        )
    return base.loc, base.scale
