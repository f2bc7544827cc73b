"""A dataset of pairs that grows by a day."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigdssm.config import DataConfig
from bigdssm.features import Categorical, Numeric
from bigdssm.ingest.job import IngestReport, IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs

DAYS = 3
PAIRS = DataConfig(
    dir="", query={"day": Numeric(), "row": Numeric()}, doc={"price": Numeric(), "kind": Categorical()}, title="title"
)
Facts = tuple[float, str]


def make_day(folder: Path, day: int, count: int = 300) -> IngestReport:
    """Append a day of pairs with new documents.

    Repeated documents get different features in later rows, which ingestion must ignore.
    """
    random = np.random.RandomState(day)
    docs = random.randint(0, 20 + 5 * day, count)
    facts = [facts_of(doc, day) for doc in docs]
    repeated = np.array([doc in docs[:row] for row, doc in enumerate(docs)])
    table = {
        "day": np.full(count, day),
        "row": np.arange(count) + 1000 * day,
        "id": [f"d{doc}" for doc in docs],
        "title": [f"renamed on day {day}" if doc == 1 else f"title {doc}" for doc in docs],
        "price": [price + (0.5 if again and row % 7 == 0 else 0) for row, ((price, _), again) in
                  enumerate(zip(facts, repeated, strict=True))],
        "kind": [kind for _, kind in facts],
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(table), folder / f"{day}.parquet")
    pairs = PairTables((folder / f"{day}.parquet",), doc_id_column="id", split="random", validation_fraction=0.1)
    return make_pairs(PAIRS, pairs, IngestTarget(folder / "data", f"day{day}", append=day > 0, processes=1))


def facts_of(doc: int, day: int) -> Facts:
    """Return a document's features: every third one changes every day, others never."""
    return (float(doc + 100 * day), f"kind {doc % 4} of day {day}") if doc % 3 == 0 else (float(doc), "plain")
