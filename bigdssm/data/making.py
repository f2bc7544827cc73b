"""What making a dataset from interactions and from pairs share: options, the fitted schema, the report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bigdssm.config import DataConfig
from bigdssm.data.catalogue_writer import CatalogueWriter
from bigdssm.data.dataset_writer import TOKENIZER, DatasetWriter
from bigdssm.data.fit import SideFitter
from bigdssm.data.tokenizer import TextEncoder, Texts, make_tokenizer
from bigdssm.errors import ConfigError
from bigdssm.schema import Feature, Schema

BLOCK_COLUMNS = ("query_id", "doc", "relevance", "sequence", "end")
SEQUENCE_COLUMNS = ("query_key", "query_id", "items")

Progress = Callable[[str, int, int | None], None]
"""Called with phase, done and total (None: unknown)."""


def no_progress(phase: str, done: int, total: int | None) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Target:
    """Where a dataset goes."""

    out: Path
    partition: str = "base"
    overwrite: bool = False
    append: bool = False
    seed: int = 0
    like: Path | None = None  # a dataset whose schema and tokenizer are taken as they are, so that both can be mixed

    def open(self, config: DataConfig) -> DatasetWriter:
        """Return the writer. Raises DataError where `out` cannot be written."""
        return DatasetWriter(
            self.out, self.partition, config.max_bad_fraction, overwrite=self.overwrite, append=self.append
        )


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
        self.query = SideFitter(stored(self.base.query), config.query)
        self.doc = SideFitter(self.base.doc, config.doc)

    def finish(self, texts: Texts) -> tuple[Schema, TextEncoder | None]:
        """Return the fitted schema and, where it has text, the encoder of the tokenizer (trained on `texts`)."""
        if self._like is not None:
            if not self.base.has_text:
                return self.base, None
            shutil.copytree(self._like / TOKENIZER, self._writer.tokenizer_dir)
            return self.base, TextEncoder(self._writer.tokenizer_dir)
        grow = self._writer.append
        query = {**self.base.query, **self.query.fitted(grow=grow)}
        schema = replace(self.base, query=query, doc=self.doc.fitted(grow=grow))
        if not schema.has_text:
            return schema, None
        if not grow:
            make_tokenizer(self._config.tokenizer, texts, self._writer.tokenizer_dir)
        return schema, TextEncoder(self._writer.tokenizer_dir)


def stored(features: dict[str, Feature]) -> dict[str, Feature]:
    """Return the features that have a column; histories follow from the sequences."""
    return {name: feature for name, feature in features.items() if feature.type != "history"}


def text_columns(features: dict[str, Feature]) -> list[str]:
    """Return the names of the text features."""
    return [name for name, feature in features.items() if feature.type == "text"]


def commit(
    writer: DatasetWriter,
    catalogue: CatalogueWriter,
    schema: Schema,
    text: TextEncoder | None,
    splits: dict[str, Any],
    counts: np.ndarray,
    started: float,
    notes: Iterable[str],
) -> Report:
    """Write the catalogue's part, move everything into place and return the report."""
    new_docs = catalogue.num_docs - catalogue.first_new
    checksum = catalogue.write(writer.catalogue_file, schema.doc, text, writer.spool) if new_docs else ""
    writer.commit(schema, new_docs, checksum, splits, counts)
    return Report(
        out=writer.out,
        partition=writer.partition,
        rows={split: entry["rows"] for split, entry in splits.items()},
        num_docs=catalogue.num_docs,
        new_docs=new_docs,
        num_bad=writer.quarantine.num_bad,
        seconds=time.monotonic() - started,
        notes=tuple(notes),
    )
