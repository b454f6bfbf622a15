"""The operations of sparse execution: one native function (numba) that every thread of a team runs on the same program.

Activations are stored features-first with images innermost, so the inputs that one nonzero weight meets lie in one contiguous run, and
a shift by a convolution's tap is an offset of the pointer (direct sparse convolution: Park and others, ICLR 2017; blocks in registers:
Elsen and others, CVPR 2020).

A program is an int64 array: the number of operations, then `WIDTH` numbers for each, at the places named below; addresses in bytes,
strides in floats. Threads take items of the current operation from an atomic counter and go on to the next when all are done, so any
number of threads computes the same numbers, and none is needed for the others to finish.
"""

from __future__ import annotations

import sys
from typing import Any

import numba
from numba import types

from .kernels_vectors import (
    LANES,
    block1,
    block2,
    block4,
    block8,
    fetch_add,
    get,
    get32,
    halve4,
    halve8,
    move,
    move4,
    prefetch,
    read,
    transpose8,
    window,
    window1,
    window4,
    write,
)

njit: Any = numba.njit
cfunc: Any = numba.cfunc

TILE = 8 * LANES
"""Floats that one item of RUNS puts out for each of its channels."""
AHEAD = 256
"""So many nonzeros ahead the next ones are asked for: they come from far, are used once, and the order of x is not foreseen."""
WIDTH = 32
"""Numbers of one operation."""

RUNS, DOTS, POOL, SUM, PHASES, IMPORT = range(6)
"""Kinds of operations; see the functions below."""

# places in an operation; what the kinds share
KIND, NEXT, DONE, ITEMS, OUT, X, OUT_STRIDE, X_STRIDE, CHANNELS, LENGTH = range(10)
# RUNS, DOTS, SUM
VALUES, OFFSETS, ROWS, BIAS, CLAMP, MASK, ADDED, GROUP, TILES = range(10, 19)
# POOL, PHASES, IMPORT
IMAGES, HEIGHT, WIDE, X_PITCH, OUT_PITCH, KERNEL_H, KERNEL_W, STEP_H, STEP_W, MEAN, X_HEIGHT, X_WIDE = range(10, 22)
GROUP_ROWS, ALL_ROWS = range(22, 24)

if sys.platform == "win32":

    @njit(nogil=True)  # type: ignore[untyped-decorator]
    def _pause() -> None:
        """Waiting threads spin."""
