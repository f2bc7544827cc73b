"""The rank of each query's document where a scorer ranks the best that the product of vectors has found anew.

Shapes: m queries of this rank in a round, `top` documents re-ranked of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from bigdssm.dataset.dataset import Dataset
from bigdssm.dataset.rows import Rows
from bigdssm.evaluation.ranks import TIE_RELATIVE
from bigdssm.loader.collate import Collator
from bigdssm.models import DualEncoder, MlpScorer
from bigdssm.retrieval.embed import DocumentVectors, Encoders, encode, to_device, tower_encoders
from bigdssm.retrieval.exact_search import SearchRound, exact_search, top_of_round, unpack_keys
from bigdssm.retrieval.pair_scorer import PairScorer

RERANKED_AT_ONCE = 1024  # queries of all ranks in a round


@dataclass(frozen=True)
class Reranking:
    """Ranks the `top` best documents anew; those behind stay where they are."""

    scorer: PairScorer
    top: int

    def ranks(self, before: Tensor, asked: SearchRound, documents: DocumentVectors) -> Tensor:
        """Return float64 [m]: the ranks of their documents for this rank's queries; `before` by the product.

        A collective.
        """
        others = unpack_keys(top_of_round(exact_search(documents), asked, self.top - 1))[1].cpu().numpy()
        among = np.flatnonzero((before <= self.top).cpu().numpy())
        rows = asked.rows.take(among)
        scores = torch.from_numpy(
            self.scorer.score(rows.query, np.concatenate([rows.doc_rows[:, None], others[among]], axis=1))
        )
        own = scores[:, :1]
        tolerance = TIE_RELATIVE * (1 + own.abs())
        above, at_least = ((scores[:, 1:] > own + sign * tolerance).sum(1).double() for sign in (1, -1))
        ranks = before.clone()
        ranks[torch.from_numpy(among).to(ranks.device)] = (1 + (above + at_least) / 2).to(ranks.device)
        return ranks


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
