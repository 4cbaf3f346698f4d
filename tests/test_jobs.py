"""Jobs: one after another, stopped, resumed after a restart, ended with their server."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from retrieval.errors import NotFound, TooLarge
from server import jobs as module
from server.jobs import FINAL, Jobs, State, ended
from server.settings import Settings
from server.work import Report, source_below

# A job that takes its orders from its collection's name, and tells who it was.
WORK = """
import json, os, signal, sys, threading, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # as server.work does
def end_with_parent():
    os.read(0, 1)
    os._exit(1)
threading.Thread(target=end_with_parent, daemon=True).start()
path = Path(os.environ["LIGHTBOX_HOME"], "jobs", sys.argv[1] + ".json")
state = json.loads(path.read_text())
with open(path.parent / "begun", "a") as file:
    file.write(state["collection"] + " " + str(os.getpid()) + "\\n")
if state["collection"] == "dies":
    os._exit(7)
try:
    while state["collection"] == "waits" and not (path.parent / "go").exists():
        time.sleep(0.02)
except KeyboardInterrupt:
    os._exit(130)
fresh = path.with_suffix(".tmp")
fresh.write_text(json.dumps(state | {"state": "done", "updated": time.time()}))
fresh.replace(path)
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@pytest.fixture
def jobs(settings: Settings) -> Iterator[Jobs]:
    running = started(settings)
    yield running
    running.close()


def started(settings: Settings) -> Jobs:
    made = Jobs(settings, (sys.executable, "-c", WORK))
    made.start()
    return made


def until(true: Callable[[], bool]) -> None:
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < 120, "it hangs"
        time.sleep(0.02)


def ends(jobs: Jobs, state: State) -> State:
    until(lambda: jobs.find(state["id"])["state"] in FINAL)
    return jobs.find(state["id"])


def begun(jobs: Jobs) -> list[str]:
    path = jobs.folder / "begun"
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def test_jobs_run_one_after_another_oldest_first(jobs: Jobs) -> None:
    first, second = jobs.submit("rebuild", "waits", {}), jobs.submit("rebuild", "b", {})
    until(lambda: begun(jobs) == ["waits"])
    assert jobs.find(second["id"])["state"] == "queued"
    (jobs.folder / "go").touch()
    assert ends(jobs, second)["state"] == "done"
    assert ends(jobs, first)["state"] == "done"
    assert begun(jobs) == ["waits", "b"]
    assert [state["id"] for state in jobs.list()] == [second["id"], first["id"]]


def test_jobs_that_come_at_once_keep_their_order(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(settings)
    monkeypatch.setattr("server.jobs.time.time", lambda: 0.0)  # all within one millisecond
    ids = [jobs.submit("rebuild", "a", {})["id"] for _ in range(20)]
    assert [state["id"] for state in jobs.list()] == ids[::-1]


def test_a_running_and_a_waiting_job_can_be_cancelled(jobs: Jobs) -> None:
    first, second = jobs.submit("rebuild", "waits", {}), jobs.submit("rebuild", "b", {"queries": ["a report"]})
    until(lambda: begun(jobs) == ["waits"])
    jobs.cancel(second["id"])
    cancelled = ends(jobs, second)
    assert (cancelled["state"], cancelled["spec"]) == ("cancelled", {})
    jobs.cancel(first["id"])
    assert ends(jobs, first)["state"] == "cancelled"
    assert begun(jobs) == ["waits"]
    assert jobs.cancel(first["id"])["state"] == "cancelled"
    assert list(jobs.folder.glob("*.cancel")) == []


def test_a_job_whose_process_dies_has_failed_and_the_next_one_runs(jobs: Jobs) -> None:
    failed = ends(jobs, jobs.submit("rebuild", "dies", {}))
    assert (failed["state"], failed["errors"]) == ("failed", ["the job's process ended with status 7"])
    assert ends(jobs, jobs.submit("rebuild", "b", {}))["state"] == "done"


def test_a_job_goes_on_after_a_restart(settings: Settings) -> None:
    first = started(settings)
    state = first.submit("rebuild", "waits", {})
    until(lambda: begun(first) == ["waits"])
    first.close()
    assert first.find(state["id"])["state"] not in FINAL
    (first.folder / "go").touch()
    second = started(settings)
    assert ends(second, state)["state"] == "done"
    assert begun(second) == ["waits", "waits"]
    second.close()


def test_jobs_run_once_the_home_can_be_written_to(settings: Settings) -> None:
    lock = settings.home / "jobs" / "lock"
    lock.mkdir(parents=True)  # cannot be opened, like a file of a file system that may only be read
    jobs = started(settings)
    state = jobs.submit("rebuild", "b", {})
    time.sleep(0.2)
    lock.rmdir()
    assert ends(jobs, state)["state"] == "done"
    jobs.close()


def test_of_two_servers_over_one_home_one_runs_the_jobs_of_both(settings: Settings) -> None:
    first = started(settings)
    waiting = first.submit("rebuild", "waits", {})
    until(lambda: begun(first) == ["waits"])
    second = started(settings)
    other = second.submit("rebuild", "b", {})
    second.cancel(waiting["id"])  # also what the other one runs
    assert ends(second, waiting)["state"] == "cancelled"
    assert ends(second, other)["state"] == "done"
    assert begun(second) == ["waits", "b"]
    first.close()
    assert ends(second, second.submit("rebuild", "c", {}))["state"] == "done"  # it takes over
    second.close()


def test_there_are_not_jobs_without_end(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 2)
    monkeypatch.setattr(module, "KEPT", 1)
    jobs = Jobs(settings)
    made = [jobs.submit("rebuild", "a", {}) for _ in range(2)]
    with pytest.raises(TooLarge, match="2 are waiting"):
        jobs.submit("rebuild", "a", {})
    for state in made:
        module.write(jobs.folder / f"{state['id']}.json", ended(state, "done"))
    newest = jobs.submit("rebuild", "a", {})
    assert [state["id"] for state in jobs.list()] == [newest["id"], made[1]["id"]]


@pytest.mark.parametrize("id", ["", "..", "../secret", "a/b", "a" * 65, "ä", "lock"])
def test_a_job_is_found_by_its_id_and_nothing_else_by_any(settings: Settings, id: str) -> None:
    jobs = Jobs(settings)
    jobs.submit("rebuild", "a", {})
    (settings.home / "secret.json").write_text("{}")
    with pytest.raises(NotFound):
        jobs.find(id)


def test_progress_tells_rate_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("server.work.time.monotonic", lambda: now)
    report = Report(tmp_path / "j.json", {"phase": "starting", "errors": []})
    report("encode", 0, 100)
    now += 2
    report("encode", 20, 100)
    told = json.loads((tmp_path / "j.json").read_text())
    assert (told["state"], told["done"], told["total"]) == ("running", 20, 100)
    assert (told["rate"], told["seconds_left"]) == (10.0, 8.0)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc", "a/../b", "a//b", "a\\..\\b", "a\0", "nothing", "x" * 5000, "file"]
)
def test_a_source_lies_below_the_configured_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "file").touch()
    settings = Settings(home=tmp_path, sources=tmp_path)
    assert source_below(settings, "a") == tmp_path / "a"
    with pytest.raises(NotFound) as refused:
        source_below(settings, name)
    assert str(tmp_path) not in str(refused.value)
    with pytest.raises(NotFound, match="no folder of sources"):
        source_below(Settings(home=tmp_path), "a")
