"""Link normalisation: a network whose layers all have ``||W_l||_1 = 1`` (sum of absolute entries), and the way back.

Source: Aghasi, Abdi, Nguyen, Romberg, "Net-Trim", NIPS 2017 (arXiv 1611.05162); docs/theory.md, 4.3. With ``c_l = ||W_l||_1`` and the
running product ``C_l = c_1 ... c_l``, the normalised network has in layer l

    W_l / c_l,    b_l / C_l,    and so puts out    X_l / C_l,

because every map s between layers is positively homogeneous, ``s(t z) = t s(z)`` for t > 0: ReLU, LeakyReLU, the identity, dropout in
eval mode, flattening. Its output is ``f(x) / C_L``. Whoever prunes it and multiplies back gets a network with the same relative
discrepancies ``||X_hat_l - X_l||_F / ||X_l||_F``, layer by layer; meanwhile the published bounds are plain sums (parallel:
``sum_j eps_j``) and products (cascade: ``eps_1 sqrt(prod gamma_j)``).

The way back is exact. Division by c and multiplication by c in float64 each err by at most ``u = 2^-53`` relative, so ``(w / c) c`` lies
within ``(2 u + u^2) |w|`` of w. Half a unit of float32 is at least ``2^-25 |w|``, also below a power of two and for subnormals (whose units
are relatively coarser): rounding to float32, and the more so to float16 or bfloat16, gives w itself, zeros with their signs included. A
float64 entry comes back within one unit in its last place. This needs quotients that float64 holds in full precision: an entry that
would be divided to below ``2^-1022`` or beyond the largest number is refused. A single layer of float32 cannot cause that; the running
product of many layers of extreme norm can.

Weights that have been pruned since are rounded to the original dtype when they are restored: relative discrepancies of a float32
network are then equal up to float32's rounding, of a float64 network up to float64's.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from . import calibration as data
from .calibration import Batches, Calibration
from .capture import Replica, device_of, random_state_kept, reference_replica, scan
from .graph import Graph, read
from .layers import view
from .nodes import activation_of, adds_number, norm_of
from .nodes import label as label_of
from .outputs import disagreement
from .preimage import Activation
from .selection import select
from .status import InvalidInput
from .trained import state_key
from .wrappers import takes_models

_SMALLEST = torch.finfo(torch.float64).tiny  # below it, numbers lose digits
_RANGE = f"[{_SMALLEST:.3g}, {torch.finfo(torch.float64).max:.3g}]"


@dataclass(frozen=True, eq=False)
class LinkNormalised:
    """A link-normalised copy of a network.

    ``model`` is in float64 on the device of the original, in the same mode (train or eval), with ``||W_l||_1 = 1`` in every layer.
    ``scales`` maps each layer's name, in the order of the calls, to its ``||W_l||_1`` before. ``dtypes`` holds the original dtype of every
    parameter and buffer.
    """

    model: nn.Module
    scales: Mapping[str, float]
    dtypes: Mapping[str, torch.dtype]

    @property
    def output_scale(self) -> float:
        """``C_L``, the product of the scales: the original's output is this times the normalised network's."""
        return math.prod(self.scales.values())

    @takes_models("model")
    def restore(self, model: nn.Module) -> nn.Module:
        """A copy of ``model``, the normalised network or a pruned version of it, with weights and biases multiplied back.

        Multiplies in float64 and casts every tensor to its original dtype; ``model`` is left unchanged.

        Raises:
            InvalidInput: a model with other layers or shapes, NaN or inf, or restored weights beyond the range of their dtype.
        """
        _refuse_other(model, self.model)
        twin = copy.deepcopy(model)
        twin.zero_grad(set_to_none=True)
        for name, layer, scale, product in _layers(twin, self.scales):
            view(name, layer)
            for label, factor in (("weight", scale), ("bias", product)):
                parameter = getattr(layer, label)
                if parameter is not None:
                    parameter.data = _cast(parameter.detach().double() * factor, self.dtypes[state_key(name, label)], name, label)
        # what the layers do not own was only made wider
        for key, tensor in _tensors(twin):
            tensor.data = tensor.detach().to(self.dtypes[key])
        return twin


@takes_models("model")
def normalise(model: nn.Module, example: Batches) -> LinkNormalised:
    """A copy of a chain of layers with ``||W_l||_1 = 1`` in every layer, and the scales that lead back; ``model`` is left unchanged.

    Args:
        model: layers joined by positively homogeneous maps (above). What comes before the first layer is free.
        example: a few inputs, in any of the forms that :func:`nettrim.prune` takes as calibration data, on which the model is traced.

    Raises:
        InvalidInput: not such a chain (other activations, batch-norm, pooling, branches, tied or repeated layers), a layer whose weights
            are all zero, or entries that float64 cannot hold when divided; the message names the layer or step.
    """
    _refuse_ties(model)
    names = select(model, None, ())
    batches = Calibration(example, "example")
    place = device_of(model, None)
    with random_state_kept(place):
        first = next(iter(batches))
        reference, notice = reference_replica(model, place, first)
        if notice:
            raise InvalidInput(f"normalise works in float64: {notice}; let the model accept float64 inputs")
        found = scan(reference, names, batches, math.inf)  # nothing is squared
        for name in names:
            if name not in found.order:
                raise InvalidInput(f"layer {name!r} is never called on the example: remove it from the model, or give inputs that reach it")
        graph, steps = _read(reference, names, first)
    order = _chain_of(graph, names)
    _refuse_inhomogeneous(graph, steps, reference.model, order)
    twin = copy.deepcopy(model).to(place)
    dtypes = {key: tensor.dtype for key, tensor in _tensors(twin)}
    twin = twin.double()
    twin.zero_grad(set_to_none=True)
    modules = dict(twin.named_modules())
    scales = {name: float(cast(nn.Linear, modules[name]).weight.detach().abs().sum()) for name in order}
    for name, layer, scale, product in _layers(twin, scales):
        if scale == 0:
            raise InvalidInput(
                f"layer {name!r}: its weights must not all be zero to have ||W||_1 = 1; remove the layer or retrain the model"
            )
        if not (_SMALLEST <= scale < math.inf and _SMALLEST <= product < math.inf):
            raise InvalidInput(
                f"layer {name!r}: ||W||_1 and the product of all up to here must lie within {_RANGE}, where float64 keeps all digits; "
                f"found {scale:.3g} and {product:.3g}: scale the model's weights"
            )
        for label, divisor in (("weight", scale), ("bias", product)):
            parameter = getattr(layer, label)
            if parameter is not None:
                parameter.data = _divided(parameter.detach(), divisor, name, label)
    return LinkNormalised(twin, scales, dtypes)


def _layers(model: nn.Module, scales: Mapping[str, float]) -> Iterator[tuple[str, nn.Linear, float, float]]:
    """Name, module, ``c_l`` and ``C_l`` of each layer in order."""
    modules = dict(model.named_modules())
    for (name, scale), product in zip(scales.items(), itertools.accumulate(scales.values(), operator.mul), strict=True):
        yield name, cast(nn.Linear, modules[name]), scale, product


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, those that are not in the state dict included."""
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _divided(tensor: Tensor, divisor: float, name: str, label: str) -> Tensor:
    """``tensor / divisor``, where that can be undone."""
    divided = tensor / divisor
    if bool(((tensor != 0) & ((divided.abs() < _SMALLEST) | ~torch.isfinite(divided))).any()):
        what = "||W||_1" if label == "weight" else "the product of ||W||_1 up to here"
        raise InvalidInput(
            f"layer {name!r}: its {label} divided by {what} = {divisor:.3g} must stay within {_RANGE}, where float64 keeps all digits, "
            "but has an entry outside; set entries that are next to nothing to zero, or scale the model's weights"
        )
    return divided


