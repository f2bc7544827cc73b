"""Ingestion killed repeatedly at arbitrary points and resumed gives the same dataset as without kills."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from bigdssm.dataset.dataset import Dataset
from tests.unit.ingest.content import content

ROOT = Path(__file__).parents[3]
# Builds each dataset in a fork: reads lines of JSON (kind, source, out, append, dies_at, told), and answers each with
# an exit code. Steps are small, with several jobs each. The process dies at the dies_at-th kill point: before rows are
# added to a step's file, and before a finished file or folder is renamed.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from bigdssm.config import DataConfig, TokenizerConfig
from bigdssm.ingest import cutting, engines, fitting, interactions, job, pairs
from bigdssm.features import Categorical, History, Numeric, Text, columns
from bigdssm.utils.log import get_logger
fitting.ROWS_PER_FIT = job.DOCUMENTS_PER_FILE = 300
cutting.SEQUENCES_PER_FILE, job.BLOCKS_PER_SHARD = 50, 4
kill_points, checks = 0, 0
def deadly(owner, name):
    method = getattr(owner, name)
    def counted(*args, **kwargs):
        global kill_points
        kill_points += 1
        if dies_at == kill_points:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(*args, **kwargs)
    setattr(owner, name, counted)
deadly(engines.RowFile, "add"), deadly(os, "replace")
def counting(*args, original=columns.RowCheck.__init__):
    global checks
    checks += 1
    original(*args)
columns.RowCheck.__init__ = counting
TEXT, KIND = Text(max_tokens=8), Categorical()
def make(kind, source, out, append, told):
    features = {
        "pairs": ({"q": TEXT}, {"text": TEXT, "kind": KIND}),
        "interactions": (
            {"past": History(of="item_id", max_items=5), "age": Numeric(), "bio": TEXT},
            {"item_id": KIND, "title": TEXT},
        ),
    }[kind.removeprefix("dated ")]
    config = DataConfig(
        time_unit="s",
        dir=out, query=features[0], doc=features[1], tokenizer=TokenizerConfig(vocab_size=200), max_bad_fraction=0.1
    )
    target = job.IngestTarget(Path(out), "day1" if append else "base", append=append)
    source = Path(source)
    if kind == "pairs":
        tables = pairs.PairTables(
            tuple(source / f"pairs{part}.jsonl" for part in range(4)), doc_id_column="id", dedup=True, split="time",
            split_column="time", beir=None if append else Path(out + ".beir"),
        )
        report = pairs.make_pairs(config, tables, target)
    else:
        tables = interactions.InteractionTables(
            *(source / f"{name}.csv" for name in ("events", "items", "users")), rating_column="rating", min_rating=1.0,
            items_time_column="updated" if kind.startswith("dated") else None,
        )
        report = interactions.make_interactions(config, tables, target)
    Path(told).write_text(json.dumps([checks, kill_points, f"{report.rows} {sorted(report.notes)}"]))
for line in sys.stdin:
    *order, dies_at, told = json.loads(line)
    child = os.fork()
    if not child:
        try:
            make(*order, told)
        except BaseException:
            get_logger("making").exception("making failed")
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def write_source(folder: Path, seed: int) -> Path:
    """Write pairs, events, items and users, all with bad lines; return their folder."""
    folder.mkdir(exist_ok=True)
    chance = random.Random(seed)
    for part in range(4):
        with (folder / f"pairs{part}.jsonl").open("w") as file:
            for row in range(1000 * part, 1000 * (part + 1)):
                item = chance.randrange(600 + 300 * seed)
                record = {
                    "q": f"find {chance.randrange(900)} {chance.randrange(9)}", "text": f"the item {item} of {row % 7}",
                    "id": f"i{item}", "kind": f"k{item % (5 + seed)}", "time": row,
                }  # fmt: skip
                file.write(json.dumps(record)[: None if row % 97 else -3] + "\n")
    items, users = range(600 + 300 * seed), range(300 + 100 * seed)
    tables = {
        "items": [
            "item_id,title,updated",
            *(f"i{item},the title {item} of {item % 7 + seed * (item % 2)},{item}" for item in items),
        ],
        "users": ["user_id,age,bio", *(f"u{user},{user % 80},likes {user % 11} and {user % 13}" for user in users)],
        "events": ["user_id,item_id,timestamp,rating"],
    }
    for time in range(6000):
        user, item = (
            chance.randrange(len(users) + 20),
            chance.randrange(len(items) + 5),
        )  # some are missing from the tables
        tables["events"].append(f"u{user},i{item},{time + 6000 * seed},{time % 6}")
    for name, lines in tables.items():
        bad = [line + ",one,two" if row % 97 == 50 else line for row, line in enumerate(lines)]
        (folder / f"{name}.csv").write_text("\n".join(bad) + "\n")
    return folder


class Maker:
    """Builds datasets in processes that may be killed."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", SCRIPT]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )

    def __call__(
        self, kind: str, source: Path, out: Path, *, append: bool = False, dies_at: int = -1
    ) -> tuple[int, int, int, str]:
        """Return the exit code, the number of batches read, the number of kill points passed, and the report."""
        told = out.with_suffix(".told")
        told.unlink(missing_ok=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([kind, str(source), str(out), append, dies_at, str(told)]) + "\n")
        self._process.stdin.flush()
        code = int(self._process.stdout.readline())
        assert code in (0, -signal.SIGKILL), "the ingestion failed, see above"
        checks, kill_points, report = json.loads(told.read_text()) if told.exists() else (0, 0, "")
        return code, checks, kill_points, report

    def with_kills(self, kind: str, source: Path, out: Path, kill_points: int, *, append: bool = False) -> list[int]:
        """Build `out`, killed while reading, halfway, and at up to two random points; return the points."""
        kills = [kill_points // 6, kill_points // 2, *(random.randint(1, kill_points // part) for part in (3, 4))]
        for number, kill in enumerate(kills):
            if not self(kind, source, out, append=append, dies_at=kill)[0]:  # fewer kill points remained
                return kills[:number]
        assert self(kind, source, out, append=append)[0] == 0
        return kills

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="module")
def maker() -> Iterator[Maker]:
    started = Maker()
    yield started
    started.close()


