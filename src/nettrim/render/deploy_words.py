"""What compact, accelerate, export, trim and alternate made, in a few plain lines that fit a terminal."""

from __future__ import annotations

from ..alternating import Alternated
from ..deploy.accelerate import Accelerated
from ..deploy.compact import Compacted
from ..deploy.export_result import Exported
from ..trimming import Trimmed
from .bench_words import milliseconds, times
from .fitting import PLAIN_BOX, WIDTH, Column, fitting_table, plain_text
from .numbers import NONE, percent, plural


def compacted_text(made: Compacted, width: int = WIDTH) -> str:
    """Sizes before and after, layer by layer, and what stayed although it is dead."""
    before, after = made.parameters
    lines = [
        f"compacted: {before:,} -> {after:,} parameters ({times(made.ratio)} times fewer), {made.removed:,} neurons and channels removed; "
        f"the outputs on the example differ by {made.difference:.1e} of the largest"
    ]
    lines += [
        f"  {layer.name}: {layer.inputs[0]:,} -> {layer.inputs[1]:,} inputs, {layer.outputs[0]:,} -> {layer.outputs[1]:,} outputs"
        for layer in made.layers
        if layer.parameters[0] != layer.parameters[1]
    ]
    return plain_text(*lines, *notes(made.notes), width=width)


def accelerated_text(made: Accelerated, width: int = WIDTH) -> str:
    """Whole passes by arrangement, then each layer by itself; every number was measured in that run."""
    dense, kept = made.seconds["dense"], made.seconds[made.kept]
    where = f"on the example ({plural(made.samples, 'sample')}, {plural(made.threads, 'thread')})"
    if made.kept == "dense":
        headline = f"dense is kept: nothing else was faster by more than noise {where}; {milliseconds(dense)} ms a pass"
    else:
        headline = (
            f"{made.kept}: {times(made.ratio)} times as fast as dense {where}: {milliseconds(kept)} ms instead of {milliseconds(dense)} ms "
            f"a pass, faster in {made.faster_in[0]} of {made.faster_in[1]} rounds"
        )
    names = list(made.seconds)
    arrangements = fitting_table(
        [
            Column("arrangement", names, fold=8),
            Column("ms", [milliseconds(made.seconds[name]) for name in names]),
            Column("quartiles", [" - ".join(map(milliseconds, made.quartiles[name])) for name in names]),
            Column("times\nas fast", [times(dense / made.seconds[name]) for name in names]),
        ],
        "",
        "whole passes, in turns",
        PLAIN_BOX,
        last_row=False,
    )
    timed = [choice for choice in made.choices if choice.seconds]
    lines: list[str] = []
    if timed:
        before, after = sum(choice.seconds["dense"] for choice in timed), sum(choice.seconds[choice.kind] for choice in timed)
        lines.append(
            f"layers alone, each with what it is merged with: {milliseconds(before)} ms dense, {milliseconds(after)} ms as they run now; "
            "changes of layout and what is no layer are in whole passes only"
        )
    kinds = list(dict.fromkeys(kind for choice in timed for kind in choice.seconds))
    layers = fitting_table(
        [
            Column("layer", [choice.name or "the model" for choice in made.choices], fold=8),
            Column("runs as", [choice.kind for choice in made.choices]),
            Column("density", [percent(choice.density) for choice in made.choices]),
            *(
                Column(f"{kind}\nms", [milliseconds(c.seconds[kind]) if kind in c.seconds else NONE for c in made.choices])
                for kind in kinds
            ),
        ],
        "",
        None,
        PLAIN_BOX,
        last_row=False,
    )
    reasons: dict[str, list[str]] = {}
    for choice in made.choices:
        if choice.why:
            reasons.setdefault(choice.why, []).append(choice.name or "the model")
    remarks = [f"  {', '.join(names)}: {why}" for why, names in reasons.items()]
    table = [layers] if made.choices else []
    return plain_text(headline, arrangements, *lines, *table, *remarks, *notes(made.notes), width=width)


def exported_text(made: Exported, width: int = WIDTH) -> str:
    """The file, how it was checked, and what it takes."""
    lines = [f"{made.path}: {made.bytes:,} bytes ({made.format})"]
    if made.difference is not None:
        batches = ", ".join(map(str, made.checked))
        lines.append(f"  checked on batches of {batches}: largest difference {made.difference:.1e} of the largest output")
    else:
        lines.append("  not run here: nothing says that it computes what the model does")
    if made.sizes is not None:
        s = made.sizes
        lines.append(
            f"  {s.model:,} bytes of weights ({s.weights:,} values, {s.positions:,} positions; {s.dense:,} with their zeros), "
            f"{s.biases:,} of biases, {s.work:,} of work memory" + ("" if s.code is None else f", {s.code:,} of code")
        )
    return plain_text(*lines, *notes(made.notes), width=width)


def trimmed_text(made: Trimmed, width: int = WIDTH) -> str:
    """Sizes and scores, round by round."""
    before, after = made.parameters
    headline = (
        f"trimmed: {before:,} -> {after:,} parameters ({times(made.ratio)} times fewer), score {made.score[0]:.4f} -> {made.score[1]:.4f}; "
        f"it ended because {made.stopped}"
    )
    if not made.rounds:
        return plain_text(headline, width=width)
    rounds = fitting_table(
        [
            Column("round", [str(one.number) for one in made.rounds]),
            Column("neurons", [" + ".join(f"{layer.after}/{layer.before}" for layer in one.layers) for one in made.rounds], fold=12),
            Column("parameters", [f"{one.parameters:,}" for one in made.rounds]),
            Column("score\nbefore", [f"{one.before:.4f}" for one in made.rounds]),
            Column("trimmed", [f"{one.trimmed:.4f}" for one in made.rounds]),
            Column("retrained", [f"{one.retrained:.4f}" for one in made.rounds]),
            Column("kept", ["yes" if one.kept else "NO" for one in made.rounds]),
        ],
        "neurons: left of those before the round, layer by layer",
        None,
        PLAIN_BOX,
        last_row=False,
    )
    return plain_text(headline, rounds, width=width)


def alternated_text(made: Alternated, width: int = WIDTH) -> str:
    """What was left in each round."""
    lines = [f"pruned and retrained in {plural(len(made.rounds), 'round')}; nothing is certified of retraining"]
    for number, result in enumerate(made.rounds, 1):
        report = result.report
        lines.append(
            f"  round {number}: {report.nonzeros:,} of {report.weights:,} weights kept ({percent(report.density)}) by {report.method}; its "
            "certificate speaks of the network that entered the round"
        )
    return plain_text(*lines, width=width)


def notes(texts: tuple[str, ...]) -> list[str]:
    """Notes as paragraphs."""
    return [f"note: {text}" for text in texts]
