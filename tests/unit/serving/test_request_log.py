"""The log of requests: complete files after any end of a server, without delaying answers; replay and forget."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prometheus_client import CollectorRegistry, Counter

from bigdssm.checkpoints.checkpoint import checkpoints_in, load_checkpoint, read_manifest
from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.cluster.launcher import run_command
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.retrieval.index import open_index
from bigdssm.retrieval.request import parse_request
from bigdssm.serving.searcher import Searcher
from bigdssm.utils.atomic import Changes
from tests.command_line import Tools
from tests.unit.conftest import SMALL
from tools.checks.pages import code_of

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from bigdssm.serving import request_log
from bigdssm.serving.app import make_app
from bigdssm.serving.replay import _is_same, replay
from bigdssm.serving.request_log import RequestLog, forget_in_log, read_log


@pytest.fixture(scope="module")
def searcher(model_dir: Path, index_dir: Path, dataset: Dataset) -> Searcher:
    return Searcher(load_model_folder(model_dir), open_index(index_dir), dataset)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for batch in read_log(folder) for row in batch.to_pylist()]


def logged(searcher: Searcher, folder: Path, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the answers to `bodies`, logged in `folder`."""
    with TestClient(make_app(searcher, log_folder=folder)) as client:
        headers = {"Authorization": "Bearer s3cret", "Cookie": "session=s3cret"}
        return [client.post("/api/search", json=body, headers=headers).json() for body in bodies]


def counter() -> Counter:
    return Counter("logged", "", ["result"], registry=CollectorRegistry())


def lost(counter: Counter) -> float:
    return float(counter.labels("lost")._value.get())


def test_a_row_has_the_request_and_the_answer(searcher: Searcher, dataset: Dataset, tmp_path: Path) -> None:
    first = {"user": "u7", "top": 4, "exclude": ["i3"], "events": [{"item": "i5", "time": 1e9}]}
    answers = logged(searcher, tmp_path / "log", [first, {"user": "u8"}, first])
    rows = {row["request"]: row for row in rows_of(tmp_path / "log")}
    assert len(rows) == 3 and not list((tmp_path / "log").glob("*.part"))
    for body, answer in zip([first, {"user": "u8"}, first], answers, strict=True):
        row = rows[answer["request"]]
        assert row["document"] == [document["key"] for document in answer["documents"]]
        assert row["score"] == [document["score"] for document in answer["documents"]]
        assert row["cached"] == answer["cached"] and row["user"] == body["user"]
        assert (row["filter"], row["exclude"]) == (None, body.get("exclude"))
        assert parse_request(json.loads(row["body"])) == parse_request({"top": 10, **body})
        assert (row["model"], row["index"]) == searcher.versions and abs(row["time"] - time.time()) < 60
    assert [answer["cached"] for answer in answers] == [False, False, True]
    features = json.loads(rows[answers[0]["request"]]["features"])
    assert features == json.loads(rows[answers[2]["request"]]["features"])  # a cached answer has them, too
    of_request = searcher.queries.of(parse_request(first))
    [history] = [name for name, feature in dataset.schema.query.items() if feature.type == "history"]
    assert features[history][-1] == "i5" and len(features[history]) == len(of_request.columns[history][0])
    everything = b"".join(path.read_bytes() for path in (tmp_path / "log").iterdir()) + str(rows).encode()
    assert b"s3cret" not in everything and b"testclient" not in everything


