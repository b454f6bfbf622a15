"""Fine-tuning without labels: zeros stay, the outputs come nearer, nothing given changes; and the certificate made anew."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nettrim
from nettrim import InvalidInput, Magnitude, PruneResult
from nettrim.calibration import Calibration
from nettrim.capture import replicate
from nettrim.distill import Distilled, distill
from nettrim.experiments.models import fully_connected
from nettrim.recertify import recertify
from nettrim.render.numbers import percent
from nettrim.stacked import outputs, split, stacked

FEW: dict[str, Any] = {"steps": 60, "batch_size": 16, "progress": False}


def network() -> nn.Sequential:
    return fully_connected((12, 16, 10, 4), seed=3)


def images(count: int = 120, seed: int = 0) -> Tensor:
    return torch.rand(count, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pruned() -> PruneResult:
    return nettrim.prune(network(), images(), Magnitude(sparsity=0.6), progress=False)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def relative(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        before, after = reference.eval()(x).double(), model.eval()(x).double()
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_it_comes_nearer_and_keeps_zeros(pruned: PruneResult, loss: Any) -> None:
    reference, before = network(), state(pruned.model)
    random = torch.get_rng_state()
    made = distill(pruned.model, reference, images(), loss=loss, **FEW)
    assert torch.equal(torch.get_rng_state(), random)
    assert same(state(pruned.model), before) and same(state(reference), state(network()))
    assert all(parameter.grad is None for parameter in (*pruned.model.parameters(), *reference.parameters()))
    assert type(made.model) is type(pruned.model) and made.model.training == pruned.model.training
    for name, value in made.model.state_dict().items():
        if name.endswith("weight"):
            assert torch.equal(value == 0, before[name] == 0)
        assert not torch.equal(value, before[name]), name
    assert made.before == pytest.approx(relative(pruned.model, network(), images()), rel=1e-5)
    assert made.after == pytest.approx(relative(made.model, network(), images()), rel=1e-5)
    if loss == "mse":
        assert made.after < 0.7 * made.before
    assert made.history[0][0] == 0 and made.history[-1][0] == FEW["steps"]
    assert dict(made.history)[made.best] == min(value for _, value in made.history) < made.history[0][1]


def test_the_losses_are_what_they_say(pruned: PruneResult) -> None:
    reference, x = network(), images()
    with torch.no_grad():
        Y, X = reference(x), pruned.model(x)
    mse = distill(pruned.model, reference, x, holdback=0.5, **(FEW | {"steps": 1}))
    assert mse.unseen_before is not None
    scale = float(Y.square().sum()) / len(x)  # over all samples, so that batches weigh alike
    held = split(stacked(Calibration(x), replicate(reference, torch.device("cpu"), None)), 0.5, torch.Generator().manual_seed(0))[1][0]
    rows = held.tensors[""]
    assert len(rows) == 60
    with torch.no_grad():
        moved = (pruned.model(rows) - reference(rows)).square().sum() / (scale * len(rows))
    assert mse.history[0][1] == pytest.approx(float(moved), rel=1e-5)
    assert mse.unseen_before == pytest.approx(relative(pruned.model, reference, rows), rel=1e-5)
    kl = distill(pruned.model, reference, x, loss="kl", temperature=2.0, holdback=0.5, **(FEW | {"steps": 1}))
    with torch.no_grad():
        P, Q = (torch.distributions.Categorical(logits=model(rows) / 2) for model in (reference, pruned.model))
        expected = 4 * torch.distributions.kl_divergence(P, Q).mean()
    assert kl.history[0][1] == pytest.approx(float(expected), rel=1e-3)
    assert X.shape == Y.shape


def test_the_same_seed_gives_the_same_and_another_does_not(pruned: PruneResult) -> None:
    first, again, other = (distill(pruned.model, network(), images(), seed=seed, **FEW) for seed in (5, 5, 6))
    assert same(state(first.model), state(again.model)) and first.history == again.history
    assert not same(state(first.model), state(other.model))


def test_batches_are_only_a_form(pruned: PruneResult) -> None:
    x = images()
    whole = distill(pruned.model, network(), x, **FEW)
    cut = distill(pruned.model, network(), [(part, torch.zeros(len(part))) for part in torch.split(x, 17)], **FEW)
    assert same(state(whole.model), state(cut.model))


def test_never_worse_on_what_is_held_back(pruned: PruneResult) -> None:
    good = distill(pruned.model, network(), images(), **FEW)
    wild = distill(good.model, network(), images(), **(FEW | {"learning_rate": 3.0, "steps": 3}))
    assert wild.best == 0 and wild.after == pytest.approx(good.after)
    assert same(state(wild.model), state(good.model))
    last = distill(good.model, network(), images(), holdback=0, **(FEW | {"learning_rate": 3.0, "steps": 3}))
    assert last.best == 3 and last.after > good.after and last.unseen_after is None and last.history == ()


class Normed(nn.Module):
    """Convolution without bias, batch-norm, ReLU, dropout, and a layer that is not pruned."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.conv, self.norm, self.head = nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.5)
        with torch.no_grad():
            for tensor in (*self.parameters(), self.norm.running_mean):
                assert tensor is not None
                tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
            self.norm.weight.add_(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.drop(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))
        return out


