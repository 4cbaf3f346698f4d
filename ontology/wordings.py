"""What else a finding is called: the names of the concept that a phrase asks for."""

from __future__ import annotations

from collections.abc import Callable

from ontology.linker import Dictionary
from retrieval.types import Assertion

MOST = 12  # names of a concept
WORDS = 8  # of a phrase; what is longer says more than one name does
SHARE = 0.5  # of a phrase lies inside its finding, or more: "a mass of apples" asks for something else


def wordings(linker: Dictionary) -> Callable[[str], list[str]]:
    """Text to other names of its finding, none unless it is a phrase that affirms one finding and nothing else."""
    names: dict[int, list[str]] = {}

    def others(text: str) -> list[str]:
        if not text.strip() or len(text.split()) > WORDS:
            return []
        found = linker.link_queries([text])[0]
        if len(found) != 1 or found[0].assertion is not Assertion.affirmed:
            return []
        if linker.understood(text, found) <= SHARE:
            return []
        tables = linker.tables
        if not names:
            for name, number in tables.named.items():
                if name in tables.trusted:
                    names.setdefault(number, []).append(name)
        return names.get(tables.numbers[found[0].concept], [])[:MOST]

    return others
