"""The collections below one folder, and what can be done with them: the verbs of the command line and of HTTP.

Thread-safe. Engines open on first use and follow the generations that other processes publish.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from retrieval import confidence
from retrieval.confidence import Calibrations
from retrieval.engine import ADD_BATCH, Engine, Parts
from retrieval.errors import BackendError, Conflict, InputError, Invalid, NotFound
from retrieval.filters import Filter
from retrieval.pages import Shelf
from retrieval.types import Document, Encoder, Progress, Rejected, Snapshot
from server.assemble import NONE, Config, Models, Weights, shipped_weights
from server.backends import Held, Made
from server.settings import Settings

if TYPE_CHECKING:
    from indexers.rebuild import Summary

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
QUARANTINE = "quarantine.jsonl"
CALIBRATED = "calibration.json"
CALIBRATED_WITHIN = 0.1  # a collection that grew or shrank by a larger share is calibrated again
FACET_SAMPLE = 200  # documents looked at for fields that make facets
TUNED = "weights.json"  # fusion weights learned for this collection, beside its generations


Stamp = tuple[int, int] | None


class NotWritable(InputError):
    """The home folder: the fault of whoever typed its name, and over HTTP not of the caller."""


class Learned(NamedTuple):
    """What was learned about a collection after it was built."""

    weights: Weights
    calibrations: Calibrations


class Opened(NamedTuple):
    """An index, and the folder that it was opened from: a collection may be deleted and made again elsewhere."""

    opened: Held
    handle: int  # keeps the folder's inode from being given to another folder

    def is_at(self, folder: Path) -> bool:
        """True while the folder of that name is still the one that was opened."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(self.handle), folder.stat())
        return False

    def close(self) -> None:
        self.opened.close()
        os.close(self.handle)


class Assembled(NamedTuple):
    """An engine, and what it was assembled from."""

    engine: Engine
    opened: Held
    config: Config
    stamps: tuple[Stamp, ...]  # of what was learned


class Added(NamedTuple):
    """What `add` did."""

    documents: int  # in the collection now
    added: int
    rejected: list[Rejected]
    seconds: float


