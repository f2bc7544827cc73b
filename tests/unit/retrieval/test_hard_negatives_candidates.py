"""Candidate windows from ratings and from a table of impressions, each against a loop over the rows."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml

from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.retrieval.hard_negatives import HardNegatives
from bigdssm.retrieval.mining import write_rated
from tests.command_line import Tools
from tests.conftest import PAIRS_DATA, WORDS, pick

NUM_QUERIES, NUM_DOCS = 30, 40


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path]:
    """A dataset of 30 queries with ten ratings from 0 to 4, some repeated; and a table of impressions."""
    root = tmp_path_factory.mktemp("rated")
    with (root / "pairs.jsonl").open("w") as pairs, (root / "shown.jsonl").open("w") as shown:
        for query in range(NUM_QUERIES):
            for turn in range(10):
                doc = pick("doc", query, turn, below=NUM_DOCS)
                row = {"user": f"u{query}", "query": WORDS[query], "doc": f"d{doc}", "text": f"{WORDS[doc]} text"}
                grade = pick("grade", query, doc, turn, below=5)
                pairs.write(json.dumps({**row, "section": "a", "tags": [], "size": 1, "relevance": grade}) + "\n")
                beside = [f"d{pick('shown', query, turn, i, below=NUM_DOCS + 3)}" for i in range(turn % 4)]
                places = [1 + pick("at", query, turn, i, below=9) for i in range(1 + len(beside))]
                row = {"user": f"u{query}", "doc": f"d{doc}", "beside": beside, "places": places}
                shown.write(json.dumps(row) + "\n")
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump({"run": {"dir": "run"}, "data": {"dir": str(root / "dataset"), **PAIRS_DATA}}))
    tables = PairTables(
        (root / "pairs.jsonl",), doc_id_column="doc", query_id_column="user", relevance_column="relevance",
        split="random", split_column="text", validation_fraction=0.2, test_fraction=0.1,
    )  # fmt: skip
    make_pairs(load_config(path).data, tables, IngestTarget(root / "dataset"))
    return Dataset.open(root / "dataset"), root


def train_rows(dataset: Dataset) -> list[tuple[int, int, int, float]]:
    """Return (key, query id, catalogue row, relevance) per training query."""
    rows = next(dataset.iterate("train", 10**6))
    return list(
        zip(*(c.tolist() for c in (rows.query_keys, rows.query_ids, rows.doc_rows, rows.relevance)), strict=True)
    )


def test_a_graded_window_contains_the_rated_documents(
    tools: Tools, rated: tuple[Dataset, Path], tmp_path: Path
) -> None:  # fmt: skip
    dataset, out = rated[0], tmp_path / "graded.npy"
    rows = train_rows(dataset)
    assert dataset.num_rows("train") == len(rows) and dataset.num_rows("validation") > 20
    grades: dict[int, dict[int, float]] = defaultdict(dict)
    for _, query, doc, grade in rows:
        grades[query][doc] = max(grade, grades[query].get(doc, 0))
    for width in (20, 2):
        stdout = tools.ran(
            "list_candidates", "--data", dataset.dir, "--out", out, "--graded", "--low", 1, "--width", width
        )
        mined = HardNegatives.open(out)
        assert f"{len(rows)} queries, {mined.per_query():.1f} documents per query" in stdout
        assert mined.queries.tolist() == [key for key, *_ in rows]
        windows, teacher = mined.windows(mined.queries), mined.teacher_scores(mined.queries)
        at_the_edge = 0
        for (_, query, own, grade), window, scores in zip(rows, windows.tolist(), teacher, strict=True):
            others = {doc: value for doc, value in grades[query].items() if doc != own}
            candidates = [doc for doc in window if doc >= 0]
            assert (
                len(set(candidates)) == len(candidates) == min(width, len(others)) and set(candidates) <= others.keys()
            )
            assert scores[0] == grade
            assert scores[1:].tolist()[: len(candidates)] == [others[doc] for doc in candidates]
            assert np.isnan(scores[1 + len(candidates) :]).all()
            low = [others[doc] <= 1 for doc in candidates]
            assert low == sorted(low, reverse=True)
            assert sum(low) == min(width, sum(value <= 1 for value in others.values()))
            at_the_edge += 0 < sum(low) < len(low)
        assert at_the_edge > 20


@pytest.mark.parametrize("own_column", [False, True])
def test_a_given_window_contains_the_candidates_of_the_table(
    tools: Tools, rated: tuple[Dataset, Path], tmp_path: Path, own_column: bool
) -> None:  # fmt: skip
    """Per query, or per row; without the query's other train positives."""
    (dataset, root), out = rated, tmp_path / "shown.npy"
    columns = ("--query-column", "user", "--column", "beside", *(("--positive-column", "doc") if own_column else ()))
    tools.ran("list_candidates", "--data", dataset.dir, "--out", out, "--given", root / "shown.jsonl", *columns)
    key_of = dict(enumerate(dataset.catalogue.keys(np.arange(dataset.catalogue.num_docs))))
    row_of = {key: row for row, key in key_of.items()}
    shown: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for line in (root / "shown.jsonl").open():
        seen = json.loads(line)
        name = (seen["user"], seen["doc"]) if own_column else (seen["user"],)
        shown[name] |= {row_of[key] for key in seen["beside"] if key in row_of}
    users = {words: f"u{query}" for query, words in enumerate(WORDS)}
    rows = next(dataset.iterate("train", 10**6))
    assert dataset.tokenizer is not None
    asked = [users[text] for text in dataset.tokenizer.decode(rows.query["query"])]  # type: ignore[arg-type]
    chosen: dict[str, set[int]] = defaultdict(set)
    for user, doc, grade in zip(asked, rows.doc_rows.tolist(), rows.relevance.tolist(), strict=True):
        chosen[user] |= {doc} if grade > 0 else set()
    mined = HardNegatives.open(out)
    assert not mined.scored
    found = 0
    for user, own, window in zip(asked, rows.doc_rows.tolist(), mined.windows(rows.query_keys).tolist(), strict=True):
        name = (user, key_of[own]) if own_column else (user,)
        assert {doc for doc in window if doc >= 0} == shown[name] - chosen[user] - {own}
        found += sum(doc >= 0 for doc in window)
    assert found > 100


