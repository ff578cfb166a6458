"""Replays three whole updates recorded from the authors' code.

    python tests/parity.py [--compile] FILE.npz ...

Losses, gradients and parameters come from ``ALMLoss`` and
``ALMOptimizationStepper``, intermediate values from the public methods that the
losses call. Sizes and horizon are read from the file, action bounds guessed from the
recorded actions that lie at them. Prints the largest difference of each group of keys,
in units of ``1 + max |recorded|`` of its tensor, and exits with status 1 where one
exceeds 1e-5.

With ``--compile`` the update runs as one compiled graph. Losses, gradient norms and
parameters are compared then, to 2e-5.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType

from alm_torchrl import ALMLoss, ALMOptimizationStepper, make_alm_loss

BOUNDS = {False: "1e-5", True: "2e-5"}  # without and with --compile
PARTS = {
    "encoder": "encoder",
    "model": "model",
    "reward": "reward",
    "classifier": "classifier",
    "critic": "qvalue",
    "actor": "actor",
}
GROUPS = {
    "model_loss": ("encoder_model", ("encoder", "model")),
    "reward_classifier_loss": ("reward_classifier", ("reward", "classifier")),
    "qvalue_loss": ("qvalue", ("critic",)),
    "actor_loss": ("actor", ("actor",)),
}
# The recorded name of each metric of an update that is a loss.
LOSSES = {
    "loss_model": "loss_encoder_model",
    "loss_reward": "loss_reward",
    "loss_classifier": "loss_classifier",
    "loss_qvalue": "loss_qvalue",
    "loss_actor": "loss_actor",
}


class Parity:
    """One recording, replayed."""

    def __init__(self, path: str, *, compile: bool = False) -> None:
        with np.load(path) as file:
            self.data = {key: torch.as_tensor(file[key]) for key in file.files}
        self.updates = len({k.split("/")[0] for k in self.data if k[:6] == "update"})
        self.differences: dict[str, float] = defaultdict(float)
        self.compared: set[str] = set()
        self.loss = self._loss()
        self.loss.deterministic_sampling_mode = ExplorationType.DETERMINISTIC
        self.stepper = ALMOptimizationStepper(self.loss, compile=compile)
        self._load("init")
        self.compile = compile
        # A graph does not return what lies inside a loss.
        for method in () if compile else GROUPS:
            compute = getattr(self.loss, method)
            setattr(self.loss, method, partial(self._compute, method, compute))

    def _loss(self) -> ALMLoss:
        data = self.data
        bound = self._action_bounds()
        return make_alm_loss(
            observation_dim=data["update0/slice/observation"].shape[-1],
            action_low=-bound,
            action_high=bound,
            latent_dim=data["update0/z"].shape[-1],
            hidden_dim=data["init/encoder/encoder.0.bias"].shape[0],
            model_hidden_dim=data["init/model/model.0.bias"].shape[0],
        )

    def _action_bounds(self) -> torch.Tensor:
        recorded = [
            self.data[f"update{update}/imagined_action"].flatten(0, 1)
            for update in range(self.updates)
        ]
        actions = torch.cat(recorded).abs()
        largest = actions.max(0).values
        # An action at its bound is recorded 1e-6 inside it, and more than once.
        hit = (actions == largest).sum(0) > 1
        return torch.where(hit, (largest + 1e-6).round(decimals=5), 1.0)

    def _parameters(self, net: str) -> dict[str, torch.Tensor]:
        """Our parameters of one recorded network, under the recorded names."""
        part = PARTS[net.removesuffix("_target")]
        ours = [name for name, _ in getattr(self.loss, part).named_parameters()]
        prefix = f"init/{net}/"
        theirs = [k.removeprefix(prefix) for k in self.data if k.startswith(prefix)]
        target = "target_" if net.endswith("_target") else ""
        params = getattr(self.loss, f"{target}{part}_params")
        return {
            recorded: params.get(tuple(name.split(".")))
            for recorded, name in zip(theirs, ours, strict=True)
        }

    def _nets(self) -> list[str]:
        return [*PARTS, "encoder_target", "critic_target"]

    def _load(self, prefix: str) -> None:
        for net in self._nets():
            for name, param in self._parameters(net).items():
                param.data.copy_(self.data[f"{prefix}/{net}/{name}"])

    def _batch(self, update: int) -> TensorDict:
        def read(name: str, time: bool) -> TensorDict:
            def get(key: str) -> torch.Tensor:
                value = self.data[f"update{update}/{name}/{key}"]
                return value.transpose(0, 1) if time else value

            action = get("action")
            return TensorDict(
                {
                    "observation": get("observation"),
                    "action": action,
                    ("next", "observation"): get("next_observation"),
                    ("next", "reward"): get("reward").unsqueeze(-1),
                    ("next", "terminated"): get("terminated").unsqueeze(-1),
                },
                batch_size=action.shape[:-1],
            )

        transition = read("transition", time=False)
        imagined = torch.zeros(transition.shape[0], dtype=torch.bool)
        imagined[self.data[f"update{update}/transition/imagined"]] = True
        transition["imagined"] = imagined
        return TensorDict(
            slice=read("slice", time=True),
            transition=transition,
            batch_size=transition.batch_size,
        )

    def _compare(self, key: str, value: torch.Tensor) -> None:
        recorded = self.data[key]
        if value.shape != recorded.shape:
            raise ValueError(f"{key}: shape {value.shape}, expected {recorded.shape}")
        difference = (value.detach() - recorded).abs().max().item()
        difference /= 1 + recorded.abs().max().item()
        head, _, tail = key.partition("/")
        group = tail.split("/")[0] if head.startswith("update") else head
        previous = self.differences[group]
        # A NaN is a difference, and stays one.
        if not (difference <= previous or math.isnan(previous)):
            self.differences[group] = difference
        self.compared.add(key)

    def _compute(
        self, method: str, compute: Callable, batch: TensorDict, *args: object
    ) -> tuple:
        """Runs a loss, and compares all that is known before its step."""
        at = f"update{self.update}"
        for name, value in getattr(self, f"_{method}_values")(batch).items():
            self._compare(f"{at}/{name}", value)
        value, metadata = compute(batch, *args)
        name, nets = GROUPS[method]
        params = {
            f"{net}/{key}": param
            for net in nets
            for key, param in self._parameters(net).items()
        }
        grads = torch.autograd.grad(value, list(params.values()), retain_graph=True)
        for key, grad in zip(params, grads, strict=True):
            self._compare(f"{at}/grad_{name}/{key}", grad)
        return value, metadata

    def _model_loss_values(self, batch: TensorDict) -> dict[str, torch.Tensor]:
        rollout = self.loss.model_rollout(batch["slice"])
        return {
            "kl": rollout["kl"].T.unsqueeze(-1),
            "predicted_reward": rollout["reward"].T.unsqueeze(-1),
            "terminal_value": rollout["terminal_value"].unsqueeze(-1),
        }

    def _reward_classifier_loss_values(
        self, batch: TensorDict
    ) -> dict[str, torch.Tensor]:
        transition = batch["transition"]
        action, chosen = transition["action"], transition["imagined"].unsqueeze(-1)
        z = self.loss.latents.encode(transition).mean
        z_next = self.loss.latents.encode(transition["next"]).mean
        imagined = self.loss.latents.step(z, action).mean
        mixed = torch.where(chosen, imagined, z_next)
        return {
            "z": z,
            "z_next": z_next,
            "z_next_model": imagined,
            "classifier_logits": self.loss.latents.classify(z, action, mixed),
        }

    def _qvalue_loss_values(self, batch: TensorDict) -> dict[str, torch.Tensor]:
        transition = batch["transition"]
        z = self.loss.latents.encode(transition).mean
        q1, q2 = self.loss.latents.state_action_value(z, transition["action"]).split(
            1, -1
        )
        target = self.loss.td_target(transition).unsqueeze(-1)
        return {"target_value": target, "q1": q1, "q2": q2}

    def _actor_loss_values(self, batch: TensorDict) -> dict[str, torch.Tensor]:
        z = self.loss.latents.encode(batch["transition"]).mean
        rollout = self.loss.imagine(z, batch["slice"].shape[1])
        q = f"update{self.update}/imagined_q"
        value = rollout["value"].T.unsqueeze(-1)
        return {
            "imagined_z": rollout["latent"].transpose(0, 1),
            "imagined_action": rollout["action"].transpose(0, 1),
            "imagined_reward": rollout["reward"].T.unsqueeze(-1),
            "imagined_log_ratio": rollout["log_ratio"].T.unsqueeze(-1),
            # Row 0 enters no loss and is not computed.
            "imagined_q": torch.cat([self.data[q][:1], value]),
            "lambda_return": rollout["lambda_return"].T.unsqueeze(-1),
        }

    def run(self) -> dict[str, float]:
        """Replays all updates; returns the largest difference of each group."""
        for update in range(self.updates):
            self.update = update
            batch = self._batch(update)
            metrics = self.stepper.step(None, batch)
            for ours, recorded in LOSSES.items():
                self._compare(f"update{update}/{recorded}", metrics[ours])
            for method, (name, _) in GROUPS.items():
                norm = metrics[f"grad_norm_{method.removesuffix('_loss')}"]
                self._compare(f"update{self.update}/grad_norm_{name}", norm)
            for net in self._nets():
                for key, param in self._parameters(net).items():
                    self._compare(f"after{self.update + 1}/{net}/{key}", param)
        horizon = batch["slice"].shape[1]
        bound = self.loss.lower_bound(batch["transition"], horizon)
        self._compare("lower_bound", bound.unsqueeze(-1))
        return dict(self.differences)

    def missed(self) -> set[str]:
        """Recorded values that nothing was compared with."""
        inputs = ("/slice/", "/transition/", "/std")
        results = ("after", "lower_bound")
        results += tuple(
            f"update{u}/{name}" for u in range(9) for name in ("loss_", "grad_norm_")
        )
        return {
            key
            for key in self.data
            if key not in self.compared
            and not key.startswith("init/")
            and not any(part in key for part in inputs)
            and (not self.compile or key.startswith(results))
        }


def main(arguments: list[str]) -> int:
    """Prints a table for each file; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE.npz")
    parser.add_argument("--compile", action="store_true", help="compile the update")
    failed = False
    given = parser.parse_args(arguments)
    limit = BOUNDS[given.compile]
    for path in given.files:
        parity = Parity(path, compile=given.compile)
        differences = parity.run()
        print(f"{path}: {len(parity.compared)} tensors compared")
        width = max(map(len, differences))
        for group, difference in differences.items():
            bad = not difference <= float(limit)
            failed |= bad
            mark = f"  > {limit}" if bad else ""
            print(f"  {group:<{width}} {difference:9.2e}{mark}")
        for key in sorted(parity.missed()):
            failed = True
            print(f"  {key} was not compared")
    print("FAILED" if failed else f"all within {limit} (1 + max |recorded|)")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
