"""nettrim: prunes trained networks layer by layer, with a guarantee that anyone can recompute."""

from .certificate import Certificate
from .checkpoint import load
from .finetune import keep_zeros
from .methods import OBS, LinearADMM, Magnitude, NetTrim, Random, SparseGPT, Wanda
from .pruning import PruneResult, prune
from .report import LayerReport, PruneReport
from .status import CertificateError, InvalidInput, NetTrimError, NothingToPrune, Status, UnknownLayer
from .verify import verify

__all__ = [  # noqa: RUF022 (plain order)
    "Certificate",
    "CertificateError",
    "InvalidInput",
    "LayerReport",
    "LinearADMM",
    "Magnitude",
    "NetTrim",
    "NetTrimError",
    "NothingToPrune",
    "OBS",
    "PruneReport",
    "PruneResult",
    "Random",
    "SparseGPT",
    "Status",
    "UnknownLayer",
    "Wanda",
    "keep_zeros",
    "load",
    "prune",
    "verify",
]
