"""Calibration passes: nothing of the user's is changed, whatever happens, and the right rows are seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nettrim import InvalidInput, NetTrim, capture, prune
from nettrim.calibration import Calibration
from nettrim.capture import Selection, layer_task, reference_replica, replicate, scan
from nettrim.graph import Chain, Graph, Reading
from nettrim.preimage import IDENTITY, RELU

CPU = torch.device("cpu")


def data(rows: int = 60, columns: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)
    )


class Snapshot:
    """All that must not change about a user's model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modes = [module.training for module in model.modules()]
        self.flags = [parameter.requires_grad for parameter in model.parameters()]
        self.objects = [id(parameter) for parameter in model.parameters()]
        self.versions = [parameter._version for parameter in model.parameters()]
        self.state = {key: value.clone() for key, value in model.state_dict().items()}
        self.hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks)) for m in model.modules()]
        self.grads = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
        self.random = torch.get_rng_state()

    def check(self) -> None:
        model = self.model
        assert [module.training for module in model.modules()] == self.modes
        assert [parameter.requires_grad for parameter in model.parameters()] == self.flags
        assert [id(parameter) for parameter in model.parameters()] == self.objects
        assert [parameter._version for parameter in model.parameters()] == self.versions
        assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks)) for m in model.modules()] == self.hooks
        assert model.state_dict().keys() == self.state.keys()
        for key, value in model.state_dict().items():
            assert value.numpy().tobytes() == self.state[key].numpy().tobytes(), key
        for parameter, grad in zip(model.parameters(), self.grads, strict=True):
            assert (parameter.grad is None) == (grad is None) and (grad is None or torch.equal(parameter.grad, grad))
        assert torch.equal(torch.get_rng_state(), self.random)


