"""What making a dataset from interactions and from pairs share: options, the fitted schema, the report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers

from bigdssm.config import DataConfig
from bigdssm.dataset.sequences import EVENT_COLUMNS
from bigdssm.errors import ConfigError
from bigdssm.features import TextTokenizer, stored
from bigdssm.features.fitting import SideFitter
from bigdssm.making.catalogue_writer import CatalogueWriter
from bigdssm.making.dataset_writer import TOKENIZER, DatasetWriter
from bigdssm.making.journal import State
from bigdssm.making.tokenizer import Texts, make_tokenizer
from bigdssm.schema import SCHEMA_FILE, Schema
from bigdssm.source import code_checksum
from bigdssm.tables.beir import BeirWriter

BLOCK_COLUMNS = ("query_id", "doc", "relevance", "sequence", "first", "end")
SEQUENCE_COLUMNS = ("query_key", "query_id", *EVENT_COLUMNS)


@dataclass(frozen=True)
class Target:
    """Where a dataset goes."""

    out: Path
    partition: str = "base"
    overwrite: bool = False
    append: bool = False
    seed: int = 0
    like: Path | None = None  # a dataset whose schema and tokenizer are taken as they are, so that both can be mixed

    def open(self, config: DataConfig, files: Sequence[Path], options: Any) -> DatasetWriter:
        """Return the writer; it goes on from what a killed run made of the same `files` with the same `options`.

        Raises DataError where `out` cannot be written.
        """
        return DatasetWriter(
            self.out, self.partition, config.max_bad_fraction, source=_source(config, self, files, options),
            overwrite=self.overwrite, append=self.append,
        )  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What was made."""

    out: Path
    partition: str
    rows: dict[str, int]  # by split
    num_docs: int
    new_docs: int
    num_bad: int
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def rows_per_s(self) -> float:
        """Return the rows written per second."""
        return sum(self.rows.values()) / self.seconds


class Fitting:
    """The schema on its way from declared (or, appending, from the dataset's) to fitted; `like` has a fitted one."""

    def __init__(self, config: DataConfig, writer: DatasetWriter, like: Path | None = None) -> None:
        if writer.append and like is not None:
            raise ConfigError("--append takes the schema of the dataset that grows; leave out --like")
        self.base = Schema.declared(config)
        fitted = writer.out if writer.append else like
        if fitted is not None:
            declared, self.base = self.base, Schema.load(fitted)
            if difference := declared.difference(self.base):
                raise ConfigError(f"the config's schema is not that of {fitted}: {difference}")
        self._config, self._writer, self._like = config, writer, like
        self.query = SideFitter(stored(self.base.query))
        self.doc = SideFitter(self.base.doc)

    def state(self) -> State:
        """Return what was counted, for `restore`."""
        return {"query": self.query.state(), "doc": self.doc.state()}

    def restore(self, state: State) -> None:
        """Become what gave `state`."""
        self.query.restore(state["query"])
        self.doc.restore(state["doc"])

    def finish(self, texts: Texts) -> tuple[Schema, TextTokenizer | None]:
        """Return the fitted schema and, where it has text, the encoder of the tokenizer (trained on `texts`)."""
        if self._like is not None:
            if not self.base.has_text:
                return self.base, None
            shutil.copytree(self._like / TOKENIZER, self._writer.tokenizer_dir)
            return self.base, TextTokenizer(self._writer.tokenizer_dir)
        grow = self._writer.append
        query = {**self.base.query, **self.query.fitted(grow=grow)}
        schema = replace(self.base, query=query, doc=self.doc.fitted(grow=grow))
        if not schema.has_text:
            return schema, None
        if not grow:
            make_tokenizer(self._config.tokenizer, texts, self._writer.tokenizer_dir)
        return schema, TextTokenizer(self._writer.tokenizer_dir)


def _source(config: DataConfig, target: Target, files: Sequence[Path], options: Any) -> str:
    """Return what a dataset is made of, and with what, as text."""
    inputs = [*files, *([target.like / SCHEMA_FILE] if target.like else []), *_tokenizer_files(config)]
    stats = [
        (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
        for path in inputs
        if path.is_file() and (stat := path.stat())
    ]
    code = (code_checksum(), pa.__version__, tokenizers.__version__, np.__version__)
    return json.dumps(
        [asdict(config), Schema.declared(config).fingerprint(), asdict(options), target.seed, stats, code],
        default=str,
        sort_keys=True,
    )


def _tokenizer_files(config: DataConfig) -> list[Path]:
    path = Path(config.tokenizer.path) if config.tokenizer.path is not None else None
    return sorted(path.glob("*.json")) if path is not None else []


def commit(
    writer: DatasetWriter,
    catalogue: CatalogueWriter,
    schema: Schema,
    text: TextTokenizer | None,
    splits: dict[str, Any],
    counts: np.ndarray,
    started: float,
    notes: Iterable[str],
    beir: BeirWriter | None = None,
) -> Report:
    """Write the catalogue's part, move everything into place and return the report."""
    new_docs = catalogue.num_docs - catalogue.first_new
    checksum = ""
    if new_docs:
        begun = writer.written.get("documents")
        checksum = catalogue.write(writer.catalogue_file, schema.doc, text, writer.spool, begun, writer.note)
    if beir is not None:  # first: the same command must be good for both, and refuses a dataset that is there
        beir.close()
    writer.commit(schema, new_docs, checksum, splits, counts)
    many = [
        f"the {entry['rows']:,} rows of split {split} give {entry['queries']:,} queries"
        for split, entry in splits.items()
        if entry["queries"] != entry["rows"]
    ]
    return Report(
        out=writer.out,
        partition=writer.partition,
        rows={split: entry["rows"] for split, entry in splits.items()},
        num_docs=catalogue.num_docs,
        new_docs=new_docs,
        num_bad=writer.quarantine.num_bad,
        seconds=time.monotonic() - started,
        notes=(*notes, *many),
    )
