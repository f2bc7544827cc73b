"""Quantized vectors: rows match the definition, and all readers decode them to float32."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.commands import __main__ as command
from bigdssm.config import Config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.models import DualEncoder
from bigdssm.retrieval.embed import Encoders, tower_encoders
from bigdssm.retrieval.index import build_index, open_index
from bigdssm.retrieval.request import Request
from bigdssm.retrieval.vectors import (
    CodedVectors,
    Dtype,
    decode_rows,
    difference_from_model,
    encode_rows,
    load_vectors,
    read_meta,
    read_rows,
    read_vectors,
    write_card,
    write_file,
    write_vectors,
)
from bigdssm.serving.searcher import Searcher
from tests.conftest import NUM_ITEMS

DTYPES = get_args(Dtype)
CODED = ("int8", "binary")


@pytest.fixture(scope="module")
def whole(model: DualEncoder, dataset: Dataset) -> np.ndarray:
    return tower_encoders(model, dataset).documents(np.arange(NUM_ITEMS)).numpy()


@pytest.fixture(scope="module")
def folders(model_dir: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[Dtype, Path]:
    root, loaded = tmp_path_factory.mktemp("coded"), load_model_folder(model_dir)
    for dtype in DTYPES:
        encoders = tower_encoders(loaded.model, dataset)
        write_vectors(root / dtype, encoders, dataset, loaded.checksum, score="dot", dtype=dtype)
    return {dtype: root / dtype for dtype in DTYPES}


def by_hand(vector: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Quantize and decode one vector, number by number."""
    if dtype in ("float32", "float16"):
        return np.array([float(np.dtype(dtype).type(value)) for value in vector], np.float32)
    *values, beta = vector.tolist()
    if dtype == "int8":
        scale = max(map(abs, values)) / 127
        return np.array([*(round(value / scale) * scale if scale else 0.0 for value in values), beta], np.float32)
    scale = sum(map(abs, values)) / len(values)
    return np.array([*(scale if value >= 0 else -scale for value in values), beta], np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 9, 12, 65])
