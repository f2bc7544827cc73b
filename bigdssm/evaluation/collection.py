"""Runs of a BEIR collection: what a model, a pretrained encoder as it is, and BM25 retrieve for its queries.

Shapes: m queries, N documents, D+1 the width of index vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from bigdssm.checkpoints.model_folder import ModelFolder
from bigdssm.dataset.schema import Schema
from bigdssm.errors import ConfigError, DivergedError
from bigdssm.evaluation.bm25 import Bm25
from bigdssm.evaluation.pretrained import MAX_TOKENS, PretrainedEncoder
from bigdssm.evaluation.trec import Run
from bigdssm.features import Feature, TextTokenizer, histories_of
from bigdssm.features.canonical import columns_of
from bigdssm.features.columns import SourceBatch
from bigdssm.features.ragged import Column
from bigdssm.ingest.sources.beir import Collection, CollectionEntry, texts_and_metadata
from bigdssm.models import DualEncoder
from bigdssm.models.encoders import TextEncoder
from bigdssm.retrieval.embed import document_vectors, encode_columns, query_vectors
from bigdssm.retrieval.exact_search import top_documents
from bigdssm.retrieval.pair_scorer import PairScorer
from bigdssm.utils.log import Progress, no_progress

TOP = 100  # documents retrieved for a query
QUERIES_AT_ONCE, RERANKED_AT_ONCE = 512, 128


def model_run(
    model: DualEncoder, schema: Schema, tokenizer_dir: Path | None, collection: Collection, *,
    filter_known: bool = False, top: int = TOP, progress: Progress = no_progress,
) -> Run:  # fmt: skip
    """Return the run of a two-tower model over the whole corpus.

    filter_known leaves out what other splits call relevant to a query. Raises as `model_vectors` and `vectors_run`.
    """
    queries, documents = model_vectors(model, schema, tokenizer_dir, collection, progress)
    return vectors_run(collection, queries, documents, filter_known, top)


def model_vectors(
    model: DualEncoder, schema: Schema, tokenizer_dir: Path | None, collection: Collection,
    progress: Progress = no_progress,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the index vectors of the queries [m, D+1] and of the corpus [N, D+1].

    Raises ConfigError where queries need a history, which a collection cannot give.
    """
    if histories := list(histories_of(schema.query)):
        raise ConfigError(f"queries have the history {histories[0]!r}, which a BEIR collection cannot give")
    tokenizer = None if tokenizer_dir is None else TextTokenizer(tokenizer_dir)
    pad = _pad_token(model)

    def encoded(side: str, entries: Sequence[CollectionEntry], encode: Callable[..., Tensor]) -> Tensor:
        features: Mapping[str, Feature] = getattr(schema, side)
        columns = entry_columns(features, entries, tokenizer)
        what = "queries encoded" if side == "query" else "documents encoded"
        return encode_columns(features, columns, pad, partial(encode, model), what, progress)

    queries = encoded("query", collection.queries, query_vectors)
    return queries, encoded("doc", collection.corpus, document_vectors)


def vectors_run(
    collection: Collection, queries: Tensor, documents: Tensor, filter_known: bool = False, top: int = TOP
) -> Run:
    """Return the run of vectors by inner product. Raises DivergedError where one is not finite."""
    if not bool(queries.isfinite().all() and documents.isfinite().all()):
        raise DivergedError("vectors of the collection hold NaN or inf")
    place = {entry.key: i for i, entry in enumerate(collection.corpus)}
    run: dict[str, dict[str, float]] = {}
    for first in range(0, len(queries), QUERIES_AT_ONCE):
        entries = collection.queries[first : first + QUERIES_AT_ONCE]
        known = [_left_out(collection, entry.key, filter_known) for entry in entries]
        rows = [i for i, keys in enumerate(known) for key in keys if key in place]
        columns = [place[key] for keys in known for key in keys if key in place]
        block = queries[first : first + QUERIES_AT_ONCE]
        excluded = torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)
        scores, best = top_documents(block, documents, min(top, len(documents)), *excluded)
        for entry, found, values in zip(entries, best.tolist(), scores.tolist(), strict=True):
            run[entry.key] = {collection.corpus[i].key: value for i, value in zip(found, values, strict=True) if i >= 0}
    return run


