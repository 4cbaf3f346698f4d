"""Three nodes, one copy of everything, and what goes wrong while others search and write.

No document that was acknowledged is lost, none is there twice; searches answer, or fail with one clear line, and
answer again by themselves.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from typing import Any

import pytest

from indexers.elastic import connect
from indexers.elastic_build import build_elastic, delete_elastic
from indexers.elastic_index import Elastic, Place, open_elastic
from retrieval.errors import BackendError, NotFound
from retrieval.types import Document, Item
from server.home import silent
from tests.conftest import skip_without
from tests.elastic_server import Cluster, Node, Unavailable, ask
from tests.elastic_stub import Answer, passing, refusing, serving
from tests.test_elastic import Prepare, films
from tests.test_index_contract import ENCODER, SPACES, encoded, text

pytestmark = pytest.mark.long

BEFORE, BATCH = 200, 20
SETTLED_S = 180.0


@pytest.fixture(scope="module")
def three() -> Iterator[Cluster]:
    try:
        cluster = Cluster(3, {"cluster.info.update.interval": "10s"})
    except Unavailable as error:
        skip_without("es", str(error))
    yield cluster
    cluster.stop()


@pytest.fixture
def place(three: Cluster, tmp_path: Path) -> Iterator[Place]:
    made = Place(connect(",".join(three.urls)), f"t-{uuid.uuid4().hex[:12]}", tmp_path / "films")
    build(made, films(BEFORE))
    settled(three)
    yield made
    settled(three)
    delete_elastic(made)
    made.cluster.close()


def build(place: Place, documents: list[Document]) -> Any:
    given: dict[str, Any] = {"config": {}, "spaces": SPACES, "vector_index": "hnsw", "progress": silent}
    return build_elastic(place, documents, Prepare(), **given)


def settled(three: Cluster) -> None:
    """All nodes are there, and every copy."""
    for node in three.nodes:
        node.start()
    for node in three.nodes:
        node.wait(3)
    until = time.monotonic() + SETTLED_S
    while ask(three.url, "/_cluster/health", timeout=60)["status"] != "green":
        assert time.monotonic() < until, ask(three.url, "/_cat/shards?format=json", timeout=60)
        time.sleep(0.5)


class Traffic:
    """One thread that writes and publishes, one that searches, until told to stop."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.acknowledged: set[str] = set()
        self.answered: list[float] = []  # when
        self.refused: list[str] = []  # clear lines
        self.broken: list[BaseException] = []  # anything else
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._guarded, args=(work,)) for work in (self._write, self._search)]

    def _guarded(self, work: Callable[[Elastic], None]) -> None:
        index = open_elastic(self.place)
        while not self._over.is_set():
            try:
                work(index)
            except BackendError as error:
                self.refused.append(str(error))
                time.sleep(0.2)
            except BaseException as error:  # the test tells it
                self.broken.append(error)
                return

    def _write(self, index: Elastic) -> None:
        first = len(self.acknowledged)  # a batch that was not acknowledged is sent again
        batch = [text(f"late{n:05d}", f"heart w{n}") for n in range(first, first + BATCH)]
        index.add(batch, encoded(batch))
        self.acknowledged |= {document.id for document in batch}
        index.publish()
        time.sleep(0.1)

    def _search(self, index: Elastic) -> None:
        snapshot = index.snapshot()
        assert len(snapshot.search_text(["heart"], 10)[0]) == 10
        assert len(snapshot.search_vectors("text", ENCODER.encode_queries([Item(text="heart w1")]), 10)[0]) == 10
        self.answered.append(time.monotonic())
        time.sleep(0.05)

    @contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            time.sleep(2)
            yield
            time.sleep(2)
            recovered = time.monotonic()
            while not any(at > recovered for at in self.answered) and time.monotonic() < recovered + SETTLED_S:
                time.sleep(0.2)
        finally:
            self._over.set()
            for thread in self._threads:
                thread.join(SETTLED_S)

    def check(self) -> None:
        """Everything that was acknowledged is there once, and searches came back."""
        assert not self.broken, self.broken
        assert all("\n" not in line and len(line) < 500 for line in self.refused)
        index = open_elastic(self.place)
        index.publish()
        snapshot = index.snapshot()
        ids = sorted(self.acknowledged)
        found = snapshot.fetch(ids)
        assert [d.id if d else None for d in found] == ids
        late = [hit for hit in snapshot.search_text(["heart"], 10_000)[0] if hit.id.startswith("late")]
        assert len({hit.id for hit in late}) == len(late)
        assert BEFORE + len(ids) <= len(snapshot) <= BEFORE + len(ids) + BATCH
        assert len(snapshot.vectors("text", "text", ids).rows) == len(ids)
        print(f"{len(ids)} acknowledged, {len(self.answered)} searches answered, {len(self.refused)} refused")


