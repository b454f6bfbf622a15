"""Makes a pruned network small for real: what has become dead is removed; and writes it for other programs to run."""

from .accelerate import Accelerated, accelerate
from .bench import bench
from .bench_result import Bench
from .compact import Compacted, compact
from .export import export
from .export_result import CSizes, Exported

__all__ = ["Accelerated", "Bench", "CSizes", "Compacted", "Exported", "accelerate", "bench", "compact", "export"]
