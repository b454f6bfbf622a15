"""nettrim.export: a model as a file that other programs run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..progress import Advance, shown
from ..status import InvalidInput
from ..wrappers import takes_models
from .export_c import check_name, export_c
from .export_common import check_output
from .export_onnx import export_onnx
from .export_program import export_program
from .export_result import Exported

FORMATS: dict[str, Callable[[object, Any, Path, bool], Exported]] = {"onnx": export_onnx, "pt2": export_program, "c": export_c}
"""Formats by name, which is also the ending of their files."""


@takes_models("model")
def export(
    model: nn.Module, example: Any, path: str | Path, *, format: str | None = None, force: bool = True, progress: bool | Advance = True
) -> Exported:
    """Writes the model, in eval mode, to a file that other programs run, and checks that file before it is put in its place.

    ``onnx``: ONNX, run by onnxruntime on the example and on other batch sizes, to 1e-4 of the largest output. ``pt2``: a program of
    torch.export, loaded again and run alike, to 1e-5. ``c``: a C99 file and its header without dependencies, for small networks of the
    layers that docs/export.md lists; it is compiled where there is a C compiler and run on the example, to 1e-5. The zeros of a pruned
    model are stored as zeros in the first two; C stores sparse layers by their nonzeros. Use :func:`nettrim.compact` first to be rid of
    what is dead.

    Args:
        model: left unchanged.
        example: a batch on which the model runs: a tensor, a tuple whose first item is the input, or a mapping of keyword inputs.
        path: the file; its folder is made where it is missing. For C, its name also names the function.
        format: "onnx", "pt2" or "c"; by default what the path ends in.
        force: an earlier export is replaced, and refused with ``False``; a file that nettrim did not write is never replaced.
        progress: as for :func:`nettrim.prune`.

    Raises:
        InvalidInput: the model, example, path or format cannot be used, or the file cannot be written; for C also: something in
            the model has no C form.
        MissingExtra: ONNX without onnx, onnxruntime and onnxscript.
        NetTrimError: the file does not compute what the model does; nothing is written.
    """
    chosen = check_target(path, format, force=force)
    with shown(progress) as advance:
        advance(0, 1, f"writing {Path(path).name} and running it")
        return FORMATS[chosen](model, example, Path(path), force)


def check_target(path: str | Path, format: str | None, *, force: bool = False, inputs: Iterable[str | Path | None] = ()) -> str:
    """The format meant; refuses one that is not known, and a place that cannot be written to, before any work. Raises InvalidInput."""
    chosen = Path(path).suffix.removeprefix(".") if format is None else format
    if chosen not in FORMATS:
        raise InvalidInput(f"export: format must be one of {', '.join(FORMATS)}, found {chosen!r}; state it, or let the path end in it")
    if chosen == "c":
        check_name(Path(path))
    check_output(path, f".{chosen}", force=force, inputs=inputs)
    return chosen
