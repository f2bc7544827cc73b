"""Arrays on disk: space is reserved before mapping, and a seal contains the dataset's fingerprint."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from bigdssm.commands import (
    embed,
    embed_teacher,
    list_candidates,
    mine_negatives,
    recommend,
    sample_negatives,
    score_pairs,
)
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EVENT_BITS
from bigdssm.dataset.schema import write_keys
from bigdssm.errors import DataError
from bigdssm.features import Vector
from bigdssm.features.columns import RowCheck, SourceBatch
from bigdssm.ingest.interactions import InteractionTables, make_interactions
from bigdssm.ingest.job import IngestTarget
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.hard_negatives import HardNegatives, window_records
from bigdssm.retrieval.shards import Share
from bigdssm.retrieval.teacher_vectors import write_teacher_vectors
from bigdssm.utils.array_file import check_seal, new_array, seal
from tests.hard_negatives import write_hard_negatives


@pytest.fixture(scope="module")
def twin(tiny_interactions: Any, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A dataset of the same size with items in another order."""
    root = tmp_path_factory.mktemp("twin")
    source = Path(shutil.copytree(tiny_interactions.source, root / "source"))
    first, *lines = (source / "items.csv").read_text().splitlines()
    (source / "items.csv").write_text("\n".join([first, *lines[::-1]]) + "\n")
    tables = InteractionTables(source / "interactions.csv", source / "items.csv", source / "users.csv")
    make_interactions(load_config(tiny_interactions.config).data, tables, IngestTarget(root / "dataset"))
    return Dataset.open(root / "dataset")


@pytest.fixture
def negatives(dataset: Dataset, tmp_path: Path) -> Path:
    keys = np.concatenate([rows.query_keys for rows in dataset.iterate("train", 999)])
    write_hard_negatives(tmp_path / "mined.npy", window_records(keys, np.zeros((len(keys), 3), np.int32)), dataset)
    return tmp_path / "mined.npy"


