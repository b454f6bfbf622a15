"""Makes a pruned network small for real: what has become dead is removed; and writes it for other programs to run."""

from .accelerate import Accelerated, accelerate
from .compact import Compacted, compact
from .export import export
from .export_result import CSizes, Exported

__all__ = ["Accelerated", "CSizes", "Compacted", "Exported", "accelerate", "compact", "export"]
