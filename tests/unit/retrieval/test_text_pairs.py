"""Labeled pairs of texts for the trainer of a cross-encoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.retrieval.hard_negatives import HardNegatives, window_records
from bigdssm.retrieval.reranking import Texts
from bigdssm.retrieval.text_pairs import write_text_pairs
from bigdssm.utils.array_file import new_array, seal
from tests.conftest import TinyDataset


def hard_negatives(file: Path, dataset: Dataset, width: int) -> HardNegatives:
    """Write windows of the documents behind the positive, the last one absent."""
    (rows,) = dataset.iterate("train", 10_000)
    windows = (rows.doc_rows[:, None] + np.arange(1, width + 1)) % dataset.catalogue.num_docs
    windows[:, -1] = -1
    records = window_records(rows.query_keys, windows)
    file.parent.mkdir(exist_ok=True)
    new_array(file, records.dtype, records.shape)[:] = records
    seal(file, dataset.rows_fingerprint)
    return HardNegatives.open(file)


def test_a_query_has_its_document_and_distinct_negatives(tmp_path: Path, tiny_pairs: TinyDataset) -> None:
    dataset = Dataset.open(tiny_pairs.dir)
    hard = hard_negatives(tmp_path / "hard/negatives.npy", dataset, 5)
    num_pairs = write_text_pairs(tmp_path / "pairs.parquet", dataset, hard, 3)
    pairs = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    (rows,) = dataset.iterate("train", 10_000)
    relevant = rows.take(np.flatnonzero(rows.relevance > 0))
    texts = Texts.of(dataset)
    assert num_pairs == len(pairs) == 4 * len(relevant), "rows of relevance 0 have no pair"
    positives = [(pair["query"], pair["document"]) for pair in pairs if pair["label"] == 1]
    expected = zip(texts.queries(relevant.query), texts.documents(relevant.doc_rows.astype(np.int64)), strict=True)
    assert positives == list(expected)
    every_text = texts.documents(np.arange(dataset.catalogue.num_docs))
    for first, doc in zip(range(0, len(pairs), 4), relevant.doc_rows.tolist(), strict=True):
        of_query = pairs[first : first + 4]
        assert [pair["label"] for pair in of_query] == [1, 0, 0, 0]
        window = [every_text[(doc + i) % len(every_text)] for i in range(1, 5)]
        assert {pair["document"] for pair in of_query[1:]} <= set(window)


def test_absent_negatives_are_left_out(tmp_path: Path, tiny_pairs: TinyDataset) -> None:
    dataset = Dataset.open(tiny_pairs.dir)
    hard = hard_negatives(tmp_path / "hard/negatives.npy", dataset, 2)
    write_text_pairs(tmp_path / "pairs.parquet", dataset, hard, 3)
    labels = pq.read_table(tmp_path / "pairs.parquet")["label"].to_numpy()
    assert labels.tolist() == [1, 0] * (len(labels) // 2), "the window has one document"


def test_a_side_without_text_is_refused(tmp_path: Path, tiny_interactions: TinyDataset) -> None:
    dataset = Dataset.open(tiny_interactions.dir)
    hard = hard_negatives(tmp_path / "hard/negatives.npy", dataset, 2)
    with pytest.raises(ConfigError, match="needs a text feature on both sides"):
        write_text_pairs(tmp_path / "pairs.parquet", dataset, hard, 1)
