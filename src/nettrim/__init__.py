"""nettrim: prunes trained networks layer by layer, with a guarantee that anyone can recompute."""

from .alternating import Alternated, alternate
from .bound_network import GapBound, NetworkBounds, network_bounds
from .certificate import Certificate
from .checkpoint import load, save_weights
from .compare import ComparedRun, Comparison, compare
from .deploy import Accelerated, Bench, Compacted, Exported, accelerate, bench, compact, export
from .distill import Distilled, distill
from .finetune import FineTuning, finetuning, keep_zeros
from .methods import LOBS, OBS, LinearADMM, Magnitude, NetTrim, Random, SparseGPT, Wanda
from .pruning import PruneResult, prune
from .recertify import recertify
from .report import LayerReport, PruneReport
from .status import CertificateError, InvalidInput, NetTrimError, NothingToPrune, Status, UnknownLayer
from .trimming import NetworkTrimming, Trimmed, trim
from .verify import verify

__all__ = [  # noqa: RUF022 (plain order)
    "Accelerated",
    "Alternated",
    "Bench",
    "Certificate",
    "CertificateError",
    "Compacted",
    "ComparedRun",
    "Comparison",
    "Distilled",
    "Exported",
    "FineTuning",
    "GapBound",
    "InvalidInput",
    "LOBS",
    "LayerReport",
    "LinearADMM",
    "Magnitude",
    "NetTrim",
    "NetTrimError",
    "NetworkBounds",
    "NetworkTrimming",
    "NothingToPrune",
    "OBS",
    "PruneReport",
    "PruneResult",
    "Random",
    "SparseGPT",
    "Status",
    "Trimmed",
    "UnknownLayer",
    "Wanda",
    "accelerate",
    "alternate",
    "bench",
    "compact",
    "compare",
    "distill",
    "export",
    "finetuning",
    "keep_zeros",
    "load",
    "network_bounds",
    "prune",
    "recertify",
    "save_weights",
    "trim",
    "verify",
]
