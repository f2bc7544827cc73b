"""Custom module of sentence-transformers exports: normalizes all but the last number of a vector."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

try:
    from sentence_transformers.base.modules import Module
except ImportError:  # before version 6
    from sentence_transformers.models import Module


class NormalizeAllButLast(Module):
    """Normalizes all numbers but the last to the norm `scale`."""

    config_keys = ["scale"]  # noqa: RUF012

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace the sentence embedding."""
        vector = features["sentence_embedding"]
        scaled = self.scale * normalize(vector[:, :-1], dim=1)
        features["sentence_embedding"] = torch.cat([scaled, vector[:, -1:]], 1)
        return features

    def save(self, output_path: str, *args: object, **kwargs: object) -> None:
        """Write the config; the module has no weights."""
        self.save_config(output_path)
