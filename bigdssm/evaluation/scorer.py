"""How a model is evaluated whose score is no product of vectors: all that evaluation knows of such a scorer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from bigdssm.batching.collate import Collator
from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.models import DualEncoder, MlpScorer
from bigdssm.retrieval.embed import Encoders, encode, to_device, tower_encoders


@dataclass(frozen=True)
class ScoredEncoders(Encoders):
    """Both towers as functions from rows to the towers' own vectors [.., D], which `scorer` takes in pairs."""

    scorer: MlpScorer


def encoders_of(
    model: nn.Module,
    dataset: Dataset,
    device: torch.device | str = "cpu",
    whole: Callable[[], Mapping[str, Tensor]] | None = None,
) -> Encoders:
    """Return the Encoders of `model`, a DualEncoder or an engine around one, whatever its score is.

    `whole`, a collective, returns all weights of an engine that shards them: a scorer is called outside its forward.
    """
    scorer = cast(DualEncoder, getattr(model, "module", model)).scorer
    if not isinstance(scorer, MlpScorer):  # what reads pairs cannot score every document: it ranks what these find
        return tower_encoders(model, dataset, device)
    scorer = scorer if whole is None else scorer.copy(whole()).to(device)
    collator = Collator(dataset.schema, dataset.catalogue, dataset.pad_token_id)

    def queries(rows: Rows) -> Tensor:
        U = encode(model, query=to_device(collator.query_features(rows.query), device)).U
        assert U is not None
        return U.float()

    def documents(doc_rows: np.ndarray) -> Tensor:
        W = encode(model, doc=to_device(dataset.catalogue.features(doc_rows), device)).W
        assert W is not None
        return W.float()

    return ScoredEncoders(queries, documents, scorer)
