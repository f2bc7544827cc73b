"""The fine-tuning losses by name: softmax, PairCE, triplet and sigmoid over listed negatives, in-batch ones or both.

out = ranking_loss("pair_ce", U, W, positive, alpha=alpha, negatives=negatives, in_batch=True, doc_ids=doc_ids)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bigdssm.losses.engine import contrastive_loss
from bigdssm.losses.output import LossOutput
from bigdssm.losses.terms import TERMS, find_term

RANKING_NAMES = tuple(TERMS)


def ranking_loss(
    name: str, U: Tensor, W: Tensor, positive: Tensor | None = None, *, in_batch: bool = False, margin: float = 0.2,
    **arguments: Any,
) -> LossOutput:  # fmt: skip
    """Return the loss of the term `name`; a collective. in_batch: also every other query's document is a negative.

    margin: of triplet. See `terms` for the formulas, and `contrastive_loss` for the arguments.
    """
    term = find_term(name, {"margin": margin})
    return contrastive_loss(term, U, W, positive, columns="in_batch" if in_batch else "none", **arguments)
