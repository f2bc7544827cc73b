"""A sample of mined negatives as texts, for people to judge how many are no negatives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import PLACE_BITS
from bigdssm.errors import DataError
from bigdssm.retrieval.mined import MinedNegatives, choose_negatives, rows_of_queries
from bigdssm.retrieval.texts import Texts

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
    texts = Texts(dataset)
    num_rows, queries = dataset.num_rows("train"), mined.queries
    if len(queries) and (last := queries[-1] >> PLACE_BITS) >= num_rows:
        raise DataError(f"negatives were mined for row {last}, but {dataset.dir} has {num_rows} train rows")
    wanted = queries[np.linspace(0, len(queries) - 1, min(count, len(queries))).astype(np.int64)]
    found = []
    for taken in rows_of_queries(dataset, wanted, ROWS_AT_ONCE):
        negative = choose_negatives(mined.windows(taken.query_keys), taken, 0, seed, 1)[:, 0].astype(np.int64)
        own, other = (texts.documents(docs) for docs in (taken.doc_rows.astype(np.int64), np.maximum(negative, 0)))
        columns = (taken.row_ids.tolist(), texts.queries(taken), own, other, negative.tolist())
        found += [Judged(*values) for *values, row in zip(*columns, strict=True) if row >= 0]
    return found
