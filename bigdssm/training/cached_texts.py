"""Text vectors and contents of items of the whole catalogue, computed every few steps.

All columns of a step have the text vectors of the last refresh, positives and negatives alike: newer ones of the
positives alone would tell them from the negatives, and a model learns this in place of the documents. Positives are
encoded in the step, for the gradient of the text encoder. MLP and tables are those of the step.

Shapes: n documents of this rank's batch, N of the catalogue, D of vectors, H total width of the text vectors.
"""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from bigdssm import distributed
from bigdssm.dataset.dataset import Dataset
from bigdssm.features import texts_of
from bigdssm.loader.batch import Batch
from bigdssm.losses.ids import occurrences
from bigdssm.models import DualEncoder, Values
from bigdssm.models.dual_encoder import CACHED
from bigdssm.retrieval.embed import encode, encode_whole_catalogue, item_contents
from bigdssm.training.engine import Engine, device
from bigdssm.utils import timing

_NAME, _CONTENTS = "catalogue_texts", "item_contents"  # in checkpoints


class CachedTexts:
    """Text vectors of the catalogue. All ranks must call each of the methods."""

    def __init__(self, engine: Engine, dataset: Dataset, every_steps: int) -> None:
        self._engine, self._dataset, self._every = engine, dataset, every_steps
        self._table: Tensor | None = None  # [N, H]

    def complete(self, batch: Batch) -> Batch:
        """Add the text vectors to the documents of a step, which computes them first if it is due.

        Each document of the catalogue is one column on all ranks: a positive on the first rank that has it, any other
        one on the rank of its share.
        """
        assert batch.stale is not None
        if self._table is None or batch.step % self._every == 0:
            with timing.span("texts of the catalogue"):
                self._table = self._encode()
        rank, world_size = distributed.rank(), distributed.world_size()
        fresh, stale = batch.doc_rows.split([batch.num_fresh, len(batch.doc_rows) - batch.num_fresh])
        widths = cast(DualEncoder, self._engine.module).doc_tower.text_widths
        doc, without = (dict(zip(widths, self._table[rows].split(list(widths.values()), dim=1), strict=True))
                        for rows in (fresh, stale))  # fmt: skip
        # rank of a document's column; that of its share if it is no positive on any rank
        owner = torch.full((len(self._table),), world_size, device=stale.device)
        owner[fresh] = rank
        owner = distributed.all_reduce(owner, "min")
        columns = torch.cat([owner[fresh] == rank, owner[stale] == world_size])
        if batch.undrawn is not None:
            columns &= ~batch.undrawn
        return replace(
            batch, doc={**batch.doc, **{CACHED + name: vectors for name, vectors in doc.items()}},
            stale={**batch.stale, **without}, columns=columns,
            counts=occurrences(batch.positive, len(columns)) + columns,
        )  # fmt: skip

    def _encode(self) -> Tensor:
        """Encode the texts of all documents in evaluation mode, without gradients."""

        def vectors(features: dict[str, Values]) -> Tensor:
            encoded = encode(self._engine.deepspeed, doc_texts=features).W
            assert encoded is not None
            return encoded

        texts = texts_of(self._dataset.schema.doc)
        return encode_whole_catalogue(self._engine.deepspeed, self._dataset, texts, vectors, device())

    def state_dict(self) -> dict[str, Tensor]:
        """Return the text vectors, equal on every rank; nothing before the first step."""
        return {} if self._table is None else {_NAME: self._table}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the text vectors of a checkpoint, of any number of ranks."""
        if _NAME in state:
            self._table = state[_NAME].to(device())


class ItemContents:
    """Contents of all items, which histories read. All ranks must call each of the methods."""

    def __init__(self, engine: Engine, dataset: Dataset, every_steps: int) -> None:
        self._engine, self._dataset, self._every = engine, dataset, every_steps
        self._contents: Tensor | None = None  # [1 + N, D]

    def use(self, step: int) -> None:
        """Set the contents of a step in the model, which validations replace; compute them first if it is due."""
        if self._contents is None or step % self._every == 0:
            with timing.span("contents of items"):
                self._contents = item_contents(self._engine.deepspeed, self._dataset, device())
        cast(DualEncoder, self._engine.module).set_contents(self._contents)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the contents, equal on every rank; nothing before the first step."""
        return {} if self._contents is None else {_CONTENTS: self._contents}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the contents of a checkpoint, of any number of ranks."""
        if _CONTENTS in state:
            self._contents = state[_CONTENTS].to(device())
