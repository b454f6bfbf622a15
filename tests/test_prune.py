"""``prune`` on models as users have them: what comes back, what is refused, and with which words."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn

from nettrim import InvalidInput, Magnitude, NetTrim, NothingToPrune, PruneResult, Status, UnknownLayer, preimage, prune
from nettrim.layers import view
from nettrim.whole import LeftOut

METHODS: list[Any] = [
    NetTrim(epsilon=0.1),
    NetTrim(sparsity=0.6),
    NetTrim(penalty=0.5),
    NetTrim(epsilon=0.1, norm="l0"),
    Magnitude(sparsity=0.5),
]


def data(rows: int = 80, columns: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def net(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 10, bias), nn.ReLU(), nn.Linear(10, 8, bias), nn.ReLU6(), nn.Linear(8, 4, bias)]
    return nn.Sequential(*layers).to(dtype)


def run(model: nn.Module, method: Any = METHODS[1], x: Any = None, **settings: Any) -> PruneResult:
    return prune(model, data() if x is None else x, method, progress=False, **settings)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- what comes back ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.describe()}, {method.kind}")
@pytest.mark.parametrize("bias", [True, False])
def test_small_network(scheme: Any, method: Any, bias: bool) -> None:
    model = net(bias)
    result = run(model, method, scheme=scheme)
    assert type(result.model) is type(model)
    assert list(result.model.state_dict()) == list(model.state_dict())
    assert result.certificate.holds
    assert [layer.name for layer in result.report.layers] == ["0", "2", "4"]
    assert [layer.activation for layer in result.report.layers] == ["relu", "relu6", "identity"]
    for layer, certified in zip(result.report.layers, result.certificate.layers, strict=True):
        weight = result.model.get_submodule(layer.name).weight
        assert layer.nonzeros == int((weight != 0).sum())
        assert certified.distance == pytest.approx(layer.distance, rel=1e-6, abs=1e-9)
        assert layer.original_distance == pytest.approx(certified.original_distance, rel=1e-6, abs=1e-9)
        if method.kind == "sparsity":
            assert layer.nonzeros <= round((1 - method.targets) * layer.weights)
        if method.kind == "epsilon" and layer.status is not Status.INFEASIBLE:
            assert certified.distance <= 0.1 * certified.reference_norm
            assert certified.discrepancy <= 0.1 * certified.reference_norm * (1 + 1e-9) or scheme == "parallel"
    masks = result.masks()
    assert all(mask.shape == tuple(result.model.get_submodule(name).weight.shape) for name, mask in masks.items())
    assert sum(int(mask.sum()) for mask in masks.values()) == result.report.nonzeros


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
@pytest.mark.parametrize("method", [NetTrim(epsilon=0.0), NetTrim(sparsity=0.0), NetTrim(penalty=0.0), Magnitude(sparsity=0.0)], ids=str)
def test_targets_of_zero_keep_the_function(scheme: Any, method: Any) -> None:
    model = net()
    result = run(model, method, scheme=scheme)
    assert result.certificate.holds
    torch.testing.assert_close(result.model(data()), model(data()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS[:3], ids=str)
def test_dtypes(dtype: torch.dtype, method: Any) -> None:
    model = net(dtype=dtype)
    result = run(model, method, data().to(dtype))
    assert all(parameter.dtype == dtype for parameter in result.model.parameters())
    assert result.certificate.arithmetic == "float64"
    assert result.certificate.holds
    assert all(bool(torch.isfinite(parameter).all()) for parameter in result.model.parameters())


def test_values_beyond_the_dtype_leave_a_layer_as_it_was() -> None:
    """In half precision a solution can need weights that overflow: inputs that hardly vary ask for large ones."""

    class Overflowing(Magnitude):
        def solve(self, program: Any, target: float, watch: Any = None) -> Any:
            solution = super().solve(program, target, watch)
            solution.weights[0, 0] = float("inf")
            return solution

    model = net(dtype=torch.float16)
    result = run(model, Overflowing(sparsity=0.5), data().half())
    assert same(result.model, model)
    assert all(layer.status is Status.SKIPPED and "beyond the range of torch.float16" in layer.notes[0] for layer in result.report.layers)
    assert result.certificate.sound and not result.certificate.met  # half of the weights should have gone
    assert "where at most" in result.certificate.verdict_words()


def test_three_dimensional_inputs() -> None:
    result = run(net(), NetTrim(epsilon=0.1), torch.randn(12, 5, 6, generator=torch.Generator().manual_seed(0)))
    assert [layer.rows for layer in result.report.layers] == [60, 60, 60]
    assert result.report.samples == 12
    assert result.certificate.holds
    assert result.certificate.network.rows == 60 and result.certificate.network.classes == "the last dimension of the output"
    assert result.certificate.network.agreement is not None


class Heads(nn.Module):
    def __init__(self, as_dict: bool) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        self.as_dict = as_dict

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.body(x))
        left, right = self.left(h), self.right(h)
        return {"left": left, "right": right, "none": None} if self.as_dict else (left, right)


@pytest.mark.parametrize("as_dict", [True, False])
@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_several_outputs(as_dict: bool, scheme: Any) -> None:
    torch.manual_seed(0)
    model = Heads(as_dict)
    result = run(model, NetTrim(epsilon=0.1), scheme=scheme, heldout=data(seed=1))
    assert result.certificate.holds
    assert result.certificate.network.bound is None
    assert result.certificate.network.achieved > 0
    heldout = result.certificate.heldout
    assert heldout is not None and heldout.class_changes is not None and heldout.predictions == 2 * heldout.samples == 160
    assert heldout.class_changes <= (heldout.predictions_changed or 0) <= 2 * heldout.class_changes
    with torch.no_grad():
        expected = torch.cat(list(model(data()).values())[:2] if as_dict else list(model(data())), 1).norm()
    assert result.certificate.network.reference_norm == pytest.approx(float(expected), rel=1e-5)


def test_an_output_that_cannot_be_compared_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NetTrim, "solve", lambda *a, **k: pytest.fail("a layer was solved"))

    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).argmax(1)

    with pytest.raises(InvalidInput, match="no floating-point tensor"):
        run(Classes(), NetTrim(epsilon=0.1))


def test_determinism() -> None:
    model = net()
    for method in METHODS[:2]:
        first = run(model, method, max_samples=50, seed=1)
        assert same(first.model, run(model, method, max_samples=50, seed=1).model)
        assert not same(first.model, run(model, method, max_samples=50, seed=2).model)
        even = replace(method, importance="uniform")  # where all rows are used, the seed only draws the signs that measure importance
        assert same(run(model, even, seed=1).model, run(model, even, seed=2).model)
        assert "50 of 80 rows were used (max_samples)" in first.report.layers[0].notes
        assert [layer.rows for layer in first.certificate.layers] == [50, 50, 80]
        assert first.certificate.holds


def test_the_result_can_be_copied_and_pickled(tmp_path: Path) -> None:
    result = run(net())
    twin = copy.deepcopy(result.model)
    assert same(twin, result.model)
    assert same(pickle.loads(pickle.dumps(result.model)), result.model)
    torch.save(result.model, tmp_path / "model.pt")
    assert same(torch.load(tmp_path / "model.pt", weights_only=False), result.model)
    torch.save(result.model.state_dict(), tmp_path / "state.pt")
    net().load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    result.model(data()).sum().backward()  # it still trains


@pytest.mark.parametrize("training", [True, False])
def test_modes_and_flags(training: bool) -> None:
    model = nn.Sequential(net(), nn.Dropout(0.5)).train(training)
    model[0][2].eval()
    model[0][0].bias.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    result = run(model)
    assert [module.training for module in model.modules()] == modes
    assert [module.training for module in result.model.modules()] == modes
    assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in model.parameters()]


# --- layers with something about them -----------------------------------------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.last(torch.relu(self.shared(torch.relu(self.shared(h)))))


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_layer_used_twice(scheme: Any) -> None:
    torch.manual_seed(0)
    result = run(Twice(), NetTrim(sparsity=0.5), scheme=scheme)
    layer = next(layer for layer in result.report.layers if layer.name == "shared")
    assert layer.rows == 160
    assert layer.activation == "relu"
    assert "called 2 times in a pass: all calls count as rows of one program" in layer.notes
    assert ("its later inputs depend on itself" in " ".join(layer.notes)) == (scheme == "cascade")
    assert result.certificate.holds
    if scheme == "parallel":
        assert "called more than once" in result.certificate.network.reason
    else:  # a cascade's bound of the output needs only the last layer
        assert result.certificate.network.bound == pytest.approx(result.certificate.network.achieved)


def test_frozen_layer_is_pruned_stays_frozen_and_is_noted() -> None:
    model = net()
    model[2].requires_grad_(False)
    result = run(model)
    assert not result.model[2].weight.requires_grad  # type: ignore[index]
    assert "frozen" in result.report.layers[1].notes[0]
    assert result.report.layers[1].density == pytest.approx(0.4)


def test_tied_weights_are_refused_naming_both() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.relu(self.fc(self.table(tokens))))

    tokens = torch.randint(0, 9, (50, 3), generator=torch.Generator().manual_seed(0))
    with pytest.raises(InvalidInput, match=r"'table', 'head' share one parameter.*untie.*ignore=\['head'\]"):
        run(Tied(), x=tokens)
    assert run(Tied(), x=tokens, ignore=["head"]).certificate.holds
    model = net()
    model.register_parameter("kept", model[2].weight)
    with pytest.raises(InvalidInput, match=r"the model itself.*share one parameter"):
        run(model)


def test_one_module_under_two_names_is_one_layer() -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.last = nn.Linear(6, 6), nn.Linear(6, 2)
            self.also = self.fc

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.also(x)))

    model = Alias()
    result = run(model)
    assert [layer.name for layer in result.report.layers] == ["fc", "last"]
    assert list(result.model.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda layer: torch_prune.l1_unstructured(layer, "weight", 0.2),
        lambda layer: torch_prune.l1_unstructured(layer, "bias", 0.2),
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Identity()),
        lambda layer: parametrize.register_parametrization(layer, "bias", nn.Identity()),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
        lambda layer: nn.utils.parametrizations.spectral_norm(layer),
    ],
)
def test_wrapped_layers_are_refused_with_a_remedy(wrap: Any) -> None:
    model = net()
    wrap(model[2])
    with pytest.raises(InvalidInput, match=r"layer '2': its (weight|bias) is computed from other parameters.*prune\.remove"):
        run(model)
    if hasattr(model[2], "weight_orig") or hasattr(model[2], "bias_orig"):  # torch itself cannot copy those
        with pytest.raises(InvalidInput, match=r"cannot be copied.*prune.remove"):
            run(model, ignore=["2"])
        return
    for scheme in ("cascade", "parallel"):
        assert run(model, ignore=["2"], scheme=scheme).certificate.holds


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_usable_values_are_refused() -> None:
    broken = net()
    with torch.no_grad():
        broken[2].weight[0, 0] = float("nan")
    with pytest.raises(InvalidInput, match="layer '2': its weight holds NaN or inf"):
        run(broken)
    lazy = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.Linear(5, 2))
    with pytest.raises(InvalidInput, match=r"0.weight holds no values yet"):
        run(lazy)
    with pytest.raises(InvalidInput, match=r"0.weight holds no values yet"):
        run(nn.Sequential(nn.Linear(6, 5, device="meta"), nn.ReLU(), nn.Linear(5, 2)))
    with pytest.raises(InvalidInput, match="holds no values yet"):
        run(lazy, ignore=["0"])
    with pytest.raises(InvalidInput, match=r"its weight is empty.*ignore=\['1'\]"):
        run(nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 2), nn.Linear(2, 2)), layers=["1"])
    with pytest.raises(InvalidInput, match=r"'0': its weight must be one of.*found torch.complex64"):
        run(nn.Sequential(nn.Linear(6, 2, dtype=torch.complex64)))


def test_layers_that_are_never_called() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    result = run(Unused())
    assert result.report.model.left_out == (LeftOut("spare", "Linear", 18, "never called on the calibration data"),)
    with pytest.raises(InvalidInput, match=r"layer 'spare' is never called.*remove it from layers="):
        run(Unused(), layers=["used", "spare"])
    with pytest.raises(NothingToPrune, match="none of the layers spare is called"):
        run(Unused(), ignore=["used"])


def test_multihead_attention_inside() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.attention(x, x, x)[0])

    x = torch.randn(10, 4, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    result = run(Attending(), NetTrim(epsilon=0.1), x)
    assert {layer.name for layer in result.report.layers} == {"fc", *(f"attention.{part}_proj" for part in ("q", "k", "v", "out"))}
    readings = {layer.name: layer.reading for layer in result.report.layers}
    assert "hidden from the graph" in readings["attention.q_proj"]  # and the rest of the model is seen
    assert readings["fc"] == "it is the network's output"


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_transformer_encoder_layers_are_seen(scheme: Any) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(10, 4, 8, generator=torch.Generator().manual_seed(0))
    result = run(model, NetTrim(epsilon=0.2), x, scheme=scheme)
    projections = {f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")}
    assert {layer.name for layer in result.report.layers} == {"linear1", "linear2", *projections}
    assert result.certificate.holds


def test_a_layer_that_feeds_several_branches() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.d(torch.relu(self.b(torch.relu(h))) + self.c(h) + h)

    torch.manual_seed(0)
    for scheme in ("cascade", "parallel"):
        result = run(Residual(), NetTrim(epsilon=0.1), scheme=scheme)
        assert [layer.activation for layer in result.report.layers] == ["identity", "relu", "identity", "identity"]
        assert result.certificate.holds


# --- selection ----------------------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.encoder(x)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["encoder.0", "encoder.2", "head"]),
        ({"ignore": ["head"]}, ["encoder.0", "encoder.2"]),
        ({"ignore": ["encoder"]}, ["head"]),
        ({"ignore": ["re:encoder\\.[02]"]}, ["head"]),
        ({"ignore": ["re:enc.*"]}, ["head"]),
        ({"ignore": ["norm"]}, ["encoder.0", "encoder.2", "head"]),
        ({"layers": ["head", "encoder.0"]}, ["encoder.0", "head"]),
        ({"layers": ["encoder"], "ignore": ["encoder.2"]}, ["encoder.0"]),
        ({"layers": ["re:.*2"]}, ["encoder.2"]),
    ],
)
def test_selection(settings: dict[str, Any], expected: list[str]) -> None:
    model = Deep()
    result = run(model, Magnitude(sparsity=0.5), **settings)
    assert [layer.name for layer in result.report.layers] == expected
    for name in {"encoder.0", "encoder.2", "head"} - set(expected):
        assert torch.equal(result.model.get_submodule(name).weight, model.get_submodule(name).weight)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"layers": ["haed"]}, UnknownLayer, "layers: no layer fits 'haed'; the nearest is 'head'"),
        ({"ignore": ["encoder.3"]}, UnknownLayer, "ignore: no layer fits 'encoder.3'; the nearest is 'encoder"),
        ({"ignore": ["re:nothing.*"]}, UnknownLayer, "ignore: no layer fits 're:nothing"),
        ({"ignore": ["re:("]}, InvalidInput, "not a valid pattern"),
        ({"layers": ["norm"]}, InvalidInput, "'norm' is a LayerNorm and holds no layer that nettrim prunes: Linear"),
        ({"layers": "head"}, InvalidInput, "must be a list of layer names.*\\['head'\\]"),
        ({"ignore": "head"}, InvalidInput, "must be a list of layer names"),
        ({"layers": []}, NothingToPrune, "every prunable layer was excluded"),
        ({"ignore": ["re:.*"]}, NothingToPrune, "every prunable layer was excluded"),
        ({"activations": {"heat": "relu"}}, UnknownLayer, "activations: no layer fits 'heat'; the nearest is 'head'"),
        ({"activations": {"head": "rellu"}}, InvalidInput, "did you mean 'relu'"),
        ({"activations": {"head": preimage.Activation("relu", low=0.1)}}, InvalidInput, "its name 'relu' means another activation"),
        ({"method": NetTrim(sparsity={"head2": 0.5})}, UnknownLayer, "NetTrim.sparsity: no layer fits 'head2'; the nearest is 'head'"),
        ({"method": NetTrim(epsilon={"re:x.*": 0.5})}, UnknownLayer, "pattern 're:x"),
        ({"method": 0.5}, InvalidInput, r"write nettrim.prune\(model, data, sparsity=0.5\)"),
        ({"method": Magnitude}, InvalidInput, "method must be a pruning method"),
        ({"scheme": "serial"}, InvalidInput, "scheme must be 'cascade' or 'parallel', found 'serial'"),
        ({"max_samples": 0}, InvalidInput, "max_samples must be a whole number of at least 1, found 0"),
        ({"max_samples": 10.5}, InvalidInput, "max_samples must be"),
        ({"seed": -1}, InvalidInput, "seed must be a whole number of at least 0, found -1"),
        ({"seed": None}, InvalidInput, "seed must be"),
        ({"model": "resnet"}, InvalidInput, "model must be an nn.Module, found str"),
        ({"model": nn.Sequential(nn.ReLU())}, NothingToPrune, "has no layer that nettrim can prune: Linear"),
    ],
)
def test_refused_settings(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    settings = dict(settings)
    model, method = settings.pop("model", Deep()), settings.pop("method", Magnitude(sparsity=0.5))
    with pytest.raises(kind, match=message):
        run(model, method, **settings)


def test_mappings_leave_other_layers_alone_with_a_note() -> None:
    model = Deep()
    result = run(model, NetTrim(sparsity={"head": 0.5, "re:encoder.0": 0.2}))
    assert [(layer.name, layer.target) for layer in result.report.layers] == [("encoder.0", "sparsity 0.2"), ("head", "sparsity 0.5")]
    (left,) = (left for left in result.report.model.left_out if left.name == "encoder.2")
    assert left.reason == "the method was given no target for it"
    assert torch.equal(result.model.get_submodule("encoder.2").weight, model.encoder[2].weight)


def test_stated_activations_are_used_and_noted() -> None:
    class Hidden(Deep):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x)) if x.sum() > -1e9 else x  # not traceable

    torch.manual_seed(0)
    result = run(Hidden(), NetTrim(epsilon=0.1), activations={"encoder.0": "relu"})
    assert [layer.activation for layer in result.report.layers] == ["relu", "unknown", "unknown"]
    assert result.report.layers[0].reading == "stated by the user"
    assert [layer.source for layer in result.certificate.layers] == ["stated", "not seen", "not seen"]
    against = run(Deep(), NetTrim(epsilon=0.1), activations={"head": "relu"})
    assert "the graph reads identity" in against.report.layers[-1].reading
    assert against.certificate.layers[-1].source == "stated against the graph"


def test_heldout_statement() -> None:
    result = run(net(), NetTrim(epsilon=0.05), heldout=[(data(50, seed=1), torch.zeros(50, dtype=torch.long))])
    assert result.certificate.heldout is not None
    assert result.certificate.heldout.samples == 50
    assert result.certificate.heldout.accuracy_before is not None
    for again in (data(), list(data().split(7)), data().flip(0)):
        with pytest.raises(InvalidInput, match="heldout: all of these samples are calibration data"):
            run(net(), heldout=again)
    partly = run(net(), heldout=torch.cat([data()[:3], data(seed=1)]))
    assert partly.certificate.heldout is not None and partly.certificate.heldout.overlap == 3


def test_view_is_readable() -> None:
    model = net()
    layer = view("0", model[0])
    x = data()
    torch.testing.assert_close(layer.rows(x) @ layer.weights() + layer.bias(), model[0](x))
    assert layer.shape == (6, 10)
    with pytest.raises(InvalidInput, match="is a ReLU; nettrim prunes Linear, Conv1d"):
        view("1", model[1])
