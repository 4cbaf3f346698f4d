"""The items of a source on their way into a build: in batches, without bad ones and second ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from indexers import shards
from indexers.embedded import check_document
from retrieval.errors import InputError, Invalid
from retrieval.types import Document, Rejected

BATCH = 256  # documents that are encoded together, and lost together when a process is killed
QUARANTINE = "quarantine.jsonl"


class Intake:
    """Tells what can be stored from what is left out.

    strict: Invalid at the first bad item instead. check: raises InputError for what the backend cannot hold.
    """

    def __init__(self, strict: bool, check: Callable[[Document], None] = check_document) -> None:
        self.strict = strict
        self.check = check
        self.rejected: list[Rejected] = []
        self.seen: set[str] = set()  # ids that were handed on

    def batches(self, documents: Iterable[Document | Rejected]) -> Iterator[list[Document]]:
        batch: list[Document] = []
        for document in documents:
            if isinstance(document, Rejected):
                self.reject(document)
            elif document.id in self.seen:
                self.reject(Rejected(None, document.id, "duplicate id; the first one stays"))
            elif reason := self.refusal(document):
                self.reject(Rejected(None, document.id, reason))
            else:
                self.seen.add(document.id)
                batch.append(document)
            if len(batch) == BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def reject(self, rejected: Rejected) -> None:
        if self.strict:
            line = f"line {rejected.line}: " if rejected.line is not None else ""
            raise Invalid(f"{line}{rejected.id or 'an item'}: {rejected.reason}")
        self.rejected.append(rejected)

    def refusal(self, document: Document) -> str | None:
        """Why the index cannot hold a document; None where it can."""
        try:
            self.check(document)
        except InputError as error:
            return str(error)
        return None

    def write_quarantine(self, folder: Path) -> None:
        """What was left out and why, never its content."""
        lines = [json.dumps(rejected._asdict()) + "\n" for rejected in self.rejected]
        shards.replace_file(folder / QUARANTINE, "".join(lines).encode())