def normed() -> tuple[Normed, Tensor, PruneResult]:
    model, x = Normed(), torch.rand(60, 2, 6, 6, generator=torch.Generator().manual_seed(2))
    return model, x, nettrim.prune(model, x, Magnitude(sparsity={"conv": 0.5}), progress=False)


def changed(made: Distilled, before: nn.Module) -> set[str]:
    old = before.state_dict()
    return {name for name, value in made.model.state_dict().items() if not torch.equal(value, old[name])}


def test_what_may_learn() -> None:
    model, x, result = normed()
    for batches in (x, [x[:30], x[30:]]):
        made = distill(result.model, model, batches, **FEW)
        assert changed(made, result.model) == {"conv.weight", "norm.bias"} == set(made.learned)
        assert made.after < made.before
    everything = distill(result.model, model, x, learn="all", **FEW)
    assert changed(everything, result.model) == {"conv.weight", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    frozen = copy.deepcopy(result.model)
    assert isinstance(frozen, Normed)
    frozen.norm.requires_grad_(False)
    made = distill(frozen, model, x, **FEW)
    assert made.learned == ("conv.weight",)
    assert [p.requires_grad for p in made.model.parameters()] == [p.requires_grad for p in frozen.parameters()]


class Keyed(nn.Module):
    """Embedding of tokens, a scale that is not a tensor, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed, self.fc = nn.Embedding(9, 8), nn.Linear(8, 5)
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))

    def forward(self, tokens: Tensor, scale: float) -> dict[str, Tensor]:
        hidden = self.embed(tokens) * scale
        return {"first": self.fc(hidden).mean(1), "second": self.fc(hidden[:, 0])}


def test_tokens_by_keyword_are_not_mixed() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [{"tokens": torch.randint(0, 9, (10, length), generator=generator), "scale": 2.0} for length in (4, 6, 4)]
    model = Keyed()
    result = nettrim.prune(model, batches, Magnitude(sparsity=0.5), progress=False)
    made = distill(result.model, model, batches, **FEW)
    assert not made.mixed and made.after < made.before
    with pytest.raises(InvalidInput, match="'kl' needs one output"):
        distill(result.model, model, batches, loss="kl", **FEW)


class Across(nn.Module):
    """Samples in the second dimension: what it puts out for one row depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x - x.mean(0))
        return out


def test_batches_that_cannot_be_cut_stay_whole() -> None:
    model, x = Across(), torch.rand(80, 5, generator=torch.Generator().manual_seed(0))
    batches = list(torch.split(x, 8))
    replica = replicate(model, torch.device("cpu"), None)
    groups = stacked(Calibration(batches), replica)
    assert [group.divisible for group in groups] == [False] * 10
    kept, unseen = split(groups, 0.1, torch.Generator().manual_seed(0))
    assert (len(kept), len(unseen)) == (9, 1)
    assert torch.equal(outputs(replica, groups[3]).tensors[""], model(batches[3]))
    result = nettrim.prune(model, batches, Magnitude(sparsity=0.5), progress=False)
    made = distill(result.model, model, batches, **FEW)
    assert not made.mixed and made.after < made.before
    with pytest.raises(InvalidInput, match="give more batches"):
        distill(result.model, model, batches[:2], **FEW)


