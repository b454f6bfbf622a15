"""nettrim: prunes trained networks layer by layer, with a guarantee that anyone can recompute."""

from .bound_network import GapBound, NetworkBounds, network_bounds
from .certificate import Certificate
from .checkpoint import load
from .compare import ComparedRun, Comparison, compare
from .distill import Distilled, distill
from .finetune import keep_zeros
from .methods import OBS, LinearADMM, Magnitude, NetTrim, Random, SparseGPT, Wanda
from .pruning import PruneResult, prune
from .recertify import recertify
from .report import LayerReport, PruneReport
from .status import CertificateError, InvalidInput, NetTrimError, NothingToPrune, Status, UnknownLayer
from .verify import verify

__all__ = [  # noqa: RUF022 (plain order)
    "Certificate",
    "CertificateError",
    "ComparedRun",
    "Comparison",
    "Distilled",
    "GapBound",
    "InvalidInput",
    "LayerReport",
    "LinearADMM",
    "Magnitude",
    "NetTrim",
    "NetTrimError",
    "NetworkBounds",
    "NothingToPrune",
    "OBS",
    "PruneReport",
    "PruneResult",
    "Random",
    "SparseGPT",
    "Status",
    "UnknownLayer",
    "Wanda",
    "compare",
    "distill",
    "keep_zeros",
    "load",
    "network_bounds",
    "prune",
    "recertify",
    "verify",
]