def _cast(tensor: Tensor, dtype: torch.dtype, name: str, label: str) -> Tensor:
    narrow = tensor.to(dtype)
    if not bool(torch.isfinite(narrow).all()):
        raise InvalidInput(
            f"layer {name!r}: its restored {label} must fit into {dtype}, found entries up to {float(tensor.abs().max()):.3g}; "
            "was this model normalised, or pruned from it?"
        )
    return narrow


def _read(reference: Replica, names: Sequence[str], batch: object) -> tuple[Graph, list[fx.Node]]:
    """The reading of the model, and the nodes of the graph that it was read from; that graph computes what the model does."""
    steps: list[fx.Node] = []

    def agrees(module: nn.Module) -> bool:
        steps.extend(cast(fx.GraphModule, module).graph.nodes)
        traced = Replica(module, reference.device, reference.dtype)
        return not disagreement(reference.run(batch), traced.run(batch), reference.precision)

    graph = read(reference.model, names, given=data.keywords_of(batch), agrees=agrees)
    return graph, steps


def _chain_of(graph: Graph, names: Sequence[str]) -> list[str]:
    """The layers in the order of the chain, which must be the whole network."""
    if graph.chain.reason:
        cause = graph.notice or graph.chain.reason
        raise InvalidInput(
            f"normalise needs one chain of layers from input to output, joined by positively homogeneous maps: {cause}; "
            "rewrite the model, or use nettrim.prune without normalising (its bounds do not need it)"
        )
    order = [step.layer for step in graph.chain.steps if step.layer is not None]
    missing = [name for name in names if name not in order]
    if missing:
        raise InvalidInput(f"layer {missing[0]!r} is not on the path from input to output: remove it from the model")
    return order


