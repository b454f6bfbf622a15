"""Products of float32 tensors in float32: what is compared must not hang on TF32 or bfloat16, which a process may allow for speed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products and convolutions of float32 tensors round as float32, on every device; afterwards as they did before.

    By default PyTorch lets cuDNN round the factors of convolutions to the 10 bits of TF32, and ``torch.set_float32_matmul_precision`` does
    the like for matrix products. A network's outputs then move by 1e-3 of their size when a layer merely loses channels.
    """
    put_back = _set()
    try:
        yield
    finally:
        put_back()


def _set() -> Callable[[], None]:
    """Sets it; returns what puts it back. PyTorch has two interfaces to one state, and refuses to read by the older what only the newer
    can have set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a newer one
        try:
            products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        except RuntimeError:
            return _set_by_operator()
        _set_alike("highest", False)

    def put_back() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _set_alike(products, convolutions)

    return put_back


def _set_alike(products: str, convolutions: bool) -> None:
    if torch.get_float32_matmul_precision() != products:
        torch.set_float32_matmul_precision(products)
    if torch.backends.cudnn.allow_tf32 != convolutions:
        torch.backends.cudnn.allow_tf32 = convolutions


def _set_by_operator() -> Callable[[], None]:
    backends = torch.backends
    operators = [part for place in (backends.cudnn, backends.mkldnn) for part in (place.conv, place.rnn)]
    operators += [backends.cuda.matmul, backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [(operator, operator.fp32_precision) for operator in operators]

    def put_back() -> None:
        for operator, value in before:
            operator.fp32_precision = value

    for operator in operators:
        operator.fp32_precision = "ieee"
    return put_back
