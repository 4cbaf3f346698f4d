"""The collections below one folder, and what can be done with them: the verbs of the command line and of HTTP.

Thread-safe. Engines open on first use and follow the generations that other processes publish.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from retrieval.engine import ADD_BATCH, Engine
from retrieval.errors import BackendError, Conflict, InputError, Invalid, NotFound
from retrieval.types import Document, Progress, Rejected, Snapshot
from server.assemble import NONE, Config, Models, Weights, shipped_weights
from server.settings import Settings

if TYPE_CHECKING:
    from indexers.rebuild import Summary

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
QUARANTINE = "quarantine.jsonl"
TUNED = "weights.json"  # fusion weights learned for this collection, beside its generations


class Open(NamedTuple):
    """An engine, and what it was assembled from."""

    engine: Engine
    config: Config
    weights: Weights


class Added(NamedTuple):
    """What `add` did."""

    documents: int  # in the collection now
    added: int
    rejected: list[Rejected]
    seconds: float


class Home:
    """All collections of one home folder."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.models = Models(settings)
        self._open: dict[str, Open] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    # --- looking ---------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Collections that have been published."""
        folder = self.settings.collections
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        return [name for name in found if NAME.fullmatch(name) and self._published(name)]

    def engine(self, name: str) -> Engine:
        """The collection, ready to answer. Raises NotFound where nothing was published under that name."""
        with self._locked(name):
            held = self._open.get(name)
            config, weights = self._config(name, held)
            if held is None or (held.config, held.weights) != (config, weights):
                engine = self.models.engine(name, self.folder(name), config, weights)
                self._open[name] = held = Open(engine, config, weights)
            return held.engine

    def config(self, name: str) -> Config:
        """What the newest generation was made with."""
        return self._config(name, self._open.get(name))[0]

    def info(self, name: str) -> dict[str, Any]:
        """Counts, spaces, index kinds, weights: without loading an encoder."""
        index = self._index(name)
        try:
            snapshot = index.snapshot()
            config = Config.of(index.config)
            tuned = self._tuned(name, config)
            return {
                "collection": name,
                "documents": len(snapshot),
                "generation": snapshot.generation,
                "sequence": snapshot.sequence,
                "config": config.json(),
                "spaces": {
                    space: {"dim": info.dim, "digests": dict(info.digests)} for space, info in snapshot.spaces.items()
                },
                "index": snapshot.describe(),
                "weights": {**shipped_weights(), **tuned},
                "tuned": sorted(tuned),
            }
        finally:
            index.close()

    def folder(self, name: str) -> Path:
        """Where a collection lives. Raises Invalid for what cannot be a name."""
        if not NAME.fullmatch(name):
            raise Invalid(
                f"collection: got '{name[:80]}', expected up to 64 letters, digits, '.', '_' or '-', "
                "the first a letter or digit",
                "collection",
            )
        return self.settings.collections / name

    # --- changing --------------------------------------------------------------------------------

    def index(
        self,
        name: str,
        documents: Iterable[Document | Rejected],
        config: Config,
        *,
        progress: Progress,
        strict: bool = False,
        shard: tuple[int, int] | None = None,
    ) -> Summary:
        """Makes the collection equal to `documents`, as a new generation. No usable document is an error."""
        from indexers.rebuild import build

        folder = self.folder(name)
        self._must_be_writable(folder)
        return build(
            folder,
            documents,
            self.models.parts(config, shipped_weights()).prepare,
            config=config.json(),
            spaces=self.models.spaces(config),
            vector_index=config.vector_index,
            progress=progress,
            strict=strict,
            shard=shard,
        )

    def create(self, name: str, config: Config) -> Summary:
        """An empty collection. Raises Conflict where there is one of that name already."""
        if self._published(name):
            raise Conflict(f"collection {name}: exists already; delete it first, or add to it", "collection")
        return self.index(name, (), config, progress=silent)

    def add(self, name: str, documents: Iterable[Document | Rejected], progress: Progress) -> Added:
        """Upserts, and publishes at the end. Bad items are counted, written to quarantine.jsonl and skipped."""
        engine, start = self.engine(name), time.monotonic()
        rejected: list[Rejected] = []
        added = 0
        items = iter(documents)
        self._must_be_writable(self.folder(name))
        while batch := list(islice(items, ADD_BATCH)):
            rejected += [item for item in batch if isinstance(item, Rejected)]
            prepared = engine.parts.prepare([item for item in batch if isinstance(item, Document)])
            engine.index.add(prepared.documents, prepared.encodings)
            rejected += prepared.rejected
            added += len(prepared.documents)
            progress("add", added + len(rejected), None)
        engine.index.publish()
        self._quarantine(name, rejected)
        return Added(len(engine.index.snapshot()), added, rejected, time.monotonic() - start)

    def remove(self, name: str, ids: Sequence[str]) -> int:
        """How many of `ids` there were; the others are no error."""
        engine = self.engine(name)
        self._must_be_writable(self.folder(name))
        return engine.remove(ids)

    def rebuild(
        self,
        name: str,
        *,
        vector_index: str | None = None,
        gate: Callable[[Snapshot], None] | None = None,
        progress: Progress,
    ) -> Summary:
        """A new generation of the same documents and vectors; nothing is encoded again."""
        from indexers.rebuild import rebuild

        config = self.config(name).json()
        if vector_index is not None:
            config["vector_index"] = vector_index
        self._must_be_writable(self.folder(name))
        return rebuild(self.folder(name), vector_index=vector_index, config=config, progress=progress, gate=gate)

    def rollback(self, name: str) -> int:
        """Back to the last good generation; returns its number."""
        from indexers.rebuild import rollback

        self._must_exist(name)
        return rollback(self.folder(name))

    def delete(self, name: str) -> None:
        from indexers.rebuild import delete

        self._must_exist(name)
        with self._locked(name):
            held = self._open.pop(name, None)
            if held is not None:
                held.engine.close()
            delete(self.folder(name))

    def keep_weights(self, name: str, weights: Weights, learned: Mapping[str, Any]) -> None:
        """Stores fusion weights with the collection: kinds of query that `weights` lacks keep the shipped ones."""
        kept = {"made_for": _legs_digest(self.config(name)), "weights": weights, **learned}
        self._must_be_writable(self.folder(name))
        _write_atomically(self.folder(name) / TUNED, json.dumps(kept, indent=1))

    def close(self) -> None:
        with self._lock:
            for held in self._open.values():
                held.engine.close()
            self._open.clear()

    # --- within ----------------------------------------------------------------------------------

    def _index(self, name: str) -> Any:
        from indexers.embedded import open_index

        return open_index(self.folder(name))

    def _published(self, name: str) -> bool:
        try:
            self._index(name).close()
        except NotFound:
            return False
        return True

    def _must_exist(self, name: str) -> None:
        if not self.folder(name).is_dir():
            raise NotFound(f"collection {name}: not found in {self.settings.home}; 'lightbox index' makes one")

    def _config(self, name: str, held: Open | None) -> tuple[Config, Weights]:
        if held is not None:
            held.engine.index.snapshot()  # follows a generation that another process published
            config = Config.of(held.engine.index.config)  # type: ignore[attr-defined]
        else:
            index = self._index(name)
            config = Config.of(index.config)
            index.close()
        return config, {**shipped_weights(), **self._tuned(name, config)}

    def _tuned(self, name: str, config: Config) -> Weights:
        """The weights learned for this collection; {} where its encoders or ontology have changed since."""
        try:
            kept = json.loads((self.folder(name) / TUNED).read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise BackendError(f"collection {name}: {TUNED} cannot be read; run 'lightbox tune' again") from error
        weights: Weights = kept["weights"]
        return weights if kept["made_for"] == _legs_digest(config) else {}

    def _quarantine(self, name: str, rejected: Sequence[Rejected]) -> None:
        if rejected:
            lines = (json.dumps(item._asdict(), ensure_ascii=False) + "\n" for item in rejected)
            _write_atomically(self.folder(name) / QUARANTINE, "".join(lines))

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        self.folder(name)
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            yield

    def _must_be_writable(self, folder: Path) -> None:
        """Says whose fault it is before work is wasted."""
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _not_writable(self.settings.home) from error
        if not os.access(folder if folder.exists() else folder.parent, os.W_OK):
            raise _not_writable(self.settings.home)


def usable(items: Iterable[Document | Rejected], source: str) -> Iterator[Document | Rejected]:
    """`items`, refused with InputError before anything is written where no document is among them."""
    rest = iter(items)
    head: list[Document | Rejected] = []
    for item in rest:
        head.append(item)
        if isinstance(item, Document):
            return chain(head, rest)
    why = ""
    if head:
        first = head[0]
        assert isinstance(first, Rejected)  # noqa: S101
        why = f"; {len(head)} were rejected, the first: {first.reason}"
    raise InputError(f"{source}: holds no document{why}; nothing was changed")


def silent(phase: str, done: int, total: int | None) -> None:
    """A Progress that says nothing."""


def _not_writable(home: Path) -> InputError:
    return InputError(f"home: cannot write to '{home}'; name another folder with --home or LIGHTBOX_HOME")


def _legs_digest(config: Config) -> list[str | None]:
    """What the legs of a collection depend on, and so its weights."""
    return [config.text_encoder, config.image_encoder, config.ontology or NONE]


def _write_atomically(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
