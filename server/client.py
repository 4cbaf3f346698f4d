"""A client of the service for scripts, plain and async. It needs httpx and nothing else of Lightbox.

>>> with Client("http://127.0.0.1:8000") as lightbox:  # doctest: +SKIP
...     answer = lightbox.search("demo", "small left effusion", k=5)
...     for hit in lightbox.pages("demo", [{"text": "effusion"}, {"image": Path("film.png"), "weight": 0.5}]):
...         print(hit["id"], hit["score"])
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypedDict, Unpack
from urllib.parse import quote

import httpx

TIMEOUT_S = 60.0
UPLOAD_BATCH = 500  # documents of one request
FINAL = ("done", "failed", "cancelled")

Json = dict[str, Any]
Query = str | bytes | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Words, a picture (bytes or a file), one part, or several parts, whose images may be bytes or files as well."""


class SearchOptions(TypedDict, total=False):
    """What a search may say besides its query; the service's defaults stand for what is left out."""

    retriever: str
    k: int
    cursor: str | None
    where: Mapping[str, Any] | None
    fusion: Mapping[str, Any]
    group_by: str | None
    facets: Sequence[str]
    min_confidence: float | None
    exact: bool
    explain: bool
    highlight: bool
    fields: Sequence[Literal["title", "text", "metadata"]]


# --- errors ---------------------------------------------------------------------------------------


class Problem(Exception):
    """What the service answered instead: status, words, the field at fault, and the id to look for in its log."""

    def __init__(self, status: int, body: Mapping[str, Any], retry_after_s: float | None = None) -> None:
        super().__init__(body.get("detail") or body.get("title") or f"status {status}")
        self.status = status
        self.detail = str(self)
        self.field: str | None = body.get("field")
        self.request_id: str | None = body.get("request_id")
        self.retry_after_s = retry_after_s


class BadRequest(Problem):
    """400: not parseable."""


class Unauthorized(Problem):
    """401: no valid key."""


class Forbidden(Problem):
    """403: the key's role, the host or the origin does not allow it."""


class NotFound(Problem):
    """404: no such collection, document or job."""


class Conflict(Problem):
    """409: does not fit what the collection was built with, or held by another writer."""


class Gone(Problem):
    """410: the cursor's snapshot is no longer kept; search again."""


class TooLarge(Problem):
    """413: over a limit that the message names."""


class NotAnImage(Problem):
    """415: not a readable picture."""


class Invalid(Problem):
    """422: against the schema."""


class Busy(Problem):
    """429: too much at once; try again after `retry_after_s`."""


class Unavailable(Problem):
    """503: cannot be served at the moment."""


PROBLEMS: Mapping[int, type[Problem]] = {
    400: BadRequest, 401: Unauthorized, 403: Forbidden, 404: NotFound, 409: Conflict, 410: Gone, 413: TooLarge,
    415: NotAnImage, 422: Invalid, 429: Busy, 503: Unavailable,
}  # fmt: skip


def _problem(response: httpx.Response) -> Problem:
    try:
        body = response.json()
    except ValueError:
        body = {}
    wait = response.headers.get("retry-after", "")
    kind = PROBLEMS.get(response.status_code, Problem)
    return kind(
        response.status_code, body if isinstance(body, dict) else {}, float(wait) if wait.isdecimal() else None
    )


# --- requests, the same for both clients ------------------------------------------------------------


class _Call(NamedTuple):
    method: str
    path: str
    json: Any = None
    lines: str | None = None
    params: Mapping[str, Any] | None = None

    def arguments(self) -> dict[str, Any]:
        """What httpx is asked for."""
        out: dict[str, Any] = {"method": self.method, "url": f"/v1/{self.path}", "params": self.params}
        if self.lines is not None:
            return out | {"content": self.lines.encode(), "headers": {"content-type": "application/x-ndjson"}}
        return out | ({} if self.json is None else {"json": self.json})


def _at(collection: str, *steps: str) -> str:
    return "/".join(["collections", *(quote(step, safe="") for step in (collection, *steps))])


