"""An Elasticsearch cluster as we need it: requests that retry, bulk writes with back-pressure, plain errors.

The only file that knows the client. It needs nothing beyond a basic licence, no plugin and no script.
"""

from __future__ import annotations

import json
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import elasticsearch
from elasticsearch import ApiError, Elasticsearch

from indexers.elastic_documents import STATE_ID, Json
from retrieval.errors import BackendError, Conflict, Invalid, TooLarge

T = TypeVar("T")

REQUEST_S = 60.0
SEARCH_S = 20.0  # then the next host is asked
LONG_S = 3600.0  # merging, for example
RETRY_S = 120.0  # how long a write is tried again
SEARCH_RETRY_S = 15.0  # a person waits
KEPT_S = 15 * 60  # how long a point in time outlives its last use; pages need 10 minutes
CHUNK_BYTES = 5 << 20
CHUNK_ITEMS = 500
BUSY = (429, 502, 503, 504)
_FIRST_WAIT_S, _MOST_WAIT_S = 0.2, 10.0
_SEARCHES = 32  # in one request
_LOST = (
    "index_not_found_exception",
    "search_context_missing_exception",
    "no_shard_available_action_exception",
    "node_not_connected_exception",
    "node_disconnected_exception",
)


class Lost(Exception):
    """A point in time is no longer kept."""


class Operation(NamedTuple):
    """One item of a bulk write. entry: a document as JSON; None deletes."""

    id: str
    entry: bytes | None = None


class State(NamedTuple):
    """What a collection's state entry says, and where it stands."""

    held_in: str
    sequence: int
    recalls: Mapping[str, float]
    version: tuple[int, int]  # for a write that must not overtake another


class Access(NamedTuple):
    """How a cluster lets us in. ca: PEM file of its certificate authority."""

    api_key: str | None = None
    user: str | None = None
    password: str | None = None
    ca: Path | None = None


def connect(url: str, access: Access | None = None) -> Cluster:
    """The cluster at `url`, or at several separated by commas. Asks nothing yet; Invalid for what is no URL."""
    return Cluster(url, access or Access())


