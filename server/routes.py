"""The routes of the service: each parses, calls one verb, and prints."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Query, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import AfterValidator, TypeAdapter
from starlette.concurrency import run_in_threadpool

from retrieval import filters
from retrieval.engine import Engine
from retrieval.errors import Invalid, NotFound, RetrievalError, TooLarge
from retrieval.evaluate import parse_measures
from retrieval.request import Request
from retrieval.types import Item
from server import problems, schemas, uploads
from server.assemble import Config
from server.batching import Searches, Work
from server.bodies import StrictRoute, json_and_files, json_of, lines_of, valid
from server.guard import SLASH
from server.home import Home
from server.jobs import FINAL, Jobs
from server.judging import judgments
from server.openapi import BATCH_ANSWER, PNG, SSE, body_of
from server.pictures import Fetch
from server.settings import Settings
from server.work import source_below

EVENT_EVERY_S = 0.3
UNCACHED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
MADE_BY = ("text_encoder", "image_encoder", "reranker", "ontology")
_SEARCH: TypeAdapter[schemas.Search] = TypeAdapter(schemas.Search)

Id = Annotated[str, AfterValidator(lambda id: id.replace(SLASH, "/"))]  # the guard tells slashes of an id apart
Name = Id  # no collection's name holds one, and what is wrong with a name is told as it was sent


class Service(NamedTuple):
    """What the routes work with."""

    settings: Settings
    home: Home
    jobs: Jobs
    searches: Searches
    work: Work
    fetch: Fetch


def router(service: Service) -> APIRouter:
    """Every route below /v1."""
    made = APIRouter(prefix="/v1", route_class=StrictRoute)
    for part in (_collections, _searching, _documents, _jobs, _embeddings):
        part(made, service)
    return made


# --- collections ----------------------------------------------------------------------------------


def _collections(routes: APIRouter, service: Service) -> None:
    home = service.home

    @routes.get("/collections", response_model=schemas.CollectionList)
    def collections() -> dict[str, Any]:
        """Every published collection, in short."""
        return {"collections": [home.info(name) for name in home.names()]}

    @routes.get("/collections/{c}", response_model=schemas.CollectionInfo)
    def collection(c: Name) -> dict[str, Any]:
        """Counts, spaces with encoder digests, generation, index kinds, bytes per vector, measured recall."""
        return _shown(home.info(c))

    @routes.put("/collections/{c}", status_code=201, response_model=schemas.CollectionInfo)
    def create_collection(c: Name, body: schemas.CollectionIn | None = None) -> dict[str, Any]:
        """An empty collection. Local paths are for the command line: names only here."""
        body = body or schemas.CollectionIn()
        for field in MADE_BY:
            name = getattr(body, field)
            if name is not None and (name.startswith((".", "/", "~")) or "\\" in name or Path(name).exists()):
                raise Invalid(f"{field}: a path is refused here; index the collection from the command line", field)
        home.check_vector_index(body.vector_index)
        home.create(c, Config.given(**body.model_dump()))
        return _shown(home.info(c))

    @routes.delete("/collections/{c}", status_code=204)
    def delete_collection(c: Name) -> None:
        """Drops a collection with all its generations."""
        home.delete(c)


def _shown(info: dict[str, Any]) -> dict[str, Any]:
    """Encoders that the operator named by a path are told by their last step."""
    config = info["config"]
    named = {field: Path(config[field]).name for field in MADE_BY if str(config.get(field) or "").startswith("/")}
    return info | {"config": config | named}


# --- searching ------------------------------------------------------------------------------------


def _searching(routes: APIRouter, service: Service) -> None:
    settings, home = service.settings, service.home

    @routes.post(
        "/collections/{c}/search",
        response_model=schemas.Answer,
        openapi_extra=body_of(schemas.Search, multipart="query"),
    )
    async def search(c: Name, request: HttpRequest) -> JSONResponse:
        """One query: JSON, or multipart with field `query` (the JSON) and the file fields that it names."""
        body, files = await json_and_files(request, "query")
        asked = await _request(service, body, files)
        answer = await service.searches(c, asked)
        if isinstance(answer, RetrievalError):
            raise answer
        return JSONResponse(answer)

    @routes.post(
        "/collections/{c}/search/batch",
        responses={200: {"content": {"application/json": {"schema": BATCH_ANSWER}}}},
        openapi_extra=body_of(list[schemas.Search]),
    )
    async def search_batch(c: Name, request: HttpRequest) -> JSONResponse:
        """A list of queries; one answer or one problem each, in order."""
        body = json_of(await request.body())
        if not isinstance(body, list) or not body:
            raise Invalid("body: expected a list of at least one query")
        if len(body) > settings.max_batch:
            raise TooLarge(f"body: got {len(body)} queries, the limit is {settings.max_batch}")
        asked = [await _caught(service, one) for one in body]
        good = [one for one in asked if isinstance(one, Request)]
        if not good:
            await run_in_threadpool(home.config, c)  # whether there is such a collection comes first
        answers = iter(await service.searches.many(c, good) if good else [])
        results = [next(answers) if isinstance(one, Request) else one for one in asked]
        return JSONResponse({"answers": [_told(result, request) for result in results]})


async def _request(service: Service, body: Any, files: Mapping[str, bytes]) -> Request:
    """A search in the engine's words; off the event loop where a picture has to be fetched."""
    search = valid(_SEARCH, body)
    limit = service.settings.max_k
    if search.k > limit:
        raise TooLarge(f"k: got {search.k}, the limit is {limit}; use the cursor for more", "k")
    if service.fetch.hosts and any(part.image for part in search.query):
        return await service.work(search.request, files, service.fetch)
    return search.request(files, service.fetch)


