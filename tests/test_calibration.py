"""Calibration batches: what is accepted, what is refused and how, and that every pass sees the same data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SubsetRandomSampler, TensorDataset, WeightedRandomSampler

from nettrim import InvalidInput, Magnitude, NetTrim, prune, verify
from nettrim.calibration import BATCH, Calibration, check_batch, labels, sample_digests, samples, update_hash


def data(rows: int = 40, columns: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def weights_after(model: nn.Module, batches: Any) -> list[Tensor]:
    return list(prune(model, batches, Magnitude(sparsity=0.5), progress=False).model.state_dict().values())


# --- what is accepted ---------------------------------------------------------------------------------------------------------------


def test_one_tensor_is_cut_into_batches() -> None:
    whole = data(2 * BATCH + 5)
    assert [len(batch) for batch in Calibration(whole)] == [BATCH, BATCH, 5]
    assert torch.equal(torch.cat(list(Calibration(whole))), whole)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: [x],
        lambda x: list(x.split(7)),
        lambda x: [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(7)],
        lambda x: [[part] for part in x.split(7)],
        lambda x: DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), batch_size=7),
        lambda x: DataLoader(TensorDataset(x), batch_size=7),
        lambda x: [{"input": part} for part in x.split(7)],
        lambda x: tuple(x.split(7)),
    ],
)
def test_all_forms_of_batches_serve(make: Callable[[Tensor], Any]) -> None:
    result = prune(net(), make(data()), NetTrim(sparsity=0.5), progress=False)
    assert result.report.samples == 40
    assert result.report.sample_shape == (6,)
    expected = prune(net(), data(), NetTrim(sparsity=0.5), progress=False)
    for own, other in zip(result.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_keyword_inputs_with_plain_values() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
            return self.fc(x * scale if mask is None else x * mask)

    batches = [{"x": part, "scale": 2.0, "mask": part > 0} for part in data().split(10)]
    result = prune(Scaled(), batches, NetTrim(epsilon=0.1), progress=False)
    assert result.certificate.holds


# --- what is refused ----------------------------------------------------------------------------------------------------------------


class NoIteration(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        return data()[index]


def generator() -> Iterator[Tensor]:
    yield data()


nan, infinite = data(), data()
nan[3, 2], infinite[0, 0] = float("nan"), float("inf")
REFUSED: list[tuple[Any, str]] = [
    (generator(), "generator, which can be read only once.*list\\(...\\)"),
    (iter([data()]), "list_iterator, which can be read only once"),
    (map(torch.abs, [data()]), "map, which can be read only once"),
    ("data.npy", "found str"),
    (b"data", "found bytes"),
    ({"input": data()}, "found dict; put the one batch into a list"),
    (data().numpy(), "found ndarray; use torch.from_numpy"),
    (NoIteration(), "found NoIteration"),
    (3, "found the number 3"),
    (None, "found NoneType"),
    ([], "is empty"),
    (torch.zeros(5), "samples along its first dimension, found shape \\(5,\\)"),
    (torch.zeros(0, 6), "batch 1 holds no samples"),
    ([data(), torch.zeros(0, 6)], "batch 2 holds no samples"),
    ([data().numpy()], "batch 1 must be a tensor.*found ndarray; use torch.from_numpy"),
    ([[1.0, 2.0]], "batch 1 must be a tensor.*found float"),
    ([()], "batch 1 must be a tensor.*found tuple"),
    ([{"a": 1}], "batch 1 holds no tensor"),
    ([torch.tensor(1.0)], "batch 1 holds no samples"),
    ([data(), nan], "batch 2 holds NaN or inf"),
    (infinite, "batch 1 holds NaN or inf"),
    ([data().to_sparse()], "batch 1 holds a torch.sparse_coo tensor"),
    ([torch.empty(4, 6, device="meta")], "batch 1 holds a meta tensor"),
    ([data(columns=5)], "the model cannot run on the first batch"),
    ([data(), data(columns=5)], "the model cannot run on batch 2"),
]


@pytest.mark.parametrize(("batches", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refused(batches: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        prune(net(), batches, NetTrim(epsilon=0.1), progress=False)


HELDOUT_REFUSED = [case for case in REFUSED[3:] if case[0] is not None and "model" not in case[1]]


@pytest.mark.parametrize(("batches", "message"), HELDOUT_REFUSED, ids=range(len(HELDOUT_REFUSED)))
def test_heldout_is_refused_before_any_layer_is_solved(batches: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NetTrim, "solve", lambda *a, **k: pytest.fail("a layer was solved"))
    with pytest.raises(InvalidInput, match="heldout"):
        prune(net(), data(), NetTrim(epsilon=0.1), heldout=batches, progress=False)


def test_nan_inside_the_network_is_refused() -> None:
    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).log())

    with pytest.raises(InvalidInput, match="batch 1 makes layer 'b' put out NaN or inf"):
        prune(Logarithm(), data(), NetTrim(epsilon=0.1), progress=False)


# --- the same data in every pass ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
def test_a_shuffled_loader_is_read_in_the_order_of_its_data_set(drop_last: bool, tmp_path: Path) -> None:
    samples = TensorDataset(data(), torch.arange(len(data())) % 2)
    shuffled, plain = (DataLoader(samples, batch_size=7, shuffle=shuffle, drop_last=drop_last) for shuffle in (True, False))
    model = net()
    result = prune(model, shuffled, NetTrim(epsilon=0.1), progress=False)
    assert result.certificate == prune(model, plain, NetTrim(epsilon=0.1), progress=False).certificate
    result.save(tmp_path / "r")
    for loader in (shuffled, plain):
        verify(tmp_path / "r", model, loader, progress=False)


def test_a_shuffled_loader_keeps_everything_else_that_it_is() -> None:
    def joined(items: list[Any]) -> Tensor:
        return torch.stack([item[0] for item in items]) + 1

    samples = TensorDataset(data())
    loader = DataLoader(samples, batch_size=10, shuffle=True, collate_fn=joined)
    torch.testing.assert_close(torch.cat(list(Calibration(loader))), data() + 1, rtol=0, atol=0)
    whole = DataLoader(samples, batch_size=None, shuffle=True)
    assert [tuple(batch[0].shape) for batch in whole] == [tuple(batch[0].shape) for batch in Calibration(whole)]


@pytest.mark.parametrize(
    "sampler",
    [
        lambda samples: RandomSampler(samples, replacement=True),
        lambda samples: RandomSampler(samples, num_samples=20),
        lambda samples: SubsetRandomSampler(range(30)),
        lambda samples: WeightedRandomSampler([1.0] * len(samples), 30),
    ],
    ids=["with replacement", "a part", "a subset", "weighted"],
)
def test_other_random_samplers_are_refused(sampler: Any) -> None:
    samples = TensorDataset(data())
    with pytest.raises(InvalidInput, match=r"differs from the one of the first pass.*random sampling.*list\(loader\)"):
        prune(net(), DataLoader(samples, 10, sampler=sampler(samples)), NetTrim(epsilon=0.1), progress=False)


class Noisy(TensorDataset):
    """Random augmentation."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor + torch.randn(tensor.shape) for tensor in super().__getitem__(index))


