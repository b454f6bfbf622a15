"""Everything on a GPU: models that live there, models that are sent there, and the numbers of the CPU up to rounding."""

from __future__ import annotations

import copy
import gc
import math
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from newcomers import NEWCOMERS, Newcomer, call, logits, loss, trained
from torch import Tensor, nn

import nettrim
from nettrim import InvalidInput, LinearADMM, Magnitude, NetTrim, Random, SparseGPT, Wanda
from nettrim.capture import hashes
from nettrim.checkpoint import read_weights
from nettrim.compare import compare
from nettrim.deploy import semi_structured
from nettrim.methods import LOBS, OBS, Method
from nettrim.trimming import NetworkTrimming, trim

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda")
METHODS: dict[str, Method] = {
    "epsilon": NetTrim(epsilon=0.1),
    "sparsity": NetTrim(sparsity=0.6),
    "quick": NetTrim(sparsity=0.6, effort="quick"),
    "penalty": NetTrim(penalty=0.05),
    "l1": NetTrim(sparsity=0.6, norm="l1"),
    "polished": NetTrim(epsilon=0.1, norm="l0"),
    "2:4": NetTrim(pattern="2:4"),
    "rows": NetTrim(sparsity=0.5, pattern="rows"),
    "columns": NetTrim(sparsity=0.5, pattern="columns"),
    "4x4": NetTrim(sparsity=0.5, pattern="4x4"),
    "OBS": OBS(sparsity=0.6),
    "SparseGPT": SparseGPT(sparsity=0.6),
    "LinearADMM": LinearADMM(sparsity=0.6),
    "LOBS": LOBS(sparsity=0.6),
    "Magnitude": Magnitude(sparsity=0.6),
    "Random": Random(sparsity=0.6),
    "Wanda": Wanda(sparsity=0.6),
}


@pytest.fixture(scope="module", autouse=True)
def first_backward() -> None:
    """The backward pass in which PyTorch makes its context, and warns of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.Linear(3, 3).to(CUDA)(torch.ones(2, 3, device=CUDA)).sum().backward()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> nn.Module:
    layers = (nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU6(), nn.Linear(16, 8))
    return settled(nn.Sequential(*layers), draw(64, 16))


class Residual(nn.Module):
    """Convolutions, grouped and strided too, batch-norm, a sum, max-pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.n1 = nn.Conv2d(8, 8, 3, padding=1, bias=False, groups=2), nn.BatchNorm2d(8)
        self.b, self.n2 = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8)
        self.pool, self.c, self.head = nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, stride=2), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.n0(self.stem(x)))
        h = torch.relu(self.n2(self.b(torch.relu(self.n1(self.a(h))))) + h)
        return cast(Tensor, self.head(torch.relu(self.c(self.pool(h))).mean((2, 3))))