else:
    _yield = types.ExternalFunction("sched_yield", types.int32())

    @njit(nogil=True)  # type: ignore[untyped-decorator]
    def _pause() -> None:
        """Lets another thread have the core: the one that is waited for may be without one."""
        _yield()


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _runs(op: int, item: int) -> None:
    """RUNS: one tile of positions of a group of channels; clamp(bias[k] + sum_j values[j] * x[offsets[j] + i] + added[k, i])."""
    tiles, group = get(op, TILES), get(op, GROUP)
    first, last = (item % tiles) * TILE, min((item % tiles + 1) * TILE, get(op, LENGTH))
    channels = range((item // tiles) * group, min((item // tiles + 1) * group, get(op, CHANNELS)))
    out, x, stride = get(op, OUT), get(op, X), get(op, OUT_STRIDE)
    values, offsets, rows, bias = get(op, VALUES), get(op, OFFSETS), get(op, ROWS), get(op, BIAS)
    low, high = read(get(op, CLAMP), 0), read(get(op, CLAMP), 1)
    added, mask = get(op, ADDED), get(op, MASK)
    i = first
    while i < last:
        left = (last - i) // LANES
        width = 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1
        here = x + 4 * i
        covered = mask + 4 * i if mask else 0
        for k in channels:
            begin, end, offset = get32(rows, k), get32(rows, k + 1), read(bias, k)
            place = 4 * (k * stride + i)
            other = added + place if added else 0
            if width == 8:
                block8(out + place, here, values, offsets, begin, end, offset, low, high, other, covered)
            elif width == 4:
                block4(out + place, here, values, offsets, begin, end, offset, low, high, other, covered)
            elif width == 2:
                block2(out + place, here, values, offsets, begin, end, offset, low, high, other, covered)
            else:
                block1(out + place, here, values, offsets, begin, end, offset, low, high, other, covered)
        i += width * LANES


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _clamped(value: float, op: int) -> float:
    low, high = read(get(op, CLAMP), 0), read(get(op, CLAMP), 1)
    return low if value < low else high if value > high else value


@njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})  # type: ignore[untyped-decorator]
def _dots(op: int, item: int) -> None:
    """DOTS: a group of outputs for a single image; out[k] = clamp(bias[k] + sum_j values[j] * x[offsets[j]])."""
    group = get(op, GROUP)
    x, out = get(op, X), get(op, OUT)
    values, offsets, rows, bias, added = get(op, VALUES), get(op, OFFSETS), get(op, ROWS), get(op, BIAS), get(op, ADDED)
    for k in range(item * group, min((item + 1) * group, get(op, CHANNELS))):
        j, end = get32(rows, k), get32(rows, k + 1)
        a = b = c = d = types.float32(0.0)
        while j + 16 <= end:
            prefetch(values, j + AHEAD)
            prefetch(offsets, j + AHEAD)
            for _ in range(4):
                a += read(values, j) * read(x, get32(offsets, j))
                b += read(values, j + 1) * read(x, get32(offsets, j + 1))
                c += read(values, j + 2) * read(x, get32(offsets, j + 2))
                d += read(values, j + 3) * read(x, get32(offsets, j + 3))
                j += 4
        while j + 4 <= end:
            a += read(values, j) * read(x, get32(offsets, j))
            b += read(values, j + 1) * read(x, get32(offsets, j + 1))
            c += read(values, j + 2) * read(x, get32(offsets, j + 2))
            d += read(values, j + 3) * read(x, get32(offsets, j + 3))
            j += 4
        while j < end:
            a += read(values, j) * read(x, get32(offsets, j))
            j += 1
        total = (a + b) + (c + d) + read(bias, k)
        if added:
            total += read(added, k)
        write(out, k, _clamped(total, op))


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _sum(op: int, channel: int) -> None:
    """SUM: one channel; out = clamp(x + added), both of the same layout."""
    begin = 4 * channel * get(op, OUT_STRIDE)
    x, out, added = get(op, X) + begin, get(op, OUT) + begin, get(op, ADDED) + begin
    mask, low, high = get(op, MASK), read(get(op, CLAMP), 0), read(get(op, CLAMP), 1)
    other = added if get(op, ADDED) else 0
    for i in range(0, get(op, LENGTH), LANES):
        move(out + 4 * i, x + 4 * i, low, high, other + 4 * i if other else 0, mask + 4 * i if mask else 0)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _pool(op: int, channel: int) -> None:
    """POOL: one channel; the largest or the mean over windows without padding."""
    images, x_pitch = get(op, IMAGES), get(op, X_PITCH)
    height, width, down, right = get(op, KERNEL_H), get(op, KERNEL_W), get(op, STEP_H), get(op, STEP_W)
    mean = get(op, MEAN)
    x, out = get(op, X) + 4 * channel * get(op, X_STRIDE), get(op, OUT) + 4 * channel * get(op, OUT_STRIDE)
    row, column = 4 * x_pitch * images, 4 * images
    columns = get(op, WIDE)
    for h in range(get(op, HEIGHT)):
        above, place = x + h * down * row, out + 4 * h * get(op, OUT_PITCH) * images
        w = 0
        if images == 1 and height == 2 and width == 2 and right == 2 and not mean:
            while w + 8 <= columns:
                halve8(place + 4 * w, above + 8 * w, above + row + 8 * w)
                w += 8
            while w + 4 <= columns:
                halve4(place + 4 * w, above + 8 * w, above + row + 8 * w)
                w += 4
        while w < columns:
            source, target, n = above + w * right * column, place + w * column, 0
            while n + LANES <= images:
                window(target + 4 * n, source + 4 * n, height, width, row, column, mean)
                n += LANES
            while n + 4 <= images:
                window4(target + 4 * n, source + 4 * n, height, width, row, column, mean)
                n += 4
            while n < images:
                window1(target + 4 * n, source + 4 * n, height, width, row, column, mean)
                n += 1
            w += 1


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _phases(op: int, channel: int) -> None:
    """PHASES: one channel becomes KERNEL_H x KERNEL_W, each with every STEP_H-th row and STEP_W-th column; zero beyond the input."""
    images, x_pitch, down, right = get(op, IMAGES), get(op, X_PITCH), get(op, STEP_H), get(op, STEP_W)
    low, high = types.float32(-float("inf")), types.float32(float("inf"))
    x = get(op, X) + 4 * channel * get(op, X_STRIDE)
    vertical, horizontal = get(op, KERNEL_H), get(op, KERNEL_W)
    for phase in range(vertical * horizontal):
        first_row, first_column = phase // horizontal, phase % horizontal
        out = get(op, OUT) + 4 * (channel * vertical * horizontal + phase) * get(op, OUT_STRIDE)
        for h in range(get(op, HEIGHT)):
            row = h * down + first_row
            for w in range(get(op, WIDE)):
                column = w * right + first_column
                target = out + 4 * (h * get(op, OUT_PITCH) + w) * images
                n = 0
                if row < get(op, X_HEIGHT) and column < get(op, X_WIDE):
                    source = x + 4 * (row * x_pitch + column) * images
                    while n + LANES <= images:
                        move(target + 4 * n, source + 4 * n, low, high, 0, 0)
                        n += LANES
                    while n + 4 <= images:
                        move4(target + 4 * n, source + 4 * n, low, high, 0, 0)
                        n += 4
                    while n < images:
                        write(target, n, read(source, n))
                        n += 1
                else:
                    for n in range(images):
                        write(target, n, types.float32(0.0))


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _import(op: int, item: int) -> None:
    """IMPORT: GROUP_ROWS rows of channels from images that lie one after the other, STEP_H floats apart, to places STEP_W floats apart."""
    group = get(op, GROUP_ROWS)
    for row in range(item * group, min((item + 1) * group, get(op, ALL_ROWS))):
        _import_row(op, row)


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _import_row(op: int, row: int) -> None:
    images, wide, height = get(op, IMAGES), get(op, WIDE), get(op, HEIGHT)
    x = get(op, X) + 4 * row * get(op, X_PITCH)
    out = get(op, OUT) + 4 * (row // height * get(op, OUT_STRIDE) + row % height * get(op, OUT_PITCH))
    x_step, out_step = get(op, STEP_H), get(op, STEP_W)
    if images >= 8 and wide >= 8:
        n = w = 0
        while n < images:
            n = min(n, images - 8)  # the last ones overlap
            w = 0
            while w < wide:
                w = min(w, wide - 8)
                transpose8(out + 4 * (w * out_step + n), x + 4 * (n * x_step + w), 4 * out_step, 4 * x_step)
                w += 8
            n += 8
    elif images == 1 and out_step == 1 and wide >= 4:
        low, high = types.float32(-float("inf")), types.float32(float("inf"))
        w = 0
        while w < wide:
            if w + LANES <= wide:
                move(out + 4 * w, x + 4 * w, low, high, 0, 0)
                w += LANES
            else:
                w = min(w, wide - 4)  # the last ones overlap
                move4(out + 4 * w, x + 4 * w, low, high, 0, 0)
                w += 4
    else:
        for w in range(wide):
            for n in range(images):
                write(out, w * out_step + n, read(x, n * x_step + w))


@njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _work(program: int) -> None:
    for number in range(get(program, 0)):
        op = program + 8 * (1 + number * WIDTH)
        kind, items, waited = get(op, KIND), get(op, ITEMS), 0
        while True:
            item = fetch_add(op, NEXT, 1)
            if item >= items:
                break
            if kind == RUNS:
                _runs(op, item)
            elif kind == DOTS:
                _dots(op, item)
            elif kind == POOL:
                _pool(op, item)
            elif kind == SUM:
                _sum(op, item)
            elif kind == PHASES:
                _phases(op, item)
            else:
                _import(op, item)
            fetch_add(op, DONE, 1)
        while fetch_add(op, DONE, 0) < items:
            waited += 1
            if waited > 1000:
                _pause()


@cfunc(types.void(types.int64), nopython=True, error_model="numpy")  # type: ignore[untyped-decorator]
def work(program: int) -> None:
    """Runs a program, alone or beside other threads that run it too; ``program`` is its address."""
    _work(program)
