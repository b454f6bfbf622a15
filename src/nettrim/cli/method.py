"""The pruning method that the command line names, made from the options that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from ..methods import LOBS, OBS, LinearADMM, Magnitude, Method, NetTrim, Random, SparseGPT, Wanda
from ..status import InvalidInput
from .options import again

TARGETS = ("sparsity", "epsilon", "penalty", "error", "pattern")
METHODS: dict[str, Callable[..., Method]] = {
    "nettrim": NetTrim,
    "magnitude": Magnitude,
    "random": Random,
    "wanda": Wanda,
    "obs": OBS,
    "lobs": LOBS,
    "sparsegpt": SparseGPT,
    "linear-admm": LinearADMM,
}


def method_from(name: str, options: Mapping[str, Any], seed: int) -> Method:
    """The method of that name in any case. ``options`` are settings by name, ``None`` where not given; ``seed`` is for methods that draw.

    Raises:
        InvalidInput: no such method, an option that it does not take, or a setting outside its range.
    """
    key = name.lower()
    if key not in METHODS:
        near = get_close_matches(key, METHODS, n=1, cutoff=0.0)[0]
        raise InvalidInput(f"--method {name!r} is not known; the nearest is {near!r} (methods: {', '.join(METHODS)})")
    takes = inspect.signature(METHODS[key]).parameters
    given = {option: value for option, value in options.items() if value is not None}
    refused = [option for option in given if option not in takes]
    if refused:
        others = [other for other, make in METHODS.items() if set(refused) <= set(inspect.signature(make).parameters)]
        raise InvalidInput(
            f"--method {key} does not take {_listed(refused)}; it takes {_listed([option for option in options if option in takes])}. "
            f"Leave {'it' if len(refused) == 1 else 'them'} out{', or choose ' if others else ''}{' or '.join(others)}"
        )
    targets = [text.split() for text in ("--sparsity 0.8", "--epsilon 0.05") if text.split()[0][2:] in takes]
    if targets and not any(option in given for option in TARGETS):
        lines = "".join(f"\n  {again(*words)}" for words in targets)
        raise InvalidInput(f"prune needs to know how far to go; a share of zeros, say, or how far each layer's output may move:{lines}")
    return METHODS[key](**given, **({"seed": seed} if "seed" in takes else {}))


def _listed(options: Sequence[str]) -> str:
    return " and ".join(f"--{option}" for option in options)
