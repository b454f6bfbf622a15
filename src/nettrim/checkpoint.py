"""Saving and loading results: safetensors for weights, JSON for the rest. All files of a folder appear together or not at all."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialised
from torch import Tensor, nn

from . import foreign, packing, staging
from .certificate import Certificate
from .layers import add_bias, can_take_bias, without_values
from .records import plain, read_json
from .report import PruneReport
from .status import InvalidInput
from .trained import state_key
from .wrappers import bare_modules, unwrapped, without_prefix

if TYPE_CHECKING:
    from .pruning import PruneResult

MODEL, REPORT, CERTIFICATE, PAGE = "model.safetensors", "report.json", "certificate.json", "report.html"
PACKING = "nettrim_packing"  # the key of a weights file's metadata that holds the header of packed tensors (docs/files.md)


RESULT = (MODEL, REPORT, CERTIFICATE, PAGE)
AGAIN = "give a folder that result.save wrote, or save the result again"


def check_output(folder: str | Path, *, force: bool = False, inputs: Iterable[str | Path | None] = (), kind: str = "result") -> Path:
    """Refuses an output folder for a result before any work is done; creates it when it is missing.

    Args:
        folder: where the result is to be saved.
        force: whether an earlier result there is to be replaced; inputs and files that nettrim did not write never are.
        inputs: files and saved folders that are read.
        kind: who saves it: ``"result"``, or ``"demo"``, which renews its own.

    Raises:
        InvalidInput: it cannot be written to, or holds what must stay.
    """
    path = staging.check_writable(folder)
    staging.settle(path)
    staging.check([path / name for name in RESULT], kind, force=force, inputs=files_of(inputs))
    return path


def files_of(inputs: Iterable[str | Path | None]) -> list[Path]:
    """The files that inputs name: of a folder those of its result; of ``file.py:factory`` that file."""
    found: list[Path] = []
    for given in inputs:
        if given is not None:
            path = Path(given) if Path(given).exists() else Path(str(given).rpartition(":")[0] or str(given))
            found += [path / name for name in (MODEL, REPORT, CERTIFICATE)] if path.is_dir() else [path]
    return found


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict under names without wrappers, each tensor with storage of its own. Raises InvalidInput for state that is no dense
    tensor with values."""
    state = {}
    for key, value in unwrapped(model).state_dict().items():
        if not isinstance(value, Tensor):
            raise InvalidInput(
                f"state_dict entry {key!r} is a {type(value).__name__}; safetensors holds tensors only: use torch.save for this model"
            )
        if without_values(value):
            raise InvalidInput(
                f"state_dict entry {key!r} holds no values yet (a lazy module, or the meta device); run or load the model first"
            )
        if value.layout is not torch.strided:
            raise InvalidInput(f"state_dict entry {key!r} is a {value.layout} tensor; safetensors holds dense ones only: use .to_dense()")
        state[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return state


def check_state(model: nn.Module) -> None:
    """Refuses a model whose state a safetensors file cannot hold, before any work is done. Raises InvalidInput."""
    empty = {key: torch.empty(0, dtype=value.dtype) for key, value in state_tensors(model).items()}
    _refuse_unknown(empty, lambda: serialised(empty))


@dataclass(frozen=True)
class WeightsSize:
    """How large a weights file is: the bytes of its tensors when dense, those of the file, and how many of its tensors are packed."""

    dense_bytes: int
    stored_bytes: int
    tensors: int
    packed: int

    @property
    def ratio(self) -> float:
        """Stored over dense; a little above 1 for a dense file, which has a header."""
        return self.stored_bytes / self.dense_bytes if self.dense_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "dense_bytes": self.dense_bytes,
            "stored_bytes": self.stored_bytes,
            "ratio": self.ratio,
            "tensors": self.tensors,
            "packed": self.packed,
        }


