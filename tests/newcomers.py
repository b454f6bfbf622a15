"""Small models of the kinds that people bring, with data and a loss for each: what a user's own training, saving and loading meets.

``NEWCOMERS`` holds them by kind, :func:`trained` gives one that was trained for a moment, the same in every process. Their batches carry
labels as a user's loader does; :func:`call` says how a model is called, :func:`loss` what its training makes small.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 32
TRAINING, HELDOUT = 96, 40


class Tabular(nn.Module):
    """Linear layers with batch-norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x))


class Functional(nn.Module):
    """A CNN whose activations and poolings are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(8 * 2 * 2, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return cast(Tensor, self.fc2(F.relu(self.fc1(x.view(x.size(0), -1)))))


class Series(nn.Module):
    """A 1D CNN with batch-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(3, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
        )  # fmt: skip
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.features(x).squeeze(-1)))


class Recurrent(nn.Module):
    """A GRU, which is not pruned, with a head of Linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 12, batch_first=True)
        self.head = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.gru(x.transpose(1, 2))[0][:, -1]))


class Memory(nn.Module):
    """An LSTM with one Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(3, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, (h, _) = self.lstm(x.transpose(1, 2))
        return cast(Tensor, self.fc(h[-1]))


class Block(nn.Module):
    """A transformer block written by hand."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.h = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.up, self.down, self.act = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        z = self.n1(x)
        q, k, v = (m(z).view(B, T, self.h, D // self.h).transpose(1, 2) for m in (self.q, self.k, self.v))
        a = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(D // self.h), -1)
        x = x + self.o((a @ v).transpose(1, 2).reshape(B, T, D))
        return cast(Tensor, x + self.down(self.act(self.up(self.n2(x)))))


class Transformer(nn.Module):
    """Tokens, learned positions, blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(12, 16), nn.Parameter(torch.zeros(1, 8, 16))
        self.blocks = nn.ModuleList([Block(16, 2)])
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.emb(tokens) + self.pos[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(self.norm(x).mean(1)))


class Double(nn.Sequential):
    """Two convolutions with batch-norm and ReLU in place."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(
            nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
            nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet(nn.Module):
    """Skip connections and a transposed convolution; one output for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.pool = Double(1, 4), Double(4, 8), nn.MaxPool2d(2)
        self.up, self.joined, self.out = nn.ConvTranspose2d(8, 4, 2, stride=2), Double(8, 4), nn.Conv2d(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down(x)
        return cast(Tensor, self.out(self.joined(torch.cat([self.up(self.middle(self.pool(a))), a], 1))))


class TwoInputs(nn.Module):
    """Two inputs by keyword, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU())
        self.b = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.trunk, self.cls, self.reg = nn.Sequential(nn.Linear(16, 12), nn.ReLU()), nn.Linear(12, 3), nn.Linear(12, 1)

    def forward(self, numeric: Tensor, context: Tensor) -> dict[str, Tensor]:
        z = self.trunk(torch.cat([self.a(numeric), self.b(context)], -1))
        return {"logits": self.cls(z), "value": self.reg(z)}


class Wrapper(nn.Module):
    """A wrapper whose forward takes keywords, and puts out the loss too when labels are among them."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.loss = Tabular(), nn.CrossEntropyLoss()

    def forward(self, **kwargs: Tensor) -> dict[str, Tensor]:
        logits = self.model(kwargs["x"])
        out = {"logits": logits}
        if kwargs.get("labels") is not None:
            out["loss"] = self.loss(logits, kwargs["labels"])
        return out


def _rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 10, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long() + (x[:, 1] + x[:, 2] > 0.3).long()


def _pictures(n: int, seed: int) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % 3
    x = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    x[torch.arange(n), 0, 2 * y + 1] += 2
    return x, y


def _waves(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    phase = 6.28 * torch.rand(n, 3, 1, generator=generator)
    x = torch.sin(6.28 * (y + 1)[:, None, None] * torch.linspace(0, 1, 24) + phase)
    return x + 0.3 * torch.randn(n, 3, 24, generator=generator), y


def _tokens(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(0, 12, (n, 8), generator=torch.Generator().manual_seed(seed))
    return x, ((x < 6).sum(1) // 3).clamp(max=2)


def _masks(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = F.interpolate((torch.rand(n, 1, 3, 3, generator=generator) > 0.5).float(), size=12)
    return y + 0.5 * torch.randn(y.shape, generator=generator), y


def _pairs(n: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(n, 6, generator=generator), torch.randn(n, 4, generator=generator)
    return {"numeric": a, "context": b}, (a[:, 0] + b[:, 0] > 0).long() + (a[:, 1] > 0.5).long()


def _keywords(n: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    x, y = _rows(n, seed)
    return {"x": x}, y


@dataclass(frozen=True)
class Newcomer:
    """A kind of model: how it and its data are made, and how long it trains."""

    make: Callable[[], nn.Module]
    data: Callable[[int, int], tuple[Any, Tensor]]
    epochs: int = 4

    def batches(self, count: int = TRAINING, seed: int = 0) -> list[tuple[Any, Tensor]]:
        """(inputs, labels) batches, the same in every pass."""
        x, y = self.data(count, seed)
        parts = [slice(i, i + BATCH) for i in range(0, count, BATCH)]
        return [({k: v[part] for k, v in x.items()} if isinstance(x, dict) else x[part], y[part]) for part in parts]

    def heldout(self) -> list[tuple[Any, Tensor]]:
        """Batches of the same kind that nothing was trained on."""
        return self.batches(HELDOUT, 1)


NEWCOMERS = {
    "tabular": Newcomer(Tabular, _rows),
    "functional": Newcomer(Functional, _pictures),
    "series": Newcomer(Series, _waves),
    "gru": Newcomer(Recurrent, _waves),
    "lstm": Newcomer(Memory, _waves),
    "transformer": Newcomer(Transformer, _tokens),
    "unet": Newcomer(UNet, _masks, epochs=2),
    "two inputs": Newcomer(TwoInputs, _pairs),
    "wrapper": Newcomer(Wrapper, _keywords),
}


def call(model: nn.Module, x: Any) -> Any:
    """What a model puts out for the inputs of a batch: by keyword where they have names."""
    return model(**x) if isinstance(x, dict) else model(x)


def logits(output: Any) -> Tensor:
    """The scores among a model's outputs."""
    return cast(Tensor, output["logits"] if isinstance(output, dict) else output)


def loss(model: nn.Module, x: Any, y: Tensor) -> Tensor:
    """What a user's training makes small."""
    found = logits(call(model, x))
    return F.binary_cross_entropy_with_logits(found, y) if y.is_floating_point() else F.cross_entropy(found, y)


def train(
    model: nn.Module, batches: list[tuple[Any, Tensor]], optimizer: torch.optim.Optimizer, epochs: int = 1, mode: bool = True
) -> None:
    """An ordinary training loop."""
    for _ in range(epochs):
        model.train(mode)
        for x, y in batches:
            optimizer.zero_grad()
            loss(model, x, y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


@cache
def _trained(name: str) -> nn.Module:
    newcomer = NEWCOMERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = newcomer.make()
        train(model, newcomer.batches(), torch.optim.Adam(model.parameters(), 1e-2), newcomer.epochs)
    return model.eval()


def trained(name: str) -> nn.Module:
    """A trained model of that kind, a fresh copy for each caller, in eval mode."""
    return copy.deepcopy(_trained(name))
