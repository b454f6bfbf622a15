"""Linear maps ``A`` for the published ADMM: what one must offer, a matrix without its Gram matrix, and 2d convolution.

Source: Aghasi, Abdi, Romberg, SIAM J. Math. Data Science 2020 (arXiv 1806.06457), where ``A(W) = W^T X`` or a convolution and ``A*``
is its adjoint: ``<A(W), Z> = <W, A*(Z)>`` for all W and Z. A bias belongs to the map, as a map of ones: it is one more set of weights.

``largest_gram_entry`` rests on this: A*A is positive semidefinite, so ``|G_ij| <= sqrt(G_ii G_jj)``, and the largest entry of A*A is one of
its diagonal, the squared norms of the responses to single weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import torch
from torch import Tensor

from nettrim.status import InvalidInput

Size = int | tuple[int, int]


@runtime_checkable
class LinearMap(Protocol):
    """A linear map from weights (bias included, where there is one) to pre-activations, in float64 on ``device``."""

    @property
    def weights_shape(self) -> tuple[int, ...]:
        """The shape of W."""
        ...

    @property
    def outputs_shape(self) -> tuple[int, ...]:
        """The shape of Z = A(W), and so of the outputs Y."""
        ...

    @property
    def device(self) -> torch.device:
        """Where W and Z lie."""
        ...

    def apply(self, W: Tensor) -> Tensor:
        """``A(W)``."""
        ...

    def adjoint(self, Z: Tensor) -> Tensor:
        """``A*(Z)``."""
        ...

    def largest_gram_entry(self) -> float:
        """The largest entry of the matrix of A*A: the largest squared norm of the response to one weight that is 1, all others 0."""
        ...

    def split(self, W: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weights without the bias, and the bias (``None`` when there is none), in the shapes in which they are used."""
        ...


class MatrixMap:
    """``A(W) = A W``, or ``A W + 1 b^T`` with ``bias``: inputs A (P, N), W (N, M), with ``bias`` (N + 1, M) and b the last row.

    Never forms the (N, N) Gram matrix: for layers whose N is too large for a Cholesky factor.

    Raises InvalidInput for an A that is no real, finite, nonempty matrix and for ``columns`` (M) below 1.
    """

    def __init__(self, A: Tensor, columns: int, *, bias: bool = True) -> None:
        A = checked_tensor("A", A, 2, "a matrix with samples in rows")
        M = _whole("columns", columns, 1)
        self.bias = bias
        self.matrix = torch.cat([A, A.new_ones(A.shape[0], 1)], dim=1) if bias else A
        self.weights_shape: tuple[int, ...] = (self.matrix.shape[1], M)
        self.outputs_shape: tuple[int, ...] = (A.shape[0], M)
        self.device = A.device

    def apply(self, W: Tensor) -> Tensor:
        """``A W`` (P, M)."""
        return self.matrix @ W

    def adjoint(self, Z: Tensor) -> Tensor:
        """``A^T Z``."""
        return self.matrix.T @ Z

    def largest_gram_entry(self) -> float:
        """The largest squared norm of a column."""
        return float(self.matrix.square().sum(0).max())

    def split(self, W: Tensor) -> tuple[Tensor, Tensor | None]:
        """(N, M) and (M,)."""
        return (W[:-1], W[-1]) if self.bias else (W, None)


