"""The files of a bench: bench.json, and the section of the report's page where the folder holds a saved result."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .. import checkpoint, staging
from ..deploy.bench_result import Bench
from ..records import plain, read_json
from ..status import InvalidInput
from .page import page_with_bench, report_html

BENCH = "bench.json"


def check_folder(folder: str | Path, weights_hash: str, inputs: Iterable[str | Path | None] = ()) -> Path:
    """Refuses a folder that cannot be written to, that holds the result of another network, or files of others under the names that are
    written, before any work. Raises InvalidInput."""
    path = staging.check_writable(folder)
    staging.settle(path)
    read = checkpoint.files_of(inputs)
    staging.check([path / BENCH], "bench", inputs=read)
    if (path / checkpoint.CERTIFICATE).is_file():
        staging.check([path / checkpoint.PAGE], "page", inputs=read)
    if (path / checkpoint.CERTIFICATE).is_file() and checkpoint.read_certificate(path).weights_hash != weights_hash:
        raise InvalidInput(
            f"output folder {path}: it holds the result of a network with other weights than the one to measure; "
            "give the folder of the weights, or one without a result"
        )
    return path


def read_bench(folder: str | Path) -> tuple[Bench | None, str]:
    """The bench of a folder, and a note where there is one that does not count: it was measured on other weights than those certified.

    Raises:
        InvalidInput: bench.json or the certificate is damaged.
    """
    path = staging.find(folder, BENCH)
    if not path.is_file():
        return None, ""
    bench = read_json(path, Bench.from_dict, "measure it again with nettrim bench")
    certified = staging.find(folder, checkpoint.CERTIFICATE).is_file()
    if certified and checkpoint.read_certificate(folder).weights_hash != bench.weights_hash:
        return None, f"{BENCH} was measured on other weights than these and is not shown; measure again with nettrim bench"
    return bench, ""


def write(bench: Bench, folder: str | Path) -> list[Path]:
    """Writes bench.json, and report.html anew where the folder holds a saved result; returns what was written.

    A page keeps what it shows beside (the comparison of a demonstration, say); one that is missing, or was written before pages had a
    place for this section, is made from the result. Raises InvalidInput.
    """
    path = check_folder(folder, bench.weights_hash)
    made = {BENCH: json.dumps(staging.mark("bench") | plain(bench.to_dict())[0], indent=1, allow_nan=False) + "\n"}
    if (path / checkpoint.CERTIFICATE).is_file():
        made[checkpoint.PAGE] = _page(path, bench)
    with staging.writing(path, list(made), "bench") as hidden:
        for name, text in made.items():
            (hidden / name).write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
    return [path / name for name in made]


def _page(path: Path, bench: Bench) -> str:
    page = path / checkpoint.PAGE
    shown = page_with_bench(page.read_text(encoding="utf-8", errors="replace"), bench) if page.is_file() else None
    if shown is not None:
        return shown
    report, certificate = checkpoint.read_report(path), checkpoint.read_certificate(path)
    state = checkpoint.read_weights(path / checkpoint.MODEL)
    masks = {layer.name: (checkpoint.weight_of(state, layer.name) != 0).numpy() for layer in report.layers}
    return report_html(report, certificate, masks, bench=bench, files=checkpoint.file_hashes(path))