async def _caught(service: Service, body: Any) -> Request | RetrievalError | RequestValidationError:
    try:
        return await _request(service, body, {})
    except (RetrievalError, RequestValidationError) as error:
        return error


def _told(result: Any, request: HttpRequest) -> Any:
    """An answer as it is, an error as the problem that it would have been alone."""
    if isinstance(result, Exception):
        return json.loads(bytes(problems.of(result, problems.request_id(request)).body))
    return result


# --- documents ------------------------------------------------------------------------------------


def _documents(routes: APIRouter, service: Service) -> None:
    home, work = service.home, service.work

    @routes.post(
        "/collections/{c}/documents",
        response_model=schemas.Ingested,
        openapi_extra=body_of(list[schemas.DocumentIn], ndjson=schemas.DocumentIn),
    )
    async def add_documents(c: Name, request: HttpRequest) -> dict[str, Any]:
        """Upserts a JSON list or NDJSON lines; a status per item. What is told as added is on disk and visible."""
        return await work(uploads.upsert, home, c, await lines_of(request), service.fetch)

    @routes.get("/collections/{c}/documents/{id:path}/image", responses=PNG, response_class=Response)
    def image(c: Name, id: Id, size: Annotated[int, Query(ge=16, le=512)] = 512) -> Response:
        """The rendered picture, PNG, longest side at most `size`."""
        from encoders.images import smaller

        png = home.engine(c).snapshot().image(id)
        if png is None:
            raise NotFound(f"document: none with a picture has that id in collection {c}", "id")
        shown = smaller(png, size) if size < 512 else png
        return Response(shown, media_type="image/png", headers={"Cache-Control": "private, max-age=60"})

    @routes.get("/collections/{c}/documents/{id:path}", response_model=schemas.DocumentOut)
    def document(c: Name, id: Id) -> dict[str, Any]:
        """One document with its findings."""
        return _document(home.engine(c), id)

    @routes.delete("/collections/{c}/documents/{id:path}", response_model=schemas.Deleted)
    async def delete_document(c: Name, id: Id) -> dict[str, int]:
        """Removes one document; 0 where there was none."""
        return {"deleted": await work(home.remove, c, [id])}

    @routes.post("/collections/{c}/documents/delete", response_model=schemas.Deleted)
    async def delete_documents(c: Name, body: schemas.DeleteByFilter) -> dict[str, int]:
        """Removes every document that a filter selects. An empty filter is refused."""
        where = filters.parse(body.where)
        if where is None:
            raise Invalid("where: an empty filter would remove everything; delete the collection instead", "where")
        return {"deleted": await work(home.remove_where, c, where)}


def _document(engine: Engine, id: str) -> dict[str, Any]:
    document = engine.snapshot().fetch([id])[0]
    if document is None:
        raise NotFound(f"document: none has that id in collection {engine.name}", "id")
    return engine.shown(document)


# --- jobs -----------------------------------------------------------------------------------------


