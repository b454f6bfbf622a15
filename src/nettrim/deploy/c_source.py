"""The text of a C export: a plan's steps as C99, with its weights as constant arrays."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..status import InvalidInput
from .c_coding import Coded, coded
from .c_kernels import pieces
from .c_memory import Memory, planned
from .c_steps import (
    AdaptivePool,
    Add,
    Affine,
    Array,
    AveragePool,
    Clip,
    Convolution,
    Copy,
    Leaky,
    Linear,
    MaxPool,
    Plan,
    Step,
    Window,
)
from .export_result import CSizes

WIDTH = 120


@dataclass(frozen=True)
class Source:
    """The two files of a network, and their sizes (without code, which only a compiler knows)."""

    header: str
    source: str
    sizes: CSizes


def source_of(plan: Plan, name: str) -> Source:
    """The C files of a plan, for a function ``<name>_run``. Raises InvalidInput for weights that float32 does not hold."""
    writer = _Writer(plan, planned(plan))
    for step in plan.steps:
        writer.step(step)
    sizes = CSizes(writer.weights, writer.positions, writer.biases, writer.dense, 4 * writer.memory.size, None)
    return Source(_header(plan, name), writer.text(name, sizes), sizes)


@dataclass(eq=False)
class _Writer:
    """Collects arrays and calls, step by step."""

    plan: Plan
    memory: Memory
    arrays: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    called: dict[str, None] = field(default_factory=dict)
    known: dict[tuple[str, bytes], str] = field(default_factory=dict)
    weights: int = 0
    positions: int = 0
    biases: int = 0
    dense: int = 0
    loops: bool = False

    def step(self, step: Step) -> None:
        """The arrays and the calls of one step."""
        self.calls.append(f"    /* {_plain(step.label)} */")
        x, y = self._place(step.inputs[0]), self._place(step.output)
        size = math.prod(self.plan.shapes[step.output])
        if isinstance(step, Linear):
            self._linear(step, x, y)
        elif isinstance(step, Convolution):
            each = step.weight.shape[1]
            shape = self._window(step.window, step.before, step.after)
            self._layer("conv", step, step.weight, step.bias, x, y, f"{each}, {shape}")
        elif isinstance(step, MaxPool):
            self._call("max_pool", x, y, self._window(step.window, step.before, step.after))
        elif isinstance(step, AveragePool):
            shape = self._window(step.window, step.before, step.after)
            self._call("average_pool", x, y, shape, int(step.counts_padding), step.divisor)
        elif isinstance(step, AdaptivePool):
            none = Window((1, 1), (1, 1), (0, 0), (1, 1))
            self._call("adaptive_pool", x, y, self._window(none, step.before, step.after))
        elif isinstance(step, Clip):
            low, high = step.low > -math.inf, step.high < math.inf
            if low:
                self._call("clip_low", x, y, size, _number(step.low))
            if high:
                self._call("clip_high", y if low else x, y, size, _number(step.high))
        elif isinstance(step, Leaky):
            self._call("leaky", x, y, size, _number(step.slope))
        elif isinstance(step, Affine):
            scale, shift = (self._floats(part, array, step) for part, array in (("scales", step.scale), ("shifts", step.shift)))
            self._call("affine", x, y, scale, shift, len(step.scale), step.inner)
        elif isinstance(step, Add):
            self._call("add", x, self._place(step.inputs[1]), y, size)
        elif isinstance(step, Copy):
            self._call("copy", x, y, size)
        else:
            raise AssertionError(f"no C is written for {type(step).__name__}")

    def text(self, name: str, sizes: CSizes) -> str:
        """The whole source file."""
        kernels = pieces(self.called)
        includes = [f'#include "{name}.h"', "", "#include <float.h>", "#include <stddef.h>", "#include <stdint.h>"]
        body = [f"void {name}_run(const float *input, float *output)", "{"]
        body += ["    uint32_t i;"] if self.loops else []
        body += [*self.calls, "}"]
        work = []
        if self.memory.size:
            work = ["/* values between the layers; places are used again as soon as a value is not needed any more */"]
            work += [f"static float work[{self.memory.size}];", ""]
        opening = [
            f"/* {name}: a trained network in plain C99, written by nettrim export.",
            "",
            f"   Read {name}.h for how to call it. Bytes:",
            f"   - weights {sizes.weights}, positions of nonzeros {sizes.positions}, biases {sizes.biases} (constant)",
            f"   - work memory {sizes.work} (static; no allocation, no recursion)",
            "   Batch-norms are folded into the layers before them where nothing else reads those. */",
        ]
        return "\n".join([*opening, "", *includes, "", *kernels, *self.arrays, *work, *body]) + "\n"

    def _place(self, value: int) -> str:
        place = self.memory.places[value]
        return place if isinstance(place, str) else f"work + {place}" if place else "work"

    def _call(self, function: str, *arguments: object) -> None:
        self.called[function] = None
        self.calls.append(f"    {function}({', '.join(map(str, arguments))});")

    def _linear(self, step: Linear, x: str, y: str) -> None:
        outputs, inputs = step.weight.shape
        if step.count > 1:
            self.loops = True
            self.calls.append(f"    for (i = 0; i < {step.count}; ++i)\n    ")
            x, y = f"{x} + i * {inputs}", f"{y} + i * {outputs}"
            before = self.calls.pop().rstrip(" ")
            self._layer("linear", step, step.weight, step.bias, x, y, f"{inputs}, {outputs}")
            self.calls[-1] = f"{before}    {self.calls[-1]}"
            return
        self._layer("linear", step, step.weight, step.bias, x, y, f"{inputs}, {outputs}")

    def _layer(self, kind: str, step: Step, weight: Array, bias: Array | None, x: str, y: str, shape: str) -> None:
        """The call of a layer, with its arrays in the smaller of both forms."""
        stored = coded(_float32(weight, step.label))
        self._comment(step, stored)
        values = self._array("float", f"weights_{_word(step.label)}", stored.values, "weights")
        self.dense += 4 * stored.size
        biases = "NULL" if bias is None or not bias.any() else self._floats("biases", bias, step)
        if not stored.width:
            self._call(f"{kind}_dense", x, y, values, biases, shape)
            return
        codes = self._array("uint8_t", f"gaps_{_word(step.label)}", stored.codes, "positions")
        self._call(f"{kind}_sparse", x, y, values, len(stored.values), codes, stored.width, biases, shape)

    def _comment(self, step: Step, stored: Coded) -> None:
        form = (
            f"{len(stored.values)} nonzeros of {stored.size}, gap codes of width {stored.width}"
            if stored.width
            else f"{stored.size}, dense"
        )
        self.arrays.append(f"/* {_plain(step.label)}: {form}; {stored.bytes} bytes */")

    def _floats(self, part: str, array: Array, step: Step) -> str:
        return self._array("float", f"{part}_{_word(step.label)}", _float32(array, step.label), "biases")

    def _array(self, kind: str, name: str, array: NDArray[np.float32] | NDArray[np.uint8], counted: str) -> str:
        """The name of a constant array with these entries, counted where it is new; NULL for none."""
        if not array.size:
            return "NULL"
        key = (kind, array.tobytes())
        if key not in self.known:
            taken = set(self.known.values())
            self.known[key] = next(full for full in (name, *(f"{name}_{n}" for n in range(2, len(taken) + 3))) if full not in taken)
            entries = (str(int(v)) for v in array) if kind == "uint8_t" else (_number(v) for v in array)
            self.arrays += [f"static const {kind} {self.known[key]}[{array.size}] = {{", *_lines(entries), "};", ""]
            setattr(self, counted, getattr(self, counted) + array.nbytes)
        return self.known[key]

    def _window(self, window: Window, before: tuple[int, int, int], after: tuple[int, int, int]) -> str:
        """The name of a constant that holds these sizes."""
        numbers = (*before, *after, *window.kernel, *window.stride, *window.padding, *window.dilation)
        key = ("window", repr(numbers).encode())
        if key not in self.known:
            name = f"window_{sum(kind == 'window' for kind, _ in self.known)}"
            self.known[key] = name
            self.arrays += [f"static const window {name} = {{{', '.join(map(str, numbers))}}};", ""]
        return f"&{self.known[key]}"


def _header(plan: Plan, name: str) -> str:
    before, after = plan.shapes[0], plan.shapes[plan.output]
    guard = f"{name.upper()}_H"
    return f"""\
