"""`bigdssm forget`: users and items leave every file that the project has written, and work goes on."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

import bigdssm
from bigdssm.commands import forget as command
from bigdssm.commands import publish
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.remote import FileCache, cache_key
from bigdssm.dataset.rows import EVENT_BITS, EventRules
from bigdssm.errors import DataError
from bigdssm.features.base import FIRST_CODE
from bigdssm.ingest import forgetting
from bigdssm.ingest.forgetting import Forgotten, forget
from bigdssm.loader.inspection import verify_dataset
from bigdssm.loader.stream import PairStream
from bigdssm.retrieval.hard_negatives import HardNegatives
from bigdssm.serving.request_log import COLUMNS
from bigdssm.stores.base import open_store
from bigdssm.utils.atomic import Changes
from bigdssm.utils.hashing import file_checksum, hash64
from tests.postgres import running_server
from tests.unit.commands.forgetting import SHARDED, add_day, checksums, item, trained, user, write_config


def shop(folder: Path, users: int = 20, items: int = 12) -> Path:
    """Return the folder, with a config and a dataset of two days."""
    write_config(folder)
    add_day(folder, 0, users, items)
    add_day(folder, 1, users, items, split="train")
    return folder


def contents(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, and its decompressed blocks."""
    yield path.read_bytes()
    if path.suffix == ".tar":
        with tarfile.open(path) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                for batch in pa.ipc.open_stream(io.BytesIO(stream.read())):
                    yield b"".join(bytes(part) for column in batch.columns for part in column.buffers() if part)
    if path.suffix == ".parquet":
        yield repr(parquet.read_table(path).to_pylist()).encode()


def occurrences(folders: Sequence[Path], ids: Sequence[str]) -> list[str]:
    """Return the files with an id: as a string, its hash, or its code in 2⁶² buckets."""
    needles = [key.encode() for key in ids]
    for hashed in map(hash64, ids):
        needles += [number.to_bytes(8, "little", signed=True) for number in (hashed, FIRST_CODE + hashed % 2**62)]
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return [str(path) for path in files if any(n in part for part in contents(path) for n in needles)]


def files_of_items(folder: Path, items: Sequence[str], vectors: np.ndarray) -> list[str]:
    """Return the files of a server's database that contain one of the ids or vectors, float32 [n, D+1]."""
    keys, found = {key.encode() for key in items}, []
    for path in folder.iterdir():
        content = path.read_bytes()
        has_key = not keys.isdisjoint(re.findall(rb"item-[0-9a-f]{16}", content))
        if has_key or any(vector.tobytes() in content for vector in vectors):
            found.append(path.name)
    return found


def deleted(folder: Path, users: Sequence[str], items: Sequence[str]) -> tuple[Forgotten, Changes]:
    changes = Changes()
    with forget(folder / "data", users, items, changes) as forgotten:
        pass
    return forgotten, changes


def train_rows(dataset: Dataset) -> dict[int, tuple[list[Any], ...]]:
    """Return query ids, targets and histories of the train rows that can be read, by row id."""
    found = {}
    for rows in dataset.iterate("train", 64):
        for number, row in enumerate(rows.row_ids.tolist()):
            key = row << 8 | int(rows.position[number]) if rows.position is not None else row
            found[key] = (int(rows.query_ids[number]), int(rows.doc_rows[number]), rows.seen(number).tolist())
    return found


def step_rows(dataset: Dataset, steps: int = 12) -> tuple[list[list[int]], float]:
    """Return the row ids of each step, and the bad rows."""
    stream = PairStream(dataset, rows_global=8, lanes=2, max_bad_fraction=0)
    return [next(stream).row_ids.tolist() for _ in range(steps)], stream.rows_bad


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "shop")
    write_config(tmp_path / "shop")
    return tmp_path / "shop"


USERS, ITEMS = [user(n) for n in (1, 7, 21)], [item(n) for n in (1, 2, 6)]


