"""What one node of a traced graph (torch.fx) computes: an activation, a batch-norm, an addition, a pooling, a mere move of values."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import preimage
from .preimage import Activation, Pool

Node = fx.Node


def _softplus(threshold: float, beta: float) -> Activation:
    """Softplus jumps to the identity at its threshold: by less than float32 resolves at the default of 20, by more at smaller ones."""
    return preimage.named("softplus") if threshold >= 20 and beta > 0 else Activation("softplus", exact=False, lipschitz=None)


def _celu(alpha: float) -> Activation:
    return preimage.named("celu") if alpha > 0 else Activation("celu", exact=False, lipschitz=None)


_MODULES: dict[type[nn.Module], Callable[[Any], Activation]] = {
    nn.ReLU: lambda m: preimage.RELU,
    nn.ReLU6: lambda m: preimage.named("relu6"),
    nn.Hardtanh: lambda m: preimage.clamp(m.min_val, m.max_val),
    nn.LeakyReLU: lambda m: preimage.leaky_relu(float(m.negative_slope)),
    nn.ELU: lambda m: preimage.elu(m.alpha),
    nn.CELU: lambda m: _celu(m.alpha),
    nn.Softmax: lambda m: preimage.named("softmax"),
    nn.Softplus: lambda m: _softplus(m.threshold, m.beta),
    **{
        kind: (lambda m, name=name: preimage.named(name))  # type: ignore[misc]
        for kind, name in (
            (nn.Sigmoid, "sigmoid"),
            (nn.Tanh, "tanh"),
            (nn.GELU, "gelu"),
            (nn.SiLU, "silu"),
            (nn.Mish, "mish"),
            (nn.Hardswish, "hardswish"),
            (nn.Hardsigmoid, "hardsigmoid"),
            (nn.SELU, "selu"),
            (nn.LogSigmoid, "logsigmoid"),
            (nn.Softsign, "softsign"),
            (nn.Tanhshrink, "tanhshrink"),
            (nn.Softshrink, "softshrink"),
        )
    },
}

_FUNCTION_NAMES: dict[Any, str] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    F.gelu: "gelu",
    F.silu: "silu",
    F.mish: "mish",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    F.selu: "selu",
    F.logsigmoid: "logsigmoid",
    F.softsign: "softsign",
    F.softmax: "softmax",
    torch.softmax: "softmax",
}
_METHOD_NAMES = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "tanh": "tanh", "softmax": "softmax"}

# maps that change no value, so that an elementwise activation may stand behind them
_PASSING_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Flatten, nn.Unflatten)
_PASSING_FUNCTIONS = {F.dropout, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.transpose, torch.permute}
_PASSING_METHODS = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute", "contiguous", "clone", "unflatten"}


def activation_of(node: Node, modules: Mapping[str, nn.Module]) -> Activation | None:
    """The activation that a graph node computes from its first argument, or ``None``."""
    try:
        return _activation_of(node, modules)
    except (TypeError, ValueError):  # a parameter that is computed in the graph, or one that the activation does not allow
        return None


def _activation_of(node: Node, modules: Mapping[str, nn.Module]) -> Activation | None:
    if node.op == "call_module":
        module = modules[str(node.target)]
        make = _MODULES.get(type(module))
        return make(module) if make and not hooked(module) else None
    if not node.args or not isinstance(node.args[0], Node):
        return None
    if node.op == "call_function":
        if node.target in (F.leaky_relu,):
            return preimage.leaky_relu(float(_argument(node, 1, "negative_slope", 0.01)))
        if node.target is F.hardtanh:
            return preimage.clamp(float(_argument(node, 1, "min_val", -1.0)), float(_argument(node, 2, "max_val", 1.0)))
        if node.target is F.softplus:
            return _softplus(float(_argument(node, 2, "threshold", 20.0)), float(_argument(node, 1, "beta", 1.0)))
        if node.target is F.elu:
            return preimage.elu(float(_argument(node, 1, "alpha", 1.0)))
        if node.target in (torch.clamp, torch.clip):
            return _clamp(node)
        if node.target in (torch.clamp_min, torch.clamp_max):
            return _clamp(node, str(node.target.__name__))
        name = _FUNCTION_NAMES.get(node.target)
        return preimage.named(name) if name else None
    if node.op == "call_method":
        if node.target in ("clamp", "clip", "clamp_", "clip_"):
            return _clamp(node)
        if node.target in ("clamp_min", "clamp_max", "clamp_min_", "clamp_max_"):
            return _clamp(node, str(node.target).rstrip("_"))
        name = _METHOD_NAMES.get(str(node.target))
        return preimage.named(name) if name else None
    return None


def _clamp(node: Node, kind: str = "clamp") -> Activation | None:
    low = None if kind == "clamp_max" else _argument(node, 1, "min", None)
    high = None if kind == "clamp_min" else _argument(node, 2 if kind == "clamp" else 1, "max", None)
    if isinstance(low, (Node, Tensor)) or isinstance(high, (Node, Tensor)) or (low is None and high is None):
        return None
    low = -float("inf") if low is None else float(low)
    high = float("inf") if high is None else float(high)
    if low == 0.0 and high == float("inf"):
        return preimage.RELU
    return preimage.clamp(low, high, "clamp") if low < high else None


def _argument(node: Node, position: int, name: str, default: Any) -> Any:
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[position] if len(node.args) > position else default


# of those, the ones that leave every value where it is
_KEEPING_MODULES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_KEEPING_METHODS = {"contiguous", "clone"}

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
COUNTING = (*NORMS, nn.BatchNorm3d, nn.SyncBatchNorm)  # what counts batches in training, and does not read the count in eval mode
_ADDITIONS = {operator.add, operator.iadd, torch.add}


def keeps_places(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for maps of :func:`passes` that leave the tensor's shape and order as they are."""
    if node.op == "call_module":
        return type(modules[str(node.target)]) in _KEEPING_MODULES
    return node.target is F.dropout if node.op == "call_function" else str(node.target) in _KEEPING_METHODS


