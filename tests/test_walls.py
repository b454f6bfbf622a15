"""Who may import whom (docs/design.md, "Layout and walls"), read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import nettrim

ROOT = Path(nettrim.__file__).parent
MATHEMATICS = (
    "preimage",
    "patterns",
    "fold",
    "halfspace",
    "program",
    "packing",
    "prox",
    "duality",
    "solution",
    "certificate",
    "tally",
    "bounds",
    "recovery",
    "solvers",
)
NETWORKS = (
    "layers",
    "reading",
    "corrections",
    "encoder",
    "opening",
    "stacked",
    "distill",
    "recertify",
    "compare",
    "run",
    "deploy",
    "trimming",
    "retraining",
    "alternating",
    "importance",
    "allocation",
    "bound_steps",
    "bound_network",
    "bound_query",
    "link",
    "attention",
    "graph",
    "nodes",
    "units",
    "tasks",
    "capture",
    "calibration",
    "outputs",
    "assignment",
    "predictions",
    "heldout",
    "diagnosis",
    "wrappers",
    "choice",
    "selection",
    "schemes",
    "programs",
    "pruning",
    "verification",
    "verify",
    "checkpoint",
    "finetune",
    "trained",
    "whole",
    "overview",
    "report_check",
)
PRESENTATION = ("rich", "typer", "jinja2", "matplotlib")
# the library itself never draws; experiments/recovery.py draws the figures of its own study
PRESENTERS = ("cli", "render", "progress", "terminal", "__main__", "experiments")


def name_of(path: Path) -> str:
    parts = ("nettrim", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def guarded(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(tree: ast.AST, top_level: bool) -> list[ast.AST]:
    """Import statements; at top level only those that run when the module is imported."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif not top_level or not (guarded(node) or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))):
            found += statements(node, top_level)
    return found


def imports(module: str, top_level: bool = False) -> set[str]:
    """Full names of the modules that a module imports; of ours, the longest name that is a module."""
    package = module if SOURCES[module].name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in statements(ast.parse(SOURCES[module].read_text(encoding="utf-8")), top_level):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                found.add(full if full in SOURCES or origin == "torch" else origin)
    return found - {module}


def part(module: str) -> str:
    """The file or package directly below nettrim."""
    return module.split(".")[1] if "." in module else ""


def test_the_reader_sees_what_there_is() -> None:
    assert "nettrim.preimage" in imports("nettrim.program")
    assert "torch.nn" in imports("nettrim.layers")
    assert "nettrim.checkpoint" in imports("nettrim.pruning") - imports("nettrim.pruning", top_level=True)


def test_mathematics_does_not_know_networks() -> None:
    for module in SOURCES:
        if part(module) in MATHEMATICS:
            own = {part(name) for name in imports(module) if name.startswith("nettrim")}
            assert not own & set(NETWORKS), module
            assert not {name for name in imports(module) if name == "torch.nn" or name.startswith("torch.nn.")}, module


def test_certificates_do_not_know_solvers() -> None:
    reached, waiting = set(), ["nettrim.certificate", "nettrim.tally"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += [name for name in imports(module) if name in SOURCES]
    assert not {name for name in reached if part(name) in ("solvers", "methods", *NETWORKS)}


def test_solvers_do_not_know_where_programs_come_from() -> None:
    for module in SOURCES:
        if part(module) in ("solvers", "methods"):
            assert not {part(name) for name in imports(module)} & set(NETWORKS), module


def test_presentation_stays_where_it_belongs() -> None:
    for module in SOURCES:
        if part(module) not in PRESENTERS:
            outside = {name.split(".")[0] for name in imports(module)}
            assert not outside & set(PRESENTATION), module
    for module in SOURCES:
        if part(module) != "cli":
            assert "argparse" not in imports(module) and "typer" not in imports(module), module
            assert module == "nettrim.__main__" or "cli" not in {part(name) for name in imports(module) if name in SOURCES}, module


def test_no_circles() -> None:
    edges = {module: {name for name in imports(module, top_level=True) if name in SOURCES} for module in SOURCES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' -> '.join((*path[path.index(module) :], module))}"
        if module not in done:
            for name in sorted(edges[module]):
                if name != "nettrim":  # the package itself is being imported already
                    visit(name, (*path, module))
            done.add(module)

    for module in SOURCES:
        visit(module, ())


def test_the_package_holds_names_only() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert all(isinstance(node, (ast.Expr, ast.ImportFrom, ast.Assign)) for node in tree.body)
    assert sorted(nettrim.__all__) == nettrim.__all__
    assert all(hasattr(nettrim, name) for name in nettrim.__all__)
    assert (ROOT / "py.typed").is_file()
