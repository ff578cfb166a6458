"""Export a trained policy to ONNX or ``torch.export``, to act without this library."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl.checks import check_output
from alm_torchrl.envs import Normalizers
from alm_torchrl.objectives import ALMLoss
from alm_torchrl.runs.agents import build_env
from alm_torchrl.runs.loading import (
    checkpoint_metadata,
    find_checkpoint,
    load_loss,
    load_policy,
    use_moments,
)
from alm_torchrl.runs.settings import TrainConfig

__all__ = ["MeanPolicy", "check_export_name", "export_policy"]

# Steps of the episodes on which the file is compared with the policy, and how far an
# action may differ.
RECORDED_STEPS = 256
TOLERANCE = 1e-5

Run = Callable[[Tensor], Tensor]


class MeanPolicy(nn.Module):
    """Encoder and actor without noise: the mean of the latent, and of the action.

    A policy from :func:`~alm_torchrl.load_policy` samples the latent, so its actions
    scatter around these, unless the latents are bounded and have no noise.

    Args:
        encoder: reads ``"observation"``, with its normalisation.
        actor: reads what the encoder writes, and writes ``"action"``.
        low: smallest action, ``[A]``, to clamp to.
        high: largest action, ``[A]``.

    Examples:
        >>> from alm_torchrl import make_alm_loss
        >>> loss = make_alm_loss(
        ...     observation_dim=3, action_low=[-1.0], action_high=[1.0], hidden_dim=8
        ... )
        >>> one = torch.ones(1)
        >>> policy = MeanPolicy(loss.encoder, loss.actor, -one, one)
        >>> policy(torch.zeros(4, 3)).shape
        torch.Size([4, 1])
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        encoder: TensorDictModuleBase,
        actor: TensorDictModuleBase,
        low: Tensor,
        high: Tensor,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.actor = actor
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, observation: Tensor) -> Tensor:
        """Actions ``[B, A]`` for observations ``[B, S]``."""
        data = TensorDict(observation=observation, batch_size=observation.shape[:1])
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            acted = self.actor(self.encoder(data))
        return acted.get("action").clamp(self.low, self.high)


def check_export_name(output: Path) -> None:
    """Checks the name of the file to write, and that its format can be written here.

    Raises:
        ValueError: if the name ends otherwise than in ``.onnx`` or ``.pt2``.
        FileExistsError: if the file exists: it is not overwritten.
        ImportError: if packages for ONNX are missing.

    Example:
        >>> check_export_name(Path("policy.pth"))
        Traceback (most recent call last):
        ValueError: output: expected a name in .onnx or .pt2, got policy.pth
    """
    if output.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"output: expected a name in .onnx or .pt2, got {output.name}")
    if output.exists():
        raise FileExistsError(
            f"output: expected a new file, got {output}, which exists"
        )
    check_output("output", output)
    needed = ("onnx", "onnxscript", "onnxruntime") if output.suffix == ".onnx" else ()
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"output: expected {', '.join(missing)} to write {output.name}: pip "
            "install 'alm_torchrl[export]'"
        )