def weights_size(file: str | Path) -> WeightsSize:
    """The size of a safetensors file, read from its header.

    Raises:
        InvalidInput: the file is missing or damaged.
    """
    path = _there(Path(file))
    metadata, names = _header(path)
    stored = path.stat().st_size
    with path.open("rb") as opened:
        data = stored - 8 - int.from_bytes(opened.read(8), "little")  # what follows the header, which safetensors has checked
    entries: dict[str, packing.Entry] = {}
    if PACKING in metadata:
        try:
            entries = packing.read_header(metadata[PACKING])[1]
        except InvalidInput as error:
            raise InvalidInput(f"weights file {path}: {error}") from error
    saved = sum(entry.dense_bytes - entry.payload_bytes for entry in entries.values())
    return WeightsSize(data + saved, stored, len(names), len(entries))


def save_weights(model: nn.Module, file: str | Path, *, compressed: bool = False, force: bool = True) -> Path:
    """Writes the state dict of any model to a safetensors file, which `load` reads; returns its path.

    Args:
        model: any module; for a `PruneResult` use its ``save``, which writes report and certificate too.
        file: must end in ``.safetensors``; its folder is created when missing.
        compressed: store tensors with many zeros as values and positions (docs/files.md). They are restored to the last bit.
        force: an earlier file of `save_weights` is replaced whole, and refused with ``False``; other files are never replaced.

    Raises:
        InvalidInput: another name, a file that must stay, a folder that cannot be written to, or state that is not a tensor.
    """
    path = Path(file)
    if path.suffix != ".safetensors" or path.is_dir():
        raise InvalidInput(f"weights file {path}: it must be a file whose name ends in .safetensors; choose another name")
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"save_weights: model must be an nn.Module, found {type(model).__name__}; a PruneResult has a save of its own")
    state = state_tensors(model)
    with staging.writing(path.parent, [path.name], "weights", force=force) as hidden:
        _write_weights(state, hidden / path.name, staging.mark("weights"), compressed)
    return path


def _write_weights(state: Mapping[str, Tensor], file: Path, more: Mapping[str, str], compressed: bool) -> None:
    metadata = {"format": "pt", **more}
    stored = dict(state)
    if compressed:
        stored, metadata[PACKING] = packing.pack(state)
    _refuse_unknown(stored, lambda: save_file(stored, file, metadata=metadata))


def _refuse_unknown(stored: Mapping[str, Tensor], write: Callable[[], object]) -> None:
    """Writes, and raises InvalidInput for dtypes and names that safetensors does not know."""
    try:
        write()
    except KeyError as error:
        known = ", ".join(key for key, value in stored.items() if value.dtype in error.args) or error
        raise InvalidInput(f"weights: safetensors does not hold {error} ({known}); convert it first, or use torch.save") from error
    except UnicodeEncodeError as error:
        raise InvalidInput(f"weights: safetensors does not hold the name {error.object!r} ({error.reason}); rename that module") from error


def save(
    result: PruneResult,
    folder: str | Path,
    comparison: Any = (),
    *,
    compressed: bool = False,
    force: bool = False,
    inputs: Iterable[str | Path | None] = (),
    kind: Literal["result", "demo"] = "result",
) -> Path:
    """Writes model.safetensors, report.json, certificate.json and report.html into ``folder``; returns it. See `check_output`.

    Raises:
        InvalidInput: what `check_output` refuses, state that is no tensor, or a disk that does not take it.
    """
    from .render import report_html  # drawing is needed only here

    path = check_output(folder, force=force, inputs=inputs, kind=kind)
    certificate, said = plain(result.certificate.to_dict(), "certificate")
    report, more = plain(result.report.to_dict(), "report")
    shown = replace(result.report, notes=(*result.report.notes, *said, *more), settings=report["settings"])
    report["notes"] = list(shown.notes)
    state = state_tensors(result.model)
    added = {"added_biases": json.dumps(list(map(str, result.report.settings.get("added_biases", []))))}
    with staging.writing(path, RESULT, kind, force=force, inputs=files_of(inputs)) as hidden:
        _write_weights(state, hidden / MODEL, staging.mark(kind) | added, compressed)
        _write_json(hidden / REPORT, staging.mark(kind) | report)
        _write_json(hidden / CERTIFICATE, staging.mark(kind) | certificate)
        page = report_html(shown, result.certificate, result.masks(), comparison=comparison, files=file_hashes(hidden))
        (hidden / PAGE).write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    return path


