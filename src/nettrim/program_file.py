"""A ``.pt2`` file as plain data: what torch would execute of it is refused or left out before torch sees it.

``torch.export.load`` trusts its file. It unpickles without restriction, evaluates the expressions of sizes and guards as Python, calls
whatever function of torch a node names, and writes names of the file into source that it compiles. So the archive is taken apart here and
put together again from what was checked: the graph's operators are those of ATen that return tensors, names are names, sizes are sums and
products of symbols, tensors are raw bytes or what the restricted unpickler gives, and there is nothing else in it.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import foreign
from .status import InvalidInput, first_line

FORMAT, MODEL = "archive_format", "models/model.json"
KEPT = (FORMAT, "archive_version", "byteorder", ".data/version")
INPUTS = "data/sample_inputs/model.pt"
PAYLOADS = (("data/weights/", "weight_"), ("data/constants/", "tensor_"))
CONFIG = "model_{}_config.json"
EARLIER = ("serialized_exported_program.json", "serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt")
"""The parts of files that torch 2.4 to 2.7 wrote."""
CUSTOM = ("as_custom_obj", "custom_obj", "as_operator")
DEPTH = 60
PLAIN = "a program of tensors in tuples, lists and dictionaries"

_OPERATOR = re.compile(r"torch\.ops\.aten\.([A-Za-z]\w*|__?[a-z]\w*)\.([A-Za-z]\w*)", re.ASCII)
_SCALAR = re.compile(
    r"_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\.(sym_(not|float|int|max|min|ite|sqrt|sum)|_sym_sqrt)",
    re.ASCII,
)
_SIZES = re.compile(r"(sym_(size|stride|numel|storage_offset|is_contiguous|constrain_range(_for_size)?)|item|_assert_\w+)", re.ASCII)
"""Operators that return no tensor."""
_INTERNAL = re.compile(
    r"_(to_copy|softmax|log_softmax|convolution|weight_norm\w*|unsafe_view|prelu_kernel|assert_\w+|adaptive_avg_pool\dd|upsample_\w+"
    r"|native_batch_norm_legit\w*|batch_norm_impl_index|scaled_dot_product_\w+|native_multi_head_attention|transformer_encoder_layer_fwd)",
    re.ASCII,
)
"""Operators with a leading underscore that exported models hold; others of them may leave out checks of their arguments."""
_STRINGS = frozenset(
    (
        *("approximate", "assert_msg", "driver", "equation", "indexing", "interpolation", "mode", "norm", "ord", "p", "pad_mode"),
        *("padding", "padding_side", "reduce", "rounding_mode", "side", "UPLO"),
    )
)
"""Arguments of operators that are texts, and no names of files."""
_FUNCTIONS = frozenset(
    (
        *("Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "Abs", "Eq", "Ne", "Lt", "Le", "Gt", "Ge"),
        *("Equality", "Unequality", "LessThan", "GreaterThan", "StrictLessThan", "StrictGreaterThan", "And", "Or", "Not", "floor"),
        *("ceiling", "FloorDiv", "ModularIndexing", "Where", "PythonMod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv", "Identity"),
        *("PowByNatural", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat"),
        "IsNonOverlappingAndDenseIndicator",
    )
)
_SYMBOL = re.compile(r"[a-z]{1,3}\d{1,5}|true|false|True|False", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_WORDS = re.compile(r"[\w.+ \-]{0,500}")
_CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}


def checked(path: Path) -> io.BytesIO:
    """The program of a ``.pt2`` file as an archive that ``torch.export.load`` may read, whoever made the file.

    Raises:
        InvalidInput: no such archive, too large unpacked, or something in it that would be executed, or cannot be told from that.
    """
    origin = f"model {path}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"{origin}: it cannot be read ({error.strerror or error})") from error
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise InvalidInput(f"{origin}: it cannot be read as a torch.export program (it is no archive); write it by torch.export.save")
    opened = foreign.archive(io.BytesIO(data), origin)
    try:
        parts = _earlier(opened, origin) if EARLIER[0] in opened.namelist() else _present(opened, origin)
    except (RecursionError, OverflowError, TypeError, KeyError, AttributeError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{origin}: it cannot be read as a torch.export program ({first_line(error)})") from error
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    made.seek(0)
    return made


def _present(opened: zipfile.ZipFile, origin: str) -> dict[str, bytes]:
    """The parts of an archive as torch writes it since 2.8."""
    names = opened.namelist()
    root = names[0].partition("/")[0] if names else ""
    inside = {name.removeprefix(f"{root}/"): name for name in names if name.startswith(f"{root}/")}
    compiled = [name for name in inside if name.startswith("data/aotinductor/") or re.search(r"\.(so|dll|dylib|pyd|cubin)$", name)]
    if compiled:
        raise InvalidInput(f"{origin}: it holds compiled code ({compiled[0]}), which is not run; write the program by torch.export.save")
    if MODEL not in inside or FORMAT not in inside:
        raise InvalidInput(f"{origin}: it cannot be read as a torch.export program (there is no {MODEL}); write it by torch.export.save")

    def read(name: str) -> bytes:
        return foreign.part(opened, inside[name], origin)

    parts = {name: read(name) for name in KEPT if name in inside}
    parts[MODEL] = _program(read(MODEL), origin)
    for folder, prefix in PAYLOADS:
        legacy, config = f"{folder}model.pt", folder + CONFIG.format(folder.split("/")[1])
        if legacy in inside:
            parts[legacy] = _pickled(read(legacy), origin)
        elif config in inside:
            parts |= _payloads(read(config), folder, prefix, lambda name: read(name) if name in inside else b"", origin)
            parts[config] = _dumped(_loaded(read(config), origin), origin)
    if INPUTS in inside:
        parts[INPUTS] = _pickled(read(INPUTS), origin)
    return {f"model/{name}": content for name, content in parts.items()}


def _earlier(opened: zipfile.ZipFile, origin: str) -> dict[str, bytes]:
    """The parts of an archive as torch wrote it up to 2.7."""
    parts = {name: foreign.part(opened, name, origin) for name in (*EARLIER, "version") if name in opened.namelist()}
    missing = [name for name in (*EARLIER, "version") if name not in parts]
    if missing:
        raise InvalidInput(f"{origin}: it cannot be read as a torch.export program (there is no {missing[0]}); export the model again")
    made = {name: _pickled(content, origin) for name, content in parts.items() if name.endswith(".pt")}
    return parts | made | {EARLIER[0]: _program(parts[EARLIER[0]], origin)}


def _pickled(data: bytes, origin: str) -> bytes:
    """What the restricted unpickler gives, written anew: whatever reads it next reads our bytes."""
    if not data:
        return data
    found = foreign.unpickled(data, origin, PLAIN)
    written = io.BytesIO()
    torch.save(_plain(found, origin), written)
    return written.getvalue()


def _plain(value: Any, origin: str, depth: int = 0) -> Any:
    if depth > DEPTH:
        raise InvalidInput(f"{origin}: its examples are nested deeper than {DEPTH}; export the model with plain tensors as inputs")
    if isinstance(value, torch.Tensor):
        _within(value.numel() * value.element_size(), value.untyped_storage().nbytes() if not value.is_meta else 0, origin)
    elif isinstance(value, dict):
        return {key: _plain(part, origin, depth + 1) for key, part in value.items()}
    elif type(value) in (tuple, list):
        return type(value)(_plain(part, origin, depth + 1) for part in value)
    elif value is not None and type(value) not in (int, float, bool, str, complex, torch.device, torch.dtype):
        raise InvalidInput(f"{origin}: it holds an object of {type(value).__name__}; export a model with tensors as inputs")
    return value


def _within(stated: int, there: int, origin: str) -> None:
    limit = max(foreign.ALLOWED, foreign.EXPANSION * there) if there else 0
    if stated > limit:
        raise InvalidInput(f"{origin}: a tensor is stated to take {stated:,} bytes, and {there:,} are there; the limit is {limit:,}")


def _payloads(config: bytes, folder: str, prefix: str, read: Callable[[str], bytes], origin: str) -> dict[str, bytes]:
    """The tensors that a config names: raw bytes as they are, pickled ones written anew."""
    found: dict[str, bytes] = {}
    for payload in _loaded(config, origin)["config"].values():
        name = payload["path_name"]
        if not isinstance(name, str) or not re.fullmatch(rf"{prefix}\d{{1,9}}", name, re.ASCII):
            raise InvalidInput(f"{origin}: it holds an object that is no tensor ({str(name)[:60]}); export a model of tensors only")
        data = read(folder + name)
        if payload["use_pickle"]:
            found[folder + name] = _pickled(data, origin)
            continue
        sizes = [size["as_int"] for size in payload["tensor_meta"]["sizes"]]
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise InvalidInput(f"{origin}: the shape {sizes} of a tensor is none; the file is damaged")
        _within(math.prod(sizes), len(data), origin)  # of at least one byte an entry
        found[folder + name] = data
    return found


def _loaded(data: bytes, origin: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{origin}: it cannot be read as a torch.export program ({first_line(error)})") from error
    if not isinstance(found, dict):
        raise InvalidInput(f"{origin}: it cannot be read as a torch.export program; write it by torch.export.save")
    return found


def _program(data: bytes, origin: str) -> bytes:
    """The graph, without notes on its origin and without guards: both are texts that torch reads as more than texts."""
    found = _loaded(data, origin)
    found["guards_code"] = []
    module = found["graph_module"]
    module["metadata"], module["treespec_namedtuple_fields"] = {}, {}
    for key in found.get("range_constraints") or {}:
        if not _SYMBOL.fullmatch(key):
            raise _refused(origin, "symbol", key)
    return _dumped(found, origin)


def _dumped(data: Any, origin: str) -> bytes:
    return json.dumps(_clean(data, "", origin)).encode()


def _clean(value: Any, key: str, origin: str, depth: int = 0) -> Any:
    """A value of the file's JSON, every text of it checked for the place where it stands."""
    if depth > DEPTH:
        raise InvalidInput(f"{origin}: its graph is nested deeper than {DEPTH}; export a model without control flow")
    if isinstance(value, dict):
        made = {}
        for name, part in value.items():
            if name in CUSTOM and part is not None:
                raise InvalidInput(f"{origin}: it holds custom objects or operators, which are not run; export a model of tensors only")
            if "target" in value and name == "metadata":
                part = {}
            made[_text(name, "", origin)] = _clean(part, name, origin, depth + 1)
        if isinstance(value.get("target"), str) and "inputs" in value:
            _check_operator(value["target"], origin)
        return made
    if isinstance(value, list):
        return [_clean(part, key, origin, depth + 1) for part in value]
    if isinstance(value, str):
        return _text(value, key, origin)
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise InvalidInput(f"{origin}: it holds an integer of {value.bit_length()} bits; the file is damaged")
    return value


