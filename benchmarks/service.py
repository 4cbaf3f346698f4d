"""Concurrent text queries over HTTP beside a bare loop, txtai's API and Chroma's server.

``python -m benchmarks.service [--seconds 15]`` writes docs/service.md. The same documents, model, k and clients for
all; rivals run in venvs of their own. Chroma does not encode: its clients do, with our encoder. What is indexed stays
below .bench/service, so that a second run only measures.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from benchmarks.collections import data
from benchmarks.rivals import python_with
from encoders.text import packaged, text_encoder
from retrieval.files import read_source
from retrieval.retrievers import DEPTH
from retrieval.types import Document, Item, Matrix, Part, Qrels, Query
from server.assemble import Config
from server.home import Home, silent
from server.settings import Settings

OUT = Path("docs/service.md")
HOME = Path(".bench/service")
CONFIG = Config(image_encoder="none", ontology="none")
K = 10
CLIENTS = (1, 8)  # the bare loop does as many queries together
WARM = 16  # queries before the clock starts, two from the second turn on
TURNS = 5

Ask = Callable[[str], list[str]]  # a query to the ids found


class Measured:
    """What a number of clients got of one engine, over all the turns that it had."""

    def __init__(self) -> None:
        self.latencies: list[float] = []  # ms
        self.seconds = 0.0
        self.found: dict[str, list[str]] = {}  # query -> ids of its last answer
        self.server_cpu = self.client_cpu = 0.0  # s
        self.memory_mib = 0.0
        self.took: dict[str, float] = defaultdict(float)  # stage -> ms of all answers that tell them

    def cells(self, qrels: Qrels) -> list[str]:
        ordered, count = sorted(self.latencies), len(self.latencies)
        at = [ordered[min(count - 1, int(count * p))] for p in (0.5, 0.95, 0.99)]
        busy = [cpu * 1000 / count for cpu in (self.server_cpu, self.client_cpu)]
        return [
            f"{count / self.seconds:.1f}", *(f"{ms:.1f}" for ms in (*at, *busy)),
            f"{recall(self.found, qrels):.3f}", f"{self.memory_mib:.0f}",
        ]  # fmt: skip


class Work(NamedTuple):
    """What every engine is given."""

    documents: list[Document]
    queries: list[Query]
    qrels: Qrels

    @property
    def folder(self) -> Path:
        """Where what is made of these documents is kept."""
        return HOME / str(len(self.documents))

    def text(self, number: int) -> str:
        return self.queries[number % len(self.queries)].parts[0].text


def main() -> None:
    options = arguments()
    work = work_of(options.documents)
    engines = {"Lightbox": lightbox, "txtai, hybrid": txtai, "Chroma, vectors only": chroma}
    with ExitStack() as stack:
        running = {name: stack.enter_context(engine(work)) for name, engine in engines.items()}
        servers = {name: server for name, server in running.items() if server is not None}
        loops = {batch: BareLoop(work, batch) for batch in CLIENTS}
        results = {(name, clients): Measured() for name in servers for clients in CLIENTS}
        for turn in range(TURNS):
            for name, server in servers.items():
                for clients in CLIENTS:
                    measure(results[name, clients], server, work, clients, options.seconds / TURNS)
            for loop in loops.values():
                loop.run(options.seconds / TURNS)
            print(f"turn {turn + 1} of {TURNS}, load {os.getloadavg()[0]:.1f}", flush=True)
            written(work, results, loops, turn + 1)
    print(OUT.read_text())


def written(
    work: Work, results: Mapping[tuple[str, int], Measured], loops: Mapping[int, BareLoop], turns: int
) -> None:
    """The page, after every turn."""
    rows = [[name, str(clients), *result.cells(work.qrels)] for (name, clients), result in results.items()]
    rows += [["bare loop, no HTTP", f"batches of {batch}", *loop.cells()] for batch, loop in loops.items()]
    spent = "".join(where_it_goes(result, clients) for (_, clients), result in results.items() if result.took)
    table = "\n".join("| " + " | ".join(row) + " |" for row in [HEAD, ["---"] * len(HEAD), *rows]) + "\n"
    asked = sum(len(result.latencies) for result in results.values())
    machine = (
        f"{asked:,} queries in {turns} turns, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end.\n"
    )
    introduction = INTRODUCTION.format(documents=len(work.documents))
    OUT.write_text(f"{introduction}{table}\n{spent}{machine}")


def work_of(count: int | None) -> Work:
    """SciFact and its test queries; of fewer documents than there are, those that are judged come first."""
    source = read_source(data() / "scifact")
    qrels = source.qrels("test")
    documents = [document for document in source.documents() if isinstance(document, Document)]
    if count is not None:
        judged = {id for grades in qrels.values() for id in grades}
        documents.sort(key=lambda document: document.id not in judged)
    return Work(documents[:count], [query for query in source.queries() if query.id in qrels], qrels)


def where_it_goes(result: Measured, clients: int) -> str:
    """The mean times of a request's stages, as our answers tell them, and what is left for HTTP and waiting."""
    count = len(result.latencies)
    mean = {stage: ms / count for stage, ms in result.took.items()}
    inside = mean.pop("total")
    other = inside - sum(mean.values())
    whole = sum(result.latencies) / count
    told = [f"{stage} {ms:.2f}" for stage, ms in mean.items() if ms >= 0.005]
    told += [
        f"the rest of the engine {other:.2f}",
        f"HTTP, JSON and waiting for the batch before {whole - inside:.2f}",
    ]
    return f"{clients} client{'s' * (clients > 1)}, ms of a mean request ({whole:.2f}): {', '.join(told)}.\n\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="of asking, for every engine and number of clients"
    )
    parser.add_argument("--documents", type=int, help="of SciFact's 5,183, where indexing them all takes too long")
    return parser.parse_args()


