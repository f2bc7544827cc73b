"""A making that is killed again and again, anywhere, and goes on: what comes out is that of one left alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bigdssm.data import Dataset

ROOT = Path(__file__).parents[2]
# Small batches, shards of a few blocks, a note at every opportunity; dies at the so manieth of the places that count.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from bigdssm.config import DataConfig, FeatureConfig, TokenizerConfig
from bigdssm.data.making import column_file
from bigdssm.data.making import block_writer
from bigdssm.data.making import catalogue_writer
from bigdssm.data.making import journal
from bigdssm.data.making import making
from bigdssm.data.making import pairs
from bigdssm.data.making import row_spool
from bigdssm.data.tables import sources
source, out, mode, dies_at, read = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
journal.SAVE_EVERY_S = 0.0
sources.ROWS_PER_BATCH = row_spool.ROWS_PER_BATCH = 100
row_spool.BUCKET_BYTES = 40_000
block_writer.MAX_SHARD_BYTES = 30_000
places, blocks = 0, 0
def deadly(owner, name):
    method = getattr(owner, name)
    def counted(*args, **kwargs):
        global places, blocks
        places, blocks = places + 1, blocks + (name == "_write_block")
        if dies_at in (f"{places}", f"block {blocks}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)
    setattr(owner, name, counted)
for owner, name in ((catalogue_writer.CatalogueWriter, "add"), (block_writer.SplitWriter, "_write_block"),
                    (column_file.ColumnFile, "append"), (journal.Journal, "save"), (os, "replace")):
    deadly(owner, name)
reads = 0
def counting(*args, original=pairs.canonical):
    global reads
    reads += 1
    return original(*args)
pairs.canonical = counting
text = FeatureConfig("text", max_tokens=8)
config = DataConfig(
    dir=str(out), query={"q": text}, doc={"text": text, "kind": FeatureConfig("categorical")},
    tokenizer=TokenizerConfig(vocab_size=200), max_bad_fraction=0.1,
)
target = making.Target(out, "day1" if mode == "append" else "base", append=mode == "append")
tables = pairs.PairTables((source,), doc_id_column="id", dedup=True, split="time", split_column="time")
report = pairs.make_pairs(config, tables, target)
Path(read).write_text(f"{reads} {places} {report.rows} {sorted(report.notes)}")
"""


def write_source(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with path.open("w") as file:
        for row in range(4000):
            item = chance.randrange(600 + 300 * seed)
            record = {
                "q": f"find {chance.randrange(900)} {chance.randrange(9)}", "text": f"the item {item} of {row % 7}",
                "id": f"i{item}", "kind": f"k{item % (5 + seed)}", "time": row,
            }  # fmt: skip
            file.write(json.dumps(record)[: None if row % 97 else -3] + "\n")


def make(source: Path, out: Path, mode: str, dies_at: int | str = -1) -> tuple[int, int, int, str]:
    """Return the exit code, how many batches were looked at, how many places were met, and what was reported."""
    read = out.with_suffix(".read")
    read.unlink(missing_ok=True)
    command = [sys.executable, "-c", SCRIPT, *map(str, (source, out)), mode, str(dies_at), str(read)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    if not read.exists():
        assert done.returncode == -signal.SIGKILL, done.stderr
        return done.returncode, 0, 0, ""
    reads, places, said = read.read_text().split(" ", 2)
    return done.returncode, int(reads), int(places), said


def content(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found["dataset.json"] = found["dataset.json"].replace(f'"name": "{folder.name}"'.encode(), b"")
    return found


@dataclass(frozen=True)
class Whole:
    """A making that was left alone."""

    source: Path
    out: Path
    batches: int
    places: int
    said: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    write_source(folder / "pairs.jsonl", 1)
    return Whole(folder / "pairs.jsonl", folder / "whole", *make(folder / "pairs.jsonl", folder / "whole", "new")[1:])


def make_with_kills(source: Path, out: Path, mode: str, places: int) -> list[int | str]:
    """Make `out`, killed while reading, behind some shards, and at up to two random places; return these."""
    kills = [places // 6, "block 12", *(random.randint(4, places // part) for part in (3, 4))]
    for number, kill in enumerate(kills):
        if not make(source, out, mode, kill)[0]:  # less was left to do
            return kills[:number]
    assert make(source, out, mode)[0] == 0
    return kills


def test_a_making_that_is_killed_goes_on_to_the_same_bytes(whole: Whole, tmp_path: Path) -> None:
    kills = make_with_kills(whole.source, tmp_path / "killed", "new", whole.places)
    assert content(tmp_path / "killed") == content(whole.out), kills
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "killed.read"], kills


@pytest.mark.slow
def test_so_does_an_append(tmp_path: Path) -> None:
    source, first, second = tmp_path / "pairs.jsonl", tmp_path / "first", tmp_path / "other"
    write_source(source, 0)
    for out in (first, second):
        assert make(source, out, "new")[0] == 0
    write_source(source, 1)
    places = make(source, first, "append")[2]
    kills = make_with_kills(source, second, "append", places)
    assert content(second) == content(first), kills
    assert Dataset.open(second).num_rows("train") > 4000 and not list(second.glob(".*")), kills


def test_only_what_is_left_is_done(whole: Whole, tmp_path: Path) -> None:
    """Killed in the reading, it reads the rest; killed in the writing, nothing; of a changed source, everything."""
    assert make(whole.source, tmp_path / "early", "new", whole.places // 4)[0]
    assert 0 < make(whole.source, tmp_path / "early", "new")[1] < whole.batches - 5
    assert make(whole.source, tmp_path / "late", "new", whole.places - 20)[0]
    source = tmp_path / "pairs.jsonl"
    shutil.copy(whole.source, source)
    assert make(source, tmp_path / "other", "new", whole.places - 20)[0]
    code, batches, places, said = make(whole.source, tmp_path / "late", "new")
    assert (code, batches, said) == (0, 0, whole.said) and places < whole.places / 3
    os.utime(source, (1, 1))
    assert make(source, tmp_path / "other", "new")[1] == whole.batches
