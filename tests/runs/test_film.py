"""Films show the body, wherever it goes, without a display."""

from __future__ import annotations

from typing import ClassVar

import gymnasium
import mujoco
import numpy as np
import pytest
from torchrl.envs import GymWrapper, TransformedEnv

from alm_torchrl import make_env, zero_policy
from alm_torchrl.runs.film import film_policy, render_headless

render_headless()


def can_draw():
    try:
        context = mujoco.GLContext(64, 64)
    except Exception:
        return False
    context.free()
    return True


@pytest.mark.skipif(not can_draw(), reason="MuJoCo finds no OpenGL to draw with")
@pytest.mark.parametrize(
    ("task", "camera", "suffix"),
    [("HalfCheetah-v5", "track", "gif"), ("InvertedPendulum-v5", None, "mp4")],
)
def test_the_camera_follows_where_the_task_has_one(task, camera, suffix, tmp_path):
    import imageio.v3

    env = make_env(task, action_bounds="rescale", render_mode="rgb_array")
    path = tmp_path / "new folder" / f"film.{suffix}"
    film = film_policy(env, zero_policy(env), path, max_steps=2)
    assert (film.steps, film.frames) == (2, 3)
    renderer = env.base_env._env.unwrapped.mujoco_renderer
    chosen = renderer.camera_id
    assert (renderer.model.camera(chosen).name if chosen >= 0 else None) == camera
    frames = np.asarray(imageio.v3.imread(path))
    assert 2 <= len(frames) <= 4
    assert frames.std() > 1
    assert frames.shape[1] >= 200
    env.close()


class Pictures(gymnasium.Env):
    """A task that only draws: the frame that it is given."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    render_mode = "rgb_array"

    def __init__(self, frame):
        self.frame = frame

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 0.0, False, False, {}

    def render(self):
        return self.frame


def film(frame, path):
    env = TransformedEnv(GymWrapper(Pictures(frame)))
    return film_policy(env, zero_policy(env), path, max_steps=3)


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_transparency_is_left_out(suffix, tmp_path):
    import imageio.v3

    frame = np.full((64, 48, 4), (250, 10, 20, 99), np.uint8)
    film(frame, tmp_path / f"film.{suffix}")
    frames = np.asarray(imageio.v3.imread(tmp_path / f"film.{suffix}")).astype(int)
    assert frames.shape[1:3] == (64, 48)
    assert abs(frames[..., :3] - frame[..., :3]).max() < 12


@pytest.mark.parametrize(
    ("frame", "got"),
    [
        (np.zeros((8, 8, 3)), r"\[8, 8, 3\] of float64"),
        (np.zeros((8, 8), np.uint8), r"\[8, 8\] of uint8"),
        (np.zeros((3, 8, 8), np.uint8), r"\[3, 8, 8\] of uint8"),
        (None, r"\[\] of object"),
    ],
)
def test_other_frames_are_refused(frame, got, tmp_path):
    with pytest.raises(ValueError, match=f"env: expected frames .* got {got}"):
        film(frame, tmp_path / "film.gif")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_filmed_is_refused(tmp_path):
    env = make_env("Pendulum-v1", action_bounds="rescale")
    policy = zero_policy(env)
    with pytest.raises(ValueError, match="max_steps: expected an integer >= 1, got 0"):
        film_policy(env, policy, tmp_path / "film.gif", max_steps=0)
    with pytest.raises(ValueError, match=r"expected a name in \.gif or .* got film.av"):
        film_policy(env, policy, tmp_path / "film.avi")
    with pytest.raises(ValueError, match=r"env: expected .* got .*render_mode=None"):
        film_policy(env, policy, tmp_path / "film.gif")
    assert list(tmp_path.iterdir()) == []