class Cluster:
    """Thread-safe. Every method raises BackendError, in one line, where the cluster does not do what it should."""

    def __init__(self, url: str, access: Access) -> None:
        hosts = [_host(part.strip()) for part in url.split(",")]
        if access.ca is not None and not access.ca.is_file():
            raise Invalid(f"LIGHTBOX_ES_CA: no file '{access.ca}'", "backend")
        secure = all(host.startswith("https:") for host in hosts)
        options: dict[str, Any] = {"ca_certs": str(access.ca)} if secure and access.ca is not None else {}
        if access.api_key is not None:
            options["api_key"] = access.api_key
        elif access.user is not None:
            options["basic_auth"] = (access.user, access.password or "")
        self.url = ",".join(hosts)
        # Our own loops retry, with jitter; the transport goes to the next host at once.
        self._client = Elasticsearch(
            hosts, request_timeout=REQUEST_S, max_retries=len(hosts) - 1, retry_on_timeout=False, **options
        )
        self._asking = self._client.options(request_timeout=SEARCH_S, retry_on_timeout=True)
        self._patient = self._client.options(request_timeout=LONG_S, max_retries=0)
        self._retry_s, self._search_retry_s = RETRY_S, SEARCH_RETRY_S
        self._unneeded: deque[str] = deque()  # points in time

    def close(self) -> None:
        self._client.close()

    # --- indices ---------------------------------------------------------------------------------

    def indices(self, pattern: str) -> dict[str, Json]:
        """Index -> its `_meta`, for names or patterns; what is not there is left out."""
        found = self._ask("looking for the collection", lambda: self._mappings(pattern))
        return {index: dict(value["mappings"].get("_meta", {})) for index, value in found.items()}

    def _mappings(self, pattern: str) -> Mapping[str, Any]:
        found = self._client.indices.get_mapping(index=pattern, ignore_unavailable=True, allow_no_indices=True)
        return dict(found)

    def exists(self, name: str) -> bool:
        """Is there an index or alias of that name, ours or not?"""
        return bool(self._ask("looking for the collection", lambda: self._client.indices.exists(index=name)))

    def behind(self, alias: str) -> list[str]:
        """The indices that an alias stands for."""

        def ask() -> list[str]:
            return list(self._client.indices.get_alias(name=alias))

        return self._ask("looking for the collection", ask, missing=list)

    def create(self, index: str, mapping: Json, settings: Json) -> bool:
        """False where it exists already."""

        def ask() -> bool:
            try:
                self._client.indices.create(index=index, mappings=mapping, settings=settings)
            except elasticsearch.BadRequestError as error:
                if error.error == "resource_already_exists_exception":
                    return False
                raise
            return True

        return self._ask("making an index", ask)

    def drop(self, index: str) -> None:
        self._ask("deleting an index", lambda: self._client.indices.delete(index=index, ignore_unavailable=True))

    def set(self, index: str, settings: Json) -> None:
        self._ask("changing an index", lambda: self._client.indices.put_settings(index=index, settings=settings))

    def mark(self, index: str, meta: Json) -> None:
        """Replaces the `_meta` of an index."""
        self._ask("changing an index", lambda: self._client.indices.put_mapping(index=index, meta=meta))

    def swap(self, alias: str, old: str | None, new: str) -> None:
        """Points the alias at `new`, at once for everybody; Conflict where it pointed elsewhere than at `old`."""
        actions: list[Json] = [{"add": {"index": new, "alias": alias}}]
        if old is not None:
            actions.insert(0, {"remove": {"index": old, "alias": alias, "must_exist": True}})
        try:
            self._ask("swapping generations", lambda: self._client.indices.update_aliases(actions=actions))
        except BackendError as error:
            if isinstance(error.__cause__, elasticsearch.NotFoundError):
                raise Conflict("another build was published meanwhile; give the same command again") from error
            raise

    def refresh(self, index: str) -> None:
        """Makes what was written visible to new searches."""
        done = self._ask("publishing", lambda: dict(self._client.indices.refresh(index=index)))
        shards = done["_shards"]
        if shards["failed"] or (shards["successful"] < shards["total"] and self.health(index) == "red"):
            raise BackendError(
                "publishing: a part of the collection is not reachable; try again when its node is back"
            )

    def merge(self, index: str) -> None:
        """One segment a shard, without what was deleted."""
        self._ask("merging", lambda: self._patient.indices.forcemerge(index=index, max_num_segments=1))

    def settle(self, index: str, wait_s: float) -> None:
        """Waits until copies are where they belong, but no longer than `wait_s`."""
        wait = f"{wait_s:.0f}s"
        with _plain("waiting for copies", self.url):
            try:
                self._patient.cluster.health(
                    index=index, wait_for_no_initializing_shards=True, wait_for_status="yellow", timeout=wait
                )
            except ApiError as error:
                if error.status_code != 408:
                    raise

    def health(self, index: str) -> str:
        """green, yellow (fewer copies than wanted) or red (a part is missing)."""
        asked = self._ask("asking for health", lambda: self._client.cluster.health(index=index, timeout="1s"))
        return str(asked["status"])

    def vector_bytes(self, index: str) -> Mapping[str, int]:
        """Bytes on disk and in memory of an index, as the server counts them."""
        stats = self._ask(
            "asking for sizes", lambda: self._client.indices.stats(index=index, metric="store,dense_vector")
        )
        found = stats["_all"]["primaries"]
        return {"store": found["store"]["size_in_bytes"], **found.get("dense_vector", {}).get("off_heap", {})}

    # --- the state entry -------------------------------------------------------------------------

    def state(self, name: str) -> State | None:
        """What is published under an alias or in an index; None where nothing is."""

        def ask() -> State | None:
            found = self._asking.get(index=name, id=STATE_ID)
            held = found["_source"]
            version = (int(found["_seq_no"]), int(found["_primary_term"]))
            return State(found["_index"], int(held["sequence"]), held.get("recalls", {}), version)

        return self._ask("reading the collection's state", ask, missing=lambda: None, wait_s=self._search_retry_s)

    def set_state(self, index: str, sequence: int, recalls: Mapping[str, float], after: State | None) -> bool:
        """False where another writer was faster than we who read `after`."""
        options: Json = {"op_type": "create"}
        if after is not None:
            options = {"if_seq_no": after.version[0], "if_primary_term": after.version[1]}
        document = {"sequence": sequence, "recalls": dict(recalls)}

        def ask() -> bool:
            try:
                self._client.index(index=index, id=STATE_ID, document=document, **options)
            except elasticsearch.ConflictError:
                return False
            return True

        return self._ask("publishing", ask)

    # --- reading ---------------------------------------------------------------------------------

    def open(self, index: str) -> str:
        """A point in time: what is visible in the index now, whatever is written later. Ends those let go of."""
        while self._unneeded:
            with suppress(IndexError):  # another thread was faster
                self.forget(self._unneeded.popleft())

        def ask() -> str:
            return str(self._asking.open_point_in_time(index=index, keep_alive=f"{KEPT_S}s")["id"])

        return self._ask("opening the collection", ask, wait_s=self._search_retry_s)

    def let_go(self, pit: str) -> None:
        """Nobody needs this point in time any more; it ends with the next `open`, or by itself.

        For finalizers, which the garbage collector runs in the middle of anything: a request from there sets context
        variables while they may be being set, which CPython 3.11 does not survive.
        """
        self._unneeded.append(pit)

    def forget(self, pit: str) -> None:
        """Ends a point in time; it ends by itself where this fails."""
        with suppress(elasticsearch.ApiError, elasticsearch.TransportError):
            self._client.options(request_timeout=2, max_retries=0).close_point_in_time(id=pit)

    def search(self, pit: str, bodies: Sequence[Json], global_idf: bool = False) -> list[Json]:
        """One answer per body, each whole. global_idf: word statistics over all shards. Lost without the `pit`."""
        header: Json = {"allow_partial_search_results": False}
        if global_idf:
            header["search_type"] = "dfs_query_then_fetch"
        kept = {"id": pit, "keep_alive": f"{KEPT_S}s"}
        out: list[Json] = []
        for start in range(0, len(bodies), _SEARCHES):
            lines = [line for body in bodies[start : start + _SEARCHES] for line in (header, {"pit": kept, **body})]
            out += self._ask("searching", partial(self._searched, lines), wait_s=self._search_retry_s)
        return out

    def _searched(self, lines: Sequence[Json]) -> list[Json]:
        answers = self._asking.msearch(searches=lines)["responses"]
        for answer in answers:
            if "error" in answer:
                raise _Failed(answer["status"], answer["error"])
        return list(answers)

    def sources(self, index: str, ids: Sequence[str]) -> dict[str, str]:
        """Digests that entries were made from, of written ones too: id -> digest, of those that exist."""

        def ask() -> dict[str, str]:
            found = self._client.mget(index=index, ids=list(ids), source_includes=["source"])["docs"]
            return {doc["_id"]: doc["_source"].get("source") or "" for doc in found if doc.get("found")}

        return self._ask("looking for documents", ask) if ids else {}

    # --- writing ---------------------------------------------------------------------------------

    def write(self, index: str, operations: Iterable[Operation], alias: bool = False) -> list[str]:
        """What became of each: created, updated, deleted or not_found; all of it is on disk when this returns.

        Goes only as fast as the cluster takes it: what it was too busy for is sent again, smaller and later.
        alias: `index` must be one, so that a deleted collection does not come back as somebody's index.
        """
        out: list[str] = []
        for chunk in _chunks(operations):
            out += self._write(index, chunk, alias)
        return out

    def _write(self, index: str, chunk: Sequence[Operation], alias: bool) -> list[str]:
        results: dict[int, str] = {}
        todo = list(range(len(chunk)))
        size, waits = len(chunk), _Waits(self._retry_s)
        while todo:
            now = todo[:size]
            try:
                items = self._sent(index, [chunk[at] for at in now], alias)
            except _Failed as error:
                if error.status == 413 and len(now) == 1:
                    raise TooLarge(
                        f"document {chunk[now[0]].id!a:.80}: larger than the cluster takes in one request"
                    ) from error
                if error.status not in (*BUSY, 413):
                    raise _translated("writing", self.url, error) from error
                size = max(1, len(now) // 2)
                if error.status != 413:
                    waits.wait("writing", error)
                continue
            again: list[int] = []
            for at, item in zip(now, items, strict=True):
                status = int(item["status"])
                if status < 300 or item.get("result") == "not_found":
                    results[at] = str(item["result"])
                elif status in BUSY or _blocked(item.get("error")):
                    again.append(at)
                else:
                    raise _refused(chunk[at].id, status, item.get("error"))
            todo = again + todo[len(now) :]
            if again:
                size = max(1, len(now) // 2)
                waits.wait("writing", _Failed(429, _first_error(items)))
            else:
                waits.begin()
        return [results[at] for at in range(len(chunk))]

    def _sent(self, index: str, operations: Sequence[Operation], alias: bool) -> list[Json]:
        lines: list[Any] = []
        for id, entry in operations:
            lines.append(json.dumps({"delete" if entry is None else "index": {"_id": id}}).encode())
            if entry is not None:
                lines.append(entry)
        try:
            answer = self._client.bulk(index=index, operations=lines, require_alias=alias or None)
        except ApiError as error:
            raise _Failed(error.status_code, error.body) from error
        except elasticsearch.ConnectionError as error:  # writes name their ids, so sending them again is harmless
            if isinstance(error, elasticsearch.SSLError):
                raise _translated("writing", self.url, error) from error
            raise _Failed(503, {"reason": str(error.message)}) from error
        return [next(iter(item.values())) for item in answer["items"]]

    # --- within ----------------------------------------------------------------------------------

    def _ask(
        self,
        doing: str,
        call: Callable[[], T],
        missing: Callable[[], T] | None = None,
        wait_s: float | None = None,
    ) -> T:
        """`call`, again while the cluster is busy or a node has just gone."""
        waits = _Waits(self._retry_s if wait_s is None else wait_s)
        while True:
            try:
                with _plain(doing, self.url):
                    return call()
            except BackendError as error:
                cause = error.__cause__
                if missing is not None and isinstance(cause, elasticsearch.NotFoundError):
                    return missing()
                if isinstance(cause, _Failed) and _is_lost(cause.error):
                    raise Lost from error
                if not _passing(cause):
                    raise
                waits.wait(doing, error)


def _host(url: str) -> str:
    """A URL with its port; Invalid for what is none, or holds a password that would be shown and kept."""
    try:
        parts = urlsplit(url)
        port = parts.port or 9200
    except ValueError:
        parts, port = urlsplit(""), 0
    if parts.username is not None or parts.password is not None:
        raise Invalid(
            "--backend: a URL without user and password is expected; set LIGHTBOX_ES_API_KEY, or "
            "LIGHTBOX_ES_USER and LIGHTBOX_ES_PASSWORD",
            "backend",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Invalid(f"--backend: got '{url}', expected 'embedded' or a URL such as http://127.0.0.1:9200", "backend")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port}{parts.path.rstrip('/')}"


class _Failed(Exception):
    """An answer that is an error, whatever carried it."""

    def __init__(self, status: int, error: Any) -> None:
        super().__init__(status)
        self.status = status
        self.error = error


class _Waits:
    """Longer and longer waits with jitter, so that many clients do not come back together."""

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self.begin()

    def begin(self) -> None:
        self._until = time.monotonic() + self._most_s
        self._next_s = _FIRST_WAIT_S

    def wait(self, doing: str, error: Exception) -> None:
        """Sleeps, or raises where there is no time left."""
        pause = self._next_s * random.uniform(0.5, 1.5)
        if time.monotonic() + pause > self._until:
            if isinstance(error, BackendError):
                raise error
            failed = error if isinstance(error, _Failed) else None
            if failed is not None and _is_write_block(failed.error):
                raise Conflict("the collection is being rebuilt; try again later") from error
            raise BackendError(
                f"{doing}: the cluster kept refusing for {self._most_s:.0f} s ({_said(failed)}); "
                "nothing more was written, the same command again goes on"
            ) from error
        time.sleep(pause)
        self._next_s = min(2 * self._next_s, _MOST_WAIT_S)


def _chunks(operations: Iterable[Operation]) -> Iterator[list[Operation]]:
    chunk: list[Operation] = []
    size = 0
    for operation in operations:
        length = len(operation.entry or b"") + len(operation.id) + 64
        if chunk and (size + length > CHUNK_BYTES or len(chunk) == CHUNK_ITEMS):
            yield chunk
            chunk, size = [], 0
        chunk.append(operation)
        size += length
    if chunk:
        yield chunk


# --- errors ----------------------------------------------------------------------------------------


@contextmanager
def _plain(doing: str, url: str) -> Iterator[None]:
    """Turns the client's errors into ours; the cause is kept."""
    try:
        yield
    except (ApiError, elasticsearch.TransportError, elasticsearch.UnsupportedProductError, _Failed) as error:
        raise _translated(doing, url, error) from error


def _translated(doing: str, url: str, error: Exception) -> BackendError:
    status = error.status_code if isinstance(error, ApiError) else error.status if isinstance(error, _Failed) else 0
    if isinstance(error, elasticsearch.UnsupportedProductError):
        return BackendError(f"{url}: what answers there is no Elasticsearch; check the URL of the backend")
    if isinstance(error, elasticsearch.SSLError):
        return BackendError(f"{url}: its certificate is not trusted; name its authority's PEM file in LIGHTBOX_ES_CA")
    if isinstance(error, elasticsearch.ConnectionTimeout):
        return BackendError(f"{doing}: {url} did not answer in time; is the cluster overloaded?")
    if isinstance(error, elasticsearch.TransportError):
        return BackendError(f"{doing}: no server answers at {url}; is Elasticsearch running there?")
    if status == 401:
        return BackendError(f"{url}: refused our key or password; check LIGHTBOX_ES_API_KEY")
    if status == 403:
        return BackendError(f"{doing}: {url} does not allow it ({_reason(error)}); the key needs more privileges")
    if status in BUSY and "flood-stage" in _reason(error):
        return BackendError(f"{doing}: a disk of the cluster is nearly full; it takes writes again when there is room")
    if status in BUSY:
        return BackendError(
            f"{doing}: the cluster is busy or a part of it is down ({_reason(error)}); try again later"
        )
    return BackendError(f"{doing}: Elasticsearch answered {status} ({_reason(error)})")


def _reason(error: Exception) -> str:
    """Type and reason of an error, short. Errors about queries and settings hold no document."""
    held = error.error if isinstance(error, _Failed) else getattr(error, "body", None)
    if isinstance(held, Mapping) and isinstance(held.get("error"), Mapping):
        held = held["error"]
    if isinstance(held, Mapping):
        roots = held.get("root_cause") or [held]
        first = roots[0] if isinstance(roots, list) and roots and isinstance(roots[0], Mapping) else held
        return " ".join(f"{first.get('type', '')} {first.get('reason', '')}".split())[:200]
    return " ".join(str(held).split())[:200]


def _said(failed: _Failed | None) -> str:
    return _reason(failed) if failed is not None else "no answer"


def _refused(id: str, status: int, error: Any) -> Exception:
    """One document that the cluster does not take. The reason may quote it, so only its type is told."""
    name = error.get("type", "unknown") if isinstance(error, Mapping) else "unknown"
    if status == 404:
        return Conflict("the collection is no longer there; index a source first")
    if status == 403:
        return BackendError(f"writing: the cluster does not allow it ({name}); the key needs more privileges")
    return Invalid(f"document {id!a:.80}: Elasticsearch refused it ({name})")


def _first_error(items: Sequence[Json]) -> Any:
    return next((item["error"] for item in items if "error" in item), None)


def _blocked(error: Any) -> bool:
    """An index that takes no writes for now: it is being swapped, or a disk is nearly full."""
    return isinstance(error, Mapping) and error.get("type") == "cluster_block_exception"


def _is_write_block(error: Any) -> bool:
    return _blocked(error) and "index write" in str(error.get("reason", ""))


def _is_lost(error: Any) -> bool:
    """A point in time ended, or was kept by a node that is gone."""
    said = json.dumps(error, default=str)
    return any(name in said for name in _LOST)


def _passing(cause: BaseException | None) -> bool:
    """Worth another try?"""
    if isinstance(cause, elasticsearch.SSLError | elasticsearch.UnsupportedProductError):
        return False
    if isinstance(cause, _Failed):
        return cause.status in BUSY
    if isinstance(cause, ApiError):
        return cause.status_code in BUSY
    return False  # the transport went to every host already
