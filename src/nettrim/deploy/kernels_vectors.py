"""Vector code for the kernels of sparse execution, emitted as LLVM's vector types through numba's intrinsics.

A block of outputs stays in registers while the nonzeros of one output channel pass: one load and one multiply-add for each nonzero and
register. It is written this way because no compiler keeps that many scalars in registers by itself. Addresses are int64, in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba.extending
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import types

intrinsic: Any = numba.extending.intrinsic
"""numba's own annotation is of what it compiles from; what it makes is called with other arguments."""


def _lanes() -> int:
    try:
        return 16 if binding.get_host_cpu_features().get("avx512f") else 8
    except RuntimeError:  # a processor whose features LLVM does not know
        return 8


LANES = _lanes()
"""Floats in one register, or in a pair of smaller ones."""

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FAST = ("contract",)  # multiply and add may become one instruction


def _address(builder: Any, base: Any, index: Any, size: int) -> Any:
    return builder.add(base, builder.mul(index, ir.Constant(_INT64, size)))


def _load(builder: Any, address: Any, kind: Any) -> Any:
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = 8 if kind is _INT64 else 4
    return loaded


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer())).align = 4


def _splat(builder: Any, scalar: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_INT32, lanes), [0] * lanes))


@intrinsic  # type: ignore[untyped-decorator]
def get(typing: Any, address: Any, place: Any) -> Any:
    """The int64 at a place behind an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, _address(builder, args[0], args[1], 8), _INT64)

    return types.int64(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def get32(typing: Any, address: Any, place: Any) -> Any:
    """The int32 at a place behind an address, as int64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(_load(builder, _address(builder, args[0], args[1], 4), _INT32), _INT64)

    return types.int64(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def read(typing: Any, address: Any, place: Any) -> Any:
    """The float at a place behind an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _load(builder, _address(builder, args[0], args[1], 4), _FLOAT)

    return types.float32(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def write(typing: Any, address: Any, place: Any, value: Any) -> Any:
    """Stores a float at a place behind an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _store(builder, args[2], _address(builder, args[0], args[1], 4))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(typing: Any, address: Any, place: Any, number: Any) -> Any:
    """Adds to the int64 at a place, atomically, and returns what was there."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(_address(builder, args[0], args[1], 8), _INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing: Any, address: Any, place: Any) -> Any:
    """Asks for the cache line of the float at a place behind an address, which need not exist."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(_address(builder, args[0], args[1], 4), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _INT32, _INT32, _INT32])
        function = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, _INT32(0), _INT32(3), _INT32(1)])  # to read, keep in all caches, data
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _phi_loop(
    builder: Any, begin: Any, end: Any, step: int, state: list[Any], body: Callable[[Any, list[Any]], list[Any]]
) -> tuple[Any, list[Any]]:
    """``for j = begin; j + step <= end; j += step: state = body(j, state)``; j and the state after it."""
    before = builder.block
    head, inside, after = (builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    j = builder.phi(_INT64)
    j.add_incoming(begin, before)
    held = []
    for value in state:
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        held.append(phi)
    following = builder.add(j, ir.Constant(_INT64, step))
    builder.cbranch(builder.icmp_signed("<=", following, end), inside, after)
    builder.position_at_end(inside)
    new = body(j, held)
    j.add_incoming(following, builder.block)
    for phi, value in zip(held, new, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return j, held


def _finished(builder: Any, total: Any, place: Any, low: Any, high: Any, added: Any, mask: Any) -> Any:
    """What is stored: the sum and, unless their address is 0, the vector that is added; clamped; zero where the mask is. NaN stays."""
    lanes = total.type.count
    zero = ir.Constant(_INT64, 0)

    def where_given(address: Any, old: Any, use: Callable[[Any], Any]) -> Any:
        before = builder.block
        given, after = builder.append_basic_block(), builder.append_basic_block()
        builder.cbranch(builder.icmp_signed("!=", address, zero), given, after)
        builder.position_at_end(given)
        new = use(_load(builder, builder.add(address, place), old.type))
        builder.branch(after)
        builder.position_at_end(after)
        phi = builder.phi(old.type)
        phi.add_incoming(old, before)
        phi.add_incoming(new, given)
        return phi

    total = where_given(added, total, lambda read: builder.fadd(total, read))
    for bound, sign in ((low, "<"), (high, ">")):
        limit = _splat(builder, bound, lanes)
        total = builder.select(builder.fcmp_ordered(sign, total, limit), limit, total)
    nothing = _splat(builder, _FLOAT(0.0), lanes)
    return where_given(mask, total, lambda read: builder.select(builder.fcmp_ordered("==", read, nothing), nothing, total))


def _block(lanes: int, registers: int, ways: int) -> Any:
    """An intrinsic: ``lanes * registers`` outputs of one channel, the sum over its nonzeros j of values[j] * x[offsets[j] + i].

    ``ways`` nonzeros go to sums of their own, so that short blocks do not wait for the last addition.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def block(
        typing: Any,
        out: Any,
        x: Any,
        values: Any,
        offsets: Any,
        begin: Any,
        end: Any,
        bias: Any,
        low: Any,
        high: Any,
        added: Any,
        mask: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, x, values, offsets, begin, end, bias, low, high, added, mask = args
            vector = ir.VectorType(_FLOAT, lanes)

            def meet(j: Any, sums: list[Any]) -> list[Any]:
                new = list(sums)
                for way in range(len(sums) // registers):
                    here = builder.add(j, ir.Constant(_INT64, way))
                    offset = builder.sext(_load(builder, _address(builder, offsets, here, 4), _INT32), _INT64)
                    weight = _splat(builder, _load(builder, _address(builder, values, here, 4), _FLOAT), lanes)
                    source = _address(builder, x, offset, 4)
                    for r in range(registers):
                        read = _load(builder, builder.add(source, ir.Constant(_INT64, 4 * lanes * r)), vector)
                        product = builder.fmul(weight, read, flags=_FAST)
                        new[way * registers + r] = builder.fadd(product, sums[way * registers + r], flags=_FAST)
                return new

            sums = [_splat(builder, bias, lanes)] * registers
            j = begin
            if ways > 1:
                zeros = [ir.Constant(vector, [0.0] * lanes)] * (registers * (ways - 1))
                j, all_sums = _phi_loop(builder, begin, end, ways, sums + zeros, meet)
                sums = all_sums[:registers]
                for way in range(1, ways):
                    sums = [builder.fadd(old, all_sums[way * registers + r]) for r, old in enumerate(sums)]
            _, sums = _phi_loop(builder, j, end, 1, sums, meet)
            for r, total in enumerate(sums):
                place = ir.Constant(_INT64, 4 * lanes * r)
                _store(builder, _finished(builder, total, place, low, high, added, mask), builder.add(out, place))
            return context.get_dummy_value()

        places, numbers = [types.int64] * 6, [types.float32] * 3
        return types.void(*places, *numbers, types.int64, types.int64), generate

    return block


block8, block4, block2, block1 = _block(LANES, 8, 1), _block(LANES, 4, 1), _block(LANES, 2, 2), _block(LANES, 1, 4)


def _mover(lanes: int) -> Any:
    """An intrinsic: as many floats from one place to another, with the end of a block."""

    @intrinsic  # type: ignore[untyped-decorator]
    def move(typing: Any, out: Any, x: Any, low: Any, high: Any, added: Any, mask: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, x, low, high, added, mask = args
            read = _load(builder, x, ir.VectorType(_FLOAT, lanes))
            _store(builder, _finished(builder, read, ir.Constant(_INT64, 0), low, high, added, mask), out)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32, types.float32, types.int64, types.int64), generate

    return move


def _larger(builder: Any, old: Any, read: Any) -> Any:
    """The larger of two, NaN where either is, as torch's pooling has it."""
    takes = builder.or_(builder.fcmp_ordered(">", read, old), builder.fcmp_unordered("uno", read, read))
    return builder.select(takes, read, old)


def _windower(lanes: int) -> Any:
    """An intrinsic: the largest, or the sum, over a window of height x width places that lie ``row`` and ``column`` bytes apart."""

    @intrinsic  # type: ignore[untyped-decorator]
    def window(typing: Any, out: Any, x: Any, height: Any, width: Any, row: Any, column: Any, mean: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, x, height, width, row, column, mean = args
            vector, zero = ir.VectorType(_FLOAT, lanes), ir.Constant(_INT64, 0)
            wide = ir.VectorType(ir.DoubleType(), lanes)  # a float32 sum over a large image would lose digits

            def over(start: Any, meet: Callable[[Any, Any], Any]) -> Any:
                def along_row(i: Any, state: list[Any]) -> list[Any]:
                    begin = builder.add(x, builder.mul(i, row))

                    def along_column(j: Any, state: list[Any]) -> list[Any]:
                        return [meet(state[0], _load(builder, builder.add(begin, builder.mul(j, column)), vector))]

                    return _phi_loop(builder, zero, width, 1, state, along_column)[1]

                return _phi_loop(builder, zero, height, 1, [start], along_row)[1][0]

            with builder.if_else(builder.icmp_signed("!=", mean, zero)) as (averaged, otherwise):
                with averaged:
                    total = over(ir.Constant(wide, [0.0] * lanes), lambda old, read: builder.fadd(old, builder.fpext(read, wide)))
                    count = _splat(builder, builder.sitofp(builder.mul(height, width), wide.element), lanes)
                    _store(builder, builder.fptrunc(builder.fdiv(total, count), vector), out)
                with otherwise:
                    lowest = ir.Constant(vector, [float("-inf")] * lanes)
                    _store(builder, over(lowest, lambda old, read: _larger(builder, old, read)), out)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return window


def _halver(lanes: int) -> Any:
    """An intrinsic: ``lanes`` outputs of 2 x 2 max-pooling from two rows of one image."""

    @intrinsic  # type: ignore[untyped-decorator]
    def halve(typing: Any, out: Any, above: Any, below: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            out, above, below = args
            vector = ir.VectorType(_FLOAT, 2 * lanes)
            both = _larger(builder, _load(builder, above, vector), _load(builder, below, vector))
            even, odd = (
                builder.shuffle_vector(both, both, ir.Constant(ir.VectorType(_INT32, lanes), list(range(first, 2 * lanes, 2))))
                for first in (0, 1)
            )
            _store(builder, _larger(builder, even, odd), out)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    return halve


move, move4 = _mover(LANES), _mover(4)
window, window4, window1 = _windower(LANES), _windower(4), _windower(1)
halve8, halve4 = _halver(8), _halver(4)


@intrinsic  # type: ignore[untyped-decorator]
def transpose8(typing: Any, out: Any, x: Any, out_step: Any, x_step: Any) -> Any:
    """8 runs of 8 floats, ``x_step`` bytes apart, become 8 runs ``out_step`` bytes apart: three perfect shuffles of the runs."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        out, x, out_step, x_step = args
        vector = ir.VectorType(_FLOAT, 8)
        runs = [_load(builder, builder.add(x, builder.mul(x_step, ir.Constant(_INT64, i))), vector) for i in range(8)]
        halves = [[i // 2 + 8 * (i % 2) for i in range(first, first + 8)] for first in (0, 8)]
        orders = [ir.Constant(ir.VectorType(_INT32, 8), half) for half in halves]
        for _ in range(3):
            runs = [builder.shuffle_vector(runs[i // 2], runs[i // 2 + 4], orders[i % 2]) for i in range(8)]
        for i, run in enumerate(runs):
            _store(builder, run, builder.add(out, builder.mul(out_step, ir.Constant(_INT64, i))))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate
