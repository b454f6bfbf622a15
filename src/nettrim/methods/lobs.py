"""Layer-wise optimal brain surgeon (L-OBS: Dong, Chen, Pan, NIPS 2017, arXiv 1705.07565), and what its shortcuts cost (docs/lobs.md).

The layer's error is ``E = 1/n ||Z_hat - Z||_F^2`` of its pre-activations over ``n`` rows, on the inputs at hand. Its Hessian is one
block ``Psi = 1/n sum y y^T`` for every output, ``y`` the layer's input with a 1 for the bias. With ``G = Psi^-1``, removing the weight
``q`` of an output costs ``theta_q^2 / (2 G_qq)``, and its other weights move by ``-theta_q / G_qq G_:q``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from ..patterns import UNSTRUCTURED, Pattern
from ..program import LayerProgram
from ..solution import Solution, Watch
from ..status import InvalidInput, Status
from .linear import check_positive, live_inputs, own_weights, response_change
from .obs import least_squares, mask_by_cost, removal_order
from .settings import settings
from .targets import PerLayer, check_target, target_for, weights_kept

FORMS = ("published", "refitted", "greedy")
INVERSES = ("factorisation", "recursion")
INVERTED = 1e-3  # no entry of H G may be farther from that of the identity
RECURSION_ROWS = 256  # rows that one step of the recursion takes in
PARTS = 32  # in so many parts the walk along the sorted weights begins

Build = Callable[[int], Tensor]
"""From a number of removed weights to the layer's weights and biases (N + 1, M)."""