class Attention(nn.Module):
    """Attention of one parameter for three projections, and an encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.encoder(x + self.attention(x, x, x, need_weights=False)[0]).mean(1)))


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """With running statistics of data, in eval mode."""
    with torch.no_grad():
        model.train()(x)
    return model.eval()


MODELS: dict[str, tuple[Any, Tensor, Tensor]] = {
    "mlp": (mlp, draw(200, 16), draw(90, 16, seed=1)),
    "residual": (lambda: settled(Residual(), draw(16, 3, 10, 10)), draw(48, 3, 10, 10), draw(24, 3, 10, 10, seed=1)),
    "attention": (lambda: Attention().eval(), draw(40, 6, 16), draw(24, 6, 16, seed=1)),
}
KINDS = (nn.Linear, nn.Conv2d)


def made(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    build, x, unseen = MODELS[kind]
    return build(), x, unseen


def every_layer(model: nn.Module) -> list[str] | None:
    """All convolutions and Linear layers, where there are convolutions."""
    names = [name for name, module in model.named_modules() if isinstance(module, KINDS)]
    return names if any(isinstance(module, nn.Conv2d) for module in model.modules()) else None


def run(model: nn.Module, x: Any, method: Method, **more: Any) -> nettrim.PruneResult:
    return nettrim.prune(model, x, method, layers=every_layer(model), progress=False, **more)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value.cpu(), other[name].cpu()) for name, value in one.items())


def on(model: nn.Module) -> set[str]:
    return {value.device.type for value in model.state_dict().values()}


def near(a: float | None, b: float | None, allowed: float, size: float) -> bool:
    if a is None or b is None:
        return a is b
    return abs(a - b) <= allowed * max(size, abs(a), abs(b))


def agree(one: nettrim.Certificate, other: nettrim.Certificate, allowed: float = 1e-8) -> None:
    """Two certificates of the same weights state the same, up to rounding in float64."""
    assert one.weights_hash == other.weights_hash and one.calibration_hash == other.calibration_hash
    assert one.verdict is other.verdict
    for a, b in zip(one.layers, other.layers, strict=True):
        for key in ("distance", "distance_all_rows", "discrepancy", "bound", "original_distance", "theorem"):
            assert near(getattr(a, key), getattr(b, key), allowed, a.reference_norm), (a.name, key)
        assert near(a.gap, b.gap, 1e-6, 1.0) and (a.nonzeros, a.rows, a.met, a.sound) == (b.nonzeros, b.rows, b.met, b.sound)
    for key in ("bound", "achieved", "reference_norm", "bound_from_tolerances"):
        assert near(getattr(one.network, key), getattr(other.network, key), allowed, one.network.reference_norm), key
    if one.heldout is not None and other.heldout is not None:
        assert one.heldout.class_changes == other.heldout.class_changes and one.heldout.exceed == other.heldout.exceed


@pytest.mark.parametrize("scheme", ["parallel", "cascade"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_method(kind: str, name: str, scheme: Any, tmp_path: Path) -> None:
    model, x, unseen = made(kind)
    if name == "4x4" and kind == "residual":
        pytest.skip("blocks of 4 x 4 do not fit its layers")
    try:
        on_cpu = run(model, x, METHODS[name], scheme=scheme, heldout=unseen)
    except InvalidInput as error:  # what cannot be asked of a model is refused on every device
        with pytest.raises(InvalidInput) as refused:
            run(copy.deepcopy(model).to(CUDA), x, METHODS[name], scheme=scheme, heldout=unseen)
        assert str(refused.value) == str(error)
        return
    sent = run(model, x, METHODS[name], scheme=scheme, heldout=unseen, device="cuda")
    there = copy.deepcopy(model).to(CUDA)
    before = state(there)
    lives = run(there, x, METHODS[name], scheme=scheme, heldout=unseen)
    assert on(sent.model) == on(model) == {"cpu"} and on(lives.model) == on(there) == {"cuda"} and same(state(there), before)
    assert same(state(sent.model), state(lives.model)), "the same device gives the same result"
    assert lives.certificate.verdict is on_cpu.certificate.verdict and lives.certificate.sound
    for a, b in zip(on_cpu.report.layers, lives.report.layers, strict=True):
        assert a.name == b.name and a.weights == b.weights
        if METHODS[name].kind == "sparsity":
            assert a.nonzeros == b.nonzeros
    # the same weights, certified on either device
    lives.save(tmp_path / "made")
    agree(lives.certificate, nettrim.verify(tmp_path / "made", model, x, unseen))
    agree(lives.certificate, nettrim.verify(tmp_path / "made", there, x.to(CUDA), unseen.to(CUDA)))
    on_cpu.save(tmp_path / "cpu")
    agree(on_cpu.certificate, nettrim.verify(tmp_path / "cpu", model, x, unseen, device="cuda"))
    agree(on_cpu.certificate, nettrim.verify(tmp_path / "cpu", there, x, unseen))
    for target in (copy.deepcopy(model), copy.deepcopy(there)):
        assert same(state(nettrim.load(tmp_path / "made", target)), state(lives.model)) and on(target) == on(target)


@pytest.mark.parametrize(
    "more",
    [
        {"allocation": "global"},
        {"allocation": "global", "target": "macs"},
        {"sweeps": 1},
        {"add_bias": True},
        {"max_samples": 60},
        {"seed": 5, "max_samples": 50},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["mlp", "residual"])
def test_every_setting(kind: str, more: dict[str, Any]) -> None:
    model, x, unseen = made(kind)
    there = copy.deepcopy(model).to(CUDA)
    first, second = (run(there, x, NetTrim(sparsity=0.6), heldout=unseen.to(CUDA), **more) for _ in range(2))
    assert first.certificate.holds and same(state(first.model), state(second.model))
    assert first.report.density == pytest.approx(run(model, x, NetTrim(sparsity=0.6), heldout=unseen, **more).report.density, abs=1e-3)


@pytest.mark.parametrize("method", [NetTrim(epsilon=0.1, program="halfspace"), NetTrim(penalty=0.1, program="halfspace")], ids=str)
def test_the_published_program(method: Method) -> None:
    model, x, _ = made("mlp")
    found = run(copy.deepcopy(model).to(CUDA), x, method)
    assert found.certificate.verdict is run(model, x, method).certificate.verdict


def test_wide_layers_in_blocks_of_rows() -> None:
    """More rows than one block, as real layers have."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 160), nn.ReLU(), nn.Linear(160, 10)).to(CUDA)
    x = draw(3000, 128)
    for method in (NetTrim(sparsity=0.8), NetTrim(epsilon=0.05), SparseGPT(sparsity=0.5), LinearADMM(sparsity=0.5)):
        first, second = (run(model, x, method) for _ in range(2))
        assert first.certificate.holds and same(state(first.model), state(second.model))


