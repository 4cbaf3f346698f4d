"""Where a collection lives: in a folder of the home, or on an Elasticsearch cluster. The same verbs for both.

A collection on a cluster has a folder in the home too: it says where the cluster is, and keeps rendered pictures and
what was learned here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

from retrieval.errors import BackendError, Conflict, Invalid, NotFound
from retrieval.types import Document, Index, Prepare, Progress, Rejected, Snapshot, SpaceInfo
from server.settings import Settings

if TYPE_CHECKING:
    from indexers.elastic_index import Place
    from indexers.queries import Ask
    from indexers.rebuild import Summary

EMBEDDED = "embedded"
FILE = "backend.json"  # in the folder of a collection that lives on a cluster

Items = Iterable[Document | Rejected]
Gate = Callable[[Snapshot], None]


class Held(Index, Protocol):
    """An index that tells what it was built with."""

    @property
    def config(self) -> Mapping[str, Any]: ...


class Made(TypedDict):
    """What a build is given besides its documents."""

    config: Mapping[str, Any]
    spaces: Mapping[str, SpaceInfo]
    vector_index: str
    progress: Progress
    strict: bool
    shard: tuple[int, int] | None


class Backend(Protocol):
    """One collection's home."""

    def open(self) -> Held:
        """The collection's index. Raises NotFound where nothing was published."""

    def published(self) -> bool:
        """Could a search start here? Asks no cluster."""

    def build(self, items: Items, prepare: Prepare, made: Made) -> Summary: ...

    def rebuild(
        self, vector_index: str | None, config: Mapping[str, Any], progress: Progress, gate: Gate | None
    ) -> Summary: ...

    def rollback(self) -> int: ...

    def delete(self) -> None: ...


def backend_of(folder: Path, settings: Settings, asked: str | None = None, ask: Ask | None = None) -> Backend:
    """Where the collection in `folder` lives; a new one where `asked` says, in the folder if it says nothing.

    ask: makes queries of texts, for a vector index that learns from them.
    Raises Conflict where it lives elsewhere than was asked, Invalid for what is neither `embedded` nor a URL.
    """
    there = _kept(folder)
    if there is None and InFolder(folder).published():
        there = EMBEDDED
    if asked is not None and asked != EMBEDDED:
        asked = OnCluster(folder, asked, settings).url
    if there is not None and asked is not None and asked != there:
        raise Conflict(
            f"collection {folder.name}: lives at {there}, not at {asked}; delete it first, or choose another name",
            "backend",
        )
    where = there or asked or EMBEDDED
    return InFolder(folder, ask) if where == EMBEDDED else OnCluster(folder, where, settings)


def _kept(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / FILE).read_text())["url"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendError(f"collection {folder.name}: {FILE} cannot be read; index the source again") from error


class InFolder:
    """The embedded index."""

    def __init__(self, folder: Path, ask: Ask | None = None) -> None:
        self.folder, self.ask = folder, ask

    def open(self) -> Held:
        from indexers.embedded import open_index

        return open_index(self.folder)

    def published(self) -> bool:
        from indexers.embedded import current

        try:
            return current(self.folder) > 0
        except NotFound:
            return False

    def build(self, items: Items, prepare: Prepare, made: Made) -> Summary:
        from indexers.rebuild import build

        return build(self.folder, items, prepare, ask=self.ask, **made)

    def rebuild(
        self, vector_index: str | None, config: Mapping[str, Any], progress: Progress, gate: Gate | None
    ) -> Summary:
        from indexers.rebuild import rebuild

        return rebuild(
            self.folder, vector_index=vector_index, config=config, progress=progress, gate=gate, ask=self.ask
        )

    def rollback(self) -> int:
        from indexers.rebuild import rollback

        return rollback(self.folder)

    def delete(self) -> None:
        from indexers.rebuild import delete

        delete(self.folder)


class OnCluster:
    """An alias and its indices on Elasticsearch."""

    def __init__(self, folder: Path, url: str, settings: Settings) -> None:
        from indexers.elastic import Access, connect
        from indexers.elastic_index import Place

        secrets = [None if secret is None else secret.get_secret_value() for secret in settings.es_secrets]
        access = Access(secrets[0], settings.es_user, secrets[1], settings.es_ca)
        self.place: Place = Place(connect(url, access), folder.name, folder)
        self.url = self.place.cluster.url
        self.shards = settings.es_shards

    def open(self) -> Held:
        from indexers.elastic_index import open_elastic

        return open_elastic(self.place)

    def published(self) -> bool:
        return (self.place.folder / FILE).exists()

    def build(self, items: Items, prepare: Prepare, made: Made) -> Summary:
        from indexers.elastic_build import build_elastic
        from indexers.shards import replace_file

        done = build_elastic(self.place, items, prepare, shards=self.shards, **made)
        if made["shard"] is None:
            replace_file(self.place.folder / FILE, json.dumps({"url": self.url}).encode())
        return done

    def rebuild(
        self, vector_index: str | None, config: Mapping[str, Any], progress: Progress, gate: Gate | None
    ) -> Summary:
        from indexers.elastic_build import rebuild_elastic

        return rebuild_elastic(
            self.place, vector_index=vector_index, config=config, progress=progress, gate=gate, shards=self.shards
        )

    def rollback(self) -> int:
        from indexers.elastic_build import rollback_elastic

        return rollback_elastic(self.place)

    def delete(self) -> None:
        from indexers.elastic_build import delete_elastic

        delete_elastic(self.place)


def check_backend(backend: str) -> None:
    """Raises Invalid for what is neither `embedded` nor a URL."""
    if backend != EMBEDDED and "://" not in backend:
        raise Invalid(
            f"--backend: got '{backend}', expected 'embedded' or a URL such as http://127.0.0.1:9200", "backend"
        )