# --- asking -----------------------------------------------------------------------------------------


class Running(NamedTuple):
    """A server that answers: how one client asks it, and its process."""

    client: Callable[[], Ask]
    pid: int
    took: dict[str, float]  # stage -> ms, summed over the answers that tell them


def measure(result: Measured, server: Running, work: Work, clients: int, seconds: float) -> None:
    """Every client asks one query after another for some seconds; what was found is added to `result`."""
    ask = server.client()
    for number in range(2 if result.latencies else WARM):
        ask(work.text(number))
    server.took.clear()
    before, busy, start = cpu_seconds(server.pid), time.process_time(), time.perf_counter()
    numbers = itertools.count(len(result.latencies))

    def asking() -> None:
        ask = server.client()
        while time.perf_counter() - start < seconds:
            query, begun = next(numbers), time.perf_counter()
            ids = ask(work.text(query))
            result.latencies.append((time.perf_counter() - begun) * 1000)
            result.found[work.queries[query % len(work.queries)].id] = ids

    threads = [threading.Thread(target=asking) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result.seconds += time.perf_counter() - start
    result.client_cpu += time.process_time() - busy
    result.server_cpu += cpu_seconds(server.pid) - before
    result.memory_mib = memory_mib(server.pid)
    for stage, ms in server.took.items():
        result.took[stage] += ms


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def recall(found: dict[str, list[str]], qrels: Qrels) -> float:
    """Mean share of the relevant documents among those found."""
    wanted = {id: {d for d, grade in qrels[id].items() if grade > 0} for id in found}
    return float(np.mean([len(wanted[id] & set(ids)) / len(wanted[id]) for id, ids in found.items() if wanted[id]]))


def memory_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def over_http(port: int, request: Callable[[str], tuple[str, str, Any]], ids: Callable[[Any], list[str]]) -> Ask:
    """A client with one connection of its own. `request` gives method, path and JSON body of a query."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(text: str) -> list[str]:
        method, path, body = request(text)
        sent = None if body is None else json.dumps(body).encode()
        connection.request(method, path, sent, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        if response.status >= 400:
            raise RuntimeError(f"status {response.status}: {answer[:200]!r}")
        return ids(json.loads(answer))

    return ask


@contextmanager
def process(command: Sequence[str], port: int, ready: str, **environment: str) -> Iterator[int]:
    """A server process, from its first answer at `ready` on; its id."""
    started = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 180
        while not answers(port, ready):
            if started.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} does not serve")
            time.sleep(0.2)
        yield started.pid
    finally:
        started.send_signal(signal.SIGTERM)
        started.wait(30)


def answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status < 500
    except OSError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


# --- the engines ------------------------------------------------------------------------------------


def home_with(work: Work) -> Home:
    """Our collection, kept between runs."""
    home = Home(Settings(home=work.folder, cache=Path(".bench/home/cache")))
    if "scifact" not in home.names():
        home.index("scifact", work.documents, CONFIG, progress=silent)
    return home


@contextmanager
def lightbox(work: Work) -> Iterator[Running | None]:
    home_with(work).close()
    port = free_port()

    def request(text: str) -> tuple[str, str, Any]:
        return "POST", "/v1/collections/scifact/search", {"query": [{"text": text}], "k": K, "highlight": False}

    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--port", str(port)]
    settings = {"LIGHTBOX_HOME": str(work.folder), "LIGHTBOX_CACHE": ".bench/home/cache"}
    with process(command, port, "/livez", **settings) as pid:
        took: dict[str, float] = defaultdict(float)

        def ids(answer: Any) -> list[str]:
            for stage, ms in answer["took_ms"].items():
                took[stage] += ms
            return [hit["id"] for hit in answer["hits"]]

        yield Running(lambda: over_http(port, request, ids), pid, took)


@contextmanager
def txtai(work: Work) -> Iterator[Running | None]:
    python = python_with("txtai-api", "txtai[api]", "sentence-transformers")
    if python is None:
        yield None
        return
    work.folder.mkdir(parents=True, exist_ok=True)
    config, index, port = work.folder / "txtai.yml", (work.folder / "txtai").resolve(), free_port()
    embeddings = f"embeddings:\n  path: {packaged()}\n  hybrid: true\n  content: true\n"
    config.write_text(f"writable: true\npath: {index}\n{embeddings}")
    command = [python, "-m", "uvicorn", "--port", str(port), "--log-level", "error", "txtai.api:app"]
    with process(command, port, "/count", CONFIG=str(config)) as pid:
        if get(port, "/count") != len(work.documents):
            send(port, "POST", "/add", [{"id": document.id, "text": document.content} for document in work.documents])
            send(port, "GET", "/index")
        yield Running(
            lambda: over_http(
                port, lambda text: ("GET", f"/search?query={quote(text)}&limit={K}", None),
                lambda answer: [hit["id"] for hit in answer],
            ),
            pid, {},
        )  # fmt: skip


@contextmanager
def chroma(work: Work) -> Iterator[Running | None]:
    python = python_with("chroma", "chromadb")
    if python is None:
        yield None
        return
    encoder = text_encoder(None, Path(".bench/home/cache"))
    folder, port = work.folder / "chroma", free_port()
    vectors = folder / "vectors.npz"
    if not vectors.exists():
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(vectors, ids=[document.id for document in work.documents], vectors=encoded(work.documents))
    command = [str(Path(python).with_name("chroma")), "run", "--path", str(folder), "--port", str(port)]
    with process(command, port, "/api/v2/heartbeat") as pid:
        loader = [python, str(Path(__file__).with_name("engines") / "chroma_documents.py"), str(port), str(vectors)]
        id = subprocess.run(loader, check=True, capture_output=True, text=True).stdout.split()[-1]
        path = f"/api/v2/tenants/default_tenant/databases/default_database/collections/{id}/query"

        def request(text: str) -> tuple[str, str, Any]:
            vector = encoder.encode_queries([Item(text=text)])[0].tolist()
            return "POST", path, {"query_embeddings": [vector], "n_results": K, "include": []}

        yield Running(lambda: over_http(port, request, lambda answer: list(answer["ids"][0])), pid, {})


def encoded(documents: Sequence[Document]) -> Matrix:
    encoder = text_encoder(None, Path(".bench/home/cache"))
    return encoder.encode_documents([Item(text=document.content) for document in documents])


def send(port: int, method: str, path: str, body: Any = None) -> None:
    """One request that may take long."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3600)
    sent = None if body is None else json.dumps(body).encode()
    connection.request(method, path, sent, {"Content-Type": "application/json"})
    if connection.getresponse().status >= 400:
        raise RuntimeError(path)


def get(port: int, path: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    return json.loads(connection.getresponse().read())


class BareLoop:
    """Encoding and ranking alone, `batch` queries at a time, in this process."""

    def __init__(self, work: Work, batch: int) -> None:
        self.work, self.batch = work, batch
        self.engine = home_with(work).engine("scifact")
        self.snapshot = self.engine.snapshot()
        self.retrieve = self.engine.retriever("hybrid", self.snapshot)
        self.done, self.seconds, self.cpu = 0, 0.0, 0.0

    def ask(self, first: int) -> None:
        texts = [self.work.text(first + n) for n in range(self.batch)]
        queries = [Query(parts=(Part(text=text),)) for text in texts]
        self.retrieve(self.engine.encoded(queries, self.snapshot), DEPTH)

    def run(self, seconds: float) -> None:
        for first in range(0, 2 if self.done else WARM, self.batch):
            self.ask(first)
        start, busy = time.perf_counter(), time.process_time()
        while time.perf_counter() - start < seconds:
            self.ask(self.done)
            self.done += self.batch
        self.seconds += time.perf_counter() - start
        self.cpu += time.process_time() - busy

    def cells(self) -> list[str]:
        return [f"{self.done / self.seconds:.1f}", "", "", "", f"{self.cpu * 1000 / self.done:.1f}", "", "", ""]


HEAD = [
    "engine", "clients", "queries/s", "p50 ms", "p95 ms", "p99 ms",
    "server, CPU ms/query", "clients, CPU ms/query", f"R@{K}", "MiB",
]  # fmt: skip
INTRODUCTION = """\
# Many at once

`python -m benchmarks.service`: the ten best of {documents:,} documents of SciFact for its test queries, all-
MiniLM-L6-v2 everywhere, words and vectors together where the engine can. Clients and server share the machine; a
client asks its next query when it has the answer to the last. Engines take turns of a few seconds, so that a busy
neighbour is everybody's. Processor time says what a query costs whoever else is there: encoding is the server's, and
with Chroma the clients'. Memory is the server process's resident set after the run.

"""

if __name__ == "__main__":
    main()
