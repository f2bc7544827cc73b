"""Texts of positives and hard negatives, as labeled pairs for the trainer of a cross-encoder."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigdssm.dataset.dataset import Dataset
from bigdssm.retrieval.hard_negatives import ROWS_AT_ONCE, HardNegatives, rows_of_queries, sample_window
from bigdssm.retrieval.reranking import Texts
from bigdssm.utils.atomic import new_file

PAIR_SCHEMA = pa.schema([("query", pa.string()), ("document", pa.string()), ("label", pa.float32())])


def write_text_pairs(out: Path, dataset: Dataset, hard: HardNegatives, per_query: int, seed: int = 0) -> int:
    """Write a Parquet file of labeled pairs, and return their number.

    Each query has its document with the label 1, and up to `per_query` of its hard negatives, sampled by `seed`, with
    the label 0. The texts are those that the towers read: truncated, in the tokenizer's case. Raises ConfigError: a
    side has no text.
    """
    texts = Texts.of(dataset)
    num_pairs = 0
    with new_file(out) as temporary, pq.ParquetWriter(temporary, PAIR_SCHEMA) as writer:
        for rows in rows_of_queries(dataset, hard.queries, ROWS_AT_ONCE):
            negatives = sample_window(hard.windows(rows.query_keys), rows, 0, seed, per_query)
            documents = np.concatenate([rows.doc_rows[:, None], negatives], axis=1).astype(np.int64)
            is_relevant = (rows.relevance > 0)[:, None]
            query, column = np.nonzero((documents >= 0) & is_relevant)
            queries = texts.queries(rows.query)
            pairs = {
                "query": [queries[i] for i in query],
                "document": texts.documents(documents[query, column]),
                "label": (column == 0).astype(np.float32),
            }
            writer.write_table(pa.table(pairs, schema=PAIR_SCHEMA))
            num_pairs += len(query)
    return num_pairs