def norm_of(node: Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The name of the batch-norm that a node calls, when it is a fixed affine map per channel in eval mode."""
    if node.op != "call_module":
        return None
    module = modules[str(node.target)]
    return str(node.target) if not module.training and has_statistics(module) else None


def has_statistics(module: nn.Module) -> bool:
    """True for a batch-norm that is a fixed affine map per channel in eval mode."""
    return isinstance(module, NORMS) and type(module) in NORMS and not hooked(module) and module.running_mean is not None


def norm_scale(module: nn.Module) -> Tensor:
    """The factor (C,) by which a batch-norm in eval mode multiplies each channel, in float64."""
    assert isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None
    weight = torch.ones_like(module.running_var) if module.weight is None else module.weight.detach()
    return weight.double() / (module.running_var.double() + module.eps).sqrt()


def norm_lipschitz(module: nn.Module) -> float:
    """The largest of a batch-norm's factors, in absolute value."""
    return float(norm_scale(module).abs().max())


def adds(node: Node, current: Node) -> bool:
    """True for the plain sum of ``current`` and something else."""
    if not (node.target in _ADDITIONS if node.op == "call_function" else node.op == "call_method" and node.target in ("add", "add_")):
        return False
    if len(node.args) != 2 or node.kwargs:  # alpha=, out=
        return False
    return sum(argument is current for argument in node.args) == 1 and all(isinstance(a, (Node, int, float)) for a in node.args)


def adds_number(node: Node) -> bool:
    """True for the sum of a tensor and a number."""
    return len(node.all_input_nodes) == 1 and adds(node, node.all_input_nodes[0])


def pool_of(node: Node, modules: Mapping[str, nn.Module]) -> Pool | None:
    """The max-pooling over disjoint windows that a node computes, or ``None``."""
    return _disjoint(_window(node, modules, "max"))


def pool_of_module(module: nn.Module) -> Pool | None:
    """The max-pooling over disjoint windows that a module computes, or ``None``."""
    return _disjoint(_module_window(module, "max"))


def _disjoint(found: Window | None) -> Pool | None:
    if found is None:
        return None
    kernel, stride, padding, dilation, ceil = found
    plain = kernel == stride and not any(padding) and all(d == 1 for d in dilation) and not ceil
    return Pool(kernel) if plain else None


def pooling_lipschitz(node: Node, modules: Mapping[str, nn.Module]) -> float | None:
    """The Lipschitz constant of a pooling (docs/theory.md, 4.4), or ``None`` for anything else."""
    found = _window(node, modules, "max")
    if found is not None:
        kernel, stride, _, dilation, _ = found
        steps = zip(kernel, stride, dilation, strict=True)
        return math.sqrt(math.prod(math.ceil(k * math.gcd(s, d) / s) for k, s, d in steps))
    found = _window(node, modules, "avg")
    if found is not None:
        return None if found[4] or any(found[2]) else 1.0
    if node.op == "call_module" and isinstance(modules[str(node.target)], (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)):
        size = modules[str(node.target)].output_size
        return 1.0 if all(n == 1 for n in (size if isinstance(size, tuple) else (size,))) else None
    if node.op == "call_function" and node.target in (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d):
        size = _argument(node, 1, "output_size", None)
        return 1.0 if all(n == 1 for n in (size if isinstance(size, (tuple, list)) else (size,))) else None
    if (node.op == "call_method" and node.target == "mean") or (node.op == "call_function" and node.target is torch.mean):
        return 1.0 if not any(isinstance(a, Node) for a in node.args[1:]) else None
    return None


_MAX: dict[Any, int] = {nn.MaxPool1d: 1, nn.MaxPool2d: 2}
_AVG: dict[Any, int] = {nn.AvgPool1d: 1, nn.AvgPool2d: 2}
_MAX_FUNCTIONS: dict[Any, int] = {F.max_pool1d: 1, F.max_pool2d: 2, torch.max_pool1d: 1, torch.max_pool2d: 2}
_AVG_FUNCTIONS: dict[Any, int] = {F.avg_pool1d: 1, F.avg_pool2d: 2}
Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]


