"""Rows that are segments of sequences: a query per target, with a common start of the history."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from bigdssm.config import DataConfig
from bigdssm.dataset.blocks import read_block
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EventSlices, Rows
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Categorical, History
from bigdssm.features.ragged import Ragged
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.loader.batch import Collator
from bigdssm.loader.step_plan import plan_side
from bigdssm.loader.stream import PairStream
from bigdssm.training.batches import history_pairs
from tests.tiny_datasets import Writer, write_arrow

TARGETS = 4
NUM_DOCS, EVENTS, MAX_ITEMS = 37, 30, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Writer(tmp_path_factory.mktemp("pieces") / "data", targets_per_row=TARGETS).write()


def events(row: int) -> list[int]:
    return [(row % 11 + event) % NUM_DOCS for event in range(EVENTS)]


def piece(row: int) -> tuple[int, int]:
    first = row % (EVENTS + 1 - TARGETS)
    return first, first + 1 + row % TARGETS


def test_a_row_gives_a_query_for_each_target(folder: Path) -> None:
    dataset = Dataset.open(folder)
    assert dataset.num_queries("train") == sum(1 + row % TARGETS for row in range(1000)) > dataset.num_rows("train")
    stream = PairStream(dataset, rows_global=50, lanes=5)
    assert stream.queries_per_step == 50 * dataset.num_queries("train") / 1000
    for rows in islice(stream, 21):
        expected = [(i, position) for i, row in enumerate(rows.row_ids.tolist()) for position in range(*piece(row))]
        assert rows.row is not None and rows.position is not None
        assert list(zip(rows.row.tolist(), rows.position.tolist(), strict=True)) == expected
        seen, offsets = rows.seen_ragged()
        for query, (i, position) in enumerate(expected):
            items = events(int(rows.row_ids[i]))
            assert rows.doc_rows[query] == items[position] and rows.relevance[query] == items[position] % 3 / 2
            assert seen[offsets[query] : offsets[query + 1]].tolist() == rows.seen(query).tolist() == items[:position]
        for i, row in enumerate(rows.row_ids.tolist()):
            end = piece(row)[1]
            left = max(0, end - 1 - MAX_ITEMS)
            assert rows.query["history"][i].tolist() == [item + 2 for item in events(row)[left : end - 1]]


def test_iterating_gives_each_query_a_row(folder: Path) -> None:
    """With its full history as in serving, not from the start of its segment."""
    dataset = Dataset.open(folder)
    expected = [(row, position) for row in range(1000) for position in range(*piece(row))]
    found = []
    for rows in dataset.iterate("train", 64):
        assert (
            rows.position is not None
            and rows.row_of_query.tolist() == list(range(len(rows)))
            and len(rows) == rows.num_queries <= 64
        )
        found += list(zip(rows.row_ids.tolist(), rows.position.tolist(), strict=True))
        for i, (row, position) in enumerate(zip(rows.row_ids.tolist(), rows.position.tolist(), strict=True)):
            items = events(row)
            assert rows.query["history"][i].tolist() == [item + 2 for item in items[:position][-MAX_ITEMS:]]
            assert rows.query["age"][i] == row % 11 and rows.doc_rows[i] == items[position]  # type: ignore[index]
    assert found == expected


def test_rows_are_taken_with_their_queries(folder: Path) -> None:
    first, second = islice(PairStream(folder, rows_global=50, lanes=5), 2)
    chosen = np.array([7, 3, 3])
    part = first.take(chosen)
    assert part.row_ids.tolist() == first.row_ids[chosen].tolist()
    assert part.row is not None and part.position is not None
    wanted = [(i, position) for i, row in enumerate(part.row_ids.tolist()) for position in range(*piece(row))]
    assert list(zip(part.row.tolist(), part.position.tolist(), strict=True)) == wanted
    both = Rows.concat([part, second.take(np.arange(3))])
    assert both.num_queries == part.num_queries + sum(1 + int(row) % TARGETS for row in second.row_ids[:3])
    assert both.doc_rows.tolist() == [events(int(both.row_ids[r]))[p] for r, p in zip(both.row, both.position)]  # type: ignore[arg-type]  # noqa: B905


def test_a_batch_has_query_positions(folder: Path) -> None:
    dataset = Dataset.open(folder)
    rows = next(PairStream(dataset, rows_global=50, lanes=5))
    batch = Collator(dataset.schema, dataset.catalogue)(rows)
    assert batch.query_positions is not None and batch.queries_of_row is not None
    assert batch.queries_of_row.tolist() == [1 + row % TARGETS for row in rows.row_ids.tolist()]
    assert len(batch.row_ids) == 50 and len(batch.query_ids) == len(batch.positive) == rows.num_queries
    for row, seen, column in zip(
        *(part.tolist() for part in batch.query_positions[:2]), batch.positive.tolist(), strict=True
    ):
        number = int(batch.row_ids[row])
        position = int(batch.doc_rows[column])
        items = events(number)
        left = max(0, piece(number)[1] - 1 - MAX_ITEMS)
        assert items[left + seen] == position  # its history is items[left : left + seen], and its target comes next
        assert (batch.query["history"][row, :seen] > 0).all()


def test_a_plan_counts_queries_and_keeps_them_with_their_rows() -> None:
    lengths: dict = {}
    plan = plan_side(lengths, 4, 5, np.array([2, 0, 3, 1]))
    assert plan.order.tolist() == [0, 1, 2, 3]
    assert [chunk.num_outputs for chunk in plan.chunks] == [5, 1]
    assert plan.outputs.tolist() == [0, 1, 2, 3, 4, 5] and plan.row_in_chunk.tolist() == [0, 0, 2, 2, 2, 0]
    assert [chunk.tokens for chunk in plan.chunks] == [5, 1]
    whole = plan_side(lengths, 4, 0, np.array([2, 0, 3, 1]))
    assert whole.row_in_chunk.tolist() == [0, 0, 2, 2, 2, 3] and whole.chunks[0].num_outputs == 6


def spoil_targets(folder: Path) -> None:
    """Give every event 12 an invalid relevance, and every event 3 an unknown item."""
    path = folder / "partitions/all/sequences-000000.arrow"
    table = pa.ipc.open_file(path.read_bytes()).read_all().to_pydict()
    for items, relevance in zip(table["items"], table["relevance"], strict=True):
        relevance[12], items[3] = float("nan"), 99
    types = {"items": pa.large_list(pa.int32()), "relevance": pa.large_list(pa.float32()), "age": pa.float32()}
    write_arrow(path, pa.table({name: pa.array(values, types.get(name)) for name, values in table.items()}))


def test_a_bad_target_does_not_discard_its_row(tmp_path: Path) -> None:
    folder = Writer(tmp_path / "data", targets_per_row=TARGETS).write()
    spoil_targets(folder)
    dataset = Dataset.open(folder)
    log = tmp_path / "quarantine.jsonl"
    bad_positions = {3, 12}
    stream = PairStream(dataset, rows_global=50, lanes=5, max_bad_fraction=1.0, quarantine=log)
    met = set()
    for rows in islice(stream, 22):
        assert rows.row is not None and rows.position is not None
        for i, row in enumerate(rows.row_ids.tolist()):
            its = rows.position[rows.row == i].tolist()
            assert its == [position for position in range(*piece(row)) if position not in bad_positions] and its
            met.add(row)
    alone = {row for row in range(1000) if set(range(*piece(row))) <= bad_positions}
    assert alone and met == set(range(1000)) - alone
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    whole = {64 * line["block"] + line["row"] for line in lines if line["position"] is None}
    single = {(64 * line["block"] + line["row"], line["position"]) for line in lines if line["position"] is not None}
    assert whole == alone
    assert single == {(row, p) for row in set(range(1000)) - alone for p in range(*piece(row)) if p in bad_positions}
    assert {line["rows"] for line in lines if line["position"] is not None} == {0}


def test_bad_targets_count_as_parts_of_rows(tmp_path: Path) -> None:
    folder = Writer(tmp_path / "data", targets_per_row=TARGETS).write()
    spoil_targets(folder)
    dataset = Dataset.open(folder)
    queries = dataset.num_queries("train")
    left_out = sum(position in (3, 12) for row in range(1000) for position in range(*piece(row)))
    lone = sum(set(range(*piece(row))) <= {3, 12} for row in range(1000))
    gone = sum(1 + row % TARGETS for row in range(1000) if set(range(*piece(row))) <= {3, 12})
    stream = PairStream(dataset, rows_global=50, lanes=5, max_bad_fraction=1.0)
    list(islice(stream, 20))
    assert stream.rows_bad == pytest.approx(lone + (left_out - gone) * 1000 / queries)
    strict = PairStream(dataset, rows_global=50, lanes=5, max_bad_fraction=0.9 * stream.rows_bad / 1000)
    with pytest.raises(DataError, match=r"rows read are bad, more than data\.max_bad_fraction"):
        list(islice(strict, 20))
        strict.check()


def test_items_of_no_catalogue_are_in_no_mask() -> None:
    ids = np.array([70, 71, 72])
    before = Ragged(np.array([0, 99, 2, -3, 1]), np.array([0, 3, 3, 5]))
    assert history_pairs(np.array([5, 6, 7]), before, ids).tolist() == [[5, 70], [5, 72], [7, 71]]


def test_files_of_sequences_that_lack_rows_are_refused(tmp_path: Path) -> None:
    """Sequences are numbered across the files: a missing file would assign them to other users."""
    folder = Writer(tmp_path / "data").write()
    path = folder / "partitions/all/sequences-000000.arrow"
    table = pa.ipc.open_file(path.read_bytes()).read_all()
    write_arrow(path, table.slice(1))
    with pytest.raises(DataError, match=r"sequences have \[10\] rows, partition\.json has \[11\]"):
        Dataset.open(folder)


def test_rows_of_more_targets_than_a_history_has_items_are_left_out(tmp_path: Path) -> None:
    folder = Writer(tmp_path / "data", targets_per_row=MAX_ITEMS + 2).write()
    stream = PairStream(folder, rows_global=50, lanes=5, max_bad_fraction=1.0)
    for rows in islice(stream, 20):
        assert rows.row is not None and rows.position is not None and rows.history_start is not None
        assert np.bincount(rows.row).max() <= MAX_ITEMS and (rows.position >= rows.history_start[rows.row]).all()
    assert stream.rows_bad == sum(1 + row % (MAX_ITEMS + 2) > MAX_ITEMS for row in range(1000))


def test_a_piece_longer_than_a_history_is_refused(tmp_path: Path) -> None:
    """Its first queries would have a negative prefix length."""
    query, doc = {"history": History(of="item_id", max_items=4)}, {"item_id": Categorical()}
    config = DataConfig(dir="x", time_unit="s", query=query, doc=doc, targets_per_row=5)
    with pytest.raises(ConfigError, match=r"targets_per_row: got 5"):
        make_interactions(
            config, InteractionTables(tmp_path / "e.csv", tmp_path / "i.csv"), IngestTarget(tmp_path / "data")
        )


@pytest.mark.parametrize("targets_per_row", [1, 3, 100])
def test_every_event_is_a_target_once_and_rows_are_cut_from_the_newest(targets_per_row: int, tmp_path: Path) -> None:
    lengths = {"a": 8, "b": 2, "c": 4, "d": 3}
    lines = [(user, f"i{(n * 3 + ord(user)) % 9}", n) for user, length in lengths.items() for n in range(length)]
    (tmp_path / "events.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in lines))
    (tmp_path / "items.csv").write_text("item_id\n" + "".join(f"i{n}\n" for n in range(9)))
    config = DataConfig(
        time_unit="s",
        dir="x", query={"history": History(of="item_id", max_items=100)}, doc={"item_id": Categorical()},
        targets_per_row=targets_per_row,
    )  # fmt: skip
    make_interactions(
        config, InteractionTables(tmp_path / "events.csv", tmp_path / "items.csv"), IngestTarget(tmp_path / "data")
    )
    dataset = Dataset.open(tmp_path / "data")
    found: dict[str, list[list[int]]] = {}
    batch, bad = read_block(dataset.index("train"), 0, dataset.layout)
    assert dataset.sequences is not None and batch is not None and not bad
    pieces = batch.to_pydict()
    users = dataset.sequences.strings("query_key", np.array(pieces["sequence"]))
    for user, first, end in zip(users, pieces["first"], pieces["end"], strict=True):
        found.setdefault(user, []).append(list(range(first, end)))
    # leave-one-out: the last two events are validation's and test's, and the first has no history
    for user, length in lengths.items():
        positions = list(range(1, length - 2))
        cut = [positions[max(0, end - targets_per_row) : end] for end in range(len(positions), 0, -targets_per_row)]
        assert sorted(found.get(user, [])) == sorted(cut)
    for split, distance in (("validation", 2), ("test", 1)):
        (held_out,) = dataset.iterate(split, 100)
        assert held_out.position is not None and held_out.sequence is not None
        keys = dataset.sequences.strings("query_key", held_out.sequence)
        expected = {u: n - distance for u, n in lengths.items() if n > distance}
        assert dict(zip(keys, held_out.position.tolist(), strict=True)) == expected
    assert dataset.doc_counts().sum() == sum(max(0, n - 3) for n in lengths.values())


def test_every_sequence_of_a_table_is_in_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigdssm.dataset.rows.SEQUENCES_AT_ONCE", 3)
    table = SimpleNamespace(num_rows=8, lengths=lambda name, sequences: sequences + 1)
    chunks = list(EventSlices.in_chunks(table))  # type: ignore[arg-type]
    assert [chunk.sequence.tolist() for chunk in chunks] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [chunk.end.tolist() for chunk in chunks] == [[1, 2, 3], [4, 5, 6], [7, 8]]