def _jobs(routes: APIRouter, service: Service) -> None:
    home, jobs, settings = service.home, service.jobs, service.settings

    @routes.post("/collections/{c}/rebuild", status_code=202, response_model=schemas.Job)
    def rebuild(c: Name, body: schemas.RebuildIn | None = None) -> dict[str, Any]:
        """A new generation beside the old one, then a swap; searches go on."""
        home.config(c)
        home.check_vector_index(body.vector_index if body else None)
        return jobs.submit("rebuild", c, body.model_dump() if body else {})

    @routes.post("/collections/{c}/ingestions", status_code=202, response_model=schemas.Job)
    def ingest(c: Name, body: schemas.IngestionIn) -> dict[str, Any]:
        """Adds the documents of a source below the configured folder."""
        home.config(c)
        source_below(settings, body.source)
        return jobs.submit("ingestion", c, body.model_dump())

    @routes.post("/collections/{c}/evaluations", status_code=202, response_model=schemas.Job)
    def evaluate(c: Name, body: schemas.EvaluationIn) -> dict[str, Any]:
        """Measures retrievers on judgments: in the body, or of a source below the configured folder."""
        _check_evaluation(home.engine(c), body, settings)
        return jobs.submit("evaluation", c, body.model_dump(by_alias=True))

    @routes.get("/jobs", response_model=schemas.JobList)
    def list_jobs() -> dict[str, Any]:
        """Newest first."""
        return {"jobs": jobs.list()}

    @routes.get("/jobs/{id}", response_model=schemas.Job)
    def job(id: str) -> dict[str, Any]:
        """How far one job is."""
        return jobs.find(id)

    @routes.post("/jobs/{id}/cancel", response_model=schemas.Job)
    def cancel_job(id: str) -> dict[str, Any]:
        """Asks a job to stop; a finished one stays as it is."""
        return jobs.cancel(id)

    @routes.get("/jobs/{id}/events", responses=SSE, response_class=StreamingResponse)
    async def job_events(id: str) -> StreamingResponse:
        """The job as server-sent events until it ends."""
        await run_in_threadpool(jobs.find, id)
        return StreamingResponse(_events(jobs, id), media_type="text/event-stream", headers=UNCACHED)


def _check_evaluation(engine: Engine, body: schemas.EvaluationIn, settings: Settings) -> None:
    """Refuses now what the job would end in."""
    parse_measures(body.measures)
    snapshot = engine.snapshot()
    for name in body.retrievers:
        engine.retriever(name, snapshot)
    if (body.source is None) == (body.queries is None or body.qrels is None):
        raise Invalid("body: expected either source, or queries and qrels")
    if body.source is not None:
        judgments(source_below(settings, body.source), body.split)
        return
    ids = [query.id for query in body.queries or ()]
    if len(set(ids)) < len(ids):
        raise Invalid("queries: the same _id occurs twice", "queries")
    if not set(ids) & set(body.qrels or ()):
        raise Invalid("qrels: judge none of the queries", "qrels")


async def _events(jobs: Jobs, id: str) -> AsyncIterator[str]:
    told = None
    while not jobs.closing.is_set():
        try:
            state = await run_in_threadpool(jobs.find, id)
        except NotFound:
            return
        if state["updated"] != told:
            told = state["updated"]
            yield f"event: job\ndata: {schemas.Job.model_validate(state).model_dump_json()}\n\n"
        if state["state"] in FINAL:
            return
        await asyncio.sleep(EVENT_EVERY_S)


# --- embeddings -----------------------------------------------------------------------------------


def _embeddings(routes: APIRouter, service: Service) -> None:
    @routes.post("/embeddings", response_model=schemas.Embeddings)
    async def embeddings(body: schemas.EmbeddingsIn) -> dict[str, Any]:
        """Texts to unit vectors, in the shape of OpenAI's API; `model` is "default" or a collection's name."""
        return await service.work(_embedded, service.home, body)


def _embedded(home: Home, body: schemas.EmbeddingsIn) -> dict[str, Any]:
    encoder = home.text_encoder(None if body.model == "default" else body.model)
    items = [Item(text=text) for text in ([body.input] if isinstance(body.input, str) else body.input)]
    for i, item in enumerate(items):
        if not encoder.handles(item):
            raise Invalid(f"input[{i}]: holds nothing to encode", f"input[{i}]")
    if body.dimensions not in (None, encoder.dim):
        raise Invalid(f"dimensions: got {body.dimensions}, this model has {encoder.dim}", "dimensions")
    vectors = encoder.encode_queries(items)
    as_text = body.encoding_format == "base64"
    data = [base64.b64encode(v.astype("<f4").tobytes()).decode() if as_text else v.tolist() for v in vectors]
    words = sum(len(item.text.split()) for item in items)
    return {
        "model": body.model,
        "data": [{"index": i, "embedding": value} for i, value in enumerate(data)],
        "usage": {"prompt_tokens": words, "total_tokens": words},
    }
