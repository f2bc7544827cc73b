"""Re-ranking by a cross-encoder over texts: in evaluation, in search, of a run, and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigdssm.checkpoints.model_folder import ModelFolder, load_model_folder, save_model_folder
from bigdssm.config import load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import ConfigError
from bigdssm.evaluation.collection import reranked_run
from bigdssm.evaluation.evaluate import Reranking, evaluate_split
from bigdssm.features import TextTokenizer
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import StoreIndex, build_index, open_index
from bigdssm.retrieval.publish import publish
from bigdssm.retrieval.request import Request
from bigdssm.retrieval.reranking import Reranker, Texts
from bigdssm.retrieval.vectors import write_vectors
from bigdssm.serving.searcher import Searcher
from bigdssm.sources.beir import Collection, CollectionEntry
from bigdssm.stores.base import Documents, open_store
from tests.command_line import Tools
from tests.conftest import TinyDataset
from tests.unit.conftest import SMALL, random_model, write_cross_encoder

pytest.importorskip("sentence_transformers")

OVERRIDES = [f"model.{key}" for key in (*SMALL, "query.text.layers=1", "query.text.hidden=8")]
REQUESTS = [Request(features={"query": "copper lantern"}, top=8), Request(features={"query": "river"}, top=3)]


@pytest.fixture(scope="module")
def pairs(tiny_pairs: TinyDataset) -> Dataset:
    return Dataset.open(tiny_pairs.dir)


@pytest.fixture(scope="module")
def towers_dir(tiny_pairs: TinyDataset, pairs: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers") / "model"
    config = load_config(tiny_pairs.config, OVERRIDES)
    model = random_model(config, pairs, seed=3)
    save_model_folder(folder, model, config, pairs.schema, pairs.tokenizer_dir, {"stage": "pretrain"})
    return folder


@pytest.fixture(scope="module")
def towers(towers_dir: Path) -> ModelFolder:
    return load_model_folder(towers_dir)


@pytest.fixture(scope="module")
def pairs_index(towers: ModelFolder, pairs: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The index folder; the vectors are next to it."""
    folder = tmp_path_factory.mktemp("indexed")
    write_vectors(folder / "vectors", tower_encoders(towers.model, pairs), pairs, towers.checksum)
    build_index(folder / "vectors", folder / "index")
    return folder / "index"


