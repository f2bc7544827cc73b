"""The rank of each query's document where a scorer ranks the best that the product of vectors has found anew.

Shapes: m queries of this rank in a round, `top` documents re-ranked of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bigdssm.evaluation.ranks import TIE_RELATIVE
from bigdssm.retrieval.embed import Documents
from bigdssm.retrieval.pair_scorer import PairScorer
from bigdssm.retrieval.rounds import Round
from bigdssm.retrieval.top import exact_search, opened, top_of_round

RERANKED_AT_ONCE = 1024  # queries of all ranks in a round


@dataclass(frozen=True)
class Reranking:
    """Ranks the `top` best documents anew; those behind stay where they are."""

    scorer: PairScorer
    top: int

    def ranks(self, before: Tensor, asked: Round, documents: Documents) -> Tensor:
        """Return float64 [m]: the ranks of their documents for this rank's queries; `before` by the product.

        A collective.
        """
        others = opened(top_of_round(exact_search(documents), asked, self.top - 1))[1].cpu().numpy()
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
