"""Typed queries become what the training rows were."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Categorical, Numeric, Ragged, Text, TextTokenizer, Vocabulary
from bigdssm.features.ragged import Column
from bigdssm.retrieval.search import DocumentNames, feature_query, history_query, user_query
from bigdssm.schema import Schema


def listed(column: Column) -> list[object]:
    return [column[0].tolist()] if isinstance(column, Ragged) else column.tolist()


def test_a_known_user_has_features_and_the_whole_history(dataset: Dataset) -> None:
    rows = next(dataset.iterate("test", 1000))
    assert dataset.sequences is not None
    for i in (0, 5, 17):
        key = dataset.sequences.strings("query_key", rows.sequence[i : i + 1])[0]
        query = user_query(dataset, key)
        assert query.seen.tolist() == [*rows.seen(i), rows.doc_rows[i]]  # the test item is history by now
        assert listed(query.columns["age"]) == [20.0 + int(key[1:]) % 50]
        newest = dataset.catalogue.codes("item_id", query.seen[-10:])
        assert listed(query.columns["history"]) == [newest.tolist()]
        assert list(query.columns) == list(dataset.schema.query)
    with pytest.raises(DataError, match="no user is called 'u999'; some who are: u"):
        user_query(dataset, "u999")


def test_a_typed_history(dataset: Dataset) -> None:
    titles = dataset.catalogue.display(np.array([4, 9]))
    documents = DocumentNames.of(dataset)
    query = history_query(dataset, documents, [titles[0].upper(), "i9"])
    assert query.seen.tolist() == [4, 9]
    assert listed(query.columns["history"]) == [dataset.catalogue.codes("item_id", query.seen).tolist()]
    assert np.isnan(query.columns["age"]).all()
    assert listed(query.columns["occupation"]) == [0]
    assert history_query(dataset, documents, []).seen.tolist() == []


def test_unknown_documents_get_the_nearest_names() -> None:
    documents = DocumentNames(["1", "2", "3", "4"], ["Toy Story", "Toy Story 2", "GoldenEye", "Heat"])
    assert documents.find([" toy story ", "3"]).tolist() == [0, 2]
    with pytest.raises(DataError, match=r"'story'; the nearest are: Toy Story; Toy Story 2$"):
        documents.find(["story"])
    with pytest.raises(DataError, match=r"the nearest are: GoldenEye$"):
        documents.find(["Goldeneey"])


def test_typed_features(dataset: Dataset) -> None:
    schema = Schema(
        query={
            "words": Text(max_tokens=4).named("words"),
            "more": Text(max_tokens=6).named("more"),
            "age": Numeric().named("age"),
            "sex": Categorical(vocabulary=Vocabulary.of(("m", "f"))).named("sex"),
            "tags": Categorical(multi=True, separator="|", vocabulary=Vocabulary.of(("a b", "c"))).named("tags"),
        }
    )
    assert dataset.tokenizer_dir is not None
    tokenizer = TextTokenizer(dataset.tokenizer_dir)
    query = feature_query(
        schema, {"words": "stone anchor stone anchor", "age": "3.5", "sex": "f", "tags": "c| a b|z"}, tokenizer
    )
    ids, _ = tokenizer.encode(pa.array(["stone anchor stone anchor"]), 4)
    assert listed(query.columns["words"]) == [ids.tolist()]
    assert len(ids) == 4
    assert len(query.columns["more"].values) >= 1  # an empty text still has its special tokens
    assert [listed(query.columns[name]) for name in ("age", "sex", "tags")] == [[3.5], [3], [[3, 2, 1]]]
    assert list(query.columns) == list(schema.query)
    with pytest.raises(ConfigError, match="colour is not a query feature that can be typed; these are: words, "):
        feature_query(schema, {"colour": "red"}, tokenizer)
    with pytest.raises(ConfigError, match="age is 'old', needs a number"):
        feature_query(schema, {"age": "old"}, tokenizer)
