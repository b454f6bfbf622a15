"""Models that do not run in float64: what is stated of their layers is exact, and what their own rounding adds is measured and stated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nettrim
from nettrim import Magnitude, NetTrim, prune, verify
from nettrim.status import Status

DTYPES = [torch.bfloat16, torch.float16]


class Casting(nn.Module):
    """Casts its input to its own dtype, so that it runs in no other."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.a, self.c = nn.Linear(16, 32), nn.Linear(32, 4)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x.to(self.dtype))))


class Middle(Casting):
    """float32 outside, the other dtype inside, with a sum behind a batch-norm."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(torch.float32)
        self.inner = dtype
        self.b, self.d = nn.Linear(32, 32).to(dtype), nn.Linear(32, 32, bias=False).to(dtype)
        self.n = nn.BatchNorm1d(32).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x.to(torch.float32))).to(self.inner)
        return self.c(torch.relu(self.n(self.d(torch.relu(self.b(h)))) + h).to(torch.float32))


class Maps(nn.Module):
    """Convolutions, grouped too, with max-pooling."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.pool, self.c = nn.MaxPool2d(2), nn.Linear(8 * 9, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(torch.relu(self.a(x.to(self.dtype))))
        return self.c(torch.relu(self.b(h)).flatten(1))


KINDS = [(Casting, (200, 16)), (Middle, (100, 16)), (Maps, (12, 1, 6, 6))]


def made(kind: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return kind(dtype).eval(), torch.randn(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "shape"), KINDS)
@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("method", [NetTrim(epsilon=0.1), NetTrim(sparsity=0.5), Magnitude(sparsity=0.5)], ids=lambda m: m.describe())
def test_what_is_stated_is_true_and_verifies(dtype: torch.dtype, kind: Any, shape: Any, scheme: Any, method: Any, tmp_path: Path) -> None:
    net, x = made(kind, dtype, shape)
    result = prune(net, [x], method, scheme=scheme, progress=False)
    certificate = result.certificate
    assert certificate.arithmetic != "float64" and certificate.sound
    if method.kind == "sparsity":
        assert certificate.holds
    for layer in certificate.layers:
        assert layer.met or layer.tolerance is not None
        assert layer.met == (layer.tolerance is None or layer.distance <= layer.tolerance * (1 + 1e-9) + 1e-9 * layer.reference_norm)
        assert 0 < layer.rounding < 0.1 * layer.reference_norm or dtype == torch.bfloat16
        assert layer.bound is None or layer.discrepancy <= layer.bound * (1 + 1e-9)
        assert scheme == "parallel" or layer.bound == pytest.approx(layer.distance_all_rows + layer.rounding)
        assert layer.theorem is None
    network = certificate.network
    with torch.no_grad():
        moved = float((result.model(x).double() - net(x).double()).norm())
    assert network.achieved == pytest.approx(moved, rel=1e-9)
    assert network.bound is None or moved <= network.bound * (1 + 1e-9)
    assert network.bound_from_tolerances is None and network.bound_link_normalised is None
    verify(result.save(tmp_path), net, [x])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distances_are_products_in_float64(dtype: torch.dtype) -> None:
    net, x = made(Casting, dtype, (200, 16))
    result = prune(net, [x], NetTrim(epsilon=0.1), scheme="parallel", progress=False)
    first = result.certificate.layers[0]
    A = x.to(dtype).double()
    before, after = (A @ m.a.weight.detach().double().T + m.a.bias.detach().double() for m in (net, result.model))
    points = before > 0
    distance = float(torch.where(points, after - before, after.clamp(min=0)).norm())
    assert first.distance == pytest.approx(distance, rel=1e-9)
    assert first.reference_norm == pytest.approx(float(before.clamp(min=0).norm()), rel=1e-9)
    with torch.no_grad():
        native = [m.a(x.to(dtype)).double() for m in (net, result.model)]
    rounding = sum(float((given - exact).norm()) for given, exact in zip(native, (before, after), strict=True))
    assert first.rounding == pytest.approx(rounding, rel=1e-9)
    assert first.discrepancy == pytest.approx(float((native[1].clamp(min=0) - native[0].clamp(min=0)).norm()), rel=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.0, 0.9, 1.1])
def test_numbers_that_are_not_the_recomputed_ones_are_refused(dtype: torch.dtype, factor: float, tmp_path: Path) -> None:
    net, x = made(Casting, dtype, (200, 16))
    prune(net, [x], NetTrim(epsilon=0.1), progress=False).save(tmp_path)
    files = {name: json.loads((tmp_path / name).read_text()) for name in ("certificate.json", "report.json")}
    for layer in (*files["certificate.json"]["layers"], *files["report.json"]["layers"]):
        layer["distance"] *= factor
    for name, data in files.items():
        (tmp_path / name).write_text(json.dumps(data))
    with pytest.raises(nettrim.CertificateError, match="distance is stated as"):
        verify(tmp_path, net, [x])


def test_in_float64_nothing_is_taken_for_rounding() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(40, 6)
    for dtype in (torch.float32, torch.bfloat16):  # runs in float64, whatever the weights are stored in
        certificate = prune(net.to(dtype), [x.to(dtype)], NetTrim(epsilon=0.1), progress=False).certificate
        assert certificate.arithmetic == "float64"
        assert all(layer.rounding == 0.0 for layer in certificate.layers) and certificate.network.rounding == 0.0


def test_a_layer_whose_new_weights_overflow_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    """float16 ends at 65,504: of two large weights that cancel, one alone leaves its range."""
    torch.manual_seed(0)
    net = Casting(torch.float16).eval()
    with torch.no_grad():
        net.a.weight[1], net.a.bias[1] = net.a.weight[0], net.a.bias[0]
        net.a.weight[:2] *= 1000
        net.c.weight[:, 0], net.c.weight[:, 1] = 120, -119
    x = torch.randn(60, 16)
    assert float(net.a(x.half())[:, 0].detach().float().max()) * 120 > 1e5
    result = prune(net, [x], Magnitude(sparsity={"a": 0.1, "c": 1 - 4 / 128}), scheme="parallel", progress=False)
    assert [layer.status for layer in result.report.layers] == [Status.CONVERGED, Status.SKIPPED]
    assert any("leaves the range of its own dtype" in note for note in result.report.layers[1].notes)
    assert torch.equal(result.model.c.weight, net.c.weight) and bool(torch.isfinite(result.model(x)).all())
    verify(result.save(tmp_path), net, [x])