def _window(node: Node, modules: Mapping[str, nn.Module], kind: str) -> Window | None:
    """Kernel, stride, padding, dilation and ceil_mode of a pooling."""
    if node.op == "call_module":
        return _module_window(modules[str(node.target)], kind)
    if node.op != "call_function":
        return None
    dims = (_MAX_FUNCTIONS if kind == "max" else _AVG_FUNCTIONS).get(node.target)
    if dims is None or node.kwargs.get("return_indices") or node.kwargs.get("divisor_override"):
        return None
    kernel, stride = _argument(node, 1, "kernel_size", None), _argument(node, 2, "stride", None)
    padding = _argument(node, 3, "padding", 0)
    spread = _argument(node, 4, "dilation", 1) if kind == "max" else 1
    ceil = _argument(node, 5 if kind == "max" else 4, "ceil_mode", False)
    return _sizes((kernel, kernel if stride is None else stride, padding, spread), ceil, dims)


def _module_window(module: nn.Module, kind: str) -> Window | None:
    dims = (_MAX if kind == "max" else _AVG).get(type(module))
    if dims is None or hooked(module) or getattr(module, "return_indices", False) or getattr(module, "divisor_override", None):
        return None
    own: Any = module
    return _sizes((own.kernel_size, own.stride, own.padding, own.dilation if kind == "max" else 1), own.ceil_mode, dims)


def _sizes(values: tuple[Any, Any, Any, Any], ceil: Any, dims: int) -> Window | None:
    """Kernel, stride, padding and dilation as one number for each dimension; ``None`` for what the graph computes."""
    sizes = [value if isinstance(value, (tuple, list)) else (value,) * dims for value in values]
    if any(not isinstance(n, int) for size in sizes for n in size):
        return None
    tuples = [tuple(int(n) for n in size) for size in sizes]
    return tuples[0], tuples[1], tuples[2], tuples[3], bool(ceil)


def passes(node: Node, modules: Mapping[str, nn.Module]) -> bool:
    """True for maps that only move values about: the identity, dropout in eval mode, reshaping."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) in _PASSING_MODULES and not hooked(module)
    if node.op == "call_function":
        if node.target is F.dropout:
            return _argument(node, 2, "training", True) is False
        return node.target in _PASSING_FUNCTIONS
    return node.op == "call_method" and str(node.target) in _PASSING_METHODS


def hooked(module: nn.Module) -> bool:
    """True when hooks may change what the module gives; tracing does not see them."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def reads_shape(node: Node) -> bool:
    """True for nodes that only ask for sizes, which no weight changes."""
    if node.op == "call_method" and node.target in ("size", "dim", "numel"):
        return True
    if node.op == "call_function" and node.target is getattr and node.args[1] in ("shape", "ndim", "device", "dtype"):
        return True
    if node.op == "call_function" and node.target in (operator.getitem, operator.mul, operator.floordiv):
        return all(reads_shape(argument) for argument in node.all_input_nodes) and bool(node.all_input_nodes)
    return False


def label(node: Node, modules: Mapping[str, nn.Module]) -> str:
    """What a node is, for messages."""
    if node.op == "call_module":
        return f"{node.target} ({type(modules[str(node.target)]).__name__})"
    if node.op == "placeholder":
        return "the input"
    return str(getattr(node.target, "__name__", node.target))
