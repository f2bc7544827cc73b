"""Training on plain WebDataset shards: correct rows on every rank, bad samples replaced, dangerous ones rejected."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from webdataset import TarWriter

from bigdssm.config import DataConfig, TokenizerConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.features import Categorical, Numeric, Text
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.loader.batch import Collator
from bigdssm.loader.plain_stream import PlainStream
from bigdssm.utils.hashing import hash64

SHARDS, SAMPLES = 4, 100
CONFIG = DataConfig(
    dir="data",
    query={"query": Text(max_tokens=8), "age": Numeric()},
    doc={"doc": Text(max_tokens=8), "kind": Categorical()},
    tokenizer=TokenizerConfig(vocab_size=200),
)


def sample(i: int) -> dict[str, object]:
    rest = {"age": i, "kind": f"kind {i % 7}"}
    return {"query.txt": f"word{i % 50} of {i % 7}", "doc.txt": f"document {i % 40}", "json": rest}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Path]:
    """A dataset of the first shard, and the folder of all shards."""
    folder = tmp_path_factory.mktemp("plain")
    for shard in range(SHARDS):
        with TarWriter(str(folder / f"{shard:03d}.tar"), encoder=True) as writer:
            for i in range(shard * SAMPLES, (shard + 1) * SAMPLES):
                writer.write({"__key__": f"{i:06d}", **sample(i)})
    make_pairs(CONFIG, PairTables(files=(folder / "000.tar",)), IngestTarget(folder / "dataset"))
    return Dataset.open(folder / "dataset"), folder


def stream(plain: tuple[Dataset, Path], pattern: str = "{000..003}.tar", **numbers: object) -> PlainStream:
    return PlainStream(plain[0], str(plain[1] / pattern), **{"rows_global": 40, **numbers})  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_rows_of_all_shards_with_their_own_values(plain: tuple[Dataset, Path], num_workers: int) -> None:
    dataset, folder = plain
    repacked = folder / f"repacked-{num_workers}"
    tables = PairTables(files=tuple(sorted(folder.glob("*.tar"))), split="train")
    make_pairs(CONFIG, tables, IngestTarget(repacked, like=dataset.dir))
    whole = Dataset.open(repacked)
    (expected,) = whole.iterate("train", SHARDS * SAMPLES)
    of_age = {int(age): i for i, age in enumerate(np.asarray(expected.query["age"]))}
    ranks = [stream(plain, rows_global=41, rank=k, world_size=2, num_workers=num_workers) for k in range(2)]
    ids, ages = [set(), set()], []
    for step in range(60):
        parts = [next(rank) for rank in ranks]
        assert [len(rows) for rows in parts] == [20, 21] and {rows.step for rows in parts} == {step}
        for k, rows in enumerate(parts):
            batch = Collator(dataset.schema, None)(rows)
            age = batch.query["age"].int().tolist()
            same = expected.take(np.array([of_age[a] for a in age]))
            assert np.array_equal(rows.query_ids, same.query_ids)
            assert np.array_equal(rows.doc_ids, whole.catalogue.ids(same.doc_rows))
            assert rows.query["query"].values.tolist() == same.query["query"].values.tolist()
            kinds = batch.doc["kind"][batch.positive].tolist()
            assert [dataset.schema.doc["kind"].vocabulary[code - 2] for code in kinds] == [f"kind {a % 7}" for a in age]
            assert rows.row_ids.tolist() == [hash64(f"{folder}/{a // 100:03d}.tar/{a:06d}") for a in age]
            ids[k] |= {*rows.row_ids.tolist()}
            ages += age
    for rank in ranks:
        rank.close()
    assert all(len(own) > 0.8 * SHARDS * SAMPLES for own in ids)  # each rank reads all shards
    assert np.abs(np.diff(ages)).mean() > 60  # and not in their order


def test_resuming_logs_a_warning_and_other_shards_are_refused(
    plain: tuple[Dataset, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        first = stream(plain)
    assert "4 plain shards without an index: a resumed run draws different rows" in caplog.text
    rows = list(islice(first, 5))
    state = json.loads(json.dumps(first.state()))
    assert [np.array_equal(a.row_ids, b.row_ids) for a, b in zip(rows, stream(plain), strict=False)] == [True] * 5
    resumed = stream(plain, start_step=5)
    assert resumed.check_state(state)
    assert next(resumed).step == 5
    for changed, message in [
        (stream(plain, rows_global=80), "rows_global was 40, is 80"),
        (stream(plain, "{000..001}.tar"), r"webdataset was '.*003}.tar', is '.*001}.tar'"),
        (stream(plain, seed=1), "seed was 0, is 1"),
    ]:
        with pytest.raises(DataError, match=message):
            changed.check_state(state)


def members(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def text(i: int, **changes: object) -> bytes:
    return json.dumps({"query": f"a {i}", "doc": f"b {i}", "age": 1, "kind": "kind 1", **changes}).encode()


def test_samples_that_cannot_be_used_are_named_and_replaced(plain: tuple[Dataset, Path], tmp_path: Path) -> None:
    bad = {"a.json": b"{", "b.query.txt": b"\xff", "c.json": text(0, doc=" "), "../../d.json": text(0, query=None)}
    shard = members(tmp_path / "s.tar", {**{f"{i}.json": text(i) for i in range(36)}, **bad})
    quarantine = tmp_path / "q.jsonl"
    part = PlainStream(plain[0], str(shard), rows_global=20, max_bad_fraction=0.2, quarantine=quarantine, num_workers=1)
    assert all(len(rows) == 20 for rows in islice(part, 2100 // 20))
    part.check()
    part.close()
    assert 0.05 < part.rows_bad / part.rows_read < 0.15
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert sorted(line["reason"].split(": ", 1)[0] for line in lines) == [
        "sample '../../d'", "sample 'a'", "sample 'b'", "sample 'c'",
    ]  # fmt: skip
    assert {line["shard"] for line in lines} == {str(shard)}
    with pytest.raises(DataError, match=r"are bad, more than data.max_bad_fraction=0.001"):
        list(islice(PlainStream(plain[0], str(shard), rows_global=20), 100))
    none = members(tmp_path / "none.tar", {"0.json": text(0, doc="")})
    with pytest.raises(DataError, match=r"almost all samples are unusable; the last one: .*no document"):
        list(islice(PlainStream(plain[0], str(none), rows_global=20, max_bad_fraction=1), 20))
    with pytest.raises(DataError, match="did you mean 'querry'"):
        other = members(tmp_path / "o.tar", {"0.json": json.dumps({"querry": "a", "doc": "b"}).encode()})
        list(islice(PlainStream(plain[0], str(other), rows_global=20), 20))


@pytest.mark.parametrize(
    ("suffix", "message"),
    [("pyd", "is a pickle"), ("pickle", "is a pickle"), ("pth", "is a pickle"), ("cut", "damaged or truncated after")],
)
def test_shards_that_are_not_safe_or_not_whole_are_refused(
    plain: tuple[Dataset, Path], tmp_path: Path, suffix: str, message: str
) -> None:
    shard = members(tmp_path / "s.tar", {"0.json": text(0), f"0.{suffix}": b"cos\nsystem\n", "1.json": text(1)})
    if suffix == "cut":
        shard.write_bytes(shard.read_bytes()[:2500])
    with pytest.raises(DataError, match=message):
        list(islice(PlainStream(plain[0], str(shard), rows_global=4, num_workers=1), 20))


def test_commands_urls_and_missing_shards_are_refused(plain: tuple[Dataset, Path], tmp_path: Path) -> None:
    for pattern in (f"pipe:touch {tmp_path}/ran", "http://127.0.0.1/a.tar", f"{tmp_path}/a.tar::pipe:true"):
        with pytest.raises(DataError, match="only local shards can be read directly, and commands are not executed"):
            PlainStream(plain[0], pattern, rows_global=4)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(DataError, match=r"shard .*/b\.tar does not exist"):
        PlainStream(plain[0], f"{tmp_path}/{{b,c}}.tar", rows_global=4)


def test_histories_are_refused(interactions: Path, plain: tuple[Dataset, Path]) -> None:
    with pytest.raises(ConfigError, match=r"data\.query\.history: WebDataset samples are pairs"):
        PlainStream(Dataset.open(interactions), str(plain[1] / "000.tar"), rows_global=4)
    with pytest.raises(ConfigError, match=r"set sampling.frequency=streaming"):
        stream(plain).doc_weights()


def test_shards_without_texts_are_skipped_and_refused_alone(plain: tuple[Dataset, Path], tmp_path: Path) -> None:
    members(tmp_path / "images.tar", {"0.jpg": b"a picture"})
    members(tmp_path / "texts.tar", {"0.json": text(0), "1.json": text(1)})
    both = PlainStream(plain[0], f"{tmp_path}/{{images,texts}}.tar", rows_global=4, num_workers=1)
    assert len(list(islice(both, 3))) == 3
    with pytest.raises(DataError, match=r"images.tar have no member of the types \.txt, \.text, \.json"):
        list(islice(PlainStream(plain[0], f"{tmp_path}/images.tar", rows_global=4, num_workers=1), 20))
