"""NetTrim(program="halfspace"), gamma and kappa through prune: tolerances, bounds of the theorems, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import nettrim
from nettrim import InvalidInput, NetTrim, PruneResult
from nettrim.experiments.models import fully_connected
from nettrim.status import Status, UnknownLayer
from nettrim.tally import entry_norm


def network(seed: int = 0, sizes: tuple[int, ...] = (8, 12, 10, 4)) -> nn.Sequential:
    return fully_connected(sizes, seed)


def samples(seed: int = 0, count: int = 60, inputs: int = 8) -> torch.Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(seed))


def pruned(method: NetTrim, scheme: str = "cascade", seed: int = 0) -> PruneResult:
    return nettrim.prune(network(seed), samples(seed), method, scheme=scheme, progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("program", ["preimage", "halfspace"])
@pytest.mark.parametrize("norm", ["l1", "l0"])
def test_gamma_gives_the_later_tolerances(program: str, norm: str) -> None:
    if program == "halfspace" and norm == "l0":
        with pytest.raises(InvalidInput, match="norm='l0'"):
            NetTrim(epsilon=0.1, program="halfspace", norm="l0")
        return
    result = pruned(NetTrim(epsilon=0.05, gamma=1.21, program=program, norm=norm))  # type: ignore[arg-type]
    first, *later = result.report.layers
    assert first.tolerance == pytest.approx(0.05 * first.reference_norm)
    assert first.target == "epsilon 0.05" and first.original_distance < 1e-9
    for layer in later:
        assert layer.target == "inflation 1.1"
        if program == "preimage" or layer.activation == "identity":
            assert layer.tolerance == pytest.approx(1.1 * layer.original_distance)
        else:
            assert layer.tolerance is not None and layer.tolerance <= 1.1 * layer.original_distance * (1 + 1e-9)
    assert result.certificate.holds
    assert (result.certificate.program == "halfspace") == (program == "halfspace")


def test_gamma_by_layer_leaves_the_others_at_epsilon() -> None:
    result = pruned(NetTrim(epsilon=0.05, gamma={"5": 1.44}))
    assert [layer.target for layer in result.report.layers] == ["epsilon 0.05", "epsilon 0.05", "inflation 1.2"]
    with pytest.raises(UnknownLayer, match=r"NetTrim\.gamma.*nearest is '5'"):
        pruned(NetTrim(epsilon=0.05, gamma={"6": 1.1}))


def test_kappa_tightens_the_last_layer_and_says_when_it_is_out_of_reach() -> None:
    loose, tight, wild = (pruned(NetTrim(epsilon=0.1, gamma=1.1, kappa=kappa)).report.layers for kappa in (1.0, 0.97, 0.001))
    assert tight[-1].tolerance == pytest.approx(0.97 * (loose[-1].tolerance or 0.0))
    assert [a.tolerance for a in tight[:-1]] == [a.tolerance for a in loose[:-1]]
    assert wild[-1].status is Status.INFEASIBLE
    assert "times the original weights' distance is out of reach" in " ".join(wild[-1].notes)


@pytest.mark.parametrize("scheme", ["parallel", "cascade"])
@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), epsilon=st.sampled_from([0.02, 0.1, 0.3]), program=st.sampled_from(["preimage", "halfspace"]))
def test_theorem_bounds_hold_for_every_layer_of_random_networks(scheme: str, seed: int, epsilon: float, program: str) -> None:
    gamma = 1.1 if scheme == "cascade" else None
    result = pruned(NetTrim(epsilon=epsilon, gamma=gamma, program=program, gap=0.05), scheme, seed)  # type: ignore[arg-type]
    original = dict(network(seed).named_modules())
    bound = 0.0
    for layer in result.certificate.layers:
        assert layer.theorem is not None and layer.tolerance is not None
        if scheme == "parallel":
            module = result.model.get_submodule(layer.name)
            assert isinstance(module, nn.Linear)
            bound = layer.tolerance + entry_norm(module.weight) * bound
        else:
            module = original[layer.name]
            assert isinstance(module, nn.Linear)
            grown = math.inf if layer.original_distance == 0 else layer.tolerance / layer.original_distance
            bound = layer.tolerance if bound == 0.0 else grown * entry_norm(module.weight) * bound
        assert layer.theorem == pytest.approx(bound)
        assert layer.discrepancy <= layer.theorem * (1 + 1e-9)
    assert result.certificate.network.bound_link_normalised == pytest.approx(bound)
    assert result.certificate.holds


def test_the_published_bound_is_the_published_one_in_a_link_normalised_network() -> None:
    model = network().double()
    grown = 1.0
    for module in model:
        if isinstance(module, nn.Linear):
            own = entry_norm(module.weight)
            grown *= own
            with torch.no_grad():
                module.weight /= own
                module.bias /= grown
    method = NetTrim(epsilon=0.05, gamma=1.21)
    result = nettrim.prune(model, samples().double(), method, scheme="cascade", progress=False)
    first, second, third = result.certificate.layers
    assert first.tolerance is not None
    assert second.theorem == pytest.approx(first.tolerance * 1.1)
    assert third.theorem == pytest.approx(first.tolerance * 1.1**2)


def test_saved_results_verify_and_a_changed_tolerance_does_not(tmp_path: Path) -> None:
    for number, method in enumerate((NetTrim(epsilon=0.1, gamma=1.1, program="halfspace"), NetTrim(epsilon=0.1, gamma=1.1))):
        folder = pruned(method).save(tmp_path / str(number))
        nettrim.verify(folder, network(), samples())
        report = folder / "report.json"
        text = report.read_text()
        assert f'"inflation {math.sqrt(1.1)!r}"' in text
        report.write_text(text.replace(f'"inflation {math.sqrt(1.1)!r}"', '"inflation 1.01"'))
        with pytest.raises(nettrim.CertificateError, match=r"inflation 1\.01"):
            nettrim.verify(folder, network(), samples())


class Halves(nn.Module):
    """A grouped convolution whose first group sees inputs as they are, the second one inputs that pruning moved."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.last = nn.Conv1d(2, 4, 3), nn.Conv1d(6, 4, 1, groups=2), last
        nn.init.constant_(self.b.bias, 0.3)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x))
        return self.last(self.b(torch.cat([x[..., 2:], x[..., 2:3].repeat_interleave(y.shape[-1], -1)[:, :1], y[:, :3]], 1)))


