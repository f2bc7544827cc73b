"""Target ranks after a scorer re-ranks the top candidates of the inner product.

Shapes: m queries of this rank in a round, `top` re-ranked documents per query.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from bigdssm.dataset.dataset import Dataset
from bigdssm.evaluation.ranks import TIE_RELATIVE
from bigdssm.loader.batch import Collator, Features, to_features
from bigdssm.models import DualEncoder, VectorScorer
from bigdssm.retrieval.embed import DocumentVectors, Encoders, tower_encoders, tower_output
from bigdssm.retrieval.exact_search import SearchRound, exact_search, top_of_round, unpack_keys
from bigdssm.retrieval.pair_scorer import PairScorer

RERANKED_AT_ONCE = 1024  # queries per round, over all ranks


@dataclass(frozen=True)
class Reranking:
    """Re-ranks the `top` best documents; the rest keep their rank."""

    scorer: PairScorer
    top: int

    def ranks(self, before: Tensor, batch: SearchRound, documents: DocumentVectors) -> Tensor:
        """Return the re-ranked target ranks of this rank's queries, float64 [m]; `before`: by inner product.

        All ranks must call it.
        """
        others = unpack_keys(top_of_round(exact_search(documents), batch, self.top - 1))[1].cpu().numpy()
        within = np.flatnonzero((before <= self.top).cpu().numpy())
        rows = batch.rows.take(within)
        scores = torch.from_numpy(
            self.scorer.score(rows.query, np.concatenate([rows.doc_rows[:, None], others[within]], axis=1))
        )
        target = scores[:, :1]
        tolerance = TIE_RELATIVE * (1 + target.abs())
        above, at_least = ((scores[:, 1:] > target + sign * tolerance).sum(1).double() for sign in (1, -1))
        ranks = before.clone()
        ranks[torch.from_numpy(within).to(ranks.device)] = (1 + (above + at_least) / 2).to(ranks.device)
        return ranks


@dataclass(frozen=True)
class ScoredEncoders(Encoders):
    """Both towers as functions from rows to tower outputs [.., D], which `scorer` scores in pairs."""

    scorer: VectorScorer


def encoders_of(
    model: nn.Module,
    dataset: Dataset,
    device: torch.device | str = "cpu",
    gather: Callable[[], Mapping[str, Tensor]] | None = None,
) -> Encoders:
    """Return the Encoders of `model`, a DualEncoder or an engine around one, for any score.

    `gather`, a collective, gathers the weights of an engine that shards them: the scorer runs outside its forward.
    """
    scorer = cast(DualEncoder, getattr(model, "module", model)).scorer
    if not isinstance(scorer, VectorScorer):  # one over features re-ranks their candidates
        return tower_encoders(model, dataset, device)
    scorer = scorer if gather is None else scorer.copy(gather()).to(device)
    collator = Collator(dataset.schema, dataset.catalogue)

    def output(side: str, features: Features) -> Tensor:
        return tower_output(model, side, {name: values.to(device) for name, values in features.items()}).float()

    return ScoredEncoders(
        lambda rows: output("query", collator.query_features(rows.inputs)),
        lambda doc_rows: output("doc", to_features(dataset.schema.doc, dataset.catalogue.columns(doc_rows))),
        scorer,
    )
