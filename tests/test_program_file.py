"""A ``.pt2`` file is data: nothing that it holds is executed, whatever part of it was made to be."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nettrim
from nettrim import InvalidInput
from nettrim.programs import model_from_program

MODEL = "models/model.json"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
INPUTS = "data/sample_inputs/model.pt"
Parts = dict[str, bytes]


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


class Net(nn.Module):
    """A batch of any size, a buffer, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last, self.constant = nn.Linear(8, 4), nn.Linear(4, 2), torch.tensor([1.0, 2.0])
        self.register_buffer("scale", torch.full((2,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.fc(x)).reshape(x.shape[0], 4)
        return self.last(y) * self.scale + self.constant  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """The parts of a sound file, without the folder that they lie in."""
    file = nettrim.export(Net(), torch.randn(3, 8), tmp_path_factory.mktemp("program") / "net.pt2").path
    with zipfile.ZipFile(file) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def packed(parts: Parts, file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(f"net/{name}", content)
    return file


def saved(value: object) -> bytes:
    written = io.BytesIO()
    torch.save(value, written)
    return written.getvalue()


def edited(data: bytes, change: Callable[[Any], object]) -> bytes:
    loaded = json.loads(data)
    change(loaded)
    return json.dumps(loaded).encode()


def first_node(program: Any) -> Any:
    return program["graph_module"]["graph"]["nodes"][0]


def shell(mark: Path) -> str:
    return f"__import__('pathlib').Path({str(mark)!r}).touch()"


def set_size(program: Any, text: str) -> None:
    values = program["graph_module"]["graph"]["tensor_values"]
    sizes = next(size for value in values.values() for size in value["sizes"] if "as_expr" in size)
    sizes["as_expr"]["expr_str"] = text


def set_name(program: Any, name: str) -> None:
    """Another name for the input, wherever it stands."""

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name if key == "x" else key: renamed(part) for key, part in value.items()}
        return [renamed(part) for part in value] if isinstance(value, list) else name if value == "x" else value

    program["graph_module"] = renamed(program["graph_module"])


def set_target(program: Any, target: str, *texts: str) -> None:
    node = first_node(program)
    node["target"] = target
    node["inputs"] = [{"name": f"a{i}", "arg": {"as_string": text}, "kind": 1} for i, text in enumerate(texts)]


def set_structure(program: Any, kind: str, context: str) -> None:
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    version, spec = json.loads(signature["in_spec"])
    spec["children_spec"][1] |= {"type": kind, "context": context}
    signature["in_spec"] = json.dumps([version, spec])


def set_payload(config: Any, **values: Any) -> None:
    next(iter(config["config"].values())).update(values)


def attacks(parts: Parts, mark: Path) -> dict[str, Parts]:
    evil = saved(Evil(mark))
    program = {
        "a size": lambda p: set_size(p, shell(mark)),
        "a size of a known function": lambda p: set_size(p, f"Max(Symbol('s0'), {shell(mark)})"),
        "a size by attributes": lambda p: set_size(p, "Symbol.__class__.__base__.__subclasses__()"),
        "a huge power": lambda p: set_size(p, "Pow(Integer(9), Pow(Integer(9), Integer(9)))"),
        "a name": lambda p: set_name(p, f"x={shell(mark)}"),
        "a name in a line of its own": lambda p: set_name(p, f"x):\n    {shell(mark)}\n    return (0"),
        "a function of torch": lambda p: set_target(p, "torch.serialization.os.system", f"touch {mark}"),
        "a function of Python": lambda p: set_target(p, "_operator.methodcaller", "x"),
        "a file made by an operator": lambda p: set_target(p, "torch.ops.aten.from_file.default", str(mark)),
        "an object saved by an operator": lambda p: set_target(p, "torch.ops.aten.save.default", str(mark)),
        "an operator of another library": lambda p: set_target(p, "torch.ops.inductor.resize_storage_bytes_.default"),
        "a graph in a graph": lambda p: set_target(p, "torch.ops.higher_order.cond"),
        "a module named by the file": lambda p: set_structure(p, "builtins.dict", '[{"__enum__": true, "fqn": "this:x"}]'),
        "a keyword that is code": lambda p: set_structure(p, "builtins.dict", json.dumps([f"k={shell(mark)}"])),
        "a class of somebody": lambda p: set_structure(p, "transformers.ModelOutput", "[]"),
    }
    found = {what: parts | {MODEL: edited(parts[MODEL], change)} for what, change in program.items()}
    found |= {
        "the example": parts | {INPUTS: evil},
        "pickled without an archive": parts | {INPUTS: pickle.dumps(Evil(mark))},
        "weights of an earlier form": parts | {"data/weights/model.pt": evil},
        "constants of an earlier form": parts | {"data/constants/model.pt": evil},
        "compiled code": parts | {"data/aotinductor/model/x.so": b"\x7fELF"},
    }
    for what, config, folder in (("weight", WEIGHTS, "data/weights/"), ("constant", CONSTANTS, "data/constants/")):
        name = "weight_0" if what == "weight" else "tensor_0"
        found[f"a pickled {what}"] = parts | {
            config: edited(parts[config], lambda c: set_payload(c, use_pickle=True)),
            folder + name: evil,
        }
        for prefix in ("opaque_obj_", "custom_obj_", "../"):
            found[f"a {what} that is {prefix}"] = parts | {
                config: edited(parts[config], lambda c, p=prefix: set_payload(c, path_name=f"{p}0")),  # type: ignore[misc]
                f"{folder}{prefix}0": pickle.dumps(Evil(mark)),
            }
        found[f"a huge {what}"] = parts | {
            config: edited(
                parts[config], lambda c: next(iter(c["config"].values()))["tensor_meta"]["sizes"].__setitem__(0, {"as_int": 10**12})
            ),
            folder + name: b"",
        }
    return found


def test_nothing_in_a_file_is_executed(parts: Parts, tmp_path: Path) -> None:
    mark = tmp_path / "EXECUTED"
    for what, made in attacks(parts, mark).items():
        with pytest.raises(InvalidInput) as refused:
            model_from_program(packed(made, tmp_path / "net.pt2"))
        assert "\n" not in str(refused.value) and str(tmp_path / "net.pt2") in str(refused.value), what
        assert not mark.exists(), what


def test_guards_and_notes_are_left_out(parts: Parts, tmp_path: Path) -> None:
    mark = tmp_path / "EXECUTED"

    def change(program: Any) -> None:
        program["guards_code"] = [shell(mark)]
        program["graph_module"]["metadata"] = {"custom": "{"}
        first_node(program)["metadata"] = {"source_fn_stack": f"a,torch.serialization.os.{shell(mark)}", "custom": "["}

    made = parts | {MODEL: edited(parts[MODEL], change), "extra/more": b"x", "data/weights/spare": saved(Evil(mark))}
    model = model_from_program(packed(made, tmp_path / "net.pt2"))
    assert not mark.exists() and isinstance(model.get_submodule("fc"), nn.Linear)


def test_the_earlier_form(parts: Parts, tmp_path: Path) -> None:
    """Up to torch 2.7: one JSON file and three pickles, at the top of the archive."""
    program = torch.export.export(Net(), (torch.randn(2, 8),))
    from torch._export.serde.serialize import serialize

    made = serialize(program)
    mark = tmp_path / "EXECUTED"
    names = ("serialized_exported_program.json", "serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt")
    good = dict(zip(names, (made.exported_program, made.state_dict, made.constants, made.example_inputs), strict=True))
    for name in ("", *names[1:]):
        with zipfile.ZipFile(tmp_path / "net.pt2", "w") as archive:
            archive.writestr("version", "8.0")
            for part, content in good.items():
                archive.writestr(part, saved(Evil(mark)) if part == name else content)
        if name:
            with pytest.raises(InvalidInput, match="it is not a program of tensors"):
                model_from_program(tmp_path / "net.pt2")
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of its own earlier form
                found = model_from_program(tmp_path / "net.pt2")
            assert set(found.state_dict()) >= set(Net().state_dict())
        assert not mark.exists()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damage_of_any_kind_is_refused(parts: Parts, tmp_path: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["cut", "flip", "swap", "lose", "type"]))
    made = dict(parts)
    name = data.draw(st.sampled_from(sorted(parts)))
    content = made[name]
    if kind == "cut":
        made[name] = content[: data.draw(st.integers(0, max(0, len(content) - 1)))]
    elif kind == "flip" and content:
        place = data.draw(st.integers(0, len(content) - 1))
        made[name] = content[:place] + bytes([content[place] ^ (1 << data.draw(st.integers(0, 7)))]) + content[place + 1 :]
    elif kind == "swap":
        other = data.draw(st.sampled_from(sorted(parts)))
        made[name], made[other] = made[other], made[name]
    elif kind == "lose":
        del made[name]
    else:
        which = data.draw(st.sampled_from([MODEL, WEIGHTS, CONSTANTS]))
        made[which] = edited(made[which], lambda loaded: changed(loaded, data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model_from_program(packed(made, tmp_path / "net.pt2"))
        except nettrim.NetTrimError as error:
            assert "net.pt2" in str(error)


def changed(value: Any, data: st.DataObject) -> None:
    """One entry somewhere inside becomes something else."""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = data.draw(st.sampled_from(list(keys)))
        if isinstance(value[key], (dict, list)) and value[key] and data.draw(st.integers(0, 9)):
            value = value[key]
            continue
        value[key] = data.draw(st.sampled_from([None, -1, 10**400, 1e999, "", "x y(", "__class__", [], {}, [[]], {"a": 1}, True, "s0"]))
        return