def export_policy(
    path: str | Path, output: str | Path, *, seed: int = 0, trust: bool = False
) -> float:
    """Writes a trained policy as one file that needs neither library nor run.

    The file maps float32 ``observation`` ``[B, S]`` to ``action`` ``[B, A]``, for any
    B: the encoder with its normalisation, the mean of the latent, the actor's mean,
    and the clamp to the action bounds of the training environment. It also holds
    ``task``, ``action_bounds``, ``max_episode_steps`` and ``latent``. With
    ``action_bounds="rescale"`` the actions lie in [-1, 1], for
    ``gymnasium.wrappers.RescaleAction`` to map to the task's.

    The file is compared with the policy on 256 observations, which the policy makes in
    its task, before it gets its name.

    Args:
        path: a run folder, which stands for its newest checkpoint, or a checkpoint.
        output: new file, ``.onnx`` (ONNX, with the extra ``export``) or ``.pt2``
            (``torch.export``).

    Keyword Args:
        seed: of the episodes. Default: ``0``.
        trust: import the module that the run names in its task. Default: ``False``.

    Returns:
        float: the largest difference of an action, at most 1e-5.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        CheckpointError: if it is damaged or foreign.
        ValueError: if the run's agent is not ALM, the file exists or has another
            ending, or its actions differ from the policy's.
        ImportError: if packages for ONNX are missing.

    Warns:
        UserWarning: if the task normalises observations by a wrapper, which is no part
            of the file.

    Examples:
        In a Gymnasium loop, with ONNX Runtime and NumPy alone::

            session = onnxruntime.InferenceSession("policy.onnx")
            observed = observation.astype(np.float32)[None]
            (action,) = session.run(["action"], {"observation": observed})
            observation, reward, terminated, truncated, _ = env.step(action[0])
    """
    output = Path(output)
    check_export_name(output)
    file = find_checkpoint(path)
    metadata = checkpoint_metadata(file)
    config = TrainConfig.from_dict(metadata["settings"])
    loss = load_loss(file)
    if not isinstance(loss, ALMLoss):
        raise ValueError(
            f"{path}: expected a run of the agent 'alm', got {config.agent!r}, whose "
            "policy cannot be exported"
        )
    low, high = (
        torch.tensor(metadata["spaces"][f"action_{side}"]) for side in ("low", "high")
    )
    policy = MeanPolicy(loss.encoder, loss.actor, low, high).requires_grad_(False)
    observed = _record(file, config, seed=seed, trust=trust)
    notes = {
        "task": config.task,
        "action_bounds": config.action_bounds,
        "max_episode_steps": config.max_episode_steps,
        "latent": "mean",
    }
    write, read = _FORMATS[output.suffix]
    program = torch.export.export(
        policy, (observed[:2],), dynamic_shapes=({0: Dim("batch")},), strict=False
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
        draft = Path(folder) / output.name
        write(program, draft, notes)
        run, expected = read(draft), policy(observed)
        got = torch.cat([run(observed[:1]), run(observed[1:])])
        difference = (got - expected).abs().max().item()
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{output}: expected the policy's actions within {TOLERANCE:g}, got a "
                f"difference of {difference:g}; nothing is written"
            )
        draft.rename(output)
    return difference


def _record(file: Path, config: TrainConfig, *, seed: int, trust: bool) -> Tensor:
    """Observations ``[256, S]`` of the policy in its task."""
    env = build_env(config.to_dict(), trust=trust, seed=seed)
    use_moments(env, file)
    if any("NormalizeObservation" in name for name in Normalizers(env).names):
        warnings.warn(
            f"{config.task} normalises its observations by NormalizeObservation, "
            "which is not exported: the file expects observations that it has "
            "normalised.",
            UserWarning,
            stacklevel=3,
        )
    policy = load_policy(file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        data = env.rollout(RECORDED_STEPS, policy, break_when_any_done=False)
    env.close()
    return data["observation"]


def _write_onnx(program: ExportedProgram, path: Path, notes: dict[str, Any]) -> None:
    model = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["observation"],
        output_names=["action"],
    )
    assert model is not None
    model.model.metadata_props.update({k: json.dumps(v) for k, v in notes.items()})
    model.save(path)


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return lambda rows: torch.from_numpy(
        session.run(["action"], {"observation": rows.numpy()})[0]
    )


def _write_pt2(program: ExportedProgram, path: Path, notes: dict[str, Any]) -> None:
    torch.export.save(program, path, extra_files={"notes.json": json.dumps(notes)})


def _read_pt2(path: Path) -> Run:
    return torch.export.load(path).module()


_FORMATS = {".onnx": (_write_onnx, _read_onnx), ".pt2": (_write_pt2, _read_pt2)}
