"""The whole way of a new user: prune, save, verify, load, train with labels, recertify, compact, accelerate, export; and no crash on it."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from newcomers import NEWCOMERS, Newcomer, call, logits, loss, trained
from torch import nn

import nettrim

CRASHES = ("Traceback", "Error", "Exception", "Warning", "[E", "[W", "failed")


def clear(said: str) -> bool:
    """Whether nothing on the terminal could be taken for a crash."""
    return not any(word in said for word in CRASHES)


def agrees(one: nn.Module, other: nn.Module, x: Any, allowed: float) -> bool:
    with torch.no_grad():
        Y, X = logits(call(one.eval(), x)), logits(call(other.eval(), x))
    return float((X - Y).abs().max()) <= allowed * float(Y.abs().max())


def pruned_and_saved(newcomer: Newcomer, model: nn.Module, folder: Path) -> nettrim.PruneResult:
    result = nettrim.prune(model, newcomer.batches(), sparsity=0.5, heldout=newcomer.heldout())
    assert result.certificate.holds and result.report.density == pytest.approx(0.5, abs=0.02)
    text = str(result)
    assert len(text.splitlines()) == 5 and "holds" in text
    result.save(folder)
    again = nettrim.verify(folder, model, newcomer.batches(), newcomer.heldout())
    assert again.holds and again.heldout is not None and again.heldout.samples == 40
    loaded = nettrim.load(folder, newcomer.make())
    x = newcomer.batches()[0][0]
    assert agrees(result.model, loaded, x, 0.0)
    return result


def trained_again(newcomer: Newcomer, model: nn.Module, result: nettrim.PruneResult, folder: Path) -> nettrim.PruneResult:
    with nettrim.finetuning(result) as tuning:
        optimizer = torch.optim.Adam(tuning.parameters(), 1e-3)
        tuning.model.train()
        for x, y in newcomer.batches():
            optimizer.zero_grad()
            loss(tuning.model, x, y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    tuned = nettrim.recertify(result, tuning.model, model, newcomer.batches(), heldout=newcomer.heldout())
    assert tuned.certificate.holds and not tuned.certificate.trained
    assert tuned.report.nonzeros <= result.report.nonzeros
    tuned.save(folder)
    assert nettrim.verify(folder, model, newcomer.batches(), newcomer.heldout()).holds
    return tuned


def deployed(newcomer: Newcomer, model: nn.Module, folder: Path) -> None:
    batch = newcomer.batches()[0]
    x = batch[0]
    small = nettrim.compact(model, batch)
    assert agrees(model, small.model, x, 1e-5) and str(small)
    fast = nettrim.accelerate(model, batch)
    assert agrees(model, fast.model, x, 1e-4) and str(fast)
    made = nettrim.export(model, batch, folder / "model.onnx")
    assert made.path.exists() and str(made)


@pytest.mark.parametrize("name", NEWCOMERS)
def test_the_whole_way(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    newcomer, model = NEWCOMERS[name], trained(name)
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        result = pruned_and_saved(newcomer, model, tmp_path / "pruned")
        tuned = trained_again(newcomer, model, result, tmp_path / "tuned")
        deployed(newcomer, tuned.model, tmp_path)
    said = capfd.readouterr()
    assert clear(said.out) and clear(said.err), said
    assert not caplog.records, caplog.records
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())  # the user's model is left as it was
