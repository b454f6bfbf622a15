"""What an export made: data only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CSizes:
    """Sizes of a C export in bytes.

    ``weights``: the stored weights; ``positions``: where the nonzeros of sparse layers stand; ``biases``: biases, and scales of
    batch-norms that could not be folded; ``dense``: what the weights of all layers would take with their zeros; ``work``: static work
    memory; ``code``: machine code for this computer at -Os, None where there is no compiler or no ``size``.
    """

    weights: int
    positions: int
    biases: int
    dense: int
    work: int
    code: int | None

    @property
    def model(self) -> int:
        """Weights and positions together."""
        return self.weights + self.positions


@dataclass(frozen=True)
class Exported:
    """What :func:`nettrim.export` wrote.

    ``bytes`` counts all ``files``. ``difference`` is the largest found between the file's outputs and the model's, relative to the
    largest output, over the ``checked`` batch sizes; None where nothing could run the file, which a note then says. ``dynamic``:
    the file takes batches of any size (a C function takes one sample at a time).
    """

    path: Path
    format: str
    files: tuple[Path, ...]
    bytes: int
    difference: float | None
    checked: tuple[int, ...]
    dynamic: bool
    notes: tuple[str, ...] = ()
    sizes: CSizes | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = asdict(self) | {"path": str(self.path), "files": [str(file) for file in self.files]}
        return plain | {"checked": list(self.checked), "notes": list(self.notes)}

    def __str__(self) -> str:
        from ..render.deploy_words import exported_text  # presentation stays in render

        return exported_text(self)

    __repr__ = __str__
