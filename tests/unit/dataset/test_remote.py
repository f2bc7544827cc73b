"""A dataset at a URL: the same rows as on disk for any server fault, and a correct cache of bounded size."""

from __future__ import annotations

import http.server
import itertools
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from bigdssm.config import DataConfig
from bigdssm.dataset import blocks as blocks_module
from bigdssm.dataset import remote
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.remote import FileCache
from bigdssm.errors import ConfigError, DataError
from bigdssm.loader.inspection import describe, sample_rows, verify_dataset
from bigdssm.loader.stream import PairStream
from bigdssm.utils import urls
from bigdssm.utils.atomic import temporary_path
from tests.remote import Server, answer, short
from tests.tiny_datasets import Writer
from tests.unit.ingest.days import make_day

pytest.importorskip("aiohttp")
GB = 1 << 30


def failing(handler, content: bytes) -> None:
    answer(handler, 500, b"try later")


def resetting(handler, content: bytes) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def cut_off(handler, content: bytes) -> None:
    """Announce all bytes, send half, and close the connection."""
    answer(handler, 206, content[: len(content) // 2], len(content))
    handler.close_connection = True


def slow(handler, content: bytes) -> None:
    answer(handler, 206, content[:1], len(content))
    handler.wfile.flush()
    time.sleep(1.0)
    handler.close_connection = True


@pytest.fixture
def server(interactions: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copytree(interactions, tmp_path / "served" / "a" / "data")
    server = Server(tmp_path / "served")
    yield server
    server.close()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FileCache:
    monkeypatch.setattr(urls, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(urls, "LONGEST_WAIT_S", 0.002)
    return FileCache(tmp_path / "cache", GB)


def steps(dataset: Dataset, count: int = 14, **options: int) -> list[tuple]:
    """Return everything in the first steps of a stream, an epoch of it and some of the next."""
    stream = PairStream(dataset, rows_global=80, lanes=8, seed=3, **options)
    taken = [
        (r.row_ids.tolist(), r.doc_rows.tolist(), r.query["age"].tolist(), r.query["history"].values.tolist())
        for r in itertools.islice(stream, count)
    ]
    stream.close()
    return taken


def entries(store: FileCache, suffix: str = "") -> list[Path]:
    return [path for path in store.dir.glob("??/*") if path.suffix == suffix]


def used(store: FileCache) -> int:
    return sum(path.stat().st_size for path in store.dir.glob("??/*"))


def blocks_of(dataset: Dataset) -> list[tuple[remote.RemoteFile, int, int, int]]:
    index = dataset.index("train")
    return [
        (index.shards[index.shard[b]], int(index.offset[b]), int(index.size[b]), int(index.checksum[b]))
        for b in range(index.num_blocks)
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_rows_are_those_on_disk(server: Server, store: FileCache, interactions: Path, workers: int) -> None:
    dataset, local = Dataset.open(f"{server.url}/a/data", cache=store), Dataset.open(interactions)
    assert dataset.fingerprint == local.fingerprint
    assert dataset.doc_counts().tolist() == local.doc_counts().tolist()
    assert dataset.catalogue.keys(np.arange(3)) == ["d0", "d1", "d2"]
    assert list(dataset.schema.doc["item"].vocabulary) == [f"i{number}" for number in range(37)]
    next(iter(dataset.iterate("train", 10)))  # this process is connected before the others are forked
    assert steps(dataset, num_workers=workers) == steps(local)


def test_documents_that_changed_come_with_their_versions(store: FileCache, tmp_path: Path) -> None:
    for day in range(2):
        make_day(tmp_path / "served", day)
    local = Dataset.open(tmp_path / "served" / "data")
    server = Server(tmp_path / "served")
    distant = Dataset.open(f"{server.url}/data", cache=store)
    parts = [next(dataset.iterate("train", 400)) for dataset in (distant, local)]
    prices = [d.catalogue.column("price", r.doc_rows) for d, r in zip((distant, local), parts, strict=True)]
    assert prices[0].tolist() == prices[1].tolist() and prices[0].max() >= 100, "in their newest versions"
    server.close()


def test_texts_come_with_their_tokenizer(texts: Path, store: FileCache) -> None:
    server = Server(texts)
    mine, theirs = (
        next(iter(d.iterate("test", 100))) for d in (Dataset.open(server.url, cache=store), Dataset.open(texts))
    )
    server.close()
    assert mine.query["words"].values.tolist() == theirs.query["words"].values.tolist()


def test_an_object_store(interactions: Path, store: FileCache) -> None:
    """`memory://` represents all file systems of fsspec without asyncio."""
    import fsspec

    files = fsspec.filesystem("memory")
    files.put(str(interactions), "/bucket/dt=1/data", recursive=True)
    assert steps(Dataset.open("memory://bucket/dt=1/data", cache=store)) == steps(Dataset.open(interactions))
    again = Dataset.open("memory://bucket/dt=1/data/", cache=store)
    files.rm("/bucket", recursive=True)
    assert again.num_rows("train") == 1000


@pytest.mark.slow
def test_local_folders_do_without_fsspec(interactions: Path) -> None:
    code = f"""
import sys
sys.modules["fsspec"] = sys.modules["aiohttp"] = None  # any import of them fails
sys.modules["torch.utils.data"] = type(sys)("data"); vars(sys.modules["torch.utils.data"]).update(
    DataLoader=None, IterableDataset=type("IterableDataset", (), {{}}), get_worker_info=None)
from bigdssm.dataset.dataset import Dataset
assert next(iter(Dataset.open({str(interactions)!r}).iterate("train", 100))).row_ids[99] == 99
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [failing, resetting, cut_off, short])
def test_faults_that_pass_change_nothing(server: Server, store: FileCache, interactions: Path, fault) -> None:
    """Most responses are wrong, during opening and reading."""
    server.every(3, fault)
    dataset = Dataset.open(f"{server.url}/a/data", cache=store)
    server.every(5, fault)
    assert steps(dataset) == steps(Dataset.open(interactions))


def test_slow_bodies_are_given_up(server: Server, store: FileCache, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.open(f"{server.url}/a/data", cache=store)
    monkeypatch.setattr(urls, "TIMEOUT_S", 0.1)
    shard, *block = blocks_of(dataset)[0]
    server.every(2, slow)
    start = time.monotonic()
    assert xxhash.xxh3_64_intdigest(shard.read(*block)) == block[2]
    assert time.monotonic() - start < 0.9, "the slow answer takes a second"


def test_a_server_that_stays_away_ends_the_run(server: Server, store: FileCache) -> None:
    """This is not damage: no rows may be skipped, so that the run can resume exactly."""
    dataset = Dataset.open(f"{server.url}/a/data", cache=store)
    server.every(0, failing)
    with pytest.raises(DataError, match=r"train-000000.tar cannot be reached: 8 attempts failed, the last with .*500"):
        list(dataset.iterate("train", 100))
    stream = PairStream(dataset, rows_global=80, lanes=8)
    with pytest.raises(DataError, match="rank 0 cannot read"):
        list(itertools.islice(stream, 40))
    assert stream.rows_bad == 0


def test_damage_on_the_server_is_damage(server: Server, store: FileCache, caplog) -> None:
    folder = server.folder / "a/data/partitions/all"
    dataset = Dataset.open(f"{server.url}/a/data", cache=store)
    (folder / "train-000000.tar").unlink()
    content = bytearray((folder / "train-000001.tar").read_bytes())
    index = dataset.index("train")
    content[int(index.offset[4]) + 20] ^= 1
    (folder / "train-000001.tar").write_bytes(content)
    with (folder / "train-000002.tar").open("r+b") as file:
        file.truncate(int(index.offset[9]) + 10)  # blocks 10 and 11 start beyond the end
    rows = sum(len(rows) for rows in dataset.iterate("train", 100))
    lost = [0, 1, 2, 3, 4, 9, 10, 11]
    assert rows == 1000 - int(index.rows[lost].sum())
    for reason in ("missing", "checksum", "cut short: 10 of", "cut short: 0 of"):
        assert reason in caplog.text
    assert f"{server.url}/a/data/partitions/all/train-000000.tar" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "dataset.json").unlink(), r"a/data is not a dataset"),
        (lambda d: (d / "dataset.json").write_text("{"), r"dataset.json is damaged"),
        (lambda d: (d / "dataset.json").write_text("{}"), r"metadata of another format"),
        (lambda d: (d / "schema.json").unlink(), r"schema.json does not exist"),
        (lambda d: (d / "vocabularies/doc.item.000000.arrow").unlink(), r"doc.item.000000.arrow does not exist"),
        (lambda d: (d / "vocabularies/doc.item.000000.arrow").write_bytes(b"x"), r"item.000000.arrow is damaged: its"),
        (lambda d: (d / "catalogue/000000.arrow").unlink(), r"000000.arrow does not exist"),
        (lambda d: (d / "catalogue/000000.arrow").write_bytes(b"x"), r"000000.arrow is damaged: its checksum"),
        (lambda d: (d / "partitions/all/train.index.arrow").write_bytes(b"x"), r"train.index.arrow is damaged"),
    ],
)
def test_damage_of_a_remote_dataset_is_named(server: Server, store: FileCache, spoil, message: str) -> None:
    spoil(server.folder / "a/data")
    with pytest.raises(DataError, match=message):
        Dataset.open(f"{server.url}/a/data", cache=store)
    assert not entries(store, ".unfinished")


@pytest.mark.parametrize("relative", ["../../x", "/etc/x", "a/../../x", "a\\..\\x", "a//b"])
def test_paths_out_of_the_dataset_are_refused(server: Server, store: FileCache, relative: str) -> None:
    path = server.folder / "a/data/dataset.json"
    content = json.loads(path.read_text())
    content["catalogue"][0]["file"] = relative
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="not a plain path inside it"):
        Dataset.open(f"{server.url}/a/data", cache=store)


def test_servers_without_ranges_are_refused(server: Server, store: FileCache) -> None:
    dataset = Dataset.open(f"{server.url}/a/data", cache=store)
    server.ranges = False
    with pytest.raises(DataError, match="ignores byte ranges"):
        list(dataset.iterate("train", 100))


def test_refused_access_is_not_tried_again(server: Server, store: FileCache) -> None:
    server.every(0, lambda handler, content: answer(handler, 403, b""))
    with pytest.raises(DataError, match=r"the server refuses it \(.*403.*check address and credentials"):
        Dataset.open(f"{server.url}/a/data?token=secret", cache=store)
    assert server.requests == {"/a/data/dataset.json": 1}


def test_secrets_of_a_url_are_not_shown(server: Server, store: FileCache, caplog) -> None:
    caplog.set_level("INFO")
    dataset = Dataset.open(f"{server.url}/a/data?token=secret", cache=store)
    server.every(2, failing)
    next(iter(dataset.iterate("test", 50)))
    shutil.rmtree(server.folder / "a/data/partitions")
    assert not sum(len(rows) for rows in dataset.iterate("train", 500))
    assert "trying again" in caplog.text and "is missing" in caplog.text and "secret" not in caplog.text


@pytest.mark.parametrize("url", ["simplecache::memory://x", "nosuch://x/y"])
def test_urls_that_cannot_be_read(url: str, store: FileCache) -> None:
    with pytest.raises(ConfigError, match=r"chained URLs are not supported|needs another package"):
        Dataset.open(url, cache=store)


def test_a_missing_extra_is_named(store: FileCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ConfigError, match=r"pip install 'bigdssm\[remote\]'"):
        Dataset.open("http://127.0.0.1:1/never", cache=store)


def test_cached_files_are_not_fetched_again(server: Server, store: FileCache) -> None:
    steps(Dataset.open(f"{server.url}/a/data", cache=store))
    server.requests.clear()
    steps(Dataset.open(f"{server.url}/a/data", cache=store))
    assert all(path.endswith((".json", ".txt")) for path in server.requests)


def test_same_names_in_other_folders_are_other_files(server: Server, store: FileCache) -> None:
    """Two datasets whose files have the same names, the second of other rows; each is read after the other."""
    Writer(server.folder / "b/data").write("first", "all")  # a second partition has other values
    for _ in range(2):
        for folder in "ab":
            there = Dataset.open(f"{server.url}/{folder}/data", ["all"], cache=store)
            local = Dataset.open(server.folder / folder / "data", ["all"])
            assert steps(there, 3) == steps(local, 3)
    a, b = (blocks_of(Dataset.open(f"{server.url}/{folder}/data", ["all"], cache=store))[0] for folder in "ab")
    assert a[0].name == b[0].name and a[0].read(*a[1:]) != b[0].read(*b[1:])


def test_a_changed_block_is_not_taken_from_the_cache(server: Server, store: FileCache) -> None:
    """The checksum is part of the name: the same offset of the same shard, written again."""
    dataset = Dataset.open(f"{server.url}/a/data", cache=store)
    shard, offset, size, checksum = blocks_of(dataset)[0]
    shard.read(offset, size, checksum)
    path = server.folder / "a/data/partitions/all" / shard.name
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    now = bytes(content[offset : offset + size])
    assert shard.read(offset, size, xxhash.xxh3_64_intdigest(now)) == now


def test_a_torn_block_in_the_cache_is_fetched_again(server: Server, store: FileCache) -> None:
    """As after a machine's crash: the file exists, but is incomplete."""
    dataset = Dataset.open(f"{server.url}/a/data", cache=store)
    shard, *block = blocks_of(dataset)[0]
    before = set(entries(store))
    content = shard.read(*block)
    (path,) = set(entries(store)) - before
    for torn in (content[:-1], b"", b"\0" * len(content)):
        path.write_bytes(torn)
        assert shard.read(*block) == content
        assert path.read_bytes() == content


def test_wrong_content_is_never_cached(server: Server, store: FileCache) -> None:
    dataset = Dataset.open(f"{server.url}/a/data", cache=store)
    shard, *block = blocks_of(dataset)[0]
    before = set(entries(store))
    server.every(0, lambda handler, content: answer(handler, 206, b"\0" * len(content)))
    shard.read(*block)
    assert set(entries(store)) == before


def test_the_cap_holds_and_the_least_recently_used_go(server: Server, tmp_path: Path, store: FileCache) -> None:
    held = Dataset.open(f"{server.url}/a/data", cache=store)
    fixed, blocks = used(store), blocks_of(held)
    one = max(size for _, _, size, _ in blocks)
    small = FileCache(store.dir, fixed + 5 * one)
    names = {}
    for shard, *block in blocks:
        for wanted in (blocks[0], (shard, *block)):  # the first block stays in use
            remote.RemoteFile(wanted[0].url, small).read(*wanted[1:])
            time.sleep(0.002)  # so that times of use differ
        names[block[0], str(shard)] = small.path(remote.cache_key(shard.url, *block))
        assert used(small) <= small.max_bytes
    there = [path.exists() for path in names.values()]
    assert there[0] and there[-1] and not all(there) and sum(there) >= 3
    assert steps(held)  # open files are not evicted for blocks
    assert all(path.exists() for path in held.dir.rglob("*") if path.is_symlink())


def test_a_closed_dataset_is_evicted(server: Server, store: FileCache) -> None:
    Writer(server.folder / "b/data").write()
    first = Dataset.open(f"{server.url}/a/data", cache=store)
    tree, size = first.dir, used(store)
    small = FileCache(store.dir, size + size // 2)
    with pytest.raises(DataError, match=r"data.cache_bytes=\d+ is too small for a file of \d+ bytes"):
        Dataset.open(f"{server.url}/b/data", cache=small)
    del first
    assert steps(Dataset.open(f"{server.url}/b/data", cache=small))
    assert used(small) <= small.max_bytes and not tree.exists()


def test_a_full_disk_costs_only_time(server: Server, store: FileCache, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    dataset = Dataset.open(f"{server.url}/a/data", cache=store)
    monkeypatch.setattr(
        remote.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    assert len(steps(dataset)) == 14
    assert "blocks are not cached: No space left on device" in caplog.text


def test_a_cache_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir=.*file cannot be used"):
        Dataset.open(f"{server.url}/a/data", cache=FileCache(tmp_path / "file", GB))


def test_the_config_names_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert FileCache.from_config(DataConfig(dir="", cache_bytes=7)) == FileCache(tmp_path / "bigdssm", 7)
    assert FileCache.from_config(DataConfig(dir="", cache_dir=str(tmp_path / "x"))).dir == tmp_path / "x"


def reader(url: str, store: FileCache) -> subprocess.Popen[str]:
    """Start a process that prints the row ids and documents of a stream's first steps."""
    code = f"""
import itertools, json
from pathlib import Path
from bigdssm.dataset.dataset import Dataset
from bigdssm.loader.stream import PairStream
from bigdssm.dataset.remote import FileCache
dataset = Dataset.open({url!r}, cache=FileCache(Path({str(store.dir)!r}), {store.max_bytes}))
stream = PairStream(dataset, rows_global=80, lanes=8, seed=3)
print(json.dumps([[r.row_ids.tolist(), r.doc_rows.tolist()] for r in itertools.islice(stream, 14)]))
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> list[list[list[int]]]:
    return json.loads(process.communicate(timeout=60)[0])


def expected_of(folder: Path) -> list[list[list[int]]]:
    return [[row_ids, doc_rows] for row_ids, doc_rows, *_ in steps(Dataset.open(folder))]


@pytest.mark.slow
def test_processes_fill_one_cache_together(server: Server, store: FileCache, interactions: Path) -> None:
    """With a cap at which they evict each other's blocks; large files are fetched once."""
    fixed = sum(p.stat().st_size for p in interactions.rglob("*") if p.is_file() and p.suffix != ".tar")
    small = FileCache(store.dir, fixed + 20_000)
    server.fault = lambda handler, content: bool(time.sleep(0.005))  # so that they overlap
    processes = [reader(f"{server.url}/a/data", small) for _ in range(2)]
    peak = 0
    while any(process.poll() is None for process in processes):
        peak = max(peak, used_now(small))
        time.sleep(0.001)
    expected = expected_of(interactions)
    assert [finished(process) for process in processes] == [expected, expected]
    assert server.requests["/a/data/catalogue/000000.arrow"] == 1
    assert 0 < peak <= small.max_bytes
    assert not entries(small, ".unfinished")


def used_now(store: FileCache) -> int:
    """Return the bytes in the cache while others change it."""
    total = 0
    for path in store.dir.glob("??/*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.mark.slow
def test_a_fill_that_is_killed_leaves_no_valid_entry(server: Server, store: FileCache, interactions: Path) -> None:
    """A process is killed while fetching the catalogue and another one waits for it; the other one fetches it."""
    url, path = f"{server.url}/a/data", "/a/data/catalogue/000000.arrow"
    stuck = threading.Event()

    def stall(handler, content: bytes) -> bool:
        if handler.path == path and handler.command == "GET" and not stuck.is_set():
            handler.send_response(206)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[: len(content) // 2])
            handler.wfile.flush()
            stuck.set()
            time.sleep(60)
        return False

    server.fault = stall
    victim = reader(url, store)
    assert stuck.wait(60)
    (part,) = entries(store, ".unfinished")
    assert not part.with_name(part.name[1:].removesuffix(".unfinished")).exists()
    other = reader(url, store)
    deadline = time.monotonic() + 60
    while server.requests["/a/data/schema.json"] < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert server.requests[path] == 1, "the second waits for the first"
    victim.kill()
    victim.communicate(timeout=30)
    assert finished(other) == expected_of(interactions)
    assert server.requests[path] == 2
    assert not entries(store, ".unfinished")


def test_parts_of_killed_processes_are_removed_and_overwritten(server: Server, store: FileCache) -> None:
    """Longer than the file, with the name of the file."""
    url = f"{server.url}/a/data/catalogue/000000.arrow"
    checksum = json.loads((server.folder / "a/data/dataset.json").read_text())["catalogue"][0]["checksum"]
    part = temporary_path(store.path(remote.cache_key(url, checksum)))
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\xff" * 100_000)
    stale = store.dir / "00" / ("." + "f" * 38 + ".unfinished")
    stale.parent.mkdir(exist_ok=True)
    stale.write_bytes(b"\xff" * 100_000)
    dataset = Dataset.open(f"{server.url}/a/data", cache=FileCache(store.dir, 200_000))
    assert dataset.catalogue.num_docs == 37 and not part.exists()
    keep = FileCache(store.dir, used(store) - 1)
    shard, *block = blocks_of(dataset)[0]
    remote.RemoteFile(shard.url, keep).read(*block)
    assert not stale.exists()


def test_blocks_of_a_window_are_fetched_side_by_side(server: Server, store: FileCache, interactions: Path) -> None:
    dataset = Dataset.open(f"{server.url}/a/data", cache=store)
    next(iter(dataset.iterate("test", 10)))  # connected
    present, most, lock = 0, 0, threading.Lock()

    def count(handler: http.server.BaseHTTPRequestHandler, content: bytes) -> bool:
        nonlocal present, most
        with lock:
            present += 1
            most = max(most, present)
        time.sleep(0.05)
        with lock:
            present -= 1
        return False

    server.fault = count
    assert steps(dataset, 2) == steps(Dataset.open(interactions), 2)
    assert 1 < most <= blocks_module.CONNECTIONS


def test_a_url_is_inspected_and_verified(server: Server, store: FileCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FileCache, "from_config", lambda config=None: store)
    url = f"{server.url}/a/data"
    found = describe(Dataset.open(url))
    assert next((size.split, size.rows, size.blocks, size.shards) for size in found.sizes) == ("train", 1000, 16, 4)
    assert found.sizes[0].num_bytes > 10_000 and len(sample_rows(Dataset.open(url))) == 10
    assert verify_dataset(url) == []
    shard = server.folder / "a/data/partitions/all/train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    assert len(next(iter(Dataset.open(url).iterate("train", 1000)))) == 1000, "the cache has it, rightly"
    (damage,) = verify_dataset(url)
    assert damage.startswith(f"{url}/partitions/all/train-000001.tar, block 4: the bytes are damaged")
    flipped = server.folder / "a/data/catalogue/000000.arrow"
    flipped.write_bytes(flipped.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"catalogue/000000.arrow is damaged: its checksum"):
        verify_dataset(url)
