"""Categories by their table's vectors. Shapes: R rows, K values, E table width."""

from __future__ import annotations

from torch import Tensor

from bigdssm.features import PADDING, Categorical
from bigdssm.models.encoders.base import Encoder, Parts, encodes
from bigdssm.models.tables import EmbeddingTables, table_name


@encodes(Categorical)
class CategoricalEncoder(Encoder):
    """Mean of the table's vectors over the values of a row; a single value is its own mean."""

    def __init__(self, table: str, dim: int, tables: EmbeddingTables) -> None:
        super().__init__()
        self.table, self.dim = table, dim
        self._tables = (tables,)  # in a tuple: the tables are the model's, not a submodule of each encoder

    @classmethod
    def build(cls, feature: Categorical, parts: Parts) -> CategoricalEncoder:
        """Return the encoder of a feature."""
        return cls(table_name(parts.side, feature.name), parts.config.embedding_dim, parts.tables)

    def forward(self, codes: Tensor) -> Tensor:
        """Return [R, E] for codes [R] or, multi-valued, [R, K]."""
        vectors = self._tables[0].look_up(self.table, codes)
        if codes.dim() == 1:
            return vectors
        count = (codes != PADDING).sum(dim=1, keepdim=True).clamp(min=1)
        return vectors.sum(dim=1) / count
