"""Vectors that another model made. Shapes: R rows, d numbers, H encoder width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigdssm.features import Vector
from bigdssm.models.encoders.base import Encoder, Parts, encodes


@encodes(Vector)
class VectorEncoder(Encoder):
    """The vector, zeros where it is missing, and whether it is, through one linear layer."""

    def __init__(self, feature: Vector, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.layer = nn.Linear(feature.dim + 1, dim)

    @classmethod
    def build(cls, feature: Vector, parts: Parts) -> VectorEncoder:
        """Return the encoder of a feature."""
        return cls(feature, parts.config.vector_dim)

    def forward(self, values_Rd: Tensor) -> Tensor:
        """Return [R, H] for float32 vectors [R, d]; NaN is missing."""
        missing_R = values_Rd[:, :1].isnan()
        inputs = torch.cat([values_Rd.nan_to_num(nan=0.0), missing_R.to(values_Rd.dtype)], dim=1)
        vectors: Tensor = self.layer(inputs.to(self.layer.weight.dtype))
        return vectors