/* {name}: a trained network in plain C99, written by nettrim export.

   input:  {math.prod(before)} floats, one sample of shape {_shape(before)}, last dimension fastest
   output: {math.prod(after)} floats, of shape {_shape(after)}

       float scores[{name.upper()}_OUTPUTS];
       {name}_run(sample, scores);

   The two arrays must not overlap. Work memory is static: one call at a time. */

#ifndef {guard}
#define {guard}

#define {name.upper()}_INPUTS {math.prod(before)}
#define {name.upper()}_OUTPUTS {math.prod(after)}

#ifdef __cplusplus
extern "C" {{
#endif

void {name}_run(const float *input, float *output);

#ifdef __cplusplus
}}
#endif

#endif
"""


def _float32(array: Array, label: str) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        small = array.astype(np.float32).reshape(-1)
    if not np.isfinite(small).all():
        raise InvalidInput(f"export: the weights of {label} do not fit into float32; scale the layer down")
    return small


def _number(value: float | np.float32) -> str:
    """The shortest decimal that reads as this float32."""
    return f"{np.float32(value)!s}f"


def _lines(entries: Iterable[str]) -> Iterator[str]:
    line = "   "
    for entry in entries:
        if len(line) + len(entry) + 2 > WIDTH:
            yield line
            line = "   "
        line += f" {entry},"
    yield line


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "1"


def _plain(label: str) -> str:
    """A label that can stand in a comment."""
    return re.sub(r"[^\w.,()+ -]", "_", label, flags=re.ASCII)


def _word(label: str) -> str:
    """A label as part of a C name."""
    return re.sub(r"\W+", "_", label.split(" ")[0], flags=re.ASCII)
