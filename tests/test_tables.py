"""The tables of README.md and docs/ are what the benchmarks' results say."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"\W*\d[\d.,]*( ?(%|x|MiB|KiB|s))?\W*")
COMMAND = re.compile(r"python benchmarks/|nettrim reproduce|nettrim\.(experiments|foreign)")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_is_as_the_results_have_it(tables: ModuleType) -> None:
    shown = []
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        assert tables.written(text) == text, f"{page.name}: run `python benchmarks/tables.py`"
        found = [block[1] for block in tables.BLOCK.finditer(text)]
        assert len(found) == len(re.findall("<!-- table ", text)) == text.count("<!-- end of table -->"), page.name
        shown += found
    assert sorted(shown) == sorted(tables.TABLES)  # each once, and none forgotten


def test_other_tables_of_numbers_name_their_command(tables: ModuleType) -> None:
    for page in tables.pages():
        if page.name == "theory.md":
            continue  # its tables are definitions
        rest = tables.BLOCK.sub("", page.read_text(encoding="utf-8"))
        for section in re.split(r"^#+ ", rest, flags=re.MULTILINE):
            cells = [cell.strip() for line in section.splitlines() if line.startswith("|") for cell in line.strip("|").split("|")[1:]]
            if any(NUMBER.fullmatch(cell) for cell in cells):
                assert COMMAND.search(section), f"{page.name}: {section.splitlines()[0]}: numbers without their command"


def test_a_changed_number_is_seen_and_written_back(tables: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = f"# Page\n\n<!-- table memory -->\n{tables.memory()}<!-- end of table -->\n"
    page = tmp_path / "README.md"
    page.write_text(text.replace("213", "214", 1))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    assert tables.main() == 1 and page.read_text() != text
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    assert tables.main() == 0 and page.read_text() == text
    with pytest.raises(KeyError):
        tables.written("<!-- table nothing -->\n<!-- end of table -->\n")


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "benchmarks").glob("*.py")))
def test_every_benchmark_starts(script: str) -> None:
    if "argparse" in (ROOT / "benchmarks" / script).read_text(encoding="utf-8"):
        done = subprocess.run([sys.executable, f"benchmarks/{script}", "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and script in done.stdout, done.stderr
