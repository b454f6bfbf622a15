"""How a command ends: its exit code, a message on standard error and, with ``--json``, one JSON object on standard output in every case."""

from __future__ import annotations

import functools
import json
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TextIO

import typer

from ..progress import NOTHING_KEPT
from ..records import plain
from ..status import CertificateError, NetTrimError, first_line
from ..terminal import Terminal, discard

FAULT = 1
BAD_INPUT = 2
GUARANTEE_NOT_MET = 3
INTERRUPTED = 130
UsageError: Any = typer.BadParameter.__base__
"""Click's, which newer versions of typer bring with them under a name of their own."""

Given = ParamSpec("Given")

_KNOWN = tuple({Path(__file__).parents[1], *(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib"))})
_answer: ContextVar[dict[str, Any]] = ContextVar("answer")


def answer(data: Mapping[str, Any]) -> None:
    """What a command has to say in JSON. It is written when the command ends; with an ``error`` and its ``exit_code`` where it failed."""
    _answer.get().update(plain(data)[0])


def told(command: Callable[Given, None]) -> Callable[Given, None]:
    """Turns errors into messages and exit codes. With ``--json``, what else is printed goes to standard error."""

    @functools.wraps(command)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> None:
        stdout, as_json, data = sys.stdout, bool(kwargs.get("as_json")), dict[str, Any]()
        token = _answer.set(data)
        try:
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                failed = _failure(functools.partial(command, *args, **kwargs))
        finally:
            _answer.reset(token)
        said = data | ({} if failed is None else {"error": failed[0], "exit_code": failed[1]})
        unwritten = _unwritten(_text(said) if as_json else "", stdout)
        failed = failed or unwritten
        if failed is not None:
            Terminal(stderr=True).print(f"error: {failed[0]}", style="bold", highlight=False, markup=False, soft_wrap=True)
            sys.exit(failed[1])

    return run


def _failure(command: Callable[[], None]) -> tuple[str, int] | None:
    """What went wrong, and the exit code that says so; None where nothing did."""
    try:
        command()
    except CertificateError as error:
        return str(error), GUARANTEE_NOT_MET
    except NetTrimError as error:
        return str(error), BAD_INPUT
    except KeyboardInterrupt as stop:  # what was under way has said how far it was, and what is kept
        return f"interrupted {stop}" if str(stop) else f"interrupted: {NOTHING_KEPT}", INTERRUPTED
    except BaseException as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        place = _foreign_place(error)
        if place:
            return f"code of the model or of the data failed: {place}: {said}", BAD_INPUT
        if isinstance(error, (OSError, MemoryError)):
            return f"the system refused what the command needs ({said}); make room, or choose other places", BAD_INPUT
        traceback.print_exc()
        return f"a fault of nettrim itself ({said}); please report the lines above", FAULT
    return None


def _foreign_place(error: BaseException) -> str:
    """Where in code that is neither nettrim's nor an installed package's an error arose; empty where it arose in none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_file() and not any(path.is_relative_to(known) for known in _KNOWN):
            return f"{frame.filename}, line {frame.lineno}, in {frame.name}"
    return ""


def _text(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _unwritten(text: str, stdout: TextIO) -> tuple[str, int] | None:
    """Writes a text, and all that was printed before; what to say where that cannot be. Whoever reads may stop early."""
    try:
        stdout.write(text)
        stdout.flush()
    except OSError as error:
        discard(stdout)
        if not isinstance(error, BrokenPipeError):
            return f"standard output cannot be written to ({error})", BAD_INPUT
    return None


@contextmanager
def usage_told(args: Sequence[str]) -> Iterator[None]:
    """Says in JSON too what is wrong with the arguments, where they ask for it."""
    asked = "--json" in args
    try:
        yield
    except UsageError as error:
        if asked:
            _unwritten(_text({"error": error.format_message(), "exit_code": error.exit_code}), sys.stdout)
        raise
