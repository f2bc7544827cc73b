"""Runs on a BEIR collection: a model, a pretrained encoder without fine-tuning, and BM25.

Shapes: m queries, N documents, D+1 the width of index vectors.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError, DivergedError
from bigdssm.evaluation.comparison import System
from bigdssm.evaluation.pretrained import MAX_TOKENS, PretrainedEncoder
from bigdssm.evaluation.teachers import Bm25
from bigdssm.evaluation.trec import Run, run_metrics, write_run
from bigdssm.features import Feature, TextTokenizer, histories_of
from bigdssm.features.canonical import columns_of
from bigdssm.features.columns import SourceBatch
from bigdssm.features.ragged import Column
from bigdssm.models import DualEncoder
from bigdssm.retrieval.embed import document_vectors, encode_columns, query_vectors
from bigdssm.retrieval.exact_search import top_documents
from bigdssm.retrieval.reranking import Reranker, Texts
from bigdssm.sources.beir import Collection, CollectionEntry, texts_and_metadata
from bigdssm.utils.device import device_of
from bigdssm.utils.log import Progress, no_progress

TOP = 100  # documents retrieved per query
QUERIES_AT_ONCE, RERANKED_AT_ONCE = 512, 128


def measure_run(
    name: str, make: Callable[[], Run], collection: Collection, spent_s: float = 0.0, file: Path | None = None,
    tag: str | None = None,
) -> System:  # fmt: skip
    """Compute a run and measure it; `file`: also write it in TREC's format, with `tag` (default: its name)."""
    started = perf_counter()
    run = make()
    seconds = perf_counter() - started + spent_s
    if file is not None:
        write_run(file, run, tag or name)
    return System(name, run_metrics(collection.qrels, run), seconds)


def model_run(
    model: DualEncoder, schema: Schema, tokenizer_dir: Path | None, collection: Collection, *,
    filter_known: bool = False, top: int = TOP, progress: Progress = no_progress,
) -> Run:  # fmt: skip
    """Return the run of a two-tower model over the full corpus.

    filter_known excludes a query's relevant documents of other splits. Raises as `model_vectors` and `vectors_run`.
    """
    queries, documents = model_vectors(model, schema, tokenizer_dir, collection, progress)
    return vectors_run(collection, queries, documents, filter_known, top)


