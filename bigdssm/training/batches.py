"""Batches of a stage: rows of the stream with hard and drawn negatives and known positives."""

from collections.abc import Collection, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.config import Config, StageConfig
from bigdssm.dataset.catalogue import candidate_rows
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.negatives import NegativeDocuments
from bigdssm.dataset.rows import Rows
from bigdssm.features import PADDING, histories_of
from bigdssm.features.base import OUT_OF_VOCABULARY
from bigdssm.features.ragged import Ragged
from bigdssm.loader.batch import Batch, Collator, as_tensor, uploaded_batches
from bigdssm.loader.plain_stream import PlainStream
from bigdssm.loader.stream import PairStream, RowStream
from bigdssm.losses import sample_uniform
from bigdssm.losses.declarations import BatchDistillation, ListDistillation
from bigdssm.models.embedding_tables import table_name, tables_of_features
from bigdssm.retrieval.embed import DocumentVectors
from bigdssm.retrieval.hard_negatives import HardNegatives, SampledNegatives, UniformNegatives
from bigdssm.retrieval.shards import Share
from bigdssm.retrieval.teacher_vectors import TeacherVectors
from bigdssm.retrieval.vectors import CodedVectors
from bigdssm.training.objective import catalogue_share
from bigdssm.utils.hashing import derive_key, hash64, mix64

# keys that separate these random draws from the stream's
_UNIFORM = 0x756E69666F726D
_DROPPED = 0x64726F70706564


@dataclass(frozen=True)
class FixedDocuments:
    """The index vectors of all documents, by catalogue row, and the checksum of their model.

    A stage trains the query tower alone against them. The trained model has their model's document tower, so that its
    queries can be searched in existing indexes.
    """

    vectors: CodedVectors
    checksum: str

    def share(self, device: torch.device, withdrawn: np.ndarray) -> DocumentVectors:
        """Return this rank's share of the vectors, as `encode_catalogue` does."""
        first, last = Share(distributed.rank(), distributed.world_size()).of(len(self.vectors))
        return DocumentVectors(torch.from_numpy(np.array(self.vectors[first:last])).to(device), first, withdrawn)


