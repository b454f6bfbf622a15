"""Bounds of whole networks: drawn masks keep to them, in several architectures; and what is refused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn
from torch.nn import functional

import nettrim
from nettrim.bound_network import NetworkBounds, network_bounds
from nettrim.bounds import RULES
from nettrim.bounds.masks import removed_counts
from nettrim.render.bounds import bound_table, bound_words
from nettrim.status import InvalidInput

DELTA, TRIALS = 0.25, 24
MOST = int(binom.ppf(1 - 1e-6, TRIALS, DELTA))


class Residual(nn.Module):
    """Two branches that are added, one with a layer of its own, and two that are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.short = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 6, 3, stride=2, padding=1),
            nn.Conv2d(4, 6, 1, stride=2),
        )
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = functional.relu(self.norm(self.inner(x)) + self.short(x))
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.head(torch.cat([x, torch.tanh(x)], 1))


def mlp(act: Callable[[], nn.Module], *sizes: int) -> nn.Module:
    modules: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        modules += [nn.Linear(before, after), act()]
    return nn.Sequential(*modules[:-1])


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.Conv2d(6, 8, 3, padding=1, groups=2),
        nn.LeakyReLU(0.1),
        nn.MaxPool2d(3, stride=2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "relu": (lambda: mlp(nn.ReLU, 12, 30, 20, 4), (12,)),
    "wide": (lambda: mlp(nn.ReLU, 20, 200, 5), (20,)),
    "sigmoid": (lambda: mlp(nn.Sigmoid, 12, 30, 4), (12,)),
    "gelu": (lambda: mlp(nn.GELU, 12, 30, 4), (12,)),
    "convolution": (conv, (1, 6, 6)),
    "residual": (Residual, (1, 6, 6)),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A network with statistics of its batch-norms that are not the initial ones, and inputs."""
    make, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = make()
        x = torch.randn(24, *shape)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.3, 2.0)
                module.running_mean.normal_()
                nn.init.normal_(module.weight)
        return model.eval(), x


def radius_of(x: Tensor) -> float:
    return float(x.flatten(1).double().norm(dim=1).max())


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: module.weight for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


def redrawn(model: nn.Module, rule: str, share: float, g: torch.Generator) -> None:
    """Removes weights in place, by independent draws or by size."""
    for weight in weights_of(model).values():
        if rule == "bernoulli":
            weight.data *= torch.rand(weight.shape, generator=g) >= share
        else:
            parts = weight.data.chunk(2 if weight.shape == (8, 3, 3, 3) else 1)
            for part, count in zip(parts, removed_counts([part.numel() for part in parts], share), strict=True):
                smallest = part.abs().flatten().argsort(stable=True)[:count]
                part.view(-1)[smallest] = 0.0


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
def test_the_stated_probability_is_kept(name: str, share: float) -> None:
    model, x = made(name)
    found = network_bounds(model, x, radius=radius_of(x))
    data, ball = (found.gap(share, DELTA, rule="bernoulli", form=form).value for form in ("data", "ball"))
    before = model(x).detach().double()
    exceeded = [0, 0]
    for trial in range(TRIALS):
        pruned = made(name)[0]
        redrawn(pruned, "bernoulli", share, torch.Generator().manual_seed(trial))
        moved = (pruned(x).detach().double() - before).norm(dim=1)
        exceeded[0] += float(moved.norm()) > data
        exceeded[1] += float(moved.max()) > ball
    assert max(exceeded) <= MOST


@pytest.mark.parametrize("name", ["relu", pytest.param("convolution", marks=pytest.mark.slow)])
def test_what_random_prunes_keeps_to_the_bound_of_random(name: str) -> None:
    model, x = made(name)
    found = network_bounds(model, x, radius=radius_of(x))
    for share, trials in ((0.1, 2), (0.5, 4)):
        bound, ball = found.gap(share, DELTA), found.gap(share, DELTA, form="ball")
        assert bound.rule == "random" and bound.probability == 1 - DELTA
        exceeded = [0, 0]
        for trial in range(trials):
            result = nettrim.prune(model, x, nettrim.Random(sparsity=share, seed=trial), scheme="parallel", progress=False)
            moved = (result.model(x) - model(x)).detach().double().norm(dim=1)
            exceeded[0] += float(moved.norm()) > bound.value
            exceeded[1] += float(moved.max()) > ball.value
        assert max(exceeded) <= binom.ppf(1 - 1e-6, trials, DELTA)
        for layer, report in zip(bound.layers, result.report.layers, strict=True):
            assert (layer.name, layer.weights) == (report.name, report.weights)


def test_random_and_magnitude_remove_as_many_as_the_theorem_counts() -> None:
    model, x = made("convolution")
    for method in (nettrim.Random(sparsity=0.33, seed=1), nettrim.Magnitude(sparsity=0.33)):
        pruned = nettrim.prune(model, x, method, scheme="parallel", progress=False).model
        for (name, weight), before in zip(weights_of(pruned).items(), weights_of(model).values(), strict=True):
            parts = weight.chunk(2 if name == "3" else 1)
            assert [int((part == 0).sum()) for part in parts] == removed_counts([part.numel() for part in parts], 0.33)
            assert bool((before != 0).all())


@pytest.mark.parametrize(
    "name", ["sigmoid", pytest.param("relu", marks=pytest.mark.slow), pytest.param("convolution", marks=pytest.mark.slow)]
)
def test_the_smallest_weights_under_random_signs(name: str) -> None:
    """The bound itself depends on the network that is drawn."""
    exceeded = 0
    for trial in range(TRIALS):
        model, x = made(name)
        g = torch.Generator().manual_seed(trial)
        for weight in weights_of(model).values():
            weight.data *= torch.randint(2, weight.shape, generator=g) * 2 - 1
        bound = network_bounds(model, x).gap(0.3, DELTA, rule="magnitude").value
        before = model(x).detach()
        redrawn(model, "magnitude", 0.3, g)
        exceeded += float((model(x).detach() - before).double().norm()) > bound
    assert exceeded <= MOST


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_pruned_version_in_hand_and_every_mask_are_certain(name: str) -> None:
    model, x = made(name)
    found = network_bounds(model, x, radius=radius_of(x))
    before = model(x).detach().double()
    for trial, share in enumerate((0.05, 0.4, 0.9)):
        pruned = made(name)[0]
        rule = "magnitude"
        redrawn(pruned, rule, share, torch.Generator().manual_seed(trial))
        moved = (pruned(x).detach().double() - before).norm(dim=1)
        for form, achieved in (("data", moved.norm()), ("ball", moved.max())):
            exact, every = found.of_pruned(pruned, form=form), found.gap(share, rule="any", form=form)
            assert float(achieved) <= exact.value * (1 + 1e-6)
            assert exact.value <= every.value * (1 + 1e-9)
            assert exact.probability == every.probability == 1
            assert all(layer.share == pytest.approx(share, abs=0.06) for layer in exact.layers)


def test_the_bound_of_a_pruned_network_by_hand() -> None:
    model, x = made("relu")
    pruned = made("relu")[0]
    redrawn(pruned, "magnitude", 0.4, torch.Generator())
    W = [module.weight.detach().double().T for module in model if isinstance(module, nn.Linear)]
    V = [module.weight.detach().double().T for module in pruned if isinstance(module, nn.Linear)]
    model.double().requires_grad_(False)
    reach, e, rate, at_zero = radius_of(x), 0.0, 1.0, torch.zeros(1, 12).double()
    for layer, (own, kept) in enumerate(zip(W, V, strict=True)):
        h = float(at_zero.norm()) + reach * rate
        e = float(torch.linalg.matrix_norm(own - kept, 2)) * h + float(torch.linalg.matrix_norm(kept, 2)) * e
        rate *= float(torch.linalg.matrix_norm(own, 2))
        at_zero = torch.relu(model[2 * layer](at_zero))
    found = network_bounds(made("relu")[0], x, radius=reach)
    assert found.of_pruned(pruned, form="ball").value == pytest.approx(e, rel=1e-9)


@pytest.mark.parametrize("rule", list(RULES))
def test_bounds_are_monotone_and_the_largest_share_is_the_largest(rule: str) -> None:
    model, x = made("relu")
    found = network_bounds(model, x, radius=radius_of(x))
    for form in found.forms:
        gaps = [found.gap(share, rule=rule, form=form).value for share in (0.0, 0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)]
        assert gaps[0] == 0 and all(after >= before * (1 - 1e-12) for before, after in itertools.pairwise(gaps))
        assert found.gap(0.3, 0.01, rule=rule, form=form).value >= found.gap(0.3, 0.2, rule=rule, form=form).value
        for goal in (gaps[3], gaps[5]):
            share = found.largest_share(goal * 1.0001, rule=rule, form=form)
            assert found.gap(share, rule=rule, form=form).value <= goal * 1.0001
            assert found.gap(share + 2e-6, rule=rule, form=form).value > goal * 1.0001 or share > 0.999
    if rule == "random":
        half = found.largest_share(0.5, rule=rule, relative=True)
        assert half == found.largest_share(0.5 * found.output_norm, rule=rule)


def test_depth_only_adds() -> None:
    """Layers of norm at least 1 that follow: the bound of the longer network is no smaller."""
    model, x = made("relu")
    last = [0.0, 0.0]
    for module in model:
        if isinstance(module, nn.Linear):
            module.weight.data *= 2
    for depth in (1, 3, 5):
        found = network_bounds(nn.Sequential(*list(model)[:depth]), x, radius=radius_of(x))
        values = [found.gap(0.3, form=form).value for form in ("data", "ball")]
        assert min(layer.norm for layer in found.gap(0.3).layers) >= 1
        assert all(now >= before for now, before in zip(values, last, strict=True))
        last = values


def test_layers_by_name_and_layers_left_alone() -> None:
    model, x = made("residual")
    found = network_bounds(model, x, radius=radius_of(x), ignore=["stem"])
    assert "stem" not in found.names
    some = found.gap({"inner": 0.2}, 0.1)
    assert {layer.name: layer.share for layer in some.layers} == {"inner": 0.2, "short": 0.0, "head": 0.0}
    assert some.value < found.gap(0.2, 0.1).value
    assert found.gap({"re:inner|head": 0.2}, 0.1).value == found.gap({"inner": 0.2, "head": 0.2}, 0.1).value
    with pytest.raises(InvalidInput, match="nearest is 'inner'"):
        found.gap({"iner": 0.2})


@pytest.mark.parametrize("name", ["convolution", "residual"])
def test_norms_of_convolutions_are_upper_bounds(name: str) -> None:
    """Against the matrix of the whole convolution, batch-norm included."""
    model, x = made(name)
    found = network_bounds(model, x, radius=1.0)
    norms = {layer.name: layer.norm for layer in found.gap(0.1).layers}
    pairs = (
        {"0": nn.Sequential(model[0], model[1]), "3": model[3]}
        if name == "convolution"
        else {"inner": nn.Sequential(model.inner, model.norm)}
    )
    for layer, module in pairs.items():
        channels = next(module.parameters()).shape[1] * (2 if layer == "3" else 1)
        size = (1, channels, 5, 5)
        J = torch.autograd.functional.jacobian(module, torch.randn(size)).reshape(-1, channels * 25)
        assert float(torch.linalg.matrix_norm(J, 2)) <= norms[layer] * (1 + 1e-5)


def test_same_data_same_numbers_and_the_model_is_left_alone() -> None:
    model, x = made("convolution")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    first, second = (network_bounds(model, list(x.split(7)), radius=3.0).gap(0.2).to_dict() for _ in range(2))
    assert first == second and model.training and json.loads(json.dumps(first)) == {**first, "layers": first["layers"]}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    whole = network_bounds(model, x, radius=3.0).gap(0.2)
    assert whole.value == pytest.approx(first["value"], rel=1e-9)
    alone = network_bounds(model, radius=3.0, input_shape=(1, 6, 6))
    assert alone.forms == ("ball",) and alone.gap(0.2).value == pytest.approx(
        network_bounds(model, x, radius=3.0).gap(0.2, form="ball").value
    )


class Odd(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.last, self.what = nn.Linear(4, 4), nn.Linear(4, 2), what
        self.tokens, self.custom = nn.Embedding(5, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "embedding":
            return self.last(torch.relu(self.first(self.tokens(x).sum(1))))
        x = self.first(x)
        if self.what == "twice":
            x = self.first(x)
        if self.what == "norm":
            x = self.custom(x)
        if self.what == "square":
            x = x * x
        if self.what == "broadcast":
            x = x + x[:, :1]
        if self.what == "untraceable" and float(x.sum()) > 1e9:
            x = -x
        return self.last(x)


def test_what_has_no_bound_is_refused_with_its_name() -> None:
    x = torch.ones(3, 4)
    for what, message in (
        ("norm", "no Lipschitz constant is known for custom .LayerNorm"),
        ("square", "no Lipschitz constant is known for mul"),
        ("broadcast", "no Lipschitz constant is known for getitem"),
        ("twice", "'first' is called more than once"),
        ("untraceable", "could not be traced"),
    ):
        with pytest.raises(InvalidInput, match=message):
            network_bounds(Odd(what).eval(), x)
    behind = network_bounds(Odd("norm").eval(), x, layers=["last"])
    assert behind.gap(0.5).value > 0
    with pytest.raises(InvalidInput, match="nothing is known uniformly"):
        network_bounds(Odd("norm").eval(), x, layers=["last"], radius=1.0)
    tokens = torch.tensor([[1, 2], [3, 4]])
    assert network_bounds(Odd("embedding").eval(), [tokens]).gap(0.3).value > 0
    with pytest.raises(InvalidInput, match="nothing is known uniformly"):
        network_bounds(Odd("embedding").eval(), [tokens], radius=1.0)
    padded = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)).eval()
    with pytest.raises(InvalidInput, match="padding mode"):
        network_bounds(padded, torch.ones(2, 1, 4, 4))


class Twice(nn.Module):
    """One response put beside itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return torch.cat([h, h, h], 1)


def test_pieces_of_a_stack_that_are_the_same_count_every_time() -> None:
    torch.manual_seed(0)
    model, pruned, x = Twice().eval(), Twice().eval(), torch.rand(20, 4)
    pruned.load_state_dict(model.state_dict())
    pruned.first.weight.data[:, :2] = 0
    moved = float((pruned(x) - model(x)).detach().double().norm())
    assert network_bounds(model, x).of_pruned(pruned).value == pytest.approx(moved, rel=1e-5)


class InPlace(nn.Module):
    """Changes a tensor in place: what reads it by its old name, or through a view, sees the new values."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.last, self.how = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2), how

    def forward(self, x: Tensor) -> Tensor:
        h, g = self.first(x), self.second(x)
        if self.how == "added":
            h.add_(g)
        elif self.how == "scaled":
            h.mul_(10.0)
        elif self.how == "view":
            h[:, 1:].add_(3.0)
        elif self.how == "reassigned":  # the graph shows it
            h += g
            h = h.relu_()
        return self.last(h)


@pytest.mark.parametrize("how", ["added", "scaled", "view"])
def test_what_is_changed_in_place_behind_the_graph_is_refused(how: str) -> None:
    x = torch.rand(5, 4)
    with pytest.raises(InvalidInput, match=r"what first \(Linear\) gives is changed in place before last \(Linear\) reads it"):
        network_bounds(InPlace(how).eval(), x, layers=["first"])
    shown, pruned = InPlace("reassigned").eval(), InPlace("reassigned").eval()
    pruned.load_state_dict(shown.state_dict())
    pruned.second.weight.data.zero_()
    moved = float((pruned(x) - shown(x)).detach().double().norm())
    assert moved <= network_bounds(shown, x, layers=["first", "second"]).of_pruned(pruned).value


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Tensor, NetworkBounds]:
    model, x = made("relu")
    return model, x, network_bounds(model, x)


def test_bad_settings_are_refused(small: tuple[nn.Module, Tensor, NetworkBounds]) -> None:
    model, x, found = small
    for delta in (0.0, 1.0, 2, "a"):
        with pytest.raises(InvalidInput, match="delta must"):
            found.gap(0.1, delta)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"share is the fraction"):
        found.gap(1.0)
    with pytest.raises(InvalidInput, match="rule must be one of"):
        found.gap(0.1, rule="wanda")
    with pytest.raises(InvalidInput, match="pass radius="):
        found.gap(0.1, form="ball")
    with pytest.raises(InvalidInput, match="'ball' or 'data'"):
        found.gap(0.1, form="sphere")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="gap must be above 0"):
        found.largest_share(0)
    with pytest.raises(InvalidInput, match="relative gap needs data"):
        network_bounds(model, x, radius=1.0).largest_share(0.1, form="ball", relative=True)
    with pytest.raises(InvalidInput, match="needs data=, or radius="):
        network_bounds(model)
    with pytest.raises(InvalidInput, match="radius must be above 0"):
        network_bounds(model, x, radius=-1)
    with pytest.raises(InvalidInput, match="needs input_shape"):
        network_bounds(model, radius=1.0)
    with pytest.raises(InvalidInput, match="needs input_shape"):
        network_bounds(model, radius=1.0, input_shape=12)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="input_shape is for a radius without data"):
        network_bounds(model, x, radius=1.0, input_shape=(12,))
    with pytest.raises(InvalidInput, match=r"must be an nn\.Module"):
        network_bounds(3, x)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"must be an nn\.Module"):
        found.of_pruned("pruned")  # type: ignore[arg-type]
    broken = made("relu")[0]
    broken[0].weight.data[0, 0] = torch.nan
    with pytest.raises(InvalidInput, match="layer '0' holds NaN"):
        found.of_pruned(broken)


def test_another_network_is_no_pruned_version(small: tuple[nn.Module, Tensor, NetworkBounds]) -> None:
    _, _, found = small
    other = made("relu")[0]
    other[0].bias.data += 1
    with pytest.raises(InvalidInput, match=r"also differs in 0\.bias"):
        found.of_pruned(other)
    with pytest.raises(InvalidInput, match="another network"):
        found.of_pruned(made("wide")[0])


def test_a_bound_is_told_in_words_and_as_a_table(small: tuple[nn.Module, Tensor, NetworkBounds]) -> None:
    model, x, found = small
    words = bound_words(found.gap(0.3, 0.1))
    assert words[0].startswith("with probability at least 0.9, over the 24 samples") and "nettrim.Random" in words[1]
    certain = network_bounds(model, x, radius=2.0).gap(0.3, rule="any", form="ball")
    assert bound_words(certain)[0].startswith("certainly, for every input of norm at most 2 ")
    assert bound_table(certain).row_count == 3