@pytest.mark.parametrize("sizes", [(1, 39, 40), (1, 1, 1), (80,)])
def test_a_sample_by_itself_does_not_show_that_batches_can_be_cut(sizes: tuple[int, ...]) -> None:
    x = torch.rand(sum(sizes), 5, generator=torch.Generator().manual_seed(0))
    for model, whole in ((Across(), True), (nn.Linear(5, 3), False)):
        groups = stacked(Calibration(list(torch.split(x, list(sizes)))), replicate(model.eval(), torch.device("cpu"), None))
        assert [(len(group), group.divisible) for group in groups] == ([(n, False) for n in sizes] if whole else [(sum(sizes), True)])


def test_layers_that_were_not_pruned_do_not_learn() -> None:
    model, x = network(), images()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    model.get_submodule(names[1]).weight.data[0, 0] = 0.0  # a zero of the reference network's own
    result = nettrim.prune(model, x, Magnitude(sparsity=0.5), ignore=[names[1]], progress=False)
    made = distill(result.model, model, x, **FEW)
    assert {name.rpartition(".")[0] for name in made.learned} == {names[0], *names[2:]}
    assert recertify(result, made.model, model, x).certificate.network.achieved < result.certificate.network.achieved
    with pytest.raises(InvalidInput, match="nothing was pruned"):
        distill(model, model, x, **FEW)


def test_half_precision_is_trained_wider() -> None:
    model = network().to(torch.bfloat16)
    x = images().to(torch.bfloat16)
    result = nettrim.prune(model, x, Magnitude(sparsity=0.6), progress=False)
    made = distill(result.model, model, x, **FEW)
    assert all(parameter.dtype == torch.bfloat16 for parameter in made.model.parameters())
    assert made.after < 0.8 * made.before
    for (name, new), old in zip(made.model.named_parameters(), result.model.parameters(), strict=True):
        assert bool((new[old == 0] == 0).all()), name


def test_attention_keeps_its_class_and_keys() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    x = torch.rand(40, 3, 8, generator=torch.Generator().manual_seed(0))
    result = nettrim.prune(model, x, Magnitude(sparsity=0.5), progress=False)
    made = distill(result.model, model, x, **FEW)
    assert type(made.model) is nn.TransformerEncoderLayer and list(made.model.state_dict()) == list(model.state_dict())
    assert made.after < made.before
    for layer in ("self_attn.in_proj_weight", "linear1.weight"):
        old, new = result.model.state_dict()[layer], made.model.state_dict()[layer]
        assert torch.equal(old == 0, new == 0) and not torch.equal(old, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "l1"}, "loss must be 'mse' or 'kl', found 'l1'"),
        ({"learn": "some"}, "learn must be 'pruned' or 'all'"),
        ({"steps": 0}, "steps must be a whole number of at least 1, found 0"),
        ({"steps": True}, "steps must be a whole number"),
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0"),
        ({"temperature": math.inf}, "temperature must be a finite number above 0"),
        ({"holdback": 1}, r"holdback is a share of the samples and must lie in \[0, 1\), found 1"),
        ({"holdback": 0.001}, "nothing held back; give more samples"),
        ({"mixing": 1}, "mixing must be True or False"),
        ({"pruned": network()}, "no zero weights; prune it first"),
        ({"pruned": "model"}, "pruned must be an nn.Module"),
        ({"reference": None}, "reference must be an nn.Module"),
        ({"reference": fully_connected((12, 5), seed=0)}, "same shapes"),
        ({"reference": fully_connected((13, 4), seed=0)}, "the reference model cannot run"),
        ({"calibration": images() * math.nan}, "holds NaN or inf"),
        ({"calibration": []}, "is empty"),
        ({"learning_rate": 1e30, "steps": 9}, "no longer finite in step"),
    ],
)
def test_refused(pruned: PruneResult, change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"pruned": pruned.model, "reference": network(), "calibration": images(), **FEW}
    with pytest.raises(InvalidInput, match=message):
        distill(**(given | change))