class BatchBuilder:
    """Builds a rank's batches; a batch depends only on the rows and their step.

    Loader processes receive a copy, which must not reference the trainer.
    """

    def __init__(
        self,
        stream: RowStream,
        stage: StageConfig,
        seed: int = 0,
        hard_negatives: HardNegatives | UniformNegatives | None = None,
        documents: FixedDocuments | None = None,
        tables: Collection[str] = (),
        id_dropout: float = 0.0,
    ) -> None:
        """Sample negatives from `hard_negatives`, which may be replaced between calls of `read_batches`.

        documents: vectors that take the place of documents' features. tables: names of tables sharded by rows. Of their
        ids, and of those of the items of histories, the share `id_dropout` is out of vocabulary in each step.
        """
        dataset = stream.dataset
        self.hard_negatives, self._documents = hard_negatives, documents
        self._dataset, self._config, self._seed = dataset, stage.negatives, seed
        self._is_position_biased = stage.loss.position_bias > 0
        self._distils = isinstance(stage.distillation, ListDistillation)
        self._teacher_margin, self._steps_per_epoch = stage.negatives.mining.teacher_margin, stream.steps_per_epoch
        teacher = stage.distillation.teacher if isinstance(stage.distillation, BatchDistillation) else None
        self._teacher = None if teacher is None else TeacherVectors(Path(teacher))
        self._rank, self._world_size = stream.rank, stream.world_size
        catalogue = None if stream.inline else dataset.catalogue
        self._collator = Collator(dataset.schema, catalogue, reads_documents=documents is None)
        self._tabled = tables_of_features(dataset.schema, tables) if tables else []
        self._dropped, self._id_dropout = [], id_dropout
        # of the rows' documents alone, there is nothing to draw from
        negatives = NegativeDocuments(0) if catalogue is None else NegativeDocuments.of(dataset, id_dropout)
        self._negative_documents = negatives
        self.undrawn = negatives.undrawn
        if id_dropout:
            items = {str(history.of) for history in histories_of(dataset.schema.query).values()}
            of_items = {table_name("doc", name) for name in items}
            self._dropped = tables_of_features(dataset.schema, {*tables, *of_items})
        # read before loader processes start, which then share their pages
        self._since = negatives.since
        self._doc_ids = dataset.catalogue.doc_ids if stage.negatives.mask in ("user", "past") else None

    def __call__(self, rows: Rows) -> Batch:
        """Build the batch of a step, in host memory."""
        negatives, scores, shown = self.negatives(rows)
        if self._config.columns == "catalogue":
            share = catalogue_share(self._dataset.catalogue.num_docs, self._rank, self._world_size)
            share = np.setdiff1d(share, self.undrawn, assume_unique=True)
            batch = self._collator(rows, negatives=negatives, extra_docs=share)
        else:
            batch = self._collator(rows, negatives=negatives, extra_docs=self.drawn(rows.step))
        given = self._config.columns == "batch"
        if len(self._negative_documents.unknown if given else self.undrawn):  # on all ranks, whatever their documents
            allowed = self._negative_documents.allow(batch.doc_rows.numpy(), given=given)
            batch = replace(batch, no_negative=torch.from_numpy(~allowed))
        if scores is not None:
            batch = replace(batch, teacher=torch.from_numpy(scores))
        if shown is not None and self._is_position_biased:
            batch = replace(batch, shown=torch.from_numpy(shown))
        if self._documents is not None:
            batch = replace(batch, doc_vectors=as_tensor(self._documents.vectors[batch.doc_rows.numpy()]))
        if self._dropped:
            batch = drop_ids(batch, self._dropped, derive_key(self._seed, _DROPPED, rows.step), self._id_dropout)
        if self._tabled:
            batch = with_positions(batch, self._tabled)
        if self._teacher is not None:
            vectors = self._teacher.queries(rows.query_keys), self._teacher.documents[batch.doc_rows.numpy()]
            batch = replace(batch, teacher_query=as_tensor(vectors[0]), teacher_doc=as_tensor(vectors[1]))
        if self._doc_ids is not None:
            batch = replace(batch, known_positives=known_pairs(rows, self._config.mask, self._doc_ids, self._dataset))
        elif self._dataset.schema.siamese:
            batch = replace(batch, known_positives=siamese_known_pairs(batch, self._config.mask))
        if self._since is not None:
            since = torch.from_numpy(self._since[batch.doc_rows.numpy()])
            batch = replace(batch, time=torch.from_numpy(self._dataset.request_times(rows)), since=since)
        if isinstance(condition := self._dataset.rules.exclude_seen, str):
            is_known = self._dataset.matching_targets(rows, condition, "data.exclude_seen")
            batch = replace(batch, is_known=torch.from_numpy(is_known))
        return batch

    def negatives(self, rows: Rows) -> SampledNegatives | tuple[None, None, None]:
        """Return the hard negatives of each query, and the teacher's scores if they are distilled."""
        if self.hard_negatives is None:
            return None, None, None
        epoch, k = rows.step // self._steps_per_epoch, self._config.hard
        if isinstance(self.hard_negatives, UniformNegatives):
            times = None if self._since is None else self._dataset.request_times(rows)
            return self.hard_negatives.sample(rows, epoch, self._seed, k, times)
        chosen = self.hard_negatives.sample(rows, epoch, self._seed, k, self._teacher_margin)
        return chosen if self._distils else chosen._replace(teacher=None)

    def drawn(self, step: int) -> np.ndarray | None:
        """Return this rank's share of the documents drawn in a step, which do not depend on the number of ranks."""
        if not self._config.uniform:
            return None
        generator = torch.Generator().manual_seed(derive_key(self._seed, _UNIFORM, step))
        number = self._dataset.catalogue.num_docs - len(self.undrawn)
        numbers = sample_uniform(self._config.uniform, number, generator).numpy()
        return candidate_rows(numbers[self._rank :: self._world_size], self.undrawn)


def drop_ids(batch: Batch, dropped: Iterable[tuple[str, str, str]], key: int, share: float) -> Batch:
    """Return a batch with a share of the ids out of vocabulary, a function of key, row and position in the row."""
    sides = {"query": dict(batch.query), "doc": dict(batch.doc)}
    keys = {"query": batch.row_ids.numpy(), "doc": batch.doc_ids.numpy()}
    for side, name, _ in dropped:
        features = sides[side]
        if name not in features:
            continue
        codes = features[name].numpy()
        rows = mix64(keys[side].astype(np.uint64), key ^ hash64(f"{side}.{name}"))
        cells = rows.reshape(-1, *[1] * (codes.ndim - 1)) + np.arange(codes[:1].size, dtype=np.uint64)
        is_dropped = (mix64(cells.reshape(codes.shape), key) >> np.uint64(11)) * 2.0**-53 < share
        features[name] = torch.from_numpy(np.where(is_dropped & (codes != PADDING), OUT_OF_VOCABULARY, codes))
    return replace(batch, query=sides["query"], doc=sides["doc"])