def reranked_run(collection: Collection, run: Run, folder: ModelFolder, top: int) -> Run:
    """Return a run whose best `top` documents of each query the model's scorer ranks anew; the others follow as before.

    Raises CheckpointError where the model has no scorer.
    """
    tokenizer = None if folder.tokenizer_dir is None else TextTokenizer(folder.tokenizer_dir)
    place = {entry.key: i for i, entry in enumerate(collection.corpus)}

    def documents(rows: np.ndarray) -> Mapping[str, Column]:
        return entry_columns(folder.schema.doc, [collection.corpus[i] for i in rows.tolist()], tokenizer)

    scorer = PairScorer(folder.model, folder.schema, folder.pad_token_id, documents)
    scorer.require_scorer()
    ranked: dict[str, dict[str, float]] = {}
    for first in range(0, len(collection.queries), RERANKED_AT_ONCE):
        entries = collection.queries[first : first + RERANKED_AT_ONCE]
        found = [sorted(run[entry.key], key=lambda key, of=run[entry.key]: -of[key]) for entry in entries]  # type: ignore[misc]
        best = np.array([[place[key] for key in keys[:top]] + [-1] * (top - len(keys)) for keys in found])
        scores = scorer.score(entry_columns(folder.schema.query, entries, tokenizer), best)
        for entry, keys, values in zip(entries, found, scores, strict=True):
            of_best = dict(zip(keys, values[: len(keys)].tolist(), strict=False))
            least = min(of_best.values(), default=0.0)
            ranked[entry.key] = of_best | {key: least - 1 - n for n, key in enumerate(keys[top:])}
    return ranked


def pretrained_run(
    folder: Path, collection: Collection, *, max_tokens: int = MAX_TOKENS, precision: str = "fp32",
    filter_known: bool = False, top: int = TOP, progress: Progress = no_progress,
) -> Run:  # fmt: skip
    """Return the run of a Hugging Face text encoder as it is: the cosine of mean-pooled vectors.

    Raises ConfigError where `folder` holds no such encoder and tokenizer.
    """
    encoder = PretrainedEncoder(folder, max_tokens, precision)

    def encoded(entries: Sequence[CollectionEntry], what: str) -> Tensor:
        return encoder([entry.text for entry in entries], what, progress)

    queries = encoded(collection.queries, "queries encoded")
    return vectors_run(collection, queries, encoded(collection.corpus, "documents encoded"), filter_known, top)


def bm25_run(collection: Collection, *, filter_known: bool = False, top: int = TOP) -> Run:
    """Return the run of BM25 over the whole texts.

    Raises ConfigError where bm25s or PyStemmer is not installed.
    """
    index = Bm25([entry.text for entry in collection.corpus])
    known = {query: len(documents) for query, documents in collection.known_positives.items()} if filter_known else {}
    wanted = min(len(collection.corpus), top + 1 + max(known.values(), default=0))
    places, scores = index.best([entry.text for entry in collection.queries], wanted)
    run: dict[str, dict[str, float]] = {}
    for entry, row, row_scores in zip(collection.queries, places.tolist(), scores.tolist(), strict=True):
        left_out = _left_out(collection, entry.key, filter_known)
        found = {collection.corpus[i].key: score for i, score in zip(row, row_scores, strict=True) if score > 0}
        run[entry.key] = dict([(key, score) for key, score in found.items() if key not in left_out][:top])
    return run


def _left_out(collection: Collection, query: str, filter_known: bool) -> set[str]:
    """Return the documents that are no answer to a query: as in BEIR, one of the same key is the query itself."""
    return {query, *(collection.known_positives.get(query, {}) if filter_known else ())}


def entry_columns(
    features: Mapping[str, Feature], entries: Sequence[CollectionEntry], tokenizer: TextTokenizer | None
) -> dict[str, Column]:
    """Return the encoded columns of `entries` by feature name, as shards and catalogue hold them."""
    batch = SourceBatch("collection", texts_and_metadata(features, entries), np.arange(1, len(entries) + 1))
    return columns_of(batch, features, tokenizer, _ignore)


def _pad_token(model: DualEncoder) -> int:
    """Return the id that the model's text encoders take for padding, 0 where it has none."""
    ids = [cast(TextEncoder, encoder).pad_token_id for encoder in model.text.values()]
    return ids[0] if ids else 0


def _ignore(file: str, row: int, reason: str, left_out: bool = True) -> None:
    """What cannot be read is taken as missing; making the dataset has reported it."""
