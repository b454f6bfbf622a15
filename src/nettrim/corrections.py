"""A user's corrections of what is read of a layer: read from their plain form, checked on data, and put on the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from . import preimage
from .capture import Replica
from .graph import Graph
from .layers import LayerView
from .methods.targets import lookup
from .nodes import has_statistics, norm_scale, pool_of_module
from .outputs import allowance
from .preimage import Activation
from .reading import PARTS, Correction
from .selection import resolve
from .status import InvalidInput, UnknownLayer

Parts = Mapping[str, str | Activation | None]


def corrections_of(
    readings: Mapping[str, Parts], activations: Mapping[str, str | Activation], names: Sequence[str], modules: Mapping[str, nn.Module]
) -> dict[str, Correction]:
    """Corrections by layer, from ``readings`` (layer or ``re:pattern`` to parts) and ``activations`` (the same, to activations alone).

    Raises:
        InvalidInput: a part or a value that is not known, a module that is not what it is named as, or an activation that is stated twice.
        UnknownLayer: a layer or a module that the model does not have.
    """
    for what, given in (("readings", readings), ("activations", activations)):
        if not isinstance(given, Mapping):
            raise InvalidInput(f"{what} must be a mapping by layer name, found {type(given).__name__}")
        odd = [key for key in given if not isinstance(key, str)]
        if odd:
            raise InvalidInput(f"{what} must be a mapping by layer name, found the key {odd[0]!r}; names are strings, such as '0'")
        resolve(given, names, what)
    made = {key: _correction(f"readings[{key!r}]", value, modules) for key, value in readings.items()}
    stated = {key: _activation(f"activations[{key!r}]", value) for key, value in activations.items()}
    found: dict[str, Correction] = {}
    for name in names:
        correction, activation = lookup(made, name), lookup(stated, name)
        if correction is not None and activation is not None:
            if "activation" in correction.said:
                raise InvalidInput(f"layer {name!r}: its activation is given in readings= and in activations=; leave one of them out")
            correction = replace(correction, said=correction.said | {"activation"}, activation=activation)
        elif activation is not None:
            correction = Correction(frozenset({"activation"}), activation)
        if correction is not None:
            _check_fit(name, correction, modules)
            found[name] = correction
    return found


def _correction(what: str, parts: Parts, modules: Mapping[str, nn.Module]) -> Correction:
    if not isinstance(parts, Mapping) or not parts:
        raise InvalidInput(f"{what} must name at least one of the parts {', '.join(PARTS)}, found {parts!r}; write {{'norm': None}}, say")
    for part in parts:
        if part not in PARTS:
            near = get_close_matches(str(part), PARTS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InvalidInput(f"{what}: there is no part {part!r}; {hint}(parts: {', '.join(PARTS)})")
    if parts.get("branch") is not None:
        raise InvalidInput(f"{what}: a branch can only be taken out (None), found {parts['branch']!r}; sums are seen in traced graphs only")
    norm, pooling = (_module(what, part, parts.get(part), modules) for part in ("norm", "pool"))
    if norm is not None and not has_statistics(modules[norm]):
        raise InvalidInput(f"{what}: norm must name a BatchNorm1d or BatchNorm2d with running statistics and without hooks, found {norm!r}")
    pool = None if pooling is None else pool_of_module(modules[pooling])
    if pooling is not None and pool is None:
        raise InvalidInput(f"{what}: pool must name a MaxPool1d or MaxPool2d over windows that do not overlap, found {pooling!r}")
    value = parts.get("activation")
    activation = None if value is None else _activation(f"{what}['activation']", value)
    return Correction(frozenset(parts), activation, norm, pooling, pool)


def _module(what: str, part: str, value: object, modules: Mapping[str, nn.Module]) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidInput(f"{what}: {part} must be the name of a module, or None to take it out, found {value!r}")
    if value not in modules:
        near = get_close_matches(value, [name for name in modules if name], n=1, cutoff=0.0)
        raise UnknownLayer(
            f"{what}: the model has no module {value!r}; " + (f"the nearest is {near[0]!r}" if near else "it has none inside")
        )
    return value


def _activation(what: str, value: object) -> Activation:
    if not isinstance(value, (str, Activation)):
        raise InvalidInput(f"{what} must be the name of an activation, such as 'relu', found {value!r}")
    activation = value if isinstance(value, Activation) else preimage.named(value)
    if preimage.named(activation.name) != activation:  # the certificate names the activation, and nothing else of it
        raise InvalidInput(f"{what}: its name {activation.name!r} means another activation; make it with nettrim.preimage.named(...)")
    return activation


def _check_fit(name: str, correction: Correction, modules: Mapping[str, nn.Module]) -> None:
    """Refuses a batch-norm of another width, and max-pooling behind a layer that puts out no maps."""
    view = LayerView(name, modules[name])
    if correction.norm is not None and len(norm_scale(modules[correction.norm])) != view.shape[1]:
        width = len(norm_scale(modules[correction.norm]))
        raise InvalidInput(f"layer {name!r} has {view.shape[1]} outputs, batch-norm {correction.norm!r} {width} channels; name its own")
    if correction.pool is not None:
        conv = view.convolution
        if conv is None or len(conv.kernel_size) != len(correction.pool.kernel):
            raise InvalidInput(f"layer {name!r} ({view.kind}) puts out no maps that {correction.pooling!r} could pool; leave pool out")


def corrected_graph(reference: Replica, graph: Graph, corrections: Mapping[str, Correction], batch: Any) -> Graph:
    """The graph as corrected, once the modules that corrections name were seen on ``batch`` to stand where they are said to stand.

    Raises:
        InvalidInput: a named module gets something else than what the layer gives, or belongs to another layer.
    """
    found = graph.corrected(reference.model, corrections)
    owners: dict[str, str] = {}
    for name, reading in found.readings.items():
        if reading.norm and owners.setdefault(reading.norm, name) != name:
            raise InvalidInput(
                f"batch-norm {reading.norm!r} would be folded into {owners[reading.norm]!r} and into {name!r}; take it out of one of them "
                "with readings={...: {'norm': None}}"
            )
    named = [name for name, correction in corrections.items() if correction.norm is not None or correction.pool is not None]
    if not named:
        return found
    replica = replace(reference, graph=found)
    modules = dict(reference.model.named_modules())
    wanted = {module for name in named for module in (corrections[name].norm, corrections[name].pooling) if module is not None}
    inputs: dict[str, list[Tensor]] = {module: [] for module in wanted}
    handles = []
    try:
        for module in wanted:

            def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], module: str = module) -> None:
                inputs[module].append(next(iter((*given, *named.values()))).clone())

            handles.append(modules[module].register_forward_pre_hook(before, with_kwargs=True))
        calls, _ = replica.calls(batch, named)
    finally:
        for handle in handles:
            handle.remove()
    units = replica.units(named)
    for name in named:
        correction, unit = corrections[name], units[name]
        outputs = [call.native().y for call in calls[name]]
        if correction.norm is not None:
            if unit.view.convolution is None and any(y.ndim != 2 for y in outputs):
                raise InvalidInput(
                    f"layer {name!r}: its outputs are not (samples, channels), so batch-norm {correction.norm!r} cannot be its"
                )
            _refuse_others(name, "batch-norm", correction.norm, _same(outputs, inputs[correction.norm], 0.0))
        if correction.pooling is not None:
            if not unit.reading.activation.exact:
                raise InvalidInput(f"layer {name!r}: with pool, state its activation too ('identity' for none): it is not known")
            full = [unit.full(call.native()) for call in calls[name]]
            active = [unit.reading.activation.apply(z) for z in full]
            given, precision = inputs[correction.pooling], allowance(reference.precision)
            # a nondecreasing activation and max-pooling may stand in either order
            _refuse_others(name, "max-pooling", correction.pooling, _same(active, given, precision) or _same(full, given, precision))
    return found


def _refuse_others(name: str, what: str, module: str, fits: bool) -> None:
    if not fits:
        raise InvalidInput(
            f"readings[{name!r}]: on the first batch {what} {module!r} does not get what layer {name!r} gives (other values, another shape "
            "or another number of calls); name the module that follows the layer, or None"
        )


def _same(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: float) -> bool:
    """Whether two lists of tensors agree up to ``tolerance``, relative to the largest entry."""
    return len(expected) == len(found) and all(
        a.shape == b.shape and bool(torch.allclose(a.double(), b.double(), rtol=0.0, atol=tolerance * float(a.abs().max())))
        for a, b in zip(expected, found, strict=True)
    )
