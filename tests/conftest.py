"""Small datasets, built once per test session by the real ingestion; and the command that repeats a failed test.

Groups of tests, by folder and by marker:

- unit/: one module of the library per file, in process.
- distributed/: one to three ranks, forked from a process that has imported everything and kept in pools
  (`distributed/conftest.py`); the reference of the losses, exact resumes, kernels.
- e2e/: command lines as a user starts them; servers, killed processes, pages.
- `slow`: only in `tests/run.sh --full`. `alone`: measures time or memory, runs after the others in one process.
- `gpu`: skipped without a CUDA device.

A module that is imported by several test files has no `test_` in its name.
"""

import csv
import json
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from bigdssm.config import load_config
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.utils.hashing import hash64

os.environ.setdefault("LOKY_MAX_CPU_COUNT", "2")  # joblib: as many processes, and ranks, on any machine

NUM_USERS, NUM_ITEMS, NUM_PAIRS = 60, 40, 1200
VOCABULARY = (
    "river stone bridge lantern copper meadow signal harbor winter violet engine mirror saddle basket thunder pepper "
    "canyon ribbon marble cotton falcon ginger island jacket kettle ladder magnet needle orchid pillow quartz rocket "
    "spider temple tunnel valley walnut yellow zephyr anchor"
)
WORDS = VOCABULARY.split()

INTERACTIONS_DATA = {
    "time_unit": "s",
    "title": "title",
    "query": {
        "history": {"type": "history", "of": "item_id", "max_items": 10},
        "age": {"type": "numeric"},
        "occupation": {"type": "categorical"},
    },
    "doc": {
        "item_id": {"type": "categorical"},
        "title": {"type": "text", "max_tokens": 8},
        "genres": {"type": "categorical", "multi": True, "separator": "|"},
        "year": {"type": "numeric"},
    },
    "tokenizer": {"vocab_size": 200},
    "lanes": 4,
}
PAIRS_DATA = {
    "query": {"query": {"type": "text", "max_tokens": 12}},
    "doc": {
        "text": {"type": "text", "max_tokens": 24},
        "section": {"type": "categorical"},
        "tags": {"type": "categorical", "multi": True},
        "size": {"type": "numeric", "log": True},
    },
    "tokenizer": {"vocab_size": 200},
    "lanes": 4,
}


@dataclass(frozen=True)
class TinyDataset:
    """A dataset, its config (with run.dir and data.dir), and its source tables."""

    dir: Path
    config: Path
    source: Path


@pytest.fixture(autouse=True)
def bf16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute alike on all machines: bfloat16 without a warning, emulated on some, and `auto` as fp32."""
    monkeypatch.setattr("bigdssm.utils.device.instruction_set", lambda device="cpu": "arm_bf16")


class QuietServer(ThreadingHTTPServer):
    """A server that does not log disconnected clients, which would appear in another test's stderr."""

    daemon_threads = True

    def handle_error(self, *request: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*request)  # type: ignore[arg-type]


def pick(*key: object, below: int) -> int:
    """Return a number in [0, below), a function of `key`."""
    return hash64("/".join(map(str, key))) % below


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print per failed test the command that repeats it alone."""
    failed = terminalreporter.stats.get("failed", []) + terminalreporter.stats.get("error", [])
    for report in failed:
        terminalreporter.write_line(f"repeat: {repeat_command(report.nodeid)}")


def repeat_command(nodeid: str) -> str:
    return f"OMP_NUM_THREADS=1 python -m pytest {shlex.quote(nodeid)}"


@pytest.fixture(scope="session")
def tiny_interactions(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """60 users with 12 to 41 events each over 40 items; usually an item is followed by the next one."""
    root = tmp_path_factory.mktemp("tiny_interactions")
    source = root / "source"
    source.mkdir()
    genres = ["Action", "Comedy", "Drama", "Western"]
    items: list[list[object]] = [["item_id", "title", "genres", "year"]]
    for i in range(NUM_ITEMS):
        title = f"{WORDS[i]} {WORDS[(i * 7 + 3) % NUM_ITEMS]}"
        items.append([f"i{i}", title, "|".join(sorted({genres[i % 4], genres[i // 10]})), 1960 + i if i else ""])
    jobs = ["artist", "doctor", "farmer"]
    users = [["user_id", "age", "occupation"], *([f"u{u}", 20 + u % 50, jobs[u % 3]] for u in range(NUM_USERS))]
    events: list[list[object]] = [["user_id", "item_id", "rating", "timestamp"]]
    for u in range(NUM_USERS):
        item = pick("start", u, below=NUM_ITEMS)
        for t in range(12 + pick("length", u, below=30)):
            events.append([f"u{u}", f"i{item}", 1 + pick("rating", u, t, below=5), 1000 * t + u])
            step = 1 if pick("step", u, t, below=4) else pick("jump", u, t, below=NUM_ITEMS)
            item = (item + step) % NUM_ITEMS
    events[1:] = sorted(events[1:], key=lambda event: hash64(str(event)))
    for name, rows in (("items", items), ("users", users), ("interactions", events)):
        with (source / f"{name}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows(rows)
    config = write_config(root, INTERACTIONS_DATA)
    tables = InteractionTables(source / "interactions.csv", source / "items.csv", source / "users.csv")
    make_interactions(load_config(config).data, tables, IngestTarget(root / "dataset"))
    return TinyDataset(root / "dataset", config, source)


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory: pytest.TempPathFactory) -> TinyDataset:
    """1,200 pairs of three words and a text that holds them, over about 400 documents, some relevances 0."""
    root = tmp_path_factory.mktemp("tiny_pairs")
    source = root / "source"
    source.mkdir()
    with (source / "pairs.jsonl").open("w") as stream:
        for record in pair_records():
            stream.write(json.dumps(record) + "\n")
    config = write_config(root, PAIRS_DATA)
    tables = PairTables(
        (source / "pairs.jsonl",), relevance_column="relevance", validation_fraction=0.1, test_fraction=0.1
    )
    make_pairs(load_config(config).data, tables, IngestTarget(root / "dataset"))
    return TinyDataset(root / "dataset", config, source)


def pair_records() -> Iterator[dict[str, object]]:
    for row in range(NUM_PAIRS):
        doc = pick("doc", row, below=400)
        words = [WORDS[pick("word", doc, i, below=len(WORDS))] for i in range(10)]
        yield {
            "query": " ".join(words[pick("query", row, i, below=10)] for i in range(3)),
            "doc_key": f"d{doc}",
            "text": f"{' '.join(words)}.",
            "section": ["net", "doc", "games"][doc % 3],
            "tags": [f"t{doc % 5}", f"t{doc % 7}"] if doc % 4 else [],
            "size": doc * 37,
            "relevance": 0 if pick("relevance", row, below=20) == 0 else 1,
        }


def write_config(root: Path, data: dict[str, object]) -> Path:
    """Write a config file for a dataset at root/dataset and runs in root/run."""
    path = root / "config.yaml"
    engine = {"precision": "fp32"}  # on all machines
    content = {"run": {"dir": str(root / "run")}, "engine": engine, "data": {"dir": str(root / "dataset"), **data}}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
