"""Tables and command lines of make_shards that are changed to be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.command_line import tool
from tests.conftest import write_config

Record = dict[str, Any]
PAIRS = {
    "query": {"q": {"type": "text"}},
    "doc": {"d": {"type": "text"}, "n": {"type": "numeric"}, "c": {"type": "categorical"}},
    "tokenizer": {"vocab_size": 200},
    "time_unit": "s",
}
EVENTS = [(f"u{u}", f"i{(u + t) % 12}", 1_600_000_000 + 1000 * t + u) for u in range(20) for t in range(10)]
INTERACTIONS = {
    "query": {"history": {"type": "history", "of": "item"}},
    "doc": {"item": {"type": "categorical", "column": "item_id"}},
}
ITEMS = "".join(f"i{i}\n" for i in range(12))
RECORDS: list[Record] = [
    {"q": f"word{i % 7} a{i}", "d": f"doc{i % 11} b", "n": i, "c": f"c{i % 3}", "id": f"k{i % 11}"} for i in range(60)
]


class Maker:
    """Calls the tool in one folder; returns its exit code and its output on stdout and stderr."""

    def __init__(self, folder: Path, capsys: Any) -> None:
        self.folder, self._capsys, self.main = folder, capsys, tool("make_shards").main
        self.out = folder / "dataset"

    def __call__(self, *words: object) -> tuple[int, str]:
        code = self.main([str(word) for word in words])
        said = self._capsys.readouterr()
        assert code == 0 or (said.err.startswith("error: ") and said.err.count("\n") == 1)
        return code, said.out + said.err

    def pairs(self, *words: object, table: str = "pairs.jsonl", bad: float = 0.0, **schema: Any) -> tuple[int, str]:
        config = write_config(self.folder, {**PAIRS, "max_bad_fraction": bad, **schema})
        return self("pairs", "--config", config, "--pairs", self.folder / table, *words)

    def records(self, records: list[Record], *words: object, bad: float = 0.0) -> tuple[int, str]:
        (self.folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return self.pairs(*words, bad=bad)

    def parquet(self, *words: object, **columns: Any) -> tuple[int, str]:
        whole = {name: [record[name] for record in RECORDS] for name in RECORDS[0]}
        pq.write_table(pa.table({**whole, **columns}), self.folder / "pairs.parquet")
        return self.pairs(*words, table="pairs.parquet")

    def interactions(
        self,
        events: list[tuple[Any, ...]],
        *words: object,
        items: str = ITEMS,
        header: str = "user_id,item_id,timestamp",
    ) -> tuple[int, str]:
        lines = "".join(",".join(map(str, event)) + "\n" for event in events)
        (self.folder / "events.csv").write_text(f"{header}\n{lines}")
        (self.folder / "items.csv").write_text(f"item_id\n{items}")
        config = write_config(self.folder, INTERACTIONS)
        tables = [f"--interactions={self.folder}/events.csv", f"--items={self.folder}/items.csv"]
        return self("interactions", "--config", config, *tables, *words)

    def refused(self, answer: tuple[int, str], code: int, *words: str) -> None:
        assert answer[0] == code, answer
        for word in words:
            assert word.format(tmp=self.folder) in answer[1], answer
        assert not self.out.exists() and not list(self.folder.glob(".*"))
