"""The HTTP service: routes that parse, call one verb of the engine, and print."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import TypeAdapter
from starlette.concurrency import run_in_threadpool

from encoders.images import thumbnail
from retrieval import filters
from retrieval.engine import Engine
from retrieval.errors import InputError, Invalid, NotFound, RetrievalError, TooLarge
from retrieval.types import Document, Item
from server import logs, openapi, problems, schemas
from server.assemble import Config
from server.batching import Searches
from server.bodies import json_and_files, lines_of, valid
from server.guard import Guard
from server.home import Home
from server.jobs import FINAL, Jobs, source_below
from server.openapi import BATCH_ANSWER, PNG, PROBLEMS, SSE, body_of
from server.settings import Settings

T = TypeVar("T")
STATIC = Path(__file__).with_name("static")
EVENT_EVERY_S = 0.3
DELETE_BATCH = 1000
log = logging.getLogger("lightbox")


def create_app(settings: Settings) -> FastAPI:
    """The application over the collections of `settings.home`."""
    home = Home(settings)
    jobs = Jobs(settings)
    searches = Searches(settings.max_concurrent)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        jobs.start()
        yield
        await run_in_threadpool(jobs.close)
        searches.close()
        await run_in_threadpool(home.close)

    app = FastAPI(title="Lightbox", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    problems.install(app)
    _public(app, home)
    _collections(app, home)
    _searching(app, home, searches, settings)
    _documents(app, home)
    _jobs(app, home, jobs, settings)
    _embeddings(app, home)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.openapi = lambda: openapi.document(app)  # type: ignore[method-assign]
    app.add_middleware(Guard, settings=settings)
    return app


def serve(settings: Settings, host: str, port: int) -> None:
    """Serves until it is told to stop; what was accepted is answered first."""
    if not settings.api_keys and not _loopback(host):
        raise InputError(f"serve: got --host {host} without keys; set LIGHTBOX_API_KEYS, or serve on 127.0.0.1")
    logs.configure()
    print(f"Lightbox serves {len(Home(settings).names())} collections on http://{host}:{port}", flush=True)
    uvicorn.run(create_app(settings), host=host, port=port, log_config=None, access_log=False, timeout_keep_alive=15,
                timeout_graceful_shutdown=30)  # fmt: skip


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


# --- the page, health, metrics --------------------------------------------------------------------


def _public(app: FastAPI, home: Home) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(STATIC / "docs.html")

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        """The process runs."""
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """The home folder can be read."""
        await run_in_threadpool(home.names)
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        """Prometheus text format."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


# --- collections ----------------------------------------------------------------------------------


def _collections(app: FastAPI, home: Home) -> None:
    @app.get("/v1/collections")
    def collections() -> dict[str, list[dict[str, Any]]]:
        """Every published collection, in short."""
        found = []
        for name in home.names():
            info = home.info(name)
            found.append({key: info[key] for key in ("collection", "documents", "generation")})
        return {"collections": found}

    @app.get("/v1/collections/{c}", responses=PROBLEMS)
    def collection(c: str) -> dict[str, Any]:
        """Counts, spaces with encoder digests, generation, index kinds, bytes per vector, measured recall."""
        return home.info(c)

    @app.put("/v1/collections/{c}", status_code=201, responses=PROBLEMS)
    def create(c: str, body: schemas.CollectionIn) -> dict[str, Any]:
        """An empty collection. Local paths are for the command line: names only here."""
        for field in ("text_encoder", "image_encoder", "reranker", "ontology"):
            name = getattr(body, field)
            if name is not None and (name.startswith((".", "/", "~")) or Path(name).exists()):
                raise Invalid(f"{field}: a path is refused here; index the collection from the command line", field)
        home.create(c, Config.given(**body.model_dump()))
        return home.info(c)

    @app.delete("/v1/collections/{c}", status_code=204, responses=PROBLEMS)
    def delete(c: str) -> None:
        """Drops a collection with all its generations."""
        home.delete(c)


# --- searching ------------------------------------------------------------------------------------


