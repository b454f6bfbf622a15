"""What docs/finetuning.md shows runs, in order, and does what the text says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import nettrim

PAGE = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text(encoding="utf-8")


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:  # smaller than on the page
            small = re.sub(r"range\(\d+\)", "range(3)", block)
            for large, little in (("steps=1000", "steps=40"), ("3000", "600"), ("2000", "400")):
                small = small.replace(large, little)
            exec(compile(small, "docs/finetuning.md", "exec"), names)
            if "tuned" in names:
                certificate = names["tuned"].certificate
                assert certificate.holds and certificate.trained == () and certificate.heldout.samples == 200
    assert names["tuning"].learned == ("0.weight", "0.bias", "4.weight", "4.bias", "6.weight", "6.bias")
    assert nettrim.checkpoint.read_certificate("tuned").method.endswith(", fine-tuned")
    printed = capsys.readouterr().out
    assert "fine-tuned without labels" in printed and "(net" not in printed and "Sequential(" not in printed


def test_the_page_names_what_there_is() -> None:
    for name in set(re.findall(r"nettrim\.(\w+)", PAGE)) - {"verify"}:
        assert hasattr(nettrim, name), name
    assert "learn" in PAGE and "keep_zeros" in PAGE
