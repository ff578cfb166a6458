"""What a run logged to TensorBoard, read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["TERMS", "Logged", "read_logged"]

TERMS = {
    "kl": "KL, model to encoder (nats)",
    "model_reward": "reward in the model loss",
    "terminal_value": "terminal value in the model loss",
    "loss_model": "model loss (Eq. 7)",
    "loss_reward": "reward loss (Eq. 11)",
    "loss_classifier": "classifier loss (Eq. 9)",
    "classifier_accuracy": "classifier accuracy",
    "loss_qvalue": "critic loss (Eq. 10)",
    "imagined_reward": "imagined reward",
    "imagined_log_ratio": "imagined log ratio (nats)",
    "imagined_value": "imagined value",
    "loss_actor": "actor loss (Eq. 8)",
}
"""Terms of the objective, by the name they are logged with, and what they are."""


@dataclass(frozen=True)
class Logged:
    """One scalar over training."""

    steps: NDArray[np.int64]
    """Environment steps, warm-up included, shape [N]."""
    values: NDArray[np.float64]
    """What was logged there, shape [N]."""


def read_logged(run: Path) -> dict[str, Logged]:
    """Every scalar that a run logged to TensorBoard, by name.

    What a resumed run logged again replaces what it had logged before.

    Args:
        run: the run folder.

    Raises:
        FileNotFoundError: if the run logged nothing.
        ImportError: if tensorboard is missing.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import (
            EventAccumulator,
        )
    except ImportError as error:
        raise ImportError(
            "reading logs needs tensorboard: pip install 'alm_torchrl[cli]'"
        ) from error
    folder = run / "tensorboard"
    found: dict[str, Logged] = {}
    if folder.is_dir():
        # Zero keeps all events, not a sample of them.
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        for name in events.Tags()["scalars"]:
            entries = events.Scalars(name)
            found[name] = Logged(
                np.array([entry.step for entry in entries], np.int64),
                np.array([entry.value for entry in entries], np.float64),
            )
    if not found:
        raise FileNotFoundError(
            f"{run} logged nothing to TensorBoard: there are no scalars in {folder}. "
            "Train with --logger tensorboard, and for longer than --log-interval"
        )
    return found