def test_a_dataset_has_no_byte_of_the_ids_and_keeps_orders_and_numbers(folder: Path) -> None:
    before = Dataset.open(folder / "data")
    rows, (steps, _) = train_rows(before), step_rows(before)
    assert len(occurrences([folder / "data"], USERS)) > 5 and len(occurrences([folder / "data"], ITEMS)) > 5
    forgotten, changes = deleted(folder, USERS, ITEMS)
    assert (forgotten.users, forgotten.items) == (2, 3), "the third user has no events"
    assert occurrences([folder / "data"], [*USERS, *ITEMS]) == [] and verify_dataset(folder / "data") == []
    assert all(file_checksum(Path(f["file"])) == f["after"] for f in changes.files)

    after = Dataset.open(folder / "data")
    assert after.fingerprint == before.fingerprint and after.num_rows("train") == before.num_rows("train")
    gone = {hash64(key) for key in USERS}
    assert train_rows(after) == {key: row for key, row in rows.items() if row[0] not in gone}, "items' events stay"
    emptied = {key >> 8 for key, row in rows.items() if row[0] in gone}
    assert emptied == set(forgotten.train_rows["day0"]) | {
        int(n) + before.partitions[0].content["splits"]["train"]["rows"] for n in forgotten.train_rows["day1"]
    }
    assert emptied
    found, bad = step_rows(after)
    assert found == [[row for row in step if row not in emptied] for step in steps] and bad == 0

    documents = np.sort(before.catalogue.rows_by_key(ITEMS))
    assert forgotten.documents.tolist() == documents.tolist() == after.catalogue.withdrawn.tolist()
    assert after.catalogue.keys(documents) == after.catalogue.titles(documents) == ["", "", ""]
    assert len(np.unique(after.catalogue.doc_ids)) == after.catalogue.num_docs
    for name in ("item_id", "shelf"):
        assert (after.catalogue.codes(name, documents) == 0).all() and before.catalogue.codes(name, documents).all()
    others = np.setdiff1d(np.arange(after.catalogue.num_docs), documents)
    for name in after.header.schema.documents:
        assert repr(after.catalogue.column(name, others)) == repr(before.catalogue.column(name, others)), name


def test_what_other_rows_have_too_stays(folder: Path) -> None:
    before = Dataset.open(folder / "data").schema
    forgotten, _ = deleted(folder, USERS, ITEMS)
    after = Dataset.open(folder / "data").schema
    assert after.fingerprint() == before.fingerprint() and forgotten.shared == []
    erased = {
        name: sorted(set(old.vocabulary) - set(new.vocabulary))  # type: ignore[attr-defined]
        for side in before.sides
        for (name, old), new in zip(before.sides[side].items(), after.sides[side].values(), strict=True)
        if old.type == "categorical"
    }
    assert erased == {
        "item_id": sorted(ITEMS), "maker": [f"m-{item(6)}"], "tags": sorted(f"t-{key}" for key in ITEMS),
        "user_id": sorted(USERS), "town": [], "session": sorted(f"s-{key}" for key in USERS[:2]),
    }  # fmt: skip


def test_rules_skip_emptied_rows(folder: Path) -> None:
    """The rules cannot be evaluated on an emptied sequence, whose rows are skipped."""
    rule = load_config(folder / "config.yaml", [f"data.targets.train='session = s-{user(3)}'"]).data
    before = Dataset.open(folder / "data").with_rules(EventRules.of(rule))
    deleted(folder, USERS, ITEMS)
    after = Dataset.open(folder / "data").with_rules(EventRules.of(rule))
    assert after.fingerprint == before.fingerprint and after.rows_fingerprint != before.rows_fingerprint
    assert sorted(train_rows(after).values()) == sorted(train_rows(before).values()) and train_rows(after)
    assert step_rows(after)[1] == 0


def test_a_second_deletion_changes_nothing_and_appends_go_on(folder: Path) -> None:
    deleted(folder, USERS, ITEMS)
    first = checksums(folder)
    assert deleted(folder, USERS, ITEMS)[1].files == [] and checksums(folder) == first
    add_day(folder, 2, 20, 12)  # the users and items are back, as new ones
    dataset = Dataset.open(folder / "data")
    assert verify_dataset(folder / "data") == [] and (dataset.catalogue.rows_by_key(ITEMS) >= 12).all()
    forgotten, _ = deleted(folder, USERS, ITEMS)
    assert (forgotten.users, forgotten.items) == (2, 3) and occurrences([folder / "data"], [*USERS, *ITEMS]) == []


