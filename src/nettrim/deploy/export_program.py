"""Export by torch.export: a ``.pt2`` program, checked after it was loaded again."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from .. import staging
from ..capture import Replica
from ..outputs import largest_difference, outputs_of
from ..quiet import unheard
from ..status import InvalidInput, first_line
from .export_common import allowed, batched, check_output, copied, count, ran, refuse_different, resized, start
from .export_result import Exported

TOLERANCE = 1e-5
"""By how much outputs may differ, relative to the largest."""


def export_program(model: object, example: Any, path: str | Path, force: bool = True) -> Exported:
    """Writes a ``.pt2`` program that ``torch.export.load`` reads; see :func:`nettrim.export`."""
    place = check_output(path, ".pt2", force=force)
    twin, inputs = start(model, example)
    program, sizes, notes = traced(twin, inputs)
    tolerance, worst = allowed(twin.model, TOLERANCE), 0.0
    data = io.BytesIO()  # torch's own writer ends the whole process where a disk is full
    with unheard():
        torch.export.save(program, data, extra_files={staging.PRODUCER: "export"})
        data.seek(0)
        loaded = torch.export.load(data).module()
    for samples in sizes:
        batch = resized(inputs, samples)
        given = copied(batch)
        with torch.no_grad():
            made = loaded(**given) if isinstance(given, Mapping) else loaded(given)
        wanted = ran(twin, batch)
        found = largest_difference(wanted, outputs_of(made))
        refuse_different(found, tolerance, ".pt2", samples)
        worst = max(worst, found)
    with staging.writing(place.parent, [place.name], "export", force=force) as folder:
        (folder / place.name).write_bytes(data.getbuffer())
    return Exported(place, "pt2", (place,), data.getbuffer().nbytes, worst, sizes, len(sizes) > 1, (*notes, *wanted.notes))


def traced(twin: Replica, inputs: Any) -> tuple[ExportedProgram, tuple[int, ...], tuple[str, ...]]:
    """The program, the batch sizes that it is to be checked on (more than one where it takes any), and notes.

    Raises InvalidInput where torch.export cannot follow the model.
    """
    samples = count(inputs)
    # seen on the example, because what is no batch can have as many rows as the size that is shown
    along: Any = {key: batched(value, samples) for key, value in inputs.items()} if isinstance(inputs, Mapping) else True
    causes: list[str] = []
    # torch.export takes a size of 0 or 1 for a constant, so that the free size is shown to it as 2; some models need at least 2 samples
    for least in (1, 2, None):
        try:
            program = _program(twin, inputs if least is None else resized(inputs, 2), least, along)
        except Exception as error:  # torch.export raises many kinds; what only the free size caused goes away without it
            causes.append(first_line(error))
            if least is None:
                raise InvalidInput(
                    f"export: torch.export cannot follow the model ({causes[-1]}); take data-dependent branches out of forward"
                ) from error
            continue
        break
    notes: tuple[str, ...] = ()
    if least == 2:
        notes = (f"the batch must hold at least 2 samples ({causes[0]})",)
    elif least is None:
        notes = (f"the batch size is fixed at {samples}: torch.export does not take the model with any other ({causes[0]})",)
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of the computer that it was made on
    if least is None:
        return program, (samples,), notes
    shown = max(samples, least)
    return program, tuple(dict.fromkeys((shown, shown + 1, least))), notes


def _program(twin: Replica, inputs: Any, least: int | None, along: Any) -> ExportedProgram:
    """The program, for at least so many samples; ``along`` tells which inputs hold one entry for each."""
    positional, named = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), None)
    shapes: Any = None
    if least is not None:
        dim = Dim("batch", min=least)
        shapes = ({0: dim},)
        if named is not None:
            shapes = {key: {0: dim} if along[key] else None for key in named}
    with torch.no_grad(), unheard(), _named(twin.model, named or ()):
        return torch.export.export(twin.model, positional, named, dynamic_shapes=shapes)


@contextmanager
def _named(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """While it stands, forward takes by these names what it takes as ``**kwargs``: torch.export gives a size to named inputs alone."""
    forward, own = model.forward, vars(model).get("forward")
    takes = inspect.signature(forward).parameters.values()
    if all(item.kind is not item.VAR_KEYWORD for item in takes) or not all(name.isidentifier() for name in names):
        yield
        return

    def named(**given: Any) -> Any:
        return forward(**given)

    named.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    model.forward = named
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own
