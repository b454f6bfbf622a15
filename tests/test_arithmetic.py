"""What is compared and solved rounds as float32, whatever the process allows; and the process's settings stay as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import nettrim
from nettrim.arithmetic import full_float32

backends = torch.backends


def operators() -> list[object]:
    """Where newer releases keep a precision; none before 2.9."""
    if not hasattr(backends.cuda.matmul, "fp32_precision"):
        return []
    return [backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn]


def state() -> list[object]:
    try:
        old: list[object] = [torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32]
    except RuntimeError:
        old = []
    return old + [operator.fp32_precision for operator in operators()]


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    values = [operator.fp32_precision for operator in operators()]
    products, convolutions = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(products)
    backends.cudnn.allow_tf32 = convolutions
    for operator, value in zip(operators(), values, strict=True):
        operator.fp32_precision = value


def allow(how: str) -> None:
    if how == "older":
        torch.set_float32_matmul_precision("high")
        backends.cudnn.allow_tf32 = True
    elif how == "newer":
        if not operators():
            pytest.skip("this release of PyTorch has one interface")
        backends.cudnn.conv.fp32_precision = "ieee"
        backends.cuda.matmul.fp32_precision = "tf32"


class Telling(nn.Module):
    """Notes in every pass what is allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.seen = nn.Linear(6, 8), nn.Linear(8, 3), []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(rounded())
        return self.head(torch.relu(self.layer(x)))

    def __deepcopy__(self, memo: object) -> Telling:
        twin = Telling()
        twin.load_state_dict(self.state_dict())
        twin.seen = self.seen
        return twin


def rounded() -> bool:
    """Whether any product or convolution of float32 may be rounded."""
    if operators():
        return any(operator.fp32_precision in ("tf32", "bf16") for operator in operators())
    return torch.get_float32_matmul_precision() != "highest" or bool(backends.cudnn.allow_tf32)


@pytest.mark.parametrize("how", ["default", "older", "newer"])
def test_products_are_full_inside_and_as_before_outside(how: str) -> None:
    allow(how)
    before = state()
    assert rounded()
    with pytest.raises(KeyError), full_float32():
        assert not rounded()
        with full_float32():
            assert not rounded()
        assert not rounded()
        raise KeyError
    assert state() == before


@pytest.mark.parametrize("how", ["default", "older", "newer"])
def test_every_pass_of_a_run_is_full(how: str) -> None:
    allow(how)
    before, model = state(), Telling()
    nettrim.prune(model, torch.randn(40, 6), sparsity=0.5, heldout=torch.randn(20, 6), progress=False)
    assert len(model.seen) > 3 and not any(model.seen)
    assert state() == before