def _text(text: str, key: str, origin: str) -> str:
    """A text that may stand at this key."""
    if key == "expr_str":
        _check_expression(text, origin)
    elif key in ("in_spec", "out_spec"):
        if text:
            _check_nesting(_spec(text, origin), key, origin)
    elif key in ("as_string", "as_strings"):
        if not text.isprintable() or len(text) > 500:
            raise _refused(origin, "text", text)
    elif key in ("name", "as_name", "forward_arg_names"):
        if text and (not _NAME.fullmatch(text) or keyword.iskeyword(text) or _hidden(text)):
            raise _refused(origin, "name", text)
    elif not _WORDS.fullmatch(text) or any(map(_hidden, text.split("."))):
        raise _refused(origin, key or "name", text)
    return text


def _hidden(name: str) -> bool:
    """Whether Python gives this name a meaning of its own."""
    return name.startswith("__") and name.endswith("__")


def _refused(origin: str, what: str, text: str) -> InvalidInput:
    return InvalidInput(f"{origin}: the {what} {text[:80]!r} is none that torch.export writes; the file is damaged, or made to run code")


def _check_operator(target: str, origin: str) -> None:
    """Refuses what is no operator on tensors and sizes."""
    if _SCALAR.fullmatch(target):
        return
    if target.startswith("torch.ops.higher_order."):
        raise InvalidInput(
            f"{origin}: it branches on its data or holds a graph inside of a graph ({target.rpartition('.')[2]}), "
            "so that no layers can be told; export it without that"
        )
    found = _OPERATOR.fullmatch(target)
    packet = getattr(torch.ops.aten, found[1], None) if found else None
    operator = getattr(packet, found[2], None) if found and isinstance(packet, torch._ops.OpOverloadPacket) else None
    if found is None or not isinstance(operator, torch._ops.OpOverload):
        raise InvalidInput(
            f"{origin}: {target[:80]!r} is no operator of ATen that this torch knows; give the model as package.module:factory"
        )
    schema = operator._schema
    tensors = any("Tensor" in str(part.type) for part in schema.returns)
    texts = {argument.name for argument in schema.arguments if "str" in str(argument.type)}
    internal = found[1].startswith("_") and not _INTERNAL.fullmatch(found[1])
    if not (tensors or _SIZES.fullmatch(found[1])) or internal or not texts <= _STRINGS:
        raise InvalidInput(f"{origin}: the operator {target!r} is not run for a foreign file; give the model as package.module:factory")