def test_a_given_window_has_the_positions_of_its_documents(
    tools: Tools, rated: tuple[Dataset, Path], tmp_path: Path
) -> None:  # fmt: skip
    """Those of the first row of the table that has the pair; sampled documents have theirs, as do forgotten ones."""
    (dataset, root), out = rated, tmp_path / "shown.npy"
    columns = ("--query-column", "user", "--positive-column", "doc", "--column", "beside")
    given = ("list_candidates", "--data", dataset.dir, "--out", out, "--given", root / "shown.jsonl", *columns)
    tools.ran(*given, "--position-column", "places")
    keys = dict(enumerate(dataset.catalogue.keys(np.arange(dataset.catalogue.num_docs))))
    positions: dict[tuple[str, ...], int] = {}
    for line in (root / "shown.jsonl").open():
        row = json.loads(line)
        for other, position in zip(("", *row["beside"]), row["places"], strict=True):
            positions.setdefault((row["user"], row["doc"], other), position)
    users = {words: f"u{query}" for query, words in enumerate(WORDS)}
    rows = next(dataset.iterate("train", 10**6))
    assert dataset.tokenizer is not None
    asked = [users[text] for text in dataset.tokenizer.decode(rows.query["query"])]  # type: ignore[arg-type]
    mined = HardNegatives.open(out)
    mined.check_against(dataset)
    sampled = mined.sample(rows, 0, 0, 2)
    assert mined.positioned and not mined.scored and sampled.shown is not None and sampled.teacher is None
    found = 0
    for user, own, documents, shown in zip(
        asked, rows.doc_rows.tolist(), sampled.documents.tolist(), sampled.shown.tolist(), strict=True
    ):
        expected = [positions[user, keys[own], keys[doc] if doc >= 0 else ""] if doc >= 0 else 0 for doc in documents]
        assert shown == [positions[user, keys[own], ""], *expected]
        found += len([doc for doc in documents if doc >= 0])
    assert found > 100


def test_wrong_positions_are_refused(tools: Tools, rated: tuple[Dataset, Path], tmp_path: Path) -> None:
    (dataset, root), out = rated, tmp_path / "shown.npy"
    columns = ("--query-column", "user", "--positive-column", "doc", "--column", "beside")
    given = ("list_candidates", "--data", dataset.dir, "--out", out, "--given", root / "shown.jsonl")
    wrong_places: list[tuple[list[object], str]] = [
        ([1], "another number of them"),
        ([0, 1], "got 0"),
        (["a", 1], "'a'"),
    ]
    for number, (places, words) in enumerate(wrong_places):
        row = {"user": "u1", "doc": "d1", "beside": ["d2"], "places": places}
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
        table = tmp_path / f"{number}.jsonl"
        called = (*given[:-1], table, *columns, "--position-column", "places")
        assert words in tools.refused(3, *called), places
    alone = (*given, "--query-column", "user", "--column", "beside", "--position-column", "places")
    assert "--position-column needs --positive-column" in tools.refused(2, *alone)


def test_each_query_of_a_sequence_has_the_rated_documents_of_its_user(dataset: Dataset, tmp_path: Path) -> None:
    mined = write_rated(tmp_path / "graded.npy", dataset, 30, 0.0)
    rows = train_rows(dataset)
    met: dict[int, set[int]] = defaultdict(set)
    for _, query, doc, _ in rows:
        met[query].add(doc)
    assert mined.queries.tolist() == [key for key, *_ in rows]
    for (_, query, own, _), window in zip(rows, mined.windows(mined.queries).tolist(), strict=True):
        assert {doc for doc in window if doc >= 0} == met[query] - {own}


def test_invalid_candidate_options_are_refused(
    tools: Tools, rated: tuple[Dataset, Path], tmp_path: Path
) -> None:  # fmt: skip
    dataset, root = rated
    arguments = ("--data", dataset.dir, "--out", tmp_path / "listed.npy")
    given = (*arguments, "--given", root / "shown.jsonl", "--query-column", "user")
    for code, words, command in (
        (2, "--given needs --query-column and --column", given),
        (2, "--low would have no effect without --graded", (*given, "--column", "beside", "--low", 2)),
        (2, "--column would have no effect without --given", (*arguments, "--graded", "--column", "beside")),
        (2, "--low nan: needs a finite number", (*arguments, "--graded", "--low", "nan")),
        (3, "besides", (*given, "--column", "besides")),
    ):
        assert words in tools.refused(code, "list_candidates", *command)
    (root / "other.jsonl").write_text('{"user": "nobody", "beside": ["d1"]}\n')
    other = (*arguments, "--given", root / "other.jsonl", "--query-column", "user", "--column", "beside")
    assert "no training query of" in tools.refused(3, "list_candidates", *other)
    assert not list(tmp_path.iterdir())
