"""PlainStream: train directly on plain WebDataset shards, through webdataset's pipeline.

A dataset folder provides the fitted schema, the tokenizer, held-out rows and the catalogue for evaluation (built from
some of the shards by `make_shards webdataset`). Texts are tokenized in the loader processes.

Each rank and loader process draws shards with replacement, so all ranks run the same number of steps even if the number
of shards is not divisible by the number of readers. Without an index there is no epoch, no exact resume and no
checksum. A shard with incomplete headers, or with members that readers unpickle, is rejected.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import webdataset as wds
from braceexpand import braceexpand

from bigdssm.dataset.blocks import BadRow
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.dataset.schema import hash_rows, row_keys
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import TextTokenizer, encode_columns
from bigdssm.features.canonical import canonical, missing
from bigdssm.features.columns import RowCheck
from bigdssm.features.ragged import Column, from_arrow
from bigdssm.loader.stream import RowStream
from bigdssm.loader.workers import LoadedStep, Peers, WorkerSteps
from bigdssm.sources.base import TableFile
from bigdssm.sources.text import KEY, TEXT_SUFFIXES, check_shard, is_text, record_batch, record_of
from bigdssm.utils.hashing import derive_key, hash64, hash_strings
from bigdssm.utils.log import get_logger
from bigdssm.utils.urls import is_url

T = TypeVar("T")
SHUFFLED_SAMPLES = 5000  # shuffle buffer per loader process
MIN_ROWS_FOR_LIMIT = 10_000  # minimum denominator of max_bad_fraction: a few early bad rows do not stop the run
MOST_WITHOUT_TEXTS = 10_000  # shards in sequence
ATTEMPTS = 20  # maximum attempts to fill a step; each reads as many samples as are still missing
log = get_logger(__name__)


def find_shards(pattern: str) -> list[Path]:
    """Return the shards of a path with {000..009} or {a,b}.

    Raises DataError: a URL or a command, a missing shard; ConfigError: an invalid pattern.
    """
    if pattern.startswith("pipe:") or is_url(pattern) or "::" in pattern:
        raise DataError(
            f"data.webdataset={pattern}: only local shards can be read directly, and commands are not executed; copy "
            f"the shards, or repack them with bigdssm make_shards webdataset"
        )
    try:
        paths = [Path(name) for name in braceexpand(pattern)]
    except ValueError as error:
        raise ConfigError(f"data.webdataset={pattern}: {error}; write {{000..009}}") from None
    for path in paths:
        if not path.is_file():
            raise DataError(f"data.webdataset={pattern}: shard {path} does not exist")
    return paths


class PlainStream(RowStream):
    """Every step has rows_global / world_size rows of this rank, rounded up or down.

    An unusable sample is recorded, counted and replaced by another one. Row ids are hashes of shard and key; every
    relevance is 1; queries and documents are identified by the hash of their features.
    """

    steps_per_epoch = 0
    inline = True

    def __init__(
        self, dataset: Dataset, pattern: str, *, rows_global: int, seed: int = 0, rank: int = 0, world_size: int = 1,
        num_workers: int = 0, start_step: int = 0, max_bad_fraction: float = 0.001, quarantine: Path | None = None,
    ) -> None:  # fmt: skip
        """`pattern`: see `find_shards`. Raises ConfigError: the schema has histories; DataError: no shards."""
        super().__init__(
            dataset, rank=rank, world_size=world_size, num_workers=num_workers, start_step=start_step,
            max_bad_fraction=max_bad_fraction, quarantine=quarantine,
        )  # fmt: skip
        for name, feature in dataset.schema.query.items():
            if feature.from_sequence:
                raise ConfigError(
                    f"data.query.{name}: WebDataset samples are pairs and have no histories; remove data.webdataset"
                )
        self._paths, self._pattern = find_shards(pattern), pattern
        self._rows_global, self._seed = rows_global, seed
        self.queries_per_step = float(rows_global)
        if rank == 0:
            log.warning(
                "%d plain shards without an index: a resumed run draws different rows than an uninterrupted one, and "
                "damaged contents are not detected; bigdssm make_shards webdataset repacks them", len(self._paths),
            )  # fmt: skip

    def state(self, step: int | None = None) -> dict[str, Any]:
        """Return the stream's state before `step` (by default the next one), in JSON types; equal on all ranks."""
        return {
            "step": self.step if step is None else step,
            "seed": self._seed,
            "rows_global": self._rows_global,
            "webdataset": self._pattern,
            "schema": self.dataset.schema.fingerprint(),
            "tokenizer": self.dataset.tokenizer_hash,
        }

    def check_state(self, state: dict[str, Any]) -> bool:
        """Return True if the stream can resume from `state`. Raises DataError with all differences."""
        current = self.state()
        differing = [key for key in {**current, **state} if key != "step" and current.get(key) != state.get(key)]
        if differing:
            reasons = "; ".join(f"{key} was {state.get(key)!r}, is {current.get(key)!r}" for key in differing)
            raise DataError(f"the stream cannot resume, because {reasons}; restore these values, or start a new run")
        return True

    def doc_weights(self) -> np.ndarray:
        """Raise ConfigError: document frequencies are unknown."""
        raise ConfigError("data.webdataset: document frequencies are unknown; set sampling.frequency=streaming")

    def _steps(self, steps: range, make: Callable[[Rows], T]) -> WorkerSteps[T]:
        rank, rows = self.rank, self._rows_global
        count = rows * (rank + 1) // self.world_size - rows * rank // self.world_size
        return _Samples(self.dataset, self._paths, count, derive_key(self._seed, steps.start, rank), steps, make)

    def _rows_for_limit(self, rows_read: int, step: int) -> int:
        return max(rows_read, MIN_ROWS_FOR_LIMIT)

    def _empty_rows(self) -> Rows:
        return _SampleConverter(self.dataset).rows(self.step, [])[0]