@pytest.mark.parametrize("call", range(4))
def test_a_killed_deletion_ends_alike(folder: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    shutil.copytree(folder, folder.with_name("whole"))
    deleted(folder.with_name("whole"), USERS, ITEMS)
    before = checksums(folder / "data")
    calls = iter(range(9))
    killed_in = ["write_arrow", "_drop_keys", "write_json", "_redact"][call]
    real = getattr(forgetting, killed_in)

    def kill(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(forgetting, killed_in, kill)
        if killed_in == "_redact":  # a kill removes nothing
            patched.setattr("bigdssm.utils.atomic.remove", lambda path: None)
            (folder / "data.quarantine.jsonl").write_text("")
        with pytest.raises(KeyboardInterrupt):
            deleted(folder, USERS, ITEMS)
    assert checksums(folder / "data") == before, "nothing has changed yet"
    (folder / "data.quarantine.jsonl").unlink(missing_ok=True)
    deleted(folder, USERS, ITEMS)
    whole = checksums(folder.with_name("whole") / "data")
    assert checksums(folder / "data") == {name.replace("/whole/", "/shop/"): value for name, value in whole.items()}
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "data"]


def write_versions(folder: Path) -> Dataset:
    """Make a dataset with two versions of each user and item, by time."""
    write_config(folder)
    number = np.repeat(np.arange(20), 6)
    bought = np.random.RandomState(0).randint(0, 12, len(number))
    events = {
        "user_id": [user(n) for n in number], "item_id": [item(n) for n in bought], "session": ["s"] * len(number),
        "timestamp": np.tile(np.arange(6), 20) + 0.0,
    }  # fmt: skip
    people = {"user_id": [user(n) for n in range(20)] * 2, "since": [0.0] * 20 + [3.0] * 20}
    people["town"] = [f"{key} at {since}" for key, since in zip(*people.values(), strict=True)]
    items = {"item_id": [item(n) for n in range(12)] * 2, "updated": [0.0] * 12 + [3.0] * 12, "maker": ["m"] * 24}
    items |= {"title": [f"{key} {at}" for key, at in zip(items["item_id"], items["updated"], strict=True)]}
    items |= {
        "price": [1.0, 2.0] * 12,
        "color": [[1.0, 2.0, 3.0]] * 24,
        "tags": [f"t-{key}" for key in items["item_id"]],
        "shelf": [f"shelf {key}" for key in items["item_id"]],
    }
    bigdssm.make_dataset(
        folder / "config.yaml", interactions=events, users=people, items=items, users_time_column="since",
        items_time_column="updated",
    )  # fmt: skip
    return Dataset.open(folder / "data")


def test_features_as_of_each_row_and_versions_by_time(tmp_path: Path) -> None:
    """Blocks have users' features, and sequences the versions of items."""
    before, ids = write_versions(tmp_path), [*USERS[:2], *ITEMS]
    rows, (steps, _) = train_rows(before), step_rows(before)
    assert before.catalogue.versions is not None and "user_id" in before.layout.query
    assert occurrences([tmp_path], ids)
    deleted(tmp_path, USERS, ITEMS)
    after, gone = Dataset.open(tmp_path / "data"), {hash64(key) for key in USERS}
    assert occurrences([tmp_path / "data"], ids) == [] and verify_dataset(tmp_path / "data") == []
    assert after.fingerprint == before.fingerprint
    assert train_rows(after) == {key: row for key, row in rows.items() if row[0] not in gone}
    emptied = {key >> 8 for key, row in rows.items() if row[0] in gone}
    assert step_rows(after) == ([[row for row in step if row not in emptied] for step in steps], 0)
    index, read = after.index("train"), 0
    for block in range(index.num_blocks):  # the codes of users are gone from blocks, too
        batch = pa.ipc.open_stream(forgetting._bytes_of(index, block)).read_next_batch()
        numbers = index.first_row[block] + np.arange(batch.num_rows)
        assert not batch["user_id"].to_numpy()[np.isin(numbers, list(emptied))].any()
        read += batch.num_rows
    assert read == after.num_rows("train") and emptied


@pytest.mark.parametrize("siamese", [False, True])
def test_pairs(tmp_path: Path, siamese: bool) -> None:
    sides = {
        side: {"text": {"type": "text", "column": f"{side}_text", "max_tokens": 8},
               "kind": {"type": "categorical", "column": f"{side}_kind"}}
        for side in ("query", "doc")
    }  # fmt: skip
    data = {"dir": str(tmp_path / "data"), "siamese": siamese, "tokenizer": {"vocab_size": 200}, **sides}
    model = {"dim": 8, "doc": {"mlp": [], "text": {"layers": 1, "hidden": 8, "heads": 1}}, "beta": "none"}
    if not siamese:
        model["query"] = model["doc"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"run": {"dir": "run"}, "data": data, "model": model}))
    key = item if siamese else user
    rows = [
        {"query_key": key(q), "query_text": f"tea {key(q)}", "query_kind": f"k-{key(q)}",
         "doc_key": item(d), "doc_text": f"tea {item(d)}", "doc_kind": f"k-{item(d)}"}
        for q in range(20) for d in (30 + q, 31 + q, 33 + q)
    ]  # fmt: skip
    options = {"query_id_column": "query_key", "doc_id_column": "doc_key", "raw_text": not siamese}
    bigdssm.make_dataset(tmp_path / "config.yaml", pairs=rows, **options)
    before = Dataset.open(tmp_path / "data")
    users, items = ([], [item(3), item(35)]) if siamese else ([user(3), user(4)], [item(35)])
    kept, (steps, _) = train_rows(before), step_rows(before, 6)
    gone = {hash64(name) for name in [*users, *items]}
    assert len(occurrences([tmp_path / "data"], [*users, *items])) > 3
    deleted(tmp_path, users, items)
    after = Dataset.open(tmp_path / "data")
    assert occurrences([tmp_path / "data"], [*users, *items]) == [] and verify_dataset(tmp_path / "data") == []
    assert after.fingerprint == before.fingerprint and (after.catalogue.rows_by_key(items) == -1).all()
    assert train_rows(after) == {number: row for number, row in kept.items() if row[0] not in gone} != kept
    emptied = {number for number, row in kept.items() if row[0] in gone}
    assert step_rows(after, 6) == ([[row for row in step if row not in emptied] for step in steps], 0)


