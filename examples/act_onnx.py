"""Act in a Gymnasium task with an exported policy: ONNX Runtime and NumPy, no PyTorch.

    alm-torchrl export runs/HalfCheetah-v5-alm-quick-s0 policy.onnx
    pip install onnxruntime 'gymnasium[mujoco]'
    python examples/act_onnx.py policy.onnx

The file says which task it is for, and between which bounds its actions lie.
"""

from __future__ import annotations

import argparse
import json

import gymnasium
import numpy as np
import onnxruntime
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, RescaleAction


def main() -> None:
    """Acts, and prints the return of each episode."""
    parser = argparse.ArgumentParser(description="Act with an exported policy.")
    parser.add_argument("policy", help="file that `alm-torchrl export` wrote")
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    session = onnxruntime.InferenceSession(options.policy)
    stored = session.get_modelmeta().custom_metadata_map
    notes = {name: json.loads(text) for name, text in stored.items()}
    print(f"{notes['task']}, actions {notes['action_bounds']}")

    env = gymnasium.make(notes["task"], max_episode_steps=notes["max_episode_steps"])
    if not isinstance(env.observation_space, spaces.Box):
        env = FlattenObservation(env)
    if notes["action_bounds"] == "rescale":
        env = RescaleAction(env, np.float32(-1.0), np.float32(1.0))
    for episode in range(options.episodes):
        observation, _ = env.reset(seed=options.seed + episode)
        total, steps, done = 0.0, 0, False
        while not done:
            observed = observation.astype(np.float32)[None]
            (action,) = session.run(["action"], {"observation": observed})
            observation, reward, terminated, truncated, _ = env.step(action[0])
            total, steps = total + float(reward), steps + 1
            done = terminated or truncated
        print(f"episode {episode}: {steps} steps, return {total:.1f}")


if __name__ == "__main__":
    main()
