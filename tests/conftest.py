"""What holds for every test."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same weights of fresh layers whatever ran before in the process: no test passes or fails by chance."""
    torch.manual_seed(0)
