"""The HTTP service: the application, and the process that serves it."""

from __future__ import annotations

import gc
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool

from retrieval.errors import InputError
from server import logs, openapi, problems, schemas
from server.batching import Searches, Work
from server.guard import Guard
from server.home import Home
from server.jobs import Jobs
from server.openapi import PROBLEMS
from server.pictures import Fetch
from server.routes import Service, router
from server.settings import Settings

STATIC = Path(__file__).with_name("static")
GRACE_S = 30  # for what was accepted, once the server is told to stop
ABOUT = "Search over pictures, texts and radiology reports. Errors are application/problem+json."


def create_app(settings: Settings, home: Home | None = None, jobs: Jobs | None = None) -> FastAPI:
    """The application over the collections of `settings.home`."""
    home = home or Home(settings)
    service = Service(
        settings,
        home,
        jobs or Jobs(settings),
        Searches(home.engine, settings.max_concurrent),
        Work(settings.max_concurrent),
        Fetch(settings.image_hosts, settings.max_body),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.jobs.start()
        yield
        await run_in_threadpool(service.jobs.close)
        service.searches.close()
        service.work.close()
        await run_in_threadpool(service.home.close)

    app = FastAPI(
        title="Lightbox", version="1", description=ABOUT, lifespan=lifespan, docs_url=None, redoc_url=None,
        responses=PROBLEMS, generate_unique_id_function=lambda route: route.name,
    )  # fmt: skip
    problems.install(app)
    _public(app, service.home)
    routes = router(service)
    app.include_router(routes)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.openapi = lambda: openapi.document(app)  # type: ignore[method-assign]
    app.add_middleware(Guard, settings=settings)
    app.state.jobs = service.jobs
    app.state.routes = [*app.routes, *routes.routes]  # an included router does not list its own
    return app


def _public(app: FastAPI, home: Home) -> None:
    """The page, the docs, health and metrics."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(STATIC / "docs.html")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> FileResponse:
        return FileResponse(STATIC / "icon.svg")

    @app.get("/livez", response_model=schemas.Health)
    async def livez() -> dict[str, str]:
        """The process runs."""
        return {"status": "alive"}

    @app.get("/readyz", response_model=schemas.Health)
    async def readyz() -> dict[str, str]:
        """The home folder can be read."""
        await run_in_threadpool(home.names)
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


# --- the process ----------------------------------------------------------------------------------


def serve(settings: Settings, host: str, port: int) -> None:
    """Serves until it is told to stop; what was accepted is answered first. Port 0 takes a free one."""
    if not settings.api_keys and not _loopback(host):
        raise InputError(f"serve: got --host {host} without keys; set LIGHTBOX_API_KEYS, or serve on 127.0.0.1")
    logs.configure()
    run(create_app(settings), host, port, len(Home(settings).names()))


def run(app: FastAPI, host: str, port: int, collections: int) -> None:
    """Runs the application until the process is told to stop, and says where it listens."""
    listening = _bound(host, port)
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_keep_alive=15,
        timeout_graceful_shutdown=GRACE_S,
    )  # fmt: skip
    print(f"Lightbox serves {collections} collections on http://{shown}:{listening.getsockname()[1]}", flush=True)
    _collect_rarely()
    with suppress(KeyboardInterrupt):  # Ctrl-C is a way to stop a server, not an error
        _Server(config, app.state.jobs).run(sockets=[listening])


def _collect_rarely() -> None:
    """A search makes thousands of tuples that die with it: looking for cycles among them was a quarter of its time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


class _Server(uvicorn.Server):
    """Streams of job events end when the server is told to stop; nobody else would end them."""

    def __init__(self, config: uvicorn.Config, jobs: Jobs) -> None:
        super().__init__(config)
        self._jobs = jobs

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._jobs.closing.set()
        super().handle_exit(sig, frame)


def _bound(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError for an address that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, since asyncio sets TCP_NODELAY only on sockets that say TCP; else an answer waits 40 ms for an ACK.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        raise InputError(f"serve: cannot listen on {host}:{port} ({error}); name another --host or --port") from error
    listening.listen(512)
    return listening


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
