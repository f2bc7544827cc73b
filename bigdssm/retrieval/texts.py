"""Texts of queries and documents without prompts: truncated, and lowercased if the tokenizer does so."""

from collections.abc import Mapping
from typing import cast

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.errors import ConfigError
from bigdssm.features import Column, Ragged, Text, TextTokenizer, texts_of


class Texts:
    """The texts of a dataset's rows; several text features are joined by a bar."""

    def __init__(self, dataset: Dataset) -> None:
        """Raises ConfigError: a side has no text feature."""
        self._query, self._doc = texts_of(dataset.schema.query), texts_of(dataset.schema.doc)
        if not (self._query and self._doc) or dataset.tokenizer is None:
            raise ConfigError(f"{dataset.dir}: needs a text feature on both sides")
        self._catalogue, self._tokenizer = dataset.catalogue, dataset.tokenizer

    def queries(self, rows: Rows) -> list[str]:
        """Return the texts of the rows' queries."""
        return _read(rows.query, self._query, self._tokenizer)

    def documents(self, doc_rows: np.ndarray) -> list[str]:
        """Return the texts of catalogue rows, int64 [n]."""
        return _read(self._catalogue.columns(doc_rows), self._doc, self._tokenizer)


def _read(columns: Mapping[str, Column], features: Mapping[str, Text], tokenizer: TextTokenizer) -> list[str]:
    parts = [feature.decode(cast(Ragged, columns[name]), tokenizer) for name, feature in features.items()]
    return [" | ".join(row) for row in zip(*parts, strict=True)]
