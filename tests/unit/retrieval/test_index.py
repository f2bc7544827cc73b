"""The served score is the training score; an index accepts only queries of its model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.commands import __main__ as command
from bigdssm.config import Config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError, DataError
from bigdssm.loader import step_plan
from bigdssm.loader.batch import Collator, to_features
from bigdssm.models import DualEncoder, new_model
from bigdssm.retrieval.embed import Encoders, tower_encoders
from bigdssm.retrieval.index import Index, build_index, open_index
from bigdssm.retrieval.index_types import INDEX_TYPES, AllowedDocuments
from bigdssm.retrieval.shards import Share
from bigdssm.retrieval.vectors import CodedVectors, VectorsMeta, write_meta, write_vectors


@pytest.fixture(scope="module")
def vectors_dir(model_dir: Path, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = load_model_folder(model_dir)
    out = tmp_path_factory.mktemp("vectors") / "vectors"
    write_vectors(out, tower_encoders(folder.model, dataset), dataset, folder.checksum, Share(rows_per_chunk=17))
    return out


@pytest.fixture(scope="module")
def index_dir(vectors_dir: Path) -> Path:
    build_index(vectors_dir, vectors_dir.with_name("index"))
    return vectors_dir.with_name("index")


def test_top_k_of_the_index_is_by_the_score(
    model: DualEncoder, model_dir: Path, dataset: Dataset, index_dir: Path
) -> None:
    collator = Collator(dataset.schema, dataset.catalogue)
    rows = next(dataset.iterate("test", 40))
    with torch.no_grad():
        docs = to_features(dataset.schema.doc, dataset.catalogue.columns(np.arange(dataset.catalogue.num_docs)))
        encoded = model(query=collator.query_features(rows.query), doc=docs)
        scores = encoded.alpha * encoded.U @ encoded.W.T + encoded.beta
    assert encoded.beta.std() > 0.1, "beta is too uniform for the test to detect its absence"
    best, best_rows = scores.topk(10)
    without_beta = (scores - encoded.beta).topk(10).indices
    assert (without_beta != best_rows).any()
    queries = tower_encoders(model, dataset).queries(rows).numpy()
    found_scores, found_rows = open_index(index_dir).nearest(queries, 10, load_model_folder(model_dir).checksum)
    np.testing.assert_array_equal(found_rows, best_rows.numpy())
    np.testing.assert_allclose(found_scores, best.numpy(), rtol=1e-5, atol=1e-5)


def test_vectors_do_not_depend_on_the_chunks_they_were_encoded_in(
    model: DualEncoder, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders, rows = tower_encoders(model, dataset), next(dataset.iterate("test", 40))
    doc_rows = np.arange(dataset.catalogue.num_docs)
    whole = encoders.documents(doc_rows), encoders.queries(rows)
    calls: list[int] = []
    counting = model.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(step_plan, "CHUNK_TOKENS_CPU", 20)
    torch.testing.assert_close((encoders.documents(doc_rows), encoders.queries(rows)), whole)
    counting.remove()
    assert len(calls) > 10
    assert encoders.documents(doc_rows[:0]).shape == (0, whole[0].shape[1])


@pytest.mark.parametrize(
    ("exclude", "sentence"),
    [(["i1"], "exclude[0]='i1': needs a list, each element a text"), ([[1]], "exclude[0][0]=1: needs a text")],
)
def test_keys_that_would_exclude_nothing_are_refused(index_dir: Path, exclude: Any, sentence: str) -> None:
    index = open_index(index_dir)
    with pytest.raises(ConfigError) as refused:
        index.search(np.zeros((1, index.meta.width), np.float32), 3, exclude)
    assert sentence in str(refused.value)
    with pytest.raises(ConfigError, match="vectors has a number that is not finite"):
        index.search(np.full((1, index.meta.width), np.nan, np.float32), 3)
    with pytest.raises(ConfigError, match="is not valid UTF-8"):
        index.row("\ud800")


def test_excluded_documents_do_not_come_back(model_dir: Path, index_dir: Path) -> None:
    index, checksum = open_index(index_dir), load_model_folder(model_dir).checksum
    query = np.random.RandomState(0).randn(1, index.meta.width).astype(np.float32)
    num_docs = index.meta.num_docs
    _, everything = index.nearest(query, num_docs, checksum)
    excluded = everything[0, [0, 2, 5]]
    scores, rows = index.nearest(query, num_docs - 3, checksum, [np.append(excluded, excluded)])
    assert rows[0].tolist() == [row for row in everything[0] if row not in excluded]
    scores, rows = index.nearest(query, num_docs, checksum, [excluded])
    assert rows[0, -3:].tolist() == [-1] * 3
    assert np.isneginf(scores[0, -3:]).all()
    assert index.nearest(query, 100, checksum)[1].shape == (1, 100)


def test_nearest_documents_do_not_depend_on_beta() -> None:
    random = np.random.RandomState(0)
    vectors = random.randn(600, 5).astype(np.float32)
    vectors[:, :4] /= np.linalg.norm(vectors[:, :4], axis=1, keepdims=True)
    vectors[:, 4] *= 100
    names = pa.chunked_array([pa.nulls(0, pa.string())])
    index = Index(
        INDEX_TYPES.make("flat").build(CodedVectors(vectors, "float32", 5)),
        VectorsMeta("flat", "m", "d", 600, 5),
        names,
        names,
    )
    cosines, rows = index.similar(7, 5)
    expected = vectors[:, :4] @ vectors[7, :4]
    np.testing.assert_array_equal(rows, np.argsort(-expected)[1:6])
    np.testing.assert_allclose(cosines, np.sort(expected)[::-1][1:6], rtol=1e-5)


def test_another_models_queries_are_refused(other_model_dir: Path, index_dir: Path) -> None:
    index = open_index(index_dir)
    with pytest.raises(CheckpointError, match="holds vectors of model"):
        index.nearest(np.zeros((1, index.meta.width)), 1, load_model_folder(other_model_dir).checksum)


@pytest.mark.parametrize("kind", ["sq8", "hnsw", "ivf"])
def test_approximate_indexes_find_most(
    kind: str, vectors_dir: Path, index_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    build_index(vectors_dir, tmp_path / "index", kind)
    checksum = load_model_folder(model_dir).checksum
    queries = np.random.RandomState(0).randn(50, open_index(index_dir).meta.width).astype(np.float32)
    exact = open_index(index_dir).nearest(queries, 10, checksum)[1]
    found = open_index(tmp_path / "index").nearest(queries, 10, checksum)[1]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, found, strict=True)]) > 0.8


def test_a_graph_finds_documents_that_have_a_part_in_common() -> None:
    """Linked by inner products of vectors with a mean, all documents would link to the same few."""
    vectors = np.random.default_rng(0).standard_normal((4000, 16), np.float32) + 2
    backend = INDEX_TYPES.make("hnsw")
    index = backend.build(CodedVectors(vectors, "float32", 16))
    queries = vectors[:100]
    scores, rows = backend.search(index, queries, 100, None)
    exact = queries @ vectors.T
    np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, 1), rtol=1e-4)
    np.testing.assert_array_equal(backend.vectors_at(index, np.array([7, 2])), vectors[[7, 2]])
    assert backend.shape(index) == (4000, 16)
    least = -np.partition(-exact, 99, axis=1)[:, 99:100]
    assert (scores >= least - 1e-4).mean() > 0.99


def cut(vectors: np.ndarray, width: int) -> np.ndarray:
    """Truncate index vectors of a cosine model to [n, width + 1], naively."""
    found = []
    for vector in vectors:
        first = vector[:width] * np.linalg.norm(vector[:-1]) / np.linalg.norm(vector[:width])
        found.append([*first, vector[-1]])
    return np.array(found, np.float32)


def embedded(model_dir: Path, dataset: Dataset, out: Path, width: int | None = None) -> Path:
    arguments = ["embed", "--model", str(model_dir), "--data", str(dataset.dir), "--out", str(out)]
    assert command.main([*arguments, *([] if width is None else ["--width", str(width)])]) == 0
    return out


@pytest.mark.parametrize("where", ["embed", "build_index"])
def test_vectors_may_be_cut(
    where: str, model_dir: Path, dataset: Dataset, index_dir: Path, vectors_dir: Path, tmp_path: Path
) -> None:
    vectors = embedded(model_dir, dataset, tmp_path / "vectors", 3 if where == "embed" else None)
    build_index(vectors, tmp_path / "index", width=None if where == "embed" else 3)
    index, whole = open_index(tmp_path / "index"), np.load(vectors_dir / "vectors.npy")
    queries = tower_encoders(load_model_folder(model_dir).model, dataset).queries(next(dataset.iterate("test", 30)))
    scores, _ = index.nearest(queries.numpy(), 5, index.meta.model_checksum)
    expected = cut(queries.numpy(), 3) @ cut(whole, 3).T
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :5], rtol=1e-4, atol=1e-5)
    assert index.index.d == 4 and len(index.search(queries.numpy(), 5)[0]) == 5
    assert index.similar(3, 4)[1].shape == (4,)
    with pytest.raises(ConfigError, match="needs 1 to"):
        build_index(vectors_dir, tmp_path / "other", width=9)
    with pytest.raises(ConfigError, match="has no score type"):
        build_index(vectors_dir, tmp_path / "other", width=3)
    if where == "embed":
        with pytest.raises(ConfigError, match="these vectors are truncated"):
            build_index(vectors, tmp_path / "other", rescore=3)


@pytest.mark.parametrize(("kind", "width"), [("flat", 2), ("sq8", None), ("sq8", 3), ("binary", None), ("ivf", 4)])
def test_candidates_are_scored_again_by_whole_vectors(
    kind: str, width: int | None, model_dir: Path, dataset: Dataset, index_dir: Path, tmp_path: Path
) -> None:
    vectors = embedded(model_dir, dataset, tmp_path / "vectors")
    build_index(vectors, tmp_path / "index", kind, width=width, rescore=4)
    exact, index = open_index(index_dir), open_index(tmp_path / "index")
    queries = tower_encoders(load_model_folder(model_dir).model, dataset).queries(next(dataset.iterate("test", 30)))
    mask = np.arange(exact.meta.num_docs) % 3 > 0
    for allowed in (None, AllowedDocuments(mask)):
        arguments = (queries.numpy(), 10, index.meta.model_checksum, None, allowed)
        expected, found = exact.nearest(*arguments), index.nearest(*arguments)
        assert (found[1] == expected[1]).mean() > 0.9, "recall among 40 candidates is too low"
        assert (np.diff(found[0], axis=1) <= 0).all() and (found[1] >= 0).all()
        whole = np.load(vectors / "vectors.npy")
        for query, scores, rows in zip(queries.numpy(), *found, strict=True):
            np.testing.assert_allclose(scores, whole[rows] @ query, rtol=1e-5, atol=1e-5)
            assert allowed is None or mask[rows].all()
    np.testing.assert_allclose(index.similar(3, 4)[0], exact.similar(3, 4)[0], rtol=1e-4, atol=1e-4)
    assert index.vectors is not None and isinstance(index.vectors.rows, np.memmap), "not memory-mapped"


def test_a_type_of_index_has_options_of_its_own(vectors_dir: Path, tmp_path: Path) -> None:
    arguments = ["--vectors", str(vectors_dir), "--out", str(tmp_path / "index"), "--type", "hnsw", "search_width=33"]
    assert command.main(["build_index", *arguments]) == 0
    index = open_index(tmp_path / "index")
    assert index.meta.options == {"links": 32, "build_width": 200, "search_width": 33}
    assert index.index.hnsw.efSearch == 33
    vectors = CodedVectors(np.random.RandomState(0).randn(400, 5).astype(np.float32), "float32", 5)
    for options, lists, probes in (({"lists": 7}, 7, 1), ({"lists": 9, "probes": 4}, 9, 4), ({}, 10, 1)):
        built = INDEX_TYPES.make("ivf", options).build(vectors)
        assert (built.nlist, built.nprobe) == (lists, probes)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("tree", {}, "type: got tree, needs one of flat, sq8, binary, hnsw, ivf, ivfpq"),
        ("ivf", {"probe": 3}, "unknown key probe: ivf has lists, probes; did you mean probes?"),
        ("flat", {"links": 3}, "unknown key links: flat has "),
        ("hnsw", {"links": 1}, "links: got 1, needs at least 2"),
        ("hnsw", {"links": "many"}, "links: "),
    ],
)
def test_options_that_a_type_of_index_cannot_have(
    kind: str, options: dict[str, Any], reason: str, vectors_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        build_index(vectors_dir, tmp_path / "index", kind, options=options)


def test_binary_codes_require_candidates_to_rescore(vectors_dir: Path, tmp_path: Path) -> None:
    for rescore in (0, -1):
        with pytest.raises(ConfigError, match="needs candidates to rescore"):
            build_index(vectors_dir, tmp_path / "index", "binary", rescore=rescore)


@pytest.mark.slow
def test_product_quantisation_from_a_folder_to_similar_documents(tmp_path: Path) -> None:
    """Codes do not divide the width; nearest documents are searched with the reconstructed vector."""
    random, num_docs, checksum = np.random.RandomState(0), 9_984, "m"
    vectors = random.randn(num_docs, 3).astype(np.float32) @ random.randn(3, 9).astype(np.float32)
    made = tmp_path / "made"
    made.mkdir()
    np.save(made / "vectors.npy", vectors)
    names = pa.table({"doc_key": [f"d{i}" for i in range(num_docs)], "doc_title": [f"D {i}" for i in range(num_docs)]})
    with pa.OSFile(str(made / "documents.arrow"), "wb") as file, pa.ipc.new_file(file, names.schema) as writer:
        writer.write_table(names)
    write_meta(made, VectorsMeta("vectors", checksum, "dataset", num_docs, 9))
    made.rename(tmp_path / "vectors")
    for kind in ("flat", "ivfpq"):
        build_index(tmp_path / "vectors", tmp_path / kind, kind)
    exact, index = open_index(tmp_path / "flat"), open_index(tmp_path / "ivfpq")
    assert (index.meta.kind, index.keys[17].as_py(), index.title[17].as_py()) == ("ivfpq", "d17", "D 17")
    expected, found = (one.nearest(vectors[:50], 100, checksum)[1] for one in (exact, index))
    assert np.mean([len(set(a) & set(b)) / 100 for a, b in zip(expected, found, strict=True)]) > 0.7
    close = []
    for row in range(0, num_docs, 999):
        cosines, rows = index.similar(row, 10)
        own = vectors[[row, *rows], :-1]
        own /= np.linalg.norm(own, axis=1, keepdims=True)
        assert len(rows) == 10 and row not in rows and (np.diff(cosines) <= 0).all()
        np.testing.assert_allclose(cosines, own[1:] @ own[0], atol=0.1)
        close.append(len(set(rows) & set(exact.similar(row, 100)[1])) / 10)
    assert np.mean(close) > 0.7, "too few of the ten are among the hundred nearest"
    with pytest.raises(ConfigError, match="40 documents, needs at least 9984"):
        INDEX_TYPES.make("ivfpq").build(CodedVectors(vectors[:40], "float32", 9))


def test_vectors_name_documents(vectors_dir: Path, index_dir: Path, dataset: Dataset) -> None:
    index, rows = open_index(index_dir), np.arange(dataset.catalogue.num_docs)
    assert index.keys.to_pylist() == dataset.catalogue.keys(rows)
    assert index.title.to_pylist() == dataset.catalogue.titles(rows)
    assert json.loads((vectors_dir / "meta.json").read_text())["dataset_fingerprint"] == dataset.fingerprint


def test_vectors_that_are_not_finite_are_not_written(model: DualEncoder, dataset: Dataset, tmp_path: Path) -> None:
    encoders = tower_encoders(model, dataset)
    spoiled = Encoders(encoders.queries, lambda rows: encoders.documents(rows) / 0)
    with pytest.raises(DataError, match="NaN"):
        write_vectors(tmp_path / "vectors", spoiled, dataset, "checksum")
    assert not (tmp_path / "vectors").exists()


def test_a_model_without_beta_scores_without(config: Config, dataset: Dataset) -> None:
    from dataclasses import replace

    plain = new_model(replace(config.model, beta="none"), dataset.schema, dataset.vocab_size)
    assert tower_encoders(plain, dataset).documents(np.arange(5)).shape == (5, config.model.dim)


def test_folders_that_are_not_ours_are_refused(vectors_dir: Path, index_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("do not touch")
    with pytest.raises(ConfigError, match="neither vectors nor an index"):
        build_index(vectors_dir, tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "do not touch"
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "precious.txt"):
        with pytest.raises(CheckpointError, match=r"holds no meta\.json"):
            open_index(folder)
    with pytest.raises(CheckpointError, match="not an index"):
        open_index(vectors_dir)
    with pytest.raises(CheckpointError, match="is an index"):
        build_index(index_dir, tmp_path / "again")


def test_damage_is_named(vectors_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    build_index(vectors_dir, out)
    content = (out / "index.faiss").read_bytes()
    (out / "index.faiss").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"index\.faiss is damaged: its checksum"):
        open_index(out)
    build_index(vectors_dir, out)  # an index may be replaced
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps({**meta, "num_docs": 7}))
    with pytest.raises(CheckpointError, match="is damaged"):
        open_index(out)
    (out / "meta.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        open_index(out)
