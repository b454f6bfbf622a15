"""What commands show of a result."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import checkpoint, render
from ..certificate import Certificate
from ..report import PruneReport
from ..sources import carries_weights
from ..status import CertificateError
from ..summary import result_text
from ..terminal import Terminal
from .ending import answer


def exit_unless_met(certificate: Certificate) -> None:
    """Anything but the verdict "holds" ends with exit code 3. Raises CertificateError."""
    if not certificate.holds:
        raise CertificateError(f"guarantee {certificate.verdict_words()}")


def show(
    report: PruneReport,
    certificate: Certificate,
    folder: Path,
    as_json: bool,
    *,
    bench: Mapping[str, Any] | None = None,
    following: str,
) -> None:
    """A result: tables, notes and the five lines, of which ``following`` is the last; or one JSON object, which also holds what was
    measured of it (``bench``)."""
    if as_json:
        data = {"output": str(folder), "report": report.to_dict(), "certificate": certificate.to_dict(), "size": size_of(folder)}
        answer(data | ({} if bench is None else {"bench": bench}))
        return
    console = Terminal()
    console.print(render.report_table(report))
    console.print(render.certificate_table(certificate))
    notes = [*report.notes, *(f"{layer.name}: {text}" for layer in report.layers for text in render.layer_remarks(layer))]
    for line in (*(f"note: {note}" for note in notes), size_words(folder)):
        console.print(line, highlight=False, markup=False)
    page = folder / checkpoint.PAGE
    if page.is_file():
        console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)
    console.print(result_text(report, certificate, following), highlight=False, markup=False, soft_wrap=True)


def next_commands(folder: Path, model: str, weights: Path | None, data: str, heldout: str | None) -> str:
    """The commands that follow a prune, with the names that it was given; without ``weights`` the model's own were pruned."""
    own = [] if weights is None else ["--weights", str(weights)]
    untrained = [] if own or carries_weights(model) else ["--untrained"]
    place = f"./{folder}" if str(folder).startswith("-") else str(folder)  # or it is read as an option
    pruned = [model, "--weights", place]
    lines = (
        ["verify", place, model, *own, *untrained, "--data", data, *([] if heldout is None else ["--heldout", heldout])],
        ["bench", *pruned, *(["--reference", str(weights)] if own else []), "--data", data],
        ["export", *pruned, "--data", data, "--compact", "--output", "model.onnx"],
    )
    return "\n          ".join(shlex.join(["nettrim", *line]) for line in lines)


def size_of(folder: Path) -> dict[str, Any] | None:
    """How large the weights of a saved folder are (`checkpoint.WeightsSize`); None where it holds none."""
    file = folder / checkpoint.MODEL
    return checkpoint.weights_size(file).to_dict() if file.is_file() else None


def size_words(folder: Path) -> str:
    """Sizes on disk, in one line."""
    size = size_of(folder)
    if size is None:
        return f"weights: {checkpoint.MODEL} is not in this folder"
    packed = f"; {size['packed']} of {size['tensors']} tensors packed" if size["packed"] else "; with --compressed zeros take no place"
    return f"weights: {size['stored_bytes']:,} bytes on disk, {size['dense_bytes']:,} dense ({size['ratio']:.1%}{packed})"
