"""The process of one job: ``python -m server.work ID``. Settings come to it through the environment."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from retrieval.errors import BackendError, NotFound, RetrievalError
from retrieval.files import read_source
from retrieval.types import Part, Query
from server import logs
from server.home import Home
from server.jobs import State, ended, read, write
from server.judging import Judgments, judgments, measure
from server.settings import Settings, load

log = logging.getLogger("lightbox.jobs")

WRITE_EVERY_S = 0.25
MAX_ERRORS = 5  # reasons of rejection that a job's state repeats


class Report:
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
            self.running()

    def running(self) -> None:
        self.state |= {"state": "running", "updated": time.time()}
        write(self.path, self.state)

    def end(self, outcome: str, **changes: Any) -> None:
        write(self.path, ended(self.state, outcome) | changes)


def run(id: str, settings: Settings, home: Home) -> None:
    """Does one job and leaves its outcome in its file."""
    path = settings.home / "jobs" / f"{id}.json"
    state = read(path)
    if state is None:
        raise NotFound("job: there is none of that id")
    report = Report(path, state | {"phase": "starting"})
    try:
        report.running()
        result = WORK[state["kind"]](state, settings, home, report)
    except KeyboardInterrupt:
        report.end("cancelled")
    except BackendError:  # what the machine says may name its folders
        log.exception("job failed")
        report.end("failed", errors=["the collection cannot be changed at the moment; see the server's log"])
    except RetrievalError as error:
        report.end("failed", errors=[str(error)])
    except Exception:
        log.exception("job failed")
        report.end("failed", errors=["an error of ours; see the server's log"])
    else:
        report.end("done", result=result, errors=report.state["errors"])


def _rebuild(state: State, _: Settings, home: Home, report: Report) -> dict[str, Any]:
    done = home.rebuild(state["collection"], vector_index=state["spec"].get("vector_index"), progress=report)
    return {"generation": done.generation, "documents": done.documents}


def _ingestion(state: State, settings: Settings, home: Home, report: Report) -> dict[str, Any]:
    source = read_source(source_below(settings, state["spec"]["source"]))
    done = home.add(state["collection"], source.documents(), report)
    told = [f"line {r.line}: {r.reason}" if r.line else r.reason for r in done.rejected[:MAX_ERRORS]]
    report.state["errors"] = told
    return {"documents": done.documents, "added": done.added, "rejected": len(done.rejected)}


def _evaluation(state: State, settings: Settings, home: Home, report: Report) -> dict[str, Any]:
    spec, engine = state["spec"], home.engine(state["collection"])
    return measure(engine, _judgments(spec, settings), spec["retrievers"], spec["measures"], progress=report).json()


def _judgments(spec: Mapping[str, Any], settings: Settings) -> Judgments:
    if spec.get("source") is not None:
        return judgments(source_below(settings, spec["source"]), spec["split"])
    queries = [Query(id=q["_id"], parts=(Part(text=q["text"], kind=q["kind"]),)) for q in spec["queries"]]
    return Judgments("request", "request", [q for q in queries if q.id in spec["qrels"]], spec["qrels"])


def source_below(settings: Settings, name: str) -> Path:
    """A source of the configured folder. Raises NotFound for any other place."""
    if settings.sources is None:
        raise NotFound("source: this server has no folder of sources; set LIGHTBOX_SOURCES", "source")
    steps = name.replace("\\", "/").split("/")
    plain = name.isprintable() and not any(step in ("", ".", "..") for step in steps)
    try:
        if plain and (settings.sources / name).is_dir():
            return settings.sources / name
    except OSError:  # a name too long for the file system
        pass
    raise NotFound("source: there is none of that name below the configured folder", "source")


WORK: Mapping[str, Callable[[State, Settings, Home, Report], dict[str, Any]]] = {
    "rebuild": _rebuild,
    "ingestion": _ingestion,
    "evaluation": _evaluation,
}


def main(id: str, home: Callable[[Settings], Home] = Home) -> None:
    """Does the job, and ends at once when the server that started it is gone."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # how it is cancelled, also where a shell ignores Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logs.configure()
    settings = load()
    run(id, settings, home(settings))


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin: a thread that holds its lock breaks the interpreter's end
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