def _check_expression(text: str, origin: str) -> None:
    """Refuses what is no arithmetic of symbols and integers: the text is evaluated as Python."""
    try:
        tree = ast.parse(text, mode="eval") if len(text) <= 2000 else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    if tree is None:
        raise _refused(origin, "size", text)
    powers = 0
    for node in ast.walk(tree):
        fine = isinstance(node, (ast.Expression, ast.Load, ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator, ast.Compare, ast.cmpop))
        fine = fine and not isinstance(node, (ast.Pow, ast.LShift, ast.MatMult))
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            powers += name.startswith("Pow")
            fine = name in _FUNCTIONS and powers <= 2 and (not name.startswith("Pow") or _small(node))
        elif isinstance(node, ast.Name):
            fine = node.id in _FUNCTIONS or bool(_SYMBOL.fullmatch(node.id))
        elif isinstance(node, ast.keyword):
            fine = node.arg in ("positive", "integer", "nonnegative", "real", "precision", "evaluate") and isinstance(
                node.value, ast.Constant
            )
        elif isinstance(node, ast.Constant):
            symbol = isinstance(node.value, str) and bool(re.fullmatch(r"[a-z]{1,3}\d{1,5}|-?\d{1,20}(\.\d{0,40})?", node.value, re.ASCII))
            fine = symbol or (isinstance(node.value, (int, float)) and abs(node.value) < 2**63)
        if not fine:
            raise _refused(origin, "size", text)


