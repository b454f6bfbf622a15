"""Runs a C export with this computer's compiler: does it compute what the model does, and how large is its code?"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..status import InvalidInput, NetTrimError

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")

DRIVER = """\
#include <stdio.h>
#include "{name}.h"

int main(void)
{{
    static float input[{upper}_INPUTS], output[{upper}_OUTPUTS];
    while (fread(input, sizeof(float), {upper}_INPUTS, stdin) == {upper}_INPUTS) {{
        {name}_run(input, output);
        if (fwrite(output, sizeof(float), {upper}_OUTPUTS, stdout) != {upper}_OUTPUTS)
            return 1;
    }}
    return 0;
}}
"""


def compiler() -> list[str] | None:
    """The C compiler's command: ``$CC``, else cc, gcc or clang; None where there is none. Raises InvalidInput for a wrong ``$CC``."""
    stated = os.environ.get("CC", "")
    try:
        named = shlex.split(stated)
    except ValueError:  # a quotation mark without its other
        named = [stated]
    if named:
        if not shutil.which(named[0]):
            raise InvalidInput(f"export: CC={stated!r} must name a C compiler, and there is no such command; set it right, or unset it")
        return named
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return None if found is None else [found]


def run(folder: Path, name: str, samples: Tensor, options: tuple[str, ...] = ("-O1",)) -> Tensor:
    """Compiles ``name.c`` in a folder, without a single warning, and gives its outputs (samples, outputs), float32.

    Raises NetTrimError where it does not compile or run.
    """
    found = compiler()
    assert found is not None
    driver = f"{name}-driver.c"  # no network can have this name
    (folder / driver).write_text(DRIVER.format(name=name, upper=name.upper()), encoding="ascii")
    program = folder / f"{name}-check"
    _done([*found, *STRICT, *options, driver, f"{name}.c", "-o", program.name], folder)
    flat = samples.to(torch.float32).reshape(len(samples), -1).contiguous()
    put_out = _done([str(program)], folder, flat.numpy().tobytes())
    return torch.from_numpy(np.frombuffer(put_out, np.float32).copy()).reshape(len(samples), -1)


def code_bytes(folder: Path, name: str) -> int | None:
    """Machine code of the network at -Os, for this computer, without constants; None where ``size`` does not tell."""
    found, reader = compiler(), shutil.which("size")
    if found is None or reader is None:
        return None
    _done([*found, "-std=c99", "-Os", "-c", f"{name}.c", "-o", f"{name}.o"], folder)
    try:
        listing = _done([reader, "-A", f"{name}.o"], folder).decode()
    except NetTrimError:  # another kind of ``size``
        return None
    parts = [line.split() for line in listing.splitlines()]
    return sum(int(part[1]) for part in parts if len(part) == 3 and part[0].startswith(".text")) or None


def _done(command: list[str], folder: Path, given: bytes = b"") -> bytes:
    done = subprocess.run(command, cwd=folder, input=given, capture_output=True, check=False)
    if done.returncode:
        said = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[0]
        raise NetTrimError(f"export: the C file was made but {Path(command[0]).name} fails on it ({said}): nothing is written")
    return done.stdout