@pytest.mark.parametrize("name", NEWCOMERS)
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    newcomer: Newcomer = NEWCOMERS[name]
    model = trained(name)
    there = copy.deepcopy(model).to(CUDA)
    result = nettrim.prune(there, newcomer.batches(), sparsity=0.5, heldout=newcomer.heldout(), progress=False)
    assert result.certificate.holds and on(result.model) == {"cuda"} and "holds" in str(result)
    result.save(tmp_path / "made")
    agree(result.certificate, nettrim.verify(tmp_path / "made", model, newcomer.batches(), newcomer.heldout()), 1e-6)
    with nettrim.finetuning(result) as tuning:
        optimizer = torch.optim.Adam(tuning.parameters(), 1e-3)
        tuning.model.train()
        for x, y in newcomer.batches():
            optimizer.zero_grad()
            loss(tuning.model, to_cuda(x), to_cuda(y)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    tuned = nettrim.recertify(result, tuning.model, there, newcomer.batches(), heldout=newcomer.heldout(), progress=False)
    assert tuned.certificate.holds and tuned.report.nonzeros <= result.report.nonzeros
    agree(
        tuned.certificate,
        nettrim.recertify(result, tuning.model.cpu(), model, newcomer.batches(), heldout=newcomer.heldout(), progress=False).certificate,
        1e-6,
    )
    x = newcomer.batches()[0][0]
    if name not in ("gru", "lstm"):  # which torch.export does not take at another batch size
        nettrim.export(result.model, x, tmp_path / "model.pt2")
    with torch.no_grad():
        assert logits(call(nettrim.load(tmp_path / "made", there).eval(), to_cuda(x))).device.type == "cuda"


def to_cuda(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: to_cuda(item) for key, item in value.items()}
    return value.to(CUDA) if isinstance(value, Tensor) else value


def test_data_on_either_device() -> None:
    """Batches and model may be on different devices; what is said of the data is the same."""
    model, x, unseen = made("mlp")
    labels = torch.arange(len(unseen)) % 8
    there = copy.deepcopy(model).to(CUDA)
    found = [
        run(there, data, Magnitude(sparsity=0.5), heldout=[(seen, kept)]).certificate
        for data, seen, kept in [(x, unseen, labels), (x.to(CUDA), unseen, labels.to(CUDA)), (x, unseen.to(CUDA), labels)]
    ]
    assert all(one == found[0] for one in found[1:]) and found[0].heldout is not None and found[0].heldout.accuracy_before is not None


def test_distilling(tmp_path: Path) -> None:
    model, x, unseen = made("residual")
    there = copy.deepcopy(model).to(CUDA)
    result = run(there, x, Magnitude(sparsity=0.7))
    random = torch.cuda.get_rng_state()
    first = nettrim.distill(result.model, there, x, steps=100, batch_size=16, progress=False)
    second = nettrim.distill(result.model, there, x.to(CUDA), steps=100, batch_size=16, progress=False)
    assert torch.equal(torch.cuda.get_rng_state(), random)
    assert on(first.model) == {"cuda"} and first.after < first.before
    assert first.after == pytest.approx(second.after, rel=1e-2)  # cuDNN's gradients are not the same every time
    tuned = nettrim.recertify(result, first.model, there, x, heldout=unseen, progress=False)
    assert tuned.certificate.holds
    sent = nettrim.distill(result.model.cpu(), model, x, steps=100, batch_size=16, device="cuda", progress=False)
    assert on(sent.model) == {"cpu"} and sent.after < sent.before


def test_zeros_are_kept_and_move_along() -> None:
    model, x, _ = made("mlp")
    pruned = run(model, x, Magnitude(sparsity=0.5)).model
    zeros = {name: value == 0 for name, value in pruned.state_dict().items() if value.ndim == 2}
    pruned.to(CUDA)
    optimizer = torch.optim.SGD(pruned.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    with nettrim.keep_zeros(pruned, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            pruned(x.to(CUDA)).square().sum().backward()
            optimizer.step()
    assert all(bool((pruned.state_dict()[name].cpu()[where] == 0).all()) for name, where in zeros.items())


@pytest.mark.parametrize("kind", ["mlp", "residual"])
@pytest.mark.parametrize("tf32", [False, True])
def test_smaller_models(kind: str, tf32: bool) -> None:
    pytest.importorskip("torch_pruning")
    model, x, _ = made(kind)
    allowed = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = tf32
        pattern = "columns"
        pruned = run(model, x, Magnitude(sparsity=0.5, pattern=pattern)).model
        there = copy.deepcopy(pruned).to(CUDA)
        compacted = nettrim.compact(there, x)
        assert on(compacted.model) == {"cuda"} and compacted.parameters == nettrim.compact(pruned, x).parameters
        assert on(nettrim.compact(pruned, x, device="cuda").model) == {"cpu"}
        assert torch.backends.cudnn.allow_tf32 is tf32
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def test_trimming() -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)).to(CUDA)
    batches = [(draw(50, 12, seed=i), torch.arange(50) % 3) for i in range(3)]
    random, cpu = torch.cuda.get_rng_state(), torch.get_rng_state()
    method = NetworkTrimming(rounds=1, tolerance=1.0, epochs=1)
    trimmed = trim(model, batches, method, training=batches, progress=False)
    assert torch.equal(torch.cuda.get_rng_state(), random) and torch.equal(torch.get_rng_state(), cpu)
    assert on(trimmed.model) == {"cuda"} and trimmed.parameters[1] <= trimmed.parameters[0]


def test_trimming_on_the_cpu_leaves_the_random_state_of_the_gpu() -> None:
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))
    batches = [(draw(50, 12), torch.arange(50) % 3)]
    torch.rand(3, device=CUDA)
    random = torch.cuda.get_rng_state()
    trim(model, batches, NetworkTrimming(rounds=1, tolerance=1.0, epochs=1), training=batches, progress=False)
    assert torch.equal(torch.cuda.get_rng_state(), random)