def test_an_interrupted_ingestion_is_removed(folder: Path) -> None:
    """Its intermediate files have the ids."""
    places = [
        folder / "data/.unfinished/spool-1",
        folder / "data/.unfinished-spool",
        folder / ".data.unfinished/spool-1",
    ]
    for place in [*places, folder / ".data.replaced"]:  # the last one: left by a kill between two renames
        place.mkdir(parents=True)
        (place / "rows.txt").write_text(user(1))
    (folder / "data.quarantine.jsonl").write_text(json.dumps({"reason": f"{item(2)!r} is bad"}) + "\n")
    _, changes = deleted(folder, USERS, ITEMS)
    assert occurrences([folder], [*USERS, *ITEMS]) == []
    assert {entry["file"] for entry in changes.files if entry["action"] == "removed"} == {
        str(place / "rows.txt") for place in places
    }


def test_what_cannot_be_done_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(folder / "data")]
    cases = {
        "no ids; give --user": data,
        "a dataset at a URL cannot be changed": ["--data", "s3://bucket/data", "--user", "u"],
        "is not a dataset": ["--data", str(tmp_path / "none"), "--user", "u"],
        "neither a run folder nor a stage folder": [*data, "--user", "u", "--run", str(tmp_path)],
        "neither vectors nor an index": [*data, "--user", "u", "--index", str(tmp_path)],
    }
    before = checksums(folder)
    for message, options in cases.items():
        assert command.main(options) != 0
        assert message in capsys.readouterr().err
    assert checksums(folder) == before


def test_logs_of_requests_have_no_byte_of_the_ids(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"request": "a", "user": user(3), "body": json.dumps({"user": user(3)}), "features": "{}", "document": ["x"]},
        {
            "request": "b", "user": user(4), "features": "{}", "document": [item(2), item(5)],
            "body": json.dumps({"user": user(4), "events": [{"item": f"tea of {item(2)}"}], "exclude": [item(2)]}),
        },
    ]  # fmt: skip
    log = tmp_path / "log"
    log.mkdir()
    parquet.write_table(pa.Table.from_pylist(rows, COLUMNS), log / "day.parquet")
    arguments = ["--data", str(folder / "data"), "--user", user(3), "--item", item(2), "--log", str(log)]
    assert command.main([*arguments, str(tmp_path / "none")]) == 2, "refused before anything changes"
    assert command.main(arguments) == 0
    [row] = parquet.read_table(log / "day.parquet").to_pylist()
    assert row["user"] == user(4) and row["document"] == [None, item(5)]
    assert json.loads(row["body"]) == {"user": user(4), "events": [], "exclude": []}
    assert not any(name.encode() in (log / "day.parquet").read_bytes() for name in (user(3), item(2)))


