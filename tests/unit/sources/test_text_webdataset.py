"""WebDataset shards of other writers: the resulting dataset, refused shards, and quarantined samples."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from webdataset import TarWriter

from bigdssm.config import DataConfig, TokenizerConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import DataError
from bigdssm.features import Text
from bigdssm.ingest.job import IngestReport, IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs

ROWS = 300
TEXT = Text(max_tokens=8)
TEXTS = DataConfig(dir="data", query={"query": TEXT}, doc={"doc": TEXT}, tokenizer=TokenizerConfig(vocab_size=200))


def record(i: int) -> dict[str, str]:
    return {"query": f"word{i % 50} of {i % 7}", "doc": f"document {i % 40}"}


def write(path: Path, samples: list[dict[str, object]]) -> Path:
    with TarWriter(str(path), encoder=True) as writer:
        for number, sample in enumerate(samples):
            writer.write({"__key__": f"dir/{number:06d}", **sample})
    return path


def members(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def make(out: Path, *files: Path, config: DataConfig = TEXTS, **options: object) -> IngestReport:
    return make_pairs(config, PairTables(files=files, split="train", **options), IngestTarget(out))  # type: ignore[arg-type]


def test_json_and_text_members_give_the_dataset_that_a_table_gives(tmp_path: Path) -> None:
    lines = "".join(json.dumps(record(i)) + "\n" for i in range(ROWS))
    (tmp_path / "t.jsonl").write_text(lines)
    make(tmp_path / "table", tmp_path / "t.jsonl")
    as_json = write(tmp_path / "json.tar", [{"json": record(i), "jpg": b"\xff\xd8"} for i in range(ROWS)])
    parts = [{"query.txt": r["query"] + "\n", "doc.txt": r["doc"], "json": {"r": 1}} for r in map(record, range(ROWS))]
    as_text = write(tmp_path / "text.tar.gz", parts)
    expected = Dataset.open(tmp_path / "table").fingerprint
    for number, shard in enumerate((as_json, as_text)):
        report = make(tmp_path / str(number), shard)
        assert report.rows == {"train": ROWS} and report.num_bad == 0
        assert Dataset.open(tmp_path / str(number)).fingerprint == expected


def test_several_shards_with_ids_and_relevance(tmp_path: Path) -> None:
    samples = [{"json": {**record(i), "clicks": i % 3}, "doc.json": {"id": f"d{i % 40}"}} for i in range(ROWS)]
    shards = [write(tmp_path / f"{n}.tar", samples[n::2]) for n in range(2)]
    make(tmp_path / "out", *shards, doc_id_column="doc.id", relevance_column="clicks", query_id_column="__key__")
    dataset = Dataset.open(tmp_path / "out")
    assert sorted(dataset.catalogue.keys(np.arange(40))) == sorted(f"d{i}" for i in range(40))
    (rows,) = dataset.iterate("train", ROWS)
    assert np.bincount(rows.relevance.astype(int)).tolist() == [100, 100, 100]


def test_samples_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    good = {f"{i}.json": json.dumps(record(i)).encode() for i in range(ROWS)}
    bad = {
        "a.json": b"{",
        "b.json": b"[1]",
        "c.query.txt": b"\xff",
        "d.json": json.dumps(record(1)).encode(),
        "d.doc.txt": b"twice",
        "../../e.query.txt": b"a query alone",
    }
    shard = members(tmp_path / "s.tar", {**good, **bad})
    config = DataConfig(**{**vars(TEXTS), "max_bad_fraction": 0.1})
    report = make(tmp_path / "out", shard, config=config)
    assert report.rows == {"train": ROWS} and report.num_bad == 5
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {line["row"]: line["reason"] for line in lines}
    assert sorted(reasons) == list(range(ROWS + 1, ROWS + 6))
    for row, words in enumerate(
        [
            "sample 'a': .json is not JSON",
            "sample 'b': .json is a JSON list, needs an object",
            "sample 'c': invalid UTF-8 in .query.txt at byte 0",
            "sample 'd': column 'doc' comes from .doc.txt and from another member",
            "no document",
        ],
        ROWS + 1,
    ):
        assert words in reasons[row]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "s.tar"]


@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pkl", "pth", "query.PTH"])
def test_members_that_others_unpickle_are_refused(tmp_path: Path, suffix: str) -> None:
    shard = members(tmp_path / "s.tar", {"0.json": json.dumps(record(0)).encode(), f"0.{suffix}": b"cos\nsystem\n"})
    with pytest.raises(DataError, match=rf"member '0\.{suffix}' is a pickle, which can run code; rejected"):
        make(tmp_path / "out", shard)
    assert not (tmp_path / "out").exists()


def test_commands_are_not_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="commands are not run"):
        make(tmp_path / "out", Path(f"pipe:touch {tmp_path}/ran; cat x.tar"))
    assert not (tmp_path / "ran").exists()


def test_a_shard_compressed_by_zstd_is_read(tmp_path: Path) -> None:
    content = write(tmp_path / "s.tar", [{"json": record(i)} for i in range(20)]).read_bytes()
    shard = tmp_path / "s.tar.zst"
    shard.write_bytes(pa.Codec("zstd").compress(content, asbytes=True))
    assert make(tmp_path / "out", shard).rows == {"train": 20}
    shard.write_bytes(pa.Codec("zstd").compress(content[: 1024 * 10], asbytes=True))
    with pytest.raises(DataError, match=r"s\.tar\.zst is damaged or truncated after member 'dir/0000\d\d\.json'"):
        make(tmp_path / "cut", shard)


@pytest.mark.parametrize("damage", ["in a header", "in data", "behind a member", "a flipped header"])
def test_a_shard_that_is_not_whole_is_refused(tmp_path: Path, damage: str) -> None:
    shard = write(tmp_path / "s.tar", [{"json": record(i)} for i in range(20)])
    content = bytearray(shard.read_bytes())
    at = 1024 * 10  # the start of a member of less than 512 bytes
    cut = {"in a header": at + 100, "in data": at + 520, "behind a member": at}
    if damage in cut:
        content = content[: cut[damage]]
    else:
        content[at + 5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged or truncated after member 'dir/0000\d\d\.json'"):
        make(tmp_path / "out", shard)


def test_one_member_twice_and_unknown_columns(tmp_path: Path) -> None:
    content = json.dumps({"querry": "a", "doc": "b"}).encode()
    with pytest.raises(DataError, match=r"which data\.query\.query names; did you mean 'querry'"):
        make(tmp_path / "out", members(tmp_path / "a.tar", {"0.json": content}))
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for _ in range(2):
            member = tarfile.TarInfo("0.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match=r"duplicate file name.*give every sample a unique key"):
        make(tmp_path / "out", tmp_path / "b.tar")
    with pytest.raises(DataError, match="no usable samples"):
        make(tmp_path / "out", members(tmp_path / "c.tar", {"0.jpg": b"x"}))
