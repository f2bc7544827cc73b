"""Numbers. Shapes: R rows, H encoder width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigdssm.features import Numeric
from bigdssm.models.encoders.base import Encoder, Parts, encodes

# Deviations from the mean that a number is clipped to: beyond what was trained on, a layer only extrapolates.
MOST_DEVIATIONS = 10.0


@encodes(Numeric)
class NumericEncoder(Encoder):
    """A normalised value, at most MOST_DEVIATIONS from 0, and whether it is missing, through one layer."""

    def __init__(self, feature: Numeric, dim: int) -> None:
        super().__init__()
        self.feature, self.dim = feature, dim
        self.layer = nn.Linear(2, dim)

    @classmethod
    def build(cls, feature: Numeric, parts: Parts) -> NumericEncoder:
        """Return the encoder of a feature."""
        return cls(feature, parts.config.numeric_dim)

    def forward(self, values_R: Tensor) -> Tensor:
        """Return [R, H] for float32 values [R]; NaN is missing."""
        missing = values_R.isnan()
        value = values_R.masked_fill(missing, self.feature.mean)
        if self.feature.log:
            value = torch.where(missing, value, value.clamp(min=0).log1p())
        normalised = ((value - self.feature.mean) / self.feature.std).clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)
        inputs = torch.stack([normalised, missing.to(value.dtype)], dim=1)
        return nn.functional.gelu(self.layer(inputs.to(self.layer.weight.dtype)))