def test_models_without_use_are_refused(pruned: PruneResult) -> None:
    broken = copy.deepcopy(pruned.model)
    next(broken.parameters()).data[0, 0] = math.nan
    with pytest.raises(InvalidInput, match=r"1\.weight of the pruned model holds NaN"):
        distill(broken, network(), images(), **FEW)
    with pytest.raises(InvalidInput, match="reference network puts out NaN"):
        distill(pruned.model, broken, images(), **FEW)
    silent = network()
    for parameter in silent.parameters():
        parameter.data.zero_()
    with pytest.raises(InvalidInput, match="outputs are all zero"):
        distill(pruned.model, silent, images(), **FEW)
    with pytest.raises(InvalidInput, match=r"frozen \(requires_grad=False\)"):
        distill(copy.deepcopy(pruned.model).requires_grad_(False), network(), images(), **FEW)


def test_printed_in_plain_lines(pruned: PruneResult) -> None:
    made = distill(pruned.model, network(), images(), **FEW)
    lines = str(made).splitlines()
    assert repr(made) == str(made) and len(lines) == 4
    assert f"went from {percent(made.before)} to {percent(made.after)}, " in lines[0] and f"step {made.best} of 60" in lines[0]
    assert lines[1] == "trained, zeros kept: 1 (weight, bias), 3 (weight, bias), 5 (weight, bias)"
    assert "inputs mixed in pairs" in lines[2] and "nettrim.recertify(result, distilled.model, model, calibration)" in lines[3]
    last = str(distill(pruned.model, network(), images(), holdback=0, mixing=False, **FEW))
    assert "held back" not in last and "mixed" not in last


def test_progress_is_told(pruned: PruneResult) -> None:
    seen: list[tuple[int, int, str]] = []
    distill(pruned.model, network(), images(), **(FEW | {"progress": lambda *told: seen.append(told)}))
    assert seen[-1][:2] == (60, 60) and "loss" in seen[-1][2]
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})


@pytest.mark.parametrize("scheme", ["cascade", "parallel"])
def test_a_new_certificate_is_honest_and_verifies(scheme: Any, tmp_path: Path) -> None:
    model, x, unseen = network(), images(), images(50, seed=9)
    result = nettrim.prune(model, x, nettrim.NetTrim(epsilon=0.03), scheme=scheme, progress=False)
    made = distill(result.model, model, x, **FEW)
    again = recertify(result, made.model, model, x, heldout=unseen)
    certificate = again.certificate
    assert certificate.holds and certificate.heldout is not None
    assert all(layer.tolerance is None and layer.gap is None for layer in (*certificate.layers, *again.report.layers))
    assert certificate.network.achieved / certificate.network.reference_norm == pytest.approx(made.after, rel=1e-4)
    assert certificate.network.bound is not None and certificate.network.achieved <= certificate.network.bound
    assert certificate.weights_hash != result.certificate.weights_hash
    assert certificate.method.endswith(", fine-tuned") and again.report.layers[0].target == "epsilon 0.03, fine-tuned"
    nettrim.verify(again.save(tmp_path), model, x, unseen)
    twice = recertify(again, made.model, model, x)
    assert twice.report == again.report and twice.certificate.layers == certificate.layers


def test_recertify_sees_batch_norm_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    model, x, result = normed()
    made = distill(result.model, model, x, **FEW)
    nettrim.verify(recertify(result, made.model, model, x).save(tmp_path), model, x)
    everything = distill(result.model, model, x, learn="all", **FEW)
    certified = recertify(result, everything.model, model, x)
    assert certified.certificate.trained == ("norm.weight", "head.weight", "head.bias")
    nettrim.verify(certified.save(tmp_path), model, x)
    with pytest.raises(InvalidInput, match="calibration must be the data of the run"):
        recertify(result, made.model, model, x[:-1])
    with pytest.raises(InvalidInput, match="reference must be the network that the result was pruned from"):
        recertify(result, made.model, result.model, x)
    with pytest.raises(InvalidInput, match=r"found another '.*'"):
        recertify(result, network(), model, x)
    with pytest.raises(InvalidInput, match=r"model must be an nn\.Module"):
        recertify(result, None, model, x)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"result must be what nettrim\.prune returned"):
        recertify(made, made.model, model, x)  # type: ignore[arg-type]
