"""Encoders of categorical, numeric and vector features.

Shapes: R rows, K values, E table width, H encoder width, d numbers per vector.
"""

from typing import cast

import torch
from torch import Tensor, nn

from bigdssm.features import PADDING, CalendarTime, Categorical, Elapsed, Numeric, Vector
from bigdssm.models.embedding_tables import table_name
from bigdssm.models.encoders.base import BuildContext, Encoder, encodes

# Clipping bound in standard deviations: outside the range of the training data, a layer only extrapolates.
MAX_DEVIATIONS = 10.0


@encodes(Categorical)
@encodes(Elapsed)
@encodes(CalendarTime)
class CategoricalEncoder(Encoder):
    """The mean of the table's vectors over the values of a row."""

    def __init__(self, feature: Categorical | Elapsed | CalendarTime, context: BuildContext) -> None:
        super().__init__()
        self.table, self.dim = table_name(context.side, feature.name), context.config.embedding_dim
        self._tables = (context.tables,)  # in a tuple, so that the tables are not a submodule of each encoder

    def forward(self, codes: Tensor) -> Tensor:
        """Return [R, E] for codes [R] or, multi-valued, [R, K]."""
        vectors = self._tables[0].look_up(self.table, codes)
        if codes.dim() == 1:
            return vectors
        count = (codes != PADDING).sum(dim=1, keepdim=True).clamp(min=1)
        return vectors.sum(dim=1) / count


@encodes(Numeric)
class NumericEncoder(Encoder):
    """One layer over the normalized value, clipped to ±MAX_DEVIATIONS, and an indicator of missing values."""

    def __init__(self, feature: Numeric, context: BuildContext) -> None:
        super().__init__()
        self.feature, self.dim = feature, context.config.numeric_dim
        self.layer = nn.Linear(2, self.dim)

    def forward(self, values_R: Tensor) -> Tensor:
        """Return [R, H] for float32 values [R]; NaN is missing."""
        missing = values_R.isnan()
        value = values_R.masked_fill(missing, self.feature.mean)
        if self.feature.log:
            value = torch.where(missing, value, value.clamp(min=0).log1p())
        normalized = ((value - self.feature.mean) / self.feature.std).clamp(-MAX_DEVIATIONS, MAX_DEVIATIONS)
        inputs = torch.stack([normalized, missing.to(value.dtype)], dim=1)
        return nn.functional.gelu(self.layer(inputs.to(self.layer.weight.dtype)))


@encodes(Vector)
class VectorEncoder(Encoder):
    """One linear layer over the vector, zeros if missing, and an indicator of missing vectors."""

    def __init__(self, feature: Vector, context: BuildContext) -> None:
        super().__init__()
        self.dim = context.config.vector_dim
        self.layer = nn.Linear(feature.dim + 1, self.dim)

    def forward(self, values_Rd: Tensor) -> Tensor:
        """Return [R, H] for float32 vectors [R, d]; NaN is missing."""
        missing_R = values_Rd[:, :1].isnan()
        inputs = torch.cat([values_Rd.nan_to_num(nan=0.0), missing_R.to(values_Rd.dtype)], dim=1)
        return cast(Tensor, self.layer(inputs.to(self.layer.weight.dtype)))
