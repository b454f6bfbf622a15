"""How much each output of a layer counts for the network's outputs: mean squared gradients on calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import calibration as data
from .calibration import Calibration
from .capture import Replica
from .outputs import outputs_of, real
from .quiet import gradients
from .status import first_line

SAMPLES = 2048  # looked at, in whole batches: the mean over them is what counts, and it is known well by then
PROBES = 2  # random directions for each batch


def output_importance(network: Replica, names: Sequence[str], batches: Calibration, seed: int) -> tuple[dict[str, Tensor], str]:
    """For each layer, ``h`` (M,): the mean over samples and positions of ``||d f / d z_j||^2``, the squared gradient of the network's
    outputs with respect to the layer's ``j``-th pre-activation (batch-norm folded in); and a notice where it cannot be had.

    To second order a change ``dz`` of the pre-activations moves the network's outputs by ``sum_j h_j E[dz_j^2]`` in mean square, other
    things equal (the diagonal of the Gauss-Newton matrix). The square norm of the Jacobian is estimated without bias by products with
    random signs (Hutchinson 1990). Layers that no gradient reaches are left out.
    """
    found: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    units = network.units(names)
    signs = _Signs(seed)
    samples = 0
    try:
        for batch in batches:
            for name, gradient in _gradients(network, names, batch, signs):
                G = units[name].view.outputs(gradient).double()
                found[name] = found.get(name, 0.0) + G.square().sum(0)
                rows[name] = rows.get(name, 0) + len(G)
            samples += data.samples(batch)
            if samples >= SAMPLES:
                break
    except RuntimeError as error:  # a user's forward that cannot be differentiated
        return {}, f"the importance of outputs is not known ({first_line(error)}): all outputs of a layer count the same"
    if not found:
        return {}, "the importance of outputs is not known (no gradient of the network's outputs): all outputs of a layer count the same"
    for name, total in found.items():
        fold = units[name].fold
        raw = total / rows[name]
        found[name] = raw if fold is None else torch.where(fold.scale == 0, 0.0, raw / fold.scale.square())
    return {name: h for name, h in found.items() if bool(torch.isfinite(h).all()) and float(h.max()) > 0}, ""


class _Signs:
    """Random signs for each output and probe, the same for a sample whatever batch it comes in."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generators: dict[tuple[int, int], torch.Generator] = {}

    def like(self, Y: Tensor, probe: int, output: int) -> Tensor:
        """Signs of the form of ``Y``, drawn from where the last batch's ended."""
        made = self.generators.setdefault((probe, output), torch.Generator().manual_seed(1000 * self.seed + 10 * output + probe))
        return (torch.randint(0, 2, Y.shape, generator=made) * 2 - 1).to(Y)


def _gradients(network: Replica, names: Sequence[str], batch: Any, signs: _Signs) -> list[tuple[str, Tensor]]:
    """Gradients of random signed sums of the network's outputs with respect to every call of the layers, for one batch."""
    modules = dict(network.model.named_modules())
    calls: list[tuple[str, Tensor]] = []
    handles = []

    def keep(name: str, output: Tensor) -> Tensor:
        if not output.requires_grad:
            output.requires_grad_(True)
        calls.append((name, output))
        return output.clone()  # what follows may change its input in place

    try:
        for name in names:

            def hook(_: nn.Module, given: Any, output: Tensor, name: str = name) -> Tensor:
                return keep(name, output)

            handles.append(modules[name].register_forward_hook(hook))
        with torch.enable_grad():
            outputs = outputs_of(data.forward(network.model, batch, network.device, network.dtype))
            reached = [real(Y) for Y in outputs.scores.values() if Y.requires_grad]
            if not reached or not calls:
                return []
            found: list[tuple[str, Tensor]] = []
            for probe in range(PROBES):
                drawn = [signs.like(Y, probe, output) for output, Y in enumerate(reached)]
                with gradients():
                    given = torch.autograd.grad(reached, [y for _, y in calls], drawn, retain_graph=probe < PROBES - 1, allow_unused=True)
                found += [(name, g) for (name, _), g in zip(calls, given, strict=True) if g is not None]
            return found
    finally:
        for handle in handles:
            handle.remove()
