"""Changing documents: histories have the versions of their time, everything else the current ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigdssm.config import DataConfig, NegativesConfig, SourceConfig, StageConfig
from bigdssm.dataset.catalogue import Versions
from bigdssm.dataset.dataset import Dataset, open_dataset
from bigdssm.dataset.negatives import NegativeDocuments
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Categorical, History, Numeric, Ragged
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.loader.inspection import sample_rows, verify_dataset
from bigdssm.loader.stream import PairStream
from bigdssm.retrieval.hard_negatives import UniformNegatives
from bigdssm.training.batches import BatchBuilder, read_batches
from bigdssm.training.objective import in_catalogue_share
from tests.unit.ingest.content import content
from tests.unit.ingest.days import DAYS, PAIRS, Facts, facts_of, make_day


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=12))
def test_versions_match_a_brute_force_search(num_docs: int, changes: list[tuple[int, int]]) -> None:
    changes = sorted({(doc % num_docs, since) for doc, since in changes}, key=lambda change: change[1])
    document, since = np.array(changes).T
    versions = Versions.of(num_docs, document, since)
    pairs = [(doc, partition) for doc in range(num_docs) for partition in range(6)]
    documents, partitions = np.array(pairs).T
    newest, seen = {}, {}
    for doc, partition in pairs:
        known = [num_docs + n for n, (of, from_) in enumerate(changes) if of == doc]
        newest[doc] = [doc, *known][-1]
        seen[doc, partition] = [doc, *(place for place in known if since[place - num_docs] <= partition)][-1]
    assert versions.file_rows(np.arange(num_docs)).tolist() == list(newest.values())
    rows = versions.visible_rows(documents, partitions)
    assert versions.file_rows(rows).tolist() == list(seen.values())
    assert (rows < num_docs).tolist() == [seen[pair] == newest[pair[0]] for pair in pairs]
    for number in range(-1, len(changes) + 1):  # the last one is not a version
        every = np.arange(num_docs)
        own = [0 <= number < len(changes) and changes[number][0] == doc for doc in every]
        places = versions.file_rows(versions.visible_rows(every, every, np.full(num_docs, number)))
        assert places.tolist() == np.where(own, num_docs + number, every).tolist(), (
            "a version number of another document falls back to the document's first version"
        )


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versions")
    for day in range(DAYS):
        make_day(folder, day)
    return folder / "data"


def known_facts(dataset: Dataset, rows: np.ndarray) -> list[Facts]:
    names = list(dataset.schema.doc["kind"].vocabulary)
    prices, codes = dataset.catalogue.column("price", rows), dataset.catalogue.codes("kind", rows)
    return [(price, names[code - 2]) for price, code in zip(np.asarray(prices).tolist(), codes.tolist(), strict=True)]


def documents_of(dataset: Dataset, rows: np.ndarray) -> list[int]:
    return [int(key[1:]) for key in dataset.catalogue.keys(rows)]


def test_rows_and_the_catalogue_use_the_newest_versions(grown: Path) -> None:
    dataset = Dataset.open(grown)
    everything = np.arange(dataset.catalogue.num_docs)
    docs = documents_of(dataset, everything)
    assert sorted(docs) == list(range(20 + 5 * (DAYS - 1))), "each document once"
    assert known_facts(dataset, everything) == [facts_of(doc, DAYS - 1) for doc in docs]
    assert dataset.catalogue.titles(dataset.catalogue.rows_by_key(["d0", "d1"])) == ["title 0", "renamed on day 2"]
    assert len(dataset.catalogue.doc_ids) == len(docs) == len(dataset.doc_counts())
    for partitions in (None, ["day0"], ["day1", "day2"]):
        opened = Dataset.open(grown, partitions)
        for split in ("train", "validation", "test"):
            for rows in opened.iterate(split, 50):
                assert (rows.doc_rows < len(docs)).all()
                expected = [facts_of(doc, DAYS - 1) for doc in documents_of(opened, rows.doc_rows)]
                assert known_facts(opened, rows.doc_rows) == expected, "whatever the day of the row"
    assert verify_dataset(grown) == []


def test_an_append_writes_changed_documents_only(tmp_path: Path) -> None:
    reports = [make_day(tmp_path, 0)]
    before = content(tmp_path / "data")
    reports.append(make_day(tmp_path, 1))
    assert (reports[0].new_docs, reports[0].changed_docs) == (20, 0)
    assert (reports[1].new_docs, reports[1].changed_docs) == (5, 8)  # 0, 3, … 18, and the title of 1
    assert "rows have other features for the same id; the first row's are used" in " ".join(reports[1].notes)
    after = content(tmp_path / "data")
    kept = [name for name in before if name.startswith(("partitions/", "catalogue/"))]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert len(pa.ipc.open_file(tmp_path / "data/catalogue/versions-000000.arrow").read_all()) == 8
    described = tmp_path / "data" / "dataset.json"
    content_of = described.read_text()
    described.write_text(content_of.replace('"since": "day1"', '"since": "day9"'))
    with pytest.raises(DataError, match=r"versions-000000.arrow belongs to no partition"):
        Dataset.open(tmp_path / "data")
    described.write_text(content_of)
    (tmp_path / "data/catalogue/versions-000000.arrow").unlink()
    with pytest.raises(DataError, match=r"versions-000000.arrow is missing"):
        Dataset.open(tmp_path / "data")


@pytest.mark.parametrize("kind", ["in_batch", "uniform", "hard", "catalogue"])
def test_no_column_of_a_step_has_a_version_of_its_event(grown: Path, kind: str) -> None:
    """A positive in the version of its day would be recognized by its price alone."""
    dataset = Dataset.open(grown)
    num_docs, world_size = dataset.catalogue.num_docs, 2
    negatives = {"hard": NegativesConfig(hard=3), "uniform": NegativesConfig(uniform=8), "in_batch": NegativesConfig(),
                 "catalogue": NegativesConfig(columns="catalogue")}[kind]  # fmt: skip
    shares: list[int] = []
    for rank in range(world_size):
        stream = PairStream(dataset, rows_global=240, lanes=4, rank=rank, world_size=world_size)
        hard = UniformNegatives(NegativeDocuments(num_docs)) if kind == "hard" else None
        make = BatchBuilder(stream, StageConfig(negatives=negatives), hard_negatives=hard)
        batch = next(read_batches(stream, make, torch.device("cpu")))
        assert len(set(batch.query["day"].tolist())) == DAYS
        docs = documents_of(dataset, batch.doc_rows.numpy())
        assert len(docs) == len(set(docs)), "one column per document"
        assert batch.doc["price"].tolist() == [facts_of(doc, DAYS - 1)[0] for doc in docs]
        assert batch.doc_ids.tolist() == dataset.catalogue.ids(batch.doc_rows.numpy()).tolist()
        shares += batch.doc_rows[in_catalogue_share(batch, rank, world_size)].tolist()
    assert kind != "catalogue" or sorted(shares) == list(range(num_docs))


def test_sources_of_a_mixture_have_the_newest_versions_of_their_catalogues(grown: Path, tmp_path: Path) -> None:
    target = IngestTarget(tmp_path / "other", "day0", like=grown, processes=1)
    make_pairs(PAIRS, PairTables((grown.parent / "0.parquet",), doc_id_column="id"), target)
    sources = (SourceConfig(dir=str(tmp_path / "other")), SourceConfig(dir=str(grown)))
    for mixture in (sources, sources[::-1]):
        dataset = open_dataset(replace(PAIRS, mixture=mixture, lanes=4))
        assert dataset.catalogue.num_docs == 20 + 30
        day_of_row = np.repeat([0, DAYS - 1], [20, 30])
        newest = day_of_row if mixture is sources else day_of_row[::-1]
        for rows in dataset.iterate("train", 100):
            docs = documents_of(dataset, rows.doc_rows)
            expected = [facts_of(*pair) for pair in zip(docs, newest[rows.doc_rows].tolist(), strict=True)]
            assert known_facts(dataset, rows.doc_rows) == expected


def test_a_feature_of_the_name_of_their_column_is_refused_before_anything_is_damaged(tmp_path: Path) -> None:
    """A feature must not have the name of the version column."""
    config = DataConfig(dir="", query={"q": Numeric()}, doc={"document": Categorical()})
    for day, kinds in enumerate((["x", "y"], ["x", "y"], ["x", "z"])):
        table = pa.table({"q": [1.0, 2.0] * 20, "id": ["a", "b"] * 20, "document": kinds * 20})
        pq.write_table(table, tmp_path / "pairs.parquet")
        pairs = PairTables((tmp_path / "pairs.parquet",), doc_id_column="id")
        target = IngestTarget(tmp_path / "data", f"day{day}", append=day > 0, processes=1)
        if day < 2:
            make_pairs(config, pairs, target)
            continue
        with pytest.raises(ConfigError, match=r"data.doc.document: .* 1 documents have changed; rebuild"):
            make_pairs(config, pairs, target)
    assert len(Dataset.open(tmp_path / "data").partitions) == 2


ITEMS = ("a", "b", "c", "d")
SEQUENCES = DataConfig(
    time_unit="s",
    dir="",
    query={"past": History(of="kind", max_items=4)},
    doc={"kind": Categorical(), "price": Numeric()},
    title="item_id",
)


def write_items(folder: Path, day: int) -> InteractionTables:
    kinds = [f"{item} of day {day if item in 'ac' else 0}" for item in ITEMS]
    tables: dict[str, dict[str, Any]] = {
        "items": {"item_id": ITEMS, "kind": kinds, "price": [1.0, 2.0, 3.0 + day, 4.0]},
        "events": {
            "user_id": ["u"] * 4 + ["v"] * 4,
            "item_id": [*ITEMS, *reversed(ITEMS)],
            "timestamp": [10 * day + t for t in (0, 1, 2, 3) * 2],
        },
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}{day}.parquet")
    return InteractionTables(folder / f"events{day}.parquet", folder / f"items{day}.parquet", split="train")


def test_histories_use_the_item_versions_of_their_partition(tmp_path: Path) -> None:
    for day in range(2):
        target = IngestTarget(tmp_path / "data", f"day{day}", append=day > 0, processes=1)
        report = make_interactions(SEQUENCES, write_items(tmp_path, day), target)
    assert (report.new_docs, report.changed_docs) == (0, 2)
    dataset = Dataset.open(tmp_path / "data")
    names = ["", "", *dataset.schema.doc["kind"].vocabulary]
    assert dataset.sequences is not None
    met = set()
    for rows in dataset.iterate("train", 3):
        assert rows.sequence is not None and rows.position is not None
        users, past = dataset.sequences.strings("query_key", rows.sequence), rows.query["past"]
        assert isinstance(past, Ragged)
        for row, (user, place) in enumerate(zip(users, rows.position.tolist(), strict=True)):
            order = [*(ITEMS if user == "u" else ITEMS[::-1])] * 2
            day = int(rows.sequence[row] >= 2)
            met.add((user, day, place))
            expected = [f"{item} of day {day if item in 'ac' else 0}" for item in order[max(0, place - 4) : place]]
            assert [names[code] for code in past[row].tolist()] == expected
            assert dataset.catalogue.keys(rows.doc_rows[[row]]) == [order[place]]
            code = dataset.catalogue.codes("kind", rows.doc_rows[[row]])[0]
            assert names[code] == f"{order[place]} of day {1 if order[place] in 'ac' else 0}", "documents are newest"
    assert met == {(user, 0, place) for user in "uv" for place in (1, 2, 3)} | {
        (user, 1, place) for user in "uv" for place in (4, 5, 6, 7)
    }
    assert len(sample_rows(dataset, count=14)) == 14
