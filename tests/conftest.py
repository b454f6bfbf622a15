"""What holds for every test."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples in every run, and nothing that a clock decides. `pytest --hypothesis-profile=search` looks for new ones.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("steady", settings.get_profile("search"), derandomize=True)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same weights of fresh layers whatever ran before in the process: no test passes or fails by chance."""
    torch.manual_seed(0)
