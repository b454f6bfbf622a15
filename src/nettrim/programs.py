"""Models from ``.pt2`` programs of torch.export, with their layers made into modules again.

A program is a flat graph of aten operators. Those that compute a Linear, a convolution or a batch-norm of named parameters become the
module with these parameters under their old name, others that nettrim knows become torch's own functions, and all else stays as
it is: it runs, but nothing is seen of it. The state dict has the names that the exported model had.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from . import program_file
from .outputs import largest_difference, outputs_of
from .quiet import quiet
from .status import InvalidInput, first_line

AGREES = 1e-5
"""By how much the module's outputs may differ from the program's on the example saved with it, relative to the largest."""

aten = torch.ops.aten


def model_from_program(path: Path) -> nn.Module:
    """The model of a ``.pt2`` file, in eval mode.

    Raises:
        InvalidInput: the file is missing or no program, its inputs or outputs are not plain tensors, or it holds no layer.
    """
    if not path.is_file():
        raise InvalidInput(f"model {path}: there is no such file")
    archive = program_file.checked(path)
    try:
        with quiet("torch.export"):  # it logs a traceback beside the error that it raises
            program = torch.export.load(archive)
        model = _Rebuilt(program, str(path)).model()
    except InvalidInput:
        raise
    except Exception as error:  # torch raises many kinds, for damaged files and for other versions
        raise InvalidInput(f"model {path}: it cannot be read as a torch.export program ({first_line(error)})") from error
    if not any(isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) for module in model.modules()):
        raise InvalidInput(
            f"model {path}: the program holds no Linear or convolution with weights of its own; give the model as package.module:factory"
        )
    _check(model, program, str(path))
    return model


class _Rebuilt:
    """Turns a program's graph into one of modules and functions."""

    def __init__(self, program: ExportedProgram, origin: str) -> None:
        self.origin = origin
        self.source = program.module()
        self.state = dict(program.state_dict)
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.made: dict[fx.Node, Any] = {}
        self.layers: dict[str, tuple[Any, ...]] = {}

    def model(self) -> nn.Module:
        """The whole model."""
        for node in self.source.graph.nodes:
            if node.op == "placeholder":
                if not isinstance(node.meta.get("val"), Tensor):
                    raise InvalidInput(f"model {self.origin}: input {node.name} is not a tensor; export the model with tensors only")
                self.made[node] = self.graph.placeholder(node.name)
            elif node.op == "output":
                self.graph.output(fx.map_arg(self._result(node), lambda part: self.made[part]))
            elif node.op == "call_function":
                self.made[node] = self._call(node)
        for node in reversed(self.graph.nodes):  # parameters that only a module reads now
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)
        self.graph.lint()
        model = fx.GraphModule(self.root, self.graph)
        for name, buffer in self.state.items():  # such as counters, which the graph does not read
            owner, _, part = name.rpartition(".")
            if owner in self.layers and part in model.get_submodule(owner)._buffers:
                model.get_submodule(owner)._buffers[part] = buffer
        for name in sorted(self.state.keys() - model.state_dict().keys()):  # nothing in the graph reads them
            self._keep(model, name)
        return model.eval()

    def _keep(self, model: nn.Module, name: str) -> None:
        """Registers an entry of the state dict under its name, where nothing has that name."""
        place = _place(model, name.rpartition(".")[0])
        part, value = name.rpartition(".")[2], self.state[name]
        if not hasattr(place, part):
            if isinstance(value, nn.Parameter):
                place.register_parameter(part, value)
            else:
                place.register_buffer(part, value)

    def _result(self, node: fx.Node) -> Any:
        """What the model returns: one tensor, or a tuple of them."""
        flat = node.args[0]
        spec = getattr(self.source.graph._codegen, "pytree_info").out_spec  # noqa: B009  # no public name says how outputs nest
        if not isinstance(flat, (tuple, list)):
            return flat
        if len(flat) == 1 and spec.num_leaves == 1 and spec.type is None:
            return flat[0]
        if spec.type not in (tuple, list) or any(child.type is not None for child in spec.children()):
            raise InvalidInput(f"model {self.origin}: its output must be a tensor or a tuple of tensors; export a model that returns those")
        return tuple(flat)

    def _call(self, node: fx.Node) -> Any:
        if node.target in _LAYERS:
            name = self._layer(node)
            if name:
                return self.graph.call_module(name, (fx.map_arg(node.args[0], self._read),))
        args: tuple[Any, ...] = cast(tuple[Any, ...], fx.map_arg(node.args, self._read))
        kwargs: dict[str, Any] = cast(dict[str, Any], fx.map_arg(node.kwargs, self._read))
        if node.target is aten.dropout.default and node.args[2] is False:
            return args[0]
        if node.target is aten.sym_size.int:
            return self.graph.call_method("size", args)
        if node.target in _METHODS and not kwargs:
            return self.graph.call_method(_METHODS[node.target], args)
        function = _FUNCTIONS.get(node.target)
        in_place = str(getattr(node.target, "__name__", "")).partition(".")[0].endswith("_")
        overwritten = in_place and len(node.all_input_nodes[0].users) > 1  # what else reads the tensor sees the change
        if function is not None and not kwargs and not overwritten:
            return self.graph.call_function(function, args)
        return self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]

    def _read(self, node: fx.Node) -> Any:
        """What stands for a node of the program; a parameter that is read outside of a layer is registered under its name."""
        if node.op != "get_attr":
            return self.made[node]
        if node not in self.made:
            name = str(node.target)
            owner, _, part = name.rpartition(".")
            place = _place(self.root, owner)
            if part not in place._parameters and part not in place._buffers:
                value = self._value(name)
                if isinstance(value, nn.Parameter):
                    place.register_parameter(part, value)
                else:
                    place.register_buffer(part, value, persistent=name in self.state)
            self.made[node] = self.graph.get_attr(name)
        return self.made[node]

    def _layer(self, node: fx.Node) -> str:
        """The name of the module that computes a node, made where there is none yet; empty where the parameters have no such names."""
        settings, parameters = _LAYERS[node.target](node)
        names = {part: str(value.target) for part, value in parameters.items() if isinstance(value, fx.Node) and value.op == "get_attr"}
        owner = names.get("weight", names.get("running_mean", "")).rpartition(".")[0]
        if not owner or any(names.get(part) != f"{owner}.{part}" for part, value in parameters.items() if value is not None):
            return ""
        if owner in self.layers:
            return owner if self.layers[owner] == settings else ""
        kind, given = settings[0], dict(settings[1])
        values = {part: self._value(name) for part, name in names.items()}
        try:
            with torch.device("meta"):
                module = kind(**given, **_sizes(kind, values, given), **_without(kind, values))
        except (TypeError, ValueError):  # settings that the module does not have
            return ""
        for part in module._parameters.keys() - values.keys():  # a batch-norm of which one was taken out
            module._parameters[part] = None
        for part, value in values.items():
            (module._parameters if part in module._parameters else module._buffers)[part] = value
        place = _place(self.root, owner.rpartition(".")[0])
        if hasattr(place, owner.rpartition(".")[2]):
            return ""
        if "num_batches_tracked" in module._buffers:
            module._buffers["num_batches_tracked"] = torch.tensor(0)
        place.add_module(owner.rpartition(".")[2], module)
        self.layers[owner] = settings
        return owner

    def _value(self, name: str) -> Tensor:
        owner, _, part = name.rpartition(".")
        value = getattr(self.source.get_submodule(owner), part)
        if not isinstance(value, Tensor):
            raise InvalidInput(
                f"model {self.origin}: it branches on its data ({name}), so that no layers can be told; export it without that"
            )
        return value


