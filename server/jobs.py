"""Long work of the server: each job is a file, and runs in a process of its own.

A process keeps a rebuild from stalling searches, can be stopped at any moment, and is simply
started again after a restart: rebuilds resume by themselves. ``python -m server.jobs ID`` is that
process; the settings come to it through the environment.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from retrieval.errors import NotFound, RetrievalError
from server.settings import Settings, load

log = logging.getLogger("lightbox.jobs")

FINAL = ("done", "failed", "cancelled")
KEPT = 200  # finished jobs
WRITE_EVERY_S = 0.25
STOP_S = 10.0  # between a request to stop and an order

State = dict[str, Any]


class Jobs:
    """The jobs of one home, run one after another."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.home / "jobs"
        self._wake = threading.Condition()
        self._closing = False
        self._current: tuple[str, subprocess.Popen[bytes]] | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Takes up what an earlier process left unfinished."""
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, kind: str, collection: str, spec: Mapping[str, Any]) -> State:
        """A new job, queued."""
        now = time.time()
        state: State = {
            "id": f"{int(now * 1000):013x}{uuid.uuid4().hex[:7]}",
            "kind": kind,
            "collection": collection,
            "state": "queued",
            "phase": "queued",
            "done": 0,
            "total": None,
            "rate": None,
            "seconds_left": None,
            "errors": [],
            "result": None,
            "created": now,
            "updated": now,
            "spec": dict(spec),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self._path(state["id"]), state)
        self._prune()
        with self._wake:
            self._wake.notify_all()
        return state

    def list(self) -> list[State]:
        """Newest first."""
        paths = sorted(self.folder.glob("*.json"), reverse=True) if self.folder.is_dir() else []
        return [state for path in paths if (state := _read(path)) is not None]

    def find(self, id: str) -> State:
        """Raises NotFound."""
        state = _read(self._path(id)) if id.isalnum() and len(id) <= 64 else None
        if state is None:
            raise NotFound("job: there is none of that id", "id")
        return state

    def cancel(self, id: str) -> State:
        """Stops a job that is not finished; what it published stays."""
        state = self.find(id)
        if state["state"] in FINAL:
            return state
        with self._wake:
            if self._current is not None and self._current[0] == id:
                self._current[1].send_signal(signal.SIGINT)
            else:
                _write(self._path(id), state | {"state": "cancelled", "updated": time.time()})
        return self.find(id)

    def close(self) -> None:
        """Stops the running job where it can be resumed, and waits for it."""
        with self._wake:
            self._closing = True
            if self._current is not None:
                self._current[1].kill()
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join(STOP_S)

    def _run(self) -> None:
        while not self._closing:
            waiting = [state for state in reversed(self.list()) if state["state"] not in FINAL]
            if waiting:
                self._run_one(waiting[0]["id"])
                continue
            with self._wake:
                if not self._closing:
                    self._wake.wait(timeout=5.0)

    def _run_one(self, id: str) -> None:
        environment = os.environ | {"LIGHTBOX_HOME": str(self.settings.home.resolve())}
        with self._wake:
            if self._closing:
                return
            process = subprocess.Popen(
                [sys.executable, "-m", "server.jobs", id],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            self._current = (id, process)
        code = process.wait()
        with self._wake:
            self._current = None
            if self._closing:
                return  # it goes on after the restart
        state = _read(self._path(id))
        if state is not None and state["state"] not in FINAL:
            failed = {"state": "failed", "errors": [*state["errors"], f"the job's process ended with status {code}"]}
            _write(self._path(id), state | failed | {"updated": time.time()})

    def _prune(self) -> None:
        finished = [state for state in self.list() if state["state"] in FINAL]
        for state in finished[KEPT:]:
            self._path(state["id"]).unlink(missing_ok=True)

    def _path(self, id: str) -> Path:
        return self.folder / f"{id}.json"


class _Report:
    """A Progress that writes the job's file, a few times a second."""

    def __init__(self, path: Path, state: State) -> None:
        self.path = path
        self.state = state
        self._written = 0.0
        self._phase_start = (time.monotonic(), 0)

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if phase != self.state["phase"]:
            self._phase_start = (now, done)
        start, first = self._phase_start
        rate = (done - first) / (now - start) if now - start > 0.5 and done > first else None
        left = (total - done) / rate if rate and total is not None else None
        self.state |= {"phase": phase, "done": done, "total": total, "rate": rate, "seconds_left": left}
        if now - self._written > WRITE_EVERY_S:
            self._written = now
            self.write(state="running")

    def write(self, **changes: Any) -> None:
        self.state |= changes | {"updated": time.time()}
        _write(self.path, self.state)


def run(id: str, settings: Settings) -> None:
    """Does one job in this process and leaves its outcome in its file."""
    path = settings.home / "jobs" / f"{id}.json"
    state = _read(path)
    if state is None:
        raise NotFound("job: there is none of that id")
    report = _Report(path, state)
    report.write(state="running", phase="starting")
    try:
        result = _WORK[state["kind"]](state, settings, report)
    except KeyboardInterrupt:
        report.write(state="cancelled")
    except RetrievalError as error:
        report.write(state="failed", errors=[str(error)])
    except Exception:
        log.exception("job %s failed", id)
        report.write(state="failed", errors=["an error of ours; see the server's log"])
    else:
        report.write(state="done", result=result, seconds_left=0.0)


def _rebuild(state: State, settings: Settings, report: _Report) -> dict[str, Any]:
    from server.home import Home

    home = Home(settings)
    summary = home.rebuild(state["collection"], vector_index=state["spec"].get("vector_index"), progress=report)
    return {"generation": summary.generation, "documents": summary.documents}


def _evaluation(state: State, settings: Settings, report: _Report) -> dict[str, Any]:
    from server.home import Home
    from server.judging import measure

    spec = state["spec"]
    engine = Home(settings).engine(state["collection"])
    judged = _judgments(spec, settings)
    return measure(engine, judged, spec["retrievers"], spec["measures"], progress=report).json()


def _judgments(spec: Mapping[str, Any], settings: Settings) -> Any:
    from retrieval.types import Part, Query
    from server.judging import Judgments, judgments

    if spec.get("source") is not None:
        return judgments(source_below(settings, spec["source"]), spec["split"])
    queries = [Query(id=q["_id"], parts=(Part(text=q["text"], kind=q["kind"]),)) for q in spec["queries"]]
    return Judgments("request", "request", [q for q in queries if q.id in spec["qrels"]], spec["qrels"])


def source_below(settings: Settings, name: str) -> Path:
    """A source of the configured folder. Raises NotFound for any other place."""
    if settings.sources is None:
        raise NotFound("source: this server has no folder of sources; set LIGHTBOX_SOURCES", "source")
    root = settings.sources.resolve()
    plain = name and not name.startswith(("/", ".")) and ".." not in Path(name).parts and "\0" not in name
    if not plain or not (root / name).is_dir():
        raise NotFound("source: there is none of that name below the configured folder", "source")
    return root / name


_WORK = {"rebuild": _rebuild, "evaluation": _evaluation}


def _read(path: Path) -> State | None:
    try:
        return cast(State, json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def _write(path: Path, state: State) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(state))
    fresh.replace(path)


if __name__ == "__main__":
    run(sys.argv[1], load())
