"""Writes the tree of the README from the modules' own first sentences: ``python docs/tree.py``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("retrieval", "encoders", "indexers", "ontology", "server")
BEGIN, END = "<!-- tree -->\n```\n", "```\n<!-- end of tree -->"


def tree() -> Iterator[str]:
    """The lines: a room with what it is for, then its modules."""
    for room in ROOMS:
        yield f"{room + '/':18}{_says(ROOT / room / '__init__.py')}"
        for path in sorted((ROOT / room).glob("*.py")):
            if path.name != "__init__.py":
                yield f"  {path.name:16}{_says(path)}"


def written(readme: str) -> str:
    """The README with the tree as it is now."""
    head, rest = readme.split(BEGIN)
    return head + BEGIN + "\n".join(tree()) + "\n" + END + rest.split(END)[1]


def _says(path: Path) -> str:
    """The first sentence of a module's docstring, without a full stop."""
    text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
    return re.split(r"\.(?:\s|$)", text, maxsplit=1)[0].replace("``", "").replace("`", "")


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text()))
