"""How a solve ended, and the errors that refuse bad input; every member and every error names its remedy. What others' errors say."""

from __future__ import annotations

from enum import Enum


class Status(Enum):
    """How the program of one layer was solved. ``remedy`` says what to do about it."""

    CONVERGED = "converged"
    ITERATION_LIMIT = "iteration limit"
    INFEASIBLE = "tolerance out of reach"
    ORIGINAL_KEPT = "original weights kept"
    SKIPPED = "left unpruned"

    @property
    def remedy(self) -> str:
        return _REMEDIES[self]

    @property
    def ok(self) -> bool:
        """True when the layer's target was met by a solver that met its own stopping rule."""
        return self is Status.CONVERGED


_REMEDIES: dict[Status, str] = {
    Status.CONVERGED: "nothing to do",
    Status.ITERATION_LIMIT: "raise max_iterations, or accept the stated duality gap (rounding may limit it)",
    Status.INFEASIBLE: "no weights reach this tolerance on these inputs: the best reachable distance was used; "
    "raise epsilon for this layer or lower it for the layers before",
    Status.ORIGINAL_KEPT: "only the original weights were found to meet this tolerance: raise epsilon",
    Status.SKIPPED: "see the layer's notes",
}


class NetTrimError(Exception):
    """Base of every error that nettrim raises on purpose."""


class InvalidInput(NetTrimError, ValueError):
    """A setting, a model or data that cannot be used. The message names it, what is required and what to do."""


class UnknownLayer(InvalidInput):
    """A layer name that the model does not have. The message names the nearest one that it has."""


class NothingToPrune(InvalidInput):
    """The model holds no layer that nettrim can prune, or every one was excluded."""


class CertificateError(NetTrimError):
    """A stored certificate does not hold when it is recomputed."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of others says, no longer than a message can hold; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
