"""Work off the event loop, a bounded amount of it. Searches that arrive together are answered together.

While one batch of a collection is being answered, by one encoder call, the next one gathers. Nothing
waits on a timer, so a lone query is as fast as it can be.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from retrieval.engine import Engine
from retrieval.errors import RetrievalError
from retrieval.request import Answer, Request
from server import metrics
from server.problems import Refused

T = TypeVar("T")
MAX_BATCH = 32


class _Waiting(NamedTuple):
    request: Request
    future: asyncio.Future[Answer | RetrievalError]


class Searches:
    """The searches of one process. `limit`: accepted and unanswered; more are refused with 429.

    `find` gives a collection's engine, once a batch and in the batch's thread: it looks at files, and may load much.
    """

    def __init__(self, find: Callable[[str], Engine], limit: int, threads: int = 2) -> None:
        self.limit = limit
        self._find = find
        self._pool = ThreadPoolExecutor(threads, "search")
        self._queues: dict[str, deque[_Waiting]] = {}
        self._accepted = 0

    async def __call__(self, collection: str, request: Request) -> Answer | RetrievalError:
        """The answer, or the error that the search ends in. Raises Refused where too many are waiting."""
        return (await self.many(collection, [request]))[0]

    async def many(self, collection: str, requests: list[Request]) -> list[Answer | RetrievalError]:
        """One answer or error each; raises what `find` raises where there is no such collection."""
        if self._accepted + len(requests) > max(self.limit, len(requests)):
            metrics.REFUSED.inc(len(requests))
            raise Refused(429, f"{self.limit} searches are waiting already; try again", {"Retry-After": "1"})
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(request, loop.create_future()) for request in requests]
        self._accepted += len(waiting)
        metrics.WAITING.set(self._accepted)
        try:
            if collection in self._queues:
                self._queues[collection].extend(waiting)
            else:
                self._queues[collection] = deque(waiting)
                loop.create_task(self._drain(collection))  # noqa: RUF006 (ends by itself; futures keep its results)
            return list(await asyncio.gather(*(w.future for w in waiting)))
        finally:
            self._accepted -= len(waiting)
            metrics.WAITING.set(self._accepted)

    async def _drain(self, collection: str) -> None:
        queue = self._queues[collection]
        while queue:
            batch = [queue.popleft() for _ in range(min(MAX_BATCH, len(queue)))]
            metrics.BATCH.observe(len(batch))
            try:
                answers = await asyncio.get_running_loop().run_in_executor(
                    self._pool, self._searched, collection, [w.request for w in batch]
                )
            except Exception as error:  # reaches every caller, each of which reports it
                for w in batch:
                    if not w.future.done():
                        w.future.set_exception(error)
                continue
            _observe(answers)
            for w, answer in zip(batch, answers, strict=True):
                if not w.future.done():  # its caller may have gone
                    w.future.set_result(answer)
        del self._queues[collection]

    def _searched(self, collection: str, requests: list[Request]) -> list[Answer | RetrievalError]:
        return self._find(collection).search_many(requests)

    def close(self) -> None:
        self._pool.shutdown()


def _observe(answers: list[Answer | RetrievalError]) -> None:
    took: dict[str, float] = next((answer["took_ms"] for answer in answers if isinstance(answer, dict)), {})
    for stage, ms in took.items():
        metrics.STAGES.labels(stage).observe(ms / 1000)


class Work:
    """Everything else that keeps a core busy: uploads, removals, embeddings."""

    def __init__(self, limit: int, threads: int = 2) -> None:
        self.limit = limit
        self._pool = ThreadPoolExecutor(threads, "work")
        self._accepted = 0

    async def __call__(self, call: Callable[..., T], *arguments: object) -> T:
        """What `call` returns. Raises Refused where too much waits."""
        if self._accepted >= self.limit:
            raise Refused(
                429, f"{self.limit} requests of this kind are waiting already; try again", {"Retry-After": "2"}
            )
        self._accepted += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)
        finally:
            self._accepted -= 1

    def close(self) -> None:
        self._pool.shutdown()
