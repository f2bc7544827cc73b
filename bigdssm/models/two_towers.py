"""Two ordinary encoders as one model of two towers, for `bigdssm.cached_step`."""

import math
from collections.abc import Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn

from bigdssm.errors import ConfigError
from bigdssm.models.dual_encoder import Encoded
from bigdssm.models.encoders.text import Pooling, pool


class TwoTowers(nn.Module):
    """A query encoder and a document encoder, which may be one module.

    An encoder is called with a side's inputs as keyword arguments. It returns vectors [R, D], or hidden states
    [R, T, D], which are pooled by `attention_mask`: a tensor, the first of a tuple, or, as the models of transformers
    do, an output or dict with `last_hidden_state`. `sentence_embedding` of a dict are vectors.
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
        """normalize: scores are cosines; alpha: their scale, learned or constant. Raises ConfigError."""
        super().__init__()
        if pooling not in get_args(Pooling) or not 0 < alpha < math.inf:
            raise ConfigError(
                f"TwoTowers: got pooling={pooling!r}, alpha={alpha}, needs pooling one of "
                f"{', '.join(get_args(Pooling))}, and alpha above 0; an encoder of your own may pool in another way"
            )
        self.query_encoder, self.doc_encoder = query, doc
        self.pooling, self.normalize = pooling, normalize
        self.log_alpha = nn.Parameter(torch.full((1,), math.log(alpha)), requires_grad=learn_alpha)

    def forward(self, query: Mapping[str, Tensor] | None = None, doc: Mapping[str, Tensor] | None = None) -> Encoded:
        """Encode queries, documents, or both. Raises ConfigError: outputs of encoders that are no vectors."""
        U = None if query is None else self._vectors("query", self.query_encoder, query)
        W = None if doc is None else self._vectors("doc", self.doc_encoder, doc)
        return Encoded(U, W, None, self.log_alpha.float().exp())

    def _vectors(self, side: str, encoder: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        output = encoder(**inputs)
        if hasattr(output, "last_hidden_state"):
            output = output.last_hidden_state
        elif isinstance(output, Mapping):
            output = output.get("last_hidden_state", output.get("sentence_embedding", output))
        elif isinstance(output, tuple) and output:
            output = output[0]
        if isinstance(output, Tensor) and output.ndim == 3:
            mask = inputs.get("attention_mask")
            if mask is None or mask.shape != output.shape[:2]:
                got = None if mask is None else list(mask.shape)
                raise ConfigError(f"attention_mask of {side}: got {got}, needs {list(output.shape[:2])} to pool by")
            output = pool(output, mask, self.pooling)
        vectors = check_vectors(f"{side} encoder", output, len(next(iter(inputs.values()))))
        return nn.functional.normalize(vectors, dim=1) if self.normalize else vectors


def check_vectors(source: str, output: Any, rows: int) -> Tensor:
    """Return the output of an encoder. Raises ConfigError: it is not [rows, D]."""
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != rows:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"{source}: got {got}, needs vectors [{rows}, D], or in TwoTowers hidden states [{rows}, T, D]"
        )
    return output
