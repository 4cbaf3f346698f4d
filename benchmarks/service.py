"""Concurrent text queries over HTTP beside a bare loop, txtai's API and Chroma's server.

``python -m benchmarks.service [--seconds 15]`` writes docs/service.md. The same documents, model, k and clients for
all; rivals run in venvs of their own. Chroma does not encode: its clients do, with our encoder. What is indexed stays
below .bench/service, so that a second run only measures.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from benchmarks.collections import data
from benchmarks.rivals import python_with
from encoders.text import packaged, text_encoder
from retrieval.files import read_source
from retrieval.types import Document, Item, Matrix, Part, Qrels, Query
from server.assemble import Config
from server.home import Home, silent
from server.settings import Settings

OUT = Path("docs/service.md")
HOME = Path(".bench/service")
CONFIG = Config(image_encoder="none", ontology="none")
K = 10
CLIENTS = (1, 8)
BATCH = 8  # of the bare loop: what eight clients give the server to do together
WARM = 50  # queries before the clock starts

Ask = Callable[[str], list[str]]  # a query to the ids found


class Measured(NamedTuple):
    """Latencies in ms, ascending, of `seconds` of asking."""

    latencies: list[float]
    seconds: float
    recall: float
    memory_mib: float

    def cells(self) -> list[str]:
        at = [self.latencies[min(len(self.latencies) - 1, int(len(self.latencies) * p))] for p in (0.5, 0.95, 0.99)]
        rate = len(self.latencies) / self.seconds
        return [f"{rate:.0f}", *(f"{ms:.1f}" for ms in at), f"{self.recall:.3f}", f"{self.memory_mib:.0f}"]


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
    seconds = options.seconds
    work = work_of(options.documents)
    rows = [["engine", "clients", "queries/s", "p50 ms", "p95 ms", "p99 ms", f"R@{K}", "MiB"], ["---"] * 8]
    spent = ""
    for name, engine in (("Lightbox", lightbox), ("txtai, hybrid", txtai), ("Chroma, vectors only", chroma)):
        with engine(work) as running:
            if running is None:
                continue
            for clients in CLIENTS:
                running.took.clear()
                found = measured(running, work, clients, seconds)
                rows.append([name, str(clients), *found.cells()])
                print(" | ".join(rows[-1]), flush=True)
                spent += where_it_goes(running, found, clients) if running.took else ""
    loops = {batch: bare_loop(work, seconds, batch) for batch in (1, BATCH)}
    rows += [["bare loop, no HTTP", f"batches of {b}", f"{rate:.0f}", *[""] * 5] for b, rate in loops.items()]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end of the run.\n"
    introduction = INTRODUCTION.format(documents=len(work.documents))
    OUT.write_text(f"{introduction}{table}\n{spent}\n{machine}")
    print(OUT.read_text())


def work_of(count: int | None) -> Work:
    """SciFact and its test queries; of fewer documents than there are, those that are judged come first."""
    source = read_source(data() / "scifact")
    qrels = source.qrels("test")
    documents = [document for document in source.documents() if isinstance(document, Document)]
    judged = {id for grades in qrels.values() for id in grades}
    documents.sort(key=lambda document: document.id not in judged)
    return Work(documents[:count], [query for query in source.queries() if query.id in qrels], qrels)


def where_it_goes(running: Running, found: Measured, clients: int) -> str:
    """The mean times of a request's stages, as our answers tell them, and what is left for HTTP and waiting."""
    mean = {stage: sum(values) / len(values) for stage, values in running.took.items()}
    inside = mean.pop("total")
    other = inside - sum(mean.values())
    whole = sum(found.latencies) / len(found.latencies)
    told = [f"{stage} {ms:.2f}" for stage, ms in mean.items() if ms >= 0.005]
    told += [
        f"the rest of the engine {other:.2f}",
        f"HTTP, JSON and waiting for the batch before {whole - inside:.2f}",
    ]
    return f"{clients} client{'s' * (clients > 1)}, ms of a mean request ({whole:.2f}): {', '.join(told)}.\n"


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
    took: dict[str, list[float]]  # stage -> ms, of every answer that tells them


def measured(running: Running, work: Work, clients: int, seconds: float) -> Measured:
    """Every client asks one query after another for some seconds."""
    ask = running.client()
    for number in range(WARM):
        ask(work.text(number))
    latencies: list[float] = []
    found: dict[str, list[str]] = {}
    start = time.perf_counter()

    def asking(first: int) -> None:
        ask, number = running.client(), first
        while time.perf_counter() - start < seconds:
            begun = time.perf_counter()
            ids = ask(work.text(number))
            latencies.append((time.perf_counter() - begun) * 1000)
            found[work.queries[number % len(work.queries)].id] = ids
            number += clients

    threads = [threading.Thread(target=asking, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - start
    return Measured(sorted(latencies), taken, recall(found, work.qrels), memory_mib(running.pid))


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
        took: dict[str, list[float]] = defaultdict(list)

        def ids(answer: Any) -> list[str]:
            for stage, ms in answer["took_ms"].items():
                took[stage].append(ms)
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


def bare_loop(work: Work, seconds: float, batch: int) -> float:
    """Queries a second of encoding and ranking alone, `batch` at a time, in this process."""
    engine = home_with(work).engine("scifact")
    retrieve = engine.retriever("hybrid", engine.snapshot())
    done, start = -WARM, time.perf_counter()
    while time.perf_counter() - start < seconds:
        texts = [work.text(done + n) for n in range(batch)]
        retrieve(engine.encoded([Query(parts=(Part(text=text),)) for text in texts]), 1000)
        if done < 0 <= done + batch:
            start = time.perf_counter()
        done += batch
    return done / (time.perf_counter() - start)


INTRODUCTION = """\
# Many at once

`python -m benchmarks.service`: the ten best of {documents:,} documents of SciFact for its test queries, all-
MiniLM-L6-v2 everywhere, words and vectors together where the engine can. Clients and server share the machine; a
client asks its next query when it has the answer to the last. Memory is the server process's resident set after the
run.

"""

if __name__ == "__main__":
    main()