def test_vectors_are_decoded_by_their_coding(dtype: Dtype, width: int) -> None:
    vectors = np.random.RandomState(width).randn(30, width).astype(np.float32)
    vectors[3], vectors[5, 0] = 0, 0
    vectors[:, -1] *= 50
    rows = encode_rows(vectors, dtype)
    wanted = np.stack([by_hand(vector, dtype) for vector in vectors])
    np.testing.assert_allclose(decode_rows(rows, dtype, width), wanted, rtol=1e-6, atol=1e-6)
    held = CodedVectors(rows, dtype, width)
    some = np.array([7, 3, 29])
    np.testing.assert_array_equal(held[some], decode_rows(rows, dtype, width)[some])
    np.testing.assert_array_equal(np.concatenate(list(held.chunks(7))), held[:])
    dimensions = width - 1
    sizes = {"float32": 4 * width, "float16": 2 * width, "int8": dimensions + 8, "binary": -(-dimensions // 8) + 8}
    assert rows.nbytes == len(vectors) * sizes[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_reader_returns_the_stored_vectors(
    dtype: Dtype, folders: dict[Dtype, Path], whole: np.ndarray, model_dir: Path, dataset: Dataset, tmp_path: Path
) -> None:
    folder, stored = folders[dtype], np.stack([by_hand(vector, dtype) for vector in whole])
    meta, checksum = read_meta(folder), load_model_folder(model_dir).checksum
    assert meta.dtype == dtype
    assert (folder / "vectors.npy").stat().st_size - encode_rows(
        np.zeros((NUM_ITEMS, 9), np.float32), dtype
    ).nbytes in (128, 192, 256)
    np.testing.assert_allclose(load_vectors(folder, meta)[:], stored, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(read_vectors(folder, checksum, dataset, 5, 9), stored[5:9], rtol=1e-5, atol=1e-5)
    queries = tower_encoders(load_model_folder(model_dir).model, dataset).queries(next(dataset.iterate("test", 20)))
    for kind, rescore in (("flat", 0), ("sq8", 4), ("binary", 4)):
        build_index(folder, tmp_path / kind, kind, rescore=rescore)  # type: ignore[arg-type]
        index = open_index(tmp_path / kind)
        scores, rows = index.nearest(queries.numpy(), 10, checksum)
        own = np.take_along_axis(queries.numpy() @ stored.T, rows, 1)
        np.testing.assert_allclose(scores, own, rtol=1e-4, atol=1e-4)
        best = np.sort(queries.numpy() @ stored.T, axis=1)[:, ::-1][:, :10]
        np.testing.assert_allclose(scores[:, 0], best[:, 0], rtol=1e-4, atol=1e-4)
        if rescore:
            assert index.vectors is not None and isinstance(index.vectors.rows, np.memmap), "not memory-mapped"
            assert (tmp_path / kind / "vectors.npy").stat().st_size == (folder / "vectors.npy").stat().st_size
        found = Searcher(load_model_folder(model_dir), index, dataset).search([Request("u7")])[0]
        assert len(found) == 10 and found[0].score >= found[-1].score


@pytest.mark.parametrize("dtype", CODED)
def test_an_index_may_cut_coded_vectors(
    dtype: Dtype, folders: dict[Dtype, Path], whole: np.ndarray, tmp_path: Path
) -> None:
    build_index(folders[dtype], tmp_path / "index", width=3, rescore=4)
    index = open_index(tmp_path / "index")
    stored = decode_rows(encode_rows(whole, dtype), dtype, 9)
    query = np.concatenate([stored[11, :-1], [1.0]]).astype(np.float32)[None]
    scores, rows = index.nearest(query, 5, index.meta.model_checksum)
    np.testing.assert_allclose(scores[0], stored[rows[0]] @ query[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_vector_files_contain_codes_and_scales(
    dtype: Dtype, folders: dict[Dtype, Path], model: DualEncoder, dataset: Dataset, config: Config, whole: np.ndarray
) -> None:
    folder, encoders = folders[dtype], tower_encoders(model, dataset)
    path = write_file(folder, "parquet")
    parity = {name: difference_from_model(folder / f"vectors.{name}", encoders) for name in ("npy", "parquet")}
    assert parity["npy"] == parity["parquet"] and (dtype == "float32" or parity["npy"] > 0)
    rows = np.array([39, 0, 7])
    np.testing.assert_array_equal(read_rows(path, rows), read_rows(folder / "vectors.npy", rows))
    table = parquet.read_table(path)
    kinds = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8(), "binary": pa.uint8()}
    numbers = {"float32": 9, "float16": 9, "int8": 8, "binary": 1}
    assert table.schema.field("vector").type == pa.list_(kinds[dtype], numbers[dtype])
    assert ("scale" in table.column_names) == (dtype in CODED)
    query = whole[3] * 0.1  # as another engine scores, from the columns
    listed = np.asarray(table["vector"].combine_chunks().flatten()).reshape(NUM_ITEMS, -1)
    if dtype == "binary":
        listed = 2.0 * np.unpackbits(listed, axis=1, count=8) - 1
    scores = listed.astype(np.float32) @ query[: listed.shape[1]]
    if dtype in CODED:
        scores = scores * table["scale"].to_numpy() + table["beta"].to_numpy() * query[-1]
    expected = load_vectors(folder, read_meta(folder))[:] @ query
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    write_card(folder, config.model.score, parity)  # type: ignore[arg-type]
    assert dtype in (folder / "README.md").read_text()


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_vectors_are_named_in_every_coding(
    dtype: Dtype, folders: dict[Dtype, Path], model: DualEncoder, dataset: Dataset, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(folders[dtype], tmp_path / "copied"))
    np.save(copied / "vectors.npy", np.load(copied / "vectors.npy")[::-1])
    with pytest.raises(CheckpointError, match="does not match the model"):
        difference_from_model(copied / "vectors.npy", tower_encoders(model, dataset))


def test_unchanged_vectors_are_copied_and_never_from_another_coding(
    folders: dict[Dtype, Path], model_dir: Path, dataset: Dataset, tmp_path: Path
) -> None:
    folder = load_model_folder(model_dir)
    encoders = tower_encoders(folder.model, dataset)
    written = write_vectors(
        tmp_path / "v", encoders, dataset, folder.checksum, since=folders["int8"], score="dot", dtype="int8"
    )
    assert (written.encoded, written.reused) == (0, NUM_ITEMS)
    assert (tmp_path / "v/vectors.npy").read_bytes() == (folders["int8"] / "vectors.npy").read_bytes()
    with pytest.raises(CheckpointError, match="vectors of 9 numbers as int8, --since needs 9 as float16"):
        write_vectors(tmp_path / "w", encoders, dataset, folder.checksum, since=folders["int8"], dtype="float16")


def test_vectors_out_of_range_of_a_coding_are_refused(
    folders: dict[Dtype, Path], model: DualEncoder, dataset: Dataset, tmp_path: Path
) -> None:
    encoders = tower_encoders(model, dataset)
    large = Encoders(encoders.queries, lambda rows: encoders.documents(rows) * 1e6)
    with pytest.raises(DataError, match="too large for float16"):
        write_vectors(tmp_path / "v", large, dataset, "m", dtype="float16")
    with pytest.raises(ConfigError, match="--format fvecs --dtype int8: fvecs holds float32 only"):
        write_file(folders["int8"], "fvecs")


def test_the_embed_command_writes_coded_vectors(
    model_dir: Path, dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "v"
    arguments = ["embed", "--model", model_dir, "--data", dataset.dir, "--out", out, "--dtype", "binary"]
    assert command.main([*map(str, arguments), "--format", "fvecs"]) == 2
    assert "fvecs holds float32 only" in capsys.readouterr().err and not out.exists()
    assert command.main([*map(str, arguments), "--format", "parquet"]) == 0
    assert "40 vectors of width 9, binary" in capsys.readouterr().out
    assert command.main(["build_index", "--vectors", str(out), "--out", str(tmp_path / "i"), "--type", "flat"]) == 0
    assert open_index(tmp_path / "i").meta.dtype == "binary"