@pytest.mark.parametrize("last", [nn.Identity(), nn.ReLU()], ids=["linear", "relu"])
@pytest.mark.parametrize("program", ["preimage", "halfspace"])
def test_groups_share_one_target(last: nn.Module, program: str, tmp_path: Path) -> None:
    """Of a layer of which pruning moved one group's inputs alone, the other group's tolerance comes from gamma too."""
    model, x = Halves(last).eval(), torch.randn(20, 2, 8, generator=torch.Generator().manual_seed(0))
    method = NetTrim(epsilon=0.5, gamma=1.1, kappa=0.97, program=program, gap=0.05)  # type: ignore[arg-type]
    result = nettrim.prune(model, x, method, progress=False)
    layer = result.report.layers[1]
    factor = math.sqrt(1.1) * (0.97 if isinstance(last, nn.Identity) else 1.0)
    assert layer.name == "b" and layer.target == f"inflation {factor!r}" and layer.tolerance is not None
    if program == "preimage":
        assert layer.tolerance == pytest.approx(factor * layer.original_distance, rel=1e-5)
    nettrim.verify(result.save(tmp_path / "result"), model, x)


def test_published_program_reports_its_violation() -> None:
    result = pruned(NetTrim(epsilon=0.1, program="halfspace"), "parallel")
    for layer in result.report.layers[:-1]:
        assert layer.violation is not None and 0 <= layer.violation < 0.01
    assert result.report.layers[-1].violation == 0.0
    assert pruned(NetTrim(epsilon=0.1), "parallel").report.layers[0].violation is None
    assert "halfspace" in str(result.certificate)


def test_published_program_without_gamma_in_the_cascade_widens_what_is_out_of_reach() -> None:
    result = pruned(NetTrim(epsilon={"1": 0.3, "3": 0.001, "5": 0.3}, program="halfspace"))
    second = result.report.layers[1]
    assert second.status is Status.INFEASIBLE
    assert "the original weights' own residual was used" in " ".join(second.notes)
    assert result.certificate.sound and not result.certificate.layers[1].met


def test_zero_tolerance_and_zero_outputs() -> None:
    result = pruned(NetTrim(epsilon=0.0, program="halfspace"), "parallel")
    assert all(layer.status is Status.ORIGINAL_KEPT for layer in result.report.layers)
    silent = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    with torch.no_grad():
        silent[0].weight.zero_().add_(0.1)
        silent[0].bias.fill_(-100.0)
    result = nettrim.prune(silent, samples(), NetTrim(epsilon=0.1, program="halfspace"), progress=False)
    assert result.report.nonzeros == 0 and result.certificate.holds


def test_penalty_with_the_published_program() -> None:
    result = pruned(NetTrim(penalty=0.5, program="halfspace"), "parallel")
    assert all(layer.status is Status.CONVERGED and layer.gap is not None and layer.gap <= 0.01 for layer in result.report.layers)
    assert result.certificate.holds


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epsilon": 0.1, "program": "half"}, "program must be"),
        ({"sparsity": 0.5, "program": "halfspace"}, "takes epsilon or penalty"),
        ({"penalty": 0.0, "program": "halfspace"}, "penalty above 0"),
        ({"epsilon": 0.1, "program": "halfspace", "polish": True}, "polish=True"),
        ({"epsilon": 0.1, "program": "halfspace", "correction": 0.5}, "correction must be 1"),
        ({"epsilon": 0.1, "gamma": 0.9}, "gamma must be at least 1"),
        ({"epsilon": 0.1, "gamma": {"a": 1.1, "b": 0.5}}, "gamma must be at least 1"),
        ({"epsilon": 0.1, "gamma": math.nan}, "finite number"),
        ({"sparsity": 0.1, "gamma": 1.1}, "needs epsilon"),
        ({"epsilon": 0.1, "gamma": 1.1, "correction": 0.5}, "correction must be 1"),
        ({"epsilon": 0.1, "gamma": 1.1, "kappa": 0.0}, "kappa must lie"),
        ({"epsilon": 0.1, "kappa": 0.5}, "give gamma too"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        NetTrim(**given)


def test_gamma_in_the_parallel_scheme_is_refused() -> None:
    with pytest.raises(InvalidInput, match="gamma speaks of the cascade"):
        pruned(NetTrim(epsilon=0.1, gamma=1.1), "parallel")