def test_comparing(tmp_path: Path) -> None:
    model, x, unseen = made("mlp")
    there = copy.deepcopy(model).to(CUDA)
    found = compare(there, x, heldout=unseen, sparsities=[0.5], folder=tmp_path, progress=False)
    plain = compare(model, x, heldout=unseen, sparsities=[0.5], progress=False)
    assert [one.method for one in found.runs] == [one.method for one in plain.runs]
    assert [one.holds for one in found.runs] == [one.holds for one in plain.runs]
    assert [one.density for one in found.runs] == pytest.approx([one.density for one in plain.runs], abs=2e-3)


def test_bounds_before_pruning() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)), draw(100, 16)
    there, here = (nettrim.network_bounds(net, x, radius=9.0, progress=False) for net in (copy.deepcopy(model).to(CUDA), model))
    pruned = run(model, x, Magnitude(sparsity=0.5)).model
    for form in here.forms:
        assert there.gap(0.3, form=form).value == pytest.approx(here.gap(0.3, form=form).value, rel=1e-9)
        found = [bounds.of_pruned(net, form=form).value for bounds in (there, here) for net in (pruned, copy.deepcopy(pruned).to(CUDA))]
        assert found == pytest.approx([found[0]] * 4, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["parallel", "cascade"])
def test_low_precision(dtype: torch.dtype, scheme: Any, tmp_path: Path) -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)
            self.to(dtype)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.c(torch.relu(self.b(torch.relu(self.a(x.to(dtype)))))))

    torch.manual_seed(0)
    model, x, unseen = Casting().to(CUDA), draw(128, 16), draw(64, 16, seed=1)
    for method in (NetTrim(epsilon=0.1), NetTrim(sparsity=0.5), Magnitude(sparsity=0.5)):
        result = run(model, x, method, scheme=scheme, heldout=unseen)
        assert result.certificate.sound and "float64" in result.certificate.arithmetic
        folder = tmp_path / f"{type(method).__name__}{method.kind}"
        result.save(folder)
        assert nettrim.verify(folder, model, x, unseen).sound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_that_run_in_float64(dtype: torch.dtype, tmp_path: Path) -> None:
    model, x, unseen = made("mlp")
    there = model.to(CUDA, dtype)
    result = run(there, x.to(dtype), NetTrim(sparsity=0.5), heldout=unseen.to(dtype))
    assert result.certificate.holds and result.certificate.arithmetic == "float64"
    result.save(tmp_path / "made")
    agree(result.certificate, nettrim.verify(tmp_path / "made", there.cpu(), x.to(dtype), unseen.to(dtype), device="cpu"))