def test_a_full_queue_and_a_full_disk_lose_records_and_no_answer(
    searcher: Searcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "MOST_WAITING", 2)
    monkeypatch.setattr(request_log, "FLUSH_S", 0.3)
    results = counter()
    log = RequestLog(tmp_path, 30, results)
    columns = searcher.queries.of(parse_request({"user": "u7"})).columns
    started = time.monotonic()
    for _ in range(5):
        log.put('{"user": "u7"}', columns, [], searcher, False)
    assert time.monotonic() - started < 0.2 and lost(results) == 3
    time.sleep(0.6)

    def full(*answer: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(request_log, "_row", full)
        log.put('{"user": "u8"}', columns, [], searcher, False)
        time.sleep(0.6)
    assert lost(results) == 4
    log.put('{"user": "u9"}', columns, [], searcher, False)
    log.close()
    assert sorted(row["user"] for row in rows_of(tmp_path)) == ["u7", "u7", "u9"]  # two files, of one second


def test_a_killed_server_loses_at_most_its_last_second(tmp_path: Path) -> None:
    script = f"""
import os, signal, sys, time
from pathlib import Path
from prometheus_client import CollectorRegistry, Counter
from bigdssm.serving import request_log
request_log._row = lambda request, answered, body, *others: {{"request": request, "user": body}}
counter = Counter("logged", "", ["result"], registry=CollectorRegistry())
log = request_log.RequestLog(Path({str(tmp_path)!r}), 30, counter)
for number in range(3):
    log.put(f"u{{number}}", {{}}, [], None, False)
until = time.monotonic() + 60
while not any(path.stat().st_size for path in Path({str(tmp_path)!r}).glob("*.part")) and time.monotonic() < until:
    time.sleep(request_log.FLUSH_S / 10)
log.put("the last one", {{}}, [], None, False)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    [part] = [path for path in tmp_path.glob("*.part") if path.stat().st_size]
    with part.open("ab") as file:
        file.write(b"\xff\xff\xff\xff\x40\x00\x00\x00half of a batch")
    old = tmp_path / "20200101T000000Z-1-0.parquet"
    old.write_bytes(b"")
    assert not request_log.complete_parts(tmp_path) and not list(tmp_path.glob("*.part"))
    RequestLog(tmp_path, 30, counter()).close()
    assert not old.exists(), "a file older than the retention"
    assert [row["user"] for row in rows_of(tmp_path)] == ["u0", "u1", "u2"]


def test_old_files_are_removed_while_no_request_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "FLUSH_S", 0.05)
    monkeypatch.setattr(request_log, "ROLL_S", 0.2)
    log = RequestLog(tmp_path, 30, counter())
    time.sleep(0.1)
    old = tmp_path / "20200101T000000Z-1-0.parquet"
    old.write_bytes(b"")
    until = time.monotonic() + 10
    while old.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not old.exists()
    log.close()


def test_an_open_file_is_left_to_its_writer(searcher: Searcher, tmp_path: Path) -> None:
    columns = searcher.queries.of(parse_request({"user": "u7"})).columns
    log = RequestLog(tmp_path, 30, counter())
    log.put('{"user": "u7"}', columns, [], searcher, False)
    time.sleep(1.5 * request_log.FLUSH_S)
    assert len(request_log.complete_parts(tmp_path)) == 1
    assert len(forget_in_log(tmp_path, ["u7"], [], Changes())) == 1
    with pytest.raises(ConfigError, match="no complete log"):
        rows_of(tmp_path)
    log.close()
    assert len(rows_of(tmp_path)) == 1


def test_forgotten_users_and_items_are_in_no_file(searcher: Searcher, tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = [
        {"user": "u7"}, {"user": "u8", "exclude_seen": False, "exclude": ["i4"], "top": 40},
        {"user": "u9", "events": [{"item": "i3", "time": 1e9}, {"item": "i30", "time": 1e9}], "exclude": ["i3", "i5"]},
    ]  # fmt: skip
    answers = logged(searcher, tmp_path, bodies)
    [path] = tmp_path.iterdir()
    before = rows_of(tmp_path)
    forget_in_log(tmp_path, ["u7"], ["i3"], dry := Changes(dry_run=True), ["Item 3"])
    assert [entry["file"] for entry in dry.files] == [str(path)] and rows_of(tmp_path) == before
    forget_in_log(tmp_path, ["u7"], ["i3"], changes := Changes())
    assert len(changes.files) == 1
    rows = rows_of(tmp_path)
    assert [row["user"] for row in rows] == ["u8", "u9"]
    text = json.dumps(rows)
    assert '"i3"' not in text and '\\"i3\\"' not in text and "u7" not in text and "i30" in text
    keys = [document["key"] for document in answers[1]["documents"]]
    assert "i3" in keys
    assert rows[0]["document"] == [None if key == "i3" else key for key in keys], "positions stay"
    for row in rows:
        parse_request(json.loads(row["body"]))
    forget_in_log(tmp_path, ["u8", "u9"], [], Changes())
    assert not list(tmp_path.iterdir())


def log_of(folder: Path, bodies: Sequence[dict[str, Any]], **columns: Any) -> Path:
    """Write a log with a row per body."""
    folder.mkdir(exist_ok=True)
    given = {"features": "{}", "document": ["5", "9"], "score": [1.0, 0.5], "cached": False, **columns}
    rows = [
        {**given, "request": str(number), "body": json.dumps(body)}
        | {name: body.get(name) for name in ("user", "filter", "exclude")}
        for number, body in enumerate(bodies)
    ]
    pq.write_table(pa.Table.from_pylist(rows, request_log.COLUMNS), folder / "20260101T000000Z-1-0.parquet")
    return folder


def test_a_user_and_an_item_of_the_same_id_are_two(tmp_path: Path, dataset: Dataset) -> None:
    bodies: list[dict[str, Any]] = [
        {"user": "1", "top": 2}, {"user": "2", "exclude": ["5", "50"]}, {"user": "3", "events": [{"item": "50"}]},
        {"features": {"occupation": "50", "age": 50}}, {"user": "50", "exclude": ["1"]},
    ]  # fmt: skip
    features = json.dumps({"history": ["50", "7"], "occupation": "5"})
    log = log_of(tmp_path, bodies, features=features)
    before = rows_of(log)
    forget_in_log(log, ["5", "9", "7"], [], Changes(), dataset=dataset)
    assert rows_of(log) == before, "no user is an item, or a feature that is no id"
    forget_in_log(log, ["50"], [], Changes(), dataset=dataset)
    assert rows_of(log) == before[:4]
    forget_in_log(log, [], ["1", "2", "3"], Changes(), dataset=dataset)
    assert rows_of(log) == before[:4], "no item is a user"
    forget_in_log(log, [], ["5"], Changes(), dataset=dataset)
    rows = rows_of(log)
    assert [row["document"] for row in rows] == [[None, "9"]] * 4 and [row["features"] for row in rows] == [
        features
    ] * 4, "a category is no item"
    assert rows[1]["exclude"] == ["50"] and json.loads(rows[1]["body"])["exclude"] == ["50"]
    forget_in_log(log, [], ["50"], Changes(), dataset=dataset)
    rows = rows_of(log)
    assert {json.loads(row["features"])["history"][0] for row in rows} == {None}
    assert json.loads(rows[2]["body"])["events"] == [] and {row["cached"] for row in rows} == {None}


def test_other_spellings_of_an_id_or_title_are_removed(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = [
        {"features": {"user_id": 17}}, {"user": "x", "events": [{"item": " alien "}, {"item": " i3 "}]},
        {"user": "x", "filter": 'item_id = "caf\\u00e9"'}, {"user": "x", "filter": "kind in (tea, i3)"},
        {"user": "x", "filter": "kind = i30"}, {"features": {"user_id": 170}},
    ]  # fmt: skip
    log = log_of(tmp_path, bodies)
    forget_in_log(log, ["17"], ["i3", "café"], Changes(), ["Alien"])
    rows = rows_of(log)
    assert [json.loads(row["body"]) for row in rows] == [
        {"user": "x", "events": []}, {"user": "x", "filter": None}, {"user": "x", "filter": None}, *bodies[4:],
    ]  # fmt: skip
    assert [row["filter"] for row in rows] == [None, None, None, "kind = i30", None]
    assert [row["cached"] for row in rows] == [None, None, None, False, False]


def test_whole_values_are_removed_from_all_columns(tmp_path: Path, dataset: Dataset) -> None:
    """Also where the request has them as features, of a query or of an event; parts of texts stay."""
    bodies: list[dict[str, Any]] = [
        {"user": "u1", "features": {"clicked": "i3", "friends": ["u9", "u2"], "occupation": "i3", "note": "i3 of u9"}},
        {"user": "u1", "events": [{"item": "i4", "features": {"page": "i3"}}], "context": {"page": "i3"}},
        {"user": "u1", "filter": "seller = u9"}, {"user": "u1", "filter": "year < 1990"},
    ]  # fmt: skip
    features = {"history": ["i3", "i4"], "clicked": "i3", "friends": ["u9", "u2"], "history.page": ["i3", "i4"]}
    log = log_of(tmp_path, bodies, features=json.dumps(features))
    forget_in_log(log, ["u9"], ["i3"], Changes(), dataset=dataset)
    rows = rows_of(log)
    assert [json.loads(row["body"]) for row in rows] == [
        {"user": "u1", "features": {"clicked": None, "friends": ["u2"], "occupation": "i3", "note": "i3 of u9"}},
        {"user": "u1", "events": [{"item": "i4", "features": {"page": None}}], "context": {"page": None}},
        {"user": "u1", "filter": None}, bodies[3],
    ], "the dataset has no ids as occupations"  # fmt: skip
    assert [row["filter"] for row in rows] == [None, None, None, "year < 1990"]
    expected = {"history": [None, "i4"], "clicked": None, "friends": [None, "u2"], "history.page": [None, "i4"]}
    assert [json.loads(row["features"]) for row in rows] == [expected] * 4
    for row in rows:
        parse_request(json.loads(row["body"]))


def test_a_folder_that_cannot_be_written_is_refused(searcher: Searcher, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--log-requests .*file: cannot write: .*; choose another folder"):
        make_app(searcher, log_folder=tmp_path / "file")


def altered(folder: Path, request: str, **changes: Any) -> None:
    """Change a row of the log."""
    [path] = folder.glob("*.parquet")
    rows = [row | (changes if row["request"] == request else {}) for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, request_log.COLUMNS), path)


def test_a_replay_finds_altered_requests_alone(searcher: Searcher, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    bodies: list[dict[str, Any]] = [{"user": f"u{number}", "top": 3 + number} for number in range(20)]
    bodies += [{"features": {"age": 30, "occupation": "farmer"}, "events": [{"item": "i5"}], "exclude": ["i3"]}]
    bodies += [{"user": "u1", "filter": "year >= 1980", "events": [{"item": "i9", "time": 1e9}]}]
    ids = [answer["request"] for answer in logged(searcher, folder, bodies)]
    report = replay(searcher, read_log(folder))
    assert (report["requests"], report["invalid"], report["other_model"], report["other_index"]) == (22, 0, 0, 0)
    assert (report["differing"], report["features"], report["examples"]) == (0, {}, [])
    assert report["overlap"] == 1 and report["largest_score_difference"] < 1e-5

    first, old, gone = ids[:3]
    rows = {row["request"]: row for row in rows_of(folder)}
    features = {**json.loads(rows[first]["features"]), "age": 77.0}
    altered(folder, first, features=json.dumps(features))
    altered(folder, old, time=5001.0)  # what came later is no event of that time
    altered(folder, gone, body='{"user": "of no dataset"}')
    altered(folder, ids[3], model="another")
    altered(folder, ids[4], score=[score + 0.25 for score in rows[ids[4]]["score"]], index="another")
    report = replay(searcher, read_log(folder))
    assert (report["requests"], report["invalid"], report["other_model"], report["other_index"]) == (20, 1, 1, 1)
    assert report["features"]["age"] == 1 / 20 and report["differing"] == 3 / 20
    assert report["largest_score_difference"] >= 0.25 - 1e-5
    examples = {example["request"]: example for example in report["examples"]}
    assert examples.keys() == {first, old, gone, ids[4]} and "of no dataset" in examples[gone]["error"]
    assert examples[first]["features"] == {
        "age": {"logged": 77.0, "replayed": json.loads(rows[first]["features"])["age"]}
    }
    [longer, shorter] = examples[old]["features"]["history"].values()
    assert 0 < len(shorter) < len(longer) and longer[: len(shorter)] != longer


def test_a_replay_above_the_limit_ends_with_code_3(
    searcher: Searcher, model_dir: Path, index_dir: Path, tools: Tools, tmp_path: Path
) -> None:  # fmt: skip
    folder = tmp_path / "log"
    ids = [answer["request"] for answer in logged(searcher, folder, [{"user": f"u{n}"} for n in range(20)])]
    features = {row["request"]: json.loads(row["features"]) for row in rows_of(folder)}
    for request in ids[:3]:
        altered(folder, request, features=json.dumps({**features[request], "age": 77.0}))
    arguments = ("--log", folder, "--model", model_dir, "--index", index_dir, "--out", tmp_path / "report.json")
    assert json.loads(tools.ran("replay", *arguments, "--limit", "0.15"))["differing"] == 0.15
    assert len(json.loads((tmp_path / "report.json").read_text())["examples"]) == 3
    code, out, error = tools.run("replay", *arguments, "--limit", "0.14")
    assert code == 3 and json.loads(out)["differing"] == 0.15
    assert "15.00% of the requests differ, more than --limit 14.00%" in error
    assert "needs a share from 0 to 1" in tools.refused(2, "replay", *arguments, "--limit", "2")
    (tmp_path / "empty").mkdir()
    assert "no complete log" in tools.refused(2, "replay", *arguments[2:], "--log", tmp_path / "empty")
    for request in ids:
        altered(folder, request, model="another")
    assert "give the logged model" in tools.refused(3, "replay", *arguments)


def test_order_and_scores_are_compared_up_to_ties() -> None:
    logged = {"a": 9.0, "b": 5.0, "c": 5.0}
    for same in (logged, {"a": 9.0005, "c": 5.0004, "b": 5.0}, {"a": 9.0, "b": 5.0, "tie": 5.0}):
        assert _is_same(logged, same), same
    for other in (
        {"b": 9.0, "a": 5.0, "c": 5.0}, {"b": 5.0, "c": 5.0, "a": 9.0}, {"a": 9.002, "b": 5.0, "c": 5.0},
        {"other": 9.0, "b": 5.0, "c": 5.0}, {"a": 9.0, "b": 5.0}, {"a": 900.0, "b": 500.0, "c": 500.0},
    ):  # fmt: skip
        assert not _is_same(logged, other) and not _is_same(other, logged), other
    assert _is_same({}, {}) and not _is_same({}, logged)


def test_a_replay_skips_requests_that_forget_changed(searcher: Searcher, tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = [{"user": "u1"}, {"user": "u2", "filter": "year != 1901"}, {"user": "u3", "top": 40}]
    answers = logged(searcher, tmp_path, bodies)
    [forgotten] = {document["key"] for document in answers[2]["documents"][:1]}
    in_first = forgotten in [document["key"] for document in answers[0]["documents"]]
    forget_in_log(tmp_path, [], [forgotten], Changes())
    report = replay(searcher, read_log(tmp_path))
    assert report["forgotten"] >= 1 + in_first and report["requests"] + report["forgotten"] == 3
    assert report["differing"] == 0


def write_shown(searcher: Searcher, folder: Path) -> None:
    """Write shown.parquet of clicks on logged answers into the current folder, by the statements of the page."""
    bodies = [{"user": f"u{number}", "top": 6, "exclude_seen": False} for number in range(40)]
    answers = logged(searcher, folder / "requests", bodies)
    clicks = [(answer["request"], answer["documents"][place]["key"]) for answer in answers for place in (1, 4)]
    requests, keys = zip(*clicks, strict=True)
    pq.write_table(pa.table({"request": requests, "document": keys}), folder / "clicks.parquet")
    page = (Path(__file__).parents[3] / "docs/feedback.md").read_text("utf-8")
    [statements] = [block for block in code_of(page) if "CREATE VIEW impressions" in block]
    exec(statements, {})
    rows = pq.read_table("shown.parquet").to_pylist()
    assert len(rows) == 80
    pairs = zip(bodies, answers, strict=True)
    of_user = {body["user"]: [document["key"] for document in answer["documents"]] for body, answer in pairs}
    for row in rows:
        answer = of_user[row["user_id"]]
        assert row["clicked"] in (answer[1], answer[4])
        assert row["shown"] == [answer[place] for place in (0, 2, 3, 5)]
        assert row["positions"] == [1 + answer.index(row["clicked"]), 1, 3, 4, 6]


@pytest.mark.slow
def test_clicks_on_logged_answers_become_pairs_of_fine_tuning(
    searcher: Searcher, dataset: Dataset, model_dir: Path, tiny_interactions: Any, tools: Tools,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By the statements and options of the page."""
    monkeypatch.chdir(tmp_path)
    write_shown(searcher, tmp_path)
    source = tiny_interactions.source
    small = [f"model.{override}" for override in SMALL]
    tools.ran(
        "make_shards", "interactions", "--config", tiny_interactions.config, "--interactions", "clicked.parquet",
        "--split", "train", "--like", dataset.dir, "--items", source / "items.csv", "--users", source / "users.csv",
        "--out", "clicked",
    )  # fmt: skip
    listed = tools.ran(
        "list_candidates", "--data", "clicked", "--out", "shown.npy", "--given", "shown.parquet", "--query-column",
        "user_id", "--positive-column", "clicked", "--column", "shown", "--position-column", "positions",
    )  # fmt: skip
    assert "4.0 documents per query" in listed
    loss, negatives = "{name: pair_ce, position_bias: 6}", "{in_batch: false, hard: 4, mining: {file: shown.npy}}"
    given = ["data.dir=clicked", "run.dir=run", f"sft.init={model_dir}", f"sft.negatives={negatives}"]
    command = [
        "--config",
        tiny_interactions.config,
        *small,
        *given,
        f"sft.loss={loss}",
        "sft.steps=3",
        "sft.rows_global=16",
    ]
    run_command(tmp_path / "log.txt", "sft", *map(str, command)).check()
    last = load_checkpoint(read_manifest(checkpoints_in(tmp_path / "run/sft/checkpoints")[-1]), 0, 1)
    assert last.common_tensors()["position_bias"][0].abs().min() > 0
    wrong = [str(word).replace("in_batch: false", "in_batch: true") for word in command]
    log = tmp_path / "refused.txt"
    assert run_command(log, "sft", *wrong).exit_code == 2
    assert "sft.loss.position_bias" in log.read_text() and "negatives that were shown" in log.read_text()
