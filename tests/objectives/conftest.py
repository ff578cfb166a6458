"""What the tests of the loss share: a seed, and a batch drawn after it."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from tests.helpers import make_batch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def batch() -> TensorDict:
    return make_batch()