def file_hashes(folder: str | Path) -> dict[str, str]:
    """SHA-256 of the files of a result that its page shows, by name; of those that are there."""
    found = ((name, staging.find(folder, name)) for name in (MODEL, REPORT, CERTIFICATE))
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found if path.is_file()}


def unlike_page(folder: str | Path) -> list[str]:
    """Files of a result that are not those that its page was made from, as sentences; none where there is no page."""
    page = staging.find(folder, PAGE)
    if not page.is_file():
        return []
    text = page.read_text(encoding="utf-8", errors="replace")
    shown = dict(re.findall(r'<meta name="nettrim-file" content="([^" ]+) ([0-9a-f]{64})">', text))
    return [f"{PAGE}: it was not made from this {name}" for name, digest in file_hashes(folder).items() if shown.get(name) != digest]


def load(folder: str | Path, into: nn.Module) -> nn.Module:
    """Loads pruned weights from a saved folder (or a safetensors file) into ``into``, in place, and returns it.

    Layers to which ``add_bias=True`` gave a bias get one here too, when they have none. ``into`` may be compiled or wrapped in
    nn.DataParallel, and so may the model have been that a state dict was saved of: names are compared without what wrappers add to them.

    Raises:
        InvalidInput: the file is missing or damaged, or names, shapes or dtypes do not fit; nothing is written in that case.
    """
    path = staging.place_of(folder, "load: folder")
    file = staging.find(path, MODEL) if path.is_dir() else path
    own = unwrapped(into, "load: into").state_dict()
    state, _ = without_prefix(read_weights(file), own)
    for key, value in state.items():
        if key in own and torch.promote_types(own[key].dtype, value.dtype) != own[key].dtype:
            raise InvalidInput(
                f"weights {path}: {key} is stored in {value.dtype}, the model holds it in {own[key].dtype}, which would round it away "
                f"from what is certified; convert the model first with .to({value.dtype})"
            )
    modules = bare_modules(into)
    missing = [modules[name] for name in _added_biases(file) if name in modules and can_take_bias(modules[name])]
    for module in missing:
        add_bias(module)
    try:
        load_state(unwrapped(into), state, str(path))
    except BaseException:
        for module in missing:
            module.register_parameter("bias", None)
        raise
    return into


def _added_biases(path: Path) -> list[str]:
    """The layers to which pruning gave a bias, as the file's header names them; none in files of other makers."""
    if path.suffix != ".safetensors":
        return []
    try:
        names = json.loads(_header(path)[0].get("added_biases", "[]"))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"weights file {path}: its header cannot be read ({error})") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidInput(f"weights file {path}: added_biases in its header must be a list of names, found {names!r}")
    return names


def _header(path: Path) -> tuple[dict[str, str], list[str]]:
    """Metadata of a safetensors file, and the names under which its tensors are stored."""
    path = _there(path)
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, list(file.keys())
    except (SafetensorError, OSError) as error:
        raise InvalidInput(f"weights file {path}: it cannot be read ({error})") from error