@dataclass(frozen=True)
class Reference:
    """The result of an ingestion without kills."""

    kind: str
    source: Path
    out: Path
    checks: int
    kill_points: int
    report: str


@pytest.fixture(scope="module", params=["pairs", "interactions"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, maker: Maker) -> Reference:
    folder = tmp_path_factory.mktemp("whole")
    source = write_source(folder / "source", 1)
    return Reference(request.param, source, folder / "whole", *maker(request.param, source, folder / "whole")[1:])


@pytest.mark.slow
def test_a_killed_ingestion_resumes_to_the_same_bytes(whole: Reference, maker: Maker, tmp_path: Path) -> None:
    kills = maker.with_kills(whole.kind, whole.source, tmp_path / "killed", whole.kill_points)
    assert content(tmp_path / "killed") == content(whole.out), kills
    beside = ["killed.beir"] if whole.kind == "pairs" else []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", *beside, "killed.told"], kills


SLOWLY = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("pairs", "dated interactions")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["interactions", *SLOWLY])
def test_a_killed_append_resumes_to_the_same_bytes(kind: str, maker: Maker, tmp_path: Path) -> None:
    source, first, second = write_source(tmp_path / "source", 0), tmp_path / "first", tmp_path / "other"
    for out in (first, second):
        assert maker(kind, source, out)[0] == 0
    rows = Dataset.open(first).num_rows("train")
    write_source(source, 1)
    kill_points = maker(kind, source, first, append=True)[2]
    kills = maker.with_kills(kind, source, second, kill_points, append=True)
    assert content(second) == content(first), kills
    assert Dataset.open(second).num_rows("train") > 1.8 * rows and not list(second.glob(".*")), kills


@pytest.mark.slow
def test_only_remaining_work_is_done_on_resume(whole: Reference, maker: Maker, tmp_path: Path) -> None:
    """Killed while reading: reads the rest; killed while writing: reads nothing; a changed source: reads everything."""
    early, late, other = (tmp_path / name for name in ("early", "late", "other"))
    assert maker(whole.kind, whole.source, early, dies_at=whole.kill_points // 12)[0]
    assert 0 < maker(whole.kind, whole.source, early)[1] < whole.checks
    assert maker(whole.kind, whole.source, late, dies_at=whole.kill_points - 20)[0]
    source = tmp_path / "source"
    shutil.copytree(whole.source, source)
    assert maker(whole.kind, source, other, dies_at=whole.kill_points - 20)[0]
    code, checks, kill_points, report = maker(whole.kind, whole.source, late)
    assert (code, checks, report) == (0, 0, whole.report) and kill_points < whole.kill_points / 3
    os.utime(source / ("pairs0.jsonl" if whole.kind == "pairs" else "items.csv"), (1, 1))
    assert maker(whole.kind, source, other)[1] == whole.checks
