"""The batch job: encode (resumably), build a generation beside the old one, check it, swap one pointer."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from indexers import shards
from indexers.assembly import PARTIAL, Assembly, copied
from indexers.batches import Batches, key_of, source_digest
from indexers.embedded import current, finished, point, writer_lock
from indexers.generation import Generation, quiet
from indexers.intake import BATCH, QUARANTINE, Intake
from indexers.queries import Ask
from indexers.shards import Damaged, disk
from indexers.snapshot import EmbeddedSnapshot
from indexers.vectors import parse_spec
from retrieval.errors import Invalid, NotFound
from retrieval.types import Document, Prepare, Progress, Rejected, Snapshot, SpaceInfo

Gate = Callable[[Snapshot], None]


class Summary(NamedTuple):
    """What a build did."""

    generation: int  # 0 where only shards were encoded
    documents: int
    added: int  # encoded by this call
    reused: int  # encoded before, by this or an earlier generation
    rejected: int
    quarantine: Path
    seconds: float


class _Piece(NamedTuple):
    """One batch of a source: documents that the published generation holds already, and the others."""

    kept: tuple[str, ...]  # ids
    key: str | None  # under which the others are encoded


def build(
    folder: Path,
    documents: Iterable[Document | Rejected],
    prepare: Prepare,
    *,
    config: Mapping[str, Any],
    spaces: Mapping[str, SpaceInfo],
    vector_index: str,
    progress: Progress,
    strict: bool = False,
    shard: tuple[int, int] | None = None,
    gate: Gate | None = None,
    ask: Ask | None = None,
) -> Summary:
    """Makes the collection equal to a source, as a new generation.

    Interrupted at any point, the collection is as it was, and the same call goes on where it stopped.
    shard: (i, n) encodes every n-th batch and publishes nothing. gate: raises to refuse what was built.
    ask: makes queries of texts, for a vector index that learns from them.
    Invalid with `strict` at the first bad item; Conflict while another build runs.
    """
    spec = str(parse_spec(vector_index))
    about = {
        "config": dict(config),
        "vector_index": spec,
        "spaces": {s.name: [s.dim, dict(s.digests)] for s in spaces.values()},
    }
    with disk("making the collection's folder"):
        (folder / "generations").mkdir(parents=True, exist_ok=True)
        (folder / "shards").mkdir(exist_ok=True)
    job = _Encoding(folder, prepare, spaces, strict, shard, progress)
    if shard is not None:
        job.run(documents)
        return job.summary(0, 0)
    with writer_lock(folder, 0.0, "building"):
        job.run(documents)
        with writer_lock(folder):
            _sweep_partial(folder)
            built = _assemble(Assembly(folder, about, ask), job, progress, gate)
            _tidy(folder, built.generation)
            job.batches.drop(job.keys)
        job.intake.write_quarantine(folder)
        return job.summary(built.generation, len(built))


class _Encoding:
    """The first half of a build: every batch of the source encoded once."""

    def __init__(
        self,
        folder: Path,
        prepare: Prepare,
        spaces: Mapping[str, SpaceInfo],
        strict: bool,
        shard: tuple[int, int] | None,
        progress: Progress,
    ) -> None:
        if shard is not None and not 0 <= shard[0] < shard[1]:
            raise Invalid(f"shard: got {shard[0]}/{shard[1]}, expected I from 0 to N - 1")
        self.folder, self.prepare, self.spaces, self.shard = folder, prepare, spaces, shard
        self.progress = progress
        self.batches = Batches(folder)
        self.old = _published(folder)
        self.pieces: list[_Piece] = []
        self.intake = Intake(strict)
        self.added = self.reused = 0
        self._started = time.monotonic()

    @property
    def keys(self) -> list[str]:
        return [piece.key for piece in self.pieces if piece.key is not None]

    def run(self, documents: Iterable[Document | Rejected]) -> None:
        total = len(documents) if isinstance(documents, Sequence) else None
        done = 0
        self.progress("encode", done, total)  # encoding begins here, so the first batch has a rate
        for number, batch in enumerate(self.intake.batches(documents)):
            if self.shard is None or number % self.shard[1] == self.shard[0]:
                self._encode(batch)
            done += len(batch)
            self.progress("encode", done, total)

    def _encode(self, batch: Sequence[Document]) -> None:
        sources = {document.id: source_digest(document, self.prepare.digest) for document in batch}
        kept = self._kept(sources)
        todo = [document for document in batch if document.id not in kept]
        self.reused += len(kept)
        key = key_of([sources[document.id] for document in todo]) if todo else None
        if key is not None:
            if key in self.batches:
                rejected = self.batches.get(key).rejected
                self.reused += len(todo) - len(rejected)
            else:
                prepared = self.prepare(todo)
                self.batches.put(key, prepared, sources, self.spaces)
                rejected = prepared.rejected
                self.added += len(todo) - len(rejected)
            for item in rejected:
                self.intake.reject(item)
        self.pieces.append(_Piece(tuple(kept), key))

    def _kept(self, sources: Mapping[str, str]) -> dict[str, int]:
        """Documents of the batch that the published generation holds just as they are: id -> row."""
        if self.old is None:
            return {}
        found = self.old.rows.find(list(sources))
        with self.old.store.reading() as reader:
            records = reader.records_of([row for row in found if row >= 0])
        return {r.id: row for row, r in records.items() if r.source == sources[r.id]}

    def summary(self, generation: int, documents: int) -> Summary:
        seconds = time.monotonic() - self._started
        rejected = len(self.intake.rejected)
        return Summary(generation, documents, self.added, self.reused, rejected, self.folder / QUARANTINE, seconds)


# --- building beside the old -----------------------------------------------------------------------


def _assemble(assembly: Assembly, job: _Encoding, progress: Progress, gate: Gate | None) -> EmbeddedSnapshot:
    try:
        for done, piece in enumerate(job.pieces, 1):
            if piece.kept and job.old is not None:
                assembly.add(*copied(job.old, piece.kept))
            if piece.key is not None:
                batch = job.batches.get(piece.key)
                assembly.add(batch.records, batch.thumbnails, batch.encodings)
            progress("assemble", done, len(job.pieces))
        built = assembly.finish(progress)
        if gate is not None:
            gate(built)
        assembly.accept(built)
        return built
    finally:
        assembly.close()


def rebuild(
    folder: Path,
    *,
    vector_index: str | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress,
    gate: Gate | None = None,
    ask: Ask | None = None,
) -> Summary:
    """A new generation of the same documents and vectors, without what was deleted; nothing is encoded again.

    Others may write meanwhile: what they wrote is carried over before the swap.
    ask: makes queries of texts, for a vector index that learns from them.
    """
    started = time.monotonic()
    current(folder)  # NotFound before a lock file is made
    with writer_lock(folder, 0.0, "building"):
        old = Generation(folder, current(folder))
        now = old.load()
        _sweep_partial(folder)
        assembly = Assembly(folder, _description(old, vector_index, config), ask)
        try:
            for done, ids in enumerate(_alive_ids(now), 1):
                assembly.add(*copied(now, ids, lenient=True))
                progress("copy", min(done * BATCH, len(now)), len(now))
            built = assembly.finish(progress)
            if gate is not None:
                gate(built)
            with writer_lock(folder):
                _catch_up(assembly, now, old)
                assembly.accept(built)
                _tidy(folder, assembly.number)
        finally:
            assembly.close()
    count = len(built)
    return Summary(assembly.number, count, 0, count, 0, folder / QUARANTINE, time.monotonic() - started)


def _description(old: Generation, vector_index: str | None, config: Mapping[str, Any] | None) -> dict[str, Any]:
    with old.store.reading() as reader:
        about = reader.about()
    about["config"] = dict(config) if config is not None else about["config"]
    about["vector_index"] = str(parse_spec(vector_index)) if vector_index else about["vector_index"]
    return about


def _catch_up(assembly: Assembly, copied: EmbeddedSnapshot, old: Generation) -> None:
    """Repeats what was written and published since `copied` was taken, then what is written and not published."""
    published = old.load(copied)
    if published is not copied:
        assembly.repeat(copied, published)
        assembly.publish(quiet)
    assembly.repeat(published, old.load(published, ahead=True))


def _alive_ids(now: EmbeddedSnapshot) -> Iterator[list[str]]:
    alive = np.flatnonzero(now.rows.alive)
    for start in range(0, len(alive), BATCH):
        yield [now.rows[row] for row in alive[start : start + BATCH].tolist()]


def rollback(folder: Path) -> int:
    """Publishes the generation before this one again and returns its number; NotFound where there is none."""
    current(folder)  # NotFound before a lock file is made
    with writer_lock(folder, 0.0, "building"), writer_lock(folder):
        now = current(folder)
        earlier = [number for number in finished(folder) if number < now]
        if not earlier:
            raise NotFound(f"collection '{folder.name}' has no earlier generation to go back to")
        Generation(folder, earlier[-1]).load()
        point(folder, earlier[-1])
        shards.replace_file(folder / "generations" / f"{now:06d}" / "withdrawn", b"")
        return earlier[-1]


def delete(folder: Path) -> None:
    """Removes a collection; NotFound where there is none."""
    if not (folder / "generations").exists():
        raise NotFound(f"no collection in '{folder.name}'")
    with writer_lock(folder):
        gone = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.deleted")
        with disk("deleting the collection"):
            os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


# --- tidying ---------------------------------------------------------------------------------------


def _published(folder: Path) -> EmbeddedSnapshot | None:
    try:
        return Generation(folder, current(folder)).load()
    except (NotFound, Damaged):
        return None


def _sweep_partial(folder: Path) -> None:
    for path in (folder / "generations").iterdir():
        if path.name.endswith(PARTIAL):
            shutil.rmtree(path, ignore_errors=True)


def _tidy(folder: Path, now: int) -> None:
    """Keeps this generation and the last good one, and the shards and blobs that they name."""
    keep = {now}
    names, blobs = _referred(folder, now)
    for number in [number for number in finished(folder) if number < now][-1:]:
        try:
            more_names, more_blobs = _referred(folder, number)
        except Damaged:
            continue  # no way back to a damaged generation
        keep, names, blobs = keep | {number}, names | more_names, blobs | more_blobs
    for path in (folder / "generations").iterdir():
        if path.name.isdigit() and int(path.name) not in keep:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"*{shards.TEMPORARY}"):
        path.unlink(missing_ok=True)
    shards.sweep(folder / "shards", names)
    if (folder / "blobs").exists():
        shards.sweep(folder / "blobs", blobs)


def _referred(folder: Path, number: int) -> tuple[set[str], set[str]]:
    """Names of the shards and blobs that a generation needs."""
    generation = Generation(folder, number)
    try:
        with generation.store.reading() as reader:
            return {shard.name for shard in reader.shards()}, reader.blobs()
    finally:
        generation.close()
