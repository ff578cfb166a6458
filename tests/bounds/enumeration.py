"""Slow oracle for `alm_torchrl.bounds`: every trajectory of one tiny problem, in loops.

A path is a tuple of triples ``(s, z, a)``. Nothing here is shared with the package.
"""

from __future__ import annotations

import math
from itertools import pairwise, product

import torch


class Enumeration:
    def __init__(self, mdp, agent, horizon, behaviour=None):
        self.start = mdp.initial.tolist()
        self.kernel = mdp.kernel.tolist()
        self.reward = mdp.reward.tolist()
        self.gamma = mdp.gamma.item()
        self.encoder = agent.encoder.tolist()
        self.model = agent.model.tolist()
        self.policy = agent.policy.tolist()
        self.behaviour = None if behaviour is None else behaviour.tolist()
        self.horizon = horizon
        self.states, self.actions = mdp.states, mdp.actions
        self.latents = agent.latents
        acts = self.acts() if behaviour is None else self.behaviour
        self.qvalue = self.values(acts)

    def acts(self):
        """The agent's policy in each state."""
        return [
            [
                sum(self.encoder[s][z] * self.policy[z][a] for z in range(self.latents))
                for a in range(self.actions)
            ]
            for s in range(self.states)
        ]

    def values(self, policy):
        """Normalised Q by value iteration until nothing changes."""
        states, actions = range(self.states), range(self.actions)
        table = [[0.0] * self.actions for _ in states]
        for _ in range(int(40 / (1 - self.gamma))):
            value = [sum(policy[s][a] * table[s][a] for a in actions) for s in states]
            table = [
                [
                    (1 - self.gamma) * self.reward[s][a]
                    + self.gamma * sum(self.kernel[s][a][p] * value[p] for p in states)
                    for a in actions
                ]
                for s in states
            ]
        return table

    def paths(self, last):
        """All paths ``t = 0..last``."""
        triples = product(range(self.states), range(self.latents), range(self.actions))
        return product(list(triples), repeat=last + 1)

    def real(self, path):
        """``p(tau|H)``; with a behaviour policy ``p_b(tau|H)``."""
        chance = self.start[path[0][0]]
        for t, (s, z, a) in enumerate(path):
            act = self.policy[z][a] if self.behaviour is None else self.behaviour[s][a]
            chance *= self.encoder[s][z] * act
            if t + 1 < len(path):
                chance *= self.kernel[s][a][path[t + 1][0]]
        return chance

    def imagined(self, path):
        """``q(tau|H)`` of Eq. 4."""
        s, z, a = path[0]
        chance = self.start[s] * self.encoder[s][z] * self.policy[z][a]
        for (s, z, a), (s2, z2, a2) in pairwise(path):
            chance *= self.kernel[s][a][s2] * self.model[z][a][z2] * self.policy[z2][a2]
        return chance

    def mean(self, chance, last, f):
        """``E[f(path)]`` over paths ``t = 0..last``."""
        weighted = ((chance(path), path) for path in self.paths(last))
        return sum(weight * f(path) for weight, path in weighted if weight > 0)

    def payoff(self, path):
        """``psi``: the reward at the path's end or, after ``K`` steps, the value."""
        s, _, a = path[-1]
        last = len(path) - 1 == self.horizon
        return self.qvalue[s][a] if last else self.reward[s][a]

    def intrinsic(self, path, t):
        """``log e(z_{t+1}|s_{t+1}) - log m(z_{t+1}|z_t, a_t)`` of one path."""
        _, z, a = path[t]
        s2, z2, _ = path[t + 1]
        return math.log(self.encoder[s2][z2]) - math.log(self.model[z][a][z2])

    def geometric(self):
        steps = [(1 - self.gamma) * self.gamma**t for t in range(self.horizon)]
        return [*steps, self.gamma**self.horizon]

    def term(self, last):
        """``E_q log[p(tau|H) psi / q(tau|H)]``."""
        return self.mean(
            self.imagined,
            last,
            lambda path: math.log(
                self.real(path) * self.payoff(path) / self.imagined(path)
            ),
        )

    def printed(self, steps):
        """``L^k`` of Eq. 5 and 6, letter by letter."""

        def along(path):
            total = 0.0
            for t in range(steps):
                s, _, a = path[t]
                extrinsic = (1 - self.gamma) * math.log(self.reward[s][a])
                total += self.gamma**t * (extrinsic + self.intrinsic(path, t))
            s, _, a = path[steps]
            return total + self.gamma**steps * math.log(self.qvalue[s][a])

        return self.mean(self.imagined, steps, along)

    def k_step_return(self, path):
        """``RL^K`` of a path (A.3): rewards of ``K`` steps, then the value."""
        total = 0.0
        for t, (s, _, a) in enumerate(path[:-1]):
            total += (1 - self.gamma) * self.gamma**t * self.reward[s][a]
        s, _, a = path[-1]
        return total + self.gamma ** (len(path) - 1) * self.qvalue[s][a]


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)
