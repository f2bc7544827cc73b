"""Floating-point operations of the towers' matrix products, by formula: what a forward must compute at the least."""

from __future__ import annotations

from torch import Tensor, nn

from bigdssm.models.dual_encoder import DualEncoder
from bigdssm.models.encoders import HistoryEncoder, TextEncoder
from bigdssm.models.tower import Tower
from bigdssm.schema import PADDING


def forward_flops(model: DualEncoder, query: dict[str, Tensor], doc: dict[str, Tensor]) -> float:
    """Return the operations of one forward over these features, padding left out; a backward takes twice as many.

    A linear layer takes 2 · inputs · outputs a row or token, attention over t tokens 4 · t² · width a layer.
    """
    return _tower_flops(model.query_tower, query) + _tower_flops(model.doc_tower, doc)


def _tower_flops(tower: Tower, features: dict[str, Tensor]) -> float:
    flops = 0.0 if tower.mlp is None else len(next(iter(features.values()))) * _linear_flops(tower.mlp)
    for name, values in features.items():
        encoder = tower.encoder_of(name)
        if isinstance(encoder, TextEncoder):
            length_R = (values != encoder.pad_token_id).sum(dim=1).double()
            layers = encoder.bert.config.num_hidden_layers
            flops += float(length_R.sum()) * _linear_flops(encoder)
            flops += float((length_R**2).sum()) * layers * 4 * encoder.dim
        elif isinstance(encoder, HistoryEncoder):
            length_R = (values != PADDING).sum(dim=1).double() + 1  # the start token
            for number, layer in enumerate(encoder.layers, 1):
                read_R = length_R.new_ones(length_R.shape) if number == len(encoder.layers) else length_R
                key_value = 4 * encoder.dim**2
                flops += float(length_R.sum()) * key_value
                flops += float(read_R.sum()) * (_linear_flops(layer) - key_value)
                flops += float((read_R * length_R).sum()) * 4 * encoder.dim
        else:
            flops += len(values) * _linear_flops(encoder)
    return flops


def _linear_flops(module: nn.Module) -> float:
    """Return the operations of all linear layers in `module`, a row; their weights may be sharded away."""
    layers = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    return float(sum(2 * layer.in_features * layer.out_features for layer in layers))