def _searching(app: FastAPI, home: Home, searches: Searches, settings: Settings) -> None:
    @app.post(
        "/v1/collections/{c}/search",
        response_model=schemas.Answer,
        response_model_exclude_unset=True,
        responses=PROBLEMS,
        openapi_extra=body_of(schemas.Search, multipart="query"),
    )
    async def search(c: str, request: Request) -> JSONResponse:
        """One query: JSON, or multipart with field `query` (the JSON) and the file fields that it names."""
        body, files = await json_and_files(request, "query")
        asked = valid(TypeAdapter(schemas.Search), body).request(files)
        _within(asked.k, settings)
        engine = await run_in_threadpool(home.engine, c)
        answer = await searches(engine, asked)
        if isinstance(answer, RetrievalError):
            raise answer
        return JSONResponse(answer)

    @app.post(
        "/v1/collections/{c}/search/batch",
        responses=PROBLEMS | {200: {"content": {"application/json": {"schema": BATCH_ANSWER}}}},
        openapi_extra=body_of(list[schemas.Search]),
    )
    async def batch(c: str, request: Request) -> JSONResponse:
        """A list of queries; one answer or one problem each, in order."""
        body, _ = await json_and_files(request, None)
        if not isinstance(body, list) or not body:
            raise Invalid("body: expected a list of at least one query")
        if len(body) > settings.max_batch:
            raise TooLarge(f"body: got {len(body)} queries, the limit is {settings.max_batch}")
        engine = await run_in_threadpool(home.engine, c)
        asked = [_caught(lambda one=one: _checked(one, settings)) for one in body]
        good = [one for one in asked if not isinstance(one, Exception)]
        answers = iter(await searches.many(engine, good) if good else [])
        results = [one if isinstance(one, Exception) else next(answers) for one in asked]
        return JSONResponse({"answers": [_told(result, request) for result in results]})


def _checked(body: Any, settings: Settings) -> Any:
    asked = valid(TypeAdapter(schemas.Search), body).request()
    _within(asked.k, settings)
    return asked


def _within(k: int, settings: Settings) -> None:
    if k > settings.max_k:
        raise TooLarge(f"k: got {k}, the limit is {settings.max_k}; use the cursor for more", "k")


def _told(result: Any, request: Request) -> Any:
    if isinstance(result, RequestValidationError):
        status, detail, field = problems.first_fault(result.errors())
        return json.loads(bytes(problems.problem(status, detail, problems.request_id(request), field).body))
    if isinstance(result, RetrievalError):
        status = problems.status_of(result)
        told = problems.problem(status, str(result), problems.request_id(request), getattr(result, "field", None))
        return json.loads(bytes(told.body))
    return result


def _caught(call: Callable[[], T]) -> T | RetrievalError | RequestValidationError:
    try:
        return call()
    except (RetrievalError, RequestValidationError) as error:
        return error


# --- documents ------------------------------------------------------------------------------------


def _documents(app: FastAPI, home: Home) -> None:
    @app.post(
        "/v1/collections/{c}/documents",
        response_model=schemas.Ingested,
        responses=PROBLEMS,
        openapi_extra=body_of(list[schemas.DocumentIn], ndjson=schemas.DocumentIn),
    )
    async def add(c: str, request: Request) -> dict[str, Any]:
        """Upserts a JSON list or NDJSON lines; a status per item. What is reported as added is on disk and visible."""
        lines = await lines_of(request)
        return await run_in_threadpool(_added, home, c, lines)

    @app.get("/v1/collections/{c}/documents/{id:path}/image", responses=PROBLEMS | PNG, response_class=Response)
    def image(c: str, id: str, size: Annotated[int, Query(ge=16, le=512)] = 512) -> Response:
        """The rendered picture, PNG, longest side at most `size`."""
        png = home.engine(c).snapshot().image(id)
        if png is None:
            raise NotFound(f"document: none with a picture has that id in collection {c}", "id")
        return Response(thumbnail(png, size) if size < 512 else png, media_type="image/png",
                        headers={"Cache-Control": "private, max-age=60"})  # fmt: skip

    @app.get("/v1/collections/{c}/documents/{id:path}", responses=PROBLEMS)
    def document(c: str, id: str) -> dict[str, Any]:
        """One document with its findings."""
        return _document(home.engine(c), id)

    @app.delete("/v1/collections/{c}/documents/{id:path}", response_model=schemas.Deleted, responses=PROBLEMS)
    def remove(c: str, id: str) -> dict[str, int]:
        """Removes one document; 0 where there was none."""
        return {"deleted": home.remove(c, [id])}

    @app.post("/v1/collections/{c}/documents/delete", response_model=schemas.Deleted, responses=PROBLEMS)
    def remove_where(c: str, body: schemas.DeleteByFilter) -> dict[str, int]:
        """Removes every document that a filter selects. An empty filter is refused."""
        where = filters.parse(body.where)
        if where is None:
            raise Invalid("where: an empty filter would remove everything; delete the collection instead", "where")
        return {"deleted": home.remove_where(c, where)}


