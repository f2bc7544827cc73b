"""Serve requests in batches without added latency, and replace a served model or index without dropping requests."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from threading import Thread
from typing import Any, Generic, TypeVar

from bigdssm.errors import UnavailableError
from bigdssm.features import Column
from bigdssm.retrieval.queries import Query
from bigdssm.serving.metrics import Metrics
from bigdssm.serving.searcher import Folders, Searcher, SearchResult
from bigdssm.utils.log import get_logger

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
            if batch:
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


RETRY_S = 30.0  # before a folder that failed to open is opened again: the dataset or the network may be the cause
T = TypeVar("T")
logger = get_logger(__name__)


class ActiveSearcher:
    """A searcher with its batcher and cache, and a count of running requests."""

    def __init__(self, searcher: Searcher, metrics: Metrics, max_batch: int, cache_size: int) -> None:
        def answer(queries: Sequence[Query]) -> list[SearchResult]:
            results = searcher.answer(queries)
            metrics.batch(results[0])
            return results

        self.searcher = searcher
        self.batcher: Batcher[Query, SearchResult] = Batcher(answer, max_batch)
        self.cache: AnswerCache[tuple[dict[str, Any], dict[str, Column]]] = AnswerCache(cache_size)
        self._requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._running = asyncio.create_task(self.batcher.run())

    @contextmanager
    def in_use(self) -> "Iterator[ActiveSearcher]":
        """Keep the batcher running within the context."""
        self._requests += 1
        self._idle.clear()
        try:
            yield self
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    async def end(self) -> None:
        """Stop after the running requests; the caller must not start new ones."""
        await self._idle.wait()
        self._running.cancel()
        with suppress(asyncio.CancelledError):
            await self._running


class LiveSearcher:
    """Serves the content of `folders` and its dataset, polled every `poll_s` seconds; a fixed searcher without."""

    def __init__(
        self, searcher: Searcher, metrics: Metrics, max_batch: int, cache_size: int, folders: Folders | None = None,
        poll_s: float = 1.0,
    ) -> None:  # fmt: skip
        self._metrics, self._options = metrics, (metrics, max_batch, cache_size)
        self._folders, self._poll_s, self._state = folders, poll_s, searcher.state
        # The last state, of folders and dataset, that failed to open; when to retry it; and why
        self._failed: tuple[bytes, object] = b"", None
        self._retry_at, self._reason = 0.0, ""
        self.unavailable: UnavailableError | None = None  # of the store, when it was last polled
        self._trouble = ""  # of the last poll
        self.active = ActiveSearcher(searcher, *self._options)

    async def watch(self) -> None:
        """Reload replaced folders until cancelled; if that fails, the current searcher stays."""
        while self._folders is not None:
            await asyncio.sleep(self._poll_s)
            try:
                await self._poll(self._folders)
                self.unavailable, self._trouble = None, ""
            except Exception as error:
                self.unavailable = error if isinstance(error, UnavailableError) else None
                if (trouble := str(error) or repr(error)) != self._trouble:
                    logger.warning("cannot check %s: %s", self._folders.model, trouble)
                self._trouble = trouble

    async def _poll(self, folders: Folders) -> None:
        state = await _in_thread(folders.state)
        if state == self._state and not await _in_thread(self.active.searcher.is_outdated):
            return
        both = state, await _in_thread(self.active.searcher.dataset_state)
        if both == self._failed and time.monotonic() < self._retry_at:
            return
        try:
            searcher = await _in_thread(partial(folders.open, self.active.searcher))
        except Exception as error:  # of any library that reads the folder, MemoryError and RecursionError included
            # Expected between the replacement of a model and of its index, which do not match yet.
            if (reason := str(error) or repr(error)) != self._reason or both != self._failed:
                logger.warning("cannot reload %s: %s; it is tried again every %.0f s", folders.model, reason, RETRY_S)
            self._failed, self._retry_at, self._reason = both, time.monotonic() + RETRY_S, reason
            return
        if await _in_thread(folders.state) != state or await _in_thread(searcher.is_outdated):
            return  # replaced while it was read
        self._state, before = state, self.active
        self.active = ActiveSearcher(searcher, *self._options)
        self._metrics.reloads.inc()
        identity = searcher.identity
        logger.info("reloaded: model %s, index %s", identity["model"][:12], identity["collection"] or identity["index"])
        await before.end()


async def _in_thread(call: Callable[[], T]) -> T:
    """Run a slow call in a daemon thread, for which shutdown does not wait (unlike a pool's)."""
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()  # from here on a cancelled caller does not cancel it

    def run() -> None:
        try:
            done.set_result(call())
        except Exception as error:
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(done)