class Home:
    """All collections of one home folder."""

    def __init__(self, settings: Settings, models: Models | None = None) -> None:
        self.settings = settings
        self.models = models or Models(settings)
        self._indexes: dict[str, Opened] = {}
        self._engines: dict[str, Assembled] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    # --- looking ---------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Collections that have been published."""
        folder = self.settings.collections
        found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        return [name for name in found if NAME.fullmatch(name) and self.models.published(folder / name)]

    def engine(self, name: str) -> Engine:
        """The collection, ready to answer. Raises NotFound where nothing was published under that name."""
        folder = self.folder(name)
        with self._locked(name):
            index, held = self._index(name), self._engines.get(name)
            config = Config.of(index.config)
            made_of = (index, config, (_stamp(folder / TUNED), _stamp(folder / CALIBRATED)))
            if held is None or made_of != held[1:]:
                shelf = held.engine.shelf if held is not None and held.opened is index else Shelf()
                held = Assembled(Engine(name, index, self._parts(name, config), shelf), *made_of)
                self._engines[name] = held
            return held.engine

    def config(self, name: str) -> Config:
        """What the newest generation was made with."""
        with self._locked(name):
            return Config.of(self._index(name).config)

    def text_encoder(self, name: str | None = None) -> Encoder:
        """What encodes the texts of collection `name`, or of new collections. Raises Invalid where it goes without."""
        config = Config() if name is None else self.config(name)
        encoder = self.models.encoders(config)[0].get("text")
        if encoder is None:
            raise Invalid(f"collection {name}: it was indexed without a text encoder")
        return encoder

    def info(self, name: str) -> dict[str, Any]:
        """Counts, spaces, index kinds, weights: without loading an encoder."""
        with self._locked(name):
            index = self._index(name)
            snapshot, config = index.snapshot(), Config.of(index.config)
        learned = self._learned(name, config)
        spaces = snapshot.spaces.items()
        return {
            "collection": name,
            "documents": len(snapshot),
            "generation": snapshot.generation,
            "sequence": snapshot.sequence,
            "config": config.json(),
            "spaces": {space: {"dim": info.dim, "digests": dict(info.digests)} for space, info in spaces},
            "index": snapshot.describe(),
            "weights": {**shipped_weights(), **learned.weights},
            "tuned": sorted(learned.weights),
            "calibrated": sorted(learned.calibrations),
            "retrievers": retrievers(config),
            "facets": facets(snapshot),
        }

    def folder(self, name: str) -> Path:
        """Where a collection lives. Raises Invalid for what cannot be a name."""
        if not NAME.fullmatch(name):
            raise Invalid(
                f"collection: got '{name[:80]}', expected up to 64 letters, digits, '.', '_' or '-', "
                "the first a letter or digit",
                "collection",
            )
        return self.settings.collections / name

    def label(self, documents: Iterable[Document], config: Config, labels: str | None) -> Iterator[dict[str, Any]]:
        """Findings and labels of every document, by the ontology of `config` and a label set (None: the shipped)."""
        from ontology.labels import label_documents, load_labels

        linker, chosen = self.models.linker(config), load_labels(labels)
        if linker is None:
            raise Invalid("--ontology: labels need one, got 'none'")
        return label_documents(documents, linker, chosen)

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
        backend: str | None = None,
    ) -> Summary:
        """Makes the collection equal to `documents`, as a new generation. No usable document is an error.

        backend: `embedded` or the URL of a cluster; None where the collection lives already, else `embedded`.
        """
        folder = self.folder(name)
        place = self.models.backend(folder, backend, config)
        self._must_be_writable(folder)
        self.check_vector_index(config.vector_index)
        parts = self.models.parts(config, shipped_weights())
        if parts.scorer is not None:
            parts.scorer.digest  # noqa: B018 (loads it: a wrong name is refused now, not at the first search)
        made = Made(
            config=config.json(),
            spaces=self.models.spaces(config),
            vector_index=config.vector_index,
            progress=progress,
            strict=strict,
            shard=shard,
        )
        done = place.build(documents, parts.prepare, made)
        if shard is None:
            self._calibrate(name, progress, anew=done.added > 0)
        return done

    def create(self, name: str, config: Config) -> Summary:
        """An empty collection. Raises Conflict where there is one of that name already."""
        if self.models.published(self.folder(name)):
            raise Conflict(f"collection {name}: exists already; delete it first, or add to it", "collection")
        if (linker := self.models.linker(config)) is not None:
            linker.digest  # noqa: B018 (loads it: no document asks for it here, and a wrong name is refused now)
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

    def remove_where(self, name: str, where: Filter) -> int:
        """How many documents the filter let through, and are gone now."""
        return self.remove(name, self.engine(name).snapshot().select(where))

    def rebuild(
        self,
        name: str,
        *,
        vector_index: str | None = None,
        gate: Callable[[Snapshot], None] | None = None,
        progress: Progress,
    ) -> Summary:
        """A new generation of the same documents and vectors; nothing is encoded again."""
        config = self.config(name)
        if vector_index is not None:
            config = replace(config, vector_index=vector_index)
        self._must_be_writable(self.folder(name))
        place = self.models.backend(self.folder(name), config=config)
        done = place.rebuild(vector_index, config.json(), progress, gate)
        self._calibrate(name, progress, anew=False)
        return done

    def check_vector_index(self, spec: str | None) -> None:
        """Raises Invalid for an index that there is not, before a job is made of it."""
        from indexers.vectors import parse_spec

        if spec is not None:
            parse_spec(spec)

    def rollback(self, name: str) -> int:
        """Back to the last good generation; returns its number."""
        self._must_exist(name)
        return self.models.backend(self.folder(name)).rollback()

    def delete(self, name: str) -> None:
        self._must_exist(name)
        with self._locked(name):
            self._engines.pop(name, None)
            if name in self._indexes:
                self._indexes.pop(name).close()
            self.models.backend(self.folder(name)).delete()

    def keep_weights(self, name: str, weights: Weights, learned: Mapping[str, Any]) -> None:
        """Stores fusion weights with the collection: kinds of query that `weights` lacks keep the shipped ones."""
        self._must_be_writable(self.folder(name))
        self._keep(name, TUNED, {"weights": weights, **learned})

    def close(self) -> None:
        with self._lock:
            for held in self._indexes.values():
                held.close()
            self._indexes.clear()
            self._engines.clear()

    # --- within ----------------------------------------------------------------------------------

    def _index(self, name: str) -> Held:
        """The index of a collection, opened once, at its newest state. For the holder of the collection's lock."""
        folder = self.folder(name)
        held = self._indexes.get(name)
        if held is not None and not held.is_at(folder):
            self._indexes.pop(name).close()
            held = None
        if held is None:
            held = self._indexes[name] = Opened(self.models.index(folder), os.open(folder, os.O_RDONLY))
        held.opened.snapshot()  # follows a generation that another process published
        return held.opened

    def _must_exist(self, name: str) -> None:
        if not self.folder(name).is_dir():
            raise NotFound(f"collection {name}: there is none of that name; 'lightbox index' makes one")

    def _parts(self, name: str, config: Config) -> Parts:
        learned = self._learned(name, config)
        parts = self.models.parts(config, {**shipped_weights(), **learned.weights})
        return parts._replace(calibrations=learned.calibrations)

    def _calibrate(self, name: str, progress: Progress, anew: bool) -> None:
        """Measures what scores mean here: `anew`, or where that was never done, or done on far fewer documents."""
        from encoders.strangers import strangers
        from retrieval.calibrate import calibrate

        engine = self.engine(name)
        documents = len(engine.index.snapshot())
        before = self._kept(name, CALIBRATED, self.config(name)).get("documents")
        if not anew and before is not None and abs(documents - before) <= CALIBRATED_WITHIN * documents:
            return
        progress("calibrate", 0, 1)
        calibrations = calibrate(engine, strangers() if engine.has_pictures(engine.snapshot()) else ())
        self._keep(name, CALIBRATED, {"documents": documents, "calibrations": confidence.to_json(calibrations)})
        progress("calibrate", 1, 1)

    def _keep(self, name: str, file: str, learned: Mapping[str, Any]) -> None:
        kept = {"made_for": _legs(self.config(name)), **learned}
        _write_atomically(self.folder(name) / file, json.dumps({"sha256": _digest(kept), **kept}))

    def _learned(self, name: str, config: Config) -> Learned:
        """What was learned for the encoders and the ontology that the collection has now."""
        tuned, calibrated = (self._kept(name, file, config) for file in (TUNED, CALIBRATED))
        return Learned(tuned.get("weights", {}), confidence.from_json(calibrated.get("calibrations", {})))

    def _kept(self, name: str, file: str, config: Config) -> dict[str, Any]:
        try:
            kept: dict[str, Any] = json.loads((self.folder(name) / file).read_text())
            told = kept.pop("sha256", None)  # none in files of earlier versions
            if told is not None and told != _digest(kept):
                raise ValueError("checksum")
            return kept if kept["made_for"] == _legs(config) else {}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if file == CALIBRATED:  # the next rebuild measures it anew; until then nothing is said of confidence
                return {}
            raise BackendError(f"collection {name}: {file} is damaged; delete the file, or tune again") from error

    def _quarantine(self, name: str, rejected: Sequence[Rejected]) -> None:
        lines = (json.dumps(item._asdict()) + "\n" for item in rejected)
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
    rejected: list[Rejected] = []
    for item in rest:
        if isinstance(item, Document):
            return chain(rejected, [item], rest)
        rejected.append(item)
    why = f"; {len(rejected)} were rejected, the first: {rejected[0].reason}" if rejected else ""
    raise InputError(f"{source}: holds no document{why}; nothing was changed")


