"""The server under load and under the knife: sixteen clients, two kills, no wrong answer, nothing lost."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from retrieval.files import read_source
from server import client as told
from server.assemble import Config
from server.client import Client
from server.home import silent
from tests.small_home import small_home, write_source

CLIENTS = 16
KILLS = 2


class Server:
    """A server process that is killed without warning and started again on the same port."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port = 0
        self.url = ""
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.small_serve", str(self.home), str(self.port)]
        with (self.home / "log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().rpartition(" ")[2].strip()
        self.port = int(self.url.rpartition(":")[2])

    def stop(self, sign: signal.Signals) -> int:
        self.process.send_signal(sign)
        return self.process.wait(60)

    def errors(self) -> list[str]:
        """What the log says of errors, the last ones."""
        return [line for line in (self.home / "log").read_text().splitlines() if '"level": "error"' in line][-5:]

    def memory(self) -> int:
        """Resident KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


class Worker(threading.Thread):
    """One client over documents of its own: after every acknowledged step it knows what a search must find.

    However slow the machine, it goes on until it was answered and has written.
    """

    def __init__(self, number: int, url: str, until: float) -> None:
        super().__init__(name=f"client {number}")
        self.number, self.url, self.until = number, url, until
        self.random = random.Random(number)
        self.present: dict[str, int] = {}  # id -> version
        self.unsure: set[str] = set()  # touched by a request that was never answered
        self.answers = self.writes = self.refusals = 0
        self.fault: str | None = None

    def run(self) -> None:
        with Client(self.url, timeout_s=60) as client:
            while self.fault is None and not (time.monotonic() > self.until and self.answers and self.writes):
                try:
                    self.step(client)
                except (told.Busy, told.Conflict):
                    self.refusals += 1
                    time.sleep(0.2)
                except httpx.TransportError:
                    time.sleep(0.2)
                except Exception as error:
                    self.fault = f"{type(error).__name__}: {error}"

    def step(self, client: Client) -> None:
        kind = self.random.choices(("search", "add", "remove", "rebuild"), (60, 25, 12, 3 if self.number == 0 else 0))
        if kind == ["rebuild"]:
            client.rebuild("films")
        elif kind == ["search"]:
            self.check(client)
        else:
            self.write(client, kind == ["add"])

    def write(self, client: Client, add: bool) -> None:
        ids = [f"{self.number}/{self.random.randrange(40)}" for _ in range(3)]
        before = {id: self.present.pop(id) for id in ids if id in self.present}
        unsure = self.unsure & set(ids)
        self.unsure |= set(ids)  # until it is acknowledged
        version = self.random.randrange(10**6)
        try:
            if add:
                text = f"a heart number {version}"
                meta = {"owner": self.number, "version": version}
                done = client.add_documents("films", [{"_id": id, "text": text, "metadata": meta} for id in ids])
                assert done["rejected"] == 0
                after = dict.fromkeys(ids, version)
            else:
                for id in ids:
                    client.delete_document("films", id)
                after = {}
        except (told.Busy, told.Conflict):
            if add:  # refused as a whole: nothing was changed
                self.unsure = (self.unsure - set(ids)) | unsure
                self.present |= before
            raise
        self.unsure -= set(ids)
        self.present |= after
        self.writes += 1

    def check(self, client: Client) -> None:
        answer = client.search("films", "heart", where={"owner": self.number}, retriever="lexical", k=1000)
        found = {hit["id"]: hit["metadata"]["version"] for hit in answer["hits"] if hit["id"] not in self.unsure}
        if found != self.present:
            self.fault = f"expected {sorted(self.present.items())}, found {sorted(found.items())}"
        if answer["exact"] is not True or len(answer["hits"]) != answer["total"]["value"]:
            self.fault = f"{len(answer['hits'])} hits of {answer['total']}, exact: {answer['exact']}"
        self.answers += 1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    source = read_source(write_source(tmp_path / "source"))
    home = small_home(tmp_path / "home")
    home.index("films", source.documents(), Config(), progress=silent)
    home.close()
    running = Server(tmp_path / "home")
    yield running
    running.process.kill()


def soak(server: Server, seconds: float) -> tuple[list[Worker], list[int]]:
    """Clients for some seconds at least, the server killed twice meanwhile; memory once a second of the last life."""
    workers = [Worker(number, server.url, time.monotonic() + seconds) for number in range(CLIENTS)]
    for worker in workers:
        worker.start()
    for _ in range(KILLS):
        time.sleep(seconds / (KILLS + 1))
        server.stop(signal.SIGKILL)
        server.start()
    memory = []
    while any(worker.is_alive() for worker in workers):
        memory.append(server.memory())
        time.sleep(1)
    with Client(server.url, timeout_s=60) as client:  # when all is quiet, everything acknowledged is there
        for worker in workers:
            worker.check(client)
        jobs = client.jobs()
    assert [worker.fault for worker in workers if worker.fault] == [], server.errors()
    assert not any("error of ours" in error for job in jobs for error in job["errors"]), jobs
    return workers, memory


def test_twenty_seconds_and_two_kills_lose_nothing(server: Server) -> None:
    workers, _ = soak(server, 20)
    assert all(worker.answers > 1 and worker.writes for worker in workers)  # the last was to the check


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_ten_minutes_and_two_kills_lose_nothing_and_memory_stays_flat(server: Server) -> None:
    workers, memory = soak(server, 600)
    assert all(worker.answers > 1 and worker.writes for worker in workers)
    print(sum(worker.answers for worker in workers), "answers", sum(worker.writes for worker in workers), "writes")
    third = len(memory) // 3
    early, late = sorted(memory[third : 2 * third])[third // 2], sorted(memory[-third:])[third // 2]
    assert late < early * 1.15, f"{early} KiB became {late} KiB"


def test_a_server_that_is_told_to_stop_answers_what_it_accepted(server: Server) -> None:
    answers: list[int] = []

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            documents = [{"_id": f"s{n}", "text": f"a heart {n}"} for n in range(2000)]
            answers.append(client.post("/v1/collections/films/documents", json=documents).json()["added"])

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.4)
    assert server.stop(signal.SIGINT) == 0
    asking.join()
    assert answers == [2000]
