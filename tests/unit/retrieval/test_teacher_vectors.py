"""Teacher vectors of a dataset: correct rows and queries, resuming after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bigdssm.config import Config
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import EVENT_BITS
from bigdssm.errors import DataError
from bigdssm.models import DualEncoder
from bigdssm.retrieval.embed import Encoders, tower_encoders
from bigdssm.retrieval.shards import Share
from bigdssm.retrieval.teacher_vectors import TeacherVectors, write_teacher_vectors
from tests.command_line import Tools
from tests.unit.conftest import random_model


def test_products_are_the_teachers_scores(
    tools: Tools, other_model_dir: Path, config: Config, dataset: Dataset, tmp_path: Path
) -> None:  # fmt: skip
    out = ("--data", dataset.dir, "--out", tmp_path / "teacher")
    stdout = tools.ran("embed_teacher", *out, "--model", other_model_dir, "--rows-per-shard", 100)
    found = TeacherVectors(tmp_path / "teacher")
    assert f"{dataset.catalogue.num_docs} documents and {len(found.keys)} queries of width" in stdout
    encoders = tower_encoders(random_model(config, dataset, seed=2), dataset)
    rows = next(dataset.iterate("train", 10**6))
    np.testing.assert_array_equal(found.keys, rows.query_keys)
    documents = encoders.documents(np.arange(dataset.catalogue.num_docs))
    some = np.array([7, 0, len(rows) - 1, 7])
    scores = encoders.queries(rows.take(some)) @ documents.T
    products = found.queries(rows.query_keys[some]).astype(np.float32) @ found.documents.astype(np.float32).T
    np.testing.assert_allclose(products, scores.numpy(), rtol=0.01, atol=0.01)
    found.check_against(dataset)
    in_bf16 = ("--data", dataset.dir, "--out", tmp_path / "in_bf16", "--precision", "bf16")
    tools.ran("embed_teacher", *in_bf16, "--model", other_model_dir)
    rounded = TeacherVectors(tmp_path / "in_bf16").documents.astype(np.float32)
    np.testing.assert_allclose(rounded, documents.numpy(), atol=0.02 * np.abs(rounded).max())
    assert np.abs(rounded - documents.numpy()).max() > 0.01, "bfloat16 products are rounded"
    assert "exists; choose" in tools.refused(2, "embed_teacher", *out, "--model", other_model_dir)
    with pytest.raises(DataError, match=f"no query of row {10**6}"):
        found.queries(np.array([10**6 << EVENT_BITS]))


def test_ranks_share_the_rows_and_resume_after_a_kill(model: DualEncoder, dataset: Dataset, tmp_path: Path) -> None:
    encoders, calls = tower_encoders(model, dataset), []

    def documents(rows: np.ndarray) -> torch.Tensor:
        calls.append(rows)
        return encoders.documents(rows)

    def killed(rows: object) -> torch.Tensor:
        raise KeyboardInterrupt

    def make(rank: int, name: str, **replaced: object) -> TeacherVectors | None:
        given = replace(Encoders(encoders.queries, documents), **replaced)  # type: ignore[arg-type]
        return write_teacher_vectors(tmp_path / "teacher", given, dataset, name, Share(rank, 2, rows_per_chunk=16))

    with pytest.raises(KeyboardInterrupt):
        make(0, "one", queries=killed)
    assert not (tmp_path / "teacher").exists()
    before = len(calls)
    assert make(1, "one") is None
    found = make(0, "one")
    assert found is not None and len(calls) < 2 * before + 4, "finished shards were encoded again"
    rows = next(dataset.iterate("train", 10**6))
    expected = encoders.queries(rows).numpy(), encoders.documents(np.arange(dataset.catalogue.num_docs)).numpy()
    np.testing.assert_allclose(found.queries(rows.query_keys), expected[0], rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(found.documents, expected[1], rtol=2e-3, atol=1e-3)


def test_invalid_teacher_folders_are_refused(
    model: DualEncoder, dataset: Dataset, tiny_pairs: object, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"holds no teacher vectors: .*No such file"):
        TeacherVectors(tmp_path)
    other = Dataset.open(tiny_pairs.dir)  # type: ignore[attr-defined]
    made = write_teacher_vectors(tmp_path / "teacher", tower_encoders(model, dataset), dataset, "one", Share())
    assert made is not None
    with pytest.raises(DataError, match="belongs to another dataset"):
        made.check_against(other)
    large = Encoders(lambda rows: torch.full((len(rows), 2), 1e6), lambda docs: torch.ones(len(docs), 2))
    with pytest.raises(DataError, match=r"vectors of queries of rows 0 to \d+ are not finite in float16"):
        write_teacher_vectors(tmp_path / "large", large, dataset, "large", Share())
    np.save(tmp_path / "teacher" / "queries.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"holds no teacher vectors: got queries float64"):
        TeacherVectors(tmp_path / "teacher")
