"""Makes a pruned network small for real: what has become dead is removed."""

from .compact import Compacted, compact

__all__ = ["Compacted", "compact"]
