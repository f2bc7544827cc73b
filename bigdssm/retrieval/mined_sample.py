"""A sample of mined negatives as texts, for people to judge how many are no negatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import PLACE_BITS
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Column, Ragged, TextTokenizer, texts_of
from bigdssm.retrieval.mined import MinedNegatives, choose_negatives

ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Judged:
    """What training takes for a query, its document, and a document that is none of the query's."""

    row_id: int
    query: str
    document: str
    negative: str


def mined_sample(dataset: Dataset, mined: MinedNegatives, count: int, seed: int = 0) -> list[Judged]:
    """Return `count` negatives of evenly spaced mined queries, one each, as `choose_negatives` draws them for `seed`.

    Texts are shown as the towers read them: cut, in the tokenizer's case. Raises ConfigError where a side has no text,
    DataError where `mined` is of another dataset's rows.
    """
    features = list(texts_of(dataset.schema.query)), list(texts_of(dataset.schema.doc))
    tokenizer = dataset.tokenizer
    if not all(features) or tokenizer is None:
        raise ConfigError(f"{dataset.dir} has a side without a text feature; there is nothing to read")
    num_rows, queries = dataset.num_rows("train"), mined.queries
    if len(queries) and (last := queries[-1] >> PLACE_BITS) >= num_rows:
        raise DataError(f"negatives were mined for row {last}, but {dataset.dir} has {num_rows} train rows")
    wanted = queries[np.linspace(0, len(queries) - 1, min(count, len(queries))).astype(np.int64)]
    found = []
    for rows in dataset.iterate("train", ROWS_AT_ONCE):
        taken = rows.take(np.flatnonzero(np.isin(rows.query_keys, wanted)))
        if not len(taken):
            continue
        negative = choose_negatives(mined.windows(taken.query_keys), taken, 0, seed, 1)[:, 0].astype(np.int64)
        asked = _read(taken.query, features[0], tokenizer)
        own = _read(dataset.catalogue.columns(taken.doc_rows.astype(np.int64)), features[1], tokenizer)
        other = _read(dataset.catalogue.columns(np.maximum(negative, 0)), features[1], tokenizer)
        columns = (taken.row_ids.tolist(), asked, own, other, negative.tolist())
        found += [Judged(*values) for *values, row in zip(*columns, strict=True) if row >= 0]
    return found


def _read(columns: Mapping[str, Column], names: list[str], tokenizer: TextTokenizer) -> list[str]:
    """Return the texts of the rows, several of one row parted by a bar."""
    parts = [tokenizer.decode(cast(Ragged, columns[name])) for name in names]
    return [" | ".join(row) for row in zip(*parts, strict=True)]
