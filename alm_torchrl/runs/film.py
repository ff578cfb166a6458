"""Film a policy, without a display."""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type

from alm_torchrl.checks import check_integer
from alm_torchrl.compat import gymnasium_env

__all__ = [
    "Film",
    "check_film_name",
    "draws_pictures",
    "film_policy",
    "render_headless",
]

_MAX_FPS = 50
_GIF_HEIGHT = 320

Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Film:
    """What a film shows."""

    path: Path
    """The file."""
    frames: int
    """Frames written."""
    fps: float
    """Frames per second, which play at the task's own speed."""
    steps: int
    """Environment steps shown."""
    episode_return: float
    """Sum of their rewards."""


def render_headless() -> None:
    """Lets MuJoCo and pygame draw on a Linux machine without a display.

    Call it before MuJoCo is first imported. ``MUJOCO_GL`` and ``SDL_VIDEODRIVER``
    are left alone if they are set.
    """
    display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform == "linux" and not display:
        os.environ.setdefault("MUJOCO_GL", "egl")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")


def draws_pictures(env: TransformedEnv) -> bool:
    """Whether the environment's task says that it can be filmed."""
    return "rgb_array" in gymnasium_env(env.base_env).metadata.get("render_modes", ())


def check_film_name(output: Path) -> None:
    """Checks that a film's name ends in ``.gif`` or ``.mp4``."""
    if output.suffix.lower() not in (".gif", ".mp4"):
        raise ValueError(f"output: expected a name in .gif or .mp4, got {output.name}")


def film_policy(
    env: TransformedEnv,
    policy: TensorDictModuleBase,
    output: Path,
    *,
    seed: int = 0,
    max_steps: int | None = None,
) -> Film:
    """Films one episode, or its first steps, without exploration.

    The environment is made with ``render_mode="rgb_array"``. A GIF is at most 320
    pixels high; at more than 50 steps per second, only every n-th step is shown.

    Raises:
        ValueError: if the file has another ending, the environment draws no
            pictures or others than RGB(A), or ``max_steps`` is not positive.
        ImportError: if a package that writes films is missing.
    """
    check_film_name(output)
    if max_steps is not None:
        check_integer("max_steps", max_steps)
    writer = _write_gif if output.suffix.lower() == ".gif" else _write_mp4
    gym_env = gymnasium_env(env.base_env)
    if gym_env.render_mode != "rgb_array" or not draws_pictures(env):
        raise ValueError(
            "env: expected a task that draws pictures and render_mode='rgb_array', "
            f"got {gym_env} with render_mode={gym_env.render_mode!r}"
        )
    _follow(gym_env.unwrapped)
    rate = float(gym_env.metadata.get("render_fps", 30))
    stride = math.ceil(rate / _MAX_FPS)
    steps, total = 0, 0.0

    def frames() -> Iterator[Frame]:
        nonlocal steps, total
        env.set_seed(seed)
        data = env.reset()
        yield _rgb(gym_env.render())
        while True:
            data = env.step(policy(data))
            steps += 1
            total += data["next", "reward"].item()
            if steps % stride == 0:
                yield _rgb(gym_env.render())
            if data["next", "done"].item() or steps == max_steps:
                return
            data = env.step_mdp(data)

    output.parent.mkdir(parents=True, exist_ok=True)
    deterministic = set_exploration_type(ExplorationType.DETERMINISTIC)
    with torch.random.fork_rng(), torch.no_grad(), deterministic:
        torch.manual_seed(seed)
        count = writer(output, frames(), rate / stride)
    return Film(output, count, rate / stride, steps, total)


def _rgb(picture: Any) -> Frame:  # noqa: ANN401
    """A frame of a task without its transparency."""
    frame = np.asarray(picture)
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] not in (3, 4):
        raise ValueError(
            "env: expected frames [height, width, 3 or 4] of uint8, got "
            f"{list(frame.shape)} of {frame.dtype}"
        )
    return np.ascontiguousarray(frame[..., :3])


def _follow(task: Any) -> None:  # noqa: ANN401
    """Chooses the camera that follows the body, if a MuJoCo task has one."""
    renderer = getattr(task, "mujoco_renderer", None)
    if renderer is None or (task.camera_id, task.camera_name) != (None, None):
        return
    model = renderer.model
    names = [model.camera(index).name for index in range(model.ncam)]
    if "track" in names:
        # Gymnasium's own choice stands still.
        renderer.camera_id = names.index("track")


def _write_gif(path: Path, frames: Iterator[Frame], fps: float) -> int:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("GIFs need Pillow: pip install 'alm_torchrl[cli]'") from error

    def small(frame: Frame) -> Image.Image:
        image = Image.fromarray(frame)
        factor = math.ceil(image.height / _GIF_HEIGHT)
        return image.reduce(factor)

    first, *others = [small(frame) for frame in frames]
    # The format counts time in hundredths of a second.
    duration = max(20, 10 * round(100 / fps))
    first.save(path, save_all=True, append_images=others, duration=duration, loop=0)
    return 1 + len(others)


def _write_mp4(path: Path, frames: Iterator[Frame], fps: float) -> int:
    try:
        import imageio_ffmpeg
    except ImportError as error:
        raise ImportError(
            "MP4 films need imageio-ffmpeg: pip install 'alm_torchrl[cli]'"
        ) from error
    first = next(frames)
    height, width, _ = first.shape
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=fps, macro_block_size=2
    )
    writer.send(None)
    count = 0
    for frame in itertools.chain([first], frames):
        writer.send(frame)
        count += 1
    writer.close()
    return count
