"""Export to C99 for computers without Python, such as microcontrollers: a source file and its header, compiled and run to check."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import staging
from ..outputs import Outputs, largest_difference
from ..status import InvalidInput
from . import c_check
from .c_read import plan_of
from .c_source import source_of
from .export_common import check_output, ran, refuse_different, start
from .export_result import Exported

TOLERANCE = 1e-5
"""By how much the C function's outputs may differ, relative to the largest."""

TAKEN = frozenset(
    (
        "assert",
        "complex",
        "ctype",
        "errno",
        "fenv",
        "float",
        "inttypes",
        "iso646",
        "limits",
        "locale",
        "math",
        "setjmp",
        "signal",
        "stdarg",
        "stdbool",
        "stddef",
        "stdint",
        "stdio",
        "stdlib",
        "string",
        "tgmath",
        "time",
        "wchar",
        "wctype",
    )
)
"""Headers of C itself, which a network's own must not hide."""


def check_name(place: Path) -> str:
    """The name of the C function, by the file's. Raises InvalidInput for one that C does not take."""
    name = place.stem
    if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) or name in TAKEN:
        raise InvalidInput(
            f"export: the C function is named by the file, and {name!r} cannot be its name; "
            "use letters, digits and underscores, as in network.c"
        )
    if place.with_suffix(".h").is_dir():
        raise InvalidInput(f"export: the header {str(place.with_suffix('.h'))!r} is a folder; choose another name")
    return name


def export_c(model: object, example: Any, path: str | Path, force: bool = True) -> Exported:
    """Writes ``path`` and the header beside it; the function is ``<stem>_run``; see :func:`nettrim.export`."""
    place = check_output(path, ".c", force=force)
    name = check_name(place)
    compiler = c_check.compiler()
    twin, inputs = start(model, example)
    kinds = {parameter.dtype for parameter in twin.model.parameters() if parameter.is_floating_point()}
    notes = [f"the model's {kind} became float32" for kind in sorted(map(str, kinds)) if kind != "torch.float32"]
    twin.model.float()
    inputs = {key: _float(value) for key, value in inputs.items()} if isinstance(inputs, Mapping) else _float(inputs)
    plan = plan_of(twin, inputs)
    made = source_of(plan, name)
    header = place.with_suffix(".h")
    found, sizes, samples = None, made.sizes, 0
    with staging.writing(place.parent, [header.name, place.name], "export", force=force) as folder:
        (folder / header.name).write_text(made.header, encoding="ascii")
        (folder / place.name).write_text(made.source, encoding="ascii")
        if compiler is None:
            notes.append("no C compiler was found (cc, gcc or clang): the file was not run, and its code not measured")
        else:
            (wanted,) = ran(twin, inputs).tensors.values()  # C takes a model with one output
            given = next(v for v in inputs.values() if isinstance(v, Tensor)) if isinstance(inputs, Mapping) else inputs
            samples = len(given)
            made_by_c = c_check.run(folder, name, given)
            found = largest_difference(Outputs({"": wanted.reshape(samples, -1)}), Outputs({"": made_by_c}))
            refuse_different(found, TOLERANCE, "C", samples)
            sizes = replace(sizes, code=c_check.code_bytes(folder, name))
        size = sum((folder / file).stat().st_size for file in (header.name, place.name))
    checked = (samples,) if samples else ()
    return Exported(place, "c", (place, header), size, found, checked, False, tuple(notes), sizes)


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
