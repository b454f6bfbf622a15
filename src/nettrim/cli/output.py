"""What commands show, and the exit codes with which they end."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .. import checkpoint, render
from ..certificate import Certificate
from ..report import PruneReport
from ..status import CertificateError, NetTrimError, Status

GUARANTEE_NOT_MET = 3
BAD_INPUT = 2
INTERRUPTED = 130

Given = ParamSpec("Given")


def told(command: Callable[Given, None]) -> Callable[Given, None]:
    """Turns errors into messages and exit codes."""

    @functools.wraps(command)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except CertificateError as error:
            fail(str(error), GUARANTEE_NOT_MET)
        except NetTrimError as error:
            fail(str(error), BAD_INPUT)
        except KeyboardInterrupt:
            fail("interrupted; earlier output is as it was", INTERRUPTED)

    return run


def fail(message: str, code: int) -> NoReturn:
    """Ends the command with a message on standard error."""
    Console(stderr=True).print(f"error: {message}", style="bold", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)


def exit_unless_met(report: PruneReport, certificate: Certificate) -> None:
    """A tolerance that was out of reach or a number that does not hold ends with exit code 3."""
    missed = [layer.name for layer in report.layers if layer.status is Status.INFEASIBLE]
    if missed:
        fail(
            f"guarantee not met: the tolerance is out of reach for {', '.join(missed)} (the best reachable distance was used)",
            GUARANTEE_NOT_MET,
        )
    if not certificate.holds:
        fail("guarantee not met: the certificate does not hold", GUARANTEE_NOT_MET)


def show(report: PruneReport, certificate: Certificate, folder: Path, as_json: bool, *, bench: Mapping[str, Any] | None = None) -> None:
    """A result: tables and the verdict, or one JSON object, which also holds what was measured of it (``bench``)."""
    if as_json:
        data = {"output": str(folder), "report": report.to_dict(), "certificate": certificate.to_dict(), "size": size_of(folder)}
        print_json(data | ({} if bench is None else {"bench": bench}))
        return
    console = Console()
    console.print(render.report_table(report))
    console.print(render.certificate_table(certificate))
    console.print(render.certificate_words(certificate)[0], highlight=False, markup=False)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(size_words(folder), highlight=False, markup=False)
    page = folder / checkpoint.PAGE
    if page.is_file():
        console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)


def size_of(folder: Path) -> dict[str, Any] | None:
    """How large the weights of a saved folder are (`checkpoint.WeightsSize`); None where it holds none."""
    file = folder / checkpoint.MODEL
    return checkpoint.weights_size(file).to_dict() if file.is_file() else None


def size_words(folder: Path) -> str:
    """Sizes on disk, in one line."""
    size = size_of(folder)
    if size is None:
        return f"weights: {checkpoint.MODEL} is not in this folder"
    packed = f"; {size['packed']} of {size['tensors']} tensors packed" if size["packed"] else ""
    return f"weights: {size['stored_bytes']:,} bytes on disk, {size['dense_bytes']:,} dense ({size['ratio']:.1%}{packed})"


def show_wide(table: Table) -> Console:
    """Prints a table whole: without its numbers it says nothing; lines may run over a narrow terminal."""
    console = Console()
    console.width = max(console.width, Measurement.get(console, console.options.update(max_width=10_000), table).maximum)
    console.print(table)
    return console


def print_json(data: Mapping[str, Any]) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(data, indent=1, allow_nan=False) + "\n")
