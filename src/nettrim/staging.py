"""What nettrim writes: whole or not at all, and never in the place of an input or of a file that it did not write itself.

Files are written into a hidden folder beside their place and flushed to the disk. One rename then makes that folder ``.nettrim-commit``:
before it nothing has happened, after it everything has. The files are moved out of it one after the other, and whoever comes next finishes
that where it was interrupted (:func:`settle`), so that no reader sees a part of one result beside a part of another.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from safetensors import SafetensorError, safe_open

from .status import InvalidInput

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed: that is the lock
    fcntl = None  # type: ignore[assignment]

PREFIX, COMMIT, LOCK = ".saving-", ".nettrim-commit", ".lock"
PRODUCER = "nettrim"
HEAD = 4096  # bytes at the beginning of a file in which its mark stands

# By what is written: what may be replaced because it continues or renews its own work, and what only where the user says so (force).
_FREELY: dict[str, frozenset[str]] = {
    "bench": frozenset({"bench", "page"}),  # its section of the page
    "comparison": frozenset({"comparison"}),
    "demo": frozenset({"demo", "page"}),
    "experiment": frozenset({"experiment"}),
    "export": frozenset(),
    "journal": frozenset({"journal"}),
    "page": frozenset({"page"}),
    "result": frozenset(),
    "weights": frozenset(),
}
_FORCED: dict[str, frozenset[str]] = {
    "demo": frozenset({"result"}),
    "export": frozenset({"export"}),
    "result": frozenset({"result", "demo", "page"}),
    "weights": frozenset({"weights"}),
}
_TEXT = {
    ".json": rb'\A\{\s*"producer": "nettrim",\s*"kind": "([a-z]+)"',
    ".html": rb'<meta name="generator" content="nettrim ([a-z]+)">',
    ".svg": rb"nettrim ([a-z]+)</dc:title>",
    ".png": rb"tEXtSoftware\x00nettrim ([a-z]+)",
    ".c": rb"\A/\* [^\n]*written by nettrim ([a-z]+)\.",
    ".onnx": rb"\A\x08[\x00-\x7f]\x12.nettrim ([a-z]+)",
}
_TEXT |= {".jsonl": _TEXT[".json"], ".h": _TEXT[".c"]}


def mark(kind: str) -> dict[str, str]:
    """The first entries of a JSON object that nettrim writes, and of a safetensors file's metadata."""
    return {"producer": PRODUCER, "kind": kind}


def kind_of(path: Path) -> str | None:
    """What nettrim wrote this file as (``"result"``, ``"bench"``, ...); None for a file of somebody else, or one that cannot be read."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
            earlier = "result" if "added_biases" in metadata else "weights"  # of versions that did not write the kind
            return metadata.get("kind", earlier) if metadata.get("producer") == PRODUCER else None
        if path.suffix == ".pt2":
            with zipfile.ZipFile(path) as archive:
                marks = (f"/extra/{PRODUCER}", f"extra_files/{PRODUCER}")
                return "export" if any(name.endswith(marks) for name in archive.namelist()) else None
        with path.open("rb") as opened:
            found = re.search(_TEXT[path.suffix], opened.read(HEAD), re.DOTALL) if path.suffix in _TEXT else None
        return None if found is None else found[1].decode("ascii")
    except (OSError, SafetensorError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return None


def place_of(path: object, what: str) -> Path:
    """A path that the user gave. Raises InvalidInput for what is none; the message begins with ``what``."""
    if isinstance(path, (str, os.PathLike)):
        return Path(path)
    saved = "; save it first, with its save(folder), and give that folder" if callable(getattr(path, "save", None)) else ""
    raise InvalidInput(f"{what} must be a path, found {type(path).__name__}{saved}")


def check_writable(folder: str | Path) -> Path:
    """Refuses an output folder that cannot be written to, before any work is done; creates it when it is missing.

    Raises:
        InvalidInput: the folder is a file, or it or its parent cannot be written to.
    """
    path = place_of(folder, "output folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise InvalidInput(f"output folder {path}: it must be a folder that can be written to ({said}); choose another") from error
    return path


def check(files: Iterable[Path], kind: str, *, force: bool = False, inputs: Iterable[str | Path | None] = (), own: bool = False) -> None:
    """Refuses outputs that would take the place of an input, or of a file that is not nettrim's or not to be replaced.

    Args:
        files: where something is to be written.
        kind: what is to be written.
        force: the user wants an earlier one of that kind replaced. Inputs and files of others are refused all the same.
        inputs: files that are read, by whatever name: links and hard links count as the file that they lead to.
        own: the caller has read the files and found them to be its own, whatever their marks say.

    Raises:
        InvalidInput: the message names the file, and what to do.
    """
    read = [Path(given) for given in inputs if given is not None]
    for file in files:
        used = next((given for given in read if _same(file, given)), None)
        if used is not None:
            raise InvalidInput(f"output {file}: it is the input {used}, which must stay as it is; choose another place for the output")
        if file.is_symlink():
            raise InvalidInput(f"output {file}: a link stands there, which nettrim does not replace; remove it, or choose another place")
        if file.is_dir():
            raise InvalidInput(f"output {file}: it is a folder; choose another place")
        if own or not file.exists():
            continue
        found = kind_of(file)
        if found in _FREELY[kind]:
            continue
        if found is None or found not in _FORCED.get(kind, ()):
            whose = "nettrim did not write it" if found is None else f"it is no {kind}, but was written by nettrim as {found}"
            raise InvalidInput(f"output {file}: there is such a file, and {whose}; choose another place, or move it away")
        if not force:
            raise InvalidInput(
                f"output {file}: an earlier {found} of nettrim is there; choose another place, "
                "or replace it with --force (in Python force=True)"
            )


def _same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, through links of either kind."""
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):  # one of them is not there
        return os.path.realpath(one) == os.path.realpath(other)


