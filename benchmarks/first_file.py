"""Runs the first Python file of README.md in a temporary folder, and writes what it prints between the marks behind it.

python benchmarks/first_file.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
FILE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PRINTED = re.compile(r"(?<=<!-- printed -->\n```\n)(.*?)(?=```\n<!-- end of printed -->)", re.DOTALL)


def printed(source: str) -> str:
    """What a file prints on standard output, run in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "first.py").write_text(source, encoding="utf-8")
        done = subprocess.run([sys.executable, "first.py"], cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def main() -> None:
    text = README.read_text(encoding="utf-8")
    found = FILE.search(text)
    if found is None:
        raise SystemExit(f"{README} shows no Python file")
    said = printed(found[1])
    lines = [textwrap.fill(line, 120, subsequent_indent=10 * " ", break_on_hyphens=False) for line in said.splitlines()]
    README.write_text(PRINTED.sub(lambda _: "\n".join(lines) + "\n", text), encoding="utf-8")
    print(said, end="")


if __name__ == "__main__":
    main()
