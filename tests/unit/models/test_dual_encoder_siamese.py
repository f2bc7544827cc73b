"""Documents of one domain: one tower for both sides, and no document is its own answer or negative, anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigdssm.checkpoints.model_folder import load_model_folder, save_model_folder
from bigdssm.config import Config, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError, DataError
from bigdssm.evaluation.collection import model_run
from bigdssm.evaluation.evaluate import evaluate_scores, evaluate_split
from bigdssm.export.convert import export, folder_source
from bigdssm.export.formats import PARITY_LIMIT
from bigdssm.ingest.job import IngestTarget
from bigdssm.ingest.pairs import PairTables, make_pairs
from bigdssm.losses import fps_loss
from bigdssm.models import DualEncoder, new_model
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import build_index, open_index
from bigdssm.retrieval.mining import mine
from bigdssm.retrieval.recommend import SplitRows, TableRows
from bigdssm.retrieval.request import Request
from bigdssm.retrieval.vectors import write_vectors
from bigdssm.serving.searcher import Searcher
from bigdssm.sources.beir import read_collection
from bigdssm.training.batches import BatchBuilder, read_batches, row_stream
from bigdssm.utils.hashing import hash64
from tests.siamese import NUM_DOCS, write_dataset


@pytest.fixture(scope="module")
def config_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("siamese"))


@pytest.fixture(scope="module")
def config(config_path: Path) -> Config:
    return load_config(config_path)


@pytest.fixture(scope="module")
def dataset(config: Config) -> Dataset:
    return Dataset.open(config.data.dir)


@pytest.fixture(scope="module")
def model(config: Config, dataset: Dataset) -> DualEncoder:
    torch.manual_seed(0)
    return new_model(config.model, dataset.schema, dataset.vocab_size).eval()


@pytest.fixture(scope="module")
def model_dir(config: Config, dataset: Dataset, model: DualEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "siamese"
    save_model_folder(folder, model, config, dataset.schema, dataset.tokenizer_dir, {"stage": "pretrain", "step": 1})
    return folder


def train_pairs(dataset: Dataset) -> list[tuple[int, int]]:
    """Return (query, document) of every train row, by catalogue rows."""
    own = dataset.catalogue.rows_by_id
    return [
        pair
        for rows in dataset.iterate("train", 1000)
        for pair in zip(own(rows.query_ids).tolist(), rows.doc_rows.tolist(), strict=True)
    ]


def test_a_document_is_the_same_on_both_sides(dataset: Dataset, model: DualEncoder) -> None:
    catalogue = dataset.catalogue
    assert sorted(catalogue.keys(np.arange(catalogue.num_docs))) == sorted(f"d{n}" for n in range(NUM_DOCS))
    query, doc = dataset.schema.query["kind"], dataset.schema.doc["kind"]
    assert len(query.vocabulary) == 4 and query.vocabulary.checksum == doc.vocabulary.checksum  # type: ignore[attr-defined]
    assert [name for name in model.state_dict() if name.startswith("query_tower")] == []
    assert list(model.text) == ["shared"] and list(model.tables.tables) == ["doc_kind"]
    encoders = tower_encoders(model, dataset)
    rows = next(dataset.iterate("test", 1000))
    own = catalogue.rows_by_id(rows.query_ids)
    assert (own >= 0).all()
    np.testing.assert_allclose(
        encoders.queries(rows)[:, :-1] * 4.0, encoders.documents(own)[:, :-1], rtol=1e-5, atol=1e-6
    )


def test_a_queries_own_document_does_not_count(dataset: Dataset, model: DualEncoder) -> None:
    encoders = tower_encoders(model, dataset)
    rows = next(dataset.iterate("test", 1000))
    scores = encoders.queries(rows).numpy() @ encoders.documents(np.arange(dataset.catalogue.num_docs)).numpy().T
    target, number = rows.doc_rows, np.arange(len(rows))
    scores[number, dataset.catalogue.rows_by_id(rows.query_ids)] = -np.inf  # else first: its cosine is 1
    expected = 1 + (scores > scores[number, target][:, None]).sum(axis=1)
    np.testing.assert_array_equal(evaluate_split(encoders, dataset, "test").ranks, expected)
    by_any = evaluate_scores(
        lambda rows: (encoders.queries(rows) @ encoders.documents(np.arange(NUM_DOCS)).T).numpy(), dataset, "test"
    )
    np.testing.assert_array_equal(by_any.ranks, expected)


def test_hard_negatives_exclude_the_query_and_its_partners(dataset: Dataset, model: DualEncoder) -> None:
    pairs = train_pairs(dataset)
    related = set(pairs) | {(b, a) for a, b in pairs} | {(a, a) for a, _ in pairs}
    windows = mine(tower_encoders(model, dataset), dataset, first=0, last=NUM_DOCS)["window"]
    for (query, _), window in zip(pairs, windows.tolist(), strict=True):
        found = {doc for doc in window if doc >= 0}
        assert not any((query, doc) in related for doc in found)
        assert len(found) == NUM_DOCS - sum(a == query for a, _ in related)


@pytest.mark.parametrize("mask", ["batch", "none"])
def test_paired_documents_are_not_negatives_of_each_other(
    config_path: Path, dataset: Dataset, model: DualEncoder, mask: str
) -> None:
    config = load_config(config_path, [f"pretrain.negatives.mask={mask}", "pretrain.loss.direction=q2d"])
    stream = row_stream(config, config.pretrain, dataset, 0, 1)
    batch = next(read_batches(stream, BatchBuilder(stream, config.pretrain), torch.device("cpu")))
    related = set(zip(batch.query_ids.tolist(), batch.doc_ids[batch.positive].tolist(), strict=True))
    related |= {(b, a) for a, b in related}
    encoded = model(batch.query, batch.doc)
    S = encoded.alpha * encoded.U @ encoded.W.T + batch.counts.log()
    own = encoded.alpha * (encoded.U * encoded.W[batch.positive]).sum(1)
    values, dropped = [], 0
    for i, query in enumerate(batch.query_ids.tolist()):
        left = [own[i]]
        for j, doc in enumerate(batch.doc_ids.tolist()):
            gone = doc == query or j == batch.positive[i] or (mask == "batch" and (query, doc) in related)
            dropped += doc == query or (doc, query) in related
            left += [] if gone else [S[i, j]]
        values.append(torch.stack(left).logsumexp(0) - own[i])
    ids = None if mask == "none" else batch.query_ids
    out = fps_loss(
        encoded.U, encoded.W, batch.positive, alpha=encoded.alpha, query_ids=ids, doc_ids=batch.doc_ids,
        known=batch.known_positives, neg_bias=batch.counts.double().log(),
    )  # fmt: skip
    torch.testing.assert_close(out.loss, torch.stack(values).mean(), rtol=1e-5, atol=1e-6)
    assert dropped > 48


def test_a_search_for_a_document_returns_others(dataset: Dataset, model_dir: Path, tmp_path: Path) -> None:
    loaded = load_model_folder(model_dir)
    write_vectors(tmp_path / "vectors", tower_encoders(loaded.model, dataset), dataset, loaded.checksum)
    build_index(tmp_path / "vectors", tmp_path / "index")
    searcher = Searcher(loaded, open_index(tmp_path / "index"), dataset)
    for key in ("d3", "d17"):
        keys = [document.key for document in searcher.search([Request(document=key, top=NUM_DOCS)])[0]]
        assert sorted(keys) == sorted(f"d{n}" for n in range(NUM_DOCS) if f"d{n}" != key)
    with pytest.raises(DataError, match="no document has the key 'x'"):
        searcher.search([Request(document="x")])


def test_bulk_queries_exclude_their_own_documents(dataset: Dataset, tmp_path: Path) -> None:
    asked = SplitRows(dataset, "test").read(0, 5)
    ids = next(dataset.iterate("test", 1000)).query_ids[:5]
    assert [asked.excluded[i].tolist() for i in range(5)] == dataset.catalogue.rows_by_id(ids)[:, None].tolist()
    rows = [{"key": key, "a_text": "river stone", "a_kind": "k1", "a_size": 3} for key in ("d7", "new")]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = TableRows(dataset, tmp_path / "asked.jsonl", "key", None).read(0, 2)
    assert asked.excluded[0].tolist() == dataset.catalogue.rows_by_key(["d7"]).tolist() and not len(asked.excluded[1])


def test_a_collection_names_queries_as_documents(config_path: Path, model: DualEncoder, dataset: Dataset) -> None:
    collection = read_collection(config_path.parent / "beir", "test")
    assert {entry.key for entry in collection.queries} <= {entry.key for entry in collection.corpus}
    run = model_run(model, dataset.schema, dataset.tokenizer_dir, collection, top=NUM_DOCS)
    assert all(query not in found and len(found) == NUM_DOCS - 1 for query, found in run.items())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sentence-transformers", "model"])
def test_exports_have_one_encoder_on_both_sides(target: Any, tmp_path: Path) -> None:
    path = write_dataset(tmp_path)
    only_text = ["data.dir=" + str(tmp_path / "texts")]
    config = load_config(path)
    declared = {side: {"text": getattr(config.data, side)["text"].declaration()} for side in ("query", "doc")}
    content = config.to_dict() | {"data": config.to_dict()["data"] | declared}
    (tmp_path / "texts.yaml").write_text(json.dumps(content))
    config = load_config(tmp_path / "texts.yaml", only_text)
    tables = PairTables((tmp_path / "pairs.jsonl",), doc_id_column="b_key", query_id_column="a_key")
    make_pairs(config.data, tables, IngestTarget(tmp_path / "texts"))
    dataset = Dataset.open(tmp_path / "texts")
    model = new_model(config.model, dataset.schema, dataset.vocab_size).eval()
    save_model_folder(tmp_path / "model", model, config, dataset.schema, dataset.tokenizer_dir, {})
    parity = export(folder_source(tmp_path / "model"), tmp_path / "exported", target)
    assert max(parity.query, parity.doc) <= PARITY_LIMIT


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.query.size.log=true", "data.query: got ['text', 'kind', 'size'], needs the same features as data.doc"),
        ("model.query.mlp=[4]", "model.query: got another tower, needs none with data.siamese=true"),
        ("model.share_text=true", "model.share_text: got True, needs false with data.siamese=true"),
        ("data.title=b_text", "data.title: got b_text, needs null with data.siamese=true"),
        ("data.exclude_seen=false", "data.exclude_seen: got False, needs true with data.siamese=true"),
    ],
)  # fmt: skip
def test_invalid_options_of_a_shared_tower_are_refused(config_path: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_path, [override])
    assert words in str(caught.value)


def test_queries_need_names_and_are_not_their_own_document(config_path: Path, tmp_path: Path) -> None:
    data, source = load_config(config_path).data, config_path.parent / "pairs.jsonl"
    with pytest.raises(ConfigError, match="a query is a document; give --query-id-column and --doc-id-column"):
        make_pairs(data, PairTables((source,), doc_id_column="b_key"), IngestTarget(tmp_path / "out"))
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[0]["b_key"] = rows[0]["a_key"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = PairTables((tmp_path / "pairs.jsonl",), doc_id_column="b_key", query_id_column="a_key")
    with pytest.raises(DataError, match="the document is the query itself"):
        make_pairs(data, tables, IngestTarget(tmp_path / "out"))
    assert hash64("d0") == hash64(rows[0]["a_key"])