def test_downloads_are_removed(folder: Path, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 1 << 20)
    used, free = (cache_key(name) for name in ("used", "free"))
    held = cache.fill(used, 3, lambda fd: None)
    os.close(cache.fill(free, 3, lambda fd: None))
    options = ["--data", str(folder / "data"), "--user", user(1), "--cache", str(cache.dir)]
    out = folder / "report.json"
    assert command.main([*options, "--out", str(out)]) == 0
    assert cache.path(used).exists() and not cache.path(free).exists()
    assert any(str(cache.path(used)) in line for line in json.loads(out.read_text())["not_reached"])
    os.close(held)
    assert command.main(options) == 0 and not cache.path(used).exists()


def arguments(folder: Path, users: Sequence[str], items: Sequence[str], store: Sequence[str] = ()) -> list[str]:
    """Return the command line for all that `trained` wrote; it writes files of ids outside of the folder."""
    options = ["--data", str(folder / "data"), "--run", str(folder / "run"), "--vectors", str(folder / "vectors")]
    options += ["--index", *(str(path) for path in sorted(folder.glob("*-index")))]
    for name, ids in (("users", users), ("items", items)):
        file = folder.with_name(f"{name}.txt")
        file.write_text("".join(f"{key}\n" for key in ids))
        options += [f"--{name}-file", str(file)]
    return [*options, *store, "--negatives", str(folder / "negatives.npy"), "--out", str(folder / "report.json")]


def check_forgotten(
    folder: Path, users: Sequence[str], items: Sequence[str], store: Sequence[str] = ()
) -> dict[str, Any]:
    """Run the command; check that the ids are gone, and that search and training go on. Return its report."""
    assert occurrences([folder], users) and occurrences([folder], items)
    vectors, checksum = (
        np.load(folder / "vectors/vectors.npy"),
        bigdssm.load_model(folder / "run/pretrain/best").checksum,
    )
    before = checksums(folder)
    assert command.main([*arguments(folder, users, items, store), "--dry-run"]) == 0
    planned = json.loads((folder / "report.json").read_text())["files"]
    (folder / "report.json").unlink()
    assert checksums(folder) == before
    assert command.main(arguments(folder, users, items, store)) == 0
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    actions = [[(entry["file"], entry["action"]) for entry in entries] for entries in (planned, report["files"])]
    assert actions[0] == actions[1]
    after = checksums(folder)
    listed = {entry["file"] for entry in report["files"]}
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == {
        *listed, str(folder / "report.json")
    }  # fmt: skip
    assert occurrences([folder], [*users, *items]) == []
    assert command.main(arguments(folder, users, items, store)) == 0 and checksums(folder).keys() == after.keys()
    assert json.loads((folder / "report.json").read_text())["files"] == []

    # vectors and indexes: other documents as before, forgotten ones no answers
    dataset, documents = Dataset.open(folder / "data"), Dataset.open(folder / "data").catalogue.withdrawn
    assert len(documents) == len(items) and verify_dataset(folder / "data") == []
    others = np.setdiff1d(np.arange(len(vectors)), documents)
    now = np.load(folder / "vectors/vectors.npy")
    assert (now[others] == vectors[others]).all() and not now[documents].any()
    model = bigdssm.load_model(folder / "run/pretrain/best")
    assert model.checksum == checksum
    for path in sorted(folder.glob("*-index")):
        index = bigdssm.open_index(path, model)
        found = index.search(np.ones((1, vectors.shape[1])), len(vectors))[0]
        assert len(found) == len(others) and not {document.key for document in found} & {"", *items}
    searcher = bigdssm.Searcher.open(folder / "run/pretrain/best", path, str(folder / "data"))
    remaining = next(user(n) for n in range(1000) if user(n) not in users)
    assert len(searcher.search([bigdssm.Request(remaining, exclude_seen=False, top=99999)])[0]) == len(others)
    for key in users:
        with pytest.raises(DataError, match="no user is called"):
            searcher.search([bigdssm.Request(key)])
    for path in (folder / "negatives.npy", *(folder / "run/pretrain").glob("mined_negatives*.npy")):
        hard = HardNegatives.open(path)
        hard.check_against(dataset)
        window, gone = hard.windows(hard.queries), set(report_rows(dataset, users))
        assert not np.isin(window, documents).any()
        assert (window[np.isin(hard.queries >> EVENT_BITS, list(gone))] == -1).all() and (window >= 0).any()
    return report