def _place(root: nn.Module, name: str) -> nn.Module:
    """The module of this name, made with those above it where they are missing."""
    for part in filter(None, name.split(".")):
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root


def _linear(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (nn.Linear, ()), {"weight": _given(node, 1), "bias": _given(node, 2)}


def _convolution(kind: type[nn.Module]) -> Callable[[fx.Node], tuple[tuple[Any, ...], dict[str, Any]]]:
    def read(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = {"stride": _given(node, 3, 1), "padding": _given(node, 4, 0), "dilation": _given(node, 5, 1)}
        sizes = tuple((key, tuple(value) if isinstance(value, (list, tuple)) else value) for key, value in values.items())
        return (kind, (*sizes, ("groups", _given(node, 6, 1)))), {"weight": _given(node, 1), "bias": _given(node, 2)}

    return read


def _norm(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    kind = nn.BatchNorm2d if source.meta["val"].ndim == 4 else nn.BatchNorm1d
    names = ("weight", "bias", "running_mean", "running_var")
    parameters = {part: _given(node, position) for position, part in enumerate(names, start=1)}
    # a norm over the batch itself has no module with statistics
    missing: dict[str, Any] = {} if not _given(node, 5) else {"batch": None}
    return (kind, (("momentum", _given(node, 6)), ("eps", _given(node, 7)), *missing.items())), parameters


def _given(node: fx.Node, position: int, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else default


def _sizes(kind: Any, values: dict[str, Tensor], given: dict[str, Any]) -> dict[str, Any]:
    if kind is nn.Linear:
        return {"in_features": values["weight"].shape[1], "out_features": values["weight"].shape[0]}
    if kind in (nn.Conv1d, nn.Conv2d):
        outputs, inputs, *kernel = values["weight"].shape
        return {"in_channels": inputs * given["groups"], "out_channels": outputs, "kernel_size": tuple(kernel)}
    return {"num_features": len(values["running_mean"])}


def _without(kind: Any, values: dict[str, Tensor]) -> dict[str, bool]:
    return {"affine": "weight" in values} if kind in (nn.BatchNorm1d, nn.BatchNorm2d) else {"bias": "bias" in values}


def _check(model: nn.Module, program: ExportedProgram, origin: str) -> None:
    """Refuses a model that computes something else than the program, on the example saved with it."""
    if program.example_inputs is None:
        raise InvalidInput(f"model {origin}: the program holds no example to check its layers with; export it again with torch.export.save")
    args, kwargs = program.example_inputs
    for given in (*args, *kwargs.values()):
        if not isinstance(given, Tensor):
            raise InvalidInput(f"model {origin}: one input is a {type(given).__name__}; export the model with plain tensors as inputs")
    try:
        with torch.no_grad():
            wanted = outputs_of(program.module()(*args, **kwargs))
            found = outputs_of(model(*args, **kwargs))
    except Exception as error:  # a graph whose parts do not fit together
        raise InvalidInput(f"model {origin}: the program does not run on its own example ({first_line(error)}); export it again") from error
    if not largest_difference(wanted, found) <= AGREES:
        raise InvalidInput(
            f"model {origin}: taken apart into layers, the program computes something else; give the model as package.module:factory"
        )


_LAYERS: dict[Any, Callable[[fx.Node], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    aten.linear.default: _linear,
    aten.conv1d.default: _convolution(nn.Conv1d),
    aten.conv1d.padding: _convolution(nn.Conv1d),
    aten.conv2d.default: _convolution(nn.Conv2d),
    aten.conv2d.padding: _convolution(nn.Conv2d),
    aten.batch_norm.default: _norm,
}
_METHODS: dict[Any, str] = {
    aten.view.default: "reshape",
    aten.reshape.default: "reshape",
    aten.contiguous.default: "contiguous",
    aten.clone.default: "clone",
}
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.relu.default, aten.relu_.default), torch.relu),
    **dict.fromkeys((aten.relu6.default, aten.relu6_.default), F.relu6),
    **dict.fromkeys((aten.hardtanh.default, aten.hardtanh_.default), F.hardtanh),
    **dict.fromkeys((aten.leaky_relu.default, aten.leaky_relu_.default), F.leaky_relu),
    aten.clamp.default: torch.clamp,
    aten.gelu.default: F.gelu,
    aten.silu.default: F.silu,
    aten.sigmoid.default: torch.sigmoid,
    aten.tanh.default: torch.tanh,
    aten.softmax.int: torch.softmax,
    **dict.fromkeys((aten.add.Tensor, aten.add_.Tensor), operator.add),
    **dict.fromkeys((aten.mul.Tensor, aten.mul_.Tensor), operator.mul),
    aten.sub.Tensor: operator.sub,
    aten.cat.default: torch.cat,
    aten.mean.dim: torch.mean,
    aten.flatten.using_ints: torch.flatten,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.squeeze.dim: torch.squeeze,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.permute,
    aten.max_pool1d.default: F.max_pool1d,
    aten.max_pool2d.default: F.max_pool2d,
    aten.avg_pool1d.default: F.avg_pool1d,
    aten.avg_pool2d.default: F.avg_pool2d,
    aten.adaptive_avg_pool1d.default: F.adaptive_avg_pool1d,
    aten.adaptive_avg_pool2d.default: F.adaptive_avg_pool2d,
}