@pytest.fixture(scope="module")
def cross_encoder(pairs: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cross") / "encoder"
    write_cross_encoder(folder, pairs)
    return folder


@pytest.fixture(scope="module")
def reranker(pairs: Dataset, cross_encoder: Path) -> Reranker:
    return Reranker(cross_encoder, Texts.of(pairs))


class ByRow(Reranker):
    """Scores a document by its row modulo 3: many ties, and no rounding."""

    def __init__(self) -> None:
        pass

    def score(self, queries: object, documents: np.ndarray) -> np.ndarray:
        return np.where(documents < 0, -np.inf, documents % 3).astype(np.float32)


def test_scores_are_the_logits_of_the_texts(pairs: Dataset, tmp_path: Path) -> None:
    model, tokenizer = write_cross_encoder(tmp_path / "cross", pairs)
    rows = next(pairs.iterate("test", 5))
    docs = np.arange(20).reshape(5, 4)
    docs[0] = docs[1]  # two queries with equal candidates
    docs[2, 1:] = -1
    docs[3] = -1
    scores = Reranker(tmp_path / "cross", Texts.of(pairs)).score(rows.query, docs)
    assert scores.shape == (5, 4)
    assert scores.dtype == np.float32
    assert pairs.tokenizer_dir is not None
    of_dataset = TextTokenizer(pairs.tokenizer_dir)
    queries = of_dataset.decode(rows.query["query"])
    documents = of_dataset.decode(pairs.catalogue.columns(np.arange(20))["text"])
    for (i, j), doc in np.ndenumerate(docs):
        if doc < 0:
            assert np.isneginf(scores[i, j])
            continue
        with torch.no_grad():
            logits = model(**tokenizer(queries[i], documents[doc], return_tensors="pt")).logits
        assert scores[i, j] == pytest.approx(float(logits), abs=1e-5)
    assert np.ptp(scores[0]) > 1e-3, "the documents differ"


def test_scores_of_a_batch_without_candidates(pairs: Dataset, reranker: Reranker) -> None:
    rows = next(pairs.iterate("test", 3))
    assert reranker.score(rows.query, np.zeros((3, 0), np.int64)).shape == (3, 0)
    assert np.isneginf(reranker.score(rows.query, np.full((3, 2), -1))).all()
    none = rows.take(np.zeros(0, np.int64))
    assert reranker.score(none.query, np.zeros((0, 4), np.int64)).shape == (0, 4)


@pytest.mark.parametrize(("by", "top"), [("ties", 10), ("ties", 50), ("ties", 1000), ("texts", 10)])
def test_ranks_of_a_split_by_brute_force(
    towers: ModelFolder, pairs: Dataset, reranker: Reranker, by: str, top: int
) -> None:
    """The best `top` documents get new ranks, ties are counted half; a target behind them keeps its rank."""
    scorer = ByRow() if by == "ties" else reranker
    encoders = tower_encoders(towers.model, pairs)
    top = min(top, pairs.catalogue.num_docs)
    rows = next(pairs.iterate("test", 1000))
    products = (encoders.queries(rows) @ encoders.documents(np.arange(pairs.catalogue.num_docs)).T).numpy()
    before = evaluate_split(encoders, pairs, "test").ranks
    after = evaluate_split(encoders, pairs, "test", rerank=Reranking(scorer, top)).ranks
    usable = np.flatnonzero(rows.relevance > 0)
    best = np.argsort(-products, axis=1, kind="stable")[:, :top]
    scores = scorer.score(rows.query, best)
    for i in usable:
        if before[i] > top:
            assert after[i] == before[i]
            continue
        is_target = best[i] == rows.doc_rows[i]
        assert is_target.sum() == 1
        above = scores[i, ~is_target] - scores[i, is_target]
        tolerance = 1e-6 * (1 + abs(scores[i, is_target]))
        higher = (above > tolerance).sum()
        equal = (abs(above) <= tolerance).sum()
        assert after[i] == 1 + higher + equal / 2
    assert (after[usable] != before[usable]).any()
    if by == "ties" and top <= 50:
        assert (after[usable] % 1 == 0.5).any()


def test_a_search_reranks_the_best_documents_of_the_index(
    towers: ModelFolder, pairs: Dataset, pairs_index: Path, reranker: Reranker, cross_encoder: Path
) -> None:
    index = open_index(pairs_index)
    plain = Searcher(towers, index, pairs)
    searcher = Searcher(towers, index, pairs, rerank=5, reranker=cross_encoder)
    assert_reranked(plain, searcher, reranker, pairs)
    (result,) = searcher.answer([searcher.queries.of(REQUESTS[0])])
    assert result.rerank_ms > 0
    (result,) = plain.answer([plain.queries.of(REQUESTS[0])])
    assert result.rerank_ms < 0.1 * result.search_ms + 1


def assert_reranked(plain: Searcher, searcher: Searcher, reranker: Reranker, pairs: Dataset) -> None:
    """Assert that the best 5 documents are in the cross-encoder's order, and the rest behind in their own."""
    for request, documents in zip(REQUESTS, searcher.search(REQUESTS), strict=True):
        (before,) = plain.search([Request(features=request.features, top=8)])
        best = pairs.catalogue.rows_by_key([document.key for document in before[:5]])
        query = searcher.queries.of(request)
        scores = reranker.score(query.columns, best[None])[0]
        order = np.argsort(-scores)
        expected = [*(before[i].key for i in order), *(document.key for document in before[5:])]
        assert [document.key for document in documents] == expected[: request.top]
        num_scored = min(5, request.top)
        own = [document.score for document in documents[:num_scored]]
        np.testing.assert_allclose(own, scores[order][:num_scored], atol=1e-5)
        rest = [document.score for document in documents[5:]]
        np.testing.assert_allclose(rest, [document.score for document in before[5 : request.top]], rtol=1e-4)


def test_a_search_reranks_the_best_documents_of_a_store(
    towers: ModelFolder, pairs: Dataset, pairs_index: Path, reranker: Reranker, cross_encoder: Path, tmp_path: Path
) -> None:
    """A document of the store that the dataset lacks has no text: it is behind the re-ranked ones."""
    store = open_store(f"file://{tmp_path}/store")
    collection = publish(store, pairs_index.with_name("vectors"), pairs, "texts").collection
    index = StoreIndex(store, collection, store.count(collection))
    plain = Searcher(towers, index, pairs)
    searcher = Searcher(towers, index, pairs, rerank=5, reranker=cross_encoder)
    assert_reranked(plain, searcher, reranker, pairs)

    query = plain.queries.of(REQUESTS[0])
    (four,) = plain.search([Request(features=REQUESTS[0].features, top=4)])
    vector = 100 * index.query_vectors(plain.encode([query]))
    columns: dict[str, list[Any]] = {name: [None] for name in collection.columns}
    store.write(collection, Documents(["later"], ["a later document"], vector, np.array([1]), columns), 10**9)
    store.finish(collection)
    assert plain.search(REQUESTS[:1])[0][0].key == "later"
    documents = searcher.search(REQUESTS[:1])[0]
    scores = reranker.score(query.columns, pairs.catalogue.rows_by_key([document.key for document in four])[None])[0]
    best = [four[i].key for i in np.argsort(-scores)]
    assert [document.key for document in documents[:5]] == [*best, "later"]


def test_re_ranking_a_batch_is_re_ranking_each_alone(
    towers: ModelFolder, pairs: Dataset, pairs_index: Path, cross_encoder: Path
) -> None:
    """Empty and long texts in one batch."""
    searcher = Searcher(towers, open_index(pairs_index), pairs, rerank=5, reranker=cross_encoder)
    texts = ["copper lantern", " ", "walnut " * 400, "!", "\u200b", "é", "river stone bridge"]
    requests = [Request(features={"query": text}, events=[], top=1 + n % 8) for n, text in enumerate(texts)]
    together = searcher.search(requests)
    for request, documents in zip(requests, together, strict=True):
        (alone,) = searcher.search([request])
        assert len(documents) == request.top
        assert np.isfinite([document.score for document in documents]).all()
        assert [document.key for document in documents] == [document.key for document in alone]
        scores = [document.score for document in alone]
        np.testing.assert_allclose([document.score for document in documents], scores, rtol=1e-4, atol=1e-5)


def test_a_run_of_a_collection_is_reranked(
    towers: ModelFolder, pairs: Dataset, reranker: Reranker, cross_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several rounds; a query whose run has fewer documents than are re-ranked; the rest is behind, in its order."""
    monkeypatch.setattr("bigdssm.evaluation.collection.RERANKED_AT_ONCE", 3)
    rows = next(pairs.iterate("test", 4))
    docs = np.arange(20)
    assert pairs.tokenizer_dir is not None
    tokenizer = TextTokenizer(pairs.tokenizer_dir)
    query_texts = tokenizer.decode(rows.query["query"])
    doc_texts = tokenizer.decode(pairs.catalogue.columns(docs)["text"])
    corpus = [CollectionEntry(f"d{i}", text, {}) for i, text in enumerate(doc_texts)]
    queries = [CollectionEntry(f"q{i}", text, {}) for i, text in enumerate(query_texts)]
    best = [[(3 * i + n) % 20 for n in range(9 if i else 2)] for i in range(4)]
    run = {f"q{i}": {f"d{doc}": 1.0 - n for n, doc in enumerate(of_query)} for i, of_query in enumerate(best)}
    reranked = reranked_run(Collection(corpus, queries, {}, {}), run, towers, cross_encoder, 5)
    for i, of_query in enumerate(best):
        first = np.array(of_query[:5])
        scores = reranker.score(rows.take(np.array([i])).query, first[None])[0]
        expected = [*first[np.argsort(-scores)], *of_query[5:]]
        of_run = reranked[f"q{i}"]
        assert sorted(of_run, key=lambda key: -of_run[key]) == [f"d{doc}" for doc in expected]
        np.testing.assert_allclose([of_run[f"d{doc}"] for doc in first], scores, atol=1e-5)


def test_the_evaluate_command_adds_a_reranked_system(
    tools: Tools, towers: ModelFolder, towers_dir: Path, pairs: Dataset, reranker: Reranker, cross_encoder: Path
) -> None:
    options = ("--model", towers_dir, "--data", pairs.dir, "--rerank", 5, "--reranker", cross_encoder)
    printed = tools.ran("evaluate", *options)
    encoders = tower_encoders(towers.model, pairs)
    expected = evaluate_split(encoders, pairs, "test", rerank=Reranking(reranker, 5)).metrics["ndcg_at_10"]
    reranked, plain = [line for line in printed.splitlines() if " ± " in line]
    assert reranked.startswith("model, top 5 re-ranked ")
    assert f" {expected:.4f} ± " in reranked
    assert plain.startswith("model  ")
    assert "model, top 5 re-ranked − model: HR@10" in printed


def test_the_evaluate_command_reranks_a_collection(
    tools: Tools, towers_dir: Path, pairs: Dataset, cross_encoder: Path, tmp_path: Path
) -> None:
    (tmp_path / "beir/qrels").mkdir(parents=True)
    (tmp_path / "beir/corpus.jsonl").write_text(
        '{"_id": "a", "title": "", "text": "copper lantern"}\n{"_id": "b", "title": "", "text": "river stone"}\n'
    )
    (tmp_path / "beir/queries.jsonl").write_text('{"_id": "q", "text": "copper"}\n')
    (tmp_path / "beir/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq\ta\t1\n")
    options = ("--model", towers_dir, "--beir", tmp_path / "beir", "--rerank", 5, "--reranker", cross_encoder)
    assert "model, top 5 re-ranked" in tools.ran("evaluate", *options)


def test_the_search_command_reranks(
    tools: Tools, towers_dir: Path, pairs: Dataset, pairs_index: Path, towers: ModelFolder, cross_encoder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    options = ("--model", towers_dir, "--index", pairs_index, "--data", pairs.dir, "--text", "query=copper lantern")
    tools.ran(
        "search", *options, "--top", 8, "--rerank", 5, "--reranker", cross_encoder, "--out", tmp_path / "documents.csv"
    )
    searcher = Searcher(towers, open_index(pairs_index), pairs, rerank=5, reranker=cross_encoder)
    keys = [document.key for document in searcher.search(REQUESTS[:1])[0]]
    lines = (tmp_path / "documents.csv").read_text().splitlines()[1:]
    assert [line.split(",")[2] for line in lines] == keys


@pytest.mark.parametrize("name", ["search", "serve", "evaluate"])
def test_a_number_and_a_cross_encoder_go_together(
    tools: Tools, towers_dir: Path, pairs: Dataset, pairs_index: Path, cross_encoder: Path, name: str
) -> None:
    options: tuple[object, ...] = ("--model", towers_dir, "--data", pairs.dir)
    if name != "evaluate":
        options += ("--index", pairs_index)
    if name == "search":
        options += ("--text", "query=copper")
    assert "--rerank 5: needs --reranker" in tools.refused(2, name, *options, "--rerank", 5)
    assert f"--reranker {cross_encoder}: needs --rerank" in tools.refused(
        2, name, *options, "--reranker", cross_encoder
    )
    message = tools.refused(2, name, *options, "--rerank", 5, "--reranker", towers_dir)
    assert f"{towers_dir} holds no cross-encoder: config.json is missing" in message


def test_other_models_and_sides_without_text_are_refused(
    pairs: Dataset, dataset: Dataset, model_dir: Path, index_dir: Path, cross_encoder: Path, tmp_path: Path
) -> None:
    write_cross_encoder(tmp_path / "two", pairs, outputs=2)
    with pytest.raises(ConfigError, match="two has 2 outputs, needs one: a score"):
        Reranker(tmp_path / "two", Texts.of(pairs))
    with pytest.raises(ConfigError, match="read texts: needs a text feature on both sides"):
        Texts.of(dataset)
    with pytest.raises(ConfigError, match="needs a text feature on both sides"):
        Searcher(load_model_folder(model_dir), open_index(index_dir), dataset, rerank=5, reranker=cross_encoder)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"the cross-encoder in .*broken does not load: ") as error:
        Reranker(tmp_path / "broken", Texts.of(pairs))
    assert "\n" not in str(error.value)