class _Samples(WorkerSteps[T]):
    """The given steps; each process draws samples independently."""

    def __init__(
        self, dataset: Dataset, paths: list[Path], rows_per_step: int, key: int, steps: range, make: Callable[[Rows], T]
    ) -> None:
        super().__init__(make)
        self._dataset, self._paths, self._rows_per_step, self._key, self._steps = (
            dataset, paths, rows_per_step, key, steps
        )  # fmt: skip

    def read(self, peers: Peers) -> Iterator[LoadedStep[Rows]]:
        """Yield the steps at the indices `peers.process`, `peers.process` + `peers.processes`, …."""
        seed = derive_key(self._key, peers.process)
        pipeline = wds.DataPipeline(
            wds.ResampledShards([str(path.absolute()) for path in self._paths], seed=seed, deterministic=True),
            _checked_shards,
            wds.tarfile_to_samples(select_files=is_text),
            wds.shuffle(SHUFFLED_SAMPLES, initial=SHUFFLED_SAMPLES // 5, seed=seed),
        )
        converter, samples = _SampleConverter(self._dataset), iter(pipeline)
        for step in self._steps[peers.process :: peers.processes]:
            parts: list[Rows] = []
            bad: list[BadRow] = []
            for _ in range(ATTEMPTS):
                missing_rows = self._rows_per_step - sum(map(len, parts))
                rows, faults = converter.rows(step, list(islice(samples, missing_rows)))
                parts.append(rows)
                bad += faults
                if len(rows) == missing_rows:
                    break
            else:
                raise DataError(f"almost all samples are unusable; the last one: {bad[-1].shard}, {bad[-1].reason}")
            yield LoadedStep(step, Rows.concat(parts), self._rows_per_step + len(bad), len(bad), bad=bad)


def _checked_shards(shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the shards with texts; each process checks each once, again if its size or modification time changes.

    Raises DataError: damaged, or a long sequence of shards without texts.
    """
    without = 0
    for shard in shards:
        stat = os.stat(shard["url"])
        if _check(shard["url"], stat.st_size, stat.st_mtime_ns):
            without = 0
            yield shard
        elif (without := without + 1) == MOST_WITHOUT_TEXTS:
            needed = ", ".join(f".{suffix}" for suffix in TEXT_SUFFIXES)
            raise DataError(f"data.webdataset: shards such as {shard['url']} have no member of the types {needed}")


@functools.cache
def _check(url: str, size: int, mtime_ns: int) -> bool:
    return check_shard(TableFile(Path(url)))


class _SampleConverter:
    """Converts samples to rows, as make_shards does."""

    def __init__(self, dataset: Dataset) -> None:
        self._schema = dataset.schema
        self._text = TextTokenizer(dataset.tokenizer_dir) if dataset.tokenizer_dir else None
        features = [*dataset.schema.query.values(), *dataset.schema.doc.values()]
        self._columns = list(dict.fromkeys(feature.source for feature in features))
        self._has_columns = False  # True after the first record: later records without the columns are bad rows

    def rows(self, step: int, samples: list[dict[str, Any]]) -> tuple[Rows, list[BadRow]]:
        """Return the usable samples as rows, and the unusable ones."""
        bad: list[BadRow] = []
        records: list[dict[str, Any]] = []
        readable: list[dict[str, Any]] = []
        for sample in samples:
            try:
                records.append(record_of(sample))
                readable.append(sample)
            except (ValueError, RecursionError) as error:
                bad.append(_fault(sample, str(error)))

        def report(file: str, row: int, reason: str, left_out: bool = True) -> None:
            if left_out:
                bad.append(_fault(readable[row], reason))

        numbers = list(range(len(records)))
        batch = record_batch("samples", records, numbers, self._columns, self._has_columns or not records, report)
        self._has_columns |= bool(records)
        check = RowCheck(batch, report)
        query, doc = canonical(check, self._schema.query), canonical(check, self._schema.doc)
        check.fail(missing(query, self._schema.query), "no query: its features are empty")
        check.fail(missing(doc, self._schema.doc), "no document: its features are empty")
        good = pa.array(check.good)
        query, doc = query.filter(good), doc.filter(good)
        names = [f"{readable[i]['__url__']}/{readable[i][KEY]}" for i in batch.rows[check.good].tolist()]
        rows = Rows(
            step=step,
            row_ids=np.array([hash64(name) for name in names], np.int64),
            query=_columns(query, self._schema.query, self._text),
            doc=_columns(doc, self._schema.doc, self._text),
            doc_rows=np.full(len(names), -1, np.int64),
            doc_ids=hash_strings(row_keys(hash_rows(doc))),
            relevance=np.ones(len(names), np.float32),
            query_ids=hash_rows(query),
        )
        return rows, bad


def _columns(table: pa.Table, features: Any, text: TextTokenizer | None) -> dict[str, Column]:
    return {name: from_arrow(array) for name, array in encode_columns(table, features, text, large=False).items()}


def _fault(sample: dict[str, Any], reason: str) -> BadRow:
    return BadRow(sample["__url__"], -1, hash64(sample[KEY]), 1, f"sample {sample[KEY]!r}: {reason}")
