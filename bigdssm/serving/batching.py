"""Dynamic batching of concurrent queries without added latency, and an LRU cache of answers."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from bigdssm.errors import UnavailableError

QueryT = TypeVar("QueryT")
Answer = TypeVar("Answer")


class Overloaded(Exception):
    """The batcher's queue is full."""


class Batcher(Generic[QueryT, Answer]):
    """Calls `work` in one thread on all waiting queries, at most `max_batch`, when it is free.

    Batches grow under load; a single request is never delayed.
    """

    def __init__(
        self, work: Callable[[Sequence[QueryT]], Sequence[Answer]], max_batch: int = 32, max_waiting: int = 1024
    ) -> None:
        self._work, self._max_batch, self._max_waiting = work, max_batch, max_waiting
        self._waiting: asyncio.Queue[tuple[QueryT, asyncio.Future[Answer]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "batcher")

    @property
    def is_full(self) -> bool:
        """Return whether further queries would be rejected."""
        return self._waiting.qsize() >= self._max_waiting

    async def __call__(self, query: QueryT) -> Answer:
        """Return the answer. Raises Overloaded, or the exception of `work`."""
        if self.is_full:
            raise Overloaded(f"{self._max_waiting} queries are waiting")
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((query, future))
        return await future

    async def run(self) -> None:
        """Answer until cancelled."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._max_batch and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            batch = [(query, future) for query, future in batch if not future.done()]  # skip disconnected clients
            if not batch:
                continue
            await self._answer(batch)

    async def _answer(self, batch: Sequence[tuple[QueryT, asyncio.Future[Answer]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._thread, self._work, [query for query, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        except Exception as error:
            # Retry one by one, so that an invalid query fails alone.
            if len(batch) > 1 and not isinstance(error, UnavailableError):
                for one in batch:
                    await self._answer([one])
                return
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)


class AnswerCache(Generic[Answer]):
    """LRU cache of `size` answers."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._answers: OrderedDict[str, Answer] = OrderedDict()

    def get(self, key: str) -> Answer | None:
        """Return the cached answer, or None."""
        answer = self._answers.get(key)
        if answer is not None:
            self._answers.move_to_end(key)
        return answer

    def put(self, key: str, answer: Answer) -> None:
        """Store an answer and evict the least recently used one."""
        self._answers[key] = answer
        while len(self._answers) > self._size:
            self._answers.popitem(last=False)
