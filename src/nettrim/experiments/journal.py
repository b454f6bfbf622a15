"""A file of finished pieces of work, one JSON record a line, from which an interrupted experiment continues."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..status import InvalidInput

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
        self.records: dict[str, Record] = dict(self._read()) if resume and path.exists() else {}

    def __enter__(self) -> Journal:
        # through a second file, so that an interruption here loses nothing
        fresh = self.path.with_name(self.path.name + ".part")
        lines = [self.header, *({"key": key, "record": record} for key, record in self.records.items())]
        fresh.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        fresh.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def add(self, key: str, record: Mapping[str, Any]) -> Record:
        """Keeps a record, in the file at once; the record as it will be read back."""
        line = json.dumps({"key": key, "record": record}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        self.records[key] = json.loads(line)["record"]
        return self.records[key]

    def _read(self) -> Iterator[tuple[str, Record]]:
        text = self.path.read_text(encoding="utf-8")
        *lines, rest = text.split("\n")  # what an interruption cut off has no newline behind it
        if not lines:
            if not (json.dumps(self.header) + "\n").startswith(rest):
                raise InvalidInput(f"{self.path} must be a journal of an experiment, found something else: {_REMEDY}")
            return
        for number, line in enumerate(lines):
            try:
                found = json.loads(line)
                if number > 0:
                    key, record = found["key"], found["record"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise InvalidInput(
                    f"{self.path} must hold one JSON record a line, found something else in line {number + 1}: {_REMEDY}"
                ) from error
            if number > 0:
                yield key, record
            elif found != self.header:
                raise InvalidInput(f"{self.path} must belong to a run with {self.header}, found {found}: {_REMEDY}")
        try:
            found = json.loads(rest)
            yield found["key"], found["record"]
        except (json.JSONDecodeError, KeyError, TypeError):  # the run was cut off while writing it
            return
