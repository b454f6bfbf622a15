"""``verify`` on every single entry of the two JSON files: a change is refused, or the entry is named as one that was not checked."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nettrim
from nettrim import LOBS, CertificateError, InvalidInput, Magnitude, NetTrim

Place = tuple[str | int, ...]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.GRU(9, 4), Last(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)
    ).eval()


class Last(nn.Module):
    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return x[0]


X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
HELDOUT = [(torch.randn(40, 5, generator=torch.Generator().manual_seed(1)), torch.arange(40) % 3)]
RUNS: dict[str, dict[str, Any]] = {
    "tolerance": {"method": NetTrim(epsilon={"0": 0.1, "5": 0.2})},
    "out of reach": {"method": NetTrim(epsilon={"0": 0.5, "5": 1e-4, "7": 0.2})},
    "published": {"method": NetTrim(epsilon=0.1, program="halfspace"), "scheme": "parallel"},
    "penalty": {"method": NetTrim(penalty=0.3), "ignore": ["7"]},
    "budget": {"method": Magnitude(sparsity=0.4), "max_samples": 25, "seed": 4},
    "shared out": {"method": NetTrim(sparsity=0.6, effort="quick"), "allocation": "global"},
    "pattern": {"method": NetTrim(pattern="1:3", effort="quick"), "activations": {"7": "relu"}},
    "error": {"method": LOBS(error=0.1), "scheme": "parallel"},
    "shifted": {"method": NetTrim(epsilon=0.1, correction=0.5)},
}


def leaves(data: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value of a JSON document that holds no others, and every empty list or object."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    if isinstance(data, (dict, list)) and data:
        for key, value in items:
            yield from leaves(value, (*place, key))
    else:
        yield place, data


def others(value: Any) -> list[Any]:
    """Values of the same kind that a reader would take for another statement."""
    if value is None:
        return [0.5, 1]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(0, value - 1) if value else 2]
    if isinstance(value, float):
        return [value * 1.5 + 0.01, value / 2, None]
    if isinstance(value, str):
        return [value + "x", "0"]
    return [[1]] if isinstance(value, list) else [{"x": 1}]


def with_change(data: Any, place: Place, value: Any) -> Any:
    changed = copy.deepcopy(data)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return changed


def named(place: Place, not_checked: tuple[str, ...]) -> bool:
    """Whether the list of what was not checked names this entry or what it belongs to.

    Another ``level`` or ``confidence`` of the held-out statement with the counts and bounds that belong to it is another true statement.
    """
    if place in (("heldout", "level"), ("heldout", "confidence")):
        return True
    words = {re.split(r"[ (]", text)[0] for text in not_checked}
    return any(str(key) in words for key in place)


@pytest.mark.parametrize("name", ["out of reach", "budget"])
def test_every_entry_is_checked_or_named(tmp_path: Path, name: str) -> None:
    try_every_entry(tmp_path, name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_entry_is_checked_or_named_in_every_run(tmp_path: Path, name: str) -> None:
    try_every_entry(tmp_path, name, 3)


def try_every_entry(tmp_path: Path, name: str, changes: int) -> None:
    """Saves a run, and verifies it with each entry changed in up to so many ways."""
    settings = dict(RUNS[name])
    model = net()
    result = nettrim.prune(model, X, settings.pop("method"), heldout=HELDOUT, progress=False, **settings)
    folder = result.save(tmp_path / "result")
    fine = nettrim.verify(folder, model, X, HELDOUT)
    assert fine.not_checked is not None and fine.met == (name != "out of reach")
    (folder / "report.html").unlink()  # it knows the files that it was made from, and would refuse every other
    passed = []
    for file in ("report.json", "certificate.json"):
        written = (folder / file).read_text()
        data = json.loads(written)
        for place, value in leaves(data):
            if named(place, fine.not_checked):
                continue
            for other in [other for other in others(value) if other != value][:changes]:
                (folder / file).write_text(json.dumps(with_change(data, place, other)))
                try:
                    nettrim.verify(folder, model, X, HELDOUT)
                except (CertificateError, InvalidInput):
                    continue
                passed.append((file, place, value, other))
        (folder / file).write_text(written)
    assert not passed, [(file, *place) for file, place, *_ in passed]