def model_vectors(
    model: DualEncoder, schema: Schema, tokenizer_dir: Path | None, collection: Collection,
    progress: Progress = no_progress,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Encode the queries [m, D+1] and the corpus [N, D+1] to index vectors.

    Raises ConfigError: queries need a history, which a collection does not have.
    """
    if histories := list(histories_of(schema.query)):
        raise ConfigError(f"queries have the history {histories[0]!r}, which a BEIR collection does not have")
    device = device_of(model)
    tokenizer = None if tokenizer_dir is None else TextTokenizer(tokenizer_dir)
    columns = entry_columns(schema.query, collection.queries, tokenizer)
    queries = encode_columns(schema.query, columns, partial(query_vectors, model), "queries encoded", progress, device)
    columns = entry_columns(schema.doc, collection.corpus, tokenizer)
    encode = partial(document_vectors, model)
    return queries, encode_columns(schema.doc, columns, encode, "documents encoded", progress, device)


def vectors_run(
    collection: Collection, queries: Tensor, documents: Tensor, filter_known: bool = False, top: int = TOP
) -> Run:
    """Return the run of vectors by inner product. Raises DivergedError: a vector is not finite."""
    if not bool(queries.isfinite().all() and documents.isfinite().all()):
        raise DivergedError("vectors of the collection hold NaN or inf")
    row_of = {entry.key: i for i, entry in enumerate(collection.corpus)}
    run: dict[str, dict[str, float]] = {}
    for first in range(0, len(queries), QUERIES_AT_ONCE):
        entries = collection.queries[first : first + QUERIES_AT_ONCE]
        excluded = [_excluded(collection, entry.key, filter_known) for entry in entries]
        rows = [i for i, keys in enumerate(excluded) for key in keys if key in row_of]
        columns = [row_of[key] for keys in excluded for key in keys if key in row_of]
        block = queries[first : first + QUERIES_AT_ONCE]
        pairs = torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)
        scores, best = top_documents(block, documents, min(top, len(documents)), *pairs)
        for entry, docs, values in zip(entries, best.tolist(), scores.tolist(), strict=True):
            run[entry.key] = {collection.corpus[i].key: value for i, value in zip(docs, values, strict=True) if i >= 0}
    return run


def reranked_run(collection: Collection, run: Run, folder: ModelFolder, cross_encoder: Path, top: int) -> Run:
    """Re-rank the best `top` documents per query by a cross-encoder; the rest keep their order.

    Raises ConfigError: a side has no text, or `cross_encoder` is no such folder.
    """
    row_of = {entry.key: i for i, entry in enumerate(collection.corpus)}

    def documents(rows: np.ndarray) -> Mapping[str, Column]:
        return entry_columns(folder.schema.doc, [collection.corpus[i] for i in rows.tolist()], folder.tokenizer)

    reranker = Reranker(cross_encoder, Texts(folder.schema, folder.tokenizer, documents))
    ranked: dict[str, dict[str, float]] = {}
    for first in range(0, len(collection.queries), RERANKED_AT_ONCE):
        entries = collection.queries[first : first + RERANKED_AT_ONCE]
        ranking = [sorted(run[entry.key], key=lambda key, of=run[entry.key]: -of[key]) for entry in entries]  # type: ignore[misc]
        best = np.array([[row_of[key] for key in keys[:top]] + [-1] * (top - len(keys)) for keys in ranking])
        scores = reranker.score(entry_columns(folder.schema.query, entries, folder.tokenizer), best)
        for entry, keys, values in zip(entries, ranking, scores, strict=True):
            of_best = dict(zip(keys, values[: len(keys)].tolist(), strict=False))
            least = min(of_best.values(), default=0.0)
            ranked[entry.key] = of_best | {key: least - 1 - n for n, key in enumerate(keys[top:])}
    return ranked


def pretrained_run(
    folder: Path, collection: Collection, *, max_tokens: int = MAX_TOKENS, precision: str = "fp32",
    filter_known: bool = False, top: int = TOP, progress: Progress = no_progress, device: torch.device | str = "cpu",
) -> Run:  # fmt: skip
    """Return the run of a pretrained Hugging Face text encoder: cosine of its vectors, with the folder's prompts.

    Raises ConfigError: `folder` holds no such encoder and tokenizer.
    """
    encoder = PretrainedEncoder(folder, max_tokens, precision, device)

    query_texts = [entry.text for entry in collection.queries]
    document_texts = [entry.text for entry in collection.corpus]
    queries = encoder(query_texts, encoder.prompts.query, "queries encoded", progress)
    documents = encoder(document_texts, encoder.prompts.doc, "documents encoded", progress)
    return vectors_run(collection, queries, documents, filter_known, top)


def bm25_run(collection: Collection, *, filter_known: bool = False, top: int = TOP) -> Run:
    """Return the run of BM25 over the full texts. Raises ConfigError: bm25s or PyStemmer is not installed."""
    index = Bm25([entry.text for entry in collection.corpus])
    known = {query: len(documents) for query, documents in collection.known_positives.items()} if filter_known else {}
    depth = min(len(collection.corpus), top + 1 + max(known.values(), default=0))
    numbers, scores = index.search([entry.text for entry in collection.queries], depth)
    run: dict[str, dict[str, float]] = {}
    for entry, row, row_scores in zip(collection.queries, numbers.tolist(), scores.tolist(), strict=True):
        excluded = _excluded(collection, entry.key, filter_known)
        results = {collection.corpus[i].key: score for i, score in zip(row, row_scores, strict=True) if score > 0}
        run[entry.key] = dict([(key, score) for key, score in results.items() if key not in excluded][:top])
    return run


def _excluded(collection: Collection, query: str, filter_known: bool) -> set[str]:
    """Return the documents to exclude for a query, as in BEIR the one with the query's key, too."""
    return {query, *(collection.known_positives.get(query, {}) if filter_known else ())}


def entry_columns(
    features: Mapping[str, Feature], entries: Sequence[CollectionEntry], tokenizer: TextTokenizer | None
) -> dict[str, Column]:
    """Encode `entries` as feature columns, as in shards and catalogue."""
    batch = SourceBatch("collection", texts_and_metadata(features, entries), np.arange(1, len(entries) + 1))
    # unreadable values become missing; ingestion has reported them
    return columns_of(batch, features, tokenizer, lambda *_, **__: None)
