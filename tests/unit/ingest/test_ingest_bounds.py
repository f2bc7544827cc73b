"""Ingestion loses no rows and bounds its memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from webdataset import TarWriter

from bigdssm.config import DataConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError, UnavailableError
from bigdssm.features import Categorical, History
from bigdssm.ingest import job
from bigdssm.ingest.dataset_writer import Quarantine
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.sources.text import JsonLinesSource
from tests.conftest import TinyDataset

ROOT = Path(__file__).resolve().parents[3]

PAIRS = DataConfig(dir="", query={"q": Categorical()}, doc={"d": Categorical()}, max_bad_fraction=0.9)


def write_pairs(path: Path, rows: int) -> Path:
    path.write_text("".join(json.dumps({"q": f"q{i}", "d": f"d{i % 7}"}) + "\n" for i in range(rows)))
    return path


def test_unreachable_files_cost_no_finished_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, target = tuple(write_pairs(tmp_path / f"{n}.jsonl", 300) for n in range(3)), IngestTarget(tmp_path / "out")
    read, met = JsonLinesSource.read, list[str]()

    def seldom(self: JsonLinesSource, *args: Any) -> Any:
        met.append(Path(self.name).name)
        if self.name == str(files[2]) and met.count("2.jsonl") == 1:
            raise UnavailableError("the server stays away")
        return read(self, *args)

    monkeypatch.setattr(JsonLinesSource, "read", seldom)
    with pytest.raises(UnavailableError, match="stays away"):
        make_pairs(PAIRS, PairTables(files), target)
    make_pairs(PAIRS, PairTables(files), target)
    assert met == ["0.jsonl", "1.jsonl", "2.jsonl", "2.jsonl"], "the others were read once"
    assert Dataset.open(tmp_path / "out").catalogue.num_docs == 7


def test_an_unavailable_engine_costs_no_finished_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, target = (write_pairs(tmp_path / "pairs.jsonl", 300),), IngestTarget(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("bigdssm.ingest.job.write_index", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        make_pairs(PAIRS, PairTables(files), target)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="no engine"):
        patch.setattr(job, "LocalEngine", lambda *args, **options: (_ for _ in ()).throw(ConfigError("no engine")))
        make_pairs(PAIRS, PairTables(files), target)
    with monkeypatch.context() as patch:
        patch.setattr(JsonLinesSource, "read", lambda *args: pytest.fail("it was read before"))
        make_pairs(PAIRS, PairTables(files), target)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="no engine"):
        patch.setattr(job, "LocalEngine", lambda *args, **options: (_ for _ in ()).throw(ConfigError("no engine")))
        make_pairs(PAIRS, PairTables(files), IngestTarget(tmp_path / "other"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pairs.jsonl"], "nothing is left of nothing"


def test_bad_rows_are_written_when_they_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigdssm.ingest.job.MAX_REPORTED", 10)
    path = write_pairs(tmp_path / "pairs.jsonl", 300)
    lines = [line if i % 3 else "no JSON" for i, line in enumerate(path.read_text().splitlines())]
    path.write_text("\n".join(lines) + "\n")
    assert make_pairs(PAIRS, PairTables((path,)), IngestTarget(tmp_path / "out")).num_bad == 100
    bad = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()]
    assert [entry["row"] for entry in bad] == list(range(1, 301, 3))


def test_a_file_of_sequences_ends_with_as_many_events_as_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [5, 40, 3, 3, 3, 25, 4, 1]
    events = [f"u{user},i{n % 6},{n}" for user, length in enumerate(lengths) for n in range(length)]
    (tmp_path / "events.csv").write_text("\n".join(["user_id,item_id,timestamp", *events]) + "\n")
    (tmp_path / "items.csv").write_text("item_id\n" + "".join(f"i{i}\n" for i in range(6)))
    config = DataConfig(dir="", time_unit="s", query={"past": History(of="item_id")}, doc={"item_id": Categorical()})
    tables = InteractionTables(tmp_path / "events.csv", tmp_path / "items.csv", split="train")
    make_interactions(config, tables, IngestTarget(tmp_path / "whole"))
    monkeypatch.setattr("bigdssm.ingest.cutting.EVENTS_PER_FILE", 10)
    monkeypatch.setattr("bigdssm.ingest.cutting.SEQUENCES_PER_FILE", 6)
    make_interactions(config, tables, IngestTarget(tmp_path / "cut"))
    whole, cut = (Dataset.open(tmp_path / name) for name in ("whole", "cut"))
    assert cut.sequences is not None and cut.sequences.rows_per_file == [1, 1, 3, 1, 2]

    def rows(dataset: Dataset) -> list[Any]:
        return [(r.seen(i).tolist(), int(r.doc_rows[i])) for r in dataset.iterate("train", 9) for i in range(len(r))]

    assert rows(cut) == rows(whole)


def test_a_bad_value_counts_as_a_bad_row_does(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "bad.jsonl", tmp_path / "kept.jsonl", "base", max_bad_fraction=0.25)
    quarantine.add([("a.csv", 3, "size is x, needs a number", False), ("a.csv", 4, "no query", True)])
    quarantine.num_good = 6
    with pytest.raises(DataError, match=r"2 of 7 rows are bad or have bad values.*the first is a\.csv, row 3"):
        quarantine.check()
    quarantine.close()


def test_a_table_of_bad_rows_gives_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"q": "", "d": ""}\n' * 5)
    config = DataConfig(dir="", query=PAIRS.query, doc=PAIRS.doc, max_bad_fraction=1.0)
    with pytest.raises(DataError, match=r"pairs\.jsonl: no rows remain: 5 × no document"):
        make_pairs(
            config, PairTables((tmp_path / "pairs.jsonl",), whole_documents=True), IngestTarget(tmp_path / "out")
        )


def test_shards_equal_those_of_webdataset(tiny_pairs: TinyDataset, tmp_path: Path) -> None:
    for shard in sorted(tiny_pairs.dir.glob("partitions/*/*.tar")):
        with tarfile.open(shard) as tar, TarWriter(str(tmp_path / shard.name), encoder=False, mtime=0) as again:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                again.write({"__key__": member.name.removesuffix(".arrow"), "arrow": content.read()})
        assert (tmp_path / shard.name).read_bytes() == shard.read_bytes()
    assert list(tmp_path.iterdir())


def test_workers_start_without_torch() -> None:
    """Their import takes seconds, and ingestion does not need them."""
    code = "import sys, bigdssm.ingest.interactions, bigdssm.ingest.pairs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
