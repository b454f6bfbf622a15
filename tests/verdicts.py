"""What must be true of the verdict of every result, whether its tolerances can be reached or not."""

from __future__ import annotations

from nettrim import PruneResult, Status

UNMET = (Status.INFEASIBLE, Status.SKIPPED)


def truthful(result: PruneResult) -> bool:
    """No stated bound is exceeded, and what was asked for is met wherever no layer's status says otherwise."""
    by_status = [layer.status not in UNMET for layer in result.report.layers]
    met = [layer.met for layer in result.certificate.layers]
    return result.certificate.sound and all(fine or not ended_well for fine, ended_well in zip(met, by_status, strict=True))