class ConvolutionMap:
    """A 2d convolution (cross-correlation, as torch.conv2d) of fixed inputs, seen as a linear map of its kernels.

    ``inputs`` is (B, C, H, W) and is kept in float64, padded. ``kernel_shape`` is (O, C / groups, kh, kw). ``stride``, ``padding`` (zeros;
    also ``"same"``, for stride 1, and ``"valid"``) and ``dilation`` are numbers or pairs (height, width). The weights have
    ``kernel_shape``, or with ``bias`` the shape (O, C / groups * kh * kw + 1): one row per output channel, its kernel flattened and
    its bias last (:meth:`join`, :meth:`split`). Outputs are (B, O, H', W').

    On a GPU the adjoint is as repeatable as cuDNN's weight gradient: set ``torch.backends.cudnn.deterministic``.

    Raises InvalidInput for inputs that are not real, finite, nonempty and 4-dimensional, shapes that do not fit together, settings out of
    range, and kernels larger than the padded input.
    """

    def __init__(
        self,
        inputs: Tensor,
        kernel_shape: Sequence[int],
        *,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        x = checked_tensor("inputs", inputs, 4, "images (B, C, H, W)")
        if len(kernel_shape) != 4:
            raise InvalidInput(f"kernel_shape must be (O, C / groups, kh, kw); found {tuple(kernel_shape)}")
        out, own, kh, kw = (_whole("every entry of kernel_shape", size, 1) for size in kernel_shape)
        self.groups, self.bias = _whole("groups", groups, 1), bias
        if own * self.groups != x.shape[1] or out % self.groups:
            raise InvalidInput(
                f"kernel_shape {tuple(kernel_shape)} with groups={groups} needs {own * self.groups} input channels, and output "
                f"channels that groups divides; found {x.shape[1]} input and {out} output channels"
            )
        self.stride, self.dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
        self.kernel_shape = (out, own, kh, kw)
        top, bottom, left, right = self._padding(padding)
        # padded once: the inputs are fixed, and "same" may need one row or column more at one side
        self.inputs = torch.constant_pad_nd(x, [left, right, top, bottom]).contiguous()
        height, width = (
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(self.inputs.shape[2:], (kh, kw), self.stride, self.dilation, strict=True)
        )
        if height < 1 or width < 1:
            raise InvalidInput(
                f"kernel_shape {self.kernel_shape} with dilation {self.dilation} is larger than the padded inputs, "
                f"{tuple(self.inputs.shape[2:])}: use a smaller kernel or dilation, or more padding"
            )
        self.weights_shape: tuple[int, ...] = (out, own * kh * kw + 1) if bias else self.kernel_shape
        self.outputs_shape: tuple[int, ...] = (x.shape[0], out, height, width)
        self.device = x.device

    def _padding(self, padding: Size | str) -> tuple[int, int, int, int]:
        """Zeros above, below, left and right of the inputs."""
        if isinstance(padding, str):
            if padding not in ("same", "valid") or (padding == "same" and self.stride != (1, 1)):
                raise InvalidInput(
                    f"padding must be a number, a pair, 'valid', or 'same' with stride 1; found {padding!r}, stride {self.stride}"
                )
            total = (0, 0)
            if padding == "same":
                total = (self.dilation[0] * (self.kernel_shape[2] - 1), self.dilation[1] * (self.kernel_shape[3] - 1))
            return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
        vertical, horizontal = _pair("padding", padding, 0)
        return vertical, vertical, horizontal, horizontal

    def apply(self, W: Tensor) -> Tensor:
        """The convolution of the inputs with W's kernels, plus its bias: (B, O, H', W')."""
        kernel, b = self.split(W)
        return torch.conv2d(self.inputs, kernel, b, self.stride, 0, self.dilation, self.groups)

    def adjoint(self, Z: Tensor) -> Tensor:
        """``A*(Z)`` for Z (B, O, H', W'): for each weight, the sum over positions of what it multiplies times Z."""
        kernel = self._correlate(self.inputs, Z, self.kernel_shape)
        return self.join(kernel, Z.sum((0, 2, 3)) if self.bias else None)

    def largest_gram_entry(self) -> float:
        """The largest sum, over samples and positions, of the squares of what one weight multiplies (1 for a bias)."""
        B, _, height, width = self.outputs_shape
        # the response to one weight does not depend on the output channel, so one channel a group is enough
        ones = self.inputs.new_ones(B, self.groups, height, width)
        diagonal = self._correlate(self.inputs.square(), ones, (self.groups, *self.kernel_shape[1:]))
        return max(float(diagonal.max()), float(B * height * width) if self.bias else 0.0)

    def split(self, W: Tensor) -> tuple[Tensor, Tensor | None]:
        """Kernels (O, C / groups, kh, kw) and bias (O,)."""
        return (W[:, :-1].reshape(self.kernel_shape), W[:, -1]) if self.bias else (W, None)

    def join(self, kernel: Tensor, b: Tensor | None) -> Tensor:
        """The weights made of kernels (O, C / groups, kh, kw) and bias (O,): what :meth:`split` takes apart."""
        if (b is not None) != self.bias:
            raise InvalidInput(f"this map was made with bias={self.bias}; {'give' if self.bias else 'leave out'} the bias")
        return kernel if b is None else torch.cat([kernel.flatten(1), b[:, None]], dim=1)

    def _correlate(self, x: Tensor, Z: Tensor, kernel_shape: tuple[int, ...]) -> Tensor:
        """The transpose of the convolution of ``x`` in its kernels: what torch.nn.grad.conv2d_weight computes, without torch.nn."""
        gradients: Any = torch.ops.aten.convolution_backward(
            Z,
            x,
            x.new_empty(1).expand(kernel_shape),  # only its shape is read
            None,
            self.stride,
            (0, 0),
            self.dilation,
            False,
            (0, 0),
            self.groups,
            (False, True, False),
        )
        kernel: Tensor = gradients[1]
        return kernel


def check_map(A: LinearMap) -> None:
    """Refuses a map whose answers have other shapes or dtypes than it states, or whose ``adjoint`` is not the adjoint of ``apply``.

    Costs one ``apply`` and one ``adjoint``, of fixed random arrays. Raises InvalidInput.
    """
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(A.weights_shape, generator=generator, dtype=torch.float64).to(A.device)
    Z = torch.randn(A.outputs_shape, generator=generator, dtype=torch.float64).to(A.device)
    kind = type(A).__name__
    answers = []
    for name, value, shape in (("apply", A.apply(W), A.outputs_shape), ("adjoint", A.adjoint(Z), A.weights_shape)):
        if not isinstance(value, Tensor) or tuple(value.shape) != tuple(shape) or value.dtype != torch.float64:
            found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInput(f"{kind}.{name} must give a float64 tensor of shape {tuple(shape)}, found {found}: correct the map")
        if not bool(torch.isfinite(value).all()):
            raise InvalidInput(f"{kind}.{name} gives NaN or infinite values: only finite values are accepted")
        answers.append(value)
    AW, AZ = answers
    forth, back = float((AW * Z).sum()), float((W * AZ).sum())
    # both sums are signed: their rounding scales with the norms, not with the value
    norms = float(torch.linalg.vector_norm(AW) * torch.linalg.vector_norm(Z) + torch.linalg.vector_norm(W) * torch.linalg.vector_norm(AZ))
    if abs(forth - back) > 1e-9 * norms:
        raise InvalidInput(
            f"{kind}.adjoint must satisfy <A(W), Z> = <W, A*(Z)>; found {forth:.6g} and {back:.6g} for random W and Z: correct it"
        )


def checked_tensor(name: str, value: Tensor, ndim: int, what: str) -> Tensor:
    """Return ``value`` as a detached float64 tensor of ``ndim`` dimensions, or refuse it; ``what`` says what it holds."""
    if not isinstance(value, Tensor):
        raise InvalidInput(f"{name} must be a torch tensor, not {type(value).__name__}: use torch.as_tensor")
    if value.ndim != ndim:
        raise InvalidInput(f"{name} must be {what}; its shape is {tuple(value.shape)}")
    if value.numel() == 0:
        raise InvalidInput(f"{name} is empty (shape {tuple(value.shape)}): at least one entry along every dimension is required")
    if value.is_complex():
        raise InvalidInput(f"{name} is complex: real values are required")
    value = value.detach().to(torch.float64)
    if not bool(torch.isfinite(value).all()):
        raise InvalidInput(f"{name} holds NaN or infinite values: only finite values are accepted")
    return value


def scale_of(A: LinearMap) -> float:
    """``c0 = 0.3 sqrt(largest entry of A*A)``, the published scaling; 1 for a map that is zero."""
    entry = A.largest_gram_entry()
    if not (math.isfinite(entry) and entry >= 0):
        raise InvalidInput(f"{type(A).__name__}.largest_gram_entry must give a finite number >= 0, found {entry}: correct the map")
    return 0.3 * math.sqrt(entry) or 1.0


def _pair(name: str, value: Size, least: int) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2:
        raise InvalidInput(f"{name} must be a whole number or a pair (height, width), found {value!r}")
    return _whole(name, pair[0], least), _whole(name, pair[1], least)


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or value.__index__() < least:
        raise InvalidInput(f"{name} must be a whole number of at least {least}, found {value!r}")
    return value.__index__()
