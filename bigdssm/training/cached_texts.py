"""Outputs of the text encoder for the whole catalogue, computed every few steps.

The positives of a step are encoded in the step, with gradient. All other documents are columns with the text vectors of
an earlier step, and with the current MLP and tables.

Shapes: n documents of this rank's batch, N of the catalogue, S of the rank's share, H total width of the text vectors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.dataset.dataset import Dataset
from bigdssm.features import texts_of
from bigdssm.loader.batch import Batch, paddings, to_features
from bigdssm.loader.encode import encode_in_chunks
from bigdssm.losses.ids import occurrences
from bigdssm.models import DualEncoder, Values
from bigdssm.retrieval.embed import ROWS_AT_ONCE, encode
from bigdssm.training.engine import Engine, device
from bigdssm.training.objective import catalogue_share
from bigdssm.utils import timing

_NAME = "catalogue_texts"  # in checkpoints


class CachedTexts:
    """Text vectors of this rank's share of the catalogue. All ranks must call each of the methods."""

    def __init__(self, engine: Engine, dataset: Dataset, every_steps: int) -> None:
        self._engine, self._dataset, self._every = engine, dataset, every_steps
        self._rank, self._world_size = distributed.rank(), distributed.world_size()
        self._table: Tensor | None = None  # [S, H]

    def complete(self, batch: Batch) -> Batch:
        """Add the text vectors to the stale documents of a step, which computes them first if it is due.

        Each document of the catalogue is one column on all ranks: a positive on the first rank that has it, any other
        one on the rank of its share.
        """
        assert batch.stale is not None
        if self._table is None or batch.step % self._every == 0:
            with timing.span("texts of the catalogue"):
                self._table = self._encode()
        fresh, stale = batch.doc_rows.split([batch.num_fresh, len(batch.doc_rows) - batch.num_fresh])
        widths = cast(DualEncoder, self._engine.module).doc_tower.text_widths
        parts = self._table[stale // self._world_size].split(list(widths.values()), dim=1)
        # rank of a document's column; of its share, if it is no positive on any rank
        owner = torch.full((self._dataset.catalogue.num_docs,), self._world_size, device=stale.device)
        owner[fresh] = self._rank
        owner = distributed.all_reduce(owner, "min")
        columns = torch.cat([owner[fresh] == self._rank, owner[stale] == self._world_size])
        if batch.undrawn is not None:
            columns &= ~batch.undrawn
        counts = occurrences(batch.positive, len(columns)) + columns
        return replace(batch, stale={**batch.stale, **dict(zip(widths, parts, strict=True))}, columns=columns,
                       counts=counts)  # fmt: skip

    def _encode(self) -> Tensor:
        """Encode the texts of this rank's share in evaluation mode, without gradients."""
        texts, catalogue = texts_of(self._dataset.schema.doc), self._dataset.catalogue
        share = catalogue_share(catalogue.num_docs, self._rank, self._world_size)
        packed = cast(DualEncoder, self._engine.module).accepts_packed(training=False).doc

        def vectors(features: dict[str, Values]) -> Tensor:
            encoded = encode(self._engine.deepspeed, doc_texts=features).W
            assert encoded is not None
            return encoded

        parts = []
        for first in range(0, -(-catalogue.num_docs // self._world_size), ROWS_AT_ONCE):
            rows = share[first : first + ROWS_AT_ONCE]
            features = to_features(texts, {name: catalogue.column(name, rows) for name in texts})
            parts.append(encode_in_chunks(features, paddings(texts), len(rows), vectors, device(), packed))
        return torch.cat(parts)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the text vectors of all documents [N, H], equal on every rank; nothing before the first step."""
        if self._table is None:
            return {}
        longest, num_docs = -(-self._dataset.catalogue.num_docs // self._world_size), self._dataset.catalogue.num_docs
        gathered = distributed.all_gather_padded(self._table, longest).wait()
        by_rank = gathered.view(self._world_size, -1, gathered.shape[1])
        return {_NAME: by_rank.transpose(0, 1).reshape(-1, gathered.shape[1])[:num_docs]}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the text vectors of a checkpoint, of any number of ranks."""
        if _NAME in state:
            self._table = state[_NAME][self._rank :: self._world_size].to(device())