@pytest.mark.parametrize("shuffle", [False, True])
def test_random_augmentation_is_refused(shuffle: bool) -> None:
    with pytest.raises(InvalidInput, match=r"differs from the one of the first pass.*random augmentation"):
        prune(net(), DataLoader(Noisy(data()), 10, shuffle=shuffle), NetTrim(epsilon=0.1), progress=False)


def test_another_order_inside_one_batch_is_seen_too() -> None:
    tokens = torch.arange(64).reshape(64, 1)  # a sum would not tell
    batches = Calibration(Changing([tokens], [tokens.flip(0)]))
    list(batches)
    with pytest.raises(InvalidInput, match="batch 1 differs"):
        list(batches)


class Changing:
    """Batches whose number or values change from pass to pass."""

    def __init__(self, *passes: list[Tensor]) -> None:
        self.passes = iter(passes)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(next(self.passes))


def test_other_numbers_of_batches_are_refused() -> None:
    x = data()
    for second, message in (
        ([x], "this pass had 1 batches, the first one 2"),
        ([x, x, x], "batch 3 differs"),
        ([x, x + 1], "batch 2 differs"),
    ):
        batches = Calibration(Changing([x, x], second))
        list(batches)
        with pytest.raises(InvalidInput, match=message):
            list(batches)


def test_a_pass_that_is_left_early_fixes_nothing() -> None:
    batches = Calibration(data(600))
    next(iter(batches))
    assert batches.fingerprints is None
    assert len(list(batches)) == 3
    assert batches.fingerprints is not None


# --- small helpers ------------------------------------------------------------------------------------------------------------------


def digest_of(batch: Any) -> str:
    digest = hashlib.sha256()
    update_hash(digest, batch)
    return digest.hexdigest()


def test_hash_tells_values_dtypes_shapes_names_and_settings_apart() -> None:
    x = data()
    batches: list[Any] = [
        x,
        x + 1,
        x.double(),
        x.reshape(20, 12),
        x.bfloat16(),
        {"x": x},
        {"y": x},
        {"x": x, "s": 1},
        {"x": x, "s": 2},
        x > 0,
    ]
    assert len({digest_of(batch) for batch in batches}) == len(batches)
    assert digest_of((x, torch.zeros(40))) == digest_of(x)
    assert digest_of(x.T.contiguous().T) == digest_of(x)


def test_sample_digests_do_not_depend_on_batches() -> None:
    x = data(20)
    assert sample_digests(Calibration(x)) == sample_digests(Calibration([x[:3], (x[3:], None)]))
    assert len(set(sample_digests(Calibration(torch.cat([x, x]))))) == 20


def test_labels() -> None:
    x, y = data(4), torch.tensor([0, 1, 2, 1])
    assert labels((x, y)) is y
    assert labels((x, y.float())) is None
    assert labels(x) is None
    assert samples((x, y)) == 4


def test_a_dimension_of_length_one_is_the_same_for_all_samples() -> None:
    batch = {"bias": torch.zeros(1, 3), "x": data(5)}
    assert samples(batch) == 5 and len(sample_digests(Calibration([batch]))) == 5


def test_check_batch_names_the_batch() -> None:
    with pytest.raises(InvalidInput, match="mine: batch 7"):
        check_batch(np.zeros(3), 7, "mine")