def test_negatives_of_a_dataset_of_as_many_rows_are_refused(
    negatives: Path, dataset: Dataset, twin: Dataset, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hard negatives of another dataset of equal size are rejected."""
    assert dataset.num_rows("train") == twin.num_rows("train")
    HardNegatives.open(negatives).check_against(dataset)
    with pytest.raises(DataError, match=r"mined\.npy belongs to another dataset"):
        HardNegatives.open(negatives).check_against(twin)
    of_twin = ["--data", str(twin.dir), "--mined", str(negatives)]
    out = str(negatives.parent / "scored.npy")
    assert score_pairs.main([*of_twin, "--out", out, "--model", str(model_dir)]) == 3
    assert sample_negatives.main(of_twin) == 3
    assert capsys.readouterr().err.count("belongs to another dataset") == 2


@pytest.mark.parametrize("at", [200, -300, -10])
def test_a_flipped_bit_of_hard_negatives_is_detected(negatives: Path, dataset: Dataset, at: int) -> None:
    content = bytearray(negatives.read_bytes())
    content[at] ^= 1
    negatives.write_bytes(content)
    with pytest.raises(DataError, match=r"mined\.npy (is damaged|has no seal)"):
        HardNegatives.open(negatives).check_against(dataset)


def test_negatives_without_a_seal_are_refused(negatives: Path, dataset: Dataset) -> None:
    np.save(negatives, np.load(negatives))
    with pytest.raises(DataError, match=r"has no seal \(dataset fingerprint .* make it with bigdssm mine_negatives"):
        HardNegatives.open(negatives).check_against(dataset)


@pytest.mark.parametrize(
    ("keys", "windows"),
    [([0, 1], [[0], [-2]]), ([0, 1], [[-(2**31)], [-1]]), ([-1, 1], [[0], [1]]), ([1, 0], [[0], [1]]), ([1], [[]])],
    ids=["below -1", "far below", "negative query", "descending", "width 0"],
)
def test_malformed_hard_negatives_are_refused(
    dataset: Dataset, tmp_path: Path, keys: list[int], windows: list[list[int]]
) -> None:
    """The seal is valid, the values are not."""
    width = len(windows[0])
    records = window_records(np.array(keys) << EVENT_BITS, np.array(windows, np.int32).reshape(len(keys), width))
    write_hard_negatives(tmp_path / "mined.npy", records, dataset)
    with pytest.raises(DataError, match=r"mined\.npy is not a hard-negatives file: .* make it with bigdssm mine_negat"):
        HardNegatives.open(tmp_path / "mined.npy").check_against(dataset)


@pytest.mark.parametrize("name", ["documents.npy", "queries.npy"])
def test_a_teacher_of_another_dataset_or_with_a_flipped_bit_is_refused(
    model: Any, dataset: Dataset, twin: Dataset, tmp_path: Path, name: str
) -> None:
    made = write_teacher_vectors(tmp_path / "teacher", tower_encoders(model, dataset), dataset, "one", Share())
    assert made is not None
    made.check_against(dataset)
    with pytest.raises(DataError, match="belongs to another dataset"):
        made.check_against(twin)
    content = bytearray((tmp_path / "teacher" / name).read_bytes())
    content[-300] ^= 1
    (tmp_path / "teacher" / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} is damaged"):
        made.check_against(dataset)


def no_space(file: int, offset: int, size: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


COMMANDS: dict[str, tuple[Callable[..., int], list[str], str]] = {
    "embed": (embed.main, ["--model", "MODEL"], "vectors.npy"),
    "embed_teacher": (embed_teacher.main, ["--model", "MODEL"], "documents.npy"),
    "mine_negatives": (mine_negatives.main, ["--model", "MODEL"], ".out.npy.unfinished"),
    "score_pairs": (score_pairs.main, ["--model", "MODEL", "--mined", "MINED"], "judged.npy"),
    "list_candidates": (list_candidates.main, ["--graded"], ".out.npy.unfinished"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_gives_a_one_line_error_and_leaves_no_large_file(
    name: str, negatives: Path, dataset: Dataset, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("bigdssm.utils.array_file.os.posix_fallocate", no_space)
    main, words, file = COMMANDS[name]
    given = {"MODEL": str(model_dir), "MINED": str(negatives)}
    out = tmp_path / "work" / "out.npy"
    out.parent.mkdir()
    code = main(["--data", str(dataset.dir), "--out", str(out), *(given.get(word, word) for word in words)])
    message = capsys.readouterr().err
    assert code == 1 and "No space left on device: " in message and file in message
    assert not out.exists() and not list(out.parent.rglob("*.npy"))
    monkeypatch.undo()
    assert main(["--data", str(dataset.dir), "--out", str(out), *(given.get(word, word) for word in words)]) == 0


def test_sorted_keys_name_their_file_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigdssm.utils.array_file.os.posix_fallocate", no_space)
    with pytest.raises(OSError, match=r"No space left on device: .*by_id\.keys\.npy"):
        write_keys(tmp_path / "by_id.keys.npy", 3, [(np.arange(3), np.arange(3))])
    assert not list(tmp_path.iterdir())


def test_the_space_of_a_new_array_is_reserved(tmp_path: Path) -> None:
    array = new_array(tmp_path / "a.npy", np.float32, (1 << 18, 4))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= array.nbytes
    assert not array.any()


def test_an_array_without_space_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigdssm.utils.array_file.os.posix_fallocate", no_space)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.npy"):
        new_array(tmp_path / "a.npy", np.float32, (4,))
    assert not list(tmp_path.iterdir())


def vectors_of(matrix: Path, rows: int = 4) -> np.ndarray:
    batch = SourceBatch("table.csv", pa.table({"id": list(range(rows))}), np.arange(rows) + 1)
    feature = Vector(dim=2, matrix=str(matrix)).with_name("near")
    return np.asarray(feature.read(RowCheck(batch, lambda *what: None)).flatten()).reshape(-1, 2)


def test_a_matrix_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "near.npy"
    for value in (1.0, 2.0):
        np.save(tmp_path / "new.npy", np.full((4, 2), value))
        os.replace(tmp_path / "new.npy", path)
        assert (vectors_of(path) == value).all()
    for other, message in (
        (np.zeros((4, 3)), r"holds float64 \[4, 3\], needs numbers \[rows, 2\]"),
        (np.zeros(4), r"holds float64 \[4\]"),
        (np.array([["a", "b"]]), "holds <U1"),
        (np.array([[1, None]], object), r"is not a \.npy file of numbers"),
        (np.zeros((4, 2), complex), "holds complex128"),
    ):
        np.save(tmp_path / "new.npy", other, allow_pickle=True)
        os.replace(tmp_path / "new.npy", path)
        with pytest.raises(DataError, match=message):
            vectors_of(path)
    for content in (b"", b"\x93NUMPY", path.read_bytes()[:-40]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"near\.npy is not a \.npy file"):
            vectors_of(path)
    path.unlink()
    with pytest.raises(DataError, match=r"near\.npy cannot be read: No such file"):
        vectors_of(path)


def test_queries_of_a_table_in_a_folder(
    dataset: Dataset, model_dir: Path, index_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pa.table({"user_id": ["a", "b"], "age": [20, 30], "occupation": ["doctor", "artist"], "seen": ["i1", "i2"]})
    (tmp_path / "queries").mkdir()
    parquet.write_table(table, tmp_path / "queries" / "part-0.parquet")
    words = ["--model", model_dir, "--index", index_dir, "--data", dataset.dir, "--queries", tmp_path / "queries"]
    words += ["--key-column", "user_id", "--events-column", "seen"]
    assert recommend.main([str(word) for word in [*words, "--out", tmp_path / "out"]]) == 0
    (tmp_path / "queries" / "part-1.parquet").symlink_to(tmp_path / "gone.parquet")
    assert recommend.main([str(word) for word in [*words, "--out", tmp_path / "again"]]) == 3
    assert "part-1.parquet" in capsys.readouterr().err


@pytest.mark.parametrize("size", [0, 5])
def test_a_killed_process_may_have_sealed_the_file(size: int, tmp_path: Path) -> None:
    """Between the seal and the name of the file, or while it wrote the seal."""
    path = tmp_path / "array.npy"
    np.save(path, np.zeros(size, [("query", np.int64), ("vector", np.float16, (3,))]))
    seal(path, "dataset")
    whole = path.read_bytes()
    for end in (len(whole), len(whole) - 100):
        path.write_bytes(whole[:end])
        seal(path, "dataset")
        assert path.read_bytes() == whole
    check_seal(path, "dataset", "")
