"""Data on which a model does not run: what is said is true, and what is suggested works when it is written so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

import nettrim
import nettrim.sources
from nettrim.status import InvalidInput


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def convolutional(channels: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)).eval()


def dense(inputs: int = 20) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def sequence() -> nn.Module:
    return nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)).eval()


def tokens() -> nn.Module:
    return nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(40, 3)).eval()


BYTES = (images(16, 3, 8, 8) * 255).to(torch.uint8)
LABELS = torch.randint(5, (16,), generator=torch.Generator().manual_seed(0))


def refused(model: nn.Module, data: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        nettrim.prune(model, data, sparsity=0.5, progress=False)
    return str(caught.value)


def prunes(model: nn.Module, data: Any) -> nettrim.PruneResult:
    return nettrim.prune(model, data, sparsity=0.5, progress=False)


@pytest.mark.parametrize(
    ("make", "x", "suggested"),
    [
        (convolutional, BYTES, "x.float() / 255"),
        (convolutional, BYTES.permute(0, 2, 3, 1), "x.permute(0, 3, 1, 2).float() / 255"),
        (convolutional, images(16, 8, 8, 3), "x.permute(0, 3, 1, 2)"),
        (convolutional, images(16, 192), "x.reshape(-1, 3, 8, 8)"),
        (convolutional, images(3, 8, 8), "x[None]"),
        (convolutional, images(8, 8, 3), "x.permute(2, 0, 1)[None]"),
        (lambda: convolutional(1), images(16, 8, 8), "x.unsqueeze(1)"),
        (lambda: convolutional(1), images(16, 64), "x.reshape(-1, 1, 8, 8)"),
        (sequence, images(16, 10, 4), "x.transpose(1, 2)"),
        (sequence, images(16, 10, 4).double(), "x.transpose(1, 2).float()"),
        (lambda: dense(192), images(16, 3, 8, 8), "x.flatten(1)"),
        (lambda: dense(192), BYTES, "x.flatten(1).float() / 255"),
        (dense, images(16, 20).double(), "x.float()"),
        (dense, images(16, 20).half(), "x.float()"),
        (dense, images(16, 20) > 0.5, "x.float()"),
        (dense, torch.ones(16, 20, dtype=torch.int64), "x.float()"),
        (tokens, torch.ones(16, 5), "x.long()"),
        (lambda: dense().double(), images(16, 20), "x.double()"),
        (lambda: dense().bfloat16(), images(16, 20), "x.bfloat16()"),
    ],
    ids=range(19),
)
def test_what_is_suggested_for_an_input_works(make: Any, x: Tensor, suggested: str) -> None:
    for data in ([x], [(x, LABELS)], {"loader": x}):
        batches = [data["loader"]] if isinstance(data, dict) else data
        text = refused(make(), batches)
        assert f"has shape {tuple(x.shape)} and dtype {str(x.dtype).removeprefix('torch.')}" in text
        found = re.search(r"the model runs on (.*?)(?= \()", text)
        assert found is not None and found[1] == suggested
    assert prunes(make(), [eval(suggested, {"x": x})]).report.layers


@pytest.mark.parametrize(
    ("make", "x", "words"),
    [
        (dense, images(16, 21), r"layer '0' \(Linear\) takes \(samples, \.\.\., 20\), found \(16, 21\)"),
        (convolutional, images(16, 1, 8, 8), r"layer '0' \(Conv2d\) takes \(samples, 3 channels, height, width\), found \(16, 1, 8, 8\)"),
        (convolutional, images(16, 3, 9, 9), r"layer '3' \(Linear\) takes .*512\), found \(16, 648\); the input has shape \(16, 3, 9, 9\)"),
        (sequence, images(16, 5, 10), r"takes \(samples, 4 channels, length\), found \(16, 5, 10\)"),
        (tokens, torch.full((16, 5), 12), "takes whole numbers from 0 to 9, found values from 12 to 12"),
        (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).eval(), images(16, 5), r"takes \(samples, 4, \.\.\.\), found \(16, 5\)"),
        (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)).eval(), images(16, 5), r"takes \(\.\.\., 4\), found \(16, 5\)"),
    ],
    ids=range(7),
)
def test_a_shape_that_no_change_mends_is_stated_beside_the_one_wanted(make: Any, x: Tensor, words: str) -> None:
    assert re.search(words, refused(make(), [x]))


@pytest.mark.parametrize("x", [images(16, 3, 8, 8), BYTES], ids=["floats", "bytes"])
def test_labels_in_the_first_place(x: Tensor) -> None:
    text = refused(convolutional(), [(LABELS, x)])
    assert "the second item looks like the inputs" in text
    remedy = re.search(r"give (\[.*? in data\])", text)
    assert remedy is not None
    assert prunes(convolutional(), eval(remedy[1], {"data": [(LABELS, x)]})).report.samples == 16


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (dense, [images(20)]),
        (dense, list(images(16, 20))),
        (dense, list(TensorDataset(images(16, 20), LABELS))),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), [images(3, 8, 8)]),
        (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU()).eval(), [images(3, 8)]),
    ],
    ids=["vector", "list of samples", "list of samples with labels", "image", "series"],
)
def test_single_samples_are_not_taken_for_batches(make: Any, data: Any) -> None:
    text = refused(make(), data)
    assert "one sample without a dimension of samples" in text and "torch.stack(samples)" in text


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(6, 8)

    def forward(self, num: Tensor, ctx: Tensor) -> Tensor:
        return torch.relu(self.a(num)) + self.b(ctx)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.a(x)
        return y if mask is None else y * mask


@pytest.mark.parametrize(
    ("model", "data", "named"),
    [
        (Two(), [(images(16, 4), images(16, 6), LABELS)], [({"num": images(16, 4), "ctx": images(16, 6)}, LABELS)]),
        (Two(), [(images(16, 4), images(16, 6))], [{"num": images(16, 4), "ctx": images(16, 6)}]),
        (Masked(), [(images(16, 4), torch.ones(16, 8), LABELS)], [({"x": images(16, 4), "mask": torch.ones(16, 8)}, LABELS)]),
    ],
    ids=["two and labels", "two", "optional and labels"],
)
def test_tuples_of_several_inputs_are_refused_with_how_to_name_them(model: nn.Module, data: Any, named: Any) -> None:
    remedies = re.findall(r"(\[.*? for b in data\])", refused(model, data))
    written = eval(remedies[0], {"data": data})
    assert str(written) == str(named)
    assert prunes(model, written).report.samples == 16
    for other in remedies[1:]:
        assert prunes(model, eval(other, {"data": data})).report.samples == 16


def test_a_pair_is_inputs_and_labels_also_where_forward_takes_more() -> None:
    assert prunes(Masked(), [(images(16, 4), LABELS)]).report.samples == 16


def test_keys_that_forward_does_not_take_are_named_with_how_to_drop_them() -> None:
    for extra in ({"labels": LABELS}, {"labels": LABELS, "index": LABELS}):
        data = [{"x": images(16, 4), **extra}]
        text = refused(Masked(), data)
        assert "forward takes x, mask" in text and all(repr(key) in text for key in extra)
        remedy = re.search(r"(\[\{.*\} for batch in data\])", text)
        assert remedy is not None and prunes(Masked(), eval(remedy[1], {"data": data})).report.samples == 16
    assert "'ctx' is missing" in refused(Two(), [{"num": images(16, 4)}])


@pytest.mark.parametrize(
    ("array", "change"),
    [
        (images(16, 20).numpy(), "torch.from_numpy(array)"),
        (images(16, 20).double().numpy(), "torch.from_numpy(array).float()"),
        ((images(16, 20) * 255).to(torch.uint8).numpy(), "torch.from_numpy(array).float() / 255"),
    ],
    ids=["float32", "float64", "uint8"],
)
def test_arrays_are_answered_with_the_conversion(array: Any, change: str) -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = dense()

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)  # type: ignore[no-any-return]

    for model, data in ((dense(), array), (dense(), [array]), (dense(), [(array, LABELS)]), (Keyed(), [{"x": array}])):
        text = refused(model, data)
        assert re.search(re.escape(change) + r"(\)|$)", text)
    assert prunes(dense(), [eval(change, {"torch": torch, "array": array})]).report.samples == 16


class Samples(Dataset[tuple[Any, int]]):
    def __init__(self, x: Any) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.x[index], index % 3


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(images(16, 20))


@pytest.mark.parametrize("x", [images(300, 20), images(300, 20).numpy()], ids=["tensors", "arrays"])
def test_a_dataset_of_samples_is_batched_in_its_order(x: Any) -> None:
    own = prunes(dense(), Samples(x))
    model = dense()
    loader = DataLoader(Samples(x), batch_size=256)
    assert own.report.samples == 300 and own.report.sample_shape == (20,)
    assert nettrim.prune(model, Samples(x), sparsity=0.5, progress=False).certificate == prunes(model, loader).certificate


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Stream(), "found Stream; give DataLoader(dataset, batch_size=256)"),
        (DataLoader(TensorDataset(images(64, 20)), 16, sampler=SubsetRandomSampler(range(64))), "take out random sampling"),
        (DataLoader(TensorDataset(images(3, 20)), 4, drop_last=True), "drop_last=True"),
        ([((images(4, 4), images(4, 6)), LABELS[:4])], "give several inputs by name"),
        ([[[1.0, 2.0], LABELS]], "use torch.tensor"),
        (lambda: [images(16, 20)], "found function; call it"),
        ("data.npy", "load the file first"),
    ],
    ids=range(7),
)
def test_other_things_than_batches(data: Any, words: str) -> None:
    assert words in refused(dense(), data)


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (DataLoader(TensorDataset(images(16, 20), LABELS), 4), "found a DataLoader; give the first of it, next(iter(data))"),
        ([(images(4, 20), LABELS[:4])], "found a list of them; give the first of it, data[0]"),
        ((batch for batch in [images(4, 20)]), "found a generator; give the first of it, next(iter(data))"),
        ([["a", "b"]], "must be a tensor"),
        (images(4, 20).numpy(), "use torch.from_numpy"),
    ],
    ids=range(5),
)
def test_an_example_is_one_batch(example: Any, words: str, tmp_path: Path) -> None:
    calls = [
        lambda: nettrim.compact(dense(), example),
        lambda: nettrim.accelerate(dense(), example),
        lambda: nettrim.bench(dense(), example),
        lambda: nettrim.export(dense(), example, tmp_path / "m.c"),
    ]
    for call in calls:
        with pytest.raises(InvalidInput) as caught:
            call()
        assert words in str(caught.value)


def test_labels_of_as_many_dimensions_in_first_place() -> None:
    x, targets = images(16, 20), images(16, 1)
    assert "the second item looks like the inputs; give [(x, y) for y, x in data]" in refused(dense(), [(targets, x)])
    assert "second item" not in refused(dense(), [(images(16, 19), images(16, 5))])


def test_every_entry_says_the_same(tmp_path: Path) -> None:
    model, good, bad = dense(), [images(16, 20)], [(images(16, 20) * 255).to(torch.uint8)]
    result = prunes(model, good)
    result.save(tmp_path / "r")
    calls = [
        lambda: nettrim.verify(tmp_path / "r", model, bad),
        lambda: nettrim.recertify(result, result.model, model, bad),
        lambda: nettrim.distill(result.model, model, bad, steps=1, progress=False),
        lambda: nettrim.compare(model, bad, methods=["magnitude"], sparsities=[0.5], progress=False),
        lambda: nettrim.prune(model, good, sparsity=0.5, heldout=bad, progress=False),
        lambda: nettrim.compact(model, bad[0]),
        lambda: nettrim.accelerate(model, bad[0]),
        lambda: nettrim.export(model, bad[0], tmp_path / "m.c"),
        lambda: nettrim.bench(model, bad[0]),
    ]
    for call in calls:
        with pytest.raises(InvalidInput, match=r"the model runs on x\.float\(\) / 255"):
            call()
    np.save(tmp_path / "x.npy", (images(16, 20) * 255).to(torch.uint8).numpy())
    with pytest.raises(InvalidInput, match=r"the model runs on x\.float\(\) / 255"):
        prunes(model, nettrim.sources.batches_from(str(tmp_path / "x.npy"), model, 8))