@contextmanager
def writing(
    folder: str | Path,
    names: Sequence[str],
    kind: str,
    *,
    force: bool = False,
    inputs: Iterable[str | Path | None] = (),
    own: bool = False,
) -> Iterator[Path]:
    """Gives a hidden folder; what ``names`` names in it when the block ends well appears in ``folder``, all of it or nothing.

    Raises:
        InvalidInput: what :func:`check` refuses, or the files could not be written.
    """
    path, read = check_writable(folder), list(inputs)
    settle(path)
    check([path / name for name in names], kind, force=force, inputs=read, own=own)
    try:
        hidden, lock = _hidden(path.absolute())
    except OSError as error:
        raise InvalidInput(f"output folder {path}: it cannot be written to ({error}); choose another") from error
    try:
        yield hidden
        check([path / name for name in names], kind, force=force, inputs=read, own=own)
        _commit(hidden, path, names)
    except (OSError, SafetensorError) as error:
        raise InvalidInput(f"output folder {path}: nothing could be written ({error}); earlier files are as they were") from error
    finally:
        lock.close()
        shutil.rmtree(hidden, ignore_errors=True)


def _hidden(folder: Path) -> tuple[Path, IO[bytes]]:
    """A new hidden folder, and its lock: whoever cleans up leaves it alone while this process lives."""
    for last in (False, False, True):
        made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        try:
            lock = (made / LOCK).open("wb")
        except FileNotFoundError:  # cleaned away before it was locked
            if last:
                raise
            continue
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return made, lock
    raise AssertionError("unreachable")


def _commit(hidden: Path, folder: Path, names: Sequence[str]) -> None:
    """Moves the named files into ``folder``: one by a rename, several by the rename of their folder."""
    for name in names:
        _flush(hidden / name)
    if len(names) == 1:
        os.replace(hidden / names[0], folder / names[0])
        _flush(folder)
        return
    for other in set(os.listdir(hidden)) - {*names, LOCK}:
        _remove(hidden / other)
    _flush(hidden)
    try:
        os.replace(hidden, folder / COMMIT)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        settle(folder)  # another process has committed meanwhile: first it, then this
        os.replace(hidden, folder / COMMIT)
    try:
        _flush(folder)
        _forward(folder)
    except OSError as error:
        raise InvalidInput(
            f"output folder {folder}: the files are complete in {COMMIT} and could not be moved ({error}); "
            "what reads the folder next moves them, once they can be"
        ) from error
    except KeyboardInterrupt as stop:  # it is there already, so it is made whole
        with suppress(OSError):
            _forward(folder)
        raise KeyboardInterrupt(f"while files were moved into {folder}: {', '.join(names)} are there, whole") from stop


def _forward(folder: Path) -> None:
    """Moves what was committed into its place. May be repeated, and done by two at once."""
    commit = folder / COMMIT
    try:
        names = sorted(entry.name for entry in os.scandir(commit) if entry.is_file(follow_symlinks=False) and entry.name != LOCK)
    except FileNotFoundError:
        return
    for name in names:
        place = folder / name
        if place.is_symlink() or place.is_dir() or (place.exists() and kind_of(place) is None):
            raise InvalidInput(
                f"{place}: an interrupted save is complete in {commit}, and this file, which nettrim did not write, is in its way; "
                f"move it away, or remove {commit}"
            )
    for name in names:
        with suppress(FileNotFoundError):  # another process was faster
            os.replace(commit / name, folder / name)
    _flush(folder)
    _remove(commit)


def settle(folder: str | Path) -> None:
    """Finishes a write that was interrupted after it was committed, and clears away those that were interrupted before.

    Where the folder cannot be written to, everything stays, and :func:`find` looks at what was committed.

    Raises:
        InvalidInput: a file of somebody else is in the way of what was committed.
    """
    path = Path(folder)
    try:
        entries = [entry for entry in os.scandir(path) if entry.name.startswith((PREFIX, COMMIT)) and entry.is_dir(follow_symlinks=False)]
    except (OSError, ValueError):
        return
    for entry in entries:
        if entry.name == COMMIT:
            with suppress(OSError):
                _forward(path)
        elif entry.name.startswith(PREFIX):
            _discard(Path(entry.path))


def _discard(hidden: Path) -> None:
    """Removes a hidden folder of ours that no process holds any more."""
    with suppress(OSError):
        hidden.rmdir()  # of one that was killed before it had a lock
        return
    with suppress(OSError), (hidden / LOCK).open("rb+") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(hidden, ignore_errors=True)
    if fcntl is None:
        with suppress(OSError):
            (hidden / LOCK).unlink()
            shutil.rmtree(hidden, ignore_errors=True)


def find(folder: str | Path, name: str) -> Path:
    """Where a file of a folder is to be read, after :func:`settle`."""
    settle(folder)
    committed = Path(folder) / COMMIT / name
    return committed if committed.is_file() else Path(folder) / name


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def _flush(path: Path) -> None:
    """Has the disk hold what was written of a file or of a folder's entries."""
    if path.is_dir() and os.name == "nt":
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems flush no folders
            raise
    finally:
        os.close(number)
