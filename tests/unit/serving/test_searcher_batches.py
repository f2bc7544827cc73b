"""The answer to a request does not depend on the other requests of its batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from bigdssm.checkpoints.model_folder import load_model_folder
from bigdssm.config import TowerConfig
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError
from bigdssm.export.convert import export, folder_source
from bigdssm.export.onnx_model import query_tower
from bigdssm.features import Numeric
from bigdssm.models.encoders.scalar import MAX_DEVIATIONS, NumericEncoder
from bigdssm.retrieval.index import Index, build_index, open_index
from bigdssm.retrieval.index_types import INDEX_TYPES
from bigdssm.retrieval.request import Event, Request
from bigdssm.retrieval.vectors import CodedVectors, VectorsMeta
from bigdssm.serving.searcher import Searcher
from tests.tolerances import assert_scores_close

NUM_DOCS, WIDTH = 12_000, 9
NAMES = pa.chunked_array([pa.nulls(0, pa.string())])
REQUESTS = [
    Request("u1", top=3),
    Request(features={"age": 1e6}, events=[], top=40),
    Request(features={"age": 3e38, "occupation": "artist"}, top=1),
    Request(events=[Event(f"i{number}") for number in range(14)], filter="year < 1990"),
    Request("u2", {"age": -1e30}, filter="genres = Comedy"),
    Request("u3", filter="year > 3000"),
    *[Request(f"u{number}", filter="year < 1990", top=1 + number % 5) for number in range(4, 24)],
]


@pytest.fixture(scope="module")
def exported(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("company") / "exported"
    export(folder_source(model_dir), folder, "onnx")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("tower", [None, "query.onnx", "query.int8.onnx"])
def test_the_answer_in_a_batch_is_the_answer_alone(
    model_dir: Path, index_dir: Path, dataset: Dataset, exported: Path, tower: str | None
) -> None:
    onnx = None if tower is None else exported / tower
    searcher = Searcher(load_model_folder(model_dir), open_index(index_dir), dataset, onnx=onnx)
    queries = [searcher.queries.of(request) for request in REQUESTS]
    vectors = searcher.encode(queries)
    alone = np.concatenate([searcher.encode([query]) for query in queries])
    largest = np.abs(alone).max(axis=1, keepdims=True)
    assert np.abs((vectors - alone) / largest).max() <= 1e-5 and np.isfinite(vectors).all()
    for found, query in zip(searcher.answer(queries), queries, strict=True):
        (own,) = searcher.answer([query])
        assert [document.key for document in found.documents] == [document.key for document in own.documents]
        np.testing.assert_allclose(
            [d.score for d in found.documents], [d.score for d in own.documents], rtol=1e-4, atol=1e-5
        )  # fmt: skip
    assert searcher.search([]) == []


@pytest.mark.parametrize("tower", ["query.onnx", "query.int8.onnx"])
def test_an_exported_tower_is_near_the_trainer_in_any_batch(
    model_dir: Path, index_dir: Path, dataset: Dataset, exported: Path, tower: str
) -> None:
    folder, index = load_model_folder(model_dir), open_index(index_dir)
    trainers, ours = (Searcher(folder, index, dataset, onnx=onnx) for onnx in (None, exported / tower))
    queries = [trainers.queries.of(request) for request in REQUESTS]
    expected, vectors = trainers.encode(queries), ours.encode(queries)
    cosines = (expected * vectors).sum(1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(vectors, axis=1)
    assert cosines.min() > 0.999


@pytest.mark.parametrize("kind", ["flat", "sq8", "hnsw", "ivf", pytest.param("ivfpq", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rescore", [0, 4])
def test_an_index_finds_the_same_for_a_query_alone(kind: str, rescore: int) -> None:
    random = np.random.RandomState(0)
    vectors = (random.randn(NUM_DOCS, 4) @ random.randn(4, WIDTH)).astype(np.float32)
    coded = CodedVectors(vectors, "float32", WIDTH)
    meta = VectorsMeta(kind, "m", "d", NUM_DOCS, WIDTH, rescored=rescore)
    index = Index(INDEX_TYPES.make(kind).build(coded), meta, NAMES, NAMES, coded if rescore else None)
    queries = random.randn(40, WIDTH).astype(np.float32)
    excluded = [random.randint(0, NUM_DOCS, number % 7 * 9) for number in range(40)]
    scores, rows = index.nearest(queries, 10, "m", excluded)
    for number in range(40):
        own_scores, own_rows = index.nearest(queries[number : number + 1], 10, "m", [excluded[number]])
        assert rows[number].tolist() == own_rows[0].tolist()
        scale = float((np.abs(vectors) @ np.abs(queries[number])).max())
        assert_scores_close(scores[number], own_scores[0], WIDTH, scale)


@pytest.mark.parametrize("tower", ["query.onnx", "query.int8.onnx"])
def test_a_tower_that_scales_a_batch_together_is_refused(
    model_dir: Path, exported: Path, tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.quantization import quantize_dynamic

    checksum = load_model_folder(model_dir).checksum
    assert query_tower(exported / tower, checksum) is not None
    quantize_dynamic(str(exported / "query.onnx"), str(tmp_path / tower))
    monkeypatch.setattr("bigdssm.export.onnx_model.read_export", lambda _: {"model_checksum": checksum})
    with pytest.raises(CheckpointError, match="answers depend on the other requests"):
        query_tower(tmp_path / tower, checksum)


def test_a_search_is_not_widened_by_another_requests_top(
    model_dir: Path, index_dir: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_index(index_dir.with_name("vectors"), tmp_path / "index", "binary", rescore=2)
    searcher = Searcher(load_model_folder(model_dir), open_index(tmp_path / "index"), dataset)
    tops: list[int] = []
    nearest = Index.nearest

    def watched(index: Index, queries: np.ndarray, top: int, *others: Any) -> Any:
        tops.extend([top] * len(queries))
        return nearest(index, queries, top, *others)

    monkeypatch.setattr(Index, "nearest", watched)
    requests = [Request("u1", top=3), Request("u2", top=30), Request("u3", top=3)]
    found = searcher.search(requests)
    assert sorted(tops) == [3, 3, 30]
    for request, documents in zip(requests, found, strict=True):
        (own,) = searcher.search([request])
        assert [document.key for document in documents] == [document.key for document in own]
        np.testing.assert_allclose([d.score for d in documents], [d.score for d in own], rtol=1e-4, atol=1e-5)


def test_a_number_is_clipped_to_the_fitted_range() -> None:
    context: Any = SimpleNamespace(config=TowerConfig(numeric_dim=4))
    encoder = NumericEncoder(Numeric(mean=30.0, std=2.0).with_name("age"), context)
    edge = 30 + 2 * MAX_DEVIATIONS
    values = torch.tensor([edge, edge + 1, 1e6, 3e38, float("inf")])
    assert (encoder(values) == encoder(values[:1])).all()
    assert not torch.equal(encoder(values[:1]), encoder(values[:1] - 1))
