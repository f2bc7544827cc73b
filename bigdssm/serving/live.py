"""What answers now, and how a new model or index takes its place without a request being dropped."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any, TypeVar

from bigdssm.errors import BigDSSMError
from bigdssm.retrieval.search import Query
from bigdssm.serving.batching import AnswerCache, Batcher
from bigdssm.serving.metrics import Metrics
from bigdssm.serving.searcher import Folders, Searcher, SearchResult
from bigdssm.utils.log import get_logger

RETRY_S = 30.0  # until a folder that failed to open is opened again, where the cause need not lie in its files
T = TypeVar("T")
logger = get_logger(__name__)


class ActiveSearcher:
    """A searcher with the batcher and the answers that are its own."""

    def __init__(self, searcher: Searcher, metrics: Metrics, at_once: int, cache_size: int) -> None:
        def answer(queries: Sequence[Query]) -> list[SearchResult]:
            found = searcher.answer(queries)
            metrics.batch(found[0])
            return found

        self.searcher = searcher
        self.batcher: Batcher[Query, SearchResult] = Batcher(answer, at_once)
        self.cache: AnswerCache[dict[str, Any]] = AnswerCache(cache_size)
        self._asking = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._running = asyncio.create_task(self.batcher.run())

    @contextmanager
    def asked(self) -> Iterator[ActiveSearcher]:
        """Keep it answering while the block runs."""
        self._asking += 1
        self._idle.clear()
        try:
            yield self
        finally:
            self._asking -= 1
            if not self._asking:
                self._idle.set()

    async def end(self) -> None:
        """Return when nobody asks it any more; the one who calls this gives it to nobody new."""
        await self._idle.wait()
        self._running.cancel()
        with suppress(asyncio.CancelledError):
            await self._running


class LiveSearcher:
    """Answers with what lies in `folders`, looked at every `look_s` seconds; without folders, with one searcher."""

    def __init__(
        self, searcher: Searcher, metrics: Metrics, at_once: int, cache_size: int, folders: Folders | None = None,
        look_s: float = 1.0,
    ) -> None:  # fmt: skip
        self._metrics, self._options = metrics, (metrics, at_once, cache_size)
        self._folders, self._look_s, self._state = folders, look_s, searcher.state
        self._failed = b"", 0.0  # the state that did not open last, and when it is opened again
        self.now = ActiveSearcher(searcher, *self._options)

    async def watch(self) -> None:
        """Take up what is new, until cancelled. What does not open, or does not fit, leaves all as it is."""
        while self._folders is not None:
            await asyncio.sleep(self._look_s)
            try:
                await self._look(self._folders)
            except Exception as error:
                logger.warning("%s cannot be looked at: %s", self._folders.model, error or repr(error))

    async def _look(self, folders: Folders) -> None:
        """Take up what is new."""
        state, (failed, until) = await _in_thread(folders.state), self._failed
        if state == self._state or (state == failed and time.monotonic() < until):
            return
        try:
            searcher = await _in_thread(folders.open)
        except Exception as error:  # of any library that reads a file of the folder; MemoryError and RecursionError
            # Of a model and its index one is replaced first: until the other is there, they do not fit.
            logger.warning("what lies in %s is not taken up: %s", folders.model, error or repr(error))
            self._failed = state, time.monotonic() + (math.inf if isinstance(error, BigDSSMError) else RETRY_S)
            return
        if await _in_thread(folders.state) != state:
            return  # it was replaced while it was read
        self._state, before = state, self.now
        self.now = ActiveSearcher(searcher, *self._options)
        self._metrics.taken_up.inc()
        logger.info("taken up: model %s", searcher.about()["model"][:12])
        await before.end()

    async def end(self) -> None:
        """Stop answering when all who ask have been answered."""
        await self.now.end()


async def _in_thread(call: Callable[[], T]) -> T:
    """Return what a call returns that may take long. A stop does not wait for it, as it would for a pool's thread."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(outcome: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(lambda: None if done.done() else outcome())

    def run() -> None:
        try:
            result = call()
        except Exception as error:
            finish(lambda error=error: done.set_exception(error))  # type: ignore[misc]
        else:
            finish(lambda: done.set_result(result))

    Thread(target=run, daemon=True).start()
    return await done