def master(three: Cluster) -> Node:
    name = ask(three.url, "/_cat/master?format=json", timeout=60)[0]["node"]
    return next(node for node in three.nodes if node.folder.name == name)


def other(three: Cluster) -> Node:
    leading = master(three)
    return next(node for node in three.nodes[1:] if node is not leading)


def test_a_node_is_killed(three: Cluster, place: Place) -> None:
    traffic = Traffic(place)
    with traffic.running():
        other(three).kill()
        time.sleep(15)
    settled(three)
    traffic.check()


def test_a_node_stands_still_for_20_seconds(three: Cluster, place: Place) -> None:
    traffic, node = Traffic(place), other(three)
    with traffic.running():
        node.signal(SIGSTOP)
        time.sleep(20)
        node.signal(SIGCONT)
    settled(three)
    traffic.check()


def test_the_master_is_killed(three: Cluster, place: Place) -> None:
    traffic = Traffic(place)
    with traffic.running():
        master(three).kill()
        time.sleep(15)
    settled(three)
    traffic.check()


def test_disks_are_nearly_full(three: Cluster, place: Place) -> None:
    place.cluster._retry_s = 10.0
    names = ("low", "high", "flood_stage")
    prefix = "cluster.routing.allocation.disk"
    low: dict[str, Any] = {f"{prefix}.watermark.{name}": f"0.00{n}%" for n, name in enumerate(names, 1)}
    traffic = Traffic(place)
    with traffic.running():
        ask(three.url, "/_cluster/settings", "PUT", {"transient": low | {f"{prefix}.threshold_enabled": True}}, 60)
        until = time.monotonic() + 90
        while not traffic.refused and time.monotonic() < until:
            time.sleep(0.5)
        ask(three.url, "/_cluster/settings", "PUT", {"transient": {f"{prefix}.*": None}}, 60)
        before = len(traffic.acknowledged)
        until = time.monotonic() + 90
        while len(traffic.acknowledged) == before and time.monotonic() < until:
            time.sleep(0.5)
    assert any("disk" in line for line in traffic.refused), traffic.refused  # writing, or publishing what was written
    assert len(traffic.acknowledged) > before  # writes went on by themselves
    settled(three)
    traffic.check()


def test_every_second_bulk_is_refused(three: Cluster, place: Place) -> None:
    through, seen = passing(three.url), [0]

    def busy(method: str, path: str, body: bytes) -> Answer:
        if "_bulk" in path:
            seen[0] += 1
            if seen[0] % 2:
                return refusing(429, "es_rejected_execution_exception")(method, path, body)
        return through(method, path, body)

    with serving(busy) as url:
        traffic = Traffic(place._replace(cluster=connect(url)))
        with traffic.running():
            time.sleep(10)
        assert seen[0] > 10
        assert traffic.refused == []
        traffic.check()


class Slowly(Prepare):
    def __call__(self, documents: Any) -> Any:
        time.sleep(0.5)
        return super().__call__(documents)


def job(url: str, name: str, folder: Path) -> None:
    place = Place(connect(url), name, folder)
    given: dict[str, Any] = {"config": {}, "spaces": SPACES, "vector_index": "hnsw", "progress": silent}
    build_elastic(place, films(2_000), Slowly(), **given)


def test_a_job_that_was_killed_goes_on_and_finishes_with_the_right_count(three: Cluster, tmp_path: Path) -> None:
    place = Place(connect(three.url), f"t-{uuid.uuid4().hex[:12]}", tmp_path)
    process = multiprocessing.get_context("spawn").Process(target=job, args=(three.url, place.name, tmp_path))
    process.start()
    until = time.monotonic() + SETTLED_S
    while not place.cluster.sources(f"{place.name}-000001", ["d0300"]) and time.monotonic() < until:
        time.sleep(0.2)
    process.kill()
    process.join()
    with pytest.raises(NotFound):
        open_elastic(place)
    done = build(place, films(2_000))
    assert done.documents == 2_000
    assert 0 < done.added < 2_000
    assert done.added + done.reused == 2_000
    assert len(open_elastic(place).snapshot()) == 2_000
    delete_elastic(place)
