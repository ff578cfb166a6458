"""Films show the body, wherever it goes, without a display."""

from __future__ import annotations

import mujoco
import numpy as np
import pytest

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
