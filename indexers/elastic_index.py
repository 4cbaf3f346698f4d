"""A collection on Elasticsearch: an alias over the newest of its generations, which are indices named name-000007.

What was written is on disk when `add` returns, and seen once `publish` has refreshed the index and counted its
state entry up; nobody else refreshes. (After a node restarts, what was written and not published may be seen early.)
"""

from __future__ import annotations

import os
import re
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from indexers.elastic import Cluster, Operation, State
from indexers.elastic_documents import Json, check_entry, entry, known, per_document, written
from indexers.elastic_snapshot import ElasticSnapshot, picture_path
from indexers.embedded import check_encoded
from indexers.shards import disk
from retrieval.errors import BackendError, Conflict, Invalid, NotFound
from retrieval.types import Document, Encodings, Picture, Side, SpaceInfo

FORMAT = 1
PICTURES = "pictures"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_NUMBERED = re.compile(r"(.+)-(\d{6})")


class Place(NamedTuple):
    """Where a collection lives. folder: what this machine keeps of it, rendered pictures above all."""

    cluster: Cluster
    name: str
    folder: Path

    @property
    def pictures(self) -> Path:
        return self.folder / PICTURES


def open_elastic(place: Place) -> Elastic:
    """The collection; NotFound where nothing was ever published there, Conflict where the name is another tool's."""
    return Elastic(place)


class Elastic:
    """Implements `retrieval.types.Index`. Thread-safe."""

    def __init__(self, place: Place) -> None:
        self.place = place
        check_name(place.name)
        self._guard = threading.Lock()
        self._held: ElasticSnapshot | None = None
        self._about: dict[str, Json] = {}
        self.snapshot()

    @property
    def config(self) -> Mapping[str, Any]:
        """What was given at build."""
        return self.snapshot().config

    def snapshot(self) -> ElasticSnapshot:
        """The newest published state, also when another process published it."""
        with self._guard:
            while True:
                state = self._state()
                held = self._held
                if held is not None and (held.index, held.sequence) == (state.held_in, state.sequence):
                    return held
                opened = opened_at(self.place, state, self._described(state.held_in))
                self._held = opened  # what is published meanwhile may be in it; the next look tells it apart
                after = self._state()
                if (after.held_in, after.sequence) == (state.held_in, state.sequence):
                    return opened

    def _state(self) -> State:
        state = self.place.cluster.state(self.place.name)
        if state is None:
            check_ours(self.place)
            raise NotFound(f"no collection '{self.place.name}' on {self.place.cluster.url}; index a source first")
        return state

    def _described(self, index: str) -> Json:
        if index not in self._about:
            self._about = {index: about_of(self.place, index)}
        return self._about[index]

    # --- writing ---------------------------------------------------------------------------------

    def add(self, documents: Sequence[Document], encodings: Encodings) -> None:
        """Upsert; on disk when it returns, visible after `publish`. Of equal ids the last one stays."""
        if not documents:
            return
        spaces = self.snapshot().spaces
        check_batch(documents, encodings, spaces)
        keep_pictures(self.place.pictures, documents)
        self.place.cluster.write(self.place.name, operations(documents, encodings), alias=True)

    def remove(self, ids: Sequence[str]) -> int:
        """How many existed. Unknown ids are no error."""
        self.snapshot()
        deletions = (Operation(id) for id in known(ids))
        return self.place.cluster.write(self.place.name, deletions, alias=True).count("deleted")

    def publish(self) -> None:
        """Shows everything that was written, all at once."""
        publish(self.place.cluster, self.place.name)

    def close(self) -> None:
        with self._guard:
            self._held = None


def publish(cluster: Cluster, name: str) -> None:
    """Refreshes what an alias stands for, and counts its sequence up."""
    while True:
        state = cluster.state(name)
        if state is None:
            raise NotFound(f"no collection '{name}' on {cluster.url}; index a source first")
        cluster.refresh(state.held_in)
        if cluster.set_state(state.held_in, state.sequence + 1, state.recalls, after=state):
            return


# --- what is written -------------------------------------------------------------------------------


def check_batch(documents: Sequence[Document], encodings: Encodings, spaces: Mapping[str, SpaceInfo]) -> None:
    """Raises where anything of a batch cannot be held; nothing of it is written then."""
    for document in documents:
        check_entry(document)
        if document.image is not None and not isinstance(document.image, Picture):
            raise Invalid(f"document {document.id!a:.80}: its picture was not decoded")
    for key, encoded in encodings.items():
        check_encoded(key, encoded, len(documents), spaces)