def _search(collection: str, query: Query, options: SearchOptions) -> _Call:
    return _Call("POST", _at(collection, "search"), {"query": parts(query), **options})


def _batch(collection: str, queries: Sequence[Query], options: SearchOptions) -> _Call:
    return _Call("POST", _at(collection, "search", "batch"), [{"query": parts(q), **options} for q in queries])


def _add(collection: str, documents: Sequence[Mapping[str, Any]]) -> _Call:
    lines = "".join(json.dumps(_sendable(document)) + "\n" for document in documents)
    return _Call("POST", _at(collection, "documents"), lines=lines)


def _evaluate(collection: str, asked: Mapping[str, Any]) -> _Call:
    return _Call("POST", _at(collection, "evaluations"), {k: v for k, v in asked.items() if v is not None})


def parts(query: Query) -> list[Json]:
    """A query as the service takes it.

    >>> parts("left effusion"), parts({"id": "CXR12"}), parts(b"PNG")
    ([{'text': 'left effusion'}], [{'id': 'CXR12'}], [{'image': 'UE5H'}])
    """
    if isinstance(query, str):
        return [{"text": query}]
    if isinstance(query, bytes | Path):
        return [{"image": _base64(query)}]
    if isinstance(query, Mapping):
        query = [query]
    return [{**part, "image": _base64(part["image"])} if "image" in part else dict(part) for part in query]


def _base64(image: bytes | Path | str) -> str:
    if isinstance(image, str):
        return image
    return base64.b64encode(image.read_bytes() if isinstance(image, Path) else image).decode()


def _sendable(document: Mapping[str, Any]) -> Json:
    """A document whose image may be bytes or a file."""
    image = document.get("image")
    return {**document, "image": {"base64": _base64(image)}} if isinstance(image, bytes | Path) else dict(document)