def prepared() -> nn.Sequential:
    """A model in use: part frozen, part in eval mode, with hooks of the user's own and gradients."""
    model = net()
    model(data()).sum().backward()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    model[0].register_forward_hook(lambda module, inputs, output: None)
    model[6].register_forward_pre_hook(lambda module, inputs: None)
    return model


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_user_model_is_untouched_after_success(scheme: Any) -> None:
    model = prepared()
    before = Snapshot(model)
    result = prune(model, data(), NetTrim(epsilon=0.1), scheme=scheme, heldout=data(seed=1), progress=False)
    before.check()
    assert [module.training for module in result.model.modules()] == before.modes
    assert [parameter.requires_grad for parameter in result.model.parameters()] == before.flags
    assert list(result.model.state_dict()) == list(before.state)
    assert all(parameter.grad is None for parameter in result.model.parameters())


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["solver", "model", "pass", "certificate"])
def test_user_model_is_untouched_after_an_error(error: BaseException, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared()

    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise error

    if where == "solver":
        monkeypatch.setattr(NetTrim, "solve", fail)
    elif where == "model":
        model[3].forward = _after(fail, 6)  # type: ignore[method-assign]
    elif where == "pass":
        monkeypatch.setattr("nettrim.run.layer_task", fail)
    else:
        monkeypatch.setattr("nettrim.run.certify", fail)
    before = Snapshot(model)
    with pytest.raises((type(error), InvalidInput)):
        prune(model, data().split(20), NetTrim(epsilon=0.1), progress=False)
    before.check()


def _after(fail: Callable[..., Any], calls: int) -> Callable[[Tensor], Tensor]:
    """A forward that fails at a later call; it lives in the copies as well, as closures do."""
    left = [calls]

    def forward(x: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            fail()
        return x

    return forward


def test_hooks_of_a_replica_are_removed_after_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = replicate(net(), CPU, torch.float64)

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(capture.data, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        replica.calls(data(), ["0", "4"])
    assert all(not module._forward_hooks for module in replica.model.modules())


def test_a_model_that_catches_exceptions_does_not_disturb_a_pass() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            try:
                h = self.a(x)
            except Exception:
                h = x[:, :5]
            return self.b(h)

    torch.manual_seed(0)
    model = Careful()
    result = prune(model, data(), NetTrim(epsilon=0.0), progress=False)
    torch.testing.assert_close(result.model(data()), model(data()))


def test_random_state_is_untouched_by_loaders() -> None:
    loader = DataLoader(TensorDataset(data()), batch_size=10)
    model, before = net(), torch.get_rng_state()
    prune(model, loader, NetTrim(sparsity=0.5), progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_model_is_refused() -> None:
    class Sampling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(F.dropout(x, 0.5, training=True))

    with pytest.raises(InvalidInput, match=r"two different outputs.*randomness"):
        prune(Sampling(), data(), NetTrim(epsilon=0.1), progress=False)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = net()
    model.kept = model(data())  # type: ignore[assignment]  # not a leaf: deepcopy refuses it
    with pytest.raises(InvalidInput, match="cannot be copied"):
        prune(model, data(), NetTrim(epsilon=0.1), progress=False)


def test_unknown_device_is_refused() -> None:
    for device in ("nowhere", "cuda:99"):
        with pytest.raises(InvalidInput, match="cannot be used here; on this machine there is 'cpu'"):
            prune(net(), data(), NetTrim(epsilon=0.1), device=device, progress=False)


# --- what is seen -------------------------------------------------------------------------------------------------------------------


class Inplace(nn.Module):
    """Everything that a layer reads or gives is changed in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = self.a(x)
        x.zero_()
        F.silu(h, inplace=True)
        g = self.b(h)
        h.mul_(3)
        g += h
        return self.c(F.leaky_relu_(g, 0.2))


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_values_changed_in_place_later_in_the_pass(scheme: Any) -> None:
    torch.manual_seed(0)
    model, x = Inplace(), data()
    replica = replicate(model, CPU, torch.float64)
    seen, _ = replica.calls(x, ["a", "b", "c"])
    for name, (call,) in seen.items():
        layer = replica.model.get_submodule(name)
        torch.testing.assert_close(layer(call.x), call.y)
    torch.testing.assert_close(seen["a"][0].x, x.double())
    result = prune(model, x, NetTrim(sparsity=0.3), scheme=scheme, progress=False)
    assert result.certificate.holds
    assert [layer.distance for layer in result.certificate.layers] == pytest.approx(
        [layer.distance for layer in result.report.layers], rel=1e-6
    )


class Sequence(nn.Module):
    """Integer inputs, a keyword call, three-dimensional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.fc, self.out = nn.Linear(6, 7), nn.Linear(7, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(input=torch.relu(self.fc(input=self.table(tokens))))


def test_integer_inputs_and_keyword_calls() -> None:
    torch.manual_seed(0)
    model = Sequence()
    tokens = torch.randint(0, 11, (30, 4), generator=torch.Generator().manual_seed(0))
    result = prune(model, tokens, NetTrim(sparsity=0.4), progress=False)
    assert [layer.rows for layer in result.report.layers] == [120, 120]
    assert result.certificate.arithmetic == "float64"
    assert result.certificate.holds


def test_a_model_that_does_not_run_in_float64() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x.to(torch.float32))))

    torch.manual_seed(0)
    for scheme in ("cascade", "parallel"):
        for method in (NetTrim(epsilon=0.1), NetTrim(epsilon=0.0), NetTrim(sparsity=0.5)):
            result = prune(Casting(), data(), method, scheme=scheme, progress=False)  # type: ignore[arg-type]
            assert "does not run in float64" in result.certificate.arithmetic
            assert any("does not run in float64" in note for note in result.report.notes)
            assert result.certificate.holds


def test_a_model_in_bfloat16_that_does_not_run_in_float64() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x.to(torch.bfloat16))))

    torch.manual_seed(0)
    result = prune(Casting().bfloat16(), data(), NetTrim(epsilon=0.2), scheme="parallel", progress=False)
    assert result.certificate.holds


