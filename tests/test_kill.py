"""kill -9 at random moments: what was acknowledged is there, nothing is half visible, searches answer.

A child writes, and says in a journal what it begins and what it has finished; the parent kills it, opens
the collection and compares. The child has no torch: documents are encoded by hashing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from indexers import embedded, publish
from indexers.embedded import Embedded, open_index
from indexers.rebuild import build, rebuild, rollback
from retrieval.analysis import tokens
from retrieval.types import Document, Encoded, Item, Prepared, Side, SpaceInfo
from tests.fakes import HashingEncoder

DIM = 8
ENCODER = HashingEncoder(dim=DIM)
SPACES = {"text": SpaceInfo("text", DIM, ENCODER.digests)}
WORDS = [f"word{n}" for n in range(20)]
State = dict[str, str]  # id -> text

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["tests.test_kill"])


def quiet(phase: str, done: int, total: int | None) -> None: ...


def encodings(documents: list[Document]) -> dict[tuple[str, Side], Encoded]:
    if not documents:
        return {}
    matrix = ENCODER.encode_documents([Item(text=document.text) for document in documents])
    return {("text", "text"): Encoded(np.arange(len(documents)), matrix)}


class Preparing:
    digest = "hashing"

    def __call__(self, documents: Any) -> Prepared:
        return Prepared(list(documents), encodings(list(documents)), [])


def source(state: State) -> list[Document]:
    return [Document(id=id, text=text) for id, text in state.items()]


# --- the child -------------------------------------------------------------------------------------


def small_limits() -> None:
    """A few documents are enough to seal tails, write shards and rewrite derived parts."""
    publish.SEALED_AT = 40
    embedded.SHARD_AT = 25
    publish._much = lambda changed, total, least: changed > 60


def some_state(choose: random.Random, most: int) -> State:
    return {
        f"id{choose.randrange(150)}": " ".join(choose.choices(WORDS, k=choose.randint(1, 4)))
        for _ in range(choose.randint(1, most))
    }


def next_step(choose: random.Random) -> tuple[str, Any]:
    """What to do, and with what."""
    name = choose.choices(["add", "remove", "publish", "rebuild", "build"], [8, 3, 6, 2, 2])[0]
    if name in ("add", "build"):
        return name, some_state(choose, 40)
    if name == "remove":
        return name, sorted({f"id{choose.randrange(150)}" for _ in range(choose.randint(1, 10))})
    return name, choose.choice(["flat", "hnsw"]) if name == "rebuild" else None


def do(home: Path, index: Embedded, name: str, what: Any) -> None:
    if name == "add":
        index.add(source(what), encodings(source(what)))
    elif name == "remove":
        index.remove(what)
    elif name == "publish":
        index.publish()
    elif name == "rebuild":
        rebuild(home, vector_index=what, progress=quiet)
    else:
        build(home, source(what), Preparing(), config={}, spaces=SPACES, vector_index="flat", progress=quiet)


def child(home: Path, journal: Path, seed: int) -> None:
    small_limits()
    choose = random.Random(seed)
    handle = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    index = open_index(home)
    while True:
        name, what = next_step(choose)
        os.write(handle, json.dumps([name, what]).encode() + b"\n")
        do(home, index, name, what)
        os.write(handle, b"done\n")


# --- the parent ------------------------------------------------------------------------------------


def after(written: State, shown: State, name: str, what: Any) -> tuple[State, State]:
    """(written, shown) after a step."""
    if name == "add":
        return written | what, shown
    if name == "remove":
        return {id: text for id, text in written.items() if id not in what}, shown
    if name == "publish":
        return written, written
    if name == "build":
        return what, what
    return written, shown  # a rebuild shows what was shown


def replay(journal: Path, written: State, shown: State) -> Iterator[tuple[State, State]]:
    """The state after what was acknowledged, and the one after the step that was cut short."""
    lines = journal.read_text().splitlines() if journal.exists() else []
    for step, done in zip(lines[::2], [*lines[1::2], ""], strict=False):
        name, what = json.loads(step)
        later = after(written, shown, name, what)
        if done != "done":
            yield written, shown
            yield later
            return
        written, shown = later
    yield written, shown


def held(index: Embedded) -> State:
    snapshot = index.snapshot()
    documents = snapshot.fetch([f"id{n}" for n in range(150)])
    found = {document.id: document.text for document in documents if document is not None}
    assert len(found) == len(snapshot)
    return found


def check_searches(index: Embedded, state: State, choose: random.Random) -> None:
    snapshot = index.snapshot()
    words = " ".join(choose.choices(WORDS, k=2))
    hits = {hit.id for hit in snapshot.search_text([words], 200)[0]}
    assert hits == {id for id, text in state.items() if set(tokens(text)) & set(tokens(words))}
    query = ENCODER.encode_queries([Item(text=words)])
    got = snapshot.search_vectors("text", query, 5)[0]
    if state:
        scores = ENCODER.encode_documents([Item(text=text) for text in state.values()]) @ query[0]
        np.testing.assert_allclose([hit.score for hit in got], np.sort(scores)[::-1][:5], atol=1e-5)


def wait_for_a_moment(journal: Path, choose: random.Random, pace: float) -> float:
    """Until some step has begun, and then a part of what a step takes (`pace`, s) on this machine; the new pace."""
    steps, first, until = choose.randint(0, 4), 0.0, time.monotonic() + 60
    while (begun := lines_of(journal)) <= 2 * steps and time.monotonic() < until:
        first = first or (time.monotonic() if begun else 0.0)
        time.sleep(0.001)
    if steps and first:
        pace = (pace + (time.monotonic() - first) / steps) / 2
    time.sleep(choose.uniform(0, pace))
    return pace


def lines_of(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def kill_and_compare(folder: Path, kills: int, seed: int) -> int:
    """How many of the kills cut a step short."""
    small_limits_before = publish.SEALED_AT, embedded.SHARD_AT, publish._much
    small_limits()
    choose = random.Random(seed)
    home = folder / "collection"
    written = shown = some_state(choose, 40)
    do(home, None, "build", shown)  # type: ignore[arg-type]
    cut, pace = 0, 0.02
    for number in range(kills):
        journal = folder / f"journal{number}"
        process = CHILDREN.Process(target=child, args=(home, journal, seed * 1000 + number))
        process.start()
        pace = wait_for_a_moment(journal, choose, pace)
        assert process.exitcode is None, f"child {number} ended by itself"
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        states = list(replay(journal, written, shown))
        cut += len(states) == 2
        index = open_index(home)
        found = held(index)
        assert found in [state[1] for state in states], f"half visible after kill {number} (seed {seed})"
        check_searches(index, found, choose)
        index.publish()
        found = held(index)
        assert found in [state[0] for state in states], f"writes lost after kill {number} (seed {seed})"
        assert set(index.snapshot().parts.values()) == {"ok"}
        check_searches(index, found, choose)
        written = shown = found
        index.close()
    publish.SEALED_AT, embedded.SHARD_AT, publish._much = small_limits_before
    return cut


@pytest.mark.timeout(240)
def test_fifty_kills_lose_nothing(tmp_path: Path) -> None:
    assert kill_and_compare(tmp_path, 50, seed=1) > 25


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [2, 3])
def test_two_hundred_kills_lose_nothing(tmp_path: Path, seed: int) -> None:
    assert kill_and_compare(tmp_path, 200, seed) > 100


def test_a_rollback_after_a_kill_still_finds_the_earlier_generation(tmp_path: Path) -> None:
    home = tmp_path / "collection"
    do(home, None, "build", {"a": "word1"})  # type: ignore[arg-type]
    do(home, None, "build", {"b": "word2"})  # type: ignore[arg-type]
    assert rollback(home) == 1
    index = open_index(home)
    assert held_ids(index) == ["a"]
    index.close()


def held_ids(index: Embedded) -> list[str]:
    return index.snapshot().sample(10)