def _batches(documents: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    batch: list[Mapping[str, Any]] = []
    for document in documents:
        batch.append(document)
        if len(batch) == UPLOAD_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _joined(answers: Sequence[Json], lengths: Sequence[int]) -> Json:
    """The answers to several uploads as one; lines count through."""
    out: Json = {"added": 0, "rejected": 0, "items": [], "documents": answers[-1]["documents"] if answers else None}
    before = 0
    for answer, length in zip(answers, lengths, strict=True):
        out["added"] += answer["added"]
        out["rejected"] += answer["rejected"]
        out["items"] += [{**item, "line": item["line"] + before} for item in answer["items"]]
        before += length
    return out


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


# --- plain ------------------------------------------------------------------------------------------


class Client:
    """The service, one method per route. Raises a `Problem` for what the service refuses."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(base_url=url, headers=_headers(key), timeout=timeout_s, transport=transport)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def collections(self) -> list[Json]:
        return list(self._json(_Call("GET", "collections"))["collections"])

    def collection(self, collection: str) -> Json:
        return self._json(_Call("GET", _at(collection)))

    def create_collection(self, collection: str, **config: str | None) -> Json:
        """config: text_encoder, image_encoder, reranker, ontology, vector_index."""
        return self._json(_Call("PUT", _at(collection), config))

    def delete_collection(self, collection: str) -> None:
        self._sent(_Call("DELETE", _at(collection)))

    def search(self, collection: str, query: Query, **options: Unpack[SearchOptions]) -> Json:
        """One page of hits, with facets and how far they can be trusted."""
        return self._json(_search(collection, query, options))

    def pages(self, collection: str, query: Query, **options: Unpack[SearchOptions]) -> Iterator[Json]:
        """Every hit of a search, page after page of `k`, all from one state of the collection."""
        while True:
            answer = self.search(collection, query, **options)
            yield from answer["hits"]
            if answer["cursor"] is None:
                return
            options["cursor"] = answer["cursor"]

    def search_batch(self, collection: str, queries: Sequence[Query], **options: Unpack[SearchOptions]) -> list[Json]:
        """One answer each; one that failed is a problem with `status` and `detail`."""
        return list(self._json(_batch(collection, queries, options))["answers"])

    def add_documents(self, collection: str, documents: Iterable[Mapping[str, Any]]) -> Json:
        """Upserts, some hundred a request. What is told as added is on disk."""
        sent = [(self._json(_add(collection, batch)), len(batch)) for batch in _batches(documents)]
        return _joined([answer for answer, _ in sent], [length for _, length in sent])

    def document(self, collection: str, id: str) -> Json:
        return self._json(_Call("GET", _at(collection, "documents", id)))

    def image(self, collection: str, id: str, size: int = 512) -> bytes:
        """The rendered picture, PNG, longest side at most `size` px."""
        return self._sent(_Call("GET", _at(collection, "documents", id, "image"), params={"size": size})).content

    def delete_document(self, collection: str, id: str) -> int:
        return int(self._json(_Call("DELETE", _at(collection, "documents", id)))["deleted"])

    def delete_documents(self, collection: str, where: Mapping[str, Any]) -> int:
        return int(self._json(_Call("POST", _at(collection, "documents", "delete"), {"where": where}))["deleted"])

    def rebuild(self, collection: str, vector_index: str | None = None) -> Json:
        """A job."""
        return self._json(_Call("POST", _at(collection, "rebuild"), {"vector_index": vector_index}))

    def ingest(self, collection: str, source: str) -> Json:
        """A job that adds a source below the server's configured folder."""
        return self._json(_Call("POST", _at(collection, "ingestions"), {"source": source}))

    def evaluate(self, collection: str, **asked: Any) -> Json:
        """A job. asked: source and split, or queries and qrels; retrievers, measures."""
        return self._json(_evaluate(collection, asked))

    def jobs(self) -> list[Json]:
        return list(self._json(_Call("GET", "jobs"))["jobs"])

    def job(self, id: str) -> Json:
        return self._json(_Call("GET", f"jobs/{quote(id, safe='')}"))

    def cancel_job(self, id: str) -> Json:
        return self._json(_Call("POST", f"jobs/{quote(id, safe='')}/cancel"))

    def job_events(self, id: str) -> Iterator[Json]:
        """The job each time it gets on, until it ends."""
        with self._http.stream("GET", f"/v1/jobs/{quote(id, safe='')}/events", timeout=None) as response:
            if response.status_code >= 400:
                response.read()
                raise _problem(response)
            for line in response.iter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    def wait(self, id: str) -> Json:
        """The job once it has ended."""
        while (job := self.job(id))["state"] not in FINAL:
            for job in self.job_events(id):  # noqa: B007
                pass
        return job

    def embeddings(self, texts: str | Sequence[str], model: str = "default") -> list[list[float]]:
        """Unit vectors."""
        asked = {"input": texts if isinstance(texts, str) else list(texts), "model": model}
        return [item["embedding"] for item in self._json(_Call("POST", "embeddings", asked))["data"]]

    def _sent(self, call: _Call) -> httpx.Response:
        response = self._http.request(**call.arguments())
        if response.status_code >= 400:
            raise _problem(response)
        return response

    def _json(self, call: _Call) -> Json:
        return dict(self._sent(call).json())


# --- async ------------------------------------------------------------------------------------------


class AsyncClient:
    """The same, to be awaited."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(base_url=url, headers=_headers(key), timeout=timeout_s, transport=transport)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def collections(self) -> list[Json]:
        return list((await self._json(_Call("GET", "collections")))["collections"])

    async def collection(self, collection: str) -> Json:
        return await self._json(_Call("GET", _at(collection)))

    async def create_collection(self, collection: str, **config: str | None) -> Json:
        """config: text_encoder, image_encoder, reranker, ontology, vector_index."""
        return await self._json(_Call("PUT", _at(collection), config))

    async def delete_collection(self, collection: str) -> None:
        await self._sent(_Call("DELETE", _at(collection)))

    async def search(self, collection: str, query: Query, **options: Unpack[SearchOptions]) -> Json:
        """One page of hits, with facets and how far they can be trusted."""
        return await self._json(_search(collection, query, options))

    async def pages(self, collection: str, query: Query, **options: Unpack[SearchOptions]) -> AsyncIterator[Json]:
        """Every hit of a search, page after page of `k`, all from one state of the collection."""
        while True:
            answer = await self.search(collection, query, **options)
            for hit in answer["hits"]:
                yield hit
            if answer["cursor"] is None:
                return
            options["cursor"] = answer["cursor"]

    async def search_batch(
        self, collection: str, queries: Sequence[Query], **options: Unpack[SearchOptions]
    ) -> list[Json]:
        """One answer each; one that failed is a problem with `status` and `detail`."""
        return list((await self._json(_batch(collection, queries, options)))["answers"])

    async def add_documents(self, collection: str, documents: Iterable[Mapping[str, Any]]) -> Json:
        """Upserts, some hundred a request. What is told as added is on disk."""
        sent = [(await self._json(_add(collection, batch)), len(batch)) for batch in _batches(documents)]
        return _joined([answer for answer, _ in sent], [length for _, length in sent])

    async def document(self, collection: str, id: str) -> Json:
        return await self._json(_Call("GET", _at(collection, "documents", id)))

    async def image(self, collection: str, id: str, size: int = 512) -> bytes:
        """The rendered picture, PNG, longest side at most `size` px."""
        call = _Call("GET", _at(collection, "documents", id, "image"), params={"size": size})
        return (await self._sent(call)).content

    async def delete_document(self, collection: str, id: str) -> int:
        return int((await self._json(_Call("DELETE", _at(collection, "documents", id))))["deleted"])

    async def delete_documents(self, collection: str, where: Mapping[str, Any]) -> int:
        call = _Call("POST", _at(collection, "documents", "delete"), {"where": where})
        return int((await self._json(call))["deleted"])

    async def rebuild(self, collection: str, vector_index: str | None = None) -> Json:
        """A job."""
        return await self._json(_Call("POST", _at(collection, "rebuild"), {"vector_index": vector_index}))

    async def ingest(self, collection: str, source: str) -> Json:
        """A job that adds a source below the server's configured folder."""
        return await self._json(_Call("POST", _at(collection, "ingestions"), {"source": source}))

    async def evaluate(self, collection: str, **asked: Any) -> Json:
        """A job. asked: source and split, or queries and qrels; retrievers, measures."""
        return await self._json(_evaluate(collection, asked))

    async def jobs(self) -> list[Json]:
        return list((await self._json(_Call("GET", "jobs")))["jobs"])

    async def job(self, id: str) -> Json:
        return await self._json(_Call("GET", f"jobs/{quote(id, safe='')}"))

    async def cancel_job(self, id: str) -> Json:
        return await self._json(_Call("POST", f"jobs/{quote(id, safe='')}/cancel"))

    async def job_events(self, id: str) -> AsyncIterator[Json]:
        """The job each time it gets on, until it ends."""
        async with self._http.stream("GET", f"/v1/jobs/{quote(id, safe='')}/events", timeout=None) as response:
            if response.status_code >= 400:
                await response.aread()
                raise _problem(response)
            async for line in response.aiter_lines():
                if line.startswith("data:"):
                    yield json.loads(line[5:])

    async def wait(self, id: str) -> Json:
        """The job once it has ended."""
        while (job := await self.job(id))["state"] not in FINAL:
            async for job in self.job_events(id):  # noqa: B007
                pass
        return job

    async def embeddings(self, texts: str | Sequence[str], model: str = "default") -> list[list[float]]:
        """Unit vectors."""
        asked = {"input": texts if isinstance(texts, str) else list(texts), "model": model}
        return [item["embedding"] for item in (await self._json(_Call("POST", "embeddings", asked)))["data"]]

    async def _sent(self, call: _Call) -> httpx.Response:
        response = await self._http.request(**call.arguments())
        if response.status_code >= 400:
            raise _problem(response)
        return response

    async def _json(self, call: _Call) -> Json:
        return dict((await self._sent(call)).json())
