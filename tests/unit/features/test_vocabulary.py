"""Vocabularies: look-ups equal a dictionary's for any split into files, which are memory-mapped."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bigdssm.dataset.schema import Schema
from bigdssm.errors import DataError
from bigdssm.features import Categorical, vocabulary
from bigdssm.features.categorical import codes_of
from bigdssm.features.vocabulary import Vocabulary, write_part
from bigdssm.utils.hashing import hash_strings

VALUES = [f"{'ü' * (number % 5)} value {number}" for number in range(1000)]
FILE = "doc.kind.000000.arrow"


def in_parts(values: list[str], *ends: int) -> Vocabulary:
    """Return a vocabulary in memory with a part up to each end."""
    found = Vocabulary()
    for first, end in zip((0, *ends), (*ends, len(values)), strict=True):
        found = found.grown(pa.array(values[first:end], pa.large_string()))
    return found


def schema_of(known: Vocabulary) -> Schema:
    return Schema({}, {"kind": Categorical(vocabulary=known).with_name("kind")})


@pytest.mark.parametrize("distinct_hashes", [2**64 - 1, 7], ids=["hashes", "hashes that many strings share"])
@pytest.mark.parametrize("ends", [(), (300,), (1, 2, 999)])
def test_codes_are_those_of_a_dictionary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ends: tuple[int, ...], distinct_hashes: int
) -> None:
    def hashed(array: pa.Array) -> np.ndarray:
        return (hash_strings(array).view(np.uint64) % np.uint64(distinct_hashes)).view(np.int64)

    monkeypatch.setattr(vocabulary, "hash_strings", hashed)
    known = in_parts(VALUES, *ends)
    dictionary = {value: code for code, value in enumerate(VALUES)}
    asked = [VALUES[number * 7 % 1100] if number * 7 % 1100 < 1000 else f"other {number}" for number in range(2000)]
    expected = [dictionary.get(value, -1) for value in asked]
    array = pa.array(["", *asked, "x"]).slice(1, len(asked))
    for one in (known, known.saved(tmp_path, "a")):
        codes = one.codes(array)
        assert codes.dtype == np.int32 and codes.tolist() == expected
        assert one.codes(pa.array([], pa.string())).tolist() == []
        assert list(one) == VALUES and [one[0], one[2], one[999]] == [VALUES[0], VALUES[2], VALUES[999]]
    with pytest.raises(IndexError):
        known[1000]


SPELLINGS = ["true", "True", "TRUE", "1", "false", "False", "FALSE", "0", "x", ""]


@pytest.mark.parametrize(
    ("values", "codes"),
    [
        ("True False", [2, 2, 2, 2, 3, 3, 3, 3, 1, 0]),
        ("0 1", [3, 3, 3, 3, 2, 2, 2, 2, 1, 0]),
        ("false", [1, 1, 1, 1, 2, 2, 2, 2, 1, 0]),
        ("True 0 true", [4, 2, 2, 2, 3, 3, 3, 3, 1, 0]),  # values with codes of their own keep them
        ("1 2", [1, 1, 1, 2, 1, 1, 1, 1, 1, 0]),
        ("true false x", [2, 1, 1, 1, 3, 1, 1, 1, 4, 0]),
        ("", [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]),
    ],
)
def test_spellings_of_booleans_have_one_code_among_booleans(values: str, codes: list[int]) -> None:
    known = Vocabulary.of(values.split())
    assert Categorical(vocabulary=known).codes(pa.array(SPELLINGS)).tolist() == codes
    assert codes_of({"hash_buckets": 0, "vocabulary": list(known)}, SPELLINGS) == codes, "in exported models, too"


def test_vocabularies_are_compared_by_values_and_not_by_parts(tmp_path: Path) -> None:
    known = Vocabulary.of(VALUES)
    others = [VALUES[::-1], VALUES[:-1], [*VALUES[:-1], "other"], [VALUES[1], VALUES[0], *VALUES[2:]]]
    for ends in ((300,), (1, 2, 999)):
        same = in_parts(VALUES, *ends)
        assert same == known and hash(same) == hash(known) and same.saved(tmp_path / str(len(ends)), "a") == known
        assert schema_of(same).fingerprint() == schema_of(known).fingerprint()
        for size in (0, 1, 299, 300, 301, 1000, 2000):
            assert same.cut(size) == Vocabulary.of(VALUES[:size]) and list(same.cut(size)) == VALUES[:size]
            assert same.cut(size).codes(pa.array(VALUES)).tolist() == [*range(min(size, 1000)), *[-1] * (1000 - size)]
    assert all(Vocabulary.of(other) != known for other in others)
    assert len({schema_of(Vocabulary.of(other)).fingerprint() for other in (*others, VALUES)}) == 5


def test_a_part_is_written_from_batches_to_the_same_bytes(tmp_path: Path) -> None:
    saved = in_parts(VALUES, 300).saved(tmp_path, "a")
    batches = (pa.array(VALUES[first : first + 64]) for first in range(300, 1000, 64))
    written = write_part(tmp_path / "b", batches, first=300)
    assert written.path.read_bytes() == saved.files[1].path.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.000000.arrow", "a.000001.arrow", "b"]


def test_a_grown_vocabulary_writes_only_new_values(tmp_path: Path) -> None:
    first = schema_of(Vocabulary.of(VALUES)).save(tmp_path)
    before = os.stat(tmp_path / "vocabularies" / FILE)
    grown = first.doc["kind"].vocabulary.grown(pa.array(["new"], pa.large_string()))
    schema_of(grown).save(tmp_path)
    assert os.stat(tmp_path / "vocabularies" / FILE) == before
    (tmp_path / "copy").mkdir()
    Schema.load(tmp_path).save(tmp_path / "copy")
    old, new = Schema.load(tmp_path / "copy").vocabulary_files
    assert os.path.samefile(old.path, tmp_path / "vocabularies" / FILE) and (old.rows, new.rows) == (1000, 1)
    assert Schema.load(tmp_path).doc["kind"].vocabulary.codes(pa.array(["new", VALUES[5]])).tolist() == [1000, 5]


def test_another_file_system_gets_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*paths: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    known = Vocabulary.of(VALUES).saved(tmp_path / "one", "a")
    (tmp_path / "linked").symlink_to(tmp_path / "one")
    monkeypatch.setattr(os, "link", refused)
    copied = known.saved(tmp_path / "two", "a")
    assert copied == known and not os.path.samefile(copied.files[0].path, known.files[0].path)


def test_other_processes_get_paths(tmp_path: Path) -> None:
    schema = schema_of(Vocabulary.of(VALUES)).save(tmp_path)
    sent = pickle.dumps(schema)
    assert len(sent) < 2000 and pickle.loads(sent) == schema
    assert pickle.loads(pickle.dumps(schema_of(Vocabulary.of(VALUES)))) == schema


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((folder / "schema.json").read_text())
    change(content)
    (folder / "schema.json").write_text(json.dumps(content))


def described(content: dict) -> dict:
    return content["vocabularies"]["doc"]["kind"]


def replaced_by_the_second(folder: Path) -> None:
    shutil.copy(folder / "vocabularies" / FILE.replace("0.", "1."), folder / "vocabularies" / FILE)


def replaced_by_another_table(folder: Path) -> None:
    pa.ipc.new_file(folder / "vocabularies" / FILE, pa.schema({"a": pa.int8()})).close()


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda d: (d / "vocabularies" / FILE).unlink(), "000000.arrow is missing"),
    "cut short": (lambda d: os.truncate(d / "vocabularies" / FILE, 5000), "no readable Arrow file"),
    "rows": (lambda d: edit(d, lambda c: described(c)["files"][0].update(rows=999)), "has 1000 values, needs 999"),
    "another part": (replaced_by_the_second, "has 1 values, needs 1000"),
    "another table": (replaced_by_another_table, "not part of a vocabulary"),
    "order": (lambda d: edit(d, lambda c: described(c)["files"].reverse()), "follows 1000 values, here are 0"),
    "less": (lambda d: edit(d, lambda c: described(c)["files"].pop()), "does not match"),
    "values": (lambda d: edit(d, lambda c: described(c).update(checksum="0")), "does not match"),
    "outside": (lambda d: edit(d, lambda c: described(c)["files"][0].update(file="vocabularies/../x")), "rejected"),
    "format": (
        lambda d: edit(d, lambda c: c.update(format=3)),
        "has format 3, this version reads formats 1 and 2; rebuild",
    ),
    "nothing": (lambda d: edit(d, lambda c: c.pop("vocabularies")), "damaged or of another version"),
}


@pytest.mark.parametrize("case", list(SPOILT))
def test_mismatched_vocabulary_files_are_refused(case: str, tmp_path: Path) -> None:
    spoil, said = SPOILT[case]
    schema_of(in_parts([*VALUES, "new"], 1000)).save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError, match=said):
        Schema.load(tmp_path)


def test_too_many_values_for_the_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "MAX_VALUES", 1000)
    known = Vocabulary.of(VALUES)
    assert len(known.saved(tmp_path, "a")) == 1000
    with pytest.raises(DataError, match="got 1001 values, a vocabulary has at most 1000"):
        known.grown(pa.array(["new"], pa.large_string())).saved(tmp_path, "b")


def test_a_cut_schema_is_the_one_before_it_grew(tmp_path: Path) -> None:
    before = schema_of(Vocabulary.of(VALUES))
    after = replace(before, doc={"kind": replace(before.doc["kind"], vocabulary=in_parts([*VALUES, "new"], 1000))})
    assert after.cut(before.vocabulary_sizes()) == before and after != before
    assert after.cut({}).doc["kind"].vocabulary == Vocabulary()


@pytest.mark.parametrize("buckets", [0, 50, 2**62], ids=["vocabulary", "buckets", "hashes"])
def test_codes_without_a_positive_event_are_unknown(tmp_path: Path, buckets: int) -> None:
    """The definition holds for strings, codes and exports, is saved with a schema, and grows with it."""
    values = VALUES[:40]
    every = Categorical(hash_buckets=buckets, vocabulary=Vocabulary() if buckets else Vocabulary.of(values[:30]))
    codes = every.with_name("kind").codes(pa.array(values[:30]))
    first = every.with_name("kind").with_trained(codes[:10], None)
    out = ~np.isin(codes, codes[:10])
    assert first.codes(pa.array(values[:30])).tolist() == np.where(out, 1, codes).tolist()
    saved = Schema({}, {"kind": first}).save(tmp_path)
    loaded = Schema.load(tmp_path)
    assert loaded == saved and loaded.trained["kind"].tolist() == first.trained.tolist()
    assert loaded.fingerprint() == Schema({}, {"kind": every.with_name("kind")}).fingerprint(), "as the dataset's"
    kind = loaded.doc["kind"]
    assert isinstance(kind, Categorical) and kind.without_unknown(codes).tolist() == np.where(out, 1, codes).tolist()
    assert codes_of(kind.exported(), [*values[:30], ""]) == [*np.where(out, 1, codes).tolist(), 0]
    grown = every if buckets else replace(every, vocabulary=in_parts(values, 30))
    later = grown.codes(pa.array(values))
    second = grown.with_trained(later[20:25], first)
    known = np.isin(later, [*later[:10], *later[20:25]])
    assert second.codes(pa.array(values)).tolist() == np.where(known, later, 1).tolist()
    assert second.newly_trained(first).tolist() == sorted({*later[20:25].tolist()} - {*codes[:10].tolist()})
    assert second.with_trained(later[:0], every).newly_trained(second).size == (0 if buckets else 15)
