"""Generations on Elasticsearch: built beside the published one, checked, swapped by one alias.

An unfinished generation is its own memory: every entry keeps the digest of what it was made from, so the same command
goes on where it stopped, and several machines fill one generation. While it is filled it has no copies and is not
refreshed; both come back before anybody sees it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from indexers.batches import source_digest
from indexers.elastic import Operation, State
from indexers.elastic_documents import (
    Json,
    check_entry,
    document_of,
    entry,
    keys_of,
    mapping,
    spec_of,
    vectors_of,
    written,
)
from indexers.elastic_index import (
    FORMAT,
    Place,
    about_of,
    check_batch,
    check_name,
    check_ours,
    generations,
    index_name,
    keep_pictures,
    number_of,
    opened_at,
    operations,
    spaces_of,
)
from indexers.elastic_snapshot import ElasticSnapshot, stamp_of
from indexers.embedded import writer_lock
from indexers.intake import QUARANTINE, Intake
from indexers.queries import perturbed
from indexers.rebuild import Summary
from indexers.shards import disk
from retrieval.errors import BackendError, Conflict, Invalid, NotFound
from retrieval.types import Document, Prepare, Progress, Rejected, Snapshot, SpaceInfo

Gate = Callable[[Snapshot], None]
Stamps = Mapping[str, tuple[int, int]]

REFRESHED: Json = {"index.refresh_interval": "-1"}  # only `publish` refreshes
COPIES: Json = {"index.auto_expand_replicas": "0-1"}  # one where there is a second node
NO_COPIES: Json = {"index.auto_expand_replicas": False, "index.number_of_replicas": 0}
COPIED_WITHIN_S = 60.0
_MEASURED, _MEASURED_K = 100, 10  # vectors that the recall is measured with, and neighbours of each


def build_elastic(
    place: Place,
    documents: Iterable[Document | Rejected],
    prepare: Prepare,
    *,
    config: Mapping[str, Any],
    spaces: Mapping[str, SpaceInfo],
    vector_index: str,
    progress: Progress,
    shards: int = 1,
    strict: bool = False,
    shard: tuple[int, int] | None = None,
    gate: Gate | None = None,
) -> Summary:
    """Makes the collection equal to a source, as a new generation; as `indexers.rebuild.build` does.

    shards: of the index. shard: (i, n) writes every n-th batch into the unfinished generation; the call without it
    writes what is missing and publishes.
    """
    started = time.monotonic()
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise Invalid(f"shard: got {shard[0]}/{shard[1]}, expected I from 0 to N - 1")
    about = {
        "format": FORMAT,
        "collection": place.name,
        "config": dict(config),
        "vector_index": str(spec_of(vector_index)),
        "spaces": {s.name: [s.dim, dict(s.digests)] for s in spaces.values()},
    }
    check_name(place.name)
    check_ours(place)
    with _alone(place, shared=shard is not None):
        pending = _unfinished(place, about, shards, may_drop=shard is None)
        job = _Filling(place, pending, prepare, spaces, strict, progress)
        job.run(documents, shard)
        rejected, quarantine = len(job.intake.rejected), place.folder / QUARANTINE
        if shard is not None:
            return Summary(0, 0, job.added, job.reused, rejected, quarantine, time.monotonic() - started)
        built = _finish(place, pending, about, job.expected, progress, gate)
        _swap(place, job.old.index if job.old is not None else None, built)
        job.intake.write_quarantine(place.folder)
    seconds = time.monotonic() - started
    return Summary(built.generation, len(built), job.added, job.reused, rejected, quarantine, seconds)


class _Filling:
    """The first half of a build: every document of the source in the unfinished generation, as it should be."""

    def __init__(
        self,
        place: Place,
        index: str,
        prepare: Prepare,
        spaces: Mapping[str, SpaceInfo],
        strict: bool,
        progress: Progress,
    ) -> None:
        self.place, self.index, self.prepare, self.spaces, self.progress = place, index, prepare, spaces, progress
        self.intake = Intake(strict, check_entry)
        self.old = _published(place)
        self.expected: set[str] = set()
        self.added = self.reused = 0

    def run(self, documents: Iterable[Document | Rejected], shard: tuple[int, int] | None) -> None:
        total = len(documents) if isinstance(documents, Sequence) else None
        done = 0
        self.progress("encode", done, total)  # encoding begins here, so the first batch has a rate
        for number, batch in enumerate(self.intake.batches(documents)):
            if shard is None or number % shard[1] == shard[0]:
                self._fill(batch)
            done += len(batch)
            self.progress("encode", done, total)

    def _fill(self, batch: Sequence[Document]) -> None:
        sources = {document.id: source_digest(document, self.prepare.digest) for document in batch}
        done = self._same(self.index, sources)
        kept = [id for id in self._same(self.old.index, sources) if id not in done] if self.old is not None else []
        copies = list(_copies(self.old, self.old.named_entries(kept))) if self.old is not None and kept else []
        self.place.cluster.write(self.index, copies)
        had = done | {copy.id for copy in copies}
        self.reused += len(had)
        todo = [document for document in batch if document.id not in had]
        made = self._made(todo, sources) if todo else set()
        self.added += len(made)
        self.expected |= had | made

    def _same(self, index: str, sources: Mapping[str, str]) -> set[str]:
        """Ids whose entry in an index was made from just this."""
        found = self.place.cluster.sources(index, list(sources))
        return {id for id, source in found.items() if source == sources[id]}

    def _made(self, todo: Sequence[Document], sources: Mapping[str, str]) -> set[str]:
        prepared = self.prepare(todo)
        for item in prepared.rejected:
            self.intake.reject(item)
        check_batch(prepared.documents, prepared.encodings, self.spaces)
        keep_pictures(self.place.pictures, prepared.documents)
        self.place.cluster.write(self.index, operations(prepared.documents, prepared.encodings, sources))
        return {document.id for document in prepared.documents}


def _copies(old: ElasticSnapshot, hits: Iterable[Json]) -> Iterator[Operation]:
    """Entries as another generation held them; nothing is encoded again."""
    keys = keys_of(old.spaces)
    for hit in hits:
        source = hit["_source"]
        made = entry(document_of(source), vectors_of(source, keys), source.get("source"))
        yield Operation(hit["_id"], written(made))


def _published(place: Place) -> ElasticSnapshot | None:
    state = place.cluster.state(place.name)
    return None if state is None else opened_at(place, state, about_of(place, state.held_in))


# --- the unfinished generation ---------------------------------------------------------------------


def _unfinished(place: Place, about: Json, shards: int, may_drop: bool) -> str:
    """The index that is being filled: one that was begun with the same settings, or a new one."""
    there = generations(place)
    for number in sorted(there, reverse=True):
        index = index_name(place.name, number)
        if place.cluster.state(index) is not None:
            break
        if there[number] == about:
            return index
        if not may_drop:
            raise Conflict(
                f"collection {place.name}: a generation with other settings is unfinished; "
                "finish it, or index without --shard, which drops it"
            )
        place.cluster.drop(index)
    index = index_name(place.name, max(there, default=0) + 1)
    settings = {"index.number_of_shards": shards, "index.codec": "best_compression", **REFRESHED, **NO_COPIES}
    made = place.cluster.create(index, mapping(about, spaces_of(about), about["vector_index"]), settings)
    if not made and about_of(place, index) != about:  # another machine was faster, with other settings
        raise Conflict(f"collection {place.name}: another build with other settings has just begun")
    return index


def _finish(
    place: Place, index: str, about: Json, expected: set[str] | Stamps, progress: Progress, gate: Gate | None
) -> ElasticSnapshot:
    """Makes a filled generation whole, checks it, and marks it as one that can be published."""
    cluster = place.cluster
    cluster.refresh(index)
    progress("merge", 0, 1)
    now = opened_at(place, State(index, 0, {}, (0, 0)), about)
    strays = [id for id, _ in now.stamps() if id not in expected] if len(now) > len(expected) else []
    cluster.write(index, [Operation(id) for id in strays])
    cluster.merge(index)
    cluster.refresh(index)
    progress("merge", 1, 1)
    built = opened_at(place, State(index, 0, {}, (0, 0)), about)
    if len(built) != len(expected):
        raise BackendError(
            f"what was built is not whole ({len(built)} of {len(expected)} documents); nothing was swapped"
        )
    cluster.set(index, COPIES)
    cluster.settle(index, COPIED_WITHIN_S)
    recalls = measured(built)
    if gate is not None:
        gate(built)
    cluster.set_state(index, 1, recalls, after=None)
    built.sequence, built.recalls = 1, recalls
    return built


def _swap(place: Place, old: str | None, built: ElasticSnapshot) -> None:
    """Publishes what was built, and keeps the last good generation for the way back."""
    try:
        place.cluster.swap(place.name, old, built.index)
    except BaseException:
        place.cluster.drop(built.index)
        raise
    now = number_of(built.index)
    earlier = _good(place, before=now)
    for number in generations(place):
        if number < now and number not in earlier[-1:]:
            place.cluster.drop(index_name(place.name, number))


def _good(place: Place, before: int) -> list[int]:
    """Earlier generations that were published and not withdrawn, ascending."""
    there = generations(place).items()
    numbers = [number for number, about in there if number < before and not about.get("withdrawn")]
    return [number for number in numbers if place.cluster.state(index_name(place.name, number)) is not None]


def measured(built: ElasticSnapshot) -> dict[str, float]:
    """space/side -> share of the true nearest that a search around some vectors finds; empty where all is exact."""
    if spec_of(built.vector_index).kind == "flat":
        return {}
    recalls: dict[str, float] = {}
    for space, side in built.sides:
        rows = built.vectors(space, side, built.sample(_MEASURED)).matrix
        if not len(rows):
            continue
        asked = perturbed(rows, len(rows), seed=0), _MEASURED_K, None, (side,)
        found = zip(built.search_vectors(space, *asked), built.search_vectors(space, *asked, exact=True), strict=True)
        shares = [len({h.id for h in some} & {h.id for h in best}) / max(1, len(best)) for some, best in found]
        recalls[f"{space}/{side}"] = round(float(np.mean(shares)), 4)
    return recalls


# --- the same documents anew -----------------------------------------------------------------------


def rebuild_elastic(
    place: Place,
    *,
    vector_index: str | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress,
    shards: int = 1,
    gate: Gate | None = None,
) -> Summary:
    """A new generation of the same documents and vectors, without what was deleted; nothing is encoded again.

    Others may write meanwhile: what they wrote is carried over before the swap, for which writes wait.
    """
    started = time.monotonic()
    check_ours(place)
    old = _published(place)
    if old is None:
        raise NotFound(f"no collection '{place.name}' on {place.cluster.url}; index a source first")
    about = about_of(place, old.index)
    about["config"] = dict(config) if config is not None else about["config"]
    about["vector_index"] = str(spec_of(vector_index)) if vector_index else about["vector_index"]
    with _alone(place):
        pending = _unfinished(place, about, shards, may_drop=True)
        stamps = _copied(place, old, pending, progress)
        with _closed_to_writers(place, old.index):
            stamps = _caught_up(place, old.index, pending, stamps)
            built = _finish(place, pending, about, stamps, progress, gate)
            _swap(place, old.index, built)
    seconds = time.monotonic() - started
    return Summary(built.generation, len(built), 0, len(built), 0, place.folder / QUARANTINE, seconds)


def _copied(place: Place, old: ElasticSnapshot, pending: str, progress: Progress) -> Stamps:
    """Copies everything; returns the version that was copied of each."""
    stamps: dict[str, tuple[int, int]] = {}
    for page in old.entries():
        place.cluster.write(pending, _copies(old, page))
        stamps |= {hit["_id"]: stamp_of(hit) for hit in page}
        progress("copy", len(stamps), len(old))
    return stamps


def _caught_up(place: Place, old: str, pending: str, copied: Stamps) -> Stamps:
    """Repeats what was written to `old` since."""
    place.cluster.refresh(old)
    now = opened_at(place, State(old, 0, {}, (0, 0)), about_of(place, old))
    stamps = dict(now.stamps())
    changed = [id for id, stamp in stamps.items() if copied.get(id) != stamp]
    place.cluster.write(pending, _copies(now, now.named_entries(changed)))
    place.cluster.write(pending, [Operation(id) for id in copied if id not in stamps])
    return stamps


@contextmanager
def _closed_to_writers(place: Place, index: str) -> Iterator[None]:
    """Writers wait, and find the new generation behind the alias when they try again."""
    place.cluster.set(index, {"index.blocks.write": True})
    try:
        yield
    finally:
        place.cluster.set(index, {"index.blocks.write": None})


def rollback_elastic(place: Place) -> int:
    """Publishes the generation before this one again and returns its number; NotFound where there is none."""
    check_ours(place)
    state = place.cluster.state(place.name)
    if state is None:
        raise NotFound(f"no collection '{place.name}' on {place.cluster.url}; index a source first")
    earlier = _good(place, before=number_of(state.held_in))
    if not earlier:
        raise NotFound(f"collection '{place.name}' has no earlier generation to go back to")
    place.cluster.swap(place.name, state.held_in, index_name(place.name, earlier[-1]))
    about = about_of(place, state.held_in)
    place.cluster.mark(state.held_in, {"lightbox": about | {"withdrawn": True}})
    return earlier[-1]


def delete_elastic(place: Place) -> None:
    """Removes a collection, its unfinished generations too; what is not ours stays."""
    check_ours(place)
    for number in generations(place):
        place.cluster.drop(index_name(place.name, number))
    with disk("deleting the collection"):
        shutil.rmtree(place.folder, ignore_errors=True)


@contextmanager
def _alone(place: Place, shared: bool = False) -> Iterator[None]:
    """One build of a collection at a time on this machine; parts of one build may run side by side."""
    with disk("making the collection's folder"):
        place.folder.mkdir(parents=True, exist_ok=True)
    if shared:
        yield
        return
    with writer_lock(place.folder, 0.0, "building"):
        yield
