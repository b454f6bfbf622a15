"""A file of finished pieces of work, one JSON record a line, from which an interrupted experiment continues."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from .. import staging
from ..status import InvalidInput

try:
    import fcntl
except ImportError:  # Windows, where an open file is not replaced
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]

_REMEDY = "choose another folder, or resume=False to start afresh"


class Journal:
    """Records by key, kept in ``path`` behind a first line that states the run they belong to.

    ``header`` must hold everything but the keys that the records depend on. An existing file is read with ``resume`` and begun anew
    without. A last line that an interruption left half-written is dropped. Use it as a context manager: the file is open inside.

    Raises:
        InvalidInput: the file belongs to another run, or is not a journal.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, resume: bool = True) -> None:
        self.path = path
        self.header = json.loads(json.dumps(header))  # as it will be read back
        staging.settle(path.parent)
        if not resume:
            staging.check([path], "journal")
        self.records: dict[str, Record] = dict(self._read()) if resume and path.exists() else {}

    def __enter__(self) -> Journal:
        # whole before it takes the other's place, so that an interruption here loses nothing
        lines = [staging.mark("journal") | self.header, *({"key": key, "record": record} for key, record in self.records.items())]
        with ExitStack() as earlier:
            if self.path.exists():  # whoever writes to it would go on writing to what is no longer there
                earlier.enter_context(self._alone())
            with staging.writing(self.path.parent, [self.path.name], "journal", own=True) as hidden:
                (hidden / self.path.name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            self._file = self._alone()
        return self

    def _alone(self) -> FileIO:
        """The file, open, while no other process has it so. Raises InvalidInput where one has."""
        file = self.path.open("ab", buffering=0)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise InvalidInput(f"{self.path}: another process is writing to it; wait for its end, or choose another folder") from error
        except OSError:  # a file system without locks
            pass
        return file

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def add(self, key: str, record: Mapping[str, Any]) -> Record:
        """Keeps a record, in the file at once; the record as it will be read back."""
        try:
            line = json.dumps({"key": key, "record": record}, allow_nan=False)
        except (ValueError, TypeError) as error:
            raise InvalidInput(f"{self.path}: record {key!r} cannot be kept ({error})") from error
        end = os.fstat(self._file.fileno()).st_size
        try:
            left = memoryview(f"{line}\n".encode())
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)
            raise InvalidInput(f"{self.path}: a record could not be written ({error}); free space, and continue there") from error
        self.records[key] = json.loads(line)["record"]
        return self.records[key]

    def _read(self) -> Iterator[tuple[str, Record]]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"{self.path} must be a journal of an experiment, and cannot be read ({error}): {_REMEDY}") from error
        *lines, rest = text.split("\n")  # what an interruption cut off has no newline behind it
        if not lines:
            if not any((json.dumps(header) + "\n").startswith(rest) for header in (self.header, staging.mark("journal") | self.header)):
                raise InvalidInput(f"{self.path} must be a journal of an experiment, found something else: {_REMEDY}")
            return
        for number, line in enumerate(lines):
            if number > 0:
                read = _record(line)
                if read is None:
                    raise InvalidInput(
                        f"{self.path} must hold one JSON record a line, found something else in line {number + 1}: {_REMEDY}"
                    )
                yield read
            else:
                self._check(line)
        last = _record(rest)  # the run was cut off while writing it
        if last is not None:
            yield last

    def _check(self, line: str) -> None:
        """Refuses a first line that states another run."""
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{self.path} must hold one JSON record a line, found something else in line 1: {_REMEDY}") from error
        stated = {key: value for key, value in found.items() if key not in staging.mark("")} if isinstance(found, dict) else found
        if stated != self.header:
            raise InvalidInput(f"{self.path} must belong to a run with {self.header}, found {found}: {_REMEDY}")


def _record(line: str) -> tuple[str, Record] | None:
    """Key and record of a line, None where it holds something else."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("key"), str) or not isinstance(found.get("record"), dict):
        return None
    return found["key"], found["record"]
