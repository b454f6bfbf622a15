"""What follows a layer, as it is read from the graph, and a user's correction of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .preimage import IDENTITY, Activation, Pool

PARTS = ("norm", "branch", "activation", "pool")  # in the order in which they stand behind a layer


@dataclass(frozen=True)
class Reading:
    """The activation that follows a layer, in words how it was found or why it was not, and who says so.

    ``source`` is ``"graph"``, ``"stated"`` (by the user; the graph agrees or does not show it), ``"stated against the graph"`` or
    ``"not seen"`` (matched linearly). ``norm`` names the batch-norm between layer and activation that is folded into the program,
    ``total`` the graph's node of the sum in which the layer's output meets another branch before the activation, ``pool`` is the
    max-pooling that comes with the activation.
    """

    activation: Activation
    words: str
    source: str = "graph"
    norm: str = ""
    total: str = ""
    pool: Pool | None = None


@dataclass(frozen=True)
class Correction:
    """What a user says of a layer's reading: the parts in ``said`` are as given here, the others stay as they are read.

    ``None`` takes a part out. ``norm`` and ``pooling`` name modules; ``pool`` is what ``pooling`` computes. A branch can only be taken out.
    """

    said: frozenset[str]
    activation: Activation | None = None
    norm: str | None = None
    pooling: str | None = None
    pool: Pool | None = None

    @property
    def names_parts(self) -> bool:
        """Whether it says that something is there, and not only that something is not."""
        return self.activation is not None or self.norm is not None or self.pool is not None

    def record(self) -> dict[str, str | None]:
        """As plain data, in the form in which users write it."""
        values: Mapping[str, Any] = {
            "norm": self.norm,
            "branch": None,
            "activation": None if self.activation is None else self.activation.name,
            "pool": self.pooling,
        }
        return {part: values[part] for part in PARTS if part in self.said}

    def words(self) -> str:
        """What is said, for reports."""
        if self.said == {"activation"} and self.activation is not None:
            return "stated by the user"
        said = [f"no {part}" if value is None else f"{part} {value}" for part, value in self.record().items()]
        return f"stated by the user: {', '.join(said)}"


def corrected(reading: Reading, correction: Correction) -> tuple[Reading, frozenset[str] | None]:
    """The reading as the user corrects it, and which parts of the one that was read it still speaks of.

    What stands behind a part that is taken out, or that is another one, goes with it unless it is stated too: an activation behind
    a batch-norm says nothing of what comes before. ``None`` instead of parts when the corrected reading does not follow from the
    one that was read: no bound may rest on it then.
    """
    final, hidden = reading, reading.source == "not seen"
    nothing = reading.activation if hidden else IDENTITY
    if "norm" in correction.said and (correction.norm or "") != reading.norm:
        final = replace(final, norm=correction.norm or "", total="", pool=None, activation=nothing)
    if "branch" in correction.said and final.total:
        final = replace(final, total="", pool=None, activation=nothing)
    if "activation" in correction.said:
        activation = correction.activation or nothing
        pool = None if activation.is_point and activation != reading.activation else final.pool
        final = replace(final, activation=activation, pool=pool)
    if "pool" in correction.said:
        final = replace(final, pool=correction.pool)
    kept = frozenset(PARTS) if hidden else _kept(reading, final)
    if _same(reading, final) or hidden:
        source = "stated" if correction.names_parts else reading.source
    else:  # a mere part of what was read rests on the graph alone
        named = correction.activation is not None and correction.activation != reading.activation
        source = "stated against the graph" if named or kept is None else "graph"
    words = correction.words()
    if not _same(reading, final) and not hidden:
        words += f" (the graph reads {reading.activation.name}: {reading.words})"
    return replace(final, words=words, source=source), kept


def _same(reading: Reading, final: Reading) -> bool:
    return replace(reading, words="", source="") == replace(final, words="", source="")


def _kept(reading: Reading, final: Reading) -> frozenset[str] | None:
    """The parts of ``reading`` that ``final`` speaks of, when it is the reading itself, its beginning, or the reading without pooling.

    Whatever follows, a box that is a point bounds how far the pre-activation moves; and max-pooling moves nothing further than its input.
    """
    if _same(reading, final):
        return frozenset(PARTS)
    if _same(replace(reading, pool=None), final):
        return frozenset(PARTS) - {"pool"}
    if not final.activation.is_point or final.pool is not None:
        return None
    if (final.norm, final.total) == (reading.norm, reading.total):
        return frozenset({"norm", "branch"})
    if (final.norm, final.total) == (reading.norm, ""):
        return frozenset({"norm"})
    return frozenset() if (final.norm, final.total) == ("", "") else None
