"""What all exports share: the model and example that they start from, differences, and files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import staging
from ..calibration import inputs_of
from ..capture import Replica, replicate
from ..diagnosis import must_run
from ..outputs import Outputs, outputs_of
from ..status import InvalidInput, NetTrimError
from .compact import check, outputs

CPU = torch.device("cpu")


def start(model: object, example: Any) -> tuple[Replica, Any]:
    """A copy of the model on the CPU in eval mode, and the example's inputs. Raises InvalidInput for what cannot be exported."""
    check(model, example, "export")
    assert isinstance(model, nn.Module)
    twin = replicate(model, CPU, None)
    for parameter in twin.model.parameters():
        parameter.requires_grad_(False)
    inputs = inputs_of(example)
    if isinstance(inputs, Mapping):
        inputs = {key: value.detach().cpu() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    else:
        inputs = inputs.detach().cpu()
    outputs(twin, copied(inputs), "export")
    return twin, inputs


def copied(inputs: Any) -> Any:
    """Copies of the inputs: a model may change in place what it is given."""
    if isinstance(inputs, Mapping):
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}
    return inputs.clone()


def ran(twin: Replica, inputs: Any) -> Outputs:
    """What the model puts out. Raises InvalidInput."""
    with must_run(twin.model, twin.run, inputs, f"export: the model cannot run on a batch of {count(inputs)}"):
        return outputs_of(twin.run(copied(inputs)))


def count(inputs: Any) -> int:
    """The number of samples: the first dimension of the first tensor."""
    return len(next(value for value in inputs.values() if isinstance(value, Tensor))) if isinstance(inputs, Mapping) else len(inputs)


def batched(value: Any, samples: int) -> bool:
    """Whether this input holds one entry for each of the samples."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == samples


def resized(inputs: Any, samples: int) -> Any:
    """The same inputs as a batch of another size: samples repeated in turn, or left out."""
    before = count(inputs)
    places = torch.arange(samples) % before
    if not isinstance(inputs, Mapping):
        return inputs[places]
    return {key: value[places] if batched(value, before) else value for key, value in inputs.items()}


def allowed(model: nn.Module, tolerance: float) -> float:
    """The tolerance, or more where the weights' own dtype is coarser than float32."""
    coarse = max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)
    return max(tolerance, 50 * coarse if coarse > 1e-6 else 0.0)


def refuse_different(found: float, tolerance: float, what: str, samples: int) -> None:
    """Raises NetTrimError where the file does not compute what the model does."""
    if not found <= tolerance:
        raise NetTrimError(
            f"export: on a batch of {samples} the {what} file's outputs differ from the model's by {found:.2g} of the largest, "
            f"more than {tolerance:.0e}: nothing is written; please report the model's structure"
        )


def check_output(path: str | Path, suffix: str, *, force: bool = False, inputs: Iterable[str | Path | None] = ()) -> Path:
    """Refuses a file that cannot be written, or in whose place another must stay, before any work. Raises InvalidInput."""
    place = staging.place_of(path, "export: the output")
    if place.suffix != suffix:
        raise InvalidInput(f"export: the output must end in {suffix}, found {str(place)!r}; rename it, or choose another format")
    if place.is_dir():
        raise InvalidInput(f"export: the output {str(place)!r} is a folder; name a file")
    staging.check_writable(place.parent)
    staging.settle(place.parent)
    staging.check([place, *([place.with_suffix(".h")] if suffix == ".c" else [])], "export", force=force, inputs=inputs)
    return place
