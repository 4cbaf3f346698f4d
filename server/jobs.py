"""Long work of the server: each job is a file, and runs in a process of its own.

A process keeps a rebuild from stalling searches, can be stopped at any moment, and is simply
started again after a restart: rebuilds resume by themselves. ``python -m server.work ID`` is that
process. Of several servers over one home, the one that holds the lock runs the jobs of all.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from retrieval.errors import BackendError, NotFound, TooLarge
from server.settings import Settings

log = logging.getLogger("lightbox.jobs")

FINAL = ("done", "failed", "cancelled")
KEPT = 200  # finished jobs
MAX_WAITING = 100
LOOK_EVERY_S = 0.1  # for a finished process, or somebody's wish to cancel
REST_S = 2.0  # between looks for jobs that another server took in
STOP_S = 10.0  # between a request to stop and an order
WORK = (sys.executable, "-m", "server.work")

State = dict[str, Any]


class Jobs:
    """The jobs of one home, run one after another. `work` is the command that does one, given its id."""

    def __init__(self, settings: Settings, work: Sequence[str] = WORK) -> None:
        self.settings = settings
        self.folder = settings.home / "jobs"
        self.closing = threading.Event()
        self._work = work
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Takes up what an earlier process left unfinished."""
        self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
        self._thread.start()

    def submit(self, kind: str, collection: str, spec: Mapping[str, Any]) -> State:
        """A new job, queued. Raises TooLarge where too many wait."""
        if sum(state["state"] not in FINAL for state in self.list()) >= MAX_WAITING:
            raise TooLarge(f"jobs: {MAX_WAITING} are waiting already; cancel some, or try later")
        now = time.time()
        state: State = {
            "id": f"{time.time_ns():016x}{uuid.uuid4().hex[:4]}",  # in the order of their coming
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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BackendError("the folder of jobs could not be made") from error
        write(self._path(state["id"]), state)
        self._prune()
        self._wake.set()
        return state

    def list(self) -> list[State]:
        """Newest first."""
        paths = sorted(self.folder.glob("*.json"), reverse=True) if self.folder.is_dir() else []
        return [state for path in paths if (state := read(path)) is not None]

    def find(self, id: str) -> State:
        """Raises NotFound."""
        state = read(self._path(id)) if id.isalnum() and id.isascii() and len(id) <= 64 else None
        if state is None:
            raise NotFound("job: there is none of that id", "id")
        return state

    def cancel(self, id: str) -> State:
        """Asks a job to stop; what it published stays. A finished job stays as it is."""
        state = self.find(id)
        if state["state"] not in FINAL:
            self._wish(id).touch()  # whoever runs the jobs of this home sees it
            self._wake.set()
        return state

    def close(self) -> None:
        """Stops the running job where it can be resumed, and waits for that."""
        self.closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(STOP_S)

    # --- the thread that runs jobs ------------------------------------------------------------------

    def _run(self) -> None:
        held = None
        while not self.closing.is_set():
            held = held or self._lock()
            try:
                if held is None or not self._run_next():
                    self._wake.wait(REST_S)
                    self._wake.clear()
            except Exception:
                log.exception("jobs cannot be run")
                self.closing.wait(REST_S)
        if held is not None:
            held.close()

    def _lock(self) -> IO[bytes] | None:
        """The right to run the jobs of this home; it ends with this process, however that ends."""
        if not self.folder.is_dir():
            return None
        try:
            handle = (self.folder / "lock").open("ab")
        except OSError:  # a home that cannot be written to
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            return None
        return handle

    def _run_next(self) -> bool:
        """Runs the oldest waiting job to its end; false where none waits."""
        self._drop_unwanted()
        waiting = [state["id"] for state in self.list() if state["state"] not in FINAL]
        if waiting:
            self._run_one(waiting[-1])
        return bool(waiting)

    def _drop_unwanted(self, running: str | None = None) -> None:
        for wish in self.folder.glob("*.cancel"):
            state = read(self._path(wish.stem))
            if wish.stem != running:
                if state is not None and state["state"] not in FINAL:
                    self._end(state, "cancelled")
                wish.unlink(missing_ok=True)

    def _run_one(self, id: str) -> None:
        process = subprocess.Popen(
            [*self._work, id],
            env=os.environ | {"LIGHTBOX_HOME": str(self.settings.home.resolve())},
            stdin=subprocess.PIPE,  # closes when this process ends, however it ends, and the work ends with it
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal is for the server
        )
        cancelled_at = None
        while process.poll() is None:
            if self.closing.is_set():
                process.kill()  # it goes on after the restart
                process.wait()
                return
            if cancelled_at is None and self._wish(id).exists():
                cancelled_at = time.monotonic()
                process.send_signal(signal.SIGINT)
            if cancelled_at is not None and time.monotonic() - cancelled_at > STOP_S:
                process.kill()
            self._drop_unwanted(running=id)
            self._wake.wait(LOOK_EVERY_S)
            self._wake.clear()
        if process.stdin is not None:
            process.stdin.close()
        self._settle(id, cancelled_at is not None, process.returncode)

    def _settle(self, id: str, cancelled: bool, code: int) -> None:
        """The outcome of a process that did not write one itself."""
        self._wish(id).unlink(missing_ok=True)
        state = self.find(id)
        if state["state"] not in FINAL:
            errors = [] if cancelled else [f"the job's process ended with status {code}"]
            self._end(state, "cancelled" if cancelled else "failed", errors)

    def _end(self, state: State, outcome: str, errors: Sequence[str] = ()) -> None:
        write(self._path(state["id"]), ended(state, outcome) | {"errors": [*state["errors"], *errors]})

    def _prune(self) -> None:
        finished = [state for state in self.list() if state["state"] in FINAL]
        for state in finished[KEPT:]:
            self._path(state["id"]).unlink(missing_ok=True)

    def _path(self, id: str) -> Path:
        return self.folder / f"{id}.json"

    def _wish(self, id: str) -> Path:
        return self.folder / f"{id}.cancel"


def ended(state: State, outcome: str) -> State:
    """A job that is over: what it was asked may hold report text, and is kept no longer."""
    return state | {"state": outcome, "spec": {}, "seconds_left": None, "updated": time.time()}


def read(path: Path) -> State | None:
    """A job's state, None where there is none that can be read."""
    try:
        return cast(State, json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def write(path: Path, state: State) -> None:
    """All or nothing, so that a reader never sees half a state."""
    fresh = path.with_name(f".{path.stem}.{os.getpid()}.new")
    try:
        fresh.write_text(json.dumps(state))
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise BackendError("a job's state could not be written; is the disk full?") from error