def report_rows(dataset: Dataset, users: Sequence[str]) -> np.ndarray:
    """Return the train rows that cannot be read: those of forgotten users."""
    return np.setdiff1d(np.arange(dataset.num_rows("train")), [key >> 8 for key in train_rows(dataset)])


@pytest.mark.parametrize(
    "overrides", [pytest.param([], id="dense"), pytest.param(SHARDED, id="sharded", marks=pytest.mark.slow)]
)
def test_a_run_and_its_vectors_have_no_byte_of_the_ids(tmp_path: Path, overrides: list[str]) -> None:
    folder = trained(tmp_path / "shop", 20, 12, overrides)
    report = check_forgotten(folder, [user(1), user(7), user(15)], [item(1), item(2), item(6)])
    assert (report["users"], report["items"]) == ({"given": 3, "found": 3}, {"given": 3, "found": 3})
    assert not list((folder / "run/pretrain/checkpoints").glob("*step*"))
    result = bigdssm.pretrain(folder / "config.yaml", resume=True)
    assert result.metrics and occurrences([folder], [user(1), item(2)]) == []


def published(folder: Path, url: str, items: Sequence[str]) -> str:
    """Publish the vectors, and leave dead rows of `items`: of earlier writes, a withdrawal and a dropped collection.

    Returns the name of the database's folder.
    """
    for name, more in (("dropped", []), ("first", ["--switch"])):
        vectors = ["--vectors", str(folder / "vectors"), "--data", str(folder / "data")]
        assert publish.main(["--to", url, *vectors, "--as", name, *more]) == 0
    assert publish.main(["--to", url, "--drop", "dropped"]) == 0
    store = open_store(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("UPDATE bigdssm_vectors_first SET doc_version = doc_version")
    store.delete(store.collection("first"), items[:5], 1)
    store.finish(store.collection("first"))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CHECKPOINT")
        (oid,) = connection.execute("SELECT oid FROM pg_database WHERE datname = current_database()").fetchall()[0]
    return str(oid)


@pytest.mark.slow
def test_two_hundred_users_and_items(tmp_path: Path) -> None:
    folder, random = trained(tmp_path / "shop", 320, 300, SHARDED), np.random.RandomState(5)
    users, items = ([make(n) for n in random.choice(size, 200, False)] for make, size in ((user, 320), (item, 300)))
    for server in running_server():
        url, catalogue = server.new_database(), Dataset.open(folder / "data").catalogue
        base = server.folder / "data/base" / published(folder, url, items)
        vectors = np.load(folder / "vectors/vectors.npy")[catalogue.rows_by_key(items)]
        assert len(files_of_items(base, items, vectors)) >= 3
        report = check_forgotten(folder, users, items, ["--store", url])
        assert (report["users"]["found"], report["items"]["found"]) == (200, 200)
        (collection,) = report["collections"]
        assert (collection["found"], collection["documents"]) == (195, {"before": 295, "after": 100})
        assert any("write-ahead log" in line for line in report["not_reached"])
        assert files_of_items(base, items, vectors) == []
    run = [sys.executable, "-m", "bigdssm.commands", "pretrain", "--config", str(folder / "config.yaml")]
    ended = subprocess.run([*run, "--ranks", "2", "--resume", "auto"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert occurrences([folder], [*users, *items]) == []


@pytest.mark.slow
def test_a_run_without_rows_of_the_ids_keeps_its_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    write_config(folder)
    content = load_config(folder / "config.yaml").to_dict()
    del content["data"]["query"]["user_id"], content["data"]["query"]["town"], content["data"]["event"]["session"]
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    add_day(folder, 0, 20, 12)
    stop = ["pretrain.steps=2"]
    bigdssm.pretrain(folder / "config.yaml", stop)
    kept = checksums(folder / "run/pretrain/checkpoints")
    assert command.main(["--data", str(folder / "data"), "--run", str(folder / "run"), "--user", user(3)]) == 0
    assert checksums(folder / "run/pretrain/checkpoints") == kept and kept
    run = [sys.executable, "-m", "bigdssm.commands", "pretrain", "--config", str(folder / "config.yaml")]
    more = ["--ranks", "2", "--resume", "auto", "data.lanes=2"]
    ended = subprocess.run([*run, *more], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "step-00000004" in {path.name for path in (folder / "run/pretrain/checkpoints").iterdir()}
    assert not list((folder / "run").glob("quarantine-*")) and occurrences([folder], [user(3)]) == []