def retrievers(config: Config) -> list[str]:
    """The names that a collection of this config answers to."""
    has = {"dense": config.text_encoder, "image": config.image_encoder, "ontology": config.ontology}
    legs = ["hybrid", "lexical", *(leg for leg, made_by in has.items() if made_by != NONE)]
    return legs + [f"{leg}+rerank" for leg in legs if config.reranker not in (None, NONE)]


def facets(snapshot: Snapshot) -> list[str]:
    """Metadata fields whose values repeat, the most telling first: seen in a sample, for filters to click on."""
    values: dict[str, list[Any]] = {}
    for document in snapshot.fetch(snapshot.sample(FACET_SAMPLE)):
        for field, value in document.meta.items() if document is not None else ():
            if isinstance(value, str | int | bool):
                values.setdefault(field, []).append(value)
    repeating = {f: len(set(seen)) / len(seen) for f, seen in values.items() if 1 < len(set(seen)) <= len(seen) / 1.5}
    return sorted(repeating, key=lambda field: (repeating[field], field))


def silent(phase: str, done: int, total: int | None) -> None:
    """A Progress that says nothing."""


def _not_writable(home: Path) -> NotWritable:
    return NotWritable(f"home: cannot write to '{home}'; name another folder with --home or LIGHTBOX_HOME")


def _legs(config: Config) -> list[str | None]:
    """What the legs of a collection depend on, and so its weights and calibrations."""
    return [config.text_encoder, config.image_encoder, config.ontology]


def _stamp(path: Path) -> Stamp:
    """Changes when a file is replaced."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _digest(kept: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.new")  # several may write at once
    try:
        with fresh.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise BackendError(f"{path.name} could not be written; is the disk full?") from error