def _refuse_inhomogeneous(graph: Graph, steps: Sequence[fx.Node], model: nn.Module, order: Sequence[str]) -> None:
    """Refuses activations behind the first layer that are not positively homogeneous.

    The chain is known to consist of layers, activations, and maps that only move values about. Its readings name one activation per layer;
    the nodes show those that follow another one, too.
    """
    for name in order:
        _check_homogeneous(graph.readings[name].activation, f"layer {name!r} is followed by")
    modules = dict(model.named_modules())
    behind, last = False, ""
    for node in steps:
        if node.op == "call_module" and str(node.target) in order:
            behind, last = True, str(node.target)
        elif behind and (norm_of(node, modules) is not None or adds_number(node)):
            raise InvalidInput(
                f"{label_of(node, modules)} is an affine map of its own: link normalisation needs layers "
                "joined by positively homogeneous maps; fold it into its layer first (torch.nn.utils.fusion.fuse_conv_bn_eval)"
            )
        elif behind and (activation := activation_of(node, modules)) is not None:
            _check_homogeneous(activation, f"step {node.name!r} behind layer {last!r} is")


def _check_homogeneous(activation: Activation, where: str) -> None:
    # s(t z) = t s(z): a clamp at 0 or nowhere, with a slope of its own below zero or not
    if not (activation.exact and activation.low in (-math.inf, 0.0) and activation.high in (0.0, math.inf)):
        raise InvalidInput(
            f"{where} {activation.name}, which is not known to be positively homogeneous: link normalisation needs ReLU, LeakyReLU "
            "(slope in [0, 1]) or no activation; take a softmax off the end, or use nettrim.prune without "
            "normalising (its bounds do not need it)"
        )


def _refuse_ties(model: nn.Module) -> None:
    """A parameter with two owners cannot be divided by two scales."""
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        if first != name:
            raise InvalidInput(
                f"{first!r} and {name!r} are one parameter, which each layer would scale its own way; give each its own copy"
            )


def _refuse_other(model: nn.Module, normalised: nn.Module) -> None:
    """Refuses a model whose parameters and buffers have other names or shapes than the normalised one's."""
    given, wanted = ({key: f"a tensor of shape {tuple(tensor.shape)}" for key, tensor in _tensors(m)} for m in (model, normalised))
    for key in [*wanted, *given]:
        need, found = wanted.get(key, "nothing"), given.get(key, "nothing")
        if need != found:
            raise InvalidInput(
                f"restore: model must be the normalised network or a pruned version of it; under {key!r} it must hold {need}, found {found}"
            )