@settings
class LOBS:
    """L-OBS on each layer by itself: sensitivities sorted once, over the whole layer; the cheapest weights go, and each time the others of
    that output move. Give exactly one of ``sparsity`` and ``error``, a number or a mapping by layer (or ``re:pattern``).

    As published, biases are rows like the others: they move, and they are removed where they are as cheap as the weights that go. They are
    not counted in a sparsity. Weights that are zero already stay zero. Layers behind batch-norm without a bias of their own have no such
    row. The paper's scheme is ``"parallel"``. Other one-shot methods here leave biases as they are.

    Args:
        sparsity: the fraction of zeros among the weights, in [0, 1).
        error: weights go, in their order, as long as the layer's response moves by no more than ``error * ||Y||_F``, ``Y`` its reference
            output: the paper's threshold on ``sqrt(E)`` is this over ``sqrt(n)``. In the cascade, movement counts from the layer's own
            response to the pruned inputs; what those inputs cost is added to the tolerance that is stated.
        iterative: alternate with retraining. ``nettrim.prune`` sees no labels and refuses it; :func:`nettrim.alternate` does it.
        form: ``"published"``; ``"refitted"``: the published choice of weights, then the least-squares weights on it; ``"greedy"``: exact
            OBS, sensitivities anew after every removal, and the bias never removed. Each costs more time and less error.
        inverse: ``"factorisation"`` (one Cholesky decomposition) or ``"recursion"`` (rows taken in one after the other by Woodbury's
            identity, as published): the same matrix.
        damping: what is added to the diagonal of ``Psi``. The published start of the recursion, ``10^6 I``, is 1e-6.
        keep_bias: biases move but are never removed.

    Raises:
        InvalidInput: not exactly one target, a setting outside its range, or (when solving) a Hessian that cannot be inverted.
    """

    sparsity: PerLayer | None = None
    error: PerLayer | None = None
    iterative: bool = False
    form: Literal["published", "refitted", "greedy"] = "published"
    inverse: Literal["factorisation", "recursion"] = "factorisation"
    damping: float = 1e-6
    keep_bias: bool = False

    def __post_init__(self) -> None:
        given = [name for name in ("sparsity", "error") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidInput(f"LOBS needs exactly one of sparsity and error; found {' and '.join(given) or 'none'}")
        check_target("LOBS", given[0], self.targets)
        for name, allowed in (("form", FORMS), ("inverse", INVERSES)):
            if getattr(self, name) not in allowed:
                raise InvalidInput(f"LOBS: {name} must be one of {', '.join(map(repr, allowed))}, found {getattr(self, name)!r}")
        for name in ("iterative", "keep_bias"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidInput(f"LOBS: {name} must be True or False, found {getattr(self, name)!r}")
        check_positive("LOBS", "damping", self.damping)

    correction = 1.0
    program = "none"
    needs_cascade = ""
    certified_program = ""
    weighs_outputs = False

    @property
    def kind(self) -> str:
        """``"sparsity"``, or ``"epsilon"`` for a tolerance."""
        return "epsilon" if self.sparsity is None else "sparsity"

    @property
    def targets(self) -> PerLayer:
        """The sparsity or the error: a number, or a mapping by layer."""
        value = self.error if self.sparsity is None else self.sparsity
        assert isinstance(value, (int, float, Mapping))
        return value

    @property
    def layer_settings(self) -> dict[str, PerLayer]:
        """The target, by its name. ``prune`` asks for it before it reads any data, so an iterative method is refused here.

        Raises:
            InvalidInput: ``iterative``.
        """
        if self.iterative:
            raise InvalidInput(
                "LOBS: iterative=True alternates with retraining, which prune cannot do (it sees no labels); "
                "call nettrim.alternate(model, calibration, method, retrain), or leave iterative out"
            )
        return {"error" if self.sparsity is None else "sparsity": self.targets}

    @property
    def chosen(self) -> Pattern:
        """Any set of weights may stay."""
        return UNSTRUCTURED

    def describe(self) -> str:
        """One line for tables: the method, and the settings that are not its defaults."""
        changed = {item.name: getattr(self, item.name) for item in fields(self)[2:] if getattr(self, item.name) != item.default}
        words = [name.replace("_", " ") if value is True else f"{name} {value}" for name, value in changed.items()]
        return ", ".join(["LOBS", *words])

    def target(self, layer: str) -> float | None:
        """The target of that layer; ``None`` when a mapping does not name it."""
        return target_for(self.targets, layer)

    def solve(self, program: LayerProgram, target: float, watch: Watch | None = None) -> Solution:
        """Removes weights until the sparsity or the error is met."""
        layer = Rows.of(program, self.damping, self.inverse)
        number = program.weights.numel()
        walk = None
        if self.form == "greedy":
            build = layer.greedy(live_inputs(program))
        else:
            walk = Walk(layer, self.keep_bias)
            build = walk.built if self.form == "published" else walk.refitted
        if self.sparsity is not None:
            kept = weights_kept("LOBS", UNSTRUCTURED, target, program.name, *program.weights.shape)
            removed = max(number - kept, int((program.weights == 0).sum()))
            V = build(removed)
            used = None
        else:
            tolerance = target * program.reference_norm

            def fits(V: Tensor, count: int) -> bool:
                moved = layer.moved(V)
                if watch is not None:
                    watch(count, moved, 1 - count / number)
                return moved <= tolerance

            # refitted and greedy: supports shrink one inside the other and every one has its best weights, so the error rises
            V, removed = walk.while_it_fits(fits) if walk is not None and self.form == "published" else _most(build, number, fits)
            used = tolerance + program.original_distance()  # by the triangle inequality; in the parallel scheme the second term is 0
        W, b = layer.stored(V)
        lost = 0 if not layer.has_bias else int(((V[-1] == 0) & (layer.V[-1] != 0)).sum())
        notes = (f"{lost} of {W.shape[1]} biases were removed",) if lost else ()
        distance = program.distance(W, b)
        return Solution(W, b, Status.CONVERGED, distance, removed, tolerance=used, tolerance_used=used, notes=notes)


@dataclass(frozen=True)
class Rows:
    """A layer as L-OBS sees it: ``V`` (n, M), its own weights and, in the last row where ``has_bias``, its own biases; ``H`` (n, n) the
    damped Hessian ``Psi`` and ``G`` its inverse; ``second`` the second moments (N + 1, N + 1) of the program's inputs and bias column."""

    program: LayerProgram
    V: Tensor
    H: Tensor
    G: Tensor
    second: Tensor
    has_bias: bool

    @classmethod
    def of(cls, program: LayerProgram, damping: float, inverse: str) -> Rows:
        """The rows of a program. Raises InvalidInput when the Hessian cannot be inverted."""
        W, fold = own_weights(program), program.fold
        # behind batch-norm a layer mostly has no bias, and batch-norm's own offset is no weight of the layer
        own_bias = program.bias if fold is None else (fold.bias if fold.home == "layer" else None)
        extended = program.inputs if program.bias_column is None else torch.cat([program.inputs, program.bias_column[:, None]], 1)
        second = extended.T @ extended
        n = W.shape[0] + (own_bias is not None)
        H = second[:n, :n] / program.rows
        H.diagonal().add_(damping)
        if inverse == "recursion":
            G = recursive_inverse(extended[:, :n], program.rows, damping)
        else:
            factor = torch.linalg.cholesky_ex(H).L
            # torch raises for a zero on the diagonal, and for nothing else that is no inverse
            G = torch.cholesky_inverse(factor) if bool((factor.diagonal() > 0).all()) else torch.full_like(H, torch.nan)
        residual = H @ G
        residual.diagonal().sub_(1)
        if not float(residual.abs().max()) <= INVERTED:  # a nan is no inverse
            raise InvalidInput(
                f"LOBS: layer {program.name!r}: the Hessian of its inputs must be invertible, and is not in float64 with "
                f"damping {damping:g} (mean diagonal {float(H.diagonal().mean()):.3g}); raise damping"
            )
        V = W if own_bias is None else torch.cat([W, own_bias[None].double()])
        return cls(program, V, H, G, second, own_bias is not None)

    def stored(self, V: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights and bias of the program, as they will be stored, for the layer's own ``V``."""
        program, fold = self.program, self.program.fold
        W, b = (V[:-1], V[-1]) if self.has_bias else (V, program.bias)
        if fold is not None:
            W = fold.weights(W)
            b = fold.scale * (b - fold.mean) + fold.beta if self.has_bias and b is not None else program.bias
        return program.stored(W, b)

    def moved(self, V: Tensor) -> float:
        """``||Z_hat - Z||_F`` in the program's own coordinates, of the weights as they will be stored."""
        W, b = self.stored(V)
        change = W.double() - self.program.weights
        if b is not None and self.program.bias is not None:
            change = torch.cat([change, (b.double() - self.program.bias)[None]])
        return response_change(self.second, change)

    def greedy(self, live: Tensor) -> Build:
        """Exact OBS with the bias included, which eliminates it: removals see the inverse's block of the weights.

        Weights of inputs that are zero throughout (``live`` (N,) is False) go first.
        """
        N, M = len(live), self.V.shape[1]
        alive = live.nonzero()[:, 0]
        G = self.G[alive[:, None], alive]
        H = self.H[alive[:, None], alive]
        to_bias = self.H[-1, alive] / self.H[-1, -1] if self.has_bias else None
        if to_bias is not None:  # what is left of the Hessian when the bias is always the best one
            H = H - torch.outer(self.H[alive, -1], to_bias)
        own = self.V[alive]
        order, cost = removal_order(H, G, own)

        def build(removed: int) -> Tensor:
            kept = min(N * M - removed, own.numel())
            V = torch.zeros_like(self.V)
            V[alive] = least_squares(H, G, own, mask_by_cost(order, cost, kept)) if kept else 0.0
            if to_bias is not None:
                V[-1] = self.V[-1] + to_bias @ (own - V[alive])
            return V

        return build


class Walk:
    """The published algorithm along the weights in the order of their sensitivities, sorted once.

    Every removal uses the weight's value of that moment and the one inverse of the beginning. So the removals of an output are one sweep
    of Gauss-Seidel, in this order, for the system whose solution exact OBS takes (docs/lobs.md, 2).
    """

    def __init__(self, layer: Rows, keep_bias: bool) -> None:
        self.layer = layer
        self.number = layer.program.weights.numel()
        sensitivity = layer.V.square() / (2 * layer.G.diagonal()[:, None])
        if layer.has_bias and keep_bias:
            sensitivity[-1] = torch.inf
        self.order = sensitivity.flatten().argsort(stable=True)
        # a removal of the k-th weight comes after the biases that are cheaper; weights stand before biases in a flat view
        self.places = (self.order < self.number).nonzero()[:, 0] + 1

    def upto(self, weights: int) -> int:
        """How many entries of the order hold so many weights."""
        return int(self.places[weights - 1]) if weights else 0

    def cut(self, V: Tensor, entries: int) -> Tensor:
        """``V`` with the first entries of the order at zero."""
        V = V.clone()
        V.view(-1)[self.order[:entries]] = 0.0
        return V

    def built(self, weights: int) -> Tensor:
        """Weights and biases after so many weights have gone."""
        end = self.upto(weights)
        return self.cut(advance(self.layer.V, self.layer.G, self.order[:end]), end)

    def refitted(self, weights: int) -> Tensor:
        """The same removals, and least-squares weights on what is left."""
        mask = torch.ones_like(self.layer.V, dtype=torch.bool)
        mask.view(-1)[self.order[: self.upto(weights)]] = False
        return least_squares(self.layer.H, self.layer.G, self.layer.V, mask)

    def while_it_fits(self, fits: Callable[[Tensor, int], bool]) -> tuple[Tensor, int]:
        """Removes weights in their order as long as ``fits`` says so of what is left: the result, and how many went.

        In parts that halve where a part does not fit, so that every weight need not be tried by itself.
        """
        V, done, step = self.layer.V, 0, max(1, self.number // PARTS)
        while done < self.number:
            ahead = min(done + step, self.number)
            begin, end = self.upto(done), self.upto(ahead)
            further = advance(V, self.layer.G, self.order[begin:end])
            if fits(self.cut(further, end), ahead):
                V, done = further, ahead
            elif step == 1:
                break
            else:
                step = max(1, step // 2)
        return self.cut(V, self.upto(done)), done


def advance(V: Tensor, G: Tensor, removals: Tensor) -> Tensor:
    """``V`` (n, M) after removals in this order, flat positions in ``V``: each moves its column by ``-V_qm / G_qq G_:q``.

    Later removals move what has been removed; the caller cuts it off, which changes nothing else, as it is not read again.
    """
    M = V.shape[1]
    rows, columns = removals // M, removals % M
    together = columns.argsort(stable=True)
    counts = columns.bincount(minlength=M)
    first = counts.cumsum(0) - counts
    busiest = counts.argsort(descending=True, stable=True)
    moved = V.T[busiest].contiguous()
    diagonal = G.diagonal()
    still = (counts[busiest][None] > torch.arange(int(counts.max()), device=V.device)[:, None]).sum(1).tolist() if len(removals) else []
    for t, active in enumerate(still):  # one removal of every column that still has some
        q = rows[together[first[busiest[:active]] + t]]
        factor = moved[torch.arange(active, device=V.device), q] / diagonal[q]
        moved[:active].addcmul_(G[q], factor[:, None], value=-1)
    result = torch.empty_like(moved)
    result[busiest] = moved
    return result.T.contiguous()


def recursive_inverse(rows: Tensor, count: int, damping: float) -> Tensor:
    """``(1/count sum y y^T + damping I)^-1`` (n, n) for ``rows`` y (P, n), from ``I / damping`` by
    ``G <- G - G y (count + y^T G y)^-1 y^T G``, some rows at a time."""
    G = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device) / damping
    for part in torch.split(rows, RECURSION_ROWS):
        image = G @ part.T
        core = part @ image
        core.diagonal().add_(count)
        G = G - image @ torch.linalg.solve(core, image.T)
        G = (G + G.T) / 2
    return G


def _most(build: Build, number: int, fits: Callable[[Tensor, int], bool]) -> tuple[Tensor, int]:
    """The largest number of removed weights, and the result, of those that fit; the error must rise with their number."""
    V, low, high = build(0), 0, number + 1
    while high - low > 1:
        middle = (low + high) // 2
        tried = build(middle)
        if fits(tried, middle):
            V, low = tried, middle
        else:
            high = middle
    return V, low
