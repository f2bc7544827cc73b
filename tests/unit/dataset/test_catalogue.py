"""The catalogue: mapped, in several files and record batches, read by row and by key."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bigdssm.dataset.catalogue import Catalogue, MappedTable
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import DataError
from bigdssm.features import Ragged
from bigdssm.loader.batch import to_features
from bigdssm.utils.hashing import hash64
from tests.tiny_datasets import NUM_DOCS, Writer, write_arrow


def test_documents_by_row_and_key(interactions: Path) -> None:
    dataset = Dataset.open(interactions)
    catalogue, declared = dataset.catalogue, dataset.schema.doc
    assert catalogue.num_docs == NUM_DOCS
    assert catalogue.doc_ids.tolist() == [hash64(f"d{i}") for i in range(NUM_DOCS)]
    rows = np.array([36, 0, 20, 19, 20])  # either side of the record batches' border, out of order, twice
    assert catalogue.keys(rows) == ["d36", "d0", "d20", "d19", "d20"]
    assert catalogue.titles(rows[:2]) == ["Document 36", "Document 0"]
    assert catalogue.ids(rows).tolist() == catalogue.doc_ids[rows].tolist()
    features = to_features(declared, catalogue.columns(rows))
    assert features["item"].tolist() == (rows + 2).tolist()
    assert features["tags"].tolist() == [[0, 0], [0, 0], [4, 4], [3, 0], [4, 4]]
    assert catalogue.rows_by_key(["d20", "nobody", "d0", ""]).tolist() == [20, -1, 0, -1]
    assert catalogue.rows_by_key([]).tolist() == []
    assert catalogue.keys(np.empty(0, np.int64)) == []
    assert to_features(declared, catalogue.columns(np.empty(0, np.int64)))["tags"].shape == (0, 1)


def test_parts_in_several_files_are_one_table(tmp_path: Path) -> None:
    values = [[i] * (i % 4) for i in range(50)]
    table = pa.table({"list": pa.array(values, pa.large_list(pa.int32())), "number": pa.array(np.arange(50))})
    paths = []
    for number, (first, last, rows_per_batch) in enumerate([(0, 17, 5), (17, 17, 5), (17, 50, 100)]):
        paths.append(tmp_path / f"{number}.arrow")
        write_arrow(paths[-1], table.slice(first, last - first), rows_per_batch)
    mapped = MappedTable(paths)
    assert (mapped.num_rows, mapped.rows_per_file) == (50, [17, 0, 33])
    rows = np.array([49, 3, 3, 17, 16, 0])
    assert mapped.take("number", rows).tolist() == rows.tolist()
    lists = mapped.take("list", rows)
    assert isinstance(lists, Ragged)
    assert [lists[i].tolist() for i in range(len(rows))] == [values[row] for row in rows]
    begin = np.array([0, 1, 0, 1, 0, 0])
    cut = mapped.take_slices("list", rows, begin, mapped.lengths("list", rows))
    assert [cut[i].tolist() for i in range(len(rows))] == [values[r][b:] for r, b in zip(rows, begin, strict=True)]
    assert mapped.column("number").tolist() == list(range(50))


def test_damage_of_a_catalogue_is_named(tmp_path: Path) -> None:
    schema = Writer(tmp_path / "data").schema
    path = tmp_path / "c.arrow"
    write_arrow(path, pa.table({"doc_key": ["a"], "doc_id": [1], "doc_title": ["A"], "item": [2]}))
    with pytest.raises(DataError, match="no column tags"):
        Catalogue([path], schema, 0)
    path.write_bytes(b"not arrow")
    with pytest.raises(DataError, match="no readable Arrow file"):
        Catalogue([path], schema, 0)
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        Catalogue([path], schema, 0)
    write_arrow(path, pa.table({"n": pa.array([1, None])}))
    with pytest.raises(DataError, match="column n has nulls"):
        MappedTable([path]).take("n", np.array([0]))