def _added(home: Home, c: str, lines: list[tuple[int, Any]]) -> dict[str, Any]:
    statuses: list[dict[str, Any]] = []
    documents: dict[str, tuple[int, Document]] = {}
    for line, body in lines:
        try:
            document = _upload(valid(TypeAdapter(schemas.DocumentIn), body))
        except (RetrievalError, RequestValidationError) as error:
            id = body.get("_id") if isinstance(body, dict) and isinstance(body.get("_id"), str) else None
            statuses.append({"id": id, "line": line, "status": "rejected", "reason": _reason(error)})
            continue
        documents[document.id] = (line, document)  # the last of two equal ids wins, as across calls
    done = home.add(c, [document for _, document in documents.values()], _silent)
    refused = {item.id: item.reason for item in done.rejected}
    for id, (line, _) in documents.items():
        rejected = {"status": "rejected", "reason": refused[id]} if id in refused else {"status": "added"}
        statuses.append({"id": id, "line": line} | rejected)
    added = sum(status["status"] == "added" for status in statuses)
    statuses.sort(key=lambda status: status["line"])
    return {"added": added, "rejected": len(statuses) - added, "items": statuses, "documents": done.documents}


def _reason(error: RetrievalError | RequestValidationError) -> str:
    return str(error) if isinstance(error, RetrievalError) else problems.first_fault(error.errors())[1]


def _upload(body: schemas.DocumentIn) -> Document:
    image = schemas.decoded(body.image.base64, "image.base64") if body.image else None
    return Document(id=body.id, title=body.title, text=body.text, image=image, meta=body.metadata)


def _document(engine: Engine, id: str) -> dict[str, Any]:
    document = engine.snapshot().fetch([id])[0]
    if document is None:
        raise NotFound(f"document: none has that id in collection {engine.name}", "id")
    return engine.shown(document)


def _silent(phase: str, done: int, total: int | None) -> None:
    pass


# --- jobs -----------------------------------------------------------------------------------------


def _jobs(app: FastAPI, home: Home, jobs: Jobs, settings: Settings) -> None:
    @app.post("/v1/collections/{c}/rebuild", status_code=202, response_model=schemas.Job, responses=PROBLEMS)
    def rebuild(c: str, body: schemas.RebuildIn | None = None) -> dict[str, Any]:
        """A new generation beside the old one, then a swap; searches go on."""
        home.config(c)
        home.check_vector_index(body.vector_index if body else None)
        return jobs.submit("rebuild", c, body.model_dump() if body else {})

    @app.post("/v1/collections/{c}/evaluations", status_code=202, response_model=schemas.Job, responses=PROBLEMS)
    def evaluation(c: str, body: schemas.EvaluationIn) -> dict[str, Any]:
        """Measures retrievers on judgments: in the body, or of a source below the configured folder."""
        home.config(c)
        if (body.source is None) == (body.queries is None or body.qrels is None):
            raise Invalid("body: expected either source, or queries and qrels")
        if body.source is not None:
            source_below(settings, body.source)
        return jobs.submit("evaluation", c, body.model_dump(by_alias=True))

    @app.get("/v1/jobs")
    def listing() -> dict[str, list[schemas.Job]]:
        """Newest first."""
        return {"jobs": [schemas.Job.model_validate(state) for state in jobs.list()]}

    @app.get("/v1/jobs/{id}", response_model=schemas.Job, responses=PROBLEMS)
    def job(id: str) -> dict[str, Any]:
        return jobs.find(id)

    @app.post("/v1/jobs/{id}/cancel", response_model=schemas.Job, responses=PROBLEMS)
    def cancel(id: str) -> dict[str, Any]:
        """Asks a job to stop; a finished one stays as it is."""
        return jobs.cancel(id)

    @app.get("/v1/jobs/{id}/events", responses=PROBLEMS | SSE, response_class=StreamingResponse)
    async def events(id: str) -> StreamingResponse:
        """The job as server-sent events until it ends."""
        await run_in_threadpool(jobs.find, id)
        return StreamingResponse(_events(jobs, id), media_type="text/event-stream")


async def _events(jobs: Jobs, id: str) -> AsyncIterator[str]:
    told = None
    while True:
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


def _embeddings(app: FastAPI, home: Home) -> None:
    @app.post("/v1/embeddings", responses=PROBLEMS)
    def embeddings(body: schemas.EmbeddingsIn) -> dict[str, Any]:
        """Texts to unit vectors, in the shape of OpenAI's API; `model` is "default" or a collection's name."""
        encoder = home.text_encoder(None if body.model == "default" else body.model)
        items = [Item(text=text) for text in ([body.input] if isinstance(body.input, str) else body.input)]
        for i, item in enumerate(items):
            if not encoder.handles(item):
                raise Invalid(f"input[{i}]: holds nothing to encode", f"input[{i}]")
        vectors = encoder.encode_queries(items)
        as_text = body.encoding_format == "base64"
        data = [base64.b64encode(v.astype("<f4").tobytes()).decode() if as_text else v.tolist() for v in vectors]
        words = int(np.sum([len(item.text.split()) for item in items]))
        return {
            "object": "list",
            "model": body.model,
            "data": [{"object": "embedding", "index": i, "embedding": value} for i, value in enumerate(data)],
            "usage": {"prompt_tokens": words, "total_tokens": words},
        }