def operations(
    documents: Sequence[Document], encodings: Encodings, sources: Mapping[str, str] | None = None
) -> Iterator[Operation]:
    vectors = per_document(encodings, len(documents))
    for document, held in zip(documents, vectors, strict=True):
        yield Operation(document.id, written(entry(document, held, (sources or {}).get(document.id))))


def keep_pictures(folder: Path, documents: Iterable[Document]) -> None:
    """Rendered pictures stay on this machine, under the digest of what they were made from."""
    for document in documents:
        image = document.image
        content = rendered(image) if isinstance(image, Picture) else None
        if isinstance(image, Picture) and content:
            path = picture_path(folder, image.digest)
            if not path.exists():
                with disk("keeping a picture"):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    fresh = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.new")
                    fresh.write_bytes(content)
                    os.replace(fresh, path)


def rendered(image: Picture) -> bytes:
    """An upload as it was decoded; of others the thumbnail, since they stay where they are."""
    if image.path is None and image.pixels is not None:
        import io

        content = io.BytesIO()
        image.pixels.save(content, "PNG")
        return content.getvalue()
    return image.thumbnail


# --- names and generations -------------------------------------------------------------------------


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name) or _NUMBERED.fullmatch(name):
        raise Invalid(
            f"collection: got '{name}', on Elasticsearch expected lower-case letters, digits, '.', '_' or '-', "
            "no generation number at the end",
            "collection",
        )


def index_name(name: str, generation: int) -> str:
    return f"{name}-{generation:06d}"


def number_of(index: str) -> int:
    match = _NUMBERED.fullmatch(index)
    return int(match[2]) if match else 0


def generations(place: Place) -> dict[int, Json]:
    """Number -> what it was made with, ascending, of all generations; Conflict where one is not ours."""
    found = place.cluster.indices(f"{place.name}-*")
    ours: dict[int, Json] = {}
    for index, meta in sorted(found.items()):
        match = _NUMBERED.fullmatch(index)
        if match is not None and match[1] == place.name:
            if meta.get("lightbox", {}).get("collection") != place.name:
                raise _foreign(place, index)
            ours[int(match[2])] = meta["lightbox"]
    return ours


def check_ours(place: Place) -> None:
    """Conflict where the name belongs to an index or alias that Lightbox did not make. Changes nothing."""
    check_name(place.name)
    ours = {index_name(place.name, number) for number in generations(place)}
    behind = place.cluster.behind(place.name)
    if not behind and place.cluster.exists(place.name):
        raise _foreign(place, place.name)
    for index in behind:
        if index not in ours:
            raise _foreign(place, index)


def _foreign(place: Place, index: str) -> Conflict:
    return Conflict(
        f"collection {place.name}: index '{index}' on {place.cluster.url} was not made by Lightbox; "
        "nothing was changed, choose another name",
        "collection",
    )


def about_of(place: Place, index: str) -> Json:
    """What a generation was made with; Conflict where it is not ours, BackendError where another version made it."""
    meta = place.cluster.indices(index).get(index, {}).get("lightbox")
    if meta is None or meta.get("collection") != place.name:
        raise _foreign(place, index)
    if meta.get("format") != FORMAT:
        raise BackendError(f"collection {place.name}: format {meta.get('format')}, this version reads {FORMAT}")
    return dict(meta)


def spaces_of(about: Json) -> dict[str, SpaceInfo]:
    found: dict[str, SpaceInfo] = {}
    for name, (dim, digests) in about["spaces"].items():
        sides: dict[Side, str] = {side: digests[side] for side in ("text", "image") if side in digests}
        found[name] = SpaceInfo(name, dim, sides)
    return found


def opened_at(place: Place, state: State, about: Json) -> ElasticSnapshot:
    """A snapshot of a generation as its state entry has it."""

    def is_newest() -> bool:
        now = place.cluster.state(state.held_in)
        return now is not None and now.sequence == state.sequence

    return ElasticSnapshot(
        cluster=place.cluster,
        index=state.held_in,
        generation=number_of(state.held_in),
        sequence=state.sequence,
        spaces=spaces_of(about),
        config=about["config"],
        vector_index=about["vector_index"],
        recalls=state.recalls,
        pictures=place.pictures,
        reopened=is_newest,
    )
