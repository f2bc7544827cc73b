"""Input tables of the cases: small and fixed, with bad rows, ties, missing values, versions and several files."""

import csv
import io
import json
import random
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

VOCABULARY = (
    "river stone bridge lantern copper meadow signal harbor winter violet engine mirror saddle basket thunder pepper "
    "canyon ribbon marble cotton falcon ginger island jacket kettle ladder magnet needle orchid pillow quartz rocket"
)
WORDS = VOCABULARY.split()
USERS, ITEMS, PAIRS, DOCUMENTS = 50, 40, 500, 120
START = 1_600_000_000  # seconds since 1970


def write_tables(folder: Path) -> None:
    """Write all tables into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = random.Random(7)
    _interactions(folder, numbers)
    _pairs(folder, numbers)


def _interactions(folder: Path, numbers: random.Random) -> None:
    items = [[f"i{i}", _text(numbers, 2), f"g{i % 4}|g{i // 10}", 1960 + i if i else "", START] for i in range(ITEMS)]
    items += [[f"i{i}", _text(numbers, 2), f"g{i % 3}", 1970 + i, START + 6000 + 10 * i] for i in range(0, ITEMS, 3)]
    users = [
        [f"u{u}", 20 + u % 40 if u % 9 else "", ("artist", "doctor", "farmer")[u % 3], START] for u in range(USERS)
    ]
    users += [[f"u{u}", 70 + u % 9, "writer", START + 5000 + u] for u in range(0, USERS, 4)]
    events: list[list[Any]] = []
    for user in range(USERS):
        item = numbers.randrange(ITEMS)
        for time in range(8 + numbers.randrange(16)):
            second = START + 1000 * (time // 2 * 2) + user  # ties
            events.append([f"u{user}", f"i{item}", numbers.randrange(1, 6), second])
            item = (item + (1 if numbers.random() < 0.7 else numbers.randrange(ITEMS))) % ITEMS
    numbers.shuffle(events)
    names = {"items": ["item_id", "title", "genres", "year", "updated"], "users": ["user_id", "age", "job", "since"]}
    _csv(folder / "items.csv", names["items"], (row for row in items if row[-1] == START))
    _csv(folder / "users.csv", names["users"], (row for row in users if row[-1] == START))
    _csv(folder / "item_versions.csv", names["items"], items)
    _csv(folder / "user_versions.csv", names["users"], users)
    columns = ["user_id", "item_id", "rating", "timestamp"]
    bad = [
        ["u1", "unknown", 3, START + 5000],
        ["u2", "i2", "many", START + 5001],
        ["", "i3", 2, START + 5002],
        ["u4", "i4", 4, "when"],
    ]
    _csv(folder / "events.csv", columns, events[:200] + bad + events[200:])
    later = [[user, item, rating, time + 100_000] for user, item, rating, time in events[:150]]
    _csv(folder / "later_events.csv", columns, later)
    changed = [[f"i{i}", _text(numbers, 3), "g9", 2000 + i, START] for i in range(0, ITEMS + 5, 2)]
    _csv(folder / "later_items.csv", names["items"], changed)
    parts = folder / "events"
    parts.mkdir(exist_ok=True)
    for number, part in enumerate((events[:300], events[300:])):
        table = {name: [row[i] for row in part] for i, name in enumerate(columns)}
        pq.write_table(pa.table(table), parts / f"part-{number}.parquet", row_group_size=100)


def _pairs(folder: Path, numbers: random.Random) -> None:
    texts = [_text(numbers, 8) for _ in range(DOCUMENTS)]

    def record(doc: int, text: str) -> dict[str, Any]:
        return {
            "query": " ".join(numbers.sample(text.split(), 3)), "group": f"q{numbers.randrange(90)}",
            "doc_key": f"d{doc}", "text": f"{text}.", "section": ("net", "doc", "games")[doc % 3],
            "tags": [f"t{doc % 5}", f"t{doc % 7}"] if doc % 4 else [], "size": doc * 37,
            "shape": [doc / 8, 1 - doc / 16, float(doc % 3)], "relevance": numbers.choice((0, 1, 1, 1, 2)),
            "part": numbers.choice(("train", "train", "train", "validation", "test", "none")),
            "also": [f"e{doc % 3}", f"e{doc % 5 + 3}"],
        }  # fmt: skip

    records = [record(doc, texts[doc]) for doc in (numbers.randrange(DOCUMENTS) for _ in range(PAIRS))]
    records += records[:20]  # repeated
    lines = [json.dumps(record) for record in records]
    (folder / "pairs.jsonl").write_text("\n".join([*lines[:50], '{"query": "cut off', *lines[50:]]) + "\n")
    changed = [record(doc, f"{texts[doc % DOCUMENTS]} again") for doc in range(60, DOCUMENTS + 30)]
    (folder / "later_pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in changed))
    docs = {record["doc_key"]: record for record in records}
    circle = list(docs.values())
    with (folder / "siamese.jsonl").open("w") as stream:
        for number, one in enumerate(circle):
            for step in (1, 2, 5):
                other = circle[(number + step) % len(circle)]
                a, b = ({f"{side}_{name}": of[name] for name in ("doc_key", "text", "section")} for side, of in
                        (("a", one), ("b", other)))  # fmt: skip
                stream.write(json.dumps(a | b) + "\n")
    for shard in range(2):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as tar:
            for number, one in enumerate(records[shard::2]):
                for suffix in ("query", "text"):
                    _member(tar, f"{number:04d}.{suffix}.txt", one[suffix].encode())


def _member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _text(numbers: random.Random, words: int) -> str:
    return " ".join(numbers.choice(WORDS) for _ in range(words))


def _csv(path: Path, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([names, *rows])
