"""The program of one layer: its inputs, the box that its pre-activations should stay near, and what is known of both.

Rows are samples. ``Z = A W + e b^T`` with ``A`` (P, N), ``W`` (N, M), ``b`` (M,) and ``e`` the bias column: all ones for a program
that holds samples, ``None`` for a layer without bias. A program whose boxes are points is held by its second moments alone, as at
most ``N + 1`` equivalent rows (docs/theory.md, compressed form), however many samples were seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .fold import Fold
from .preimage import Activation, nearest_point
from .status import InvalidInput

LEAST_IMPORTANCE = 1e-3  # of the mean: outputs that seem to count for nothing on these data still have to be near
BLOCK_ENTRIES = 1 << 16  # entries of one block of rows: 512 KiB in float64
SMALL, LARGE = 1e-12, 1e15  # between these, sums of squares keep float32's precision
MOVED = 8  # units of rounding of the layer's dtype
CUT = 1e-13  # eigenvalues of a Gram matrix below this share of the largest are rounding


@dataclass(frozen=True)
class LayerProgram:
    """One layer's program in float64.

    ``inputs`` (P, N), ``lo`` and ``hi`` (P, M), ``bias_column`` (P,) or ``None``, ``weights`` (N, M) and ``bias`` (M,) the original ones,
    ``reference_norm`` the Frobenius norm of the layer's reference output, ``rows`` the number of samples that the program
    stands for, ``unreachable`` the squared distance that no weights can remove (of compressed programs, and of outputs that batch-norm
    multiplies by zero, which are in no column), ``dtype`` the dtype
    in which the layer stores its weights. In a ``hard`` program only points may be missed: every other box is a constraint (the published
    program, :mod:`nettrim.halfspace`). ``name`` is the layer's, for settings that differ by layer. ``fold`` is
    the batch-norm that ``weights`` and ``bias`` have taken in, if any. ``importance`` (M,) says how much a squared error of each output
    counts for the network's outputs, where that is known; no distance that is stated contains it. ``rounding`` times the squared
    distance from ``weights`` is what compression can have lost of a squared distance, to second order; it is added to what is stated.
    ``part_of_moved`` and ``part_of_linear`` say what ``is_moved`` and ``is_linear`` are of a whole layer that has several programs.
    """

    inputs: Tensor
    lo: Tensor
    hi: Tensor
    bias_column: Tensor | None
    weights: Tensor
    bias: Tensor | None
    reference_norm: float
    rows: int
    unreachable: float = 0.0
    dtype: torch.dtype = torch.float32
    hard: bool = False
    name: str = ""
    fold: Fold | None = None
    rounding: float = 0.0
    importance: Tensor | None = None
    part_of_moved: bool | None = None
    part_of_linear: bool | None = None

    def __post_init__(self) -> None:
        if self.inputs.ndim != 2 or self.weights.ndim != 2:
            raise InvalidInput(
                f"layer program: inputs and weights must be matrices, found {tuple(self.inputs.shape)} and {tuple(self.weights.shape)}"
            )
        P, N = self.inputs.shape
        M = self.weights.shape[1]
        if self.weights.shape[0] != N:
            raise InvalidInput(f"layer program: weights must have {N} rows (the inputs' columns), found {tuple(self.weights.shape)}")
        if self.lo.shape != (P, M) or self.hi.shape != self.lo.shape:
            raise InvalidInput(f"layer program: boxes must be {(P, M)}, found {tuple(self.lo.shape)} and {tuple(self.hi.shape)}")
        if (self.bias is None) != (self.bias_column is None):
            raise InvalidInput("layer program: a bias needs a bias column and a bias column a bias")
        if self.bias is not None and self.bias_column is not None and (self.bias.shape != (M,) or self.bias_column.shape != (P,)):
            raise InvalidInput(
                f"layer program: the bias must be {(M,)} and its column {(P,)}, "
                f"found {tuple(self.bias.shape)} and {tuple(self.bias_column.shape)}"
            )
        if not bool(torch.isfinite(self.inputs).all()):
            raise InvalidInput("layer program: the inputs hold NaN or inf; remove those samples from the calibration data")
        if not bool(torch.isfinite(self.weights).all()) or (self.bias is not None and not bool(torch.isfinite(self.bias).all())):
            raise InvalidInput("layer program: the layer's weights or bias hold NaN or inf; there is nothing to prune towards")
        # written so that NaN fails too
        if not bool(((self.lo <= self.hi) & (self.lo < math.inf) & (self.hi > -math.inf)).all()):
            raise InvalidInput("layer program: every box needs lo <= hi, lo < inf, hi > -inf and no NaN; are the reference outputs finite?")

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(P, N, M)``."""
        return (*self.inputs.shape, self.weights.shape[1])

    @property
    def is_point(self) -> bool:
        """True when every box is a single point."""
        return bool(torch.equal(self.lo, self.hi))

    def stored(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weights and bias as they will be once the layer stores them: rounded to its dtype."""
        if self.fold is not None:
            return self.fold.stored(W, b, self.dtype)
        return W.to(self.dtype), None if b is None else b.to(self.dtype)

    def preactivation(self, W: Tensor, b: Tensor | None) -> Tensor:
        """``Z = A W + e b^T`` in float64."""
        Z = self.inputs @ W.double()
        if self.bias_column is not None:
            assert b is not None
            Z += torch.outer(self.bias_column, b.double())
        return Z

    def distance(self, W: Tensor, b: Tensor | None) -> float:
        """``dist(A W + e b^T, [lo, hi])`` in float64."""
        Z = self.preactivation(W, b)
        Z -= nearest_point(Z, self.lo, self.hi)
        lost = self.rounding * float((W.double() - self.weights).square().sum()) if self.rounding else 0.0
        return math.sqrt(float(Z.square().sum()) + self.unreachable + lost)

    def original_distance(self) -> float:
        """The distance of the layer's own weights."""
        return self.distance(self.weights, self.bias)

    @property
    def is_linear(self) -> bool:
        """True when every box of the layer is a single point."""
        return self.is_point if self.part_of_linear is None else self.part_of_linear

    def is_moved(self) -> bool:
        """Whether the inputs are not the reference network's any more: the layer's own weights then miss the reference output.

        Distances that rounding to the layer's dtype could give count as none.
        """
        if self.part_of_moved is not None:
            return self.part_of_moved
        return self.original_distance() > MOVED * torch.finfo(self.dtype).eps * self.reference_norm


def from_rows(
    inputs: Tensor,
    reference: Tensor,
    activation: Activation,
    weights: Tensor,
    bias: Tensor | None,
    *,
    offset: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> LayerProgram:
    """The program of a layer from its inputs (P, N) and its reference *output* ``Y`` (P, M), after the activation.

    ``offset`` (P, M) is what is added to the pre-activation besides ``A W + 1 b^T`` (``R`` in the design); it shifts the box.
    """
    Y = reference.double()
    lo, hi = activation.box(Y)
    if offset is not None:
        if offset.shape != Y.shape:
            raise InvalidInput(f"layer program: the offset must be {tuple(Y.shape)} like the reference output, found {tuple(offset.shape)}")
        lo, hi = lo - offset.double(), hi - offset.double()
    return from_boxes(inputs, lo, hi, weights, bias, reference_norm=float(torch.linalg.vector_norm(Y)), dtype=dtype)


def from_boxes(
    inputs: Tensor,
    lo: Tensor,
    hi: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    *,
    reference_norm: float,
    dtype: torch.dtype = torch.float32,
    fold: Fold | None = None,
) -> LayerProgram:
    """The program of a layer from its inputs (P, N) and the boxes (P, M) that its pre-activations should stay near."""
    A = inputs.double()
    return LayerProgram(
        inputs=A,
        lo=lo.double(),
        hi=hi.double(),
        bias_column=None if bias is None else A.new_ones(len(A)),
        weights=weights.double(),
        bias=None if bias is None else bias.double(),
        reference_norm=reference_norm,
        rows=len(A),
        dtype=dtype,
        fold=fold,
    )


class Moments:
    """Second moments of inputs and errors, accumulated in float64 batch by batch: memory N^2 + N M, whatever the number of rows.

    They are all that a program whose boxes are points needs. The reference output enters as its difference from the original
    layer's own response, ``E = Y - (A W0 + 1 b0^T)``, which keeps the accuracy when the two are close.
    """

    def __init__(self, weights: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
        self.weights, self.bias, self.dtype = weights.double(), None if bias is None else bias.double(), dtype
        N, M = weights.shape
        self.rows = 0
        self.reference_square = 0.0
        self.error_square = 0.0
        self.gram = self.weights.new_zeros(N, N)
        self.cross = self.weights.new_zeros(N, M)
        self.input_sum = self.weights.new_zeros(N)
        self.error_sum = self.weights.new_zeros(M)

    def add(self, inputs: Tensor, target: Tensor, reference: Tensor) -> None:
        """Adds a batch: inputs (p, N), the points that pre-activations should stay near (p, M), and reference outputs (p, M)."""
        A = inputs.double()
        E = target.double() - A @ self.weights
        if self.bias is not None:
            E -= self.bias
        self.rows += len(A)
        self.reference_square += float(reference.double().square().sum())
        self.error_square += float(E.square().sum())
        self.gram.addmm_(A.T, A)
        self.cross.addmm_(A.T, E)
        self.input_sum += A.sum(0)
        self.error_sum += E.sum(0)

    def program(self) -> LayerProgram:
        """The equivalent program with at most ``N + 1`` rows (docs/theory.md, compressed form)."""
        if not self.rows:
            raise InvalidInput("layer program: no rows were seen; the calibration data are empty")
        if not bool(torch.isfinite(self.gram).all()) or not bool(torch.isfinite(self.cross).all()):
            raise InvalidInput(
                "layer program: the inputs or reference outputs hold NaN or inf; remove those samples from the calibration data"
            )
        gram, cross, error_square = self.gram, self.cross, self.error_square
        if self.bias is not None:
            mean = self.input_sum / self.rows
            gram = gram - torch.outer(mean, self.input_sum)
            cross = cross - torch.outer(mean, self.error_sum)
            error_square -= float(self.error_sum.square().sum()) / self.rows
        values, Q = torch.linalg.eigh((gram + gram.T) / 2)
        largest = float(values[-1].clamp(min=0))
        keep = values > largest * CUT
        root = values[keep].clamp(min=0).sqrt()
        Q = Q[:, keep]
        inputs = root[:, None] * Q.T
        error = (Q.T @ cross) / root[:, None]
        unreachable = max(0.0, error_square - float(error.square().sum()))
        if unreachable < 1e-14 * max(error_square, 0.0):
            unreachable = 0.0
        column = None
        if self.bias is not None:  # one more row carries the means, so that any bias has its exact distance
            scale = math.sqrt(self.rows)
            inputs = torch.cat([inputs, scale * mean[None]])
            error = torch.cat([error, self.error_sum[None] / scale])
            column = inputs.new_zeros(len(inputs))
            column[-1] = scale
        target = inputs @ self.weights + error
        if self.bias is not None and column is not None:
            target = target + torch.outer(column, self.bias)
        return LayerProgram(
            inputs=inputs,
            lo=target,
            hi=target,
            bias_column=column,
            weights=self.weights,
            bias=self.bias,
            reference_norm=math.sqrt(self.reference_square),
            rows=self.rows,
            unreachable=unreachable,
            dtype=self.dtype,
            rounding=largest * CUT,
        )


@dataclass(frozen=True)
class StandardProgram:
    """The same program as the solvers see it: bias eliminated, inputs scaled to unit norm, dead inputs left out, in ``dtype``.

    ``A`` (P, n) has columns orthogonal to ``e``, of unit norm on average (each of them when ``standardise`` had ``power`` 1);
    ``U = scale * W`` on the live inputs; ``Z = A U + e c^T``. ``values`` and ``vectors`` are the eigendecomposition of the Gram matrix
    ``A^T A``, which serves every penalty value. ``hard`` (P, M) marks the boxes that are constraints, ``None`` when there are none.
    ``shuffled``: rows are in random order. ``columns`` (M,) multiplies every output, so that ``U = scale * W * columns`` then.
    """

    A: Tensor
    lo: Tensor
    hi: Tensor
    e: Tensor | None
    scale: Tensor
    live: Tensor
    mean: Tensor
    gram: Tensor
    values: Tensor
    vectors: Tensor
    U0: Tensor
    c0: Tensor | None
    unreachable: float
    source: LayerProgram
    hard: Tensor | None = None
    shuffled: bool = False
    columns: Tensor | None = None

    @property
    def e_square(self) -> float:
        assert self.e is not None
        return float(self.e.double().square().sum())

    def offset(self, T: Tensor) -> Tensor | None:
        """The optimal ``c`` for the target ``T``: its component along ``e``."""
        return None if self.e is None else (self.e @ T) / self.e_square

    def response(self, U: Tensor, c: Tensor | None, rows: slice = slice(None)) -> Tensor:
        """``Z = A U + e c^T``, or some of its rows."""
        Z = self.A[rows] @ U
        return Z if c is None or self.e is None else Z.addr_(self.e[rows], c)

    def add_response_(self, B: Tensor, U: Tensor, c: Tensor | None, rows: slice, *, alpha: float) -> None:
        """``B += alpha (A U + e c^T)`` for some rows, in place."""
        B.addmm_(self.A[rows], U, alpha=alpha)
        if c is not None and self.e is not None:
            B.addr_(self.e[rows], c, alpha=alpha)

    def distance(self, U: Tensor, c: Tensor | None) -> float:
        """``dist(A U + e c^T, [lo, hi])``, summed in the working dtype."""
        Z = self.response(U, c)
        return math.hypot(float(torch.linalg.vector_norm(Z - nearest_point(Z, self.lo, self.hi))), math.sqrt(self.unreachable))

    def restore(self, U: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The layer's weights (N, M) and bias (M,) in the dtype that the layer stores."""
        N = self.source.shape[1]
        W = U.new_zeros(N, U.shape[1], dtype=torch.float64)
        W[self.live] = U.double() / self.scale[:, None]
        if self.columns is not None:
            W /= self.columns
            c = None if c is None else c.double() / self.columns
        W, _ = self.source.stored(W, None)
        if c is None:
            return W, None
        # the bias answers for the weights as they are stored, dead inputs included
        return self.source.stored(W, c.double() - self.mean @ W.double())

    def enter(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The reverse of :meth:`restore`: weights and bias of the layer in the solvers' coordinates."""
        U = W.double()[self.live] * self.scale[:, None]
        c = None if b is None else b.double() + self.mean @ W.double()
        if self.columns is not None:
            U *= self.columns
            c = None if c is None else c * self.columns
        return U.to(self.A.dtype), None if c is None else c.to(self.A.dtype)


def _centred_blocks(program: LayerProgram, mean: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Runs of rows that fit a cache: which they are, and what the bias column leaves of the inputs there (a fresh copy)."""
    P, N = program.inputs.shape
    step = max(64, BLOCK_ENTRIES // max(N, 1))
    for start in range(0, P, step):
        rows = slice(start, min(P, start + step))
        A, e = program.inputs[rows], program.bias_column
        yield rows, A.clone() if e is None else torch.addr(A, e[rows], mean, alpha=-1)


def _live(scale: Tensor, norm: Tensor) -> Tensor:
    """Inputs that vary: beyond rounding of their own mean, and of the largest input (compressed rows carry its rounding)."""
    if not len(norm):
        return norm > 0
    return (scale > 1e-9 * norm) & (scale > 1e-10 * norm.max().clamp(min=1e-290))


def _beyond_float32(program: LayerProgram) -> bool:
    """Whether the boxes, or the original response's part in them, are so large or so small that squares in float32 overflow or vanish."""
    sides = [program.lo] if program.hi is program.lo else [program.lo, program.hi]
    size = max((float(side.abs().masked_fill_(torch.isinf(side), 0.0).max()) for side in sides if side.numel()), default=0.0)
    return size > 0 and not SMALL < size < LARGE


def dead_inputs(program: LayerProgram) -> int:
    """How many inputs never vary (without a bias: are always zero); their weights are zero in every solution."""
    A, e = program.inputs, program.bias_column
    norm = torch.linalg.vector_norm(A, dim=0)
    if e is not None and bool((e == 1).all()):
        scale = A.var(0, correction=0).mul(len(A)).sqrt()
    else:
        scale = norm if e is None else torch.linalg.vector_norm(A - torch.outer(e, (e @ A) / e.square().sum()), dim=0)
    return int((~_live(scale, norm)).sum())


def standardise(
    program: LayerProgram,
    dtype: torch.dtype | None = None,
    *,
    power: float = 1.0,
    ridge: float = 0.0,
    shuffled: bool = False,
    rough: bool = False,
    weighted: bool = False,
) -> StandardProgram:
    """Eliminates the bias, scales the inputs, removes the dead ones and decomposes the Gram matrix (design section 3).

    ``dtype`` is the working dtype: by default float64 for float64 layers, and for boxes of a size whose squares float32 cannot tell
    apart or hold; float32 otherwise. Inputs are divided by their norm to
    the ``power`` (and by a common factor that makes the mean square norm 1). The solutions are the same for every power in exact
    arithmetic; 1 suits budgets, where entries of different inputs are compared, and 1/2 makes the l1 solver need fewer iterations.
    ``ridge`` adds that share of the mean diagonal of the Gram matrix (dead inputs left out) times ``||W - W0||_F^2`` to the squared
    distance, as further rows: it keeps weights of inputs that hardly vary on the calibration data, and may vary elsewhere, from
    growing. Distances of ``source`` do not contain it. ``shuffled`` puts the rows in an order that is random and always the same, so
    that any run of them is a fair sample. ``rough`` forms the Gram matrix in the working dtype, which is enough for budgets.
    ``weighted`` multiplies outputs by the root of their importance (of mean square 1, and never below a thirtieth), where the program
    knows it.
    """
    dtype = dtype or (torch.float64 if program.dtype == torch.float64 or _beyond_float32(program) else torch.float32)
    e = program.bias_column
    P, N = program.inputs.shape
    mean = program.inputs.new_zeros(N) if e is None else (e @ program.inputs) / e.square().sum()
    square = program.inputs.new_zeros(N)
    for _, centred in _centred_blocks(program, mean):
        square += centred.square_().sum(0)
    norm = (square if e is None else square + mean.square() * e.square().sum()).sqrt()  # of the inputs as they are
    live = _live(square.sqrt(), norm)
    scale = square[live].sqrt()
    n = len(scale)
    size = math.sqrt(ridge * float(scale.square().mean())) if n else 0.0
    extra = n if size else 0  # rows
    if size:
        scale = (scale.square() + size**2).sqrt()
    if n and power != 1.0:
        largest = scale.max()
        relative = scale / largest
        scale = relative**power
        scale = scale * (largest * (relative / scale).square().mean().sqrt())
    place: Tensor | slice = slice(None)
    if shuffled:
        order = torch.randperm(P + extra, generator=torch.Generator().manual_seed(0))
        place = torch.empty_like(order).scatter_(0, order, torch.arange(P + extra)).to(scale.device)
    all_live = bool(live.all())
    A = scale.new_empty(P + extra, n, dtype=dtype)
    gram = scale.new_zeros(n, n)
    for rows, centred in _centred_blocks(program, mean):
        block = (centred if all_live else centred[:, live]).div_(scale)
        A[rows if isinstance(place, slice) else place[rows]] = block.to(dtype)
        if not rough:
            gram.addmm_(block.T, block)
    if extra:
        own = torch.diag(size / scale)
        A[slice(P, None) if isinstance(place, slice) else place[P:]] = own.to(dtype)
        gram += own.square()
    if rough:
        gram = (A.T @ A).double()

    def placed(values: Tensor, further: Tensor) -> Tensor:
        """Values of all rows, those of the ridge's own included, where the rows are, in ``dtype``."""
        out = values.new_empty(P + extra, *values.shape[1:], dtype=dtype)
        out[slice(0, P) if isinstance(place, slice) else place[:P]] = values.to(dtype)
        if extra:
            out[slice(P, None) if isinstance(place, slice) else place[P:]] = further.to(dtype)
        return out

    target = size * program.weights[live]
    lo = placed(program.lo, target)
    hi = lo if program.hi is program.lo else placed(program.hi, target)
    column = None if e is None else placed(e, e.new_zeros(extra))
    columns = None
    if weighted and program.importance is not None and float(program.importance.max()) > 0:
        columns = (program.importance / program.importance.mean()).clamp(min=LEAST_IMPORTANCE).sqrt()
        lo, hi = lo * columns.to(lo.dtype), hi * columns.to(hi.dtype)
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2) if n else (scale, gram)
    standard = StandardProgram(
        A=A,
        lo=lo,
        hi=hi,
        e=column,
        scale=scale,
        live=live,
        mean=mean,
        gram=gram.to(dtype),
        values=values.clamp(min=0).to(dtype),
        vectors=vectors.to(dtype),
        U0=scale.new_zeros(0),
        c0=None,
        unreachable=program.unreachable,
        source=program,
        hard=lo != hi if program.hard and not program.is_point else None,
        shuffled=shuffled,
        columns=columns,
    )
    U0, c0 = standard.enter(program.weights, program.bias)
    return replace(standard, U0=U0, c0=c0)