def _small(call: ast.Call) -> bool:
    """Whether a power's exponent is a number of at most 64."""
    exponent = call.args[1] if len(call.args) == 2 else None
    if isinstance(exponent, ast.Call) and len(exponent.args) == 1:
        exponent = exponent.args[0]
    if isinstance(exponent, ast.UnaryOp):
        exponent = exponent.operand
    return isinstance(exponent, ast.Constant) and isinstance(exponent.value, int) and abs(exponent.value) <= 64


def _spec(text: str, origin: str) -> Any:
    try:
        version, spec = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise _refused(origin, "structure", text) from error
    return spec if version == 1 else _refused(origin, "structure", text)


def _check_nesting(spec: Any, key: str, origin: str, depth: int = 0) -> None:
    """Refuses inputs and outputs in anything but tuples, lists and dictionaries."""
    if not isinstance(spec, dict) or depth > DEPTH or not isinstance(spec.get("children_spec"), list):
        raise _refused(origin, "structure", str(spec))
    if spec.get("type") not in _CONTAINERS:
        what = "its output must be a tensor or a tuple of tensors" if key == "out_spec" else "its inputs must be tensors"
        raise InvalidInput(f"{origin}: {what}, found {str(spec.get('type'))[:60]}; export a model that takes and returns those")
    context = spec.get("context")
    if context is not None:
        names = json.loads(context) if isinstance(context, str) else context
        if names is not None and not (isinstance(names, list) and all(type(name) in (str, int) for name in names)):
            raise _refused(origin, "structure", str(context))
        for name in names or ():
            if isinstance(name, str):
                _text(name, "name" if key == "in_spec" else "", origin)
    for child in spec["children_spec"]:
        _check_nesting(child, key, origin, depth + 1)
