"""Films show the body, wherever it goes."""

from __future__ import annotations

import pytest

from alm_torchrl import make_env, zero_policy
from alm_torchrl.runs.film import film_policy, render_headless

render_headless()


def test_a_film_has_steps(tmp_path):
    with pytest.raises(ValueError, match="max_steps: expected an integer >= 1, got 0"):
        film_policy(None, None, tmp_path / "film.gif", max_steps=0)


@pytest.mark.parametrize(
    ("task", "camera"), [("HalfCheetah-v5", "track"), ("InvertedPendulum-v5", None)]
)
def test_the_camera_follows_where_the_task_has_one(task, camera, tmp_path):
    env = make_env(task, action_bounds="rescale", render_mode="rgb_array")
    film = film_policy(env, zero_policy(env), tmp_path / "film.gif", max_steps=2)
    assert (film.steps, film.frames) == (2, 3)
    renderer = env.base_env._env.unwrapped.mujoco_renderer
    chosen = renderer.camera_id
    assert (renderer.model.camera(chosen).name if chosen >= 0 else None) == camera
    env.close()
