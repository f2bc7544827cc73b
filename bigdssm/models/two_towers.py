"""Two ordinary encoders as one model of two towers, for `bigdssm.cached_step`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bigdssm.models.dual_encoder import Encoded
from bigdssm.models.encoders.text import Pooling, pool


class TwoTowers(nn.Module):
    """A query encoder and a document encoder, which may be one module.

    An encoder is called with a side's inputs as keyword arguments. It returns vectors [R, D], or, as the models of
    transformers do, an output whose `last_hidden_state` [R, T, D] is pooled by `attention_mask`.
    """

    def __init__(
        self,
        query: nn.Module,
        doc: nn.Module,
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        alpha: float = 20.0,
        learn_alpha: bool = False,
    ) -> None:
        """normalize: scores are cosines; alpha: their scale, learned or constant."""
        super().__init__()
        self.query_encoder, self.doc_encoder = query, doc
        self.pooling, self.normalize = pooling, normalize
        self.log_alpha = nn.Parameter(torch.full((1,), math.log(alpha)), requires_grad=learn_alpha)

    def forward(self, query: Mapping[str, Tensor] | None = None, doc: Mapping[str, Tensor] | None = None) -> Encoded:
        """Encode queries, documents, or both."""
        U = None if query is None else self._vectors(self.query_encoder, query)
        W = None if doc is None else self._vectors(self.doc_encoder, doc)
        return Encoded(U, W, None, self.log_alpha.float().exp())

    def _vectors(self, encoder: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        output = encoder(**inputs)
        vectors = (
            output
            if isinstance(output, Tensor)
            else pool(output.last_hidden_state, inputs["attention_mask"], self.pooling)
        )
        return nn.functional.normalize(vectors, dim=1) if self.normalize else vectors
