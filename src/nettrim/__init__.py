"""nettrim: prunes trained networks layer by layer, with a guarantee that anyone can recompute."""

from .certificate import Certificate
from .checkpoint import load
from .finetune import keep_zeros
from .methods import Magnitude, NetTrim
from .pruning import PruneResult, prune
from .report import LayerReport, PruneReport
from .status import CertificateError, InvalidInput, NetTrimError, NothingToPrune, Status, UnknownLayer
from .verify import verify

__all__ = [
    "Certificate",
    "CertificateError",
    "InvalidInput",
    "LayerReport",
    "Magnitude",
    "NetTrim",
    "NetTrimError",
    "NothingToPrune",
    "PruneReport",
    "PruneResult",
    "Status",
    "UnknownLayer",
    "keep_zeros",
    "load",
    "prune",
    "verify",
]
