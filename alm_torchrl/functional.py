"""The mathematics of Aligned Latent Models: tensors in, tensors out.

Nothing here owns parameters, reads keys or draws random numbers. Time is the last
dimension (``[*, K]``); step ``t`` of a horizon ``K`` runs from 0 to ``K - 1``.
A ``discount`` is ``gamma * (1 - terminated)``.

Equation numbers refer to Ghugare et al., "Simplifying Model-based RL" (ICLR
2023, https://arxiv.org/abs/2209.08466).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

__all__ = [
    "bound_loc",
    "bound_scale",
    "discounted_mean",
    "discounted_sum",
    "floored_log",
    "gaussian_kl",
    "info_nce",
    "k_step_bound",
    "lambda_return",
    "log_density_ratio",
    "merge_moments",
    "model_objective",
    "n_step_target",
    "pessimistic_value",
    "reconstruction_error",
    "shifted_log",
    "soft_value",
    "td_target",
    "temperature_loss",
]


def bound_loc(loc: Tensor, limit: float = 30.0) -> Tensor:
    """Bounds a Gaussian mean softly: ``limit * tanh(loc / limit)``.

    Args:
        loc (Tensor): raw mean, any shape.
        limit (float): largest magnitude. Default: ``30.0``, the authors' code.

    Returns:
        Tensor: mean in ``(-limit, limit)``, shape of ``loc``.

    Examples:
        >>> bound_loc(torch.tensor([0.0, 1e6]))
        tensor([ 0., 30.])
    """
    return limit * torch.tanh(loc / limit)


def bound_scale(raw: Tensor, low: float = 0.1, high: float = 10.0) -> Tensor:
    """Bounds a standard deviation softly from both sides.

    ``s = high - softplus(high - raw)``, then ``low + softplus(s - low)``, in the order
    of the authors' code: ``low`` is exact, ``high`` is exceeded by at most
    ``softplus(low - high)``.

    Args:
        raw (Tensor): unbounded network output, any shape.
        low (float): lower bound. Default: ``0.1``, the authors' code.
        high (float): upper bound. Default: ``10.0``, the authors' code.

    Returns:
        Tensor: positive standard deviation, shape of ``raw``.

    Examples:
        >>> bound_scale(torch.tensor([-1e3, 1e3]))
        tensor([ 0.1000, 10.0001])
    """
    return low + softplus(high - softplus(high - raw) - low)


def gaussian_kl(
    loc_p: Tensor, scale_p: Tensor, loc_q: Tensor, scale_q: Tensor
) -> Tensor:
    """KL divergence between diagonal Gaussians, summed over the last dimension.

    ``KL(p || q) = sum_i log(s_q / s_p) + (s_p^2 + (m_p - m_q)^2) / (2 s_q^2) - 1/2``

    In Eq. 7 ``p`` is the latent model and ``q`` the (target) encoder of the next
    observation.

    Args:
        loc_p (Tensor): mean of ``p``, ``[*, L]``.
        scale_p (Tensor): standard deviation of ``p``, ``[*, L]``, positive.
        loc_q (Tensor): mean of ``q``, ``[*, L]``.
        scale_q (Tensor): standard deviation of ``q``, ``[*, L]``, positive.

    Returns:
        Tensor: divergence in nats, ``[*]``; zero where ``p`` equals ``q``.

    Examples:
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> gaussian_kl(zero, one, zero, one)
        tensor(0.)
        >>> gaussian_kl(one, one, zero, one)
        tensor(1.)
    """
    ratio = (scale_p / scale_q).square()
    shift = ((loc_p - loc_q) / scale_q).square()
    return 0.5 * (ratio + shift - 1 - ratio.log()).sum(-1)


def floored_log(values: Tensor, floor: float = 0.01) -> Tensor:
    """``log(max(values, floor))``: the logarithm of the theory for any task.

    Theorem 3.1 takes the logarithm of positive rewards. The floor replaces smaller
    ones, without a gradient.

    Args:
        values (Tensor): rewards or values, any shape.
        floor (float): smallest number whose logarithm is taken, positive.
            Default: ``0.01``, which keeps results above -4.61 and slopes within 100.

    Returns:
        Tensor: shape of ``values``.

    Examples:
        >>> floored_log(torch.tensor([1.0, 0.0, -1.0]))
        tensor([ 0.0000, -4.6052, -4.6052])
    """
    return values.clamp(min=floor).log()


def shifted_log(reward: Tensor, offset: float = 10_000.0) -> Tensor:
    """``a (log(R + a) - log a)``: a logarithm that hardly changes the reward (A.8).

    About ``R - R^2 / (2 a)``, computed as ``a log1p(R / a)``: the printed form loses
    the reward to rounding.

    Args:
        reward (Tensor): reward R, any shape; NaN results below ``-offset``.
        offset (float): the offset a. Default: ``10000.0``.

    Returns:
        Tensor: shape of ``reward``.

    Examples:
        >>> shifted_log(torch.tensor([-1.0, 0.0, 10.0]))
        tensor([-1.0000,  0.0000,  9.9950])
    """
    return offset * torch.log1p(reward / offset)


def reconstruction_error(loc: Tensor, observation: Tensor) -> Tensor:
    """Minus the log density of a unit Gaussian, without its constant.

    ``1/2 sum_i (s_i - m_i)^2``: half the squared error, zero where they are equal.

    Args:
        loc (Tensor): mean of the decoder, ``[*, S]``.
        observation (Tensor): observation to reconstruct, ``[*, S]``.

    Returns:
        Tensor: error in nats, ``[*]``.

    Examples:
        >>> reconstruction_error(torch.zeros(2), torch.tensor([1.0, 2.0]))
        tensor(2.5000)
    """
    return 0.5 * (loc - observation).square().sum(-1)


def log_density_ratio(logits: Tensor) -> Tensor:
    """Log of ``e(z'|s') / m(z'|z, a)`` as the classifier estimates it (Eq. 8, 9).

    Args:
        logits (Tensor): classifier output, ``[*, 2]``; index 1 is "real" (drawn
            from the encoder), index 0 "imagined" (drawn from the model).

    Returns:
        Tensor: ``logits[..., 1] - logits[..., 0]``, ``[*]``.

    Examples:
        >>> log_density_ratio(torch.tensor([0.5, 2.0]))
        tensor(1.5000)
    """
    return logits[..., 1] - logits[..., 0]


def model_objective(
    kl: Tensor, reward: Tensor, terminal_value: Tensor, gamma: Tensor | float = 1.0
) -> Tensor:
    """Encoder and model objective of one slice (Eq. 7), to be minimised.

    ``sum_{t<K} gamma^t (kl_t - reward_t) - gamma^K terminal_value``

    The authors' code does not discount here (``gamma=1``, footnote 2 of the paper);
    the paper's equation does.

    Args:
        kl (Tensor): ``KL(m(z_t, a_t) || e(s_{t+1}))`` for each step, ``[*, K]``.
        reward (Tensor): predicted rewards ``r(z_t, a_t)``, ``[*, K]``.
        terminal_value (Tensor): ``Q(z_K, a_K)``, ``[*]``.
        gamma (Tensor or float): discount per step. Default: ``1.0``.

    Returns:
        Tensor: objective of each slice, ``[*]``.

    Examples:
        >>> kl, reward = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> model_objective(kl, reward, torch.tensor(4.0))
        tensor(-2.)
        >>> model_objective(kl, reward, torch.tensor(4.0), gamma=0.5)
        tensor(0.5000)
    """
    return -k_step_bound(reward - kl, terminal_value, gamma)


def k_step_bound(
    reward: Tensor, terminal_value: Tensor, gamma: Tensor | float
) -> Tensor:
    """Discounted sum over a horizon plus a terminal value (Eq. 6, no logarithms).

    ``sum_{t<K} gamma^t reward_t + gamma^K terminal_value``

    With the predicted reward plus ``c`` times the classifier's log ratio as
    ``reward``, it is the K-step estimate of the lower bound in the bias study (Fig. 4).
    It equals :func:`lambda_return` at ``t = 0`` and ``lmbda = 1``.

    Args:
        reward (Tensor): rewards along the rollout, ``[*, K]``.
        terminal_value (Tensor): ``Q(z_K, a_K)``, ``[*]``.
        gamma (Tensor or float): discount per step.

    Returns:
        Tensor: the bound for each rollout, ``[*]``.

    Examples:
        >>> k_step_bound(torch.tensor([1.0, 1.0]), torch.tensor(4.0), 0.5)
        tensor(2.5000)
    """
    total = terminal_value
    for reward_t in reversed(reward.unbind(-1)):
        total = reward_t + gamma * total
    return total


def discounted_sum(values: Tensor, gamma: Tensor | float) -> Tensor:
    """``sum_t gamma^t values_t``, the plain sum with ``gamma=1``.

    Args:
        values (Tensor): one value for each step, ``[*, T]``.
        gamma (Tensor or float): discount per step.

    Returns:
        Tensor: ``[*]``.

    Examples:
        >>> discounted_sum(torch.tensor([1.0, 2.0, 4.0]), 0.5)
        tensor(3.)
    """
    return k_step_bound(values[..., :-1], values[..., -1], gamma)


def lambda_return(
    reward: Tensor, next_value: Tensor, gamma: Tensor | float, lmbda: Tensor | float
) -> Tensor:
    """Lambda-weighted average of all shorter horizons (Eq. 8 with appendix A.3).

    ``G_K = q_K`` and, for ``t = K-1 .. 0``,
    ``G_t = reward_t + gamma ((1 - lmbda) q_{t+1} + lmbda G_{t+1})``

    ``lmbda=0`` is the one-step return, ``lmbda=1`` the K-step one
    (:func:`k_step_bound`). Imagined rollouts never terminate.

    Args:
        reward (Tensor): ``[*, K]``, reward plus weighted log ratio of each step.
        next_value (Tensor): ``q_1 .. q_K``, ``[*, K]``; entry ``t`` is the value
            after step ``t``.
        gamma (Tensor or float): discount per step.
        lmbda (Tensor or float): weight of the longer horizon, in ``[0, 1]``.

    Returns:
        Tensor: ``G_0 .. G_{K-1}``, ``[*, K]``.

    Examples:
        >>> reward, value = torch.tensor([1.0, 1.0]), torch.tensor([4.0, 8.0])
        >>> lambda_return(reward, value, 0.5, 0.0)
        tensor([3., 5.])
        >>> lambda_return(reward, value, 0.5, 1.0)
        tensor([3.5000, 5.0000])
    """
    step = next_value[..., -1]
    returns = []
    for reward_t, value_t in zip(
        reversed(reward.unbind(-1)), reversed(next_value.unbind(-1)), strict=True
    ):
        step = reward_t + gamma * ((1 - lmbda) * value_t + lmbda * step)
        returns.append(step)
    return torch.stack(returns[::-1], -1)


def discounted_mean(returns: Tensor, gamma: Tensor | float) -> Tensor:
    """Mean over the horizon of ``gamma^t returns_t``: the policy objective.

    The authors' code averages over all starts ``t``; the paper's Eq. 8 is
    ``returns[..., 0]``.

    Args:
        returns (Tensor): ``G_0 .. G_{K-1}``, ``[*, K]``.
        gamma (Tensor or float): discount per step.

    Returns:
        Tensor: objective of each start, ``[*]``, to be maximised.

    Examples:
        >>> discounted_mean(torch.tensor([2.0, 4.0]), 0.5)
        tensor(2.)
    """
    zero = torch.zeros_like(returns[..., 0])
    return k_step_bound(returns, zero, gamma) / returns.shape[-1]


def td_target(reward: Tensor, discount: Tensor, next_value: Tensor) -> Tensor:
    """One-step target of the critic (Eq. 10): ``reward + discount * next_value``.

    Args:
        reward (Tensor): reward of the transition, any shape.
        discount (Tensor): ``gamma * (1 - terminated)``, shape of ``reward``. A time
            limit is not a termination.
        next_value (Tensor): ``Q'(z', pi(z'))``, shape of ``reward``.

    Returns:
        Tensor: target, shape of ``reward``.

    Examples:
        >>> td_target(torch.ones(2), torch.tensor([0.9, 0.0]), torch.full((2,), 10.0))
        tensor([10.,  1.])
    """
    return reward + discount * next_value


def n_step_target(
    reward: Tensor, discount: Tensor, next_value: Tensor, mask: Tensor
) -> Tensor:
    """Target of the critic from n recorded steps, or as many as there are.

    ``G_m = next_value`` and, for ``t = m-1 .. 0``,
    ``G_t = reward_t + discount_t G_{t+1}``; the target is ``G_0``.

    m is the number of steps that count. One step is :func:`td_target`. Source: Sutton &
    Barto, "Reinforcement Learning", 2018, Eq. 7.1.

    Args:
        reward (Tensor): rewards of the steps, ``[*, n]``.
        discount (Tensor): ``gamma * (1 - terminated)`` of each step, ``[*, n]``.
        next_value (Tensor): value after the last step that counts, ``[*]``.
        mask (Tensor): booleans, true for the first m steps, ``[*, n]``.

    Returns:
        Tensor: target, ``[*]``.

    Examples:
        >>> ones, value = torch.ones(3), torch.tensor(8.0)
        >>> n_step_target(ones, 0.5 * ones, value, torch.tensor([True, True, False]))
        tensor(3.5000)
    """
    total = next_value
    steps = (reward.unbind(-1), discount.unbind(-1), mask.unbind(-1))
    for reward_t, discount_t, mask_t in reversed(list(zip(*steps, strict=True))):
        total = torch.where(mask_t, reward_t + discount_t * total, total)
    return total


def pessimistic_value(values: Tensor, pessimism: float = 1.0) -> Tensor:
    """One value from those of several critics, the lower the more they disagree.

    ``mean_j Q_j - pessimism (mean_j Q_j - min_j Q_j)``: their minimum at 1, their mean
    at 0. With two critics it is ``mean - pessimism (max - min) / 2``.

    Args:
        values (Tensor): one for each of N critics, ``[*, N]``.
        pessimism (float): weight of the disagreement. Default: ``1.0``.

    Returns:
        Tensor: ``[*]``.

    Examples:
        >>> pessimistic_value(torch.tensor([2.0, 6.0]), 0.5)
        tensor(3.)
    """
    if pessimism == 1:
        return values.amin(-1)
    mean = values.mean(-1)
    return mean if pessimism == 0 else torch.lerp(mean, values.amin(-1), pessimism)


def soft_value(value: Tensor, log_prob: Tensor, alpha: Tensor | float) -> Tensor:
    """Value with SAC's entropy bonus: ``value - alpha log_prob``.

    ``alpha=0`` gives the value itself.

    Args:
        value (Tensor): value of an action, or its reward, any shape.
        log_prob (Tensor): ``log pi(a | z)`` of that action, shape of ``value``.
        alpha (Tensor or float): temperature, the weight of the bonus.

    Returns:
        Tensor: soft value, shape of ``value``.

    Examples:
        >>> soft_value(torch.tensor(3.0), torch.tensor(-2.0), 0.5)
        tensor(4.)
    """
    return value - alpha * log_prob


def temperature_loss(
    log_alpha: Tensor, log_prob: Tensor, target_entropy: float
) -> Tensor:
    """Loss of SAC's temperature: ``- alpha (log_prob + target_entropy)``.

    Its gradient lowers the temperature while the mean entropy ``-log_prob`` is above
    the target, and raises it below. Source: Haarnoja et al., "Soft Actor-Critic
    Algorithms and Applications", https://arxiv.org/abs/1812.05905, Eq. 18.

    Args:
        log_alpha (Tensor): logarithm of the temperature, ``[]``.
        log_prob (Tensor): ``log pi(a | z)`` of drawn actions, any shape; detached.
        target_entropy (float): target of the entropy, in nats.

    Returns:
        Tensor: loss of each action, shape of ``log_prob``.

    Examples:
        >>> temperature_loss(torch.tensor(0.0), torch.tensor([-2.0, 1.0]), 1.0)
        tensor([ 1., -2.])
    """
    return -log_alpha.exp() * (log_prob.detach() + target_entropy)


def info_nce(
    predicted: Tensor, actual: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """Cross entropy of finding one's own row among all, by the cosine.

    ``- log softmax_j(cos(predicted_i, actual_j) / temperature)`` at ``j = i``: 0 where
    only the own row is like the prediction, ``log B`` where all are alike. Source: van
    den Oord et al., https://arxiv.org/abs/1807.03748, Eq. 4.

    Args:
        predicted (Tensor): predictions at each step, ``[B, K, L]``.
        actual (Tensor): what came, of each row the candidate, ``[B, K, L]``.
        temperature (float): scale of the cosines.
        mask (Tensor, optional): rows that are candidates, booleans ``[B, K]``; results
            of the others are finite and mean nothing. Default: ``None``, all.

    Returns:
        Tensor: cross entropy in nats, ``[B, K]``.

    Examples:
        >>> rows = torch.eye(2).unsqueeze(1)
        >>> info_nce(rows, rows, 1.0)
        tensor([[0.3133],
                [0.3133]])
    """
    one, two = normalize(predicted, dim=-1), normalize(actual, dim=-1)
    logits = torch.einsum("ikl,jkl->kij", one, two) / temperature
    if mask is not None:
        logits = logits.masked_fill(~mask.T.unsqueeze(1), -1e9)
    return -logits.log_softmax(-1).diagonal(dim1=-2, dim2=-1).T


def merge_moments(
    a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of two sets of rows together.

    With ``d = mean_b - mean_a`` and ``n = n_a + n_b``: mean ``mean_a + d n_b / n``,
    variance ``(n_a var_a + n_b var_b + d^2 n_a n_b / n) / n``. Source: Chan, Golub and
    LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979.

    Args:
        a (tuple of Tensor): mean and variance ``[*]`` and number of rows ``[]``, a
            float. The variance is the mean squared distance from the mean.
        b (tuple of Tensor): likewise; one number at least is not 0.

    Returns:
        tuple of Tensor: mean, variance and number of all rows.

    Examples:
        >>> zero, one, two = torch.tensor([0.0, 1.0, 2.0])
        >>> merge_moments((one, one, two), (two + two, zero, one))
        (tensor(2.), tensor(2.6667), tensor(3.))
    """
    (mean_a, var_a, count_a), (mean_b, var_b, count_b) = a, b
    count, shift = count_a + count_b, mean_b - mean_a
    # Shares: a product of two counts would soon lose its last digits.
    share_a, share_b = count_a / count, count_b / count
    var = share_a * var_a + share_b * var_b + shift.square() * share_a * share_b
    return mean_a + shift * share_b, var, count
