"""Export to ONNX, checked by onnxruntime before the file is put in its place.

onnx, onnxruntime and onnxscript are optional (``pip install "nettrim[onnx]"``) and imported on first use.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import staging
from ..outputs import Outputs, largest_difference, outputs_of
from ..quiet import quiet, unheard
from ..solvers.reference import MissingExtra
from ..status import InvalidInput, first_line
from .export_common import allowed, check_output, ran, refuse_different, resized, start
from .export_program import traced
from .export_result import Exported

TOLERANCE = 1e-4
"""By how much onnxruntime's outputs may differ, relative to the largest."""
REMARKS = "torch.onnx._internal.exporter._registration"
"""The logger that remarks on operators of packages that are not installed."""


def libraries() -> tuple[ModuleType, ModuleType]:
    """Onnx and onnxruntime. Raises MissingExtra."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise MissingExtra('export to ONNX needs onnx, onnxruntime and onnxscript: pip install "nettrim[onnx]"') from error
    return onnx, onnxruntime


def export_onnx(model: object, example: Any, path: str | Path, force: bool = True) -> Exported:
    """Writes an ONNX file: shapes as the model has them, weights dense with their zeros; see :func:`nettrim.export`."""
    onnx, onnxruntime = libraries()
    place = check_output(path, ".onnx", force=force)
    twin, inputs = start(model, example)
    program, sizes, notes = traced(twin, inputs)
    tolerance, worst = allowed(twin.model, TOLERANCE), 0.0
    try:
        with unheard(), quiet(REMARKS), torch.no_grad():
            made = torch.onnx.export(program, dynamo=True, verbose=False)
        assert made is not None
        proto = made.model_proto
        _without_traces(proto)
        proto.producer_name, proto.producer_version = "nettrim export", torch.__version__
        data = proto.SerializeToString()  # on the disk only when it is whole and checked
        onnx.checker.check_model(data, full_check=True)
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exporter, onnx and onnxruntime each raise kinds of their own
        raise InvalidInput(f"export: no ONNX file could be made of the model ({first_line(error)}); nothing is written") from error
    for samples in sizes:
        batch = resized(inputs, samples)
        wanted = ran(twin, batch)
        found = largest_difference(outputs_of(tuple(wanted.tensors.values())), _run(session, batch))
        refuse_different(found, tolerance, "ONNX", samples)
        worst = max(worst, found)
    with staging.writing(place.parent, [place.name], "export", force=force) as folder:
        (folder / place.name).write_bytes(data)
    return Exported(place, "onnx", (place,), len(data), worst, sizes, len(sizes) > 1, (*notes, *wanted.notes))


def _run(session: Any, batch: Any) -> Outputs:
    """The outputs of an onnxruntime session, in the order of the model's."""
    names = [item.name for item in session.get_inputs()]
    given = {name: batch[name] if isinstance(batch, Mapping) else batch for name in names}
    return outputs_of(tuple(session.run(None, {name: value.numpy() for name, value in given.items()})))


def _without_traces(proto: Any) -> None:
    """Takes out the exporter's notes on where in the source each node came from: they hold paths of this computer."""
    for graph in (proto.graph, *proto.functions):
        for node in graph.node:
            del node.metadata_props[:]
