"""A content baseline finds new items of the kinds in a history, where a chain cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigdssm.config import DataConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import DataError
from bigdssm.evaluation.baselines import markov
from bigdssm.evaluation.evaluate import evaluate_scores
from bigdssm.features import Categorical, History
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from tools.evidence.content_baselines import ContentNeighbours

DAY, START, KINDS, ITEMS, USERS = 86_400, 1_600_000_000, 5, 12, 60
CONFIG = DataConfig(
    dir="", query={"past": History(of="item", max_items=6)},
    doc={"item": Categorical(column="item_id"), "kind": Categorical(multi=True)},
)  # fmt: skip


@pytest.mark.slow
def test_neighbours_by_content_rank_new_items(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    # half of the items of a kind are new on day 60
    since = {f"i{n}": START + DAY * (60 if n % 2 else 0) for n in range(KINDS * ITEMS)}
    items = [{"item_id": i, "kind": f"k{n % KINDS}", "since": float(since[i])} for n, i in enumerate(since)]
    events = []
    for user in range(USERS):
        for day in (0, 20, 40, 65, 70, 75, 80, 85, 90):
            known = [str(item["item_id"]) for item in items if item["kind"] == f"k{user % KINDS}"]
            known = [item for item in known if since[item] == START + DAY * (60 if day > 60 else 0)]
            time = START + DAY * day + user
            events.append({"user_id": f"u{user}", "item_id": random.choice(known), "timestamp": time})
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "items.parquet")
    pq.write_table(pa.Table.from_pylist(events), tmp_path / "events.parquet")
    tables = InteractionTables(
        tmp_path / "events.parquet", tmp_path / "items.parquet", split="time", items_time_column="since",
        validation_from=START + 60 * DAY, test_from=START + 78 * DAY,
    )  # fmt: skip
    make_interactions(CONFIG, tables, IngestTarget(tmp_path / "data", processes=1))
    dataset = Dataset.open(tmp_path / "data")
    rows = next(iter(dataset.iterate("test", 1000)))
    is_new = dataset.doc_counts() == 0
    assert is_new[rows.doc_rows].all() and is_new.sum() == KINDS * ITEMS // 2

    def ndcg(scores: object) -> float:
        return evaluate_scores(scores, dataset, "test").metrics["ndcg_at_10"]  # type: ignore[arg-type]

    by_content = ContentNeighbours.fit(dataset)
    by_age = ContentNeighbours.fit(dataset, neighbours=False)
    assert ndcg(by_content) > 0.3 and max(ndcg(by_age), ndcg(markov(dataset, 8))) < 0.25
    scores = by_content(rows)
    kind = np.array([item["kind"] for item in items])[[int(key[1:]) for key in dataset.catalogue.keys(np.arange(60))]]
    wanted = kind[rows.doc_rows][:, None] == kind
    assert scores[:, is_new][wanted[:, is_new]].min() > scores[:, is_new][~wanted[:, is_new]].max()


def test_items_need_times(tiny_interactions: pytest.FixtureRequest) -> None:
    with pytest.raises(DataError, match="its items have no times"):
        ContentNeighbours.fit(Dataset.open(tiny_interactions.dir))  # type: ignore[attr-defined]