class Wide(nn.Module):
    """Cannot run in float64: casts to float32 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(torch.relu(self.b(torch.relu(self.a(x.float())))).mean((2, 3))))


def test_convolutions_in_float32_are_not_rounded_to_tf32() -> None:
    torch.manual_seed(0)
    model, x = Wide().to(CUDA), draw(32, 3, 12, 12)
    result = run(model, x, NetTrim(sparsity=0.5))
    assert result.certificate.sound
    assert all(layer.rounding <= 1e-5 * layer.reference_norm for layer in result.certificate.layers)


class Taken:
    """Stands for measured passes."""

    def __init__(self, median: float) -> None:
        self.median = median


def two_to_four() -> tuple[nn.Module, nn.Module]:
    """A network, and the same with 2:4 zeros in all layers but the last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    result = nettrim.prune(model, draw(300, 256), NetTrim(pattern="2:4"), layers=["0", "2"], progress=False)
    return model, result.model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_semi_structured_products(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    half = two_to_four()[1].to(CUDA, dtype)
    x = draw(64, 256).to(dtype)
    found = nettrim.accelerate(half, x, budget=0.05, progress=False)
    choices = {choice.name: choice for choice in found.choices}
    for name in ("0", "2"):  # whatever wins, both are timed
        assert set(choices[name].seconds) == {"dense", "semi-structured"}, choices[name].why
    assert "2:4" in choices["4"].why and "accelerate" not in str(found.notes)
    monkeypatch.setattr(semi_structured, "side_by_side", lambda runs, *rest: {kind: Taken(1.0 + (kind == "dense")) for kind in runs})
    monkeypatch.setattr("nettrim.deploy.accelerate._fastest", lambda taken, notes: next(kind for kind in taken if kind != "dense"))
    forced = nettrim.accelerate(half, x, budget=0.05, progress=False)
    assert {choice.name: choice.kind for choice in forced.choices} == {"0": "semi-structured", "2": "semi-structured", "4": "dense"}
    with torch.no_grad():
        for shape in ((1, 256), (7, 256), (64, 256), (200, 256), (3, 5, 256)):
            y = draw(*shape, seed=shape[0]).to(CUDA, dtype)
            exact = copy.deepcopy(half).double()(y.double())
            moved = float((forced.model(y).double() - exact).abs().max() / exact.abs().max())
            assert moved <= 8 * torch.finfo(dtype).eps


def test_what_has_no_semi_structured_product_says_why() -> None:
    _, pruned = two_to_four()
    choices = nettrim.accelerate(pruned, draw(8, 256), device="cuda", budget=0.01, progress=False).choices
    assert all("float32" in choice.why for choice in choices)
    odd = nn.Sequential(nn.Linear(12, 20)).half()
    with torch.no_grad():
        odd[0].weight[:, ::2] = 0
    (choice,) = nettrim.accelerate(odd.to(CUDA), draw(8, 12).half(), budget=0.01, progress=False).choices
    assert choice.kind == "dense" and "a size it does not take" in choice.why


def test_bench() -> None:
    model, pruned = two_to_four()
    half, x = copy.deepcopy(pruned).to(CUDA, torch.float16), draw(64, 256)
    timed = nettrim.bench(half, x.half(), reference=model.to(CUDA, torch.float16), batch_sizes=(1, 64), seconds=0.05, progress=False)
    sent = nettrim.bench(pruned, x, batch_sizes=(8,), seconds=0.05, device="cuda", progress=False)
    for found in (timed, sent):
        assert found.machine.accelerator == torch.cuda.get_device_name()
        assert all(len(form.timings) == len(found.batch_sizes) for form in found.forms)
    assert {"dense", "pruned"} <= {form.name for form in timed.forms}


def test_timing_waits_for_the_device() -> None:
    """A pass is not over before its result is there: large products cannot be faster than the arithmetic allows."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4096, 4096, bias=False) for _ in range(8))).to(CUDA)
    timed = nettrim.bench(model, torch.randn(8192, 4096, device=CUDA), batch_sizes=(8192,), seconds=0.2, progress=False)
    (form,) = (form for form in timed.forms if form.name == "pruned")
    operations = 8 * 2 * 8192 * 4096 * 4096
    assert operations / form.timings[0].median < 2e15  # no device does that in float32


def test_exports(tmp_path: Path) -> None:
    model, x, _ = made("mlp")
    there = run(copy.deepcopy(model).to(CUDA), x, NetTrim(sparsity=0.5)).model
    before = state(there)
    nettrim.export(there, x.to(CUDA), tmp_path / "model.pt2")
    nettrim.export(there, x, tmp_path / "model.c")
    pytest.importorskip("onnxscript")
    nettrim.export(there, x.to(CUDA), tmp_path / "model.onnx")
    assert same(before, state(there)) and on(there) == {"cuda"}


def test_saved_sizes(tmp_path: Path) -> None:
    model, x, _ = made("mlp")
    there = run(copy.deepcopy(model).to(CUDA), x, NetTrim(sparsity=0.8)).model
    for compressed in (False, True):
        here = nettrim.save_weights(there.cpu(), tmp_path / f"cpu{compressed}.safetensors", compressed=compressed)
        gpu = nettrim.save_weights(there.to(CUDA), tmp_path / f"gpu{compressed}.safetensors", compressed=compressed)
        assert here.stat().st_size == gpu.stat().st_size and same(read_weights(here), read_weights(gpu))
    assert hashes(there) == hashes(there.cpu())


def test_a_device_that_is_not_there() -> None:
    model, x, _ = made("mlp")
    for device in ("cuda:99", "nowhere"):
        with pytest.raises(InvalidInput, match="cannot be used here"):
            run(model, x, NetTrim(sparsity=0.5), device=device)
    run(model, x, NetTrim(sparsity=0.5), device=torch.device("cuda:0"))


def test_random_state_of_the_gpu() -> None:
    model, x, unseen = made("residual")
    there = copy.deepcopy(model).to(CUDA)
    torch.cuda.manual_seed(11)
    torch.rand(5, device=CUDA)
    before, cpu = torch.cuda.get_rng_state(), torch.get_rng_state()
    for method in (NetTrim(sparsity=0.5), Random(sparsity=0.5), LinearADMM(sparsity=0.5)):
        for given, more in ((there, {}), (model, {"device": "cuda"}), (model, {})):
            run(given, x, method, heldout=unseen, **more)
            assert torch.equal(torch.cuda.get_rng_state(), before) and torch.equal(torch.get_rng_state(), cpu)


def test_memory_is_given_back() -> None:
    model, x, unseen = made("residual")
    there = copy.deepcopy(model).to(CUDA)

    def once() -> int:
        result = run(there, x, NetTrim(sparsity=0.5), heldout=unseen)
        assert math.isfinite(result.certificate.network.achieved)
        del result
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    used = [once() for _ in range(5)]
    assert used[-1] <= used[1], used
