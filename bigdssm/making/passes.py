"""The two passes of a making, which go on where a killed run was: tables are read and fitted, then splits are written.

The first goes on behind a batch of rows, the second behind a finished shard, a split or a batch of the catalogue.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from bigdssm.errors import DataError
from bigdssm.features import TextTokenizer
from bigdssm.features.columns import ReportBad, SourceBatch
from bigdssm.making.ahead import ahead
from bigdssm.making.block_writer import SplitWriter, block_rows
from bigdssm.making.dataset_writer import DatasetWriter
from bigdssm.making.journal import State
from bigdssm.making.making import Fitting
from bigdssm.making.tokenizer import Texts
from bigdssm.progress import Progress
from bigdssm.schema import Schema


class Reading:
    """Reads tables batch by batch, and notes behind a batch what all of them so far have led to, if it is time to."""

    def __init__(self, writer: DatasetWriter, state: Callable[[], State]) -> None:
        """`state` returns what the batches have led to beside bad rows; `begun` is what a killed run's returned."""
        self._writer, self._state = writer, state
        done = writer.reading.state
        self.begun: State | None = done["state"] if done else None
        self.whole: bool = done is not None and done["whole"]
        self._met: dict[str, int] = dict(done["met"]) if done else {}
        self._finished: list[str] = list(done["finished"]) if done else []
        if done:
            writer.quarantine.restore(done["quarantine"])
        if self.whole:
            writer.read = done

    def batches(self, name: str, read: Callable[[ReportBad], Iterator[SourceBatch]]) -> Iterator[SourceBatch]:
        """Yield what `read` does, without the batches that a killed run has taken in and reports of their bad rows.

        The caller is done with a batch when it asks for the next.
        """
        if name in self._finished:
            return
        met, done = 0, self._met.get(name, 0)

        def report_bad(file: str, row: int, reason: str, left_out: bool = True) -> None:
            if met >= done:
                self._writer.quarantine.report(file, row, reason, left_out)

        batches = read(report_bad)
        while (batch := self._next(batches)) is not None:
            if met >= done:
                yield batch
                self._met[name] = met + 1
                if self._writer.reading.due:
                    self._writer.reading.save(self._all(), self._writer.staging)
            met += 1
        self._finished.append(name)

    def _next(self, batches: Iterator[SourceBatch]) -> SourceBatch | None:
        """Return the next batch, None at the end. Raises what reading does, with the reasons of bad rows so far."""
        try:
            return next(batches, None)
        except DataError as error:
            raise DataError(f"{error}{self._writer.quarantine.told()}") from None

    def finish(self) -> None:
        """Take what was read for all there is."""
        self.whole = True
        self._writer.read = self._all()

    def _all(self) -> State:
        return {
            "whole": self.whole,
            "met": dict(self._met),
            "finished": list(self._finished),
            "quarantine": self._writer.quarantine.state(),
            "state": self._state(),
        }


def fit(writer: DatasetWriter, fitting: Fitting, texts: Texts) -> tuple[Schema, TextTokenizer | None]:
    """Return the fitted schema and the tokenizer's encoder (none without text); from a killed run where that had them.

    `texts` are what a tokenizer is trained on.
    """
    if writer.written:
        schema = Schema.load(writer.staging)
        return schema, TextTokenizer(writer.tokenizer_dir) if schema.has_text else None
    if not writer.append and writer.tokenizer_dir.exists():
        shutil.rmtree(writer.tokenizer_dir)
    schema, text = fitting.finish(texts)
    schema = schema.save(writer.staging)
    writer.note(entries={}, counts=None, split=None, documents=None)
    return schema, text


class SplitRows(Protocol):
    """The rows of a split, in the order in which they are written."""

    @property
    def num_rows(self) -> int:
        """Return how many there are."""

    def tables(self) -> Iterator[pa.Table]:
        """Yield them in pieces, the same each time."""

    def close(self) -> None:
        """Free what they hold."""


def write_splits(
    writer: DatasetWriter, splits: Mapping[str, SplitRows], encode: Callable[[pa.Table], dict[str, pa.Array]],
    positives: Callable[[pa.Table], np.ndarray], num_docs: int, notes: list[str], progress: Progress,
) -> tuple[dict[str, Any], np.ndarray]:  # fmt: skip
    """Write the splits' rows, through `encode`, as blocks; `positives` are rows' documents of relevance above 0, int64.

    Returns their entries and the train positives of each document, int64 [num_docs].
    """
    begun = dict(writer.written)
    counts = np.zeros(num_docs, np.int64) if begun["counts"] is None else begun["counts"]
    entries = dict(begun["entries"])
    done, total = 0, sum(split.num_rows for split in splits.values())
    for name, split in splits.items():
        if not split.num_rows:
            split.close()
            notes.append(f"the split {name} is empty")
            continue
        if name in entries:  # by a run that was killed
            done += split.num_rows
            continue
        blocks = SplitWriter(writer.partition_dir, name, block_rows(split.num_rows), state=begun.pop("split", None))
        finished = blocks.num_finished
        for (table, rest), columns in ahead(lambda both: encode(both[1]), _with_rests(split.tables(), blocks.num_rows)):
            if name == "train":
                counts += np.bincount(positives(table), minlength=num_docs)
            done += table.num_rows
            if rest.num_rows:
                blocks.write(columns)
            progress("encoding and writing", done, total)
            if blocks.num_finished > finished:
                finished = blocks.num_finished
                writer.note(split=blocks.state())
        if name == "train" and not counts.any():
            raise DataError("every relevance in the train split is 0, so that nothing can be learned from it")
        entries[name] = blocks.close()
        writer.note(entries=dict(entries), counts=counts, split=None)
    return entries, counts


def _with_rests(tables: Iterable[pa.Table], written: int) -> Iterator[tuple[pa.Table, pa.Table]]:
    """Yield each table, and of it what follows the first `written` rows of them all."""
    for table in tables:
        old = min(written, table.num_rows)
        written -= old
        yield table, table.slice(old)
