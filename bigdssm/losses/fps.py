"""The Full Product Softmax loss: every query against every document of the global batch, on any number of ranks.

out = fps_loss(U, W, positive, alpha=alpha, query_ids=query_ids, doc_ids=doc_ids)
out.loss.backward()
"""

from __future__ import annotations

from torch import Tensor

from bigdssm.distributed import Group
from bigdssm.losses.engine import Direction, contrastive_loss
from bigdssm.losses.output import LossOutput
from bigdssm.losses.terms import Softmax


def fps_loss(
    U: Tensor,
    W: Tensor,
    positive: Tensor | None = None,
    *,
    alpha: Tensor | float,
    beta: Tensor | None = None,
    neg_bias: Tensor | None = None,
    weight: Tensor | None = None,
    query_ids: Tensor | None = None,
    doc_ids: Tensor | None = None,
    known: Tensor | None = None,
    direction: Direction = "q2d",
    tile: int | None = None,
    group: Group | None = None,
) -> LossOutput:
    """Return the softmax loss over all documents of all ranks; a collective. See `contrastive_loss` for the arguments.

    Source: Yi et al. 2019 (in-batch softmax); the two-direction form is that of Radford et al. 2021, eq. in figure 3.
    """
    return contrastive_loss(
        Softmax(), U, W, positive, alpha=alpha, beta=beta, neg_bias=neg_bias, weight=weight, query_ids=query_ids,
        doc_ids=doc_ids, known=known, direction=direction, tile=tile, group=group,
    )  # fmt: skip
