"""Python objects named on the command line: ``package.module:name`` and ``file.py:name``."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .status import InvalidInput

WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def made_by(text: str, what: str) -> Any:
    """What a factory gives: the object of that name, called without arguments where it is a function or a class.

    ``package.module:name`` is imported, also from the current folder; ``file.py:name`` is loaded by its path and may import the files
    beside it, as with ``python file.py``. The search path is as before afterwards.

    Raises:
        InvalidInput: no such file, module or name, or one that fails; the message names what there is.
    """
    place, attribute = factory_named(text, what)
    by_path = place.endswith(".py")
    with _searched(Path(place).resolve().parent if by_path else Path.cwd()):
        module = _loaded(Path(place), text, what) if by_path else _imported(place, text, what)
        return _called(_found(module, place, attribute, text, what), text, what)


def factory_named(text: str, what: str) -> tuple[str, str]:
    """The module or file, and the name in it. Raises InvalidInput, with what to write, for a text of another form; nothing is imported."""
    place, _, attribute = text.rpartition(":")
    if not place or not attribute:
        raise InvalidInput(f"{what} {text!r}: {_instead(text, what)}")
    if not place.endswith(".py") and not all(part.isidentifier() for part in place.split(".")):
        raise InvalidInput(f"{what} {text!r}: {place!r} is no module's name; write package.module:factory or file.py:factory")
    return place, attribute


@contextmanager
def _searched(folder: Path) -> Iterator[None]:
    """The folder comes first where modules are looked for."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with suppress(ValueError):
            sys.path.remove(str(folder))


def _imported(name: str, text: str, what: str) -> ModuleType:
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ImportError as error:
        beside = f"; for the file {name}.py here, write {name}.py:..." if Path(f"{name}.py").is_file() else ""
        raise InvalidInput(f"{what} {text!r}: module {name!r} cannot be imported ({error}){beside}") from error
    except (Exception, SystemExit) as error:  # whatever a user's own code may raise
        raise InvalidInput(f"{what} {text!r}: importing {name!r} failed with {type(error).__name__} ({error})") from error


def _loaded(path: Path, text: str, what: str) -> ModuleType:
    """The module of a file, under the name by which the files beside it import it where that is free."""
    if not path.is_file():
        raise InvalidInput(f"{what} {text!r}: there is no file {path}")
    path = path.resolve()
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path) and module.__name__ != "__main__":
            return module
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        hint = (
            "; a file that imports with a dot belongs to a package: write package.module:factory" if "relative import" in str(error) else ""
        )
        raise InvalidInput(f"{what} {text!r}: {path.name} failed with {type(error).__name__} ({error}){hint}") from error
    return module


def _module_name(path: Path) -> str:
    if path.stem.isidentifier() and path.stem not in sys.modules:
        spec = importlib.util.find_spec(path.stem)  # the file's own folder is searched first
        if spec is not None and spec.origin == str(path):
            return path.stem
    return f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"


def _found(value: Any, place: str, attribute: str, text: str, what: str) -> Any:
    module = value
    for part in attribute.split("."):
        if not hasattr(value, part):
            known = _factories(Path(module.__file__)) if getattr(module, "__file__", None) else []
            known = known or [name for name in dir(value) if not name.startswith("_")]
            raise InvalidInput(f"{what} {text!r}: {place} has no {attribute!r} (it has: {', '.join(known)[:200]})")
        value = getattr(value, part)
    return value


def _called(value: Any, text: str, what: str) -> Any:
    if isinstance(value, nn.Module) or not callable(value):
        return value
    try:
        return value()
    except TypeError as error:
        raise InvalidInput(
            f"{what} {text!r}: the factory must be callable without arguments ({error}); name a function that gives it its arguments, "
            f"such as def make(): return {text.rpartition(':')[2]}(...)"
        ) from error
    except InvalidInput:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's own code may raise
        raise InvalidInput(f"{what} {text!r}: the factory failed with {type(error).__name__} ({error})") from error


def _instead(text: str, what: str) -> str:
    """What to write for a name without a factory."""
    path = Path(text)
    form = "it must be written package.module:factory or file.py:factory"
    if path.is_dir():
        return f"this is a folder; {form}" + ("; a folder that nettrim wrote goes to --weights" if what == "model" else "")
    if path.suffix in WEIGHTS and what == "model":
        exists = "this is a file of weights" if path.is_file() else "a name like this is one of weights"
        return (
            f"{exists}, which hold no code (a pickle of a whole model would run code when it is loaded, and is not read); "
            f"name the function that makes the model, and give the file as --weights {path}"
        )
    if path.suffix == ".py":
        known = _factories(path) if path.is_file() else []
        if not path.is_file():
            return f"there is no file {path}; {form}"
        return f"add which of its functions or classes makes the {what}: " + (" or ".join(f"{text}:{name}" for name in known[:6]) or form)
    if path.exists():
        return f"this file is no Python; {form}" + (", or a .pt2 program of torch.export" if what == "model" else "")
    near = Path(f"{text}.py")
    if near.is_file():
        return f"{form}; there is a file {near}: {' or '.join(f'{near}:{name}' for name in _factories(near)[:6])}"
    return form + (", or a .pt2 file" if what == "model" else ", or a .npy, .npz or .safetensors file")


def _factories(path: Path) -> list[str]:
    """The functions and classes that a file defines, those callable without arguments first; read from its source, nothing is run."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    found: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found[node.name] = len(node.args.args) - len(node.args.defaults) + sum(each is None for each in node.args.kw_defaults)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            inits = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
            found[node.name] = sum(max(len(item.args.args) - len(item.args.defaults) - 1, 0) for item in inits)
    return sorted(found, key=lambda name: found[name] > 0)
