"""What answers now, and how a new model or index takes its place without a request being dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from bigdssm.errors import BigDSSMError
from bigdssm.log import get_logger
from bigdssm.retrieval.search import Query
from bigdssm.serving.batching import AnswerCache, Batcher
from bigdssm.serving.metrics import Metrics
from bigdssm.serving.searcher import Folders, Found, Searcher

logger = get_logger(__name__)


class Answering:
    """A searcher with the batcher and the answers that are its own."""

    def __init__(self, searcher: Searcher, metrics: Metrics, at_once: int, cache_size: int) -> None:
        def answer(queries: Sequence[Query]) -> list[Found]:
            found = searcher.answer(queries)
            metrics.batch(found[0])
            return found

        self.searcher = searcher
        self.batcher: Batcher[Query, Found] = Batcher(answer, at_once)
        self.cache: AnswerCache[dict[str, Any]] = AnswerCache(cache_size)
        self._asking = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._running = asyncio.create_task(self.batcher.run())

    @contextmanager
    def asked(self) -> Iterator[Answering]:
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


class Live:
    """Answers with what lies in `folders`, looked at every `look_s` seconds; without folders, with one searcher."""

    def __init__(
        self, searcher: Searcher, metrics: Metrics, at_once: int, cache_size: int, folders: Folders | None = None,
        look_s: float = 1.0,
    ) -> None:  # fmt: skip
        self._metrics, self._options = metrics, (metrics, at_once, cache_size)
        self._folders, self._look_s, self._state = folders, look_s, None if folders is None else folders.state()
        self.now = Answering(searcher, *self._options)

    async def watch(self) -> None:
        """Take up what is new, until cancelled. What does not open, or does not fit, leaves all as it is."""
        while self._folders is not None:
            await asyncio.sleep(self._look_s)
            state = self._folders.state()
            if state == self._state:
                continue
            try:
                searcher = await asyncio.to_thread(self._folders.open)
            except (BigDSSMError, OSError) as error:
                # Of a model and its index one is replaced first: until the other is there, they do not fit.
                logger.warning("what lies in %s is not taken up: %s", self._folders.model, error)
                self._state = state
                continue
            if self._folders.state() != state:
                continue  # it was replaced while it was read
            self._state, before = state, self.now
            self.now = Answering(searcher, *self._options)
            self._metrics.taken_up.inc()
            logger.info("taken up: model %s", searcher.about()["model"][:12])
            await before.end()

    async def end(self) -> None:
        """Stop answering when all who ask have been answered."""
        await self.now.end()
