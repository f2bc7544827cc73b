"""Cross-encoders: pair inputs, and re-ranking in evaluation, in search and as a teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bigdssm.checkpoints.model_folder import load_model_folder, save_model_folder
from bigdssm.config import Config, load_config
from bigdssm.dataset.dataset import Dataset
from bigdssm.errors import CheckpointError, ConfigError
from bigdssm.evaluation.collection import entry_columns, reranked_run
from bigdssm.evaluation.evaluate import Reranking, evaluate_split
from bigdssm.features import TextTokenizer
from bigdssm.loader.batch import Collator, to_features
from bigdssm.models import DualEncoder, new_model
from bigdssm.models.declarations import CrossEncoderConfig
from bigdssm.models.scorers import CrossEncoder, join_texts
from bigdssm.retrieval import model as model_module
from bigdssm.retrieval.embed import tower_encoders
from bigdssm.retrieval.index import StoreIndex, build_index, open_index
from bigdssm.retrieval.model import PairScorer
from bigdssm.retrieval.publish import publish
from bigdssm.retrieval.request import Request
from bigdssm.retrieval.vectors import write_vectors
from bigdssm.serving.searcher import Searcher
from bigdssm.sources.beir import Collection, CollectionEntry
from bigdssm.stores.base import open_store
from tests.conftest import TinyDataset
from tests.tolerances import assert_scores_close
from tests.unit.conftest import SMALL, random_model

PAIRS = ("query.text.layers=1", "query.text.hidden=8")
CROSS = "sft={loss: {name: softmax}, negatives: {hard: 3, in_batch: false}, scorer: {name: cross_encoder}}"
MLP = "sft={loss: {name: softmax}, negatives: {hard: 3, in_batch: false}, scorer: {name: mlp, hidden: [7]}}"


@pytest.fixture(scope="module")
def pairs(tiny_pairs: TinyDataset) -> Dataset:
    return Dataset.open(tiny_pairs.dir)


def config_of(tiny_pairs: TinyDataset, *overrides: str) -> Config:
    return load_config(tiny_pairs.config, [*(f"model.{override}" for override in (*SMALL, *PAIRS)), *overrides])


def folder_of(tiny_pairs: TinyDataset, pairs: Dataset, out: Path, *overrides: str) -> Path:
    config = config_of(tiny_pairs, *overrides)
    scorer = None if config.sft is None else config.sft.scorer
    model = random_model(config, pairs, seed=3, scorer=scorer)
    save_model_folder(out, model, config, pairs.schema, pairs.tokenizer_dir, {"stage": "sft" if scorer else "pretrain"})
    return out


@pytest.fixture(scope="module")
def cross_dir(tiny_pairs: TinyDataset, pairs: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tiny_pairs, pairs, tmp_path_factory.mktemp("cross") / "model", CROSS)


@pytest.fixture(scope="module")
def mlp_dir(tiny_pairs: TinyDataset, pairs: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tiny_pairs, pairs, tmp_path_factory.mktemp("mlp") / "model", MLP)


def test_texts_are_joined_without_gaps() -> None:
    query, doc = torch.tensor([[2, 5, 3, -1], [2, 5, 6, 3]]), torch.tensor([[2, 7, 8, 3], [2, 9, 3, -1]])
    tokens, types = join_texts([(query, 0), (doc, 1)])
    assert tokens.tolist() == [[2, 5, 3, 7, 8, 3, -1, -1], [2, 5, 6, 3, 9, 3, -1, -1]]
    assert types.tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0]]


def test_a_pair_is_tokenised_as_by_transformers(cross_dir: Path, pairs: Dataset) -> None:
    folder = load_model_folder(cross_dir)
    scorer = folder.model.scorer
    assert isinstance(scorer, CrossEncoder) and folder.tokenizer_dir is not None
    rows = next(pairs.iterate("test", 5))
    tokenizer, docs = TextTokenizer(folder.tokenizer_dir), np.arange(15).reshape(5, 3)
    texts = tokenizer.decode(rows.query["query"]), tokenizer.decode(pairs.catalogue.columns(docs.flatten())["text"])
    expected = torch.zeros(5, 3)
    for i in range(5):
        for j in range(3):
            encoded = tokenizer._whole.encode(texts[0][i], texts[1][3 * i + j])
            ids = torch.tensor([encoded.ids])
            types = torch.tensor([[int("[SEP]" in encoded.tokens[:at]) for at in range(len(encoded.tokens))]])
            with torch.no_grad():
                hidden = scorer.text.transformer(input_ids=ids, token_type_ids=types).last_hidden_state
                expected[i, j] = scorer.head(hidden.mean(1))
    towers = tower_encoders(folder.model, pairs)
    vectors = towers.documents(docs.flatten()).view(5, 3, -1)
    expected += torch.einsum("md,mkd->mk", towers.queries(rows), vectors)  # the cross-encoder adds to the inner product
    np.testing.assert_allclose(
        PairScorer.from_folder(folder, pairs).score(rows.query, docs), expected, rtol=1e-4, atol=1e-5
    )


def test_a_new_cross_encoder_starts_from_the_document_tower(
    tiny_pairs: TinyDataset, pairs: Dataset, tmp_path: Path
) -> None:
    source = folder_of(tiny_pairs, pairs, tmp_path / "towers")
    model = load_model_folder(source, scorer=CrossEncoderConfig()).model
    assert isinstance(model.scorer, CrossEncoder) and model.scorer.key == "doc"
    tower, own = model.text["doc"].state_dict(), model.scorer.text.state_dict()
    name = "transformer.embeddings.position_embeddings.weight"
    assert len(tower[name]) == 24 and len(own[name]) == 36  # 24 tokens of a text, plus 12 of a query
    assert torch.equal(own[name], tower[name][torch.arange(36) % 24])
    assert all(torch.equal(own[key], tensor) for key, tensor in tower.items() if key != name)
    assert not model.scorer.head.weight.any()
    learned = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert learned == {key for key, _ in model.named_parameters() if key.startswith("scorer.")}


@pytest.mark.parametrize("which", ["cross", "mlp", "product"])
def test_candidates_are_scored_alike_in_any_chunks(
    which: str, tiny_pairs: TinyDataset, cross_dir: Path, mlp_dir: Path, pairs: Dataset, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    made = {"cross": cross_dir, "mlp": mlp_dir}
    folder = load_model_folder(made[which] if which in made else folder_of(tiny_pairs, pairs, tmp_path / "towers"))
    scorer, rows = PairScorer.from_folder(folder, pairs), next(pairs.iterate("test", 9))
    docs = np.arange(9 * 4).reshape(9, 4) % pairs.catalogue.num_docs
    docs[2, 1:] = docs[5] = -1
    scores = scorer.score(rows.query, docs)
    assert scores.shape == (9, 4) and scores.dtype == np.float32
    np.testing.assert_array_equal(np.isneginf(scores), docs < 0)
    assert scorer.score(rows.query, docs[:, :0]).shape == (9, 0)
    assert np.isneginf(scorer.score(rows.query, np.full((9, 2), -1))).all()
    monkeypatch.setattr(model_module, "PAIRS_AT_ONCE", 5)
    monkeypatch.setattr(model_module, "VECTORS_AT_ONCE", 4)
    np.testing.assert_allclose(scorer.score(rows.query, docs), scores, rtol=1e-5, atol=1e-5)
    model, encoders = folder.model, tower_encoders(folder.model, pairs)
    if which == "product":
        expected = encoders.queries(rows) @ encoders.documents(docs[0]).T
        np.testing.assert_allclose(scores[0], expected[0], rtol=1e-4, atol=1e-5)
    elif which == "mlp":
        query = Collator(pairs.schema, pairs.catalogue).query_features(rows.query)
        with torch.no_grad():
            documents = to_features(pairs.schema.doc, pairs.catalogue.columns(docs[0]))
            expected = model(query, documents, torch.arange(4).expand(9, 4)).scores
        np.testing.assert_allclose(scores[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("top", [2, 10, 1000])
def test_the_top_documents_of_a_split_are_reranked(cross_dir: Path, pairs: Dataset, top: int) -> None:
    folder = load_model_folder(cross_dir)
    encoders, scorer = tower_encoders(folder.model, pairs), PairScorer.from_folder(folder, pairs)
    rows = next(pairs.iterate("test", 1000))
    documents = np.arange(pairs.catalogue.num_docs)
    product = (encoders.queries(rows) @ encoders.documents(documents).T).numpy()
    before = evaluate_split(encoders, pairs, "test").ranks
    found = evaluate_split(encoders, pairs, "test", rerank=Reranking(scorer, min(top, len(documents)))).ranks
    for i in np.flatnonzero(rows.relevance > 0).tolist()[:40]:
        if before[i] > top:
            assert found[i] == before[i]
            continue
        best = np.argsort(-product[i], kind="stable")[:top]
        assert rows.doc_rows[i] in best
        scores = scorer.score(rows.take(np.array([i])).query, best[None])[0]
        above = scores - scores[best == rows.doc_rows[i]]  # the last bits depend on the batch
        assert (above > 2e-5).sum() <= found[i] - 1 <= (above > -2e-5).sum() - 1
    assert top == 2 or (found != before).any()


def test_ties_of_a_scorer_count_half(cross_dir: Path, pairs: Dataset) -> None:
    class Indifferent(PairScorer):
        def score(self, queries: object, documents: np.ndarray) -> np.ndarray:
            return np.zeros(documents.shape, np.float32)

    folder = load_model_folder(cross_dir)
    scorer = Indifferent(folder.model, folder.schema, pairs.catalogue.columns)
    encoders = tower_encoders(folder.model, pairs)
    before = evaluate_split(encoders, pairs, "test").ranks
    found = evaluate_split(encoders, pairs, "test", rerank=Reranking(scorer, 10)).ranks
    np.testing.assert_array_equal(found, np.where(before <= 10, 5.5, before))


@pytest.mark.parametrize("which", ["cross", "mlp"])
def test_a_search_reranks_the_top_documents_of_the_index(
    which: str, cross_dir: Path, mlp_dir: Path, pairs: Dataset, tmp_path: Path
) -> None:
    folder = load_model_folder({"cross": cross_dir, "mlp": mlp_dir}[which])
    write_vectors(tmp_path / "vectors", tower_encoders(folder.model, pairs), pairs, folder.checksum)
    build_index(tmp_path / "vectors", tmp_path / "index")
    index = open_index(tmp_path / "index")
    requests = [Request(features={"query": "copper lantern"}, top=8), Request(features={"query": "river"}, top=3)]
    plain, reranked = Searcher(folder, index, pairs), Searcher(folder, index, pairs, rerank=5)
    for before, now in zip(plain.search(requests), reranked.search(requests), strict=True):
        assert len(now) == len(before)
        assert [document.score for document in now[:5]] == sorted((d.score for d in now[:5]), reverse=True)
        assert now[5:] == before[5:]  # the rest keeps its order
    five = [plain.search([Request(features=request.features, top=5)])[0] for request in requests]
    for request, best in zip(requests, five, strict=True):
        query = reranked.queries.of(request)
        rows = pairs.catalogue.rows_by_key([document.key for document in best])
        scores = PairScorer.from_folder(folder, pairs).score(query.columns, rows[None])[0]
        expected = [best[i].key for i in np.argsort(-scores)][: request.top]
        assert [document.key for document in reranked.search([request])[0]][:5] == expected
    assert reranked.answer([reranked.queries.of(requests[0])])[0].rerank_ms > 0

    store = open_store(f"file://{tmp_path}/store")
    collection = publish(store, tmp_path / "vectors", pairs, "shop").collection
    on_store = Searcher(folder, StoreIndex(store, collection, store.count(collection)), pairs, rerank=5)
    for mine, other in zip(on_store.search(requests), reranked.search(requests), strict=True):
        assert [document.key for document in mine] == [document.key for document in other]
        scores = [document.score for document in other]
        assert_scores_close([document.score for document in mine], scores, index.meta.width)


def test_unsupported_datasets_and_scorers_are_refused(
    tiny_interactions: TinyDataset,
    tiny_pairs: TinyDataset,
    pairs: Dataset,
    dataset: Dataset,
    cross_dir: Path,
    tmp_path: Path,
) -> None:
    config = load_config(tiny_interactions.config, ["model.dim=8"])
    with pytest.raises(ConfigError, match=r"cross_encoder: data\.query has no text"):
        new_model(config.model, dataset.schema, dataset.vocab_size, CrossEncoderConfig())
    towers = load_model_folder(folder_of(tiny_pairs, pairs, tmp_path / "towers"))
    with pytest.raises(CheckpointError, match="--rerank needs a model with a scorer"):
        PairScorer.from_folder(towers, pairs).require_scorer()
    with pytest.raises(CheckpointError, match="it has a scorer"):
        load_model_folder(cross_dir, scorer=CrossEncoderConfig())
    with pytest.raises(ConfigError, match=r"sft\.scorer\.name: got cross_encoder"):
        config_of(tiny_pairs, "sft={scorer: {name: cross_encoder}, negatives: {hard: 3}}")
    with pytest.raises(ConfigError, match=r"pretrain\.scorer\.name: got cross_encoder"):
        config_of(tiny_pairs, CROSS.replace("sft", "pretrain"))
    assert isinstance(load_model_folder(cross_dir).model, DualEncoder)


def test_a_cross_encoder_learns_the_pairs(cross_dir: Path, pairs: Dataset) -> None:
    model = load_model_folder(cross_dir).model.train()
    rows = next(pairs.iterate("train", 6))
    query = Collator(pairs.schema, pairs.catalogue).query_features(rows.query)["query"]
    docs = to_features(pairs.schema.doc, pairs.catalogue.columns(rows.doc_rows))["text"]
    every = {"query": query.repeat_interleave(6, 0)}, {"text": docs.repeat(6, 1)}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    losses = []
    for _ in range(60):
        encoded = model(*every, paired=True)
        assert encoded.U is None and encoded.W is None and encoded.scores is not None
        loss = torch.nn.functional.cross_entropy(encoded.scores.view(6, 6), torch.arange(6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_a_run_of_a_collection_is_reranked(cross_dir: Path, pairs: Dataset) -> None:
    folder = load_model_folder(cross_dir)
    catalogue = pairs.catalogue
    rows, docs = next(pairs.iterate("test", 4)), np.arange(20)
    tokenizer = TextTokenizer(pairs.dir / "tokenizer")
    texts = [tokenizer.decode(column) for column in (rows.query["query"], catalogue.columns(docs)["text"])]
    corpus = [CollectionEntry(f"d{i}", text, {}) for i, text in enumerate(texts[1])]
    queries = [CollectionEntry(f"q{i}", text, {}) for i, text in enumerate(texts[0])]
    run = {query.key: {f"d{(i * 3 + n) % 20}": 1.0 - n for n in range(9)} for i, query in enumerate(queries)}
    found = reranked_run(Collection(corpus, queries, {}, {}), run, folder, 5)
    scorer = PairScorer(
        folder.model, folder.schema,
        lambda rows: entry_columns(pairs.schema.doc, [corpus[row] for row in rows], tokenizer),
    )  # fmt: skip
    best = np.array([[(i * 3 + n) % 20 for n in range(5)] for i in range(4)])
    scores = scorer.score(rows.query, best)
    for i, (before, now) in enumerate(zip(run.values(), found.values(), strict=True)):
        keys = sorted(now, key=lambda key: -now[key])
        assert keys[:5] == [list(before)[n] for n in np.argsort(-scores[i])]
        assert keys[5:] == list(before)[5:]


def test_re_ranking_a_batch_is_re_ranking_each_alone(cross_dir: Path, pairs: Dataset, tmp_path: Path) -> None:
    """Empty and long texts in one batch."""
    folder = load_model_folder(cross_dir)
    write_vectors(tmp_path / "vectors", tower_encoders(folder.model, pairs), pairs, folder.checksum)
    build_index(tmp_path / "vectors", tmp_path / "index")
    searcher = Searcher(folder, open_index(tmp_path / "index"), pairs, rerank=5)
    texts = ["copper lantern", " ", "walnut " * 400, "!", "\u200b", "é", "river stone bridge"]
    requests = [Request(features={"query": text}, events=[], top=1 + n % 8) for n, text in enumerate(texts)]
    together = searcher.search(requests)
    for request, found in zip(requests, together, strict=True):
        (own,) = searcher.search([request])
        assert len(found) == request.top and np.isfinite([document.score for document in found]).all()
        assert [document.key for document in found] == [document.key for document in own]
        np.testing.assert_allclose([d.score for d in found], [d.score for d in own], rtol=1e-4, atol=1e-5)
