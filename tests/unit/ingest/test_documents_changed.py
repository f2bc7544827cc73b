"""Changed documents and users, from tables to search: each document appears once, in its newest version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

import bigdssm
from bigdssm.evaluation.evaluate import evaluate_split
from bigdssm.evaluation.metrics import mean_metrics
from bigdssm.features import Ragged
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import build_index
from bigdssm.retrieval.vectors import write_vectors

NUM_ITEMS, NUM_USERS, EVENTS = 30, 24, 12
CONFIG: dict[str, Any] = {
    "data": {
        "time_unit": "s",
        "lanes": 4, "title": "title",
        "query": {"past": {"type": "history", "of": "item_id", "max_items": 6}, "mood": {"type": "numeric"}},
        "doc": {"item_id": {"type": "categorical"}, "kind": {"type": "categorical"}, "price": {"type": "numeric"}},
    },
    "model": {
        "dim": 8, "query": {"residual": "past", "mlp": [8], "numeric_dim": 4}, "doc": {"mlp": [16], "embedding_dim": 8},
    },
    "pretrain": {"rows_global": 48, "steps": 2, "log_every_steps": 1},
}  # fmt: skip


def items_of(day: int) -> pd.DataFrame:
    """Return the items of a day; on the second day two are new and every fifth has changed."""
    numbers = np.arange(NUM_ITEMS - 2 + 2 * day)
    now = np.where(numbers % 5 == 0, day, 0)
    pairs = list(zip(numbers.tolist(), now.tolist(), strict=True))
    return pd.DataFrame({
        "item_id": [f"i{n}" for n in numbers], "title": [f"title {n} of day {d}" for n, d in pairs],
        "kind": [f"k{(n + d) % 4}" for n, d in pairs], "price": numbers * 1.5 + 40 * now,
    })  # fmt: skip


def tables_of(day: int) -> dict[str, pd.DataFrame]:
    random = np.random.RandomState(day)
    users = [f"u{n}" for n in range(NUM_USERS)]
    items = items_of(day)
    who = np.repeat(users, EVENTS)
    return {
        "items": items,
        "users": pd.DataFrame({
            "user_id": users * 3, "since": np.repeat([0, 100 * day + 5, 1000], NUM_USERS),
            "mood": np.repeat([-1.0, 1.0, 2.0], NUM_USERS),
        }),
        "interactions": pd.DataFrame({
            "user_id": who, "item_id": random.choice(items["item_id"], len(who)),
            "timestamp": 100 * day + np.tile(np.arange(EVENTS), NUM_USERS),
        }),
    }  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a config and a dataset of two days."""
    folder = tmp_path_factory.mktemp("changed")
    content = {**CONFIG, "run": {"dir": str(folder / "run"), "trackers": []}}
    content["data"] = {**CONFIG["data"], "dir": str(folder / "data")}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    for day in range(2):
        report = bigdssm.make_dataset(
            folder / "config.yaml", **tables_of(day), users_time_column="since", partition=f"day{day}", append=day > 0
        )
    assert (report.new_docs, report.changed_docs) == (2, 6)
    return folder


@pytest.mark.parametrize(
    "changed",
    [
        ["negatives.columns=catalogue", "negatives.mask=user"],
        pytest.param(["sampling.name=corrected", "negatives.uniform=8"], marks=pytest.mark.slow),
    ],
)
def test_each_document_is_returned_once_in_its_newest_version(folder: Path, changed: list[str], tmp_path: Path) -> None:
    run = [f"run.dir={tmp_path / 'run'}", *(f"pretrain.{word}" for word in changed)]
    best = bigdssm.pretrain(folder / "config.yaml", run).best
    log = (tmp_path / "run" / "pretrain" / "metrics.jsonl").read_text().splitlines()
    assert all(np.isfinite(json.loads(line).get("loss", 0)) for line in log)
    dataset, model = bigdssm.Dataset.open(folder / "data"), bigdssm.load_model(best)
    encoders = tower_encoders(model.folder.model, dataset)
    write_vectors(tmp_path / "vectors", encoders, dataset, model.checksum)
    build_index(tmp_path / "vectors", tmp_path / "index")
    index = bigdssm.open_index(tmp_path / "index", model)
    items = items_of(1)
    by_key = items.set_index("item_id")
    newest = model.encode_documents(items[["item_id", "kind", "price"]])
    queries = model.encode_queries([{"past": ["i0", "i7"], "mood": 2.0}, {"past": ["i5"]}])
    scores = dict(zip(items["item_id"], (newest @ queries.T), strict=True))
    for number, found in enumerate(index.search(queries, NUM_ITEMS + 6)):
        assert sorted(document.key for document in found) == sorted(items["item_id"]), "each once"
        for document in found:
            assert document.title == by_key.loc[document.key, "title"]
            assert document.score == pytest.approx(float(scores[document.key][number]), abs=1e-5)
    check_evaluation(dataset, encoders, newest, list(items["item_id"]))
    events = [name for day in range(2) for name in tables_of(day)["interactions"].query("user_id == 'u3'")["item_id"]]
    now = newest @ model.encode_queries([{"past": events[-6:], "mood": 2.0}])[0]
    request = bigdssm.Request(user="u3", top=50, filter="kind = k1")
    (answer,) = bigdssm.Searcher.open(best, tmp_path / "index").search([request])
    wanted = {
        key: score for key, kind, score in zip(items["item_id"], items["kind"], now, strict=True)
        if kind == "k1" and key not in events
    }  # fmt: skip
    assert {document.key: document.score for document in answer} == pytest.approx(wanted, abs=1e-5) and wanted


def check_evaluation(dataset: Any, encoders: Any, newest: np.ndarray, names: list[str]) -> None:
    """Check every test row's rank among the newest versions of all unseen documents, one by one."""
    ranks, moods = [], []
    row_of = {name: row for row, name in enumerate(names)}
    for rows in dataset.iterate("test", 100):
        vectors = encoders.queries(rows).numpy()
        assert isinstance(rows.query["past"], Ragged)
        moods += np.asarray(rows.query["mood"]).tolist()
        for i, name in enumerate(dataset.catalogue.keys(rows.doc_rows)):
            seen = {row_of[key] for key in dataset.catalogue.keys(rows.seen(i))} - {row_of[name]}
            scores = newest @ vectors[i]
            others = np.delete(scores, [*seen, row_of[name]])
            ranks.append(1 + int((others > scores[row_of[name]]).sum()))
    assert set(moods) == {1.0}, "as of the test events, neither the first nor the newest"
    evaluation = evaluate_split(encoders, dataset, "test")
    assert evaluation.ranks.tolist() == pytest.approx(ranks, abs=0.51), "but for equal scores"
    assert len(ranks) == 2 * NUM_USERS and mean_metrics(evaluation.ranks) == evaluation.metrics