def with_positions(batch: Batch, tabled: Iterable[tuple[str, str, str]]) -> Batch:
    """Return a batch whose features of sharded tables hold positions among the table's distinct rows, 0 for padding.

    tabled: (side, feature, table).
    """
    sides = {"query": dict(batch.query), "doc": dict(batch.doc)}
    read = [(side, name, table) for side, name, table in tabled if name in sides[side]]
    rows: dict[str, np.ndarray] = {}
    for table in dict.fromkeys(table for _, _, table in read):
        feature_codes = [sides[side][name].numpy().ravel() for side, name, of in read if of == table]
        distinct = np.unique(np.concatenate(feature_codes))
        rows[table] = distinct[distinct != PADDING]
    for side, name, table in read:
        codes = sides[side][name].numpy()
        positions = np.where(codes == PADDING, PADDING, np.searchsorted(rows[table], codes) + 1)
        sides[side][name] = torch.from_numpy(positions)
    return replace(batch, query=sides["query"], doc=sides["doc"], table_rows=rows)


def read_batches(
    stream: RowStream, make: BatchBuilder, device: torch.device, num: int | None = None
) -> Generator[Batch]:
    """Yield the stream's next `num` batches (None: endlessly) on the rank's device, see `uploaded_batches`.

    A rank that cannot read yields empty batches until the ranks agree to stop (`RowStream.counts`).
    """
    with closing(stream.map_steps(make, num)) as made:
        yield from uploaded_batches(made, device)


def row_stream(
    config: Config,
    stage: StageConfig,
    dataset: Dataset,
    rank: int,
    world_size: int,
    num_workers: int = 0,
    quarantine: Path | None = None,
) -> RowStream:
    """Return the row stream of a rank in a stage, at the first step; bad rows are written to `quarantine`."""
    data = config.data
    shared: dict[str, Any] = {
        "rows_global": stage.rows_global, "seed": config.run.seed, "rank": rank, "world_size": world_size,
        "num_workers": num_workers, "max_bad_fraction": data.max_bad_fraction, "quarantine": quarantine,
    }  # fmt: skip
    if data.webdataset is not None:
        return PlainStream(dataset, data.webdataset, **shared)
    return PairStream(dataset, lanes=data.lanes, **shared)


def known_pairs(rows: Rows, mask: str, doc_ids: np.ndarray, dataset: Dataset) -> Tensor:
    """Return int64 [p, 2] of the documents that `mask` adds to those no query has as negatives, for a Batch.

    past: (query index, doc id) of the events before each query that serving excludes. user: (query id, doc id) of the
    events before the latest position of each query id, which include those before earlier positions; with a condition
    in data.exclude_seen those that match it.
    """
    exclude_seen = dataset.rules.exclude_seen
    if mask == "past":
        return history_pairs(np.arange(rows.num_queries), dataset.excluded(rows, exclude_seen), doc_ids)
    assert rows.position is not None
    order = np.lexsort((rows.position, rows.query_ids))
    is_latest = np.append(np.diff(rows.query_ids[order]) != 0, True)[: len(order)]
    latest = order[is_latest]
    before = dataset.excluded(rows, exclude_seen, latest, visits=False)
    return history_pairs(rows.query_ids[latest], before, doc_ids)


def siamese_known_pairs(batch: Batch, mask: str) -> Tensor:
    """Return the known positives int64 [p, 2] of a siamese Batch: each query's own document.

    mask batch: (query id, doc id), and (b, a) for each positive pair (a, b). mask none: (query index, doc id).
    """
    queries = batch.query_ids
    if mask == "none":
        return torch.stack([torch.arange(len(queries)), queries], 1)
    relevant = batch.relevance > 0
    reverse = torch.stack([batch.doc_ids[batch.positive[relevant]], queries[relevant]], 1)
    return torch.cat([torch.stack([queries, queries], 1), reverse])


def history_pairs(queries: np.ndarray, before: Ragged, doc_ids: np.ndarray) -> Tensor:
    """Return int64 [p, 2]: each query (id or index, int64 [m]) with the doc id of each item of its history.

    before: catalogue rows of each query's items; rows outside the catalogue are skipped. doc_ids: of all documents.
    """
    repeated, docs = np.repeat(queries, before.lengths), before.values
    valid = (docs >= 0) & (docs < len(doc_ids))
    if not valid.all():
        repeated, docs = repeated[valid], docs[valid]
    return torch.from_numpy(np.stack([repeated, doc_ids[docs]], axis=1))
