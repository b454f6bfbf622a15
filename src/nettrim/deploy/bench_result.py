"""What a bench measured: data only, and the ratios that follow from it (``render`` makes tables and the page's section)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..records import build, items
from ..status import InvalidInput
from .machine import Machine

DENSE, PRUNED, COMPACTED, ACCELERATED = "dense", "pruned", "compacted", "accelerated"


@dataclass(frozen=True)
class Timing:
    """One form at one batch size: median and quartiles of the seconds of ``runs`` passes.

    ``interrupted`` passes were set aside: the system took a processor away meanwhile (a note says where there were too few others).
    ``macs`` are the multiply-adds that the form does for one sample at this batch size; ``how`` is the arrangement that
    :func:`nettrim.accelerate` kept, empty for the other forms.
    """

    batch: int
    seconds: float
    lower: float
    upper: float
    runs: int
    interrupted: int
    macs: int | None
    how: str = ""

    @property
    def throughput(self) -> float:
        """Samples per second."""
        return self.batch / self.seconds


@dataclass(frozen=True)
class Form:
    """One form of the network.

    ``nonzeros`` of its parameters; ``bytes`` of its safetensors file, ``compressed_bytes`` of the packed one (docs/files.md), None where
    the state is no tensors; ``macs`` and ``nonzero_macs``: multiply-adds of one sample with and without those of zero weights, None where
    they could not be counted; ``difference``: the largest difference of its outputs from the pruned model's, relative to the largest of
    those, over all batch sizes. ``made_from`` names the form that this one was made from.
    """

    name: str
    made_from: str
    parameters: int
    nonzeros: int
    bytes: int | None
    compressed_bytes: int | None
    macs: int | None
    nonzero_macs: int | None
    difference: float | None
    timings: tuple[Timing, ...] = ()

    def at(self, batch: int) -> Timing | None:
        """The timing at this batch size, if there is one."""
        return next((timing for timing in self.timings if timing.batch == batch), None)


@dataclass(frozen=True)
class Bench:
    """What :func:`nettrim.bench` measured, in the order dense, pruned, compacted, accelerated.

    ``seconds`` were measured at least for each form and batch size. ``baseline`` names the form that ratios compare with.
    ``weights_hash`` is that of the pruned model's state dict, as in its certificate.
    """

    forms: tuple[Form, ...]
    baseline: str
    batch_sizes: tuple[int, ...]
    sample_shape: tuple[int, ...]
    dtype: str
    seconds: float
    weights_hash: str
    machine: Machine
    notes: tuple[str, ...]

    def form(self, name: str) -> Form:
        """The form of that name. Raises InvalidInput."""
        for form in self.forms:
            if form.name == name:
                return form
        raise InvalidInput(f"bench: there is no form {name!r}; there are {', '.join(form.name for form in self.forms)}")

    def ratios(self, name: str) -> dict[str, Any]:
        """How many times smaller or faster a form is than the baseline; None where one of the two is not known.

        ``compressed_bytes`` compares with the baseline's plain file and ``nonzero_macs`` with all its multiply-adds: what one would have
        otherwise. ``speed`` is by batch size, of the medians.
        """
        form, base = self.form(name), self.form(self.baseline)
        speed = {}
        for batch in self.batch_sizes:
            ours, theirs = form.at(batch), base.at(batch)
            speed[batch] = None if ours is None or theirs is None else theirs.seconds / ours.seconds
        return {
            "parameters": _times(base.parameters, form.parameters),
            "nonzeros": _times(base.nonzeros, form.nonzeros),
            "bytes": _times(base.bytes, form.bytes),
            "compressed_bytes": _times(base.bytes, form.compressed_bytes),
            "macs": _times(base.macs, form.macs),
            "nonzero_macs": _times(base.macs, form.nonzero_macs),
            "speed": speed,
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with throughputs and ratios."""
        forms = []
        for form in self.forms:
            ratios = self.ratios(form.name)
            timings = [asdict(timing) | {"throughput": timing.throughput} for timing in form.timings]
            ratios["speed"] = {str(batch): value for batch, value in ratios["speed"].items()}
            forms.append(asdict(form) | {"timings": timings, "ratios": ratios})
        return asdict(self) | {
            "forms": forms,
            "batch_sizes": list(self.batch_sizes),
            "sample_shape": list(self.sample_shape),
            "machine": self.machine.to_dict(),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Bench:
        """The inverse of ``to_dict``; throughputs and ratios are derived, not read. Raises InvalidInput."""
        forms = tuple(
            build(Form, form, timings=tuple(build(Timing, timing) for timing in items(form, "timings"))) for form in items(data, "forms")
        )
        sizes, shape, notes = (tuple(items(data, key)) for key in ("batch_sizes", "sample_shape", "notes"))
        if not all(isinstance(n, int) for n in (*sizes, *shape)) or not all(isinstance(note, str) for note in notes):
            raise InvalidInput("Bench: batch_sizes and sample_shape must be integers and notes texts; the file is damaged")
        if any(timing.seconds <= 0 for form in forms for timing in form.timings):
            raise InvalidInput("Bench: seconds must be above 0; the file is damaged")
        machine = Machine.from_dict(data.get("machine"))
        made = build(cls, data, forms=forms, batch_sizes=sizes, sample_shape=shape, notes=notes, machine=machine)
        made.form(made.baseline)
        return made

    def __str__(self) -> str:
        from ..render.bench_table import bench_text  # presentation stays in render

        return bench_text(self)

    __repr__ = __str__


def _times(before: int | None, after: int | None) -> float | None:
    return before / after if before is not None and after else None