def load_state(model: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Loads a state dict after checking every name and shape."""
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        modules = dict(model.named_modules())
        biases = [key for key in extra if key.endswith("bias") and can_take_bias(modules.get(key[:-5], model))]
        hint = "; if add_bias=True made these biases, nettrim.load gives them to the model" if biases and biases == extra else ""
        raise InvalidInput(
            f"weights {origin} do not fit the model ({type(model).__name__}): "
            + "; ".join(f"{label} {', '.join(keys[:5])}" for label, keys in (("missing", missing), ("not in the model", extra)) if keys)
            + hint
        )
    for key, value in state.items():
        if own[key].is_meta:
            raise InvalidInput(
                f"weights {origin}: the model's {key} is on the meta device; give it storage first with .to_empty(device=...)"
            )
        if tuple(value.shape) != tuple(own[key].shape):
            raise InvalidInput(f"weights {origin} do not fit the model: {key} must be {tuple(own[key].shape)}, found {tuple(value.shape)}")
    model.load_state_dict(dict(state))


def weight_of(state: Mapping[str, Tensor], layer: str) -> Tensor:
    """The weight of a layer in a state dict; projections of nn.MultiheadAttention may lie in one tensor.

    Raises:
        InvalidInput: the state holds no weight of that layer.
    """
    key = state_key(layer, "weight")
    if key in state:
        return state[key]
    parent, _, own = layer.rpartition(".")
    prefix = f"{parent}." if parent else ""
    if own in ("q_proj", "k_proj", "v_proj"):
        if f"{prefix}{own}_weight" in state:
            return state[f"{prefix}{own}_weight"]
        if f"{prefix}in_proj_weight" in state:
            return state[f"{prefix}in_proj_weight"].chunk(3)[("q_proj", "k_proj", "v_proj").index(own)]
    raise InvalidInput(f"weights: there is no {key!r}; report and weights do not belong together")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` file, packed ones restored, or of a state dict saved by ``torch.save`` (with ``weights_only=True``).

    Raises:
        InvalidInput: the file is missing, damaged, of a later version, or holds something else; it names the tensor where one is wrong.
    """
    path = _there(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    origin = f"weights file {path}"
    return foreign.dense_state(foreign.unpickled(path, origin, "a plain state dict (save model.state_dict())"), origin)


def _there(path: Path) -> Path:
    """The file, found where an interrupted save of its folder left it. Raises InvalidInput where there is none."""
    found = staging.find(path.parent, path.name)
    if found.is_dir():
        inside = f", such as {path / MODEL}" if staging.find(path, MODEL).is_file() else ""
        raise InvalidInput(f"weights file {path}: it is a folder; name the file in it that holds the weights{inside}")
    if not found.is_file():
        raise InvalidInput(f"weights file {path}: there is no such file")
    return found


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    metadata, _ = _header(path)
    try:
        stored = load_file(path)
        return packing.unpack(stored, metadata[PACKING]) if PACKING in metadata else stored
    except InvalidInput as error:
        raise InvalidInput(f"weights file {path}: {error}") from error
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise InvalidInput(f"weights file {path}: it cannot be read ({error})") from error
    except MemoryError as error:
        raise InvalidInput(f"weights file {path}: its tensors do not fit into memory ({error}); use a machine with more") from error


def read_report(folder: str | Path) -> PruneReport:
    """The report of a saved folder.

    Raises:
        InvalidInput: there is none, or it is damaged.
    """
    return read_json(staging.find(folder, REPORT), PruneReport.from_dict, AGAIN)


def read_certificate(folder: str | Path) -> Certificate:
    """The certificate of a saved folder.

    Raises:
        InvalidInput: there is none, or it is damaged.
    """
    return read_json(staging.find(folder, CERTIFICATE), Certificate.from_dict, AGAIN)


def contradictions(folder: str | Path) -> list[str]:
    """Entries of the two JSON files that do not follow from their other entries (``holds``, ``density`` and the like)."""
    found = []
    for name, made in ((REPORT, read_report(folder)), (CERTIFICATE, read_certificate(folder))):
        raw = read_json(staging.find(folder, name), dict, AGAIN)
        written = json.loads(json.dumps(made.to_dict()))
        found += [f"{name}: {place} does not follow from the other entries" for place in _unequal(raw, written)]
        marks = [staging.mark(kind) for kind in ("result", "demo")]
        if not any(all(raw.get(key, value) == value for key, value in mark.items()) for mark in marks):
            found.append(f"{name}: it is not marked as a result of nettrim")
    return found


def _unequal(raw: Any, made: Any, place: str = "") -> list[str]:
    """Where two JSON values differ; entries that only one of them has do not count."""
    if isinstance(raw, dict) and isinstance(made, dict):
        return [text for key in raw if key in made for text in _unequal(raw[key], made[key], f"{place}.{key}" if place else key)]
    if isinstance(raw, list) and isinstance(made, list) and len(raw) == len(made):
        return [text for i, (a, b) in enumerate(zip(raw, made, strict=True)) for text in _unequal(a, b, f"{place}[{i}]")]
    return [] if raw == made else [place]


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
