"""Queries that wait together are answered together: a batcher that adds no waiting of its own, and a cache."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class Overloaded(Exception):
    """More wait than the batcher takes."""


class Batcher(Generic[Asked, Answer]):
    """Calls `work` in one thread with all that waits when the thread is free, at most `at_once`.

    Under load, batches grow by themselves; alone, a request is answered at once.
    """

    def __init__(
        self, work: Callable[[Sequence[Asked]], Sequence[Answer]], at_once: int = 32, most_waiting: int = 1024
    ) -> None:
        self._work, self._at_once, self._most_waiting = work, at_once, most_waiting
        self._waiting: asyncio.Queue[tuple[Asked, asyncio.Future[Answer]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "batcher")

    @property
    def is_full(self) -> bool:
        """Return whether another would be refused."""
        return self._waiting.qsize() >= self._most_waiting

    async def __call__(self, asked: Asked) -> Answer:
        """Return the answer. Raises Overloaded, or what the work raised."""
        if self.is_full:
            raise Overloaded(f"{self._most_waiting} queries wait already")
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((asked, future))
        return await future

    async def run(self) -> None:
        """Answer until cancelled."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._at_once and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            batch = [(asked, future) for asked, future in batch if not future.done()]  # whoever asked may have gone
            if not batch:
                continue
            await self._answer(batch)

    async def _answer(self, batch: Sequence[tuple[Asked, asyncio.Future[Answer]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._thread, self._work, [asked for asked, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        except Exception as error:
            if len(batch) > 1:  # a query that cannot be answered fails alone
                for one in batch:
                    await self._answer([one])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)


class AnswerCache(Generic[Answer]):
    """The answers of the `size` queries that were asked last."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._answers: OrderedDict[str, Answer] = OrderedDict()

    def get(self, key: str) -> Answer | None:
        """Return the answer, or None where it is not known (any more)."""
        answer = self._answers.get(key)
        if answer is not None:
            self._answers.move_to_end(key)
        return answer

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer, and forget the one that was asked longest ago."""
        self._answers[key] = answer
        while len(self._answers) > self._size:
            self._answers.popitem(last=False)