def test_scan_counts_rows_calls_and_order() -> None:
    class Order(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first, self.never = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(self.first(x)))

    x = data()
    reference, notice = reference_replica(Order(), CPU, x)
    found = scan(reference, ["second", "first", "never"], Calibration(list(x.split(25))))
    assert notice == ""
    assert found.order == ["first", "second"]
    assert found.rows == {"first": 120, "second": 60}
    assert found.calls == {"first": 2, "second": 1}
    assert found.samples == 60


def test_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.mean()

    model = nn.Sequential(Adapted(6, 5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(InvalidInput, match=r"'0' \(Adapted\) does not put out its input times its weight.*ignore=\['0'\]"):
        prune(model, data(), NetTrim(epsilon=0.1), progress=False)
    assert prune(model, data(), NetTrim(epsilon=0.1), ignore=["0"], progress=False).certificate.holds
    hooked = net()
    hooked[4].register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(InvalidInput, match="'4'"):
        prune(hooked, data(), NetTrim(epsilon=0.1), progress=False)


def test_routing_by_data_is_refused() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.expert = nn.Linear(6, 1), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = x[:, :3].clone()
            chosen = self.gate(x)[:, 0] > 0
            out[chosen] = self.expert(x[chosen])
            return out

    torch.manual_seed(0)
    with pytest.raises(InvalidInput, match="'expert' sees other rows"):
        prune(Routed(), data(300), NetTrim(sparsity=0.9), progress=False)
    assert prune(Routed(), data(300), NetTrim(sparsity=0.9), ignore=["gate"], progress=False).certificate.holds


# --- which rows are kept ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "limit"), [(10, 10), (10, 20), (1000, 1), (1000, 999), (5000, 37)])
def test_selection_streams_independently_of_batches(total: int, limit: int) -> None:
    def chosen(sizes: list[int], seed: int = 3) -> list[int]:
        selection, start, rows = Selection(total, limit, seed), 0, []
        for size in sizes:
            rows += (torch.arange(start, start + size)[selection.within(start, size)]).tolist()
            start += size
        assert selection.count == len(rows) == min(total, limit)
        return rows

    whole = chosen([total])
    assert whole == sorted(set(whole))
    assert chosen([1] * total) == chosen([3] * (total // 3) + [total % 3]) == whole
    assert (chosen([total], seed=4) == whole) == (total <= limit)


def test_selected_rows_are_uniform() -> None:
    counts = torch.zeros(20)
    for seed in range(2000):
        counts[Selection(20, 5, seed).within(0, 20)] += 1
    assert float((counts - 500).abs().max()) < 5 * (2000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("sizes", [[60], [7, 1, 30, 22], [1] * 60])
def test_programs_do_not_depend_on_batches(sizes: list[int]) -> None:
    model, x = net(), data()
    reference, _ = reference_replica(model, CPU, x)

    def program(batches: list[Tensor], activation: Any) -> Any:
        given = Calibration(batches)
        found = scan(reference, ["4"], given)
        reference.graph = Graph({"4": Reading(activation, "")}, Chain(()))
        task = layer_task("4", reference, None, given, found, max_samples=25, seed=1, dtype=torch.float32)
        return task.programs[0]

    kept, expected = program(list(x.split(sizes)), RELU), program([x], RELU)
    assert kept.inputs.shape == (25, 8)  # the cap holds: no other row is kept
    torch.testing.assert_close(kept.inputs, expected.inputs)
    torch.testing.assert_close(kept.lo, expected.lo)
    point, whole = program(list(x.split(sizes)), IDENTITY), program([x], IDENTITY)
    assert point.rows == whole.rows == 60 and len(point.inputs) <= 9
    for W in (point.weights, torch.zeros_like(point.weights)):
        assert point.distance(W, point.bias) == pytest.approx(whole.distance(W, whole.bias), abs=1e-9)


def test_copies_do_not_share_memory_with_the_model() -> None:
    model = net()
    twin = replicate(model, CPU, torch.float64)
    state = copy.deepcopy(model.state_dict())
    for parameter in twin.model.parameters():
        parameter.data.zero_()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
