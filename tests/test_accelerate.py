"""`nettrim.accelerate`: what it chooses, what it returns, and how what it returns behaves."""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import io
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nettrim
from nettrim.deploy import accelerate as _function
from nettrim.deploy import kernels_team, semi_structured, sparse_candidates
from nettrim.deploy.sparse_chain import SparseChain
from nettrim.deploy.sparse_region import SparseRegion
from nettrim.deploy.timing import Passes
from nettrim.experiments import zoo
from nettrim.outputs import Outputs, largest_difference
from nettrim.status import InvalidInput, NetTrimError

module = importlib.import_module(_function.__module__)
BUDGET = 0.01
native = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba")


def sparse(model: nn.Module, share: float = 0.95) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                layer.weight.mul_(torch.rand(layer.weight.shape, generator=generator) >= share)
    return model.eval()


def fc() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 96), nn.ReLU(), nn.Dropout(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 10))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def force(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """The clock says that one candidate is the fastest; what it computes is real."""
    real = sparse_candidates.search

    def search(*arguments: Any) -> sparse_candidates.Found:
        found = real(*arguments)
        assert wanted in found.candidates, found.candidates
        return found

    def whole(found: sparse_candidates.Found, *rest: Any) -> dict[str, Passes]:
        seconds = {name: 1.0 if name == wanted else 2.0 for name in found.candidates}
        return {name: Passes([value] * 10, turns=[value] * 10) for name, value in seconds.items()}

    monkeypatch.setattr(sparse_candidates, "search", search)
    monkeypatch.setattr(module, "_whole", whole)


KINDS = [pytest.param("every layer sparse", marks=native), "CSR where faster alone"]


@pytest.fixture(params=KINDS)
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param.startswith("CSR"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(sparse_candidates._Regions, "_wins", lambda self, name, kind: kind in self.found.seconds.get(name, {}))
    force(monkeypatch, request.param)
    return str(request.param)


@pytest.mark.parametrize("rows", [1, 2, 40])
def test_the_function_stays_at_any_batch_size(forced: str, rows: int) -> None:
    model = sparse(fc())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    made = nettrim.accelerate(model, draw(rows, 1, 12, 12), budget=BUDGET)
    assert made.kept == forced and made.difference <= 1e-5 and made.ratio == 2.0
    for other in (1, 3, 16, 50):
        x = draw(other, 1, 12, 12, seed=other)
        with torch.inference_mode():
            assert distance(made.model(x), model(x)) <= 1e-5
        assert distance(made.model(x), model(x).detach()) <= 1e-5
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert next(made.model.parameters()).device.type == "cpu" and not any(parameter.requires_grad for parameter in made.model.parameters())
    kind = "csr" if forced.startswith("CSR") else "direct"
    assert [choice.kind for choice in made.choices] == [kind] * 3
    assert all({"dense", "csr"} <= set(choice.seconds) and choice.density < 0.1 for choice in made.choices)
    words = str(made)
    assert forced in words and all(choice.name in words and choice.why in words for choice in made.choices)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_compute_the_same(forced: str, how: str) -> None:
    model, x = sparse(fc()), draw(6, 1, 12, 12)
    made = nettrim.accelerate(model, x, budget=BUDGET).model
    before = made(x)
    if how == "deepcopy":
        twin = copy.deepcopy(made)
    elif how == "pickle":
        file = io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(made)
        twin(x)
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
        twin.load_state_dict(made.state_dict())
    assert torch.equal(twin(x), before) and torch.equal(made(x), before)
    for name, parameter in twin.named_parameters():
        if name.endswith("values"):
            parameter.zero_()
    assert not torch.equal(twin(x), before) and torch.equal(made(x), before)  # no memory is shared
    loaded = copy.deepcopy(made)
    loaded(x)
    loaded.load_state_dict(twin.state_dict(), assign=True)
    assert torch.equal(loaded(x), twin(x))


def test_what_accelerated_parts_refuse(forced: str) -> None:
    made = nettrim.accelerate(sparse(fc()), draw(4, 1, 12, 12), budget=BUDGET).model
    x = draw(4, 1, 12, 12)
    with pytest.raises(InvalidInput, match="no gradients"):
        made(x.requires_grad_())
    with torch.no_grad():
        made(x)
    x = x.detach()
    with pytest.raises(InvalidInput, match="eval mode"):
        made.train()(x)
    made.eval()
    with pytest.raises(InvalidInput, match="float64"):
        made(x.double())
    with pytest.raises(InvalidInput, match="features"):
        made(draw(4, 1, 11, 11))
    with pytest.raises(InvalidInput, match="float32 on the CPU"):
        made.double()(x)
    assert made.float()(x).shape == (4, 10)


def test_several_threads_at_once(forced: str) -> None:
    model = sparse(fc())
    made = nettrim.accelerate(model, draw(8, 1, 12, 12), budget=BUDGET).model
    worst: list[float] = []

    def work(seed: int) -> None:
        for number in range(15):
            x = draw(1 + (seed + number) % 9, 1, 12, 12, seed=seed * 100 + number)
            with torch.inference_mode():
                worst.append(distance(made(x), model(x)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 60 and max(worst) <= 1e-5


@native
@pytest.mark.parametrize("name", ["lenet5", "vgg_like", "resnet20_a", "resnet20_b", "depthwise_separable", "transformer_encoder"])
def test_the_zoo(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "every layer sparse")
    model = sparse(zoo.NETWORKS[name].make(in_channels=1, classes=10, image_size=20, seed=0), 0.8)
    made = nettrim.accelerate(model, draw(3, 1, 20, 20), budget=1e-3)
    regions = [part for part in made.model.modules() if isinstance(part, SparseRegion)]
    assert len(regions) == {"resnet20_a": 3, "transformer_encoder": 4}.get(name, 1)
    x = draw(17, 1, 20, 20, seed=1)
    assert distance(made.model(x), model(x).detach()) <= 1e-5
    dense = {choice.name for choice in made.choices if choice.kind == "dense"}
    assert dense == ({"layers.0.attention.out_proj", "layers.1.attention.out_proj"} if name == "transformer_encoder" else set())


def test_dense_is_kept_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "dense")
    model = sparse(fc())
    made = nettrim.accelerate(model, draw(2, 1, 12, 12), budget=BUDGET)
    assert made.kept == "dense" and made.ratio == 1.0 and {choice.kind for choice in made.choices} == {"dense"}
    assert type(made.model) is type(model) and made.model is not model
    assert list(made.model.state_dict()) == list(model.state_dict())
    assert made.difference == 0.0


class Branching(nn.Module):
    """torch.fx cannot follow it: what it does depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 5)
        self.odd = nn.Conv1d(4, 4, 3)
        self.fc = nn.Linear(16 * 64, 64)
        self.unused = nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv(images).relu()
        if float(x.detach().sum()) < 0:
            x = -x
        return self.fc(x.flatten(1))


@native
def test_without_a_graph_layers_are_replaced_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse(Branching())
    x = draw(8, 1, 12, 12)
    monkeypatch.setattr(sparse_candidates, "_seconds", lambda runs, budget: dict.fromkeys(runs, 1.0))  # min() then takes the first: dense
    made = nettrim.accelerate(model, x, budget=BUDGET)
    assert made.kept == "dense" and set(made.seconds) == {"dense"}

    order = iter([2.0, 1.0, 3.0, 1.0, 2.0])  # conv: dense, direct; fc: dense, csr, direct
    monkeypatch.setattr(sparse_candidates, "_seconds", lambda runs, budget: {kind: next(order) for kind in runs})
    force(monkeypatch, "sparse where faster alone")
    made = nettrim.accelerate(model, x, budget=BUDGET)
    assert any("one at a time" in note for note in made.notes)
    kinds = {choice.name: (choice.kind, choice.why) for choice in made.choices}
    assert kinds["conv"][0] == "direct" and kinds["fc"][0] == "csr"
    assert "no sparse kernel" in kinds["odd"][1] and "did not call" in kinds["unused"][1]
    assert isinstance(made.model.conv, SparseRegion) and isinstance(made.model.fc, SparseChain)
    assert distance(made.model(x), model(x).detach()) <= 1e-5


def test_without_numba_convolutions_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sparse_candidates._Regions, "_wins", lambda self, name, kind: True)
    force(monkeypatch, "CSR where faster alone")
    model = sparse(zoo.lenet5(width=4, image_size=16))
    made = nettrim.accelerate(model, draw(4, 1, 16, 16), budget=BUDGET)
    assert any("numba" in note for note in made.notes)
    assert {choice.name: choice.kind for choice in made.choices} == {"conv1": "dense", "conv2": "dense", "fc1": "csr", "fc2": "csr"}
    chains = [part for part in made.model.modules() if isinstance(part, SparseChain)]
    assert len(chains) == 1 and len(chains[0].steps) == 2  # the ReLU between them is a bound of the first


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 30), nn.Linear(20, 30)

    def forward(self, first: Tensor, second: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"sum": torch.relu(self.a(first) + self.b(second)) * scale}


@native
def test_keyword_inputs_and_named_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "every layer sparse")
    model = sparse(Keywords(), 0.5)
    example = {"second": draw(4, 20, seed=1), "first": draw(4, 20)}
    made = nettrim.accelerate(model, example, budget=BUDGET)
    found: Mapping[str, Tensor] = made.model(**example)
    assert distance(found["sum"], model(**example)["sum"].detach()) <= 1e-5
    with pytest.raises(InvalidInput, match="leading sizes"):
        made.model(first=example["first"], second=example["second"][:2])


@native
def test_hooks_and_shared_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "every layer sparse")
    shared = nn.Linear(12, 12)
    model = sparse(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(12, 3)), 0.5)
    model[3].register_forward_hook(lambda module, inputs, output: output + 1)
    x = draw(5, 12)
    made = nettrim.accelerate(model, x, budget=BUDGET)
    assert distance(made.model(x), model(x).detach()) <= 1e-5
    assert [(choice.name, choice.kind) for choice in made.choices] == [("0", "direct"), ("3", "dense")]
    assert "hooks" in made.choices[1].why


@native
@pytest.mark.parametrize("place", ["", "0"])
def test_hooks_of_what_is_traced_into_stay(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    model = sparse(nn.Sequential(nn.Sequential(nn.Linear(12, 12), nn.ReLU()), nn.Linear(12, 3)), 0.5)
    model.get_submodule(place).register_forward_hook(lambda module, inputs, output: seen.append(output))
    # what is timed last wins
    monkeypatch.setattr(sparse_candidates, "_seconds", lambda runs, budget: {kind: -number for number, kind in enumerate(runs)})
    made = nettrim.accelerate(model, draw(5, 12), budget=BUDGET)
    assert all(isinstance(value, Tensor) or value == 0 for value in seen)  # no stand-in of the tracer's
    assert any("hooks of" in note and "one at a time" in note for note in made.notes)
    seen.clear()
    made.model(draw(5, 12))
    assert len(seen) == 1


@native
def test_a_layer_with_a_forward_of_its_own_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "every layer sparse")
    model = sparse(nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3)), 0.5).requires_grad_(False)
    model[0].forward = lambda x: 2 * x  # type: ignore[index, union-attr]
    x = draw(5, 12)
    made = nettrim.accelerate(model, x, budget=BUDGET)
    assert [choice.kind for choice in made.choices] == ["dense", "direct"] and "not that of its class" in made.choices[0].why
    assert distance(made.model(x), model(x)) <= 1e-5


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        result: Tensor = self.fc(x)
        return result


def test_a_model_that_remembers_is_refused() -> None:
    model = Counting()
    with pytest.raises(InvalidInput, match="'calls'"):
        nettrim.accelerate(model, draw(5, 12), budget=BUDGET)
    assert float(model.calls) == 0


def test_the_example_stays_as_it_was() -> None:
    x = draw(5, 12)
    nettrim.accelerate(nn.Sequential(nn.Hardtanh(inplace=True), nn.Linear(12, 3)), x, budget=BUDGET)
    assert torch.equal(x, draw(5, 12))


@pytest.mark.parametrize("part", ["columns", "rows"])
def test_places_outside_a_layer_are_refused_before_they_are_read(forced: str, part: str) -> None:
    made, x = nettrim.accelerate(sparse(fc()), draw(4, 1, 12, 12), budget=BUDGET).model, draw(4, 1, 12, 12)
    good = {name: value.clone() for name, value in made.state_dict().items()}
    for shift in (1_000, -1_000):
        made.load_state_dict({name: value + shift * name.endswith(part) for name, value in good.items()})
        with pytest.raises(InvalidInput, match="rows and columns"):
            made(x)
    made.load_state_dict(good)
    wanted = made(x)
    spread = {name: torch.stack((value, value), -1)[..., 0] for name, value in good.items()}
    made.load_state_dict(spread, assign=True)  # not contiguous
    assert torch.equal(made(x), wanted)


def test_what_is_thawed_is_refused(forced: str) -> None:
    made, x = nettrim.accelerate(sparse(fc()), draw(4, 1, 12, 12), budget=BUDGET).model, draw(4, 1, 12, 12)
    made.requires_grad_(True)
    with pytest.raises(InvalidInput, match="leave it frozen"):
        made(x)
    with torch.inference_mode():
        made(x)


@native
def test_tracing_by_example_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "every layer sparse")
    x = draw(4, 1, 12, 12)
    made = nettrim.accelerate(sparse(fc()), x, budget=BUDGET).model
    with warnings.catch_warnings(), pytest.raises(InvalidInput, match="cannot be traced"):
        warnings.simplefilter("ignore")
        torch.jit.trace(made, x)


class Towers(nn.Module):
    """Two inputs that need not have equally many rows, and a tensor that is the same for any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(20, 30), nn.Linear(20, 30), nn.Linear(30, 30)
        self.shift = nn.Parameter(torch.ones(1, 30))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        a = self.c(self.shift + self.a(first))
        return a @ self.b(second).t()


@native
def test_inputs_of_different_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "every layer sparse")
    model = sparse(Towers(), 0.5).requires_grad_(False)
    made = nettrim.accelerate(model, {"first": draw(1, 20), "second": draw(1, 20, seed=1)}, budget=BUDGET)
    assert {choice.kind for choice in made.choices} == {"direct"}
    inputs = {"first": draw(4, 20, seed=2), "second": draw(7, 20, seed=3)}
    assert distance(made.model(**inputs), model(**inputs)) <= 1e-5


def test_nan_and_inf_are_no_agreement() -> None:
    nan, inf = math.nan, math.inf

    def differ(a: list[float], b: list[float]) -> float:
        return largest_difference(Outputs({"": torch.tensor(a)}), Outputs({"": torch.tensor(b)}))

    assert differ([1.0, 2.0], [nan, 2.0]) == differ([nan, 2.0], [1.0, 2.0]) == differ([1.0, inf], [1.0, -inf]) == inf
    assert differ([nan, inf, -inf], [nan, inf, -inf]) == 0.0
    assert differ([-inf, 4.0], [-inf, 5.0]) == 0.25


def test_a_forked_process_does_not_wait_for_threads_that_it_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64)
    function = kind(ran.append)
    address = int(ctypes.cast(function, ctypes.c_void_p).value or 0)
    monkeypatch.setattr(kernels_team, "_openmp", lambda: lambda *arguments: ran.append(-1))
    monkeypatch.setattr(kernels_team, "_used", False)
    monkeypatch.setattr(kernels_team, "_lost", False)
    monkeypatch.setattr(kernels_team, "_lock", kernels_team._lock)
    monkeypatch.setattr(kernels_team, "_pools", {})
    kernels_team._begin_anew()  # before the team was used: the process may have one of its own
    kernels_team.run(address, 5, 2)
    if hasattr(os, "fork"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of Python warn of threads
            child = os.fork()
        if not child:
            os._exit(0 if kernels_team._lost else 1)
        assert os.waitpid(child, 0)[1] == 0 and not kernels_team._lost
    kernels_team._begin_anew()
    with pytest.raises(InvalidInput, match="set_num_threads"):
        kernels_team.run(address, 5, 2)
    kernels_team.run(address, 7, 1)
    assert ran == [-1, 7]


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals to threads")
def test_an_interrupt_waits_for_the_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    waited_for, interrupted, first = threading.Event(), threading.Event(), threading.Lock()
    real = Future.exception

    def exception(self: Future[Any], timeout: float | None = None) -> BaseException | None:
        waited_for.set()
        return real(self, timeout)

    def work(number: int) -> None:
        if threading.current_thread() is threading.main_thread():
            return
        waited_for.wait()
        if first.acquire(blocking=False):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        interrupted.wait()
        time.sleep(0.05)  # to be caught if nobody waits
        done.append(number)

    def interrupt(*_: Any) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    function = ctypes.CFUNCTYPE(None, ctypes.c_int64)(work)
    monkeypatch.setattr(Future, "exception", exception)
    monkeypatch.setattr(kernels_team, "_openmp", lambda: None)
    monkeypatch.setattr(kernels_team, "_callable", lambda address: function)
    monkeypatch.setattr(kernels_team, "_pools", {})
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            kernels_team.run(0, 1, 3)
    finally:
        signal.signal(signal.SIGALRM, before)
    helped = len(done)
    kernels_team._pool(2).shutdown()
    assert len(done) == helped >= 1  # none went on behind the interrupt


def _bad() -> list[tuple[Callable[[], Any], str]]:
    model, x = fc().eval(), draw(2, 1, 12, 12)
    with torch.no_grad():
        broken = fc()
        broken[1].weight[0, 0] = float("nan")
    return [
        (lambda: nettrim.accelerate("model", x), "nn.Module"),  # type: ignore[arg-type]
        (lambda: nettrim.accelerate(model, x, budget=0), "budget"),
        (lambda: nettrim.accelerate(model, "x"), "example"),
        (lambda: nettrim.accelerate(model, draw(2, 7)), "cannot run"),
        (lambda: nettrim.accelerate(broken, x), "NaN"),
        (lambda: nettrim.accelerate(model, x, device="nowhere"), "device"),
        (lambda: nettrim.accelerate(SparseChain([], {}, []), x), "accelerated already"),
    ]


@pytest.mark.parametrize(("call", "words"), _bad())
def test_bad_input_is_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        call()


@native
def test_a_wrong_result_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, "every layer sparse")
    real = SparseRegion.forward
    monkeypatch.setattr(SparseRegion, "forward", lambda self, *tensors: real(self, *tensors) * 1.001)  # type: ignore[operator]
    with pytest.raises(NetTrimError, match="nothing is returned"):
        nettrim.accelerate(sparse(fc()), draw(2, 1, 12, 12), budget=BUDGET)


def test_the_semi_structured_kernel_says_what_it_needs() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    half = nn.Linear(8, 8).half()
    assert "device without the kernel" in semi_structured.unable(half, cpu)
    assert "float16" in semi_structured.unable(nn.Linear(8, 8), cuda)
    assert "not 2:4" in semi_structured.unable(half, cuda)
    with torch.no_grad():
        half.weight[:, ::2] = 0
    assert semi_structured.unable(half, cuda) == ""
    assert "no semi-structured" in semi_structured.unable(nn.Conv2d(1, 1, 1), cuda)
