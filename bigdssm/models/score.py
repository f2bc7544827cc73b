"""The score alpha * <u, w> + beta as one inner product: what an index holds of documents and is asked with.

Shapes: m queries, n documents, D vector width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def query_head(U: Tensor) -> Tensor:
    """Return a query's part of the score, [u, 1]: float32 [m, D+1]."""
    U = U.float()
    return torch.cat([U, torch.ones_like(U[:, :1])], dim=1)


def document_head(W: Tensor, alpha: Tensor | float, beta: Tensor | None) -> Tensor:
    """Return a document's part of the score, [alpha * w, beta], beta 0 where there is none: float32 [n, D+1]."""
    W = W.float()
    beta_n1 = torch.zeros_like(W[:, :1]) if beta is None else beta.float().unsqueeze(1)
    return torch.cat([alpha * W, beta_n1], dim=1)
